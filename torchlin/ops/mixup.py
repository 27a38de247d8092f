"""mixup and cutmix: a batch mixed with a rearrangement of itself, by weights or by boxes. References, public functions."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchlin import _library
from torchlin.ops._checks import (
    can_look_at,
    check_float_tensor,
    check_scale,
    compute_dtype,
    in_forward_mode,
    needs_grad,
)

_raw: Any = torch.ops.torchlin


def mixup_reference(x: Tensor, lam: float | Tensor, perm: Tensor) -> Tensor:
    """:func:`mixup` in plain torch: oracle, baseline, fallback."""
    dtype = compute_dtype(x.dtype)
    weight = lam.to(dtype).view(-1, *[1] * (x.dim() - 1)) if isinstance(lam, Tensor) and lam.dim() else lam
    wide = x.to(dtype)
    return (weight * wide + (1 - weight) * wide[perm]).to(x.dtype)


def mixup(x: Tensor, lam: float | Tensor, perm: Tensor) -> Tensor:
    r"""Mix every sample with another one of the batch.

    .. math:: y_i = \lambda_i x_i + (1 - \lambda_i) x_{\pi(i)}

    Args:
        x: (B, ...) float32, float64, float16 or bfloat16 tensor of any strides: inputs, features, or dense labels. Integer
            labels need no mixing: :func:`cross_entropy_linearity` takes the pair (y, y[perm], lam).
        lam: λ, a number in [0, 1], or a tensor, 0-dimensional or (B,); differentiable. Features and labels may have their own:
            call it for each.
        perm: π, (B,) int64 indices into the batch: a permutation, or any other choice of partners.

    Returns:
        A new tensor of x's shape, dtype and memory format.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape does not fit, lam is a number outside [0, 1].
        IndexError: perm holds an index outside of the batch (on the CPU; a device stops with its assertion).

    Source: Zhang, Cissé, Dauphin and Lopez-Paz, "mixup: beyond empirical risk minimization", ICLR 2018, arXiv:1710.09412,
    equation 1.

    Example:
        >>> import torch
        >>> mixup(torch.tensor([[0.0], [4.0]]), 0.75, torch.tensor([1, 0]))
        tensor([[1.],
                [3.]])
    """
    check_float_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x must be (B, ...), a batch of samples, got a 0-dimensional tensor")
    lam = _check_lam(lam, x)
    _check_perm(perm, x)
    if in_forward_mode() or not _library.has_kernel(x.device.type):
        return mixup_reference(x, lam, perm)
    perm = perm.contiguous()
    if isinstance(lam, Tensor):  # one for each sample; what is made of it is autograd's
        lams = lam.to(x.device, compute_dtype(x.dtype)).expand(x.shape[:1])
        if needs_grad(x, lams):
            return _naming_perm(_Mixup.apply, x, 0.0, lams, perm)
        return _naming_perm(_raw._mixup_fwd, x, 0.0, _dense(lams), perm)
    if needs_grad(x):
        return _naming_perm(_Mixup.apply, x, lam, None, perm)
    return _naming_perm(_raw._mixup_fwd, x, lam, None, perm)


def _naming_perm(call: Callable[..., Tensor], *args: Any) -> Tensor:
    """The CPU kernel looks at perm before it reads by it; what it refuses is an index that is out of range."""
    if torch.compiler.is_compiling():
        return call(*args)
    try:
        return call(*args)
    except RuntimeError as error:
        if found := re.search("perm must hold .* at [0-9]+", str(error)):
            raise IndexError(found[0]) from None
        raise


def _dense(lams: Tensor | None) -> Tensor | None:
    return None if lams is None else lams.contiguous().resolve_neg()


class _Mixup(torch.autograd.Function):
    """y = mixup(x, lam), linear in x and in lam."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, lam, lams, perm):
        return _raw._mixup_fwd(x, lam, _dense(lams), perm)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.lam, lams, perm = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, lams, perm)

    @staticmethod
    def backward(ctx, grad):
        x, lams, perm = ctx.saved_tensors
        dx = _MixupTransposed.apply(grad, ctx.lam, lams, perm) if ctx.needs_input_grad[0] else None
        dlam = _LamGradient.apply(grad, x, perm) if ctx.needs_input_grad[2] else None
        return dx, None, dlam, None


class _MixupTransposed(torch.autograd.Function):
    """The transpose of x -> mixup(x, lam): every sample collects from those that it was mixed into."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, lam, lams, perm):
        return _raw._mixup_bwd(grad, lam, _dense(lams), perm)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, ctx.lam, lams, perm = inputs
        ctx.save_for_backward(grad if ctx.needs_input_grad[2] else None, lams, perm)

    @staticmethod
    def backward(ctx, slope):
        grad, lams, perm = ctx.saved_tensors
        dgrad = _Mixup.apply(slope, ctx.lam, lams, perm) if ctx.needs_input_grad[0] else None
        dlam = _LamGradient.apply(grad, slope, perm) if ctx.needs_input_grad[2] else None
        return dgrad, None, dlam, None


class _LamGradient(torch.autograd.Function):
    """<grad_i, x_i - x_perm(i)> for every sample."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, x, perm):
        return _raw._mixup_lam_bwd(grad, x, perm)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, weight):
        grad, x, perm = ctx.saved_tensors
        weight = weight.view(-1, *[1] * (x.dim() - 1))
        scaled, wide = weight * grad, x.to(weight.dtype)
        dx = scaled - torch.zeros_like(scaled).index_add(0, perm, scaled)
        return (weight * (wide - wide[perm])).to(grad.dtype), dx.to(x.dtype), None


def cutmix_reference(
    x: Tensor,
    lam: float | Tensor | None,
    perm: Tensor,
    *,
    boxes: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`cutmix` in plain torch: oracle, baseline, fallback."""
    if boxes is None:
        assert lam is not None
        boxes = cutmix_boxes(lam, x.shape[-2], x.shape[-1], device=x.device, generator=generator)
    rows = torch.arange(x.shape[-2], device=x.device).unsqueeze(-1)  # (H, 1)
    columns = torch.arange(x.shape[-1], device=x.device)  # (W,)
    top, bottom, left, right = boxes.view(-1, *[1] * (x.dim() - 1), 4).unbind(-1)
    inside = (top <= rows) & (rows < bottom) & (left <= columns) & (columns < right)
    return torch.where(inside, x[perm], x), _lam_of(boxes, x)


def cutmix(
    x: Tensor,
    lam: float | Tensor | None,
    perm: Tensor,
    *,
    boxes: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Replace a box of every sample by the same box of another one of the batch.

    The box has √(1 - λ) of the height and of the width; its centre is uniform in the image, and what lies outside of the image
    is clipped, so that less than 1 - λ may be replaced: the λ to weigh labels with is returned.

    Args:
        x: (B, ..., H, W) float32, float64, float16 or bfloat16 tensor of any strides.
        lam: λ, a number in [0, 1] or 0-dimensional tensor: one box for the whole batch; or a tensor (B,): a box for each
            sample. None where boxes are given.
        perm: (B,) int64 indices of the samples to cut from.
        boxes: your own boxes instead of random ones, (4,) or (B, 4) int64: top, bottom, left, right, the second and fourth
            not included.
        generator: of the centres, on x's device, or on the CPU: then every device has the same boxes. Default: torch's for
            x's device.

    Returns:
        (mixed, lam): a new tensor of x's shape, dtype and memory format, and the part of each sample that is its own,
        0-dimensional for one box, (B,) otherwise, float32. Boxes are whole numbers: no gradient flows to λ.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape does not fit, lam is outside of [0, 1], a box is not inside of the image, or both or none of lam
            and boxes are given.
        IndexError: perm holds an index outside of the batch (on the CPU).

    Source: Yun et al., "CutMix: regularization strategy to train strong classifiers with localizable features", ICCV 2019,
    arXiv:1905.04899, equations 1 and 2.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
        >>> mixed, lam = cutmix(x, None, torch.tensor([1, 0]), boxes=torch.tensor([0, 1, 0, 2]))
        >>> mixed[0, 0], lam
        (tensor([[2., 2.],
                [1., 1.]]), tensor(0.5000))
    """
    check_float_tensor("x", x)
    if x.dim() < 3:
        raise ValueError(f"x must be (B, ..., H, W), got shape {tuple(x.shape)}")
    _check_perm(perm, x)
    if (lam is None) == (boxes is None):
        raise ValueError("give either lam, or boxes and lam=None")
    if boxes is None:
        lam = _check_lam(lam, x)
        if (
            isinstance(lam, Tensor)
            and lam.is_cpu
            and can_look_at(lam)
            and not bool(((lam >= 0) & (lam <= 1)).all())
        ):
            raise ValueError(f"lam must be in [0, 1], got {lam.tolist()}")
        boxes = cutmix_boxes(lam, x.shape[-2], x.shape[-1], device=x.device, generator=generator)
    else:
        _check_boxes(boxes, x)
    lam_effective = _lam_of(boxes, x)
    if in_forward_mode() or not _library.has_kernel(x.device.type):
        return cutmix_reference(x, None, perm, boxes=boxes)
    perm, boxes = perm.contiguous(), boxes.contiguous()
    if needs_grad(x):
        return _naming_perm(_Cutmix.apply, x, perm, boxes), lam_effective
    return _naming_perm(_raw._mixup_cut_fwd, x, perm, boxes), lam_effective


class _Cutmix(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, perm, boxes):
        return _raw._mixup_cut_fwd(x, perm, boxes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        return _CutmixTransposed.apply(grad, *ctx.saved_tensors), None, None


class _CutmixTransposed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad, perm, boxes):
        return _raw._mixup_cut_bwd(grad, perm, boxes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, slope):
        return _Cutmix.apply(slope, *ctx.saved_tensors), None, None


def cutmix_boxes(
    lam: float | Tensor,
    height: int,
    width: int,
    *,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """CutMix's random boxes (top, bottom, left, right) for λ: (4,) for one λ, (B, 4) for a tensor (B,)."""
    where = device if generator is None else generator.device
    lam = torch.as_tensor(lam, dtype=torch.float64, device=where)
    side = (1 - lam.detach()).clamp(0, 1).sqrt()
    edges = []
    for size in (height, width):
        half = (size * side).long() // 2
        center = torch.randint(size, lam.shape, device=lam.device, generator=generator)
        edges += [(center - half).clamp(0, size), (center + half).clamp(0, size)]
    return torch.stack(edges, -1).to(device, non_blocking=True)


def _lam_of(boxes: Tensor, x: Tensor) -> Tensor:
    top, bottom, left, right = boxes.unbind(-1)
    area = (bottom - top) * (right - left)
    return (1 - area.double() / max(x.shape[-2] * x.shape[-1], 1)).float()


def _check_lam(lam: Any, x: Tensor) -> float | Tensor:
    if isinstance(lam, Tensor):
        check_float_tensor("lam", lam)
        if lam.dim() and lam.shape != x.shape[:1]:
            raise ValueError(
                f"lam must be 0-dimensional or ({x.shape[0]},), one a sample, got {tuple(lam.shape)}"
            )
        if lam.device != x.device and lam.dim():
            raise ValueError(f"lam must be on x's device {x.device}, got {lam.device}")
        return lam
    lam = check_scale("lam", lam)
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], got {lam}")
    return lam


def _check_perm(perm: Any, x: Tensor) -> None:
    if not isinstance(perm, Tensor):
        raise TypeError(f"perm must be a torch.Tensor, got {type(perm).__name__}")
    if perm.dtype is not torch.int64:
        raise TypeError(f"perm must be int64, got {perm.dtype}")
    if perm.shape != x.shape[:1]:
        raise ValueError(
            f"perm must have shape ({x.shape[0]},), an index for each sample, got {tuple(perm.shape)}"
        )
    if perm.device != x.device:
        raise ValueError(f"perm must be on x's device {x.device}, got {perm.device}")


def _check_boxes(boxes: Any, x: Tensor) -> None:
    if not isinstance(boxes, Tensor):
        raise TypeError(f"boxes must be a torch.Tensor or None, got {type(boxes).__name__}")
    if boxes.dtype is not torch.int64:
        raise TypeError(f"boxes must be int64, got {boxes.dtype}")
    if boxes.shape not in ((4,), (x.shape[0], 4)):
        raise ValueError(f"boxes must have shape (4,) or ({x.shape[0]}, 4), got {tuple(boxes.shape)}")
    if boxes.device != x.device:
        raise ValueError(f"boxes must be on x's device {x.device}, got {boxes.device}")
    if boxes.is_cpu and can_look_at(boxes):
        top, bottom, left, right = boxes.unbind(-1)
        height, width = x.shape[-2:]
        inside = (
            (top >= 0)
            & (top <= bottom)
            & (bottom <= height)
            & (left >= 0)
            & (left <= right)
            & (right <= width)
        )
        if not bool(inside.all()):
            raise ValueError(
                f"boxes must be (top, bottom, left, right) inside of {height} x {width}, got {boxes.tolist()}"
            )


# A batch of calls is one call on a larger batch: everybody's partners are in their own part of it.


def _as_one(info, in_dims, perm_at: int, tensors: dict[int, str], args):
    """args with their tensors flattened over the calls: "x" (calls, B, ...), "each" (calls, B), "boxes" (calls, B, 4)."""
    count, perm = info.batch_size, args[perm_at]
    size = perm.shape[-1] if in_dims[perm_at] is None else perm.numel() // count
    args = list(args)
    for at, kind in tensors.items():
        if (t := args[at]) is None:
            continue
        t = t.expand(count, *t.shape) if in_dims[at] is None else t.movedim(in_dims[at], 0)
        if kind == "perm":
            t = t + torch.arange(count, device=t.device).unsqueeze(1) * size
        elif kind == "boxes":
            t = t.view(count, -1, 4).expand(count, size, 4)
        args[at] = t.flatten(0, 1).contiguous() if kind != "x" else t.flatten(0, 1)
    return args, lambda out: out.unflatten(0, (count, size)) if size else out.view(count, *out.shape)


def _vmap(op: Any, perm_at: int, tensors: dict[int, str]) -> Callable[..., Any]:
    def rule(info, in_dims, *args):
        args, apart = _as_one(info, in_dims, perm_at, {**tensors, perm_at: "perm"}, args)
        return apart(op(*args)), 0

    return rule


def _fake_lam_bwd(grad, x, perm):
    return x.new_empty(x.shape[:1], dtype=compute_dtype(x.dtype))


if _library.status()["cpu"].loaded:
    torch.library.register_fake("torchlin::_mixup_fwd", lambda x, lam, lams, perm: torch.empty_like(x))
    torch.library.register_fake("torchlin::_mixup_bwd", lambda grad, lam, lams, perm: torch.empty_like(grad))
    torch.library.register_fake("torchlin::_mixup_lam_bwd", _fake_lam_bwd)
    torch.library.register_fake("torchlin::_mixup_cut_fwd", lambda x, perm, boxes: torch.empty_like(x))
    torch.library.register_fake("torchlin::_mixup_cut_bwd", lambda grad, perm, boxes: torch.empty_like(grad))
    for name, at, kinds in (
        ("_mixup_fwd", 3, {0: "x", 2: "each"}),
        ("_mixup_bwd", 3, {0: "x", 2: "each"}),
        ("_mixup_lam_bwd", 2, {0: "x", 1: "x"}),
        ("_mixup_cut_fwd", 1, {0: "x", 2: "boxes"}),
        ("_mixup_cut_bwd", 1, {0: "x", 2: "boxes"}),
    ):
        torch.library.register_vmap(f"torchlin::{name}", _vmap(getattr(_raw, name), at, kinds))
