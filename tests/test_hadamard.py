"""The Hadamard transform: exact values, every kind of order, gradients, memory, bad input, the module."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import battery
import numpy as np
import pytest
import torch
from torch import Tensor

import torchlin
from torchlin.functional import hadamard_transform
from torchlin.nn import HadamardTransform
from torchlin.ops.hadamard import _core_in_graph, hadamard_transform_reference
from torchlin.ops.hadamard_matrix import core_matrix, hadamard_order

# H_K that are not symmetric: Paley I (44), Williamson (92), and a symmetric one with its rows turned (20).
ASYMMETRIC = (44, 92)


def turned(k: int) -> Tensor:
    """A user's own Hadamard matrix: H_K with its rows in another order, no longer symmetric."""
    return core_matrix(k).roll(1, 0)


# ---------------------------------------------------------------------------------------- battery


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[battery.Sample]:
    def x(*shape: int) -> Tensor:
        return battery.randn(*shape, device=device, dtype=dtype, seed=1)

    def signs(n: int, wide: bool = True) -> Tensor:
        wider = torch.float64 if dtype is torch.float64 else torch.float32
        return battery.randn(n, device=device, dtype=wider if wide else dtype, seed=2)

    flips = (battery.randn(64, device=device, dtype=dtype, requires_grad=False, seed=3) > 0).to(dtype) * 2 - 1
    yield battery.Sample("3x64", x(3, 64))
    yield battery.Sample("1", x(1), scale=1.5)
    yield battery.Sample("5x2", x(5, 2))
    yield battery.Sample("3x4", x(3, 4))
    yield battery.Sample("13x8", x(13, 8))
    yield battery.Sample("9x16", x(9, 16))
    yield battery.Sample("3x384", x(3, 384))
    yield battery.Sample("7x32-unnormalised", x(7, 32), scale=1.0)
    yield battery.Sample("0x16", x(0, 16))
    yield battery.Sample("3x0x5-dim0", x(2, 0, 5), dim=0)
    yield battery.Sample("2x256-transpose", x(2, 256), transpose=True)
    yield battery.Sample("3x64-flips", x(3, 64), signs=flips)
    yield battery.Sample("4x128-signs", x(4, 128), signs=signs(128))
    yield battery.Sample("3x16-signs-transpose", x(3, 16), 0.5, signs=signs(16), transpose=True)
    yield battery.Sample("3x8-signs-of-x", x(3, 8), signs=signs(8, wide=False))
    yield battery.Sample("8x3-dim0", x(8, 3), dim=0)
    yield battery.Sample("3x16x5-dim1-signs", x(3, 16, 5), dim=1, signs=signs(16))
    yield battery.Sample("2x12x3x4-dim1", x(2, 12, 3, 4), dim=1)
    yield battery.Sample("2x3x5x8-dim2-blocks", x(2, 3, 10, 8), dim=-2, block_size=2)
    yield battery.Sample("3x96-blocks-signs", x(3, 96), block_size=32, signs=signs(96))
    yield battery.Sample("3x72-blocks36", x(3, 72), block_size=36)
    yield battery.Sample("1x12", x(1, 12))
    yield battery.Sample("3x44", x(3, 44))
    yield battery.Sample("3x44-transpose", x(3, 44), transpose=True)
    yield battery.Sample("2x176-signs-transpose", x(2, 176), signs=signs(176), transpose=True)
    yield battery.Sample("92x3-dim0-signs", x(92, 3), dim=0, signs=signs(92))
    yield battery.Sample("3x20-had_k", x(3, 20), had_k=turned(20).to(device))
    yield battery.Sample("2x80-had_k-transpose", x(2, 80), had_k=turned(20).to(device), transpose=True)
    yield battery.Sample("257x256", x(257, 256))
    yield battery.Sample("8193x8", x(8193, 8))
    yield battery.Sample("131072", x(131072))
    yield battery.Sample("5x17408-signs", x(5, 17408), signs=signs(17408))


def emulated_kernels() -> dict[str, Any]:
    from simt.build import load
    from test_hadamard_cuda_emulated import Case

    module = load("hadamard")

    def write(
        x: Tensor, scale: float, dim: int, order: int, signs: Any, had_k: Any, transpose: bool, out: Tensor
    ) -> None:
        numpy = lambda t: None if t is None else t.detach().numpy()  # noqa: E731
        Case(dim, order, numpy(had_k), numpy(signs), scale, transpose).run(module, x, out)

    def make(x: Tensor, *arguments: Any) -> Tensor:
        out = torch.empty_like(x)
        write(x, *arguments, out)
        return out

    def last(x: Tensor, scale: float | None = None) -> Tensor:
        n = x.shape[-1]
        return make(x, n**-0.5 if scale is None else scale, x.dim() - 1, n, None, None, False)

    return {"_hadamard_fwd": make, "_hadamard_last": last, "_hadamard_out": write}


OP = battery.Op(
    name="hadamard",
    public=hadamard_transform,
    reference=hadamard_transform_reference,
    samples=samples,
    raw=("_hadamard_fwd", "_hadamard_last", "_hadamard_out"),
    names=(("transform", "hadamard"),),
    autocast="keep",
    nonfinite="spread",  # a core may be applied as (S + D) u - 2 D x: an infinity can meet its own negative
    preserves_format=True,
    emulated=emulated_kernels,
    inplace=True,
    out=True,
    forward_ad=True,
    inductor=("3x64", "2x176-signs-transpose"),
)

test_battery = battery.tests(OP)

# ---------------------------------------------------------------------------------------- exact values


def sylvester_rows(n: int, rows: np.ndarray) -> np.ndarray:
    """Rows of H_n by its definition: (-1)^popcount(i & j)."""
    parity = rows[:, None] & np.arange(n)[None, :]
    for shift in (16, 8, 4, 2, 1):
        parity ^= parity >> shift
    return 1 - 2 * (parity & 1)


def integers(*shape: int, limit: int) -> Tensor:
    return torch.randint(-limit, limit + 1, shape, dtype=torch.int64)


@pytest.mark.parametrize("dtype", battery.FLOATS, ids=battery.dtype_name)
@pytest.mark.parametrize("log_n", range(15))
def test_equal_to_the_popcount_matrix_bit_for_bit(log_n: int, dtype: torch.dtype) -> None:
    n = 1 << log_n
    # Every sum is an integer that the dtype holds exactly, so nothing may round.
    limit = {torch.float16: 2**11, torch.bfloat16: 2**8}.get(dtype, 2**24) // n
    x = integers(3, n, limit=min(limit, 100)) if limit else torch.zeros(3, n, dtype=torch.int64)
    if not limit:  # no room for a sum of n numbers: a few ones
        x[:, torch.randint(0, n, (100,))] = 1
    rows = np.arange(n) if n <= 1024 else np.random.default_rng(log_n).choice(n, 512, replace=False)
    expected = x.numpy() @ sylvester_rows(n, rows).T
    y = hadamard_transform(x.to(dtype), scale=1.0)
    assert y.dtype == dtype
    assert np.array_equal(y[:, rows].to(torch.int64).numpy(), expected)


@pytest.mark.parametrize("log_n", [16, 20, 24])
def test_large_powers_of_two(log_n: int) -> None:
    n = 1 << log_n
    where = torch.randint(0, n, (1,)).item()
    impulse = torch.zeros(n)
    impulse[where] = 1
    row = hadamard_transform(impulse, scale=1.0)
    assert torch.equal(
        row, torch.from_numpy(sylvester_rows(n, np.array([where]))[0]).float()
    )  # H is symmetric

    x = (torch.randint(0, 2, (n,)) * 2 - 1).float()  # sums of n <= 2^24 signs stay exact
    y = hadamard_transform(x, scale=1.0)
    assert torch.equal(hadamard_transform(y, scale=2.0**-log_n), x), "H (H x) / n is not x"
    assert y.double().square().sum().item() == float(n) * n, "Parseval: |H x|^2 is not n |x|^2"
    assert y[0] == x.sum()


SIZES = (12, 20, 28, 36, 40, 44, 52, 60, 68, 76, 84, 92, 100, 116, 124, 140, 156, 172, 188, 300, 428)
MODEL_SIZES = (
    576, 768, 896, 1152, 1280, 1408, 1536, 2304, 2560, 2880, 3072, 3456, 3584, 3840, 4608, 4864,
    5120, 5376, 5504, 5632, 6144, 6400, 6656, 6912, 7168, 8960, 9216, 9728, 10240, 10944, 11008, 12288,
    12800, 13696, 13824, 14336, 14848, 15360, 17408, 17920, 18432, 18944, 19200, 20480, 21504, 22016, 24576,
    25600,    27392, 27648, 28672, 29568, 33792, 36864, 49152, 53248,
)  # fmt: skip


def definition(x: Tensor, n: int, transpose: bool = False) -> Tensor:
    """H_n x in float64 for rows x: dense H_K and dense Sylvester factors, no butterfly."""
    k, power = hadamard_order(n)
    low = 1 << (power.bit_length() - 1) // 2
    high = power // low
    core = core_matrix(k).double()
    a, b = (torch.from_numpy(sylvester_rows(m, np.arange(m))).double() for m in (high, low))
    cube = x.double().reshape(-1, k, high, low)
    return torch.einsum("ij,rjkl,km,ln->rimn", core.T if transpose else core, cube, a, b).reshape(x.shape)


@pytest.mark.parametrize("n", [n for n in (*SIZES, *MODEL_SIZES) if n <= 4864])
def test_matrix_is_the_one_the_transform_multiplies_by(n: int) -> None:
    x = torch.randn(2, n, dtype=torch.float64)
    h = torchlin.hadamard_matrix(n, dtype=torch.float64)
    for transpose in (False, True):
        y = hadamard_transform(x, 1.0, transpose=transpose)
        torch.testing.assert_close(y, x @ (h if transpose else h.T), rtol=0, atol=1e-11)
        torch.testing.assert_close(definition(x, n, transpose), y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("n", MODEL_SIZES)
def test_model_sizes(n: int) -> None:
    """Two rows, forward, transposed and back, against the definition: exact to rounding in every dtype."""
    x = torch.randn(2, n)
    for dtype, tolerance in (
        (torch.float64, 1e-14),
        (torch.float32, 1e-6),
        (torch.bfloat16, 4e-3),
        (torch.float16, 5e-4),
    ):
        rows = x.to(dtype)
        for transpose in (False, True):
            true = definition(rows, n, transpose) * n**-0.5
            y = hadamard_transform(rows, transpose=transpose)
            assert ((y.double() - true).norm() / true.norm()).item() < tolerance, (dtype, transpose)
    back = hadamard_transform(hadamard_transform(x), transpose=True)
    torch.testing.assert_close(back, x, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "n", [1 << e for e in range(0, 18, 3)] + [12, 44, 92, 172, 428, 576, 11008, 17408, 29568]
)
def test_accuracy_contract(n: int) -> None:
    """Error against float64: at most twice a float32 butterfly's; for 16 bits, that of one rounding."""
    rows = max(2, (1 << 15) // n)
    x = torch.randn(rows, n)
    true = definition(x, n) * n**-0.5

    def error(y: Tensor, of: Tensor = true) -> float:
        return ((y.double() - of).norm() / of.norm()).item()

    assert error(hadamard_transform(x)) <= 2 * error(hadamard_transform_reference(x)) + 2e-8
    for dtype in (torch.float16, torch.bfloat16):
        halves = x.to(dtype)
        true_of_halves = definition(halves, n) * n**-0.5
        one_rounding = error(true_of_halves.to(dtype), true_of_halves)
        assert error(hadamard_transform(halves), true_of_halves) <= 1.01 * one_rounding + 1e-7


@pytest.mark.parametrize("n", [64, 256, 576, 4096, 11008])
def test_large_fp16_rows_do_not_overflow_inside(n: int) -> None:
    x = torch.full((2, n), 6e4, dtype=torch.float16)
    x[:, 1::2] *= -1
    with torch.no_grad():
        y = hadamard_transform(x, scale=1 / n)  # sums reach 6e4 · n before the scale
    true = definition(x, n) / n
    assert torch.isfinite(y).all()
    assert (y.double() - true).abs().max() <= 2**-11 * true.abs().max()
    random = torch.where(torch.rand(2, n) < 0.5, -6e4, 6e4).half()
    true = definition(random, n) * n**-0.5
    y = hadamard_transform(random)
    fits = true.abs() < 65000
    assert torch.isfinite(y[fits]).all()
    assert ((y.double() - true).abs()[fits] <= 2**-11 * true.abs()[fits] + 1e-3).all()


@pytest.mark.parametrize("scale", [None, 1.0, 0.25, 3, -2.0, 0.0])
def test_scale(scale: float | None) -> None:
    x = torch.randn(3, 64)
    expected = definition(x, 64) * (64**-0.5 if scale is None else scale)
    torch.testing.assert_close(hadamard_transform(x, scale).double(), expected, rtol=0, atol=1e-5)


def test_formula_with_signs() -> None:
    """y_i = scale · sum_j H_ij s_j x_j, and its transpose, entry by entry."""
    for n in (16, 44, 176):
        h = torchlin.hadamard_matrix(n, dtype=torch.float64)
        x, s = torch.randn(n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
        torch.testing.assert_close(hadamard_transform(x, 0.5, signs=s), 0.5 * (h @ (s * x)))
        torch.testing.assert_close(hadamard_transform(x, 0.5, signs=s, transpose=True), 0.5 * s * (h.T @ x))


def test_transpose_with_flips_is_the_inverse() -> None:
    for n in (64, 576, 44, 172, 11008):
        x, s = torch.randn(3, n), (torch.randint(0, 2, (n,)) * 2 - 1).float()
        back = hadamard_transform(hadamard_transform(x, signs=s), signs=s, transpose=True)
        torch.testing.assert_close(back, x, rtol=0, atol=3e-6)


@pytest.mark.parametrize("n", [20, 80, 320])
def test_own_matrix(n: int) -> None:
    own = turned(20)
    h = torch.kron(own, torchlin.hadamard_matrix(n // 20)).double()
    assert not torch.equal(h, h.T)
    x = torch.randn(5, n, dtype=torch.float64)
    for dtype in (torch.int8, torch.float32, torch.int64):
        torch.testing.assert_close(hadamard_transform(x, 1.0, had_k=own.to(dtype)), x @ h.T)
        torch.testing.assert_close(hadamard_transform(x, 1.0, had_k=own.to(dtype), transpose=True), x @ h)
    in_blocks = torch.cat([part @ h.T for part in (x, 2 * x)], -1)
    torch.testing.assert_close(
        hadamard_transform(torch.cat([x, 2 * x], -1), 1.0, had_k=own, block_size=n), in_blocks
    )


def test_own_matrix_of_order_one_two_and_four() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    for k in (1, 2, 4, 8):
        own = torchlin.hadamard_matrix(k)
        torch.testing.assert_close(hadamard_transform(x, had_k=own), hadamard_transform(x))
        torch.testing.assert_close(hadamard_transform(x, 1.0, had_k=-own), -hadamard_transform(x, 1.0))


@pytest.mark.parametrize(
    ("n", "block"), [(64, 16), (96, 32), (24, 8), (144, 36), (88, 44), (6, 1), (10, 2), (576, 576)]
)
def test_blocks(n: int, block: int) -> None:
    x, s = torch.randn(3, n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    h = torch.block_diag(*[torchlin.hadamard_matrix(block, dtype=torch.float64)] * (n // block))
    torch.testing.assert_close(hadamard_transform(x, block_size=block, signs=s), block**-0.5 * (x * s) @ h.T)
    torch.testing.assert_close(
        hadamard_transform(x, block_size=block, signs=s, transpose=True), block**-0.5 * s * (x @ h)
    )


@pytest.mark.parametrize("n", [2, 8, 12, 64, 44, 176, 4096])
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_any_dim(n: int, dim: int) -> None:
    shape = [3, 3, 5]
    shape[dim] = n
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape).to(dtype)
        expected = definition(x.movedim(dim, -1), n).movedim(-1, dim) * n**-0.5
        y = hadamard_transform(x, dim=dim)
        assert y.stride() == x.stride()
        assert ((y.double() - expected).norm() / expected.norm()).item() < (
            1e-6 if dtype is torch.float32 else 4e-3
        )


def test_strided_dim_is_not_copied() -> None:
    x = torch.randn(64, 33, 5)
    hadamard_transform(x, dim=0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
        hadamard_transform(x, dim=0)
        hadamard_transform(x.mT, dim=0)
    names = {event.name for event in run.events()}
    assert names & {"torchlin::_hadamard_fwd", "torchlin::_hadamard_last"}
    assert not names & {"aten::contiguous", "aten::clone", "aten::copy_", "aten::to"}, names


@pytest.mark.parametrize("rows", [1, 3, 5, 8, 8193])
@pytest.mark.parametrize("n", [4, 8, 64, 512, 44])
def test_rows_do_not_depend_on_the_batch(rows: int, n: int) -> None:
    """Each row gets the same bits alone as in any batch: tails are computed like everything else."""
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(rows, n).to(dtype)
        y = hadamard_transform(x)
        for i in {0, rows // 2, max(rows - 2, 0), rows - 1}:
            assert torch.equal(hadamard_transform(x[i]), y[i]), f"row {i} of {rows}"


@pytest.mark.parametrize("n", [8, 64, 1024, 44, 576])
def test_alignment_does_not_change_bits(n: int) -> None:
    for dtype in battery.FLOATS:
        x = torch.randn(3, n).to(dtype)
        y = hadamard_transform(x)
        for offset in (1, 2, 3, 5, 7):
            room = torch.full((3 * (n + offset) + offset,), 99.0, dtype=dtype)
            view = room[offset:].view(3, n + offset)[:, :n].copy_(x)
            assert torch.equal(hadamard_transform(view), y), f"offset {offset}"


def test_threads_do_not_change_bits() -> None:
    cases = [
        ((4097, 64), {}),
        ((3, 1 << 18), {}),
        ((1 << 12, 40), {"dim": 0}),
        ((64, 11008), {}),
        ((2, 44 << 12), {}),
    ]
    for shape, options in cases:
        x = torch.randn(shape)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(hadamard_transform(x, **options))
        assert all(torch.equal(results[0], y) for y in results[1:]), shape


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 64), (0, 0, 4), (0, 576), (0, 44, 2)])
def test_empty_batch(shape: tuple[int, ...]) -> None:
    dim = 1 if shape == (0, 44, 2) else -1
    x = torch.randn(shape, requires_grad=True)
    s = torch.randn(shape[dim], requires_grad=True)
    y = hadamard_transform(x, dim=dim, signs=s)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(s.grad, torch.zeros_like(s))


def test_one_special_value_spreads_over_its_row_only() -> None:
    for n in (64, 44, 576):
        for special in (float("nan"), float("inf")):
            x = torch.randn(5, n)
            clean = hadamard_transform(x)
            x[2, n // 3] = special
            y = hadamard_transform(x)
            assert not torch.isfinite(y[2]).any()
            assert torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
            if special == float("inf") and n == 64:  # H_ij · inf: the sign of the matrix's column
                assert torch.equal(y[2].sign(), torchlin.hadamard_matrix(n)[:, n // 3].float())


# ---------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("n", [*ASYMMETRIC, 176, 64, 576])
def test_gradient_is_the_transpose(n: int) -> None:
    """The peers' gradients use H where H is not its own transpose."""
    h = torchlin.hadamard_matrix(n, dtype=torch.float64)
    assert torch.equal(h, h.T) == (n in (64, 576))
    x = torch.randn(3, n, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, n, dtype=torch.float64)
    for transpose in (False, True):
        (grad,) = torch.autograd.grad(hadamard_transform(x, 1.0, transpose=transpose), x, g)
        torch.testing.assert_close(grad, g @ (h.T if transpose else h))


def test_second_order_through_signs() -> None:
    """d²y/dx ds is H's entries: a product of two inputs, so the second derivative is not zero."""
    x = torch.randn(2, 44, dtype=torch.float64, requires_grad=True)
    s = torch.randn(44, dtype=torch.float64, requires_grad=True)
    for transpose in (False, True):
        torch.autograd.gradgradcheck(
            lambda x, s, transpose=transpose: hadamard_transform(x, signs=s, transpose=transpose),
            (x, s),
            fast_mode=True,
        )
    third = lambda x, s: torch.autograd.grad(  # noqa: E731
        hadamard_transform(x, signs=s).pow(3).sum(), (x, s), create_graph=True
    )
    torch.autograd.gradgradcheck(third, (x, s), fast_mode=True)


def test_gradient_of_signs_is_summed_unrounded() -> None:
    x = torch.randn(4096, 8).bfloat16()
    s = torch.ones(8, requires_grad=True)
    hadamard_transform(x, signs=s).float().sum().backward()
    xd = x.double()
    sd = torch.ones(8, dtype=torch.float64, requires_grad=True)
    hadamard_transform(xd, signs=sd).sum().backward()
    assert (s.grad.double() - sd.grad).abs().max() <= 1e-4 * sd.grad.abs().max()


# ---------------------------------------------------------------------------------------- memory semantics


def test_inplace_and_out_return_what_they_wrote() -> None:
    x = torch.randn(3, 64)
    y = hadamard_transform(x)
    out = torch.empty_like(x)
    assert hadamard_transform(x, out=out) is out
    assert torch.equal(out, y)
    z = x.clone()
    assert hadamard_transform(z, inplace=True) is z
    assert torch.equal(z, y)


def test_inplace_on_a_view_writes_to_its_base() -> None:
    base = torch.randn(4, 3, 64)
    expected = base.clone()
    expected[:, 1] = hadamard_transform(base[:, 1])
    hadamard_transform(base[:, 1], inplace=True)
    assert torch.equal(base, expected)
    w = torch.randn(64, 8)
    expected = hadamard_transform(w, dim=0)
    hadamard_transform(w.T, inplace=True)
    torch.testing.assert_close(w, expected)


def test_inplace_gradients_flow_through_a_view() -> None:
    x = torch.randn(4, 3, 64, dtype=torch.float64, requires_grad=True)

    def through(x: Tensor) -> Tensor:
        y = x * 2
        hadamard_transform(y[:, 1], inplace=True)
        return y

    torch.autograd.gradcheck(through, x, fast_mode=True)


def test_inplace_refuses_signs_that_need_a_gradient() -> None:
    x, s = torch.randn(2, 8), torch.randn(8, requires_grad=True)
    before = x.clone()
    with pytest.raises(ValueError, match=r"inplace.*signs|signs.*inplace"):
        hadamard_transform(x, signs=s, inplace=True)
    assert torch.equal(x, before)


def test_signs_may_not_be_the_tensor_that_is_overwritten() -> None:
    x = torch.randn(8)
    s = x.clone()
    expected = hadamard_transform(x, signs=s)
    with contextlib.suppress(ValueError):  # refused, or right
        hadamard_transform(x, signs=x, inplace=True)
        assert torch.equal(x, expected)


def test_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.randn(3, 64)
        y = hadamard_transform(x)
        out = torch.empty_like(x)
        assert torch.equal(hadamard_transform(x, out=out), y)
        assert torch.equal(hadamard_transform(x.clone(), inplace=True), y)


# ---------------------------------------------------------------------------------------- compile, export


def test_one_compiled_graph_serves_every_batch() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: hadamard_transform(x * 2) + 1, backend=counter, fullgraph=True)
    for batch in (4, 5, 7, 64):
        x = torch.randn(batch, 3, 576)
        torch.testing.assert_close(compiled(x), hadamard_transform(x * 2) + 1)
    assert counter.frame_count <= 2  # one for the first shape, one for all others
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options", [{}, {"randomized": True}, {"learnable_signs": True, "inverse": True}, {"block_size": 44}]
)
def test_module_compiles_and_exports(options: dict[str, Any]) -> None:
    n = 176
    module = HadamardTransform(n, **options)
    x = torch.randn(3, n)
    expected = module(x)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    torch._dynamo.reset()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    for rows in (3, 9):
        x = torch.randn(rows, n)
        torch.testing.assert_close(program.module()(x), module(x))


# ---------------------------------------------------------------------------------------- bad input


def bad_inputs() -> Iterator[Any]:
    x = lambda *shape: torch.randn(*(shape or (3, 8)))  # noqa: E731
    half, meta = torch.float16, torch.device("meta")
    leaf = lambda t: t.requires_grad_()  # noqa: E731
    shared = torch.randn(4, 8)
    T, V, ones, empty = TypeError, ValueError, torch.ones, torch.empty
    h4 = torchlin.hadamard_matrix(4)
    cases: list[tuple[str, type[Exception], str, Any, dict[str, Any]]] = [
        ("x list", T, r"x must be a torch.Tensor.*list", [1.0, 2.0], {}),
        ("x int", T, r"x must be float32.*int64", torch.arange(8), {}),
        ("x bool", T, r"x must be.*bool", ones(8, dtype=torch.bool), {}),
        ("x complex", T, r"x must be.*complex64", ones(8, dtype=torch.complex64), {}),
        ("x float8", T, r"x must be.*float8", ones(8).to(torch.float8_e4m3fn), {}),
        ("x sparse", T, r"x must be.*dense", torch.eye(8).to_sparse(), {}),
        ("x scalar", V, r"x must have at least one dimension", torch.tensor(1.0), {}),
        ("n 6", V, r"n=6.*block_size=2", x(3, 6), {}),
        ("n 13", V, r"n=13", x(3, 13), {}),
        ("n 36+1", V, r"n=37.*36", x(37), {}),
        ("n 0", V, r"\b0\b", x(3, 0), {}),
        ("n of dim 0", V, r"n=3", x(3, 8), {"dim": 0}),
        ("scale str", T, r"scale must be a float or None, got str", x(), {"scale": "1"}),
        ("scale tensor", T, r"scale must be a float or None, got Tensor", x(), {"scale": torch.tensor(1.0)}),
        ("scale bool", T, r"scale must be", x(), {"scale": True}),
        ("dim high", V, r"dim must be in \[-2, 1\].*got 2", x(), {"dim": 2}),
        ("dim low", V, r"dim must be in \[-2, 1\].*got -3", x(), {"dim": -3}),
        ("dim float", T, r"dim must be an int, got float", x(), {"dim": 1.0}),
        ("dim float that equals the default", T, r"dim must be an int, got float", x(), {"dim": -1.0}),
        ("block 3", V, r"block_size must be.*divisor.*8.*got 3", x(), {"block_size": 3}),
        ("block 0", V, r"block_size.*got 0", x(), {"block_size": 0}),
        ("block -4", V, r"block_size.*got -4", x(), {"block_size": -4}),
        ("block 16", V, r"block_size.*got 16", x(), {"block_size": 16}),
        ("block float", T, r"block_size must be an int or None, got float", x(), {"block_size": 4.0}),
        ("block without matrix", V, r"n=6", x(3, 12), {"block_size": 6}),
        ("signs short", V, r"signs must have shape \(8,\).*\(7,\)", x(), {"signs": ones(7)}),
        ("signs 2-D", V, r"signs must have shape \(8,\).*\(3, 8\)", x(), {"signs": ones(3, 8)}),
        ("signs of a block", V, r"signs must have shape \(8,\)", x(), {"signs": ones(4), "block_size": 4}),
        ("signs list", T, r"signs must be a torch.Tensor or None, got list", x(), {"signs": [1.0] * 8}),
        ("signs bool", T, r"signs must hold real numbers", x(), {"signs": ones(8, dtype=torch.bool)}),
        ("signs complex", T, r"signs must hold real", x(), {"signs": ones(8, dtype=torch.complex64)}),
        ("signs elsewhere", V, r"signs must be on x's device", x(), {"signs": ones(8, device=meta)}),
        ("had_k list", T, r"had_k must be a torch.Tensor", x(), {"had_k": [[1]]}),
        ("had_k not square", V, r"had_k must be a square.*\(4, 2\)", x(), {"had_k": ones(4, 2)}),
        ("had_k 1-D", V, r"had_k must be a square", x(), {"had_k": ones(4)}),
        ("had_k order", V, r"had_k of order 12.*8", x(), {"had_k": core_matrix(12)}),
        ("had_k odd rest", V, r"had_k of order 4.*12", x(3, 12), {"had_k": h4}),
        ("had_k ones", V, r"had_k must be a Hadamard matrix", x(), {"had_k": ones(4, 4)}),
        ("had_k scaled", V, r"had_k must be a Hadamard", x(), {"had_k": h4 * 2}),
        ("had_k 1.5", V, r"had_k must be a Hadamard", x(), {"had_k": h4 * 1.5}),
        ("had_k 257", V, r"had_k must be a Hadamard", x(), {"had_k": h4.int() * 257}),
        ("had_k grad", V, r"had_k.*grad", x(), {"had_k": leaf(h4.float())}),
        ("had_k elsewhere", V, r"had_k must be on", x(), {"had_k": ones(4, 4, device=meta)}),
        ("out list", T, r"out must be a torch.Tensor or None, got list", x(), {"out": []}),
        ("out shape", V, r"out must have x's shape \(3, 8\).*\(8, 3\)", x(), {"out": empty(8, 3)}),
        ("out dtype", T, r"out must have x's dtype.*float16", x(), {"out": empty(3, 8, dtype=half)}),
        ("out elsewhere", V, r"out must be on x's device", x(), {"out": empty(3, 8, device=meta)}),
        ("out expanded", V, r"out must not be.*expanded", x(), {"out": empty(8).expand(3, 8)}),
        ("out is x", V, r"out must not share.*inplace=True", shared, {"out": shared}),
        ("out overlaps x", V, r"out must not share", shared[:3], {"out": shared[1:]}),
        ("out is signs", V, r"out must not share", shared[0], {"signs": shared[1], "out": shared[1]}),
        ("out with grad", V, r"out=.*differentiation", leaf(x()), {"out": empty(3, 8)}),
        ("out needs grad", V, r"out=.*differentiation", x(), {"out": leaf(empty(3, 8))}),
        ("out and inplace", V, r"inplace.*out", x(), {"out": empty(3, 8), "inplace": True}),
        ("inplace leaf", V, r"inplace.*leaf", leaf(x()), {"inplace": True}),
        ("inplace expanded", V, r"inplace.*expanded", x(1, 8).expand(3, 8), {"inplace": True}),
        ("inplace overlapping", V, r"inplace", x(64).as_strided((3, 8), (4, 1)), {"inplace": True}),
    ]  # fmt: skip
    for name, kind, message, tensor, options in cases:
        yield pytest.param(kind, message, tensor, options, id=name)


@pytest.mark.parametrize(("kind", "message", "x", "options"), list(bad_inputs()))
def test_bad_input(kind: type[Exception], message: str, x: Any, options: dict[str, Any]) -> None:
    """The error names the argument, what came and what is allowed, and no tensor was written to."""
    tensors = [
        t for t in (x, *options.values()) if isinstance(t, Tensor) and not t.is_meta and not t.is_sparse
    ]
    before, versions = [battery._all_bytes(t) for t in tensors], [t._version for t in tensors]
    with pytest.raises(kind, match=message):
        hadamard_transform(x, **options)
    assert [battery._all_bytes(t) for t in tensors] == before
    assert [t._version for t in tensors] == versions


def test_bad_input_is_refused_by_the_reference_too() -> None:
    for options in ({"dim": 5}, {"block_size": 3}, {"signs": torch.ones(2)}, {"had_k": torch.ones(4, 4)}):
        with pytest.raises(ValueError, match=next(iter(options))):
            hadamard_transform_reference(torch.randn(3, 8), **options)


def test_out_elsewhere_in_the_same_storage_is_fine() -> None:
    room = torch.randn(2, 8)
    x = room[0].clone()
    hadamard_transform(room[0], out=room[1])
    assert torch.equal(room[1], hadamard_transform(x))


# ---------------------------------------------------------------------------------------- no library

_WITHOUT_LIBRARY = """
import sys, warnings
{hide}
import torch, torchlin
x = torch.randn(3, 44, requires_grad=True)
s = torch.randn(44, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        y = torchlin.functional.hadamard_transform(x, signs=s)
h = torchlin.hadamard_matrix(44, dtype=torch.float32)
torch.testing.assert_close(y, (x * s) @ h.T * 44**-0.5)
gx, gs = torch.autograd.grad(y.square().sum() / 2, (x, s))  # |H z|^2 / n = |z|^2
torch.testing.assert_close(gx, x * s * s, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(gs, (x * x * s).sum(0), rtol=1e-4, atol=1e-5)
with torch.no_grad():
    out = torch.empty_like(x)
    assert torchlin.functional.hadamard_transform(x, signs=s, out=out) is out
    torch.testing.assert_close(out, y)
    z = x.clone()
    assert torchlin.functional.hadamard_transform(z, signs=s, inplace=True) is z
    torch.testing.assert_close(z, y)
messages = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
print(len(messages), *messages, sep="\\n")
"""


@pytest.mark.parametrize("how", ["missing", "broken", "refused"])
def test_without_the_library(how: str, tmp_path: Path) -> None:
    """The import works, one warning says why the reference runs, and the values are right."""
    shutil.copytree(
        Path(torchlin.__file__).parent,
        tmp_path / "torchlin",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    hide = f"sys.path.insert(0, {str(tmp_path)!r})"
    if how == "broken":
        (tmp_path / "torchlin" / "_C.abi3.so").write_bytes(b"not a library")
    if how == "refused":
        (tmp_path / "torchlin" / "_C.abi3.so").write_bytes(b"")
        hide += "\nimport torch\ndef refuse(path): raise OSError('undefined symbol: made_up')"
        hide += "\ntorch.ops.load_library = refuse"
    script = _WITHOUT_LIBRARY.format(hide=hide)
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr
    count, *messages = run.stdout.splitlines()
    assert count == "1", run.stdout
    assert "reference" in messages[0]
    assert {"missing": "not built", "broken": "does not load", "refused": "made_up"}[how] in messages[0]


def test_with_the_library_there_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hadamard_transform(torch.randn(3, 8))


def test_device_without_kernel_runs_the_reference() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = hadamard_transform(torch.empty(3, 576, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((3, 576), torch.bfloat16, "meta")


# ---------------------------------------------------------------------------------------- module


@pytest.mark.parametrize("n", [64, 44, 576])
@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("randomized", [False, True])
@pytest.mark.parametrize("learnable", [False, True])
def test_module_inverse_inverts(n: int, block: int | None, randomized: bool, learnable: bool) -> None:
    options: dict[str, Any] = {
        "block_size": block, "randomized": randomized, "seed": 5, "learnable_signs": learnable
    }  # fmt: skip
    there, back = (
        HadamardTransform(n, **options).double(),
        HadamardTransform(n, inverse=True, **options).double(),
    )
    if learnable:
        with torch.no_grad():  # learnt signs are no longer their own inverses
            there.signs.mul_(torch.rand(n) + 0.5)
        back.load_state_dict(there.state_dict())
    x = torch.randn(3, n, dtype=torch.float64)
    torch.testing.assert_close(back(there(x)), x)
    torch.testing.assert_close(there(back(x)), x)


def test_module_computes_the_function() -> None:
    x = torch.randn(3, 576)
    assert torch.equal(HadamardTransform(576)(x), hadamard_transform(x))
    module = HadamardTransform(576, randomized=True, seed=1)
    assert torch.equal(module(x), hadamard_transform(x, signs=module.signs))
    assert torch.equal(HadamardTransform(576, block_size=36)(x), hadamard_transform(x, block_size=36))


def test_module_seed() -> None:
    a, b, c = (HadamardTransform(256, randomized=True, seed=seed).signs for seed in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert set(a.tolist()) == {-1.0, 1.0}
    assert abs(a.sum().item()) < 80  # 5 sigma of a fair coin
    state = torch.get_rng_state()
    HadamardTransform(256, randomized=True)
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"


def test_module_seed_does_not_depend_on_defaults() -> None:
    plain = HadamardTransform(64, randomized=True, seed=3).signs
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(HadamardTransform(64, randomized=True, seed=3).signs.float(), plain)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert HadamardTransform(64, randomized=True, learnable_signs=True).signs.shape == (64,)


def test_module_learnable_signs() -> None:
    module = HadamardTransform(44, randomized=True, learnable_signs=True)
    assert [name for name, _ in module.named_parameters()] == ["signs"]
    x, target = torch.randn(16, 44), torch.randn(16, 44)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (module(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not list(HadamardTransform(44, randomized=True).parameters())


def test_module_state() -> None:
    module = HadamardTransform(64, randomized=True, seed=7)
    assert list(module.state_dict()) == ["signs"]
    other = HadamardTransform(64, randomized=True, seed=8)
    other.load_state_dict(module.state_dict())
    x = torch.randn(2, 64)
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
        assert twin.signs.data_ptr() != module.signs.data_ptr()
    assert list(HadamardTransform(64).state_dict()) == []


@pytest.mark.parametrize("dtype", battery.FLOATS, ids=battery.dtype_name)
def test_module_moves(dtype: torch.dtype) -> None:
    x = torch.randn(3, 64).to(dtype)
    for learnable in (False, True):
        module = HadamardTransform(64, randomized=True, learnable_signs=learnable).to(dtype)
        y = module(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, hadamard_transform(x, signs=module.signs))
    assert HadamardTransform(64, randomized=True).to("meta").signs.is_meta


def test_module_repr() -> None:
    assert repr(HadamardTransform(576)) == "HadamardTransform(n=576)"
    assert repr(HadamardTransform(4, learnable_signs=True)) == "HadamardTransform(n=4, learnable_signs=True)"
    module = HadamardTransform(96, block_size=32, randomized=True, seed=3, inverse=True)
    assert repr(module) == "HadamardTransform(n=96, block_size=32, randomized=True, seed=3, inverse=True)"


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((6,), {}, ValueError, "n=6"),
        ((0,), {}, ValueError, "0"),
        ((-8,), {}, ValueError, "-8"),
        ((8.0,), {}, TypeError, "n must be an int"),
        ((64,), {"block_size": 7}, ValueError, "block_size"),
        ((12,), {"block_size": 6}, ValueError, "n=6"),
    ],
)
def test_module_bad_arguments(
    arguments: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        HadamardTransform(*arguments, **options)


def test_module_bad_input() -> None:
    with pytest.raises(ValueError, match=r"x must have last dimension n = 64.*\(3, 32\)"):
        HadamardTransform(64)(torch.randn(3, 32))
    with pytest.raises(TypeError, match="x must be float32"):
        HadamardTransform(64)(torch.arange(64))
    with pytest.raises((ValueError, TypeError), match=r"\bx\b"):
        HadamardTransform(64)(torch.tensor(1.0))


def test_registry() -> None:
    for name in ("hadamard", "walsh_hadamard"):
        module = torchlin.create("transform", name, n=64, randomized=True, seed=2)
        assert isinstance(module, HadamardTransform)
    assert torch.equal(module.signs, HadamardTransform(64, randomized=True, seed=2).signs)
    assert "hadamard" in torchlin.names("transform")


# ---------------------------------------------------------------------------------------- page


def test_page_runs() -> None:
    """The code on docs/hadamard.md, block after block in one namespace, and what it says about itself."""
    page = (Path(__file__).parents[1] / "docs" / "hadamard.md").read_text()
    namespace: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(block, namespace)
    assert (
        "Nearest supported orders: 16 and 20; to keep 18, transform in blocks: block_size=2"
        in printed.getvalue()
    )
    heads, across = namespace["heads"], namespace["across"]
    h = torchlin.hadamard_matrix(32).float()
    torch.testing.assert_close(across, torch.einsum("ij,btjd->btid", h, heads) * 32**-0.5)
    assert torch.equal(namespace["same"].signs, namespace["rotate"].signs)
    y = torch.randn(2, 576)
    torch.testing.assert_close(namespace["undo"](namespace["rotate"](y)), y)


# --------------------------------------------------------------------------------------------------- GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "shape", [(4096, 1024), (4096, 576), (3, 1 << 17)], ids=["rows", "composite", "workspace"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=battery.dtype_name)
def test_side_stream(shape, dtype):
    """Kernels run on torch's current stream: they wait for what was queued there before them."""
    x = torch.randn(shape, device="cuda", dtype=dtype)
    late = torch.full_like(x, torch.nan)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles: on any other stream the kernel would read the NaN
        late.copy_(x)
        y = hadamard_transform(late)
    side.synchronize()
    assert torch.equal(y, hadamard_transform(x))


def test_several_matrices_in_one_compiled_graph():
    """And the same one twice: a traced graph holds each as a constant of its own."""
    x, y = torch.randn(3, 12, requires_grad=True), torch.randn(3, 40)

    def both(x: Tensor, y: Tensor) -> Tensor:
        return hadamard_transform(hadamard_transform(x)).sum() + hadamard_transform(y).square().sum()

    got = torch.compile(both, fullgraph=True, backend="aot_eager")(x, y)
    torch.testing.assert_close(got, both(x, y))
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], torch.autograd.grad(both(x, y), x)[0])


@pytest.mark.parametrize("k", [12, 20, 28, 44, 92, 172])
def test_matrices_of_traced_graphs(k):
    assert torch.equal(_core_in_graph(k, torch.device("cpu")), core_matrix(k))
