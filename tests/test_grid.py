"""Grid quantization: codes, encode, decode, weights and the linear layer on them; the battery, exact values, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import battery
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchlin
from torchlin.functional import (
    grid_decode,
    grid_dequantize,
    grid_encode,
    grid_linear,
    grid_pack,
    grid_unpack,
)
from torchlin.ops import grid as family
from torchlin.ops.grid_codes import (
    code_dtype,
    code_layout,
    grid_pack_reference,
    grid_unpack_reference,
    packed_bytes,
)

# ---------------------------------------------------------------------------------------- battery


def table(n: int, p: int, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """A grid of n points of p coordinates."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return battery.randn(n, p, device=device, dtype=wide, requires_grad=False, seed=5)


def codes_of(n: int, *shape: int, device: Any = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(n + sum(shape))
    return torch.randint(0, n, shape, generator=generator).to(code_dtype(n)).to(device)


class Weight:
    """A packed weight of random codes, with its scales."""

    def __init__(
        self, out: int, k: int, n: int, p: int, device: Any, dtype: torch.dtype, block: int | None = None
    ) -> None:
        self.grid = table(n, p, device, dtype)
        self.packed = grid_pack_reference(codes_of(n, out, -(-k // p)), n).to(device)
        shape = (out, -(-k // (block or max(k, 1))))
        values = 0.5 + battery.randn(*shape, device=device, dtype=torch.float64, requires_grad=False).abs()
        # float16 is what is stored; in training, and where float16 is too narrow, scales are float32.
        self.scales = values.to(dtype if dtype is not torch.bfloat16 else torch.float32).requires_grad_()


def encode_samples(device: torch.device, dtype: torch.dtype) -> Iterator[battery.Sample]:
    def x(*shape: int) -> Tensor:
        return battery.randn(*shape, device=device, dtype=dtype, requires_grad=False, seed=1)

    yield battery.Sample("3x32-n16", x(3, 32), table(16, 1, device, dtype))
    yield battery.Sample("1-n2", x(1), table(2, 1, device, dtype))
    yield battery.Sample("3x18-n88-p2", x(3, 18), table(88, 2, device, dtype))
    yield battery.Sample("2x3x5x7-n256-p2-ragged", x(2, 3, 5, 7), table(256, 2, device, dtype))
    yield battery.Sample("5x12-n64-p3", x(5, 12), table(64, 3, device, dtype))
    yield battery.Sample("5x14-n300-p4-ragged", x(5, 14), table(300, 4, device, dtype))
    yield battery.Sample("3x24-n512-p8", x(3, 24), table(512, 8, device, dtype))
    yield battery.Sample("2x3-n16-p8-only-ragged", x(2, 3), table(16, 8, device, dtype))
    yield battery.Sample("0x8-n16-p2", x(0, 8), table(16, 2, device, dtype))
    yield battery.Sample("3x0-n16-p2", x(3, 0), table(16, 2, device, dtype))
    yield battery.Sample("65x1024-n16-p2", x(65, 1024), table(16, 2, device, dtype))


def decode_samples(device: torch.device, dtype: torch.dtype) -> Iterator[battery.Sample]:
    def grid(n: int, p: int) -> Tensor:
        return table(n, p, device, dtype).clone().requires_grad_()

    yield battery.Sample("n16", grid(16, 1), codes_of(16, 3, 5, device=device))
    yield battery.Sample("1-n2", grid(2, 1), codes_of(2, 1, device=device))
    yield battery.Sample("n256-p2-ragged", grid(256, 2), codes_of(256, 2, 3, 5, 7, device=device), 13)
    yield battery.Sample("n88-p3", grid(88, 3), codes_of(88, 7, 11, device=device))
    yield battery.Sample("n300-p4", grid(300, 4), codes_of(300, 9, 2, device=device), 5)
    yield battery.Sample("n16-p8", grid(16, 8), codes_of(16, 3, device=device))
    # torch cannot batch the gradient of an embedding of nothing.
    yield battery.Sample("empty", grid(16, 2).detach(), codes_of(16, 0, 4, device=device))
    yield battery.Sample("large", grid(16, 2), codes_of(16, 40000, 2, device=device))


def pack_samples(device: torch.device, dtype: torch.dtype) -> Iterator[battery.Sample]:
    for n in (2, 8, 88, 256, 830, 65536):  # all others: test_packing_is_lossless_and_canonical
        yield battery.Sample(f"7x33-n{n}", codes_of(n, 7, 33, device=device), n)
    yield battery.Sample("1-n16", codes_of(16, 1, device=device), 16)
    yield battery.Sample("2x3x4x5-n64", codes_of(64, 2, 3, 4, 5, device=device), 64)
    yield battery.Sample("0x5-n16", codes_of(16, 0, 5, device=device), 16)
    yield battery.Sample("600x301-n8", codes_of(8, 600, 301, device=device), 8)


def unpack_samples(device: torch.device, dtype: torch.dtype) -> Iterator[battery.Sample]:
    for sample in pack_samples(device, dtype):
        codes, n = sample.tensors[0], sample.call(lambda codes, n: n)
        yield battery.Sample(sample.name, grid_pack_reference(codes, n), n, codes.shape[-1])
    wild = codes_of(256, 3, packed_bytes(88, 9), device=device)  # bits that no packed codes have
    yield battery.Sample("3x9-n88-wild", wild, 88, 9)
    yield battery.Sample("1-byte", wild[0, :1], 5, 3)


def weight_samples(device: torch.device, dtype: torch.dtype) -> Iterator[battery.Sample]:
    def sample(name: str, out: int, k: int, n: int, p: int, block: int | None = None) -> battery.Sample:
        w = Weight(out, k, n, p, device, dtype, block)
        w.grid.requires_grad_(n == 5)
        return battery.Sample(name, w.scales, w.packed, w.grid, k, block)

    yield sample("3x32-n16", 3, 32, 16, 1)
    yield sample("1x1-n2", 1, 1, 2, 1)
    yield sample("5x37-n16-p2-ragged", 5, 37, 16, 2, 8)
    yield sample("4x24-n5", 4, 24, 5, 1, 6)
    yield sample("3x46-n88-p2", 3, 46, 88, 2, 46)
    yield sample("3x30-n830-p3", 3, 30, 830, 3, 12)
    yield sample("2x40-n300-p8", 2, 40, 300, 8, 16)
    yield sample("0x8-n16", 0, 8, 16, 1)
    yield sample("600x256-n256-p2", 600, 256, 256, 2, 64)


def linear_samples(device: torch.device, dtype: torch.dtype) -> Iterator[battery.Sample]:
    def sample(
        name: str,
        shape: tuple[int, ...],
        out: int,
        n: int,
        p: int,
        block: int | None = None,
        bias: bool = False,
    ) -> battery.Sample:
        x = battery.randn(*shape, device=device, dtype=dtype, seed=1)
        w = Weight(out, shape[-1], n, p, device, dtype, block)
        b = battery.randn(out, device=device, dtype=dtype, seed=2) if bias else None
        return battery.Sample(name, x, w.packed, w.scales, w.grid, b, block_size=block)

    yield sample("1x64-n16", (1, 64), 5, 16, 1)
    yield sample("1-to-1", (1,), 1, 16, 1)
    yield sample("3x32-n4-bias", (3, 32), 7, 4, 1, 16, bias=True)
    yield sample("2x37-n16-p2-ragged", (2, 37), 6, 16, 2, 8)
    yield sample("1x48-n8", (1, 48), 9, 8, 1, 24)
    yield sample("2x3x2x24-n64-p2-bias", (2, 3, 2, 24), 5, 64, 2, bias=True)
    yield sample("1x46-n88-p2", (1, 46), 5, 88, 2)
    yield sample("1x130-n256-p2", (1, 130), 17, 256, 2, 64)
    yield sample("9x40-n256-p2", (9, 40), 13, 256, 2, bias=True)
    yield sample("2x33-n32", (2, 33), 4, 32, 1)
    yield sample("3x30-n512-p3", (3, 30), 4, 512, 3, 15)
    yield sample("2x20-n300-p4", (2, 20), 3, 300, 4)
    yield sample("1x24-n1024-p8", (1, 24), 3, 1024, 8)
    yield sample("17x40-n16-p2", (17, 40), 19, 16, 2, 20)
    yield sample("0x16-n16", (0, 16), 4, 16, 1)
    yield sample("3x16-to-0", (3, 16), 0, 16, 1)
    yield sample("1x1200-n16-p2", (1, 1200), 300, 16, 2)
    yield sample("70x520-n256-p2", (70, 520), 130, 256, 2, 104, bias=True)
    yield sample("130x512-n16", (130, 512), 136, 16, 1)


def emulated_kernels() -> dict[str, Any]:
    from simt.grid import emulated_kernels

    return emulated_kernels()


def op(name: str, public: Callable[..., Any], reference: Callable[..., Any], **promised: Any) -> battery.Op:
    return battery.Op(
        name=name,
        public=public,
        reference=reference,
        emulated=emulated_kernels,
        **{"raw": (f"_{name}",)} | promised,
    )


def reordered(function: Callable[..., Any], second_first: bool = False) -> Callable[..., Any]:
    """The battery judges by a sample's first tensor: the one whose dtype varies comes first."""
    if function.__name__.startswith("grid_decode"):
        return lambda grid, codes, size=None: function(codes, grid, size)
    return lambda scales, packed, grid, k, block: function(packed, scales, grid, k, block_size=block)


IN_FLOAT64 = {"emulated/float64": "float64 runs the reference on every device"}
NOT_FINITE = {
    "nonfinite": "NaN and infinities have no nearest point and are refused: test_bad_input",
    "emulated": "the emulated battery feeds NaN too; test_grid_cuda_emulated.py has the kernel",
}

test_battery = battery.tests(
    op("grid_encode", grid_encode, family.grid_encode_reference, samples=encode_samples, skip=NOT_FINITE),
    op("grid_decode", reordered(grid_decode), reordered(family.grid_decode_reference), samples=decode_samples,
       forward_ad=True, skip=IN_FLOAT64),
    op("grid_pack", grid_pack, grid_pack_reference, samples=pack_samples, dtypes=(torch.float32,)),
    op("grid_unpack", grid_unpack, grid_unpack_reference, samples=unpack_samples, dtypes=(torch.float32,)),
    op("grid_dequantize", reordered(grid_dequantize), reordered(family.grid_dequantize_reference),
       samples=weight_samples, forward_ad=True, skip=IN_FLOAT64 | {"samples:4-D": "a weight has two dimensions"}),
    op("grid_linear", grid_linear, family.grid_linear_reference, samples=linear_samples, forward_ad=True,
       nonfinite="spread",  # a block's scale multiplies its sum: an infinite one makes no infinities of both signs
       raw=("_grid_linear", "_grid_dequantize"), names=(("quantizer", "higgs"),), relative_to="row",
       ulps=4.0,  # the same products, summed in another order
       skip=IN_FLOAT64 | {"deterministic/float64": "float64 is torch's own GEMM, whose bits depend on the number of threads"}),
)  # fmt: skip


# ---------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 88, 100, 830, 5000, 32768, 65535, 65536])
def test_layout_is_the_tightest(n: int) -> None:
    digits, width = code_layout(n)
    assert n**digits <= 1 << width, "not every word fits"
    assert n**digits > 1 << width - 1, "a bit is wasted"
    for other in range(1, 5):
        assert width * other <= (n**other - 1).bit_length() * digits
    assert packed_bytes(n, 0) == 0
    assert packed_bytes(n, 8 * digits) == width


def test_codes_lie_in_the_stream_as_documented() -> None:
    assert grid_pack(torch.tensor([1, 2, 3, 15]), 16).tolist() == [0x21, 0xF3]
    assert grid_pack(torch.tensor([5, 2, 7]), 8).tolist() == [0b11010101, 0b1]  # 3 bits each, low bits first
    assert grid_pack(torch.tensor([87, 86, 85]), 88).tolist() == [  # base 88, 13 bits a word
        (87 + 86 * 88) & 0xFF,
        (87 + 86 * 88) >> 8 | (85 << 5) & 0xFF,
        85 >> 3,
        0,
    ]
    assert grid_pack(torch.tensor([0x1234, 0xFFFF]), 65536).tolist() == [0x34, 0x12, 0xFF, 0xFF]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 65536), rows=st.integers(0, 3), count=st.integers(0, 70), seed=st.integers(0, 9))
def test_packing_is_lossless_and_canonical(n: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(0, n, (rows, count), generator=torch.Generator().manual_seed(seed))
    packed = grid_pack(codes, n)
    assert packed.shape == (rows, packed_bytes(n, count))
    assert torch.equal(packed, grid_pack_reference(codes, n))
    unpacked = grid_unpack(packed, n, count)
    assert unpacked.dtype is code_dtype(n)
    assert torch.equal(unpacked.long(), codes)


# ---------------------------------------------------------------------------------------- encode


def brute_force(x: Tensor, grid: Tensor) -> Tensor:
    """Nearest points in float64, of equals the first."""
    vectors = x.double().unflatten(-1, (-1, grid.shape[1]))
    return (vectors.unsqueeze(-2) - grid.double()).square().sum(-1).argmin(-1)


@pytest.mark.parametrize(
    ("n", "p"), [(2, 1), (3, 1), (16, 1), (255, 1), (16, 2), (256, 2), (1000, 3), (64, 4), (90, 8)]
)
def test_encode_takes_the_nearest_point(n: int, p: int) -> None:
    x, grid = torch.randn(50, 24 * p, generator=torch.Generator().manual_seed(n)) * 1.5, table(n, p)
    codes = grid_encode(x, grid).long()
    true = brute_force(x, grid)
    vectors = x.double().unflatten(-1, (-1, p))
    distance = lambda c: (vectors - grid.double()[c]).square().sum(-1)  # noqa: E731
    # Two points may be equally near up to float32's rounding of the distance, and no further.
    assert (distance(codes) <= distance(true) * (1 + 8 * 2**-24) + 1e-12).all()
    assert (codes != true).double().mean() < 1e-3


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
def test_ties_go_to_the_first(p: int) -> None:
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * p).view(-1, p)
    grid = torch.cat((corners, corners))  # every point twice
    assert grid_encode(torch.zeros(3, p), grid).tolist() == [[0]] * 3  # all are equally near
    assert grid_encode(corners * 3, grid).flatten().tolist() == list(range(len(corners)))


def test_encode_far_away_and_next_to_bisectors() -> None:
    grid = torch.tensor([[-1.0], [0.0], [2.0]])
    x = torch.tensor([-1e18, -0.5, math.nextafter(-0.5, 0), 1.0, 1e6, 1e-45])
    assert grid_encode(x, grid).tolist() == [0, 0, 0 if float(x[2]) == -0.5 else 1, 1, 2, 1]


def test_vmap_of_what_has_no_gradient() -> None:
    """The battery batches only what is differentiable."""
    x, grid = torch.randn(4, 3, 10, generator=torch.Generator().manual_seed(0)), table(88, 2)
    codes = torch.func.vmap(lambda v: grid_encode(v, grid))(x)
    assert torch.equal(codes, grid_encode(x, grid))
    grids = torch.stack((grid, grid.flip(0)))
    both = torch.func.vmap(lambda g: grid_encode(x, g))(grids)
    assert torch.equal(both[1], grid_encode(x, grids[1]))
    packed = torch.func.vmap(lambda c: grid_pack(c, 88))(codes)
    assert torch.equal(packed, grid_pack(codes, 88))
    assert torch.equal(torch.func.vmap(lambda b: grid_unpack(b, 88, 5))(packed), codes)
    assert torch.equal(
        torch.func.vmap(lambda c: grid_decode(c, grid), 1)(codes), grid_decode(codes, grid).transpose(0, 1)
    )


# ---------------------------------------------------------------------------------------- the linear layer


@pytest.mark.parametrize("level", battery.available_isa_levels())
@pytest.mark.parametrize("dtype", battery.FLOATS, ids=battery.dtype_name)
def test_linear_on_small_integers_is_exact(dtype: torch.dtype, level: str) -> None:
    """Where every product and sum is a small integer nothing may round, whatever path runs."""
    before = torch.ops.torchlin._cpu_isa()
    torch.ops.torchlin._set_cpu_isa(level)
    try:
        for batch in (1, 2, 3, 5, 8, 16, 33, 70):
            for n, p, k, block in ((16, 1, 64, None), (16, 2, 70, 14), (256, 2, 66, None), (88, 2, 31, 8), (64, 3, 33, 9),
                                   (8, 1, 40, None), (4, 1, 100, 50), (256, 4, 40, None), (700, 8, 24, 8)):  # fmt: skip
                grid = torch.randint(-1, 2, (n, p), generator=torch.Generator().manual_seed(n)).float()
                codes = codes_of(n, 37, -(-k // p))
                scales = (1 + codes_of(3, 37, -(-k // (block or k)))).half()
                x = (codes_of(3, batch, k).float() - 1).to(dtype)
                weight = grid[codes.long()].flatten(1)[:, :k] * family._a_scale_a_number(
                    scales.float(), k, block or k
                )
                y = grid_linear(x, grid_pack(codes, n), scales, grid, block_size=block)
                assert torch.equal(y.double(), (x.double() @ weight.double().T).to(dtype).double()), (
                    batch,
                    n,
                    p,
                )
    finally:
        torch.ops.torchlin._set_cpu_isa(before)


@pytest.mark.parametrize("bias", [False, True])
def test_many_rows_of_bfloat16_on_the_matrix_unit(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight made in strips and torch's product: right on every CPU, chosen where it pays."""
    w = Weight(1100, 70, 256, 2, "cpu", torch.bfloat16, block=14)
    x = battery.randn(300, 70, device="cpu", dtype=torch.bfloat16, requires_grad=False)
    b = battery.randn(1100, device="cpu", dtype=torch.bfloat16, requires_grad=False) if bias else None
    arguments = (x, w.packed, w.scales.detach(), w.grid, b)
    monkeypatch.setattr(family, "_MATRIX_UNIT", True)
    assert family.for_matrix_unit(x)
    assert not family.for_matrix_unit(x[:200])
    assert not family.for_matrix_unit(x.float())
    y = grid_linear(*arguments, block_size=14)
    true = family.grid_linear_reference(
        *(None if t is None else t.double() if t.is_floating_point() else t for t in arguments), block_size=14
    )
    error = (y.double() - true).norm() / true.norm()
    assert error < 2 * 2**-9, "more than the rounding of the weight and of the result"


def test_scales_alone_learn() -> None:
    """Gradient descent on the scales recovers those that made the targets."""
    w = Weight(8, 24, 16, 2, "cpu", torch.float32, block=8)
    x = battery.randn(64, 24, device="cpu", dtype=torch.float32, requires_grad=False)
    target = grid_linear(x, w.packed, w.scales.detach(), w.grid, block_size=8)
    scales = torch.ones_like(w.scales).requires_grad_()
    optimizer = torch.optim.LBFGS([scales], max_iter=60)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (grid_linear(x, w.packed, scales, w.grid, block_size=8) - target).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    assert torch.allclose(scales, w.scales, atol=1e-3)


def test_memory_for_the_gradient_is_kept_only_where_it_is_needed() -> None:
    w = Weight(8, 24, 16, 2, "cpu", torch.float32)
    x = battery.randn(5, 24, device="cpu", dtype=torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grid_linear(x, w.packed, w.scales.detach(), w.grid).sum()
    assert all(t.shape != x.shape for t in kept), "x is kept though only its own gradient is wanted"


# ---------------------------------------------------------------------------------------- bad input

GRID = torch.tensor([[-1.0, 0.0], [1.0, 2.0], [0.0, 1.0]])
PACKED = grid_pack_reference(torch.tensor([[0, 1, 2], [2, 1, 0]]), 3)
SCALES = torch.ones(2, 1)
X = torch.ones(4, 6)

BAD: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("x is a list", lambda: grid_encode([1.0], GRID), TypeError, "x must be a torch.Tensor, got list"),
    ("x of integers", lambda: grid_encode(torch.ones(2, dtype=torch.int32), GRID), TypeError, "x must be float32"),
    ("x is a number", lambda: grid_encode(torch.tensor(1.0), GRID), ValueError, "x must have at least one dimension"),
    ("NaN", lambda: grid_encode(torch.tensor([1, math.nan]), GRID), ValueError, "x must be finite.*got values from nan"),
    ("Inf", lambda: grid_encode(torch.tensor([math.inf, 1]), GRID), ValueError, "x must be finite"),
    ("x beyond range", lambda: grid_encode(torch.tensor([1e19]), GRID[:, :1]), ValueError, "x must be finite, of at most 1e"),
    ("grid 1-D", lambda: grid_encode(X, GRID[0]), ValueError, r"grid must have shape \(n, p\)"),
    ("grid of one point", lambda: grid_encode(X, GRID[:1]), ValueError, r"grid must have shape.*got \(1, 2\)"),
    ("grid too wide", lambda: grid_encode(X, torch.ones(4, 9)), ValueError, r"p <= 8, got \(4, 9\)"),
    ("grid of halves", lambda: grid_encode(X, GRID.half()), TypeError, "grid must be float32 or float64"),
    ("grid elsewhere", lambda: grid_encode(X, GRID.to("meta")), ValueError, "grid must be on x's device cpu, got meta"),
    ("codes of floats", lambda: grid_decode(X, GRID), TypeError, "codes must be integers, got torch.float32"),
    ("codes of bools", lambda: grid_decode(X > 0, GRID), TypeError, "codes must be integers"),
    ("code too large", lambda: grid_decode(torch.tensor([3]), GRID), ValueError, r"codes must be in \[0, 2\].*got 3"),
    ("code negative", lambda: grid_pack(torch.tensor([-1]), 16), ValueError, r"codes must be in \[0, 15\].*got -1"),
    ("size too large", lambda: grid_decode(torch.tensor([0, 1]), GRID, 5), ValueError, r"size must be in \(2, 4\]"),
    ("size too small", lambda: grid_decode(torch.tensor([0, 1]), GRID, 2), ValueError, r"size must be in \(2, 4\]"),
    ("n too small", lambda: grid_pack(torch.tensor([0]), 1), ValueError, r"n must be in \[2, 65536\], got 1"),
    ("n too large", lambda: grid_pack(torch.tensor([0]), 70000), ValueError, r"n must be in \[2, 65536\]"),
    ("n no int", lambda: grid_pack(torch.tensor([0]), 16.0), TypeError, "n must be an int, got float"),
    ("packed of ints", lambda: grid_unpack(torch.tensor([0]), 16, 2), TypeError, "packed must be uint8, got torch.int64"),
    ("packed too short", lambda: grid_unpack(PACKED, 16, 99), ValueError, "packed must hold 50 bytes a row for 99 codes"),
    ("count negative", lambda: grid_unpack(PACKED, 16, -1), ValueError, "count must not be negative"),
    ("packed unfit for x", lambda: grid_linear(torch.ones(4, 60), PACKED, SCALES, GRID), ValueError, "packed must hold"),
    ("packed 1-D", lambda: grid_linear(X, PACKED[0], SCALES, GRID), ValueError, "packed must be "),
    ("scales too many", lambda: grid_linear(X, PACKED, torch.ones(2, 2), GRID), ValueError, r"scales must have shape \(2, 1\)"),
    ("scales of ints", lambda: grid_linear(X, PACKED, SCALES.int(), GRID), TypeError, "scales must be float32"),
    ("block splits a vector", lambda: grid_linear(X, PACKED, torch.ones(2, 2), GRID, block_size=3), ValueError,
     "block_size must be .* multiple of the grid's p = 2, got 3"),
    ("block of 0", lambda: grid_linear(X, PACKED, SCALES, GRID, block_size=0), ValueError, "block_size must be positive"),
    ("block no int", lambda: grid_linear(X, PACKED, SCALES, GRID, block_size=2.0), TypeError, "block_size must be an int"),
    ("bias too long", lambda: grid_linear(X, PACKED, SCALES, GRID, torch.ones(3)), ValueError, r"bias must have shape \(2,\)"),
    ("x elsewhere", lambda: grid_linear(X.to("meta"), PACKED, SCALES, GRID), ValueError, "packed must be on x's device meta"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_names_are_public() -> None:
    for name in ("encode", "decode", "pack", "unpack", "dequantize", "linear"):
        assert getattr(torchlin.functional, f"grid_{name}").__doc__
