"""Hadamard matrices: exact orthogonality, layout, which orders exist, and what is said where none does."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torchlin.ops.hadamard_constructions import miyamoto, paley_1, paley_2
from torchlin.ops.hadamard_matrix import (
    LARGEST_CORE,
    _cached_core,
    construction,
    core_matrix,
    hadamard_matrix,
    hadamard_order,
)

# Hidden, feed-forward and expert sizes of published models: {n: K}.
MODEL_SIZES = {
    576: 36, 768: 12, 896: 28, 1152: 36, 1280: 20, 1408: 44, 1536: 12, 2304: 36, 2560: 20, 2880: 180,
    3072: 12, 3456: 108, 3584: 28, 3840: 60, 4608: 36, 4864: 76, 5120: 20, 5376: 84, 5504: 172, 5632: 44,
    6144: 12, 6400: 100, 6656: 52, 6912: 108, 7168: 28, 8960: 140, 9216: 36, 9728: 76, 10240: 20,
    10944: 684, 11008: 172, 12288: 12, 12800: 100, 13696: 428, 13824: 108, 14336: 28, 14848: 116, 15360: 60,
    17408: 68, 17920: 140, 18432: 36, 18944: 148, 19200: 300, 20480: 20, 21504: 84, 22016: 172, 24576: 12,
    25600: 100, 27392: 428, 27648: 108, 28672: 28, 29568: 924, 33792: 132, 36864: 36, 49152: 12, 53248: 52,
}  # fmt: skip

CONSTRUCTIONS = {
    1: "Sylvester",
    64: "Sylvester",
    12: "Paley II, q=5",
    20: "Paley II, q=9",
    28: "Paley II, q=13",
    44: "Paley I, q=43",
    164: "Paley II, q=81",
    1332: "Paley I, q=1331",
    344: "Williamson, t=43, times Sylvester of order 2",
    92: "Williamson, t=23",
    116: "Williamson, t=29",
    156: "Williamson, t=39",
    172: "Williamson, t=43",
    188: "Turyn type, n=16",
    236: "Turyn type, n=20",
    260: "Turyn type, n=22",
    428: "Turyn type, n=36",
    268: "Cosets, t=67",
    292: "Miyamoto, q=73",
    324: "Miyamoto, q=81",
    684: "Paley I, q=683",
    924: "Paley II, q=461",
    1904: "Kronecker, 28 x 68",
}
UNSUPPORTED = {668, 716}  # no Hadamard matrix of these orders is known to anyone


def is_hadamard(h: torch.Tensor) -> bool:
    """Exact: float32 holds every partial sum."""
    n = len(h)
    h = h.float()
    return h.shape == (n, n) and bool((h.abs() == 1).all()) and torch.equal(h @ h.T, n * torch.eye(n))


def by_popcount(n: int) -> torch.Tensor:
    """Sylvester's matrix by its entries, (-1)^popcount(i & j)."""
    return torch.tensor([[1 - 2 * (bin(i & j).count("1") % 2) for j in range(n)] for i in range(n)])


def test_every_multiple_of_four_up_to_368():
    for n in [1, 2, *range(4, 369, 4)]:
        h = hadamard_matrix(n)
        assert len(h) == n
        assert is_hadamard(h), construction(n)


@pytest.mark.parametrize("n", CONSTRUCTIONS)
def test_construction(n):
    assert construction(n) == CONSTRUCTIONS[n]
    assert is_hadamard(core_matrix(n))


def test_orders_between_369_and_1200_are_orthogonal_where_they_exist():
    missing = []
    for n in range(372, 1201, 4):
        try:
            k, _ = hadamard_order(n)
        except ValueError:
            missing.append(n)
        else:
            assert is_hadamard(core_matrix(k)), construction(k)
    assert set(missing) >= UNSUPPORTED
    assert len(missing) == 33
    assert missing[:5] == [372, 412, 476, 508, 532]


@pytest.mark.parametrize("n", MODEL_SIZES)
def test_model_sizes(n):
    k = MODEL_SIZES[n]
    assert hadamard_order(n) == (k, n // k)
    assert is_hadamard(core_matrix(k))
    if n <= 1536:
        assert is_hadamard(hadamard_matrix(n))


@pytest.mark.parametrize("n", [1, 2, 8, 12, 48, 160, 344, 576, 1408])
def test_layout_is_core_times_sylvester(n):
    k, fast = hadamard_order(n)
    h, core, sylvester = hadamard_matrix(n), core_matrix(k).int(), by_popcount(fast)
    assert h.dtype is torch.int8
    blocks = h.reshape(k, fast, k, fast)  # H_K is the slow index
    assert torch.equal(blocks.int(), torch.einsum("ab,ij->aibj", core, sylvester.int()))


@pytest.mark.parametrize("e", [0, 1, 10, 24, 40])
def test_powers_of_two_have_no_core(e):
    assert hadamard_order(2**e) == (1, 2**e)


def test_factors_are_the_smallest():
    """No smaller K with the same odd part can be constructed."""
    for n in range(4, 3000, 4):
        try:
            k, fast = hadamard_order(n)
        except ValueError:
            continue
        assert k * fast == n
        assert fast & (fast - 1) == 0
        while k % 8 == 0:
            k //= 2
            with pytest.raises(ValueError, match="has no Hadamard matrix here"):
                hadamard_order(k)


def test_paley_2_is_symmetric_so_the_transform_undoes_itself():
    for q in (5, 9, 13, 17, 25, 29, 37, 41, 49, 73, 81, 121, 125, 169, 289, 461, 625):
        h = paley_2(q)
        assert torch.equal(h, h.T)
        assert is_hadamard(h)


def test_paley_1_is_skew_apart_from_its_diagonal():
    for q in (3, 7, 11, 19, 23, 27, 43, 67, 131, 243, 343):
        h = paley_1(q)
        assert torch.equal(h + h.T, 2 * torch.eye(q + 1, dtype=torch.int8))
        assert is_hadamard(h)


def test_paley_core_is_the_legendre_symbol():
    q = 43
    legendre = [0] + [1 if pow(a, (q - 1) // 2, q) == 1 else -1 for a in range(1, q)]  # Euler's criterion
    core = torch.tensor([[legendre[(a - b) % q] for b in range(q)] for a in range(q)])
    assert torch.equal(paley_1(q)[1:, 1:], core + torch.eye(q, dtype=torch.int64))


@pytest.mark.parametrize("q", [5, 9, 13, 17, 25, 29, 73, 81])
def test_miyamoto(q):
    assert is_hadamard(miyamoto(q, core_matrix(q - 1)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_device(dtype):
    h = hadamard_matrix(24, dtype=dtype)
    assert h.dtype is dtype
    assert torch.equal(h.to(torch.int8), hadamard_matrix(24))
    meta = hadamard_matrix(24, dtype=dtype, device="meta")
    assert (meta.device.type, meta.dtype) == ("meta", dtype)
    with torch.device("meta"):
        assert hadamard_matrix(24).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, "int8"])
def test_dtype_without_minus_one(dtype):
    with pytest.raises(TypeError, match=f"dtype must be a signed torch.dtype.*{dtype}"):
        hadamard_matrix(4, dtype=dtype)


@pytest.mark.parametrize("n", [4, 12, 24])
def test_result_is_the_callers_own(n):
    shared = core_matrix(n)
    before = shared.clone()
    hadamard_matrix(n).zero_()
    assert core_matrix(n) is shared
    assert torch.equal(shared, before)


@pytest.mark.parametrize(
    "mode",
    [FakeTensorMode, torch.inference_mode, lambda: torch.device("meta")],
    ids=["fake", "inference", "meta"],
)
def test_core_made_in_a_mode_is_an_ordinary_tensor(mode):
    """The cache keeps it for callers outside the mode."""
    _cached_core.cache_clear()
    with mode():
        cores = [core_matrix(k) for k in (12, 44, 92, 188, 268, 292)]
    for core in cores:
        assert type(core) is torch.Tensor
        assert core.device.type == "cpu"
        assert not core.is_inference()
        assert is_hadamard(core)


@pytest.mark.filterwarnings("error")
def test_traced_graph_holds_the_matrix_as_a_constant():
    x = torch.randn(2, 48)
    for function in (
        lambda x: x @ hadamard_matrix(48, dtype=x.dtype, device=x.device),
        lambda x: x * hadamard_order(x.shape[1])[0],
    ):
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
        torch.testing.assert_close(compiled(x), function(x))


@pytest.mark.parametrize(
    ("n", "said"),
    [
        (0, "must be a positive order, got 0"),
        (-4, "must be a positive order, got -4"),
        (3, "multiple of 4. Nearest supported orders: 2 and 4; .* no divisor above 1"),
        (30, "multiple of 4. Nearest supported orders: 28 and 32; to keep 30, .* block_size=2 "),
        (
            668,
            "no construction .* 668 .*Nearest supported orders: 664 and 672; to keep 668, .* block_size=4 ",
        ),
        (1336, "no construction .* 668 .*Nearest supported orders: 1332 and 1344; .* block_size=8 "),
        (6 * 1024 + 2, "Nearest supported orders: 6144 and 6152; .* block_size=2 "),
        (4 * 10007, f"K <= {LARGEST_CORE}, of 40028 times a power of two.* block_size=4 "),
    ],
)
def test_orders_without_a_matrix(n, said):
    for function in (hadamard_order, hadamard_matrix, core_matrix, construction):
        with pytest.raises(ValueError, match=f"n.*{n}" if n < 1 else f"n={n}") as raised:
            function(n)
        assert re.search(said, str(raised.value)), str(raised.value)


def test_advice_is_right():
    """What the message names is supported, and nothing nearer or larger is."""

    def supported(m: int) -> bool:
        try:
            return bool(hadamard_order(m))
        except ValueError:
            return False

    for n in range(3, 800):
        if supported(n):
            continue
        with pytest.raises(ValueError, match="Nearest supported orders") as raised:
            hadamard_order(n)
        text = str(raised.value)
        below, above = map(int, re.search(r"orders: (\d+) and (\d+)", text).groups())
        assert below == max(m for m in range(1, n) if supported(m))
        assert above == next(m for m in range(n + 1, 2 * n) if supported(m))
        named = re.search(r"block_size=(\d+)", text)
        best = max(d for d in range(1, n + 1) if n % d == 0 and supported(d))
        assert (int(named[1]) if named else 1) == best


@pytest.mark.parametrize("n", [12.0, "12", None])
def test_order_must_be_an_integer(n):
    with pytest.raises(TypeError, match=f"n must be an int, got {type(n).__name__}"):
        hadamard_order(n)
