"""Argument checks that every op shares. Each error names the argument, what came, and what is allowed."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

FLOAT_DTYPES = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What arithmetic is done in: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def check_float_tensor(name: str, x: object) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")


def check_dim(name: str, dim: object, ndim: int) -> int:
    """The dimension as a non-negative index."""
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"{name} must be an int, got {type(dim).__name__}")
    if ndim == 0:
        raise ValueError("x must have at least one dimension, got a 0-dimensional tensor")
    if not -ndim <= dim < ndim:
        raise ValueError(f"{name} must be in [{-ndim}, {ndim - 1}] for a {ndim}-dimensional x, got {dim}")
    return dim % ndim


def check_scale(name: str, scale: object) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{name} must be a float or None, got {type(scale).__name__}")
    return float(scale)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in (
            tensors
        ):  # not any(): a compiler that traces this cannot look into a generator of tensor attributes
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def can_look_at(x: torch.Tensor) -> bool:
    """Whether x has values that Python may read: not on the meta device, not while a graph is traced or a function batched."""
    return not (
        torch.compiler.is_compiling() or x.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are being taken: dual tensors do not say that they require grad."""
    return forward_ad._current_level >= 0


def _overlaps_itself(x: torch.Tensor) -> bool:
    """Whether two indices of x may share an element (expanded or overlapping strides)."""
    reach = 0
    for stride, size in sorted((abs(st), si) for st, si in zip(x.stride(), x.shape, strict=True) if si > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _byte_range(x: torch.Tensor) -> tuple[int, int]:
    reach = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False
    (a_begin, a_end), (b_begin, b_end) = _byte_range(a), _byte_range(b)
    return a_begin < b_end and b_begin < a_end


def check_inplace(x: torch.Tensor) -> None:
    """x may be overwritten: not a leaf that needs grad, not expanded."""
    if torch.is_grad_enabled() and x.requires_grad and x.is_leaf:
        raise ValueError(
            "inplace=True cannot overwrite x, a leaf tensor that requires grad: use inplace=False or x.detach()"
        )
    if _overlaps_itself(x):
        raise ValueError(
            f"inplace=True needs an x whose elements do not share memory, got an expanded or overlapping view "
            f"(shape {tuple(x.shape)}, strides {x.stride()}): use x.clone()"
        )


def check_out(out: object, x: torch.Tensor, *inputs: torch.Tensor | None) -> None:
    """out can take the result: x's shape, dtype and device, memory of its own, no autograd."""
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out must be a torch.Tensor or None, got {type(out).__name__}")
    if out.dtype is not x.dtype:
        raise TypeError(f"out must have x's dtype {x.dtype}, got {out.dtype}")
    if out.device != x.device:
        raise ValueError(f"out must be on x's device {x.device}, got {out.device}")
    if out.shape != x.shape:
        raise ValueError(f"out must have x's shape {tuple(x.shape)}, got {tuple(out.shape)}")
    if needs_grad(out, x, *inputs):
        raise ValueError(
            "out= does not support automatic differentiation: drop out=, or use torch.no_grad() or detach()"
        )
    if _overlaps_itself(out):
        raise ValueError(
            f"out must not be an expanded or overlapping view, got strides {out.stride()} for shape {tuple(out.shape)}"
        )
    for source in (x, *inputs):
        if source is not None and _share_memory(out, source):
            raise ValueError("out must not share memory with an input: use inplace=True to overwrite x")
