"""The three-point ("triplet") local-linearity loss. References and public functions.

A loss is taken at three points of a segment, x_a, x_b and x_c = (1 - mix) x_a + mix x_b. What it deviates there from the chord,

    r = L_c - (1 - mix) L_a - mix L_b,

is 0 where the loss is affine along the segment, and -mix (1 - mix)/2 times its curvature where it is quadratic. Penalizing r
keeps a network locally linear, at the price of a batch of three: no derivative is differentiated (ELLE).
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor

from torchlin import _library
from torchlin.ops._checks import FLOAT_DTYPES, can_look_at, check_float_tensor, in_forward_mode, needs_grad
from torchlin.ops._vmap import one_by_one

Penalty = Literal["square", "huber", "abs"]
Reduction = Literal["mean", "sum", "none"]
PENALTIES: tuple[Penalty, ...] = ("square", "huber", "abs")
REDUCTIONS: tuple[Reduction, ...] = ("none", "mean", "sum")

_raw: Any = torch.ops.torchlin
_CPU_KERNEL = _library.status()["cpu"].loaded
_fwd_grad: Any = _raw._linearity_fwd_grad.default if _CPU_KERNEL else None
_scale: Any = _raw._linearity_scale_.default if _CPU_KERNEL else None
_INTEGERS = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
_DIRECT = frozenset((torch.float32, torch.float64))  # what kernels take
_warned_of_half = False


class Target(NamedTuple):
    """What the three points of every sample are to be classified as, with its options: valid and in the logits' dtype."""

    labels: Tensor | None  # (B,) int64
    others: Tensor | None  # (B,) int64: the second labels of pairs
    lam: Tensor | None  # () or (B,): the share of the first labels
    dense: Tensor | None  # (B, K) probabilities, in place of labels
    weight: Tensor | None  # (K,)
    smoothing: float
    ignore_index: int


def _valid(t: Target) -> Tensor | None:
    """(B,) bool: the samples that count; None if all of them do."""
    if t.labels is None:
        return None
    valid = t.labels != t.ignore_index
    return valid if t.others is None else valid & (t.others != t.ignore_index)


def _distribution(t: Target, like: Tensor) -> Tensor:
    """The weighted target distribution (B, K) of logits like this."""
    if t.dense is not None:
        p = t.dense
    else:
        assert t.labels is not None
        p = _one_hot(t.labels, like)
        if t.others is not None:
            assert t.lam is not None
            lam = t.lam.unsqueeze(-1)
            p = lam * p + (1 - lam) * _one_hot(t.others, like)
    if t.smoothing:
        p = (1 - t.smoothing) * p + t.smoothing / like.shape[-1]
    return p if t.weight is None else torch.where(p == 0, 0, p * t.weight)


def _one_hot(labels: Tensor, like: Tensor) -> Tensor:
    classes = torch.arange(like.shape[-1], device=like.device)
    return (labels.unsqueeze(-1) == classes).to(like.dtype)


# ---- any loss


def local_linearity(
    loss_a: Tensor,
    loss_b: Tensor,
    loss_c: Tensor,
    mix: float | Tensor,
    *,
    penalty: Penalty = "square",
    beta: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""How far any loss is from affine between two points, from its values there and at a point between them.

    .. math:: r_i = L_{c,i} - (1 - m_i) L_{a,i} - m_i L_{b,i}

    The penalty of r is r² ("square"), torch's smooth L1 loss with ``beta`` ("huber") or \|r\| ("abs", with derivative 0 at 0).

    Args:
        loss_a, loss_b, loss_c: (B, ...) per-sample losses, not averaged, at x_a, x_b and (1 - mix) x_a + mix x_b; float32 or
            float64 (16-bit ones are computed in float32, but what they were rounded to is most of the result). Any value will
            do, of each logit for instance.
        mix: m in [0, 1], a number, or a tensor of one element, (B,) or (B, 1, ..., 1).
        penalty: "square", "huber" or "abs".
        beta: where "huber" goes from quadratic to linear: r²/(2 beta) up to there, \|r\| - beta/2 beyond.
        reduction: "mean", "sum" or "none".

    Returns:
        A 0-dimensional tensor, or for "none" one of the losses' shape. Differentiable in losses and mix.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: losses of several shapes, or a mix outside of [0, 1] (on the CPU) or of another shape.

    Source: Abad Rocamora, Liu, Chrysos, Olmos and Cevher, "Efficient local linearity regularization to overcome catastrophic
    overfitting", ICLR 2024, arXiv:2401.11618.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
        >>> local_linearity(a, b, torch.tensor([2.0, 3.0]), 0.5)  # the first is affine, the second is off by 1
        tensor(0.5000)
    """
    return local_linearity_reference(
        loss_a, loss_b, loss_c, mix, penalty=penalty, beta=beta, reduction=reduction
    )


def local_linearity_reference(
    loss_a: Tensor,
    loss_b: Tensor,
    loss_c: Tensor,
    mix: float | Tensor,
    *,
    penalty: Penalty = "square",
    beta: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """:func:`local_linearity` in plain torch."""
    for name, loss in (("loss_a", loss_a), ("loss_b", loss_b), ("loss_c", loss_c)):
        check_float_tensor(name, loss)
        if loss.shape != loss_a.shape or loss.device != loss_a.device:
            raise ValueError(
                f"{name} must have the shape and device of loss_a, {tuple(loss_a.shape)} on {loss_a.device}, "
                f"got {tuple(loss.shape)} on {loss.device}"
            )
    _check_options(penalty, beta, reduction)
    dtype = torch.promote_types(torch.promote_types(loss_a.dtype, loss_b.dtype), loss_c.dtype)
    dtype = dtype if dtype is torch.float64 else torch.float32
    m = _check_mix(mix, loss_a, dtype, loss_a.shape[0] if loss_a.dim() else 1)
    if can_look_at(m):
        _check_range(m)
    if m.dim():
        m = m.view(-1, *[1] * (loss_a.dim() - 1))
    r = _residual(loss_a.to(dtype), loss_b.to(dtype), loss_c.to(dtype), m)
    return _reduce(_penalize(r, penalty, beta), None, reduction)


def _residual(a: Tensor, b: Tensor, c: Tensor, mix: Tensor) -> Tensor:
    return (c - a) - mix * (
        b - a
    )  # differences of almost equal numbers are exact; products first would not be


def _penalize(r: Tensor, penalty: Penalty, beta: float) -> Tensor:
    if penalty == "square":
        return r * r
    size = r.abs()
    return size if penalty == "abs" else torch.where(size < beta, r * r * (0.5 / beta), size - 0.5 * beta)


def _reduce(h: Tensor, valid: Tensor | None, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return h
    if reduction == "sum":
        return h.sum()
    return h.mean() if valid is None else h.sum() / valid.sum()


# ---- cross-entropy


@overload
def cross_entropy_linearity(
    logits: Tensor | Sequence[Tensor],
    target: Tensor | tuple[Tensor, Tensor, float | Tensor],
    mix: float | Tensor,
    *,
    penalty: Penalty = ...,
    beta: float = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    return_losses: Literal[False] = ...,
) -> Tensor: ...


@overload
def cross_entropy_linearity(
    logits: Tensor | Sequence[Tensor],
    target: Tensor | tuple[Tensor, Tensor, float | Tensor],
    mix: float | Tensor,
    *,
    penalty: Penalty = ...,
    beta: float = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    return_losses: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def cross_entropy_linearity(
    logits: Tensor | Sequence[Tensor],
    target: Tensor | tuple[Tensor, Tensor, float | Tensor],
    mix: float | Tensor,
    *,
    penalty: Penalty = ...,
    beta: float = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    return_losses: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def cross_entropy_linearity(
    logits: Tensor | Sequence[Tensor],
    target: Tensor | tuple[Tensor, Tensor, float | Tensor],
    mix: float | Tensor,
    *,
    penalty: Penalty = "square",
    beta: float = 1.0,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    return_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""How far the cross-entropy is from affine between two points: the ELLE regularizer, fused.

    .. math:: L_t = -\sum_k w_k T_k \log \mathrm{softmax}(z_t)_k, \qquad r = L_c - (1 - m) L_a - m L_b

    Args:
        logits: (3B, K) float32 or float64: B rows at x_a, then B at x_b, then B at (1 - mix) x_a + mix x_b; or a sequence of
            the three, (B, K) each. 16-bit logits are taken as float32, with a warning: near a linear point the losses agree to
            some digits, and the rounding of the logits is then larger than r (56 to 264 times the value, measured). Let the
            layer that makes them compute in float32.
        target: of the three points alike: class numbers (B,); probabilities (B, K), which need not sum to 1; or (y1, y2, lam)
            for lam of y1 and 1 - lam of y2, class numbers (B,) both and lam a number, 0-dimensional or (B,): mixup without a
            (B, K) matrix.
        mix: m in [0, 1], a number, or a tensor of one element, (B,) or (B, 1, ..., 1).
        penalty, beta: as of :func:`local_linearity`.
        reduction: "mean" over the samples that are not ignored, "sum" or "none".
        label_smoothing: s in [0, 1]: T is mixed with s/K of every class.
        weight: (K,) weights w of the classes in the losses. The mean over samples is not weighted.
        ignore_index: samples with this class number (either, of a pair) have losses, residual and gradient 0.
        return_losses: return the losses too.

    Returns:
        A 0-dimensional tensor, or (B,) for "none", of the logits' dtype (float32 for 16-bit ones); with ``return_losses``
        (value, losses (3, B)). Differentiable in logits and mix, through value and losses, any number of times; in soft
        targets, lam and weight also.

        A class of weight or probability 0 counts as nothing, even at a logit of -∞ (a masked class); any other there makes
        the loss +∞. A row of nothing but -∞, and +∞ or NaN logits, make their own sample NaN and no other. The mean of no
        sample is NaN.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape does not fit, an option is none of those, or mix is outside of [0, 1] (on the CPU).
        IndexError: a class number is outside of [0, K) and not ``ignore_index`` (on the CPU; a device stops with its
            assertion, as torch does).

    Source: Abad Rocamora, Liu, Chrysos, Olmos and Cevher, "Efficient local linearity regularization to overcome catastrophic
    overfitting", ICLR 2024, arXiv:2401.11618.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])  # of one sample at x_a, x_b, and halfway
        >>> cross_entropy_linearity(logits, torch.tensor([0]), 0.5)
        tensor(0.1882)
    """
    # Checking the arguments of a small batch costs as much as the kernel. The plainest call goes straight to the op; what the
    # op refuses takes the long way, which says why.
    if (
        logits.__class__ is Tensor
        and target.__class__ is Tensor
        and mix.__class__ is Tensor
        and penalty == "square"
        and beta == 1.0
        and reduction == "mean"
        and not label_smoothing
        and weight is None
        and ignore_index == -100
        and not return_losses
        and logits.requires_grad
        and torch.is_grad_enabled()
        and logits.is_cpu
        and logits.dtype in _DIRECT
        and not target.requires_grad
        and not _traced()
        and not in_forward_mode()
    ):
        with contextlib.suppress(RuntimeError, AttributeError):
            return _apply(_Fused, mix, (logits, target, mix), logits)
    z, t, m = _check(logits, target, mix, penalty, beta, reduction, label_smoothing, weight, ignore_index)
    if in_forward_mode() or not _library.has_kernel(z[0].device.type) or needs_grad(t.dense, t.lam, t.weight):
        if can_look_at(z[0]):
            _check_values(t, m, z[0].shape[1])
        value, losses = _reference(z, t, m, penalty, beta, reduction)
        return (value, losses) if return_losses else value
    arguments = _raw_arguments(z, t, m, penalty, beta, reduction)
    try:
        if not needs_grad(*z, m):
            value, losses = _raw._linearity_fwd(*arguments)
        elif return_losses or _traced():
            value, losses = _Linearity.apply(*arguments)
            if not needs_grad(*z):  # but mix, of which losses know nothing
                losses = losses.detach()
        else:
            return _apply(_Fused, m, arguments, *z)
    except RuntimeError:  # kernels look at every value anyway, but only Python can say what was wrong
        if can_look_at(z[0]):
            _check_values(t, m, z[0].shape[1])
        raise
    return (value, losses) if return_losses else value


def cross_entropy_linearity_reference(
    logits: Tensor | Sequence[Tensor],
    target: Tensor | tuple[Tensor, Tensor, float | Tensor],
    mix: float | Tensor,
    *,
    penalty: Penalty = "square",
    beta: float = 1.0,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    return_losses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`cross_entropy_linearity` in plain torch: oracle, baseline, fallback, second derivative."""
    z, t, m = _check(logits, target, mix, penalty, beta, reduction, label_smoothing, weight, ignore_index)
    if can_look_at(z[0]):
        _check_values(t, m, z[0].shape[1])
    value, losses = _reference(z, t, m, penalty, beta, reduction)
    return (value, losses) if return_losses else value


def _reference(
    z: Sequence[Tensor], t: Target, mix: Tensor, penalty: Penalty, beta: float, reduction: Reduction
) -> tuple[Tensor, Tensor]:
    rows = torch.stack(_blocks(z))  # (3, B, K)
    valid = _valid(t)
    if valid is not None:
        rows = rows.masked_fill(~valid.unsqueeze(-1), 0)
    top = rows.detach().amax(-1, keepdim=True)
    lse = (rows - top).exp().sum(-1).log() + top.squeeze(-1)
    p = _distribution(t, rows[0])  # (B, K)
    losses = torch.where(p == 0, 0, p * (lse.unsqueeze(-1) - rows)).sum(-1)  # (3, B)
    a, b, c = losses
    r = _residual(a, b, c, mix)
    if valid is not None:
        losses, r = torch.where(valid, losses, 0), torch.where(valid, r, 0)
    return _reduce(_penalize(r, penalty, beta), valid, reduction), losses


def _gradients(
    grad_value: Tensor,
    grad_losses: Tensor | None,
    z: Sequence[Tensor],
    t: Target,
    mix: Tensor,
    penalty: Penalty,
    beta: float,
    reduction: Reduction,
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`_reference` to logits and mix in closed form, to be differentiated again."""
    rows, p, valid = torch.stack(_blocks(z)), _distribution(t, z[0]), _valid(t)
    if valid is not None:
        rows = rows.masked_fill(~valid.unsqueeze(-1), 0)
    lse = rows.logsumexp(-1)
    a, b, c = torch.where(p == 0, 0, p * (lse.unsqueeze(-1) - rows)).sum(-1)
    r = _residual(a, b, c, mix)
    slope = 2 * r if penalty == "square" else r.sign()
    if penalty == "huber":
        slope = torch.where(r.abs() < beta, r / beta, slope)
    rho = grad_value * slope
    if reduction == "mean":
        rho = rho / (r.shape[0] if valid is None else valid.sum())
    q = torch.stack(((mix - 1) * rho, -mix * rho, rho))  # (3, B)
    if grad_losses is not None:
        q = q + grad_losses
    if valid is not None:
        q, rho = torch.where(valid, q, 0), torch.where(valid, rho, 0)
    d = q.unsqueeze(-1) * (p.sum(-1, keepdim=True) * rows.softmax(-1) - p)  # (3, B, K)
    return d.flatten(0, 1), rho * (a - b)


def _blocks(z: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The logits at the three points, (B, K) each."""
    return z[0].unflatten(0, (3, -1 if z[0].shape[0] else 0)).unbind() if len(z) == 1 else tuple(z)


# ---- kernels and autograd


def _raw_arguments(
    z: tuple[Tensor, ...], t: Target, mix: Tensor, penalty: Penalty, beta: float, reduction: Reduction
) -> tuple[Any, ...]:
    """(a, target, mix, b, c, others, lam, weight, smoothing, ignore_index, penalty, beta, reduction), as raw ops take them."""
    b, c = z[1:] if len(z) == 3 else (None, None)
    target = t.labels if t.dense is None else t.dense
    options = (
        t.smoothing,
        t.ignore_index,
        PENALTIES.index(penalty),
        float(beta),
        REDUCTIONS.index(reduction),
    )
    return z[0], target, mix, b, c, t.others, t.lam, t.weight, *options


_TENSORS = 8  # of these arguments, the options behind them
_DEFAULTS = (None, None, None, None, None, 0.0, -100, 0, 1.0, 1)  # of those behind mix


def _has_kernel(z: Tensor) -> bool:
    return _library.has_kernel(z.device.type) and not (z.is_cuda and z.dtype is torch.float64)


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Function.apply without what it does for torch.func: 3 of 10 microseconds."""
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


class _Fused(torch.autograd.Function):
    """The loss with its gradient made on the way; backward only multiplies it by the cotangent, in place.

    The gradient is given away by that. Whoever asks for it again (retain_graph) has it computed anew.
    """

    @staticmethod
    def forward(ctx, mix, arguments, *z):
        value, ctx.dlogits, ctx.dmix = _fwd_grad(*arguments)
        arguments += _DEFAULTS[len(arguments) - 3 :]
        ctx.save_for_backward(*arguments[:_TENSORS])
        ctx.options, ctx.mixes, ctx.split = arguments[_TENSORS:], mix.dim(), len(z) == 3
        return value

    @staticmethod
    def backward(ctx, grad):
        if (
            torch.is_grad_enabled()
            or is_functorch_wrapped_tensor(grad)
            or is_legacy_batchedtensor(grad)  # of is_grads_batched
        ):
            dlogits, dmix = _gradient(grad, None, ctx.saved_tensors, ctx.options)
        else:
            dlogits, dmix = ctx.dlogits, ctx.dmix
            if dlogits is None:
                _, dlogits, dmix = _fwd_grad(*ctx.saved_tensors, *ctx.options)
            ctx.dlogits = ctx.dmix = None
            _scale(dlogits, grad)
            if ctx.needs_input_grad[0]:
                dmix = dmix * grad
        return dmix if ctx.mixes else dmix.sum(), None, *_as_inputs(dlogits, ctx.split)


class _Linearity(torch.autograd.Function):
    """The loss with a backward that computes everything anew, from any two cotangents: in traces and under transforms too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, target, mix, b, c, others, lam, weight, smoothing, ignore_index, penalty, beta, reduction):
        return _raw._linearity_fwd(
            a, target, mix, b, c, others, lam, weight, smoothing, ignore_index, penalty, beta, reduction
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:_TENSORS])
        ctx.options = inputs[_TENSORS:]

    @staticmethod
    def backward(ctx, grad_value, grad_losses):
        tensors = ctx.saved_tensors
        dlogits, dmix = _gradient(grad_value, grad_losses, tensors, ctx.options)
        a, b, c = _as_inputs(dlogits, True) if tensors[3] is not None else (dlogits, None, None)
        dmix = dmix if tensors[2].dim() else dmix.sum()
        return a, None, dmix, b, c, None, None, None, None, None, None, None, None


def _gradient(
    grad_value: Tensor, grad_losses: Tensor | None, tensors: Sequence[Any], options: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    """The gradients (3B, K) of logits and (B,) of mix from those of value and losses."""
    a, target, mix, b, c, others, lam, weight = tensors
    smoothing, ignore_index, penalty, beta, reduction = options
    if not needs_grad(grad_value, grad_losses, a, b, c, mix):
        return _raw._linearity_bwd(grad_value, grad_losses, *tensors, *options)
    labels, dense = (None, target) if target.is_floating_point() else (target, None)
    t = Target(labels, others, lam, dense, weight, smoothing, ignore_index)
    z = (a,) if b is None else (a, b, c)
    return _gradients(  # to be differentiated again
        grad_value, grad_losses, z, t, mix, PENALTIES[penalty], beta, REDUCTIONS[reduction]
    )


def _as_inputs(dlogits: Tensor, split: bool) -> tuple[Tensor, ...]:
    """The gradient (3B, K) as what the logits came in: one tensor, or three."""
    return dlogits.chunk(3) if split else (dlogits,)


# ---- checks


def _check(
    logits: Any,
    target: Any,
    mix: Any,
    penalty: Any,
    beta: Any,
    reduction: Any,
    label_smoothing: Any,
    weight: Any,
    ignore_index: Any,
) -> tuple[tuple[Tensor, ...], Target, Tensor]:
    """Logits (one tensor or three), target and mix, all of the dtype that is computed in."""
    _check_options(penalty, beta, reduction)
    if not isinstance(label_smoothing, (int, float)) or isinstance(label_smoothing, bool):
        raise TypeError(f"label_smoothing must be a float, got {type(label_smoothing).__name__}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    z = _check_logits(logits)
    first = z[0]
    k, size = first.shape[1], first.shape[0] if len(z) == 3 else first.shape[0] // 3
    labels = others = lam = dense = None
    if isinstance(target, Tensor):
        if target.is_floating_point():
            dense = _check_dense(target, first, size)
        else:
            labels = _check_labels("target", target, first, size)
    elif isinstance(target, (tuple, list)) and len(target) == 3:
        labels = _check_labels("target[0]", target[0], first, size)
        others = _check_labels("target[1]", target[1], first, size)
        lam = _check_shares("target[2]", target[2], first, first.dtype, size)
        if lam.dim() and lam.shape != (size,):
            lam = lam.reshape(size)
    else:
        raise TypeError(
            "target must be a tensor of class numbers (B,) or probabilities (B, K), or a tuple (y1, y2, lam), "
            f"got {type(target).__name__}"
        )
    if weight is not None:
        check_float_tensor("weight", weight)
        if weight.shape != (k,) or weight.device != first.device:
            raise ValueError(
                f"weight must have shape ({k},), one a class, on {first.device}, "
                f"got {tuple(weight.shape)} on {weight.device}"
            )
        weight = weight.to(first.dtype)
    t = Target(labels, others, lam, dense, weight, float(label_smoothing), ignore_index)
    return z, t, _check_mix(mix, first, first.dtype, size)


def _check_options(penalty: Any, beta: Any, reduction: Any) -> None:
    if penalty not in PENALTIES:
        raise ValueError(f"penalty must be one of {', '.join(map(repr, PENALTIES))}, got {penalty!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if not isinstance(beta, (int, float)) or isinstance(beta, bool):
        raise TypeError(f"beta must be a float, got {type(beta).__name__}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")


def _check_logits(logits: Any) -> tuple[Tensor, ...]:
    if isinstance(logits, Tensor):
        check_float_tensor("logits", logits)
        if logits.dim() != 2 or logits.shape[0] % 3 or logits.shape[1] < 1:
            raise ValueError(
                "logits must be (3B, K) with K >= 1, the rows of x_a, then x_b, then x_c; or a sequence of three (B, K); "
                f"got shape {tuple(logits.shape)}"
            )
        z: tuple[Tensor, ...] = (logits,)
    elif isinstance(logits, (tuple, list)):
        if len(logits) != 3:
            raise ValueError(f"logits must be a tensor (3B, K) or three (B, K), got {len(logits)} of them")
        for i, block in enumerate(logits):
            check_float_tensor(f"logits[{i}]", block)
            if block.dim() != 2 or block.shape[1] < 1:
                raise ValueError(f"logits[{i}] must be (B, K) with K >= 1, got shape {tuple(block.shape)}")
            if block.shape != logits[0].shape or block.dtype is not logits[0].dtype:
                raise ValueError(
                    f"logits[{i}] must be like logits[0], {logits[0].dtype} {tuple(logits[0].shape)}, "
                    f"got {block.dtype} {tuple(block.shape)}"
                )
            if block.device != logits[0].device:
                raise ValueError(
                    f"logits[{i}] must be on {logits[0].device} as logits[0], got {block.device}"
                )
        z = tuple(logits)
    else:
        raise TypeError(f"logits must be a tensor or a sequence of three, got {type(logits).__name__}")
    if z[0].element_size() == 2:
        _warn_of_half(z[0].dtype)
        z = tuple(block.float() for block in z)
    return z


def _warn_of_half(dtype: torch.dtype) -> None:
    global _warned_of_half
    if _warned_of_half or torch.compiler.is_compiling():
        return
    _warned_of_half = True
    warnings.warn(
        f"cross_entropy_linearity got {dtype} logits: they are computed with in float32, but their own rounding is far larger "
        "than the nonlinearity of a smooth loss over a small ball. Compute the layer that makes the logits in float32 "
        "(under autocast: with autocast disabled)",
        RuntimeWarning,
        stacklevel=4,
    )


def _check_labels(name: str, labels: Any, z: Tensor, size: int) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"{name} must hold class numbers (an integer dtype), got {labels.dtype}")
    if labels.dim() != 1 or labels.shape[0] != size:
        raise ValueError(
            f"{name} must have shape ({size},), one class for the three points of a sample, got {tuple(labels.shape)}"
        )
    if labels.device != z.device:
        raise ValueError(f"{name} must be on the logits' device {z.device}, got {labels.device}")
    return labels if labels.dtype is torch.int64 else labels.to(torch.int64)


def _check_dense(target: Tensor, z: Tensor, size: int) -> Tensor:
    check_float_tensor("target", target)
    if target.dim() != 2 or target.shape[0] != size or target.shape[1] != z.shape[1]:
        raise ValueError(
            f"target of probabilities must have shape ({size}, {z.shape[1]}), a row for the three points of a sample, "
            f"got {tuple(target.shape)}"
        )
    if target.device != z.device:
        raise ValueError(f"target must be on the logits' device {z.device}, got {target.device}")
    return target.to(z.dtype)


def _check_mix(mix: Any, like: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    m = _check_shares("mix", mix, like, dtype, size)
    if not isinstance(mix, Tensor) and not 0 <= mix <= 1:
        raise ValueError(f"mix must be in [0, 1], got {mix}")
    return m


def _check_shares(name: str, mix: Any, like: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """A share for all samples, 0-dimensional, or for each, (B,)."""
    if not isinstance(mix, Tensor):
        if not isinstance(mix, (int, float)) or isinstance(mix, bool):
            raise TypeError(f"{name} must be a float or a torch.Tensor, got {type(mix).__name__}")
        return torch.full((), mix, dtype=dtype, device=like.device)
    if mix.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {mix.dtype}")
    if mix.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the rest, got {mix.device}")
    if mix.dtype is not dtype:
        mix = mix.to(dtype)
    if mix.dim() == 1 and mix.shape[0] == size:
        return mix
    if all(n == 1 for n in mix.shape):
        return mix.reshape(())
    if mix.shape[0] == size and all(n == 1 for n in mix.shape[1:]):
        return mix.reshape(size)
    raise ValueError(
        f"{name} must have one element or shape ({size},) or ({size}, 1, ..., 1), one a sample, got {tuple(mix.shape)}"
    )


def _check_values(t: Target, mix: Tensor, classes: int) -> None:
    """What a kernel cannot say: values of targets and of mix that are out of range. Not looked at on other devices."""
    if not mix.is_cpu:
        return
    for name, labels in (
        ("target" if t.others is None else "target[0]", t.labels),
        ("target[1]", t.others),
    ):
        if labels is not None:
            wrong = (labels != t.ignore_index) & ((labels < 0) | (labels >= classes))
            if bool(wrong.any()):
                raise IndexError(
                    f"{name} must hold class numbers in [0, {classes - 1}] or ignore_index = {t.ignore_index}, "
                    f"got {int(labels[wrong][0])}"
                )
    _check_range(mix)


def _check_range(mix: Tensor) -> None:
    if mix.is_cpu and bool((wrong := (mix < 0) | (mix > 1)).any()):
        raise ValueError(f"mix must be in [0, 1], got {float(mix[wrong][0])}")


# ---- what torch has to know of the raw ops


def _fake_fwd(
    a,
    target,
    mix,
    b=None,
    c=None,
    others=None,
    lam=None,
    weight=None,
    smoothing=0.0,
    ignore_index=-100,
    penalty=0,
    beta=1.0,
    reduction=1,
):
    return a.new_empty(() if reduction else target.shape[0]), a.new_empty((3, target.shape[0]))


def _fake_bwd(grad_value, grad_losses, a, target, *rest):
    return a.new_empty((3 * target.shape[0], a.shape[1])), a.new_empty(target.shape[0])


def _fake_fwd_grad(a, target, *rest, **options):
    return _fake_fwd(a, target, *rest, **options)[0], *_fake_bwd(None, None, a, target)


def _register() -> None:
    for name, fake in (("fwd", _fake_fwd), ("fwd_grad", _fake_fwd_grad), ("bwd", _fake_bwd)):
        torch.library.register_fake(f"torchlin::_linearity_{name}", fake)
        torch.library.register_vmap(
            f"torchlin::_linearity_{name}", one_by_one(getattr(_raw, f"_linearity_{name}").default)
        )
    torch.library.register_fake("torchlin::_linearity_scale_", lambda rows, by: None)


if _CPU_KERNEL:
    _register()
