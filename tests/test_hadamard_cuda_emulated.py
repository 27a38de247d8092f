"""The CUDA Hadamard kernels, planned as on a device and run by the emulator, against a float64 one."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from simt.build import load

from torchlin.ops.hadamard_matrix import core_matrix

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
DTYPE_IDS = [str(d).removeprefix("torch.") for d in DTYPES]
# Relative L2 error: one rounding of a 16-bit result; about 1e-7 for float sums of 2^15 terms.
TOLERANCE = {torch.float32: 2e-7, torch.float64: 1e-15, torch.float16: 2.6e-4, torch.bfloat16: 2.1e-3}
H100 = {"multiprocessors": 132, "shared_per_block": 227 * 1024}
A100 = {"multiprocessors": 108, "shared_per_block": 163 * 1024}


@pytest.fixture(scope="module")
def emulated():
    return load("hadamard")


def storage_bytes(t: torch.Tensor) -> np.ndarray:
    storage = t.untyped_storage()
    return np.frombuffer((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr()), np.uint8)


@dataclass(frozen=True)
class Case:
    """One call of the raw op, beside x and out."""

    dim: int = -1
    order: int | None = None
    had_k: np.ndarray | None = None
    signs: np.ndarray | None = None
    scale: float = 1.0
    transpose: bool = False

    def run(self, emulated, x: torch.Tensor, out: torch.Tensor, seed: int = 0, device=None) -> list[dict]:
        dim = self.dim % x.dim()
        return emulated.transform(
            str(x.dtype).removeprefix("torch."),
            storage_bytes(x), x.storage_offset(), storage_bytes(out), out.storage_offset(),
            list(x.shape), list(x.stride()), list(out.stride()), dim, self.order or x.shape[dim],
            self.had_k, self.signs, self.scale, self.transpose, seed, **(device or H100),
        )  # fmt: skip

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        v = x.double().movedim(self.dim, -1)
        signs = None if self.signs is None else torch.from_numpy(self.signs.astype(np.float64))
        if signs is not None and not self.transpose:
            v = v * signs
        n = self.order or v.shape[-1]
        had = torch.ones(1, 1) if self.had_k is None else torch.from_numpy(self.had_k)
        had = had.double().T if self.transpose else had.double()
        K = had.shape[0]
        w = v.reshape(*v.shape[:-1], v.shape[-1] // n, K, n // K)
        w = had @ butterfly(w)
        v = w.reshape(v.shape)
        if signs is not None and self.transpose:
            v = v * signs
        return (v * self.scale).movedim(-1, self.dim)


def butterfly(x: torch.Tensor) -> torch.Tensor:
    shape, n, h = x.shape, x.shape[-1], 1
    while h < n:
        a, b = x.reshape(*shape[:-1], n // (2 * h), 2, h).unbind(-2)
        x = torch.stack([a + b, a - b], -2)
        h *= 2
    return x.reshape(shape)


@functools.cache
def core(K: int) -> np.ndarray:
    return core_matrix(K).numpy()


def sign_vector(n: int, dtype: torch.dtype, kind: str) -> np.ndarray:
    rng = np.random.default_rng(n)
    values = rng.choice([-1.0, 1.0], n) if kind == "+-1" else rng.standard_normal(n)
    return values.astype(np.float64 if dtype == torch.float64 else np.float32)


def check(emulated, case: Case, x: torch.Tensor, out: torch.Tensor | None = None, **how) -> list[dict]:
    if out is None:
        out = torch.empty_like(x)
    untouched = x.clone() if out.data_ptr() != x.data_ptr() else None
    expected = case.expected(x)
    steps = case.run(emulated, x, out, **how)
    if untouched is not None:
        assert torch.equal(x, untouched)
    error = (out.double() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[x.dtype], f"relative error {error:.2e} with {steps}"
    return steps


def values(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("log_n", range(16))
def test_powers_of_two(emulated, log_n, dtype):
    n = 1 << log_n
    rows = max(1, 4096 // n) + 5 if n <= 4096 else 1
    for signs, transpose in ((None, False), ("+-1", False), ("real", True)):
        vector = sign_vector(n, dtype, signs) if signs else None
        case = Case(signs=vector, transpose=transpose, scale=n**-0.5)
        steps = check(emulated, case, values(rows, n, dtype=dtype))
        assert len(steps) == 1 or dtype == torch.float64, "up to 32768 a row is read once and written once"
        if dtype in (torch.float16, torch.bfloat16):
            assert steps[0]["mma"] == (log_n >= 4 and (signs is None or transpose))
        if dtype != torch.float64:
            assert steps[0]["kernel"] == "rows"
            assert steps[0]["x_vector"]
            assert steps[0]["y_vector"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("log_n", [0, 2, 3, 5, 7, 8, 9, 10, 11])
def test_tail_rows(emulated, log_n, dtype):
    n = 1 << log_n
    for rows in (1, 3, 5, 8, 9, 31, 32, 33, 65):
        if rows * n > 40000:
            continue
        x = values(rows, n, dtype=dtype)
        guarded = torch.full((rows + 2, n), 7.0, dtype=dtype)
        check(emulated, Case(scale=n**-0.5), x, guarded[1:-1])
        assert (guarded[[0, -1]] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("K", "k", "rows"),
    [(12, 0, 5), (20, 0, 17), (12, 2, 3), (20, 3, 9), (28, 5, 3), (36, 4, 9), (12, 6, 11), (20, 8, 2),
     (172, 1, 2), (172, 6, 1), (12, 10, 1)],
)  # fmt: skip
def test_composite_orders(emulated, K, k, rows, dtype):
    n = K << k
    had = core(K)
    for transpose in (False, True):
        for signs in (None, "+-1", "real"):
            vector = sign_vector(n, dtype, signs) if signs else None
            case = Case(had_k=had, signs=vector, transpose=transpose, scale=n**-0.5)
            steps = check(emulated, case, values(rows, n, dtype=dtype))
            assert len(steps) == 1
            assert steps[0]["mma"] == (dtype != torch.float64 and k >= 3)


def test_asymmetric_cores_are_not_transposed_by_accident(emulated):
    rng = np.random.default_rng(0)
    # Any +-1 matrix will do for the kernel.
    matrix = np.where(rng.random((12, 12)) < 0.5, 1, -1).astype(np.int8)
    for dtype in (torch.float32, torch.bfloat16):
        for k in (0, 4):
            for transpose in (False, True):
                check(emulated, Case(had_k=matrix, transpose=transpose), values(3, 12 << k, dtype=dtype))


def test_a_large_core(emulated):
    rng = np.random.default_rng(0)
    matrix = np.where(rng.random((428, 428)) < 0.5, 1, -1).astype(np.int8)
    for dtype, k in ((torch.float32, 0), (torch.float16, 3), (torch.float64, 1)):
        check(emulated, Case(had_k=matrix, transpose=k == 3, scale=0.05), values(2, 428 << k, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("shape", "dim", "order", "K"),
    [((3, 64, 50), 1, None, 1), ((2, 96, 40), 1, None, 12), ((5, 32, 64), 1, 16, 1), ((64, 7), 0, None, 1),
     ((2, 8192, 12), 1, None, 1), ((4, 6, 8, 10), 2, None, 1), ((1, 40, 3), 1, 20, 20)],
)  # fmt: skip
def test_strided_dims(emulated, shape, dim, order, K, dtype):
    had = core(K) if K > 1 else None
    x = values(*shape, dtype=dtype)
    for transpose in (False, True):
        signs = sign_vector(shape[dim], dtype, "real")
        steps = check(emulated, Case(dim=dim, order=order, had_k=had, signs=signs, transpose=transpose), x)
        if shape[-1] >= 32:
            assert steps[0]["log_columns"] == 5, "neighbouring threads read neighbouring columns"
    backwards = list(range(len(shape)))[::-1]
    out = torch.empty(shape[::-1], dtype=dtype).permute(backwards)
    check(emulated, Case(dim=dim, order=order, had_k=had), x, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("n", [2, 8, 64, 128, 1024, 4096])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_misaligned_and_gapped_views(emulated, n, offset, dtype):
    rows = 40 if n < 64 else 3
    pitch = n + (5 if offset == 1 else 8)
    x = values(rows * pitch + 8, dtype=dtype).as_strided((rows, n), (pitch, 1), offset)
    signs = sign_vector(n, dtype, "real") if offset == 4 else None
    check(emulated, Case(signs=signs, scale=n**-0.5), x, torch.empty(rows, n, dtype=dtype))
    base = torch.full((rows * pitch + 8,), 7.0, dtype=dtype)
    y = base.as_strided((rows, n), (pitch, 1), offset)
    check(emulated, Case(signs=signs, scale=n**-0.5), x, y)
    y.fill_(7)
    assert (base == 7).all(), "nothing is written between the rows"


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("length", "order"), [(96, 16), (80, 4), (48, 8), (640, 128), (12, 2)])
def test_blocks_with_signs(emulated, length, order, dtype):
    for transpose in (False, True):
        case = Case(order=order, signs=sign_vector(length, dtype, "real"), transpose=transpose)
        check(emulated, case, values(3, 5, length, dtype=dtype))
        check(emulated, case, values(5, 3, length, dtype=dtype).transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_odd_shapes(emulated, dtype):
    expanded = values(3, 1, 64, dtype=dtype).expand(3, 7, 64)
    check(emulated, Case(), expanded, torch.empty(3, 7, 64, dtype=dtype))
    many = values(2, 2, 3, 2, 3, 2, 4, 2, 16, dtype=dtype).permute(6, 3, 1, 5, 0, 4, 2, 7, 8)[..., ::2]
    check(emulated, Case(), many, torch.empty(many.shape, dtype=dtype))
    check(emulated, Case(), values(64, dtype=dtype))
    for empty in ((0, 64), (3, 0, 64), (64, 0)):
        x = torch.empty(empty, dtype=dtype)
        assert Case(dim=0 if empty[-1] == 0 else -1).run(emulated, x, torch.empty_like(x)) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("K", "k", "rows"), [(1, 16, 2), (20, 13, 1)])
def test_orders_beyond_one_block(emulated, K, k, rows, dtype):
    n = K << k
    had = core(K) if K > 1 else None
    for transpose in (False, True):
        case = Case(had_k=had, signs=sign_vector(n, dtype, "real"), transpose=transpose, scale=n**-0.5)
        x = values(rows, n, dtype=dtype)
        steps = check(emulated, case, x)
        assert len(steps) == 2, "two passes, whatever the type: the workspace holds floats"
        in_place = x.clone()
        check(emulated, case, in_place, in_place)


def test_devices_with_less_shared_memory(emulated):
    for dtype in (torch.float32, torch.float16):
        small = {"multiprocessors": 4, "shared_per_block": 48 * 1024}
        check(emulated, Case(scale=2.0**-7), values(2, 1 << 14, dtype=dtype), device=small)
        check(emulated, Case(had_k=core(12), scale=2.0**-7), values(2, 12 << 10, dtype=dtype), device=small)
        check(emulated, Case(dim=1), values(1, 1 << 12, 4, dtype=dtype), device=small)


@pytest.mark.parametrize(
    ("dtype", "log_n"),
    [(torch.float32, 12), (torch.float32, 13), (torch.float16, 12), (torch.bfloat16, 13), (torch.float16, 14),
     (torch.bfloat16, 15)],
)  # fmt: skip
def test_the_next_tile_is_loaded_early(emulated, log_n, dtype):
    n = 1 << log_n
    few = H100 | {"multiprocessors": 1}
    for rows in (11, 14) if log_n < 14 else (3, 5):
        x = values(rows, n, dtype=dtype)
        for signs in (sign_vector(n, dtype, "+-1"), None):
            steps = check(emulated, Case(signs=signs, scale=n**-0.5), x, device=few)
            assert steps[0]["prefetch"]
            assert steps[0]["grid"] < rows
        check(emulated, Case(scale=n**-0.5), x, x, device=few)
    # 128 KB for the exchange and 64 KB for the next row do not fit everywhere.
    few = A100 | {"multiprocessors": 1}
    steps = check(emulated, Case(scale=n**-0.5), values(11, n, dtype=dtype), device=few)
    assert steps[0]["prefetch"] == (log_n < 15)


@pytest.mark.parametrize(
    ("shape", "dim", "K"),
    [((37, 128), -1, 1), ((3, 1024), -1, 1), ((2, 4096), -1, 1), ((9, 576), -1, 36), ((2, 64, 33), 1, 1),
     ((1, 1 << 16), -1, 1)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_the_schedule_never_shows(emulated, shape, dim, K, dtype):
    case = Case(dim=dim, had_k=core(K) if K > 1 else None, scale=0.125)
    x = values(*shape, dtype=dtype)
    results = []
    for seed in range(3):
        out = torch.empty_like(x)
        case.run(emulated, x, out, seed=seed)
        results.append(storage_bytes(out).copy())
    assert all(np.array_equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("K", "k"), [(1, 3), (1, 7), (1, 11), (12, 4), (12, 1)])
def test_integers_are_exact(emulated, K, k, dtype):
    n = K << k
    x = torch.randint(-1, 2, (5, n)).to(dtype)
    case = Case(had_k=core(K) if K > 1 else None)
    out = torch.empty_like(x)
    case.run(emulated, x, out)
    assert torch.equal(out, case.expected(x).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("K", "k"), [(1, 7), (1, 11), (12, 4)])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_non_finite_values_stay_in_their_row(emulated, K, k, bad, dtype):
    n = K << k
    x = values(3, n, dtype=dtype)
    x[1, 5] = bad
    out = torch.empty_like(x)
    Case(had_k=core(K) if K > 1 else None, scale=n**-0.5).run(emulated, x, out)
    assert out[[0, 2]].isfinite().all()
    assert out[1].isnan().all() if np.isnan(bad) else out[1].isinf().all()


@pytest.mark.parametrize(("K", "k"), [(1, 7), (1, 12), (12, 4)])
def test_half_does_not_overflow_inside(emulated, K, k):
    n = K << k
    x = torch.full((2, n), 6e4, dtype=torch.float16)
    x[:, 1::2] = -6e4
    out = torch.empty_like(x)
    case = Case(had_k=core(K) if K > 1 else None, scale=1 / n)
    case.run(emulated, x, out)
    torch.testing.assert_close(out.double(), case.expected(x), rtol=1e-3, atol=1e-3)
