"""The CPU kernels of grid quantization against integers and float64 in numpy: every width, shape, dtype and CPU level."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from battery import available_isa_levels
from numpy.typing import NDArray
from torch import Tensor

from torchlin.ops.grid_codes import code_dtype, code_layout, packed_bytes

raw: Any = torch.ops.torchlin

EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

# (p, n): every way to store a code (bits of a power of two, words of 2, 3 and 4 digits) and to look a point up.
GRIDS = [
    *((1, n) for n in (2, 3, 4, 5, 8, 16, 32, 64, 88, 128, 256, 300)),
    *((2, n) for n in (4, 8, 16, 32, 64, 88, 128, 256, 830, 1024, 4096)),
    *((3, n) for n in (8, 64, 512, 830, 4096)),
    *((4, n) for n in (16, 256, 4096, 7800, 65536)),
    (5, 100),
    (6, 16),
    (7, 55000),  # words of 63 bits
    (8, 4),
    (8, 256),
    (8, 65536),
]
# Whose coordinates have 16 bits, in every way to store codes: whole and part bytes, two digits in 7 to 15 bits, more.
FIXED = [
    *((1, n) for n in (3, 11, 42, 88, 128, 181, 250, 256)),
    *((2, n) for n in (22, 45, 64, 88, 90, 128, 162, 256)),
    *((p, n) for p in (3, 4) for n in (22, 88, 128, 181, 256, 830, 4096)),
]


@pytest.fixture(params=available_isa_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = raw._cpu_isa()
    raw._set_cpu_isa(request.param)
    yield request.param
    raw._set_cpu_isa(before)


def words_of(codes: NDArray[Any], n: int) -> list[int]:
    """A row of codes as one large integer's words: the definition, in Python's integers."""
    digits, _ = code_layout(n)
    return [
        sum(int(c) * n**i for i, c in enumerate(codes[at : at + digits]))
        for at in range(0, len(codes), digits)
    ]


def packed_row(codes: NDArray[Any], n: int) -> bytes:
    _, width = code_layout(n)
    stream = sum(word << i * width for i, word in enumerate(words_of(codes, n)))
    return stream.to_bytes(packed_bytes(n, len(codes)), "little")


def codes_tensor(codes: NDArray[Any], n: int) -> Tensor:
    return torch.from_numpy(codes.astype(np.int64)).to(code_dtype(n))


def points(n: int, p: int, seed: int = 0, unit: float | None = None) -> Tensor:
    normal = torch.randn(n, p, generator=torch.Generator().manual_seed(seed))
    return normal if unit is None else normal.div(unit).round().mul(unit)


# ---- codes


@pytest.mark.parametrize("n", [*sorted({n for _, n in GRIDS}), 6, 7, 65535])
def test_pack_is_its_definition(n: int, level: str) -> None:
    rng = np.random.default_rng(n)
    for rows, count in ((3, 1), (2, 7), (1, 64), (3, 143), (2, 0)):
        codes = rng.integers(0, n, (rows, count))
        codes[:, ::3] = n - 1
        expected = np.frombuffer(b"".join(packed_row(row, n) for row in codes), np.uint8)
        packed = raw._grid_pack(codes_tensor(codes, n), n)
        assert packed.shape == (rows, packed_bytes(n, count))
        assert np.array_equal(packed.numpy().ravel(), expected)
        again = raw._grid_unpack(packed, n, count)
        assert again.dtype is code_dtype(n)
        assert np.array_equal(again.numpy(), codes)


@pytest.mark.parametrize("n", [3, 5, 22, 88, 181, 250, 300, 830, 7800, 65535])
def test_what_is_no_code_reads_as_the_last(n: int, level: str) -> None:
    digits, width = code_layout(n)
    count = 5 * digits
    packed = torch.full((2, packed_bytes(n, count)), 255, dtype=torch.uint8)
    codes = raw._grid_unpack(packed, n, count).numpy().astype(np.int64)
    largest = (1 << width) - 1
    word = [largest // n**i % n if i + 1 < digits else min(largest // n**i, n - 1) for i in range(digits)]
    assert np.array_equal(codes, np.tile(word, (2, 5)))
    for grid in (points(n, 1), points(n, 1, unit=2.0**-12)):
        weight = raw._grid_dequantize(packed, torch.ones(2, 1), grid, count, count)
        assert torch.equal(weight, grid[torch.from_numpy(codes), 0])
        for x in (torch.eye(count), torch.eye(count)[:1]):
            y = raw._grid_linear(x, packed, torch.ones(2, 1), grid, None, count)
            assert torch.equal(y, weight.T[: len(x)])


# ---- points


@pytest.mark.parametrize(("p", "n"), GRIDS)
def test_decode(p: int, n: int, level: str) -> None:
    grid = points(n, p)
    for m in (0, 1, 5, 67):
        codes = torch.arange(m).mul(7919).remainder(n)
        assert torch.equal(raw._grid_decode(codes.to(code_dtype(n)), grid), grid[codes])


@pytest.mark.parametrize(("p", "n"), [(1, 3), (1, 16), (2, 88), (2, 256), (3, 512), (4, 256), (8, 300)])
def test_encode_is_the_first_of_the_nearest(p: int, n: int, level: str) -> None:
    grid = points(n, p).div(0.25).round().mul(0.25)  # coarse: equal points, equal distances, exact arithmetic
    for m, k in ((5, 6 * p), (3, 4 * p + 1), (1, 1), (0, p), (37, 3 * p - 1)):
        x = points(m, k, seed=k).div(0.125).round().mul(0.125)
        codes = raw._grid_encode(x, grid)
        assert codes.dtype is code_dtype(n)
        count = -(-k // p)
        assert codes.shape == (m, count)
        missing = count * p - k
        z = torch.nn.functional.pad(x, (0, missing)).view(m, count, 1, p)
        square = (z - grid).square()
        if missing:
            square[:, -1, :, p - missing :] = 0
        assert torch.equal(codes.to(torch.int64), square.double().sum(-1).argmin(-1))


# ---- weights


def weight_of(
    p: int,
    n: int,
    out: int,
    k: int,
    block: int,
    scale_dtype: torch.dtype,
    seed: int = 0,
    unit: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, NDArray[np.float64]]:
    """packed, scales, grid, and the weight in float64."""
    rng = np.random.default_rng(seed)
    count = -(-k // p)
    codes = rng.integers(0, n, (out, count))
    packed = np.frombuffer(b"".join(packed_row(row, n) for row in codes), np.uint8)
    grid = points(n, p, seed + 1, unit)
    scales = torch.from_numpy(rng.uniform(0.5, 2, (out, -(-k // block)))).to(scale_dtype)
    weight = grid.double().numpy()[codes].reshape(out, -1)[:, :k]
    weight = weight * np.repeat(scales.double().numpy(), block, 1)[:, :k]
    return torch.from_numpy(packed.copy()).view(out, packed_bytes(n, count)), scales, grid, weight


def shapes_of(p: int) -> list[tuple[int, int, int]]:
    """(out, in, block size)"""
    return [
        (5, 64 * p, 64 * p),
        (3, 96 * p, 16 * p),  # several blocks in a vector of codes
        (7, 250 * p + p // 2, 250 * p + p // 2),  # ragged everywhere
        (2, 133 * p, 5 * p),  # blocks that end anywhere
        (17, 1100, 1024 // p * p),
        (1, 1, 1),
        (9, max(p - 1, 1), p),
    ]


@pytest.mark.parametrize(("p", "n"), GRIDS)
def test_dequantize(p: int, n: int, level: str) -> None:
    for i, (out, k, block) in enumerate(shapes_of(p)):
        dtype = torch.float16 if i % 2 else torch.float32
        packed, scales, grid, weight = weight_of(p, n, out, k, block, dtype)
        actual = raw._grid_dequantize(packed, scales, grid, k, block)
        assert torch.equal(actual, torch.from_numpy(weight).float())  # one rounding


def check_linear(
    p: int,
    n: int,
    shape: tuple[int, int, int],
    batch: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    bias: bool,
    unit: float | None = None,
) -> None:
    out, k, block = shape
    packed, scales, grid, weight = weight_of(p, n, out, k, block, scale_dtype, unit=unit)
    x = points(batch, k, seed=2).to(dtype)
    b = points(1, out, seed=3)[0].to(dtype) if bias else None
    y = raw._grid_linear(x, packed, scales, grid, b, block)
    assert y.dtype is dtype
    assert y.shape == (batch, out)
    exact, size = x.double().numpy() @ weight.T, np.abs(x.double().numpy()) @ np.abs(weight).T
    if b is not None:
        exact, size = exact + b.double().numpy(), size + np.abs(b.double().numpy())
    # Rounding of k products and sums in float32, and one to the dtype of y.
    allowed = size * (8 + k**0.5) * EPS[torch.float32] + np.abs(exact) * 1.01 * EPS[dtype] + 1e-30
    error = np.abs(y.double().numpy() - exact)
    assert (error <= allowed).all(), (shape, batch, dtype, float((error / allowed).max()))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(raw._grid_linear(x, packed, scales, grid, b, block), y)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("p", "n"), GRIDS)
def test_linear(p: int, n: int, level: str) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for i, shape in enumerate(shapes_of(p)):
        for j, batch in enumerate((1, 2, 3, 7, 18)):
            scale_dtype = torch.float16 if (i + j) % 2 else torch.float32
            check_linear(p, n, shape, batch, dtypes[(i + j) % 3], scale_dtype, bias=j % 2 == 0)


@pytest.mark.parametrize(("p", "n"), FIXED)
def test_linear_of_16_bit_points(p: int, n: int, level: str) -> None:
    for i, shape in enumerate(
        [*shapes_of(p), (6, 640 * p, 4 * p), (3, 64 * p + 1, 64 * p), (50, 663 * p - 1, 663 * p)]
    ):
        for j, batch in enumerate((1, 4)):
            check_linear(
                p, n, shape, batch, torch.float32, torch.float16, bias=bool(j), unit=2.0 ** (-12 - i)
            )


def test_division_of_two_digits_is_exact(level: str) -> None:
    """Every word of every grid whose two digits share at most 16 bits, those that hold no codes too."""
    layouts = {n: code_layout(n) for n in range(2, 257)}
    pairs = {n: width for n, (digits, width) in layouts.items() if digits == 2 and width <= 16}
    assert len(pairs) == 38
    for n, width in pairs.items():
        words = np.arange(1 << width).reshape(-1, min(128, 1 << width))
        bits = words[..., None] >> np.arange(width) & 1
        packed = torch.from_numpy(np.packbits(bits.reshape(len(words), -1).astype(np.uint8), 1, "little"))
        k = 2 * words.shape[1]
        weight = np.stack((words % n, np.minimum(words // n, n - 1)), -1).reshape(len(words), k)
        grid = torch.arange(n)[:, None].float()
        y = raw._grid_linear(torch.eye(k), packed, torch.ones(len(words), 1), grid, None, k)
        assert np.array_equal(y.T.numpy(), weight), n


@pytest.mark.parametrize(("p", "n"), [(1, 16), (2, 16), (2, 256), (2, 88), (4, 4096), (1, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_large_batch(p: int, n: int, dtype: torch.dtype, level: str) -> None:
    for batch, out, k in ((33, 130, 521), (129, 37, 256), (0, 5, 16)):
        check_linear(p, n, (out, k, 64), batch, dtype, torch.float16, bias=True)


@pytest.mark.parametrize(("p", "n"), [(1, 16), (2, 16), (2, 256), (3, 4096)])
def test_linear_across_threads_and_calls(p: int, n: int, level: str) -> None:
    """Large enough for every thread; check_linear compares the bits of one thread and two."""
    for batch in (1, 5, 40):
        check_linear(p, n, (300, 1536, 512 // p * p), batch, torch.float32, torch.float16, bias=False)


def test_empty(level: str) -> None:
    grid = points(16, 2)
    y = raw._grid_linear(
        torch.ones(2, 0), torch.empty(3, 0, dtype=torch.uint8), torch.ones(3, 0), grid, None, 1
    )
    assert torch.equal(y, torch.zeros(2, 3))
    bias = torch.tensor([1.0, 2.0, 3.0])
    y = raw._grid_linear(
        torch.ones(2, 0), torch.empty(3, 0, dtype=torch.uint8), torch.ones(3, 0), grid, bias, 1
    )
    assert torch.equal(y, bias.expand(2, 3))
    packed = torch.empty(0, 4, dtype=torch.uint8)
    assert raw._grid_linear(torch.ones(2, 16), packed, torch.ones(0, 1), grid, None, 16).shape == (2, 0)
