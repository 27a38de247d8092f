"""The fast Hadamard transform: reference, fake kernel, autograd and the public function.

The raw ops compute y = scale · H (s ∘ x), or its transpose y = scale · s ∘ (Hᵀ x), along one dimension; both are linear in x
and in s, so derivatives of every order are calls of the same op.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from torchlin import _library
from torchlin.ops._checks import (
    check_dim,
    check_float_tensor,
    check_inplace,
    check_out,
    check_scale,
    compute_dtype,
    in_forward_mode,
    needs_grad,
)
from torchlin.ops.hadamard_matrix import core_matrix, hadamard_order

_raw: Any = torch.ops.torchlin
_CPU_KERNEL = _library.status()["cpu"].loaded
_last: Any = _raw._hadamard_last.default if _CPU_KERNEL else None

# H_K on each device, made once: {(K, device): int8 (K, K)}.
_cores: dict[tuple[int, torch.device], Tensor] = {}
_WORD = 32  # signs in a number
# Callers' matrices that were found to be Hadamard matrices, and in which state: the check costs more than a small transform.
_seen_hadamard: MutableMapping[Tensor, int] = WeakIdKeyDictionary()


def hadamard_transform_reference(
    x: Tensor,
    scale: float | None = None,
    *,
    dim: int = -1,
    block_size: int | None = None,
    signs: Tensor | None = None,
    had_k: Tensor | None = None,
    transpose: bool = False,
) -> Tensor:
    """The transform in plain torch: oracle of the tests, baseline of the benchmarks, fallback where no kernel runs.

    Same arguments, result and rounding as :func:`hadamard_transform`; every intermediate is float32 (float64 for float64 x).
    """
    dim, order, k, scale, signs, had_k = _check(x, scale, dim, block_size, signs, had_k)
    return _reference(x, scale, dim, order, k, signs, had_k, transpose)


def _reference(
    x: Tensor,
    scale: float,
    dim: int,
    order: int,
    k: int,
    signs: Tensor | None,
    had_k: Tensor | None,
    transpose: bool,
) -> Tensor:
    size = x.shape[dim]
    rows = x.movedim(dim, -1).to(compute_dtype(x.dtype))  # (..., N)
    y = rows if signs is None or transpose else rows * signs
    y = y.reshape(*rows.shape[:-1], size // order * k, order // k)  # (..., blocks · K, P)
    half = 1
    while half < order // k:  # radix-2 butterflies over the fast index
        y = y.unflatten(-1, (order // k // (2 * half), 2, half))  # (..., P / 2h, 2, h)
        a, b = y.unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    if had_k is not None:
        h = (had_k.mT if transpose else had_k).to(y.dtype)
        y = h @ y.unflatten(-2, (size // order, k))  # (..., blocks, K, P)
    y = y.reshape(rows.shape) * scale
    if signs is not None and transpose:
        y = y * signs
    return y.to(x.dtype).movedim(-1, dim)


def hadamard_transform(
    x: Tensor,
    scale: float | None = None,
    *,
    dim: int = -1,
    block_size: int | None = None,
    signs: Tensor | None = None,
    had_k: Tensor | None = None,
    transpose: bool = False,
    inplace: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    r"""Multiply by a Hadamard matrix along one dimension, in n·log n additions.

    .. math:: y_{..., i} = \text{scale} \cdot \sum_j H_{ij} \, s_j \, x_{..., j}

    With ``transpose=True`` the transpose of that map: :math:`y = \text{scale} \cdot s \circ (H^T x)`, which at the default
    scale and ±1 signs is its inverse.

    Args:
        x: float32, float64, float16 or bfloat16 tensor of any strides, at least 1-dimensional. Arithmetic is float32 (float64
            for float64) with one rounding at the end.
        scale: factor applied before the rounding; ``None`` is 1/√n, which makes the map orthogonal.
        dim: the dimension to transform, of size n. A strided dimension is transformed without copying x.
        block_size: transform blocks of this many neighbours, H = I ⊗ H_g; must divide the size of ``dim``. n is then g.
        signs: vector s of the size of ``dim``, ±1 or any real numbers; differentiable.
        had_k: your own Hadamard matrix H_K, (K, K) of ±1, used as H = H_K ⊗ H_{2^k} with n = K·2^k. By default the matrix of
            :func:`torchlin.hadamard_matrix`.
        transpose: apply the transposed map.
        inplace: overwrite and return x.
        out: tensor that takes the result; x's shape, dtype and device, sharing no memory with the inputs.

    Returns:
        A tensor of x's shape, dtype and memory format.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: n is no order with a known Hadamard matrix (nothing is ever padded), a size does not fit, ``out`` overlaps
            an input, or ``inplace`` would overwrite an expanded x or a leaf that needs grad.

    Source: J. J. Sylvester, 1867 (powers of two); R. E. A. C. Paley, "On orthogonal matrices", 1933, and J. Williamson, 1944
    (other orders). Layout H_K ⊗ H_{2^k} as in QuIP#, QuaRot and SpinQuant.

    Example:
        >>> import torch, torchlin
        >>> x = torch.eye(4)
        >>> torchlin.functional.hadamard_transform(x, scale=1.0)
        tensor([[ 1.,  1.,  1.,  1.],
                [ 1., -1.,  1., -1.],
                [ 1.,  1., -1., -1.],
                [ 1., -1., -1.,  1.]])
    """
    # Checking the arguments of a small tensor's call costs more than its arithmetic. The plainest call goes straight to the
    # op; what the op refuses takes the long way, which says why.
    if (
        x.__class__ is Tensor
        and dim == -1
        and dim.__class__ is int
        and signs is block_size is had_k is out is None
        and (scale is None or scale.__class__ is float)
        and not inplace
        and _CPU_KERNEL
        and x.is_cpu
        and not (x.requires_grad and torch.is_grad_enabled())
        and not in_forward_mode()
    ):
        try:
            size = x.shape[-1]
            if size & (size - 1) == 0 < size:
                return _last(x) if scale is None else _last(x, scale)
        except (IndexError, RuntimeError):
            pass
    dim, order, k, scale, signs, had_k = _check(x, scale, dim, block_size, signs, had_k)
    if out is not None:
        if inplace:
            raise ValueError("inplace=True and out= exclude each other: pass one of them")
        check_out(out, x, signs)
    if inplace:
        check_inplace(x)
    if not _library.has_kernel(x.device.type):
        y = _reference(x, scale, dim, order, k, signs, had_k, transpose)
        if out is None and not inplace:
            return y if dim == x.dim() - 1 and x.is_contiguous() else torch.empty_like(x).copy_(y)
        return (x if out is None else out).copy_(y)
    if out is not None or inplace:
        return _into(x if out is None else out, x, scale, dim, order, signs, had_k, transpose)
    return _apply(x, signs, had_k, scale, dim, order, transpose)


def _into(
    out: Tensor,
    x: Tensor,
    scale: float,
    dim: int,
    order: int,
    signs: Tensor | None,
    had_k: Tensor | None,
    transpose: bool,
) -> Tensor:
    """Writes the transform of x into out, which is x itself (in place) or shares no memory with it."""
    if needs_grad(x, signs):  # in place on a tensor with history
        if signs is not None and signs.requires_grad:
            raise ValueError(
                "inplace=True overwrites x, which the gradient of signs needs: use inplace=False"
            )
        return _HadamardInplace.apply(x, signs, had_k, scale, dim, order, transpose)
    _write(out, x, scale, dim, order, signs, had_k, transpose)
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def _write(out, x, scale, dim, order, signs, had_k, transpose):
    # torch's fallback for negative views, which no traced graph has, fails on None beside an argument that is written.
    if not torch.compiler.is_compiling() and (x.is_neg() or out.is_neg()):
        out.copy_(_raw._hadamard_fwd(x, scale, dim, order, signs, had_k, transpose))
    else:
        _raw._hadamard_out(x, scale, dim, order, signs, had_k, transpose, out)


def _check(
    x: Tensor,
    scale: float | None,
    dim: int,
    block_size: int | None,
    signs: Tensor | None,
    had_k: Tensor | None,
) -> tuple[int, int, int, float, Tensor | None, Tensor | None]:
    """Validated (dim, order, K, scale, signs, had_k), in the form that the raw ops take."""
    check_float_tensor("x", x)
    dim = check_dim("dim", dim, x.dim())
    size = operator.index(x.shape[dim])
    if had_k is None:
        order, k = check_order(size, block_size)
        if k > 1:
            had_k = _core_on(k, x.device)
    else:
        order = size if block_size is None else _check_block_size(block_size, size)
        k, had_k = _check_had_k(had_k, order, x)
    if signs is not None:
        signs = _check_signs(signs, size, x)
    if k == 1 and had_k is not None:  # [[1]] or [[-1]]: the kernels take a core from order 2 on
        factor = had_k.to(compute_dtype(x.dtype)).view(1)
        signs, had_k = factor.expand(size).contiguous() if signs is None else signs * factor, None
    return dim, order, k, 1 / math.sqrt(order) if scale is None else check_scale("scale", scale), signs, had_k


def check_order(size: int, block_size: int | None = None) -> tuple[int, int]:
    """(order of the blocks, K of their H_K) for a dimension of this size; ValueError where no such matrix is known."""
    order = size if block_size is None else _check_block_size(block_size, size)
    return order, _k_of(order)


def _check_block_size(block_size: int, size: int) -> int:
    if not isinstance(block_size, int) or isinstance(block_size, bool):
        raise TypeError(f"block_size must be an int or None, got {type(block_size).__name__}")
    if block_size < 1 or size % block_size:
        raise ValueError(
            f"block_size must be a positive divisor of the transformed size {size}, got {block_size}"
        )
    return operator.index(block_size)  # a traced graph is specialised on it


def _check_signs(signs: Tensor, size: int, x: Tensor) -> Tensor:
    if not isinstance(signs, Tensor):
        raise TypeError(f"signs must be a torch.Tensor or None, got {type(signs).__name__}")
    if signs.dtype is torch.bool or signs.is_complex():
        raise TypeError(f"signs must hold real numbers, got {signs.dtype}")
    if signs.shape != (size,):
        raise ValueError(
            f"signs must have shape ({size},), one factor an element of dim, got {tuple(signs.shape)}"
        )
    if signs.device != x.device:
        raise ValueError(f"signs must be on x's device {x.device}, got {signs.device}")
    return signs.to(compute_dtype(x.dtype)).contiguous().resolve_neg()


def _check_had_k(had_k: Tensor, order: int, x: Tensor) -> tuple[int, Tensor]:
    if not isinstance(had_k, Tensor):
        raise TypeError(f"had_k must be a torch.Tensor or None, got {type(had_k).__name__}")
    if had_k.requires_grad:
        raise ValueError("had_k is a constant of ±1 and cannot require grad: pass had_k.detach()")
    if had_k.dim() != 2 or had_k.shape[0] != had_k.shape[1] or had_k.shape[0] == 0:
        raise ValueError(f"had_k must be a square matrix, got shape {tuple(had_k.shape)}")
    k = operator.index(had_k.shape[0])
    if order % k or (order // k) & (order // k - 1):
        raise ValueError(f"had_k of order {k} must divide the transform's order {order} by a power of two")
    if had_k.device != x.device:
        raise ValueError(f"had_k must be on x's device {x.device}, got {had_k.device}")
    h = had_k.to(torch.int8).contiguous().resolve_neg()
    # A traced graph cannot look at values: there the caller's matrix is taken as it is.
    if torch.compiler.is_compiling() or had_k.is_meta or _seen_hadamard.get(had_k) == _version(had_k):
        return k, h
    wide = h.float()  # sums of K ones are exact
    identity = torch.eye(k, device=h.device) * k
    if not (bool(((had_k == h) & (h.abs() == 1)).all()) and torch.equal(wide @ wide.mT, identity)):
        raise ValueError("had_k must be a Hadamard matrix: entries ±1 and had_k @ had_k.T = K·I")
    _seen_hadamard[had_k] = _version(had_k)
    return k, h


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _k_of(order: int) -> int:
    return hadamard_order(order)[0]


def _core_on(k: int, device: torch.device) -> Tensor:
    """H_K as the kernels want it, kept for every device that asked."""
    if torch.compiler.is_compiling():
        return _core_in_graph(k, device)
    key = (k, device)
    if key not in _cores:
        _cores[key] = make_constant(lambda: core_matrix(k), device)
    return _cores[key]


def _core_in_graph(k: int, device: torch.device) -> Tensor:
    """H_K out of the numbers that hold its signs: a traced graph takes one constant tensor of a function, and no second."""
    words = torch.tensor(_core_words(k), dtype=torch.int64, device=device)  # (K · words)
    bits = words.unsqueeze(-1) >> torch.arange(_WORD, device=device) & 1  # (K · words, 32)
    return (1 - 2 * bits.view(k, -1)[:, :k]).to(torch.int8).contiguous()


def _core_words(k: int) -> tuple[int, ...]:
    """The signs of H_K, a row after the other, 32 to a number; a bit that is set is a minus."""
    rows = [[int(v < 0) for v in row] for row in core_matrix(k).tolist()]
    starts = range(0, k, _WORD)
    return tuple(sum(bit << i for i, bit in enumerate(row[at : at + _WORD])) for row in rows for at in starts)


def make_constant(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """A matrix to keep: a real tensor whatever mode (fake tensors, inference) its first caller is in."""
    with _disable_current_modes(), torch.inference_mode(False):
        return make().to(device, copy=True)


# torch.compiler.assume_constant_result without its import of the whole compiler: a traced graph holds K and H_K as constants.
_k_of._dynamo_marked_constant = True  # type: ignore[attr-defined]
_core_words._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Hadamard(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, signs, had_k, scale, dim, order, transpose):
        return _raw._hadamard_fwd(x, scale, dim, order, signs, had_k, transpose)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, signs, had_k, *ctx.static = inputs
        saved = (x if signs is not None and signs.requires_grad else None, signs, had_k)
        ctx.save_for_backward(*saved)

    @staticmethod
    def backward(ctx, grad):
        x, signs, had_k = ctx.saved_tensors
        return *_gradients(grad, x, signs, had_k, *ctx.static), *[None] * 5


class _HadamardForward(_Hadamard):
    """With a forward derivative: a class of its own, because torch.compile refuses to trace a Function that has one."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _Hadamard.setup_context(ctx, inputs, output)
        x, signs, had_k, *_ = inputs
        ctx.save_for_forward(x if signs is not None else None, signs, had_k)

    @staticmethod
    def jvp(ctx, x_tangent, signs_tangent, *_):
        x, signs, had_k = ctx.saved_tensors
        scale, dim, order, transpose = ctx.static
        tangent = None
        if x_tangent is not None:
            tangent = _apply(x_tangent, signs, had_k, scale, dim, order, transpose)
        if signs_tangent is not None:
            along_signs = _apply(x, signs_tangent, had_k, scale, dim, order, transpose)
            tangent = along_signs if tangent is None else tangent + along_signs
        return tangent


class _HadamardInplace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, signs, had_k, scale, dim, order, transpose):
        ctx.static = scale, dim, order, transpose
        ctx.save_for_backward(signs, had_k)
        _write(x, x, scale, dim, order, signs, had_k, transpose)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        signs, had_k = ctx.saved_tensors
        return *_gradients(grad, None, signs, had_k, *ctx.static), *[None] * 5


def _apply(x, signs, had_k, scale, dim, order, transpose):
    """The op on arguments that are valid already, differentiable."""
    if in_forward_mode():
        return _HadamardForward.apply(x, signs, had_k, scale, dim, order, transpose)
    if needs_grad(x, signs):
        return _Hadamard.apply(x, signs, had_k, scale, dim, order, transpose)
    return _raw._hadamard_fwd(x, scale, dim, order, signs, had_k, transpose)


def _gradients(grad, x, signs, had_k, scale, dim, order, transpose):
    """Gradients to x and, where x was kept for it, to signs."""
    if x is None:
        return _apply(grad, signs, had_k, scale, dim, order, not transpose), None
    # The gradient of signs sums products over the whole batch: keep its factors unrounded.
    compute = compute_dtype(x.dtype)
    others = [d for d in range(x.dim()) if d != dim]
    wide_grad, wide_x = grad.to(compute), x.to(compute)
    if transpose:  # y = s ∘ v with v = scale · Hᵀ x
        v = _apply(wide_x, None, had_k, scale, dim, order, True)
        product = wide_grad * v
        grad_x = _apply(grad, signs, had_k, scale, dim, order, False)
    else:  # y = scale · H (s ∘ x), u = scale · Hᵀ grad
        u = _apply(wide_grad, None, had_k, scale, dim, order, True)
        product = u * wide_x
        shape = [1] * x.dim()
        shape[dim] = -1
        grad_x = (u * signs.view(shape)).to(x.dtype)
    return grad_x, product.sum(others) if others else product


def _fake_fwd(x, scale, dim, order, signs, had_k, transpose):
    return torch.empty_like(x)


def _fake_out(x, scale, dim, order, signs, had_k, transpose, out):
    return None


def _fake_last(x, scale=None):
    return torch.empty_like(x)


def _vmap_fwd(info, in_dims, x, scale, dim, order, signs, had_k, transpose):
    """One call for the whole batch: x's batch dimension is one more, s multiplies outside where it is batched."""
    x_dim, _, _, _, signs_dim, *_ = in_dims
    x = x.expand(info.batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
    if signs_dim is None:
        return _raw._hadamard_fwd(x, scale, dim + 1, order, signs, had_k, transpose), 0
    shape = [1] * x.dim()
    shape[0], shape[dim + 1] = info.batch_size, -1
    factors = signs.movedim(signs_dim, 0).reshape(shape)
    wide = x.to(signs.dtype)
    if transpose:
        y = _raw._hadamard_fwd(wide, scale, dim + 1, order, None, had_k, True) * factors
    else:
        y = _raw._hadamard_fwd(wide * factors, scale, dim + 1, order, None, had_k, False)
    return y.to(x.dtype), 0


def _vmap_last(info, in_dims, x, scale=None):
    return _raw._hadamard_last(x.movedim(in_dims[0], 0), scale), 0


if _CPU_KERNEL:
    torch.library.register_fake("torchlin::_hadamard_fwd", _fake_fwd)
    torch.library.register_fake("torchlin::_hadamard_out", _fake_out)
    torch.library.register_vmap("torchlin::_hadamard_fwd", _vmap_fwd)
    torch.library.register_fake("torchlin::_hadamard_last", _fake_last)
    torch.library.register_vmap("torchlin::_hadamard_last", _vmap_last)
