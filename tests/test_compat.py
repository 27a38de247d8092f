"""The stand-in for fast-hadamard-transform: that package's matrices, with right gradients and no padding."""

from __future__ import annotations

import zlib

import pytest
import torch

from torchlin.compat import fast_hadamard_transform as compat
from torchlin.ops.hadamard_matrix import hadamard_matrix

COMPOSITE = {
    12: compat.hadamard_transform_12N,
    20: compat.hadamard_transform_20N,
    28: compat.hadamard_transform_28N,
    40: compat.hadamard_transform_40N,
}
# CRC-32 of that package's matrices (csrc/code_gen.py), written as there: K lines of + and -.
PUBLISHED = {12: 0xC42E0EF4, 20: 0x58C6E029, 28: 0x22DDB10F, 40: 0x66963B58}
# Rows of them, as published; the first is symmetric, the others are not.
FIRST_ROWS = {
    12: "+-++++++++++",
    20: "+----+----++--++-++-",
    28: "+------++----++-+--+-+--++--",
    40: "+-------------------+-------------------",
}


def matrix(function, n: int) -> torch.Tensor:
    """The matrix that a transform multiplies rows by, y = M x."""
    return function(torch.eye(n, dtype=torch.float64)).T.contiguous()


def text(h: torch.Tensor) -> str:
    return "\n".join("".join("+" if v > 0 else "-" for v in row) for row in h)


@pytest.mark.parametrize("k", COMPOSITE)
def test_matrices_are_the_published_ones(k):
    h = matrix(COMPOSITE[k], k)
    assert text(h).startswith(FIRST_ROWS[k] + "\n")
    assert zlib.crc32(text(h).encode()) == PUBLISHED[k]
    assert torch.equal(h @ h.T, k * torch.eye(k, dtype=torch.float64))
    assert torch.equal(h, h.T) == (k == 12)


@pytest.mark.parametrize("k", COMPOSITE)
@pytest.mark.parametrize("fast", [1, 2, 4, 16, 64])
def test_composite_is_published_matrix_times_sylvester(k, fast):
    x = torch.randn(3, 2, k * fast, dtype=torch.float64)
    h = torch.kron(matrix(COMPOSITE[k], k), hadamard_matrix(fast, dtype=torch.float64))
    torch.testing.assert_close(COMPOSITE[k](x, 0.5), 0.5 * x @ h.T)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64, 512])
def test_power_of_two(n):
    x = torch.randn(5, n, dtype=torch.float64)
    expected = x @ hadamard_matrix(n, dtype=torch.float64)
    torch.testing.assert_close(compat.hadamard_transform(x), expected)
    torch.testing.assert_close(compat.hadamard_transform(x, scale=n**-0.5), expected * n**-0.5)
    torch.testing.assert_close(compat.hadamard_transform_ref(x, 3.0), expected * 3.0)


@pytest.mark.parametrize("k", COMPOSITE)
def test_gradients(k):
    """Those of order 20, 28 and 40 need the transposed matrix."""
    x = torch.randn(2, 2 * k, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: COMPOSITE[k](t, 0.3), x)
    assert torch.autograd.gradgradcheck(lambda t: COMPOSITE[k](t, 0.3), x)
    grad = torch.randn(2, 2 * k, dtype=torch.float64)
    (got,) = torch.autograd.grad(COMPOSITE[k](x), x, grad)
    torch.testing.assert_close(got, grad @ matrix(COMPOSITE[k], 2 * k))


def test_gradients_of_powers_of_two():
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(compat.hadamard_transform, x)
    assert torch.autograd.gradcheck(compat.hadamard_transform_ref, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [1, *COMPOSITE])
def test_one_rounding_in_low_precision(k, dtype):
    """Arithmetic in float32, scale before the one rounding: integers come out correctly rounded."""
    function = compat.hadamard_transform if k == 1 else COMPOSITE[k]
    x = torch.randint(-8, 9, (7, 32 * k)).to(dtype)
    y = function(x, 0.125)
    assert y.dtype is dtype
    assert torch.equal(y, function(x.double(), 0.125).to(dtype))


def test_views_and_empty_batches():
    x = torch.randn(65, 9, dtype=torch.float64)
    expected = x[1:].T.contiguous() @ hadamard_matrix(64, dtype=torch.float64)
    torch.testing.assert_close(compat.hadamard_transform(x[1:].T), expected)
    assert compat.hadamard_transform_20N(torch.empty(0, 40)).shape == (0, 40)


@pytest.mark.parametrize(
    ("function", "n", "said"),
    [
        (compat.hadamard_transform, 137, "a power of two .*got 137: order n=137 has no Hadamard matrix"),
        (compat.hadamard_transform, 768, "got 768: use hadamard_transform_12N or torchlin.functional"),
        (compat.hadamard_transform, 576, "got 576: use torchlin.functional.hadamard_transform for 576"),
        (compat.hadamard_transform, 0, "a power of two .*got 0: n must be a positive order"),
        (compat.hadamard_transform_ref, 12, "a power of two .*got 12: use hadamard_transform_12N"),
        (compat.hadamard_transform_12N, 64, "12 times a power of two .*got 64: use hadamard_transform or"),
        (compat.hadamard_transform_12N, 36, "12 times a power of two .*got 36"),
        (compat.hadamard_transform_20N, 80 * 28, "20 times a power of two .*got 2240"),
        (compat.hadamard_transform_20N, 24, "got 24: use hadamard_transform_12N"),
        (
            compat.hadamard_transform_28N,
            30,
            "28 times a power of two .*got 30: .*Nearest supported orders: 28 and 32",
        ),
        (compat.hadamard_transform_40N, 20, "40 times a power of two .*got 20: use hadamard_transform_20N"),
    ],
)
def test_nothing_is_padded(function, n, said):
    with pytest.raises(ValueError, match=said):
        function(torch.zeros(2, n))


@pytest.mark.parametrize(
    "function", [compat.hadamard_transform, compat.hadamard_transform_ref, *COMPOSITE.values()]
)
def test_wrong_types(function):
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got list"):
        function([1.0, 2.0])
    with pytest.raises(TypeError, match=r"x must be float32, float64, float16 or bfloat16, got torch.int64"):
        function(torch.zeros(16, dtype=torch.int64))


def test_compiles_without_a_graph_break():
    x = torch.randn(3, 80, requires_grad=True)
    compiled = torch.compile(compat.hadamard_transform_20N, fullgraph=True, backend="aot_eager")
    expected = compat.hadamard_transform_20N(x)
    torch.testing.assert_close(compiled(x), expected)


def test_a_first_call_while_tracing_keeps_a_real_matrix():
    class Rotate(torch.nn.Module):
        def forward(self, x):
            return compat.hadamard_transform_28N(x)

    compat._made.pop((28, torch.device("cpu")), None)
    x = torch.randn(3, 56)
    exported = torch.export.export(Rotate(), (x,), strict=False)  # runs the function on fake tensors
    torch.testing.assert_close(exported.module()(x), compat.hadamard_transform_28N(x))
    assert type(compat._made[28, x.device]) is torch.Tensor
