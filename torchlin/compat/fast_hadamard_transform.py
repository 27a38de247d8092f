"""The five functions of Dao-AILab's fast-hadamard-transform package, on any device, with correct gradients.

Import from ``torchlin.compat.fast_hadamard_transform`` instead of ``fast_hadamard_transform``. Results are
the same for the sizes that are exact there: powers of two, and 12·2^k, 20·2^k, 28·2^k, 40·2^k, for which that
package's own matrices are used, so that weights rotated with it stay valid. ``scale`` is 1.0 by default.

Where the two differ:

- Any other size is padded with zeros there and the result cut to length, which is neither orthogonal nor
  invertible. Here it is an error.
- The matrices of orders 20, 28 and 40 are not symmetric, yet the gradient there multiplies by H, not by Hᵀ.
- float64, CPU tensors, empty batches, misaligned and non-contiguous views work here, at any size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchlin import functional
from torchlin.ops._checks import check_float_tensor
from torchlin.ops.hadamard import hadamard_transform_reference, make_constant
from torchlin.ops.hadamard_constructions import paley_1, paley_2, sylvester, williamson
from torchlin.ops.hadamard_matrix import hadamard_order

__all__ = [
    "hadamard_transform",
    "hadamard_transform_12N",
    "hadamard_transform_20N",
    "hadamard_transform_28N",
    "hadamard_transform_40N",
    "hadamard_transform_ref",
]

# That package's matrices; the layouts of rows and signs are part of its interface.
_MATRICES = {
    12: lambda: paley_2(5),
    20: lambda: williamson(5),
    28: lambda: williamson(7),
    40: lambda: torch.kron(sylvester(2), paley_1(19)),
}
_made: dict[tuple[int, torch.device], Tensor] = {}


def hadamard_transform(x: Tensor, scale: float = 1.0) -> Tensor:
    """Multiply each row by ``scale`` times Sylvester's Hadamard matrix, natural order.

    Args:
        x: (..., n) float32, float64, float16 or bfloat16, n a power of two.
        scale: factor; 1/√n makes the map orthogonal.

    Returns:
        (..., n), x's dtype.

    Raises:
        TypeError: x is no tensor of these dtypes.
        ValueError: n is no power of two; the message names a transform that takes it.

    Source: https://github.com/Dao-AILab/fast-hadamard-transform

    Example:
        >>> hadamard_transform(torch.tensor([1.0, 0.0, 0.0, 2.0]))
        tensor([ 3., -1., -1.,  3.])
    """
    _check_size(x, 1)
    return functional.hadamard_transform(x, scale)


def hadamard_transform_12N(x: Tensor, scale: float = 1.0) -> Tensor:
    """:func:`hadamard_transform` for n = 12·2^k, by H_12 ⊗ H_{2^k} (H_12: Paley II, symmetric)."""
    return _composite(x, scale, 12)


def hadamard_transform_20N(x: Tensor, scale: float = 1.0) -> Tensor:
    """:func:`hadamard_transform` for n = 20·2^k, by H_20 ⊗ H_{2^k} (H_20: Williamson, not symmetric)."""
    return _composite(x, scale, 20)


def hadamard_transform_28N(x: Tensor, scale: float = 1.0) -> Tensor:
    """:func:`hadamard_transform` for n = 28·2^k, by H_28 ⊗ H_{2^k} (H_28: Williamson, not symmetric)."""
    return _composite(x, scale, 28)


def hadamard_transform_40N(x: Tensor, scale: float = 1.0) -> Tensor:
    """:func:`hadamard_transform` for n = 40·2^k, by H_40 ⊗ H_{2^k} (H_40: H_2 ⊗ Paley I, not symmetric)."""
    return _composite(x, scale, 40)


def hadamard_transform_ref(x: Tensor, scale: float = 1.0) -> Tensor:
    """:func:`hadamard_transform` in plain torch, for comparison."""
    _check_size(x, 1)
    return hadamard_transform_reference(x, scale)


def _composite(x: Tensor, scale: float, k: int) -> Tensor:
    _check_size(x, k)
    # detach() for tracing: Dynamo cannot ask a constant for its requires_grad.
    return functional.hadamard_transform(x, scale, had_k=_matrix(k, x.device).detach())


def _matrix(k: int, device: torch.device) -> Tensor:
    key = (k, device)
    if key not in _made:
        _made[key] = make_constant(_MATRICES[k], device)
    return _made[key]


# As torch.compiler.assume_constant_result: a traced graph holds the matrix as a constant.
_matrix._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_size(x: Tensor, k: int) -> None:
    check_float_tensor("x", x)
    n = x.shape[-1] if x.dim() else 0
    if _is_exact(n, k):
        return
    allowed = "a power of two" if k == 1 else f"{k} times a power of two"
    exact = [f"hadamard_transform{'' if m == 1 else f'_{m}N'}" for m in (1, *_MATRICES) if _is_exact(n, m)]
    try:
        hadamard_order(n)
        exact.append("torchlin.functional.hadamard_transform")
        advice = f"use {' or '.join(exact)} for {n}"
    except ValueError as error:
        advice = str(error)
    raise ValueError(f"the last dimension of x must be {allowed} (nothing is padded), got {n}: {advice}")


def _is_exact(n: int, k: int) -> bool:
    """n = k·2^j."""
    p = n // k
    return n > 0 and n % k == 0 and p & (p - 1) == 0
