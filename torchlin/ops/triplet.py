"""sample_triplet: three points of a small ball around each sample, for the local-linearity loss.

Noise is a function of (seed, index): the block cipher Philox 4x32-10 turns the logical index of an element into random words,
so that every number of threads, CPU level, memory layout and device gives the same points. The public function draws a seed
from a torch generator and passes it on as a tensor, which no device has to wait for.
"""

from __future__ import annotations

import math
from typing import Any, Literal

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
from torchlin.ops._vmap import one_by_one

_raw: Any = torch.ops.torchlin

Norm = Literal["linf", "l2"]
NORMS: tuple[Norm, ...] = ("linf", "l2")

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> list[Tensor]:
    """Philox 4x32-10: four random words for each counter of four words, all in int64 tensors.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 64 bits each: int64 wraps as they would
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return [c0, c1, c2, c3]


def _signed(word: Tensor, dtype: torch.dtype) -> Tensor:
    """A word as an odd number of -2^31 ... 2^31, rounded to dtype: as many below zero as above."""
    odd = word | 1
    return torch.where(odd > 1 << 31, odd - (1 << 32), odd).to(dtype)


def _positive(word: Tensor, dtype: torch.dtype) -> Tensor:
    """A word as an odd number of 0 ... 2^31, rounded to dtype."""
    return (word >> 1 | 1).to(dtype)


def _noise_words(x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """The two random words, for x_a and x_b, of every element of x."""
    size, element = x.shape[0], math.prod(x.shape[1:])
    index = torch.arange(element, device=x.device)
    pairs = torch.arange((size + 1) // 2, device=x.device).unsqueeze(
        1
    )  # one counter serves samples 2p and 2p + 1
    words = philox((index & _WORD, index >> 32, pairs, torch.zeros_like(pairs)), seed)
    a, b = (torch.stack(w, 1).flatten(0, 1)[:size].view(x.shape) for w in (words[::2], words[1::2]))
    return a, b


def _sample_words(x: Tensor, seed: Tensor) -> list[Tensor]:
    """The four random words of every sample: its mix, and the radii of x_a and x_b."""
    index = torch.arange(x.shape[0], device=x.device)
    zero = torch.zeros_like(index)
    return philox((index & _WORD, index >> 32, zero, zero + 1), seed)


def _mix(x: Tensor, seed: Tensor) -> Tensor:
    """Odd fractions k / 2^24, of which 1 - mix is exact: (B,)."""
    return ((_sample_words(x, seed)[0] >> 9) * 2 + 1).to(compute_dtype(x.dtype)) * 2.0**-24


def _noise(x: Tensor, eps: Tensor | float, seed: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x.dtype)
    a, b = _noise_words(x, seed)
    if norm == "linf":
        step = eps * 2.0**-31
        return _signed(a, dtype) * step, _signed(b, dtype) * step
    # Box-Muller: the two normal numbers of an element are those of x_a and x_b.
    radius = (-2 * (_positive(a, dtype) * 2.0**-31).log()).sqrt()
    angle = _signed(b, dtype) * (math.pi * 2.0**-31)
    _, word_a, word_b, _ = _sample_words(x, seed)
    rows = (-1, *[1] * (x.dim() - 1))
    points = []
    for normal, word in ((radius * angle.cos(), word_a), (radius * angle.sin(), word_b)):
        length = normal.double().square().unsqueeze(-1).flatten(1).sum(1)  # (B,)
        inside = (_positive(word, torch.float64) * 2.0**-31) ** (1 / max(math.prod(x.shape[1:]), 1))
        points.append(normal * (inside / length.sqrt()).to(dtype).view(rows) * eps)
    return points[0], points[1]


def triplet_from_seed_reference(
    x: Tensor,
    eps: float | Tensor,
    seed: Tensor,
    *,
    norm: Norm = "linf",
    clip: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`sample_triplet` in plain torch, of a seed: the same points to the last bit in ``norm="linf"``."""
    dtype = compute_dtype(x.dtype)
    eps = _as_broadcastable(eps, x).to(dtype) if isinstance(eps, Tensor) else eps
    mix = _mix(x, seed)
    noise = _noise(x.detach(), eps, seed, norm)
    points = [x.to(dtype) + n for n in noise]
    if clip is not None:
        points = [p.clamp(*clip) for p in points]
    a, b = (p.to(x.dtype) for p in points)
    alpha = mix.view(-1, *[1] * (x.dim() - 1))
    c = (1 - alpha) * a.to(dtype) + alpha * b.to(dtype)
    if clip is not None:  # rounding alone can bring c out
        c = c + (c.detach().clamp(*clip) - c.detach())
    return torch.cat((a, b, c.to(x.dtype))), mix


def sample_triplet_reference(
    x: Tensor,
    eps: float | Tensor,
    *,
    norm: Norm = "linf",
    clip: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`sample_triplet` in plain torch: it draws the same seed and makes the same points."""
    seed = _draw_seed(x.device, generator)
    return triplet_from_seed_reference(x, eps, seed, norm=norm, clip=clip)


def triplet_from_seed(
    x: Tensor,
    eps: float | Tensor,
    seed: Tensor,
    *,
    norm: Norm = "linf",
    clip: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`sample_triplet` of a seed, a 0-dimensional int64 tensor on x's device: the same seed, the same points."""
    if in_forward_mode() or not _library.has_kernel(x.device.type):
        return triplet_from_seed_reference(x, eps, seed, norm=norm, clip=clip)
    low, high = (None, None) if clip is None else clip
    number, eps_at = _eps_for_kernel(eps, x)
    if needs_grad(x):
        return _Triplet.apply(x, number, eps_at, seed, norm == "l2", low, high)
    return _raw._triplet_fwd(x, number, eps_at, seed, norm == "l2", low, high)


def _eps_for_kernel(eps: float | Tensor, x: Tensor) -> tuple[float, Tensor | None]:
    """eps as a number, or as a tensor of the compute type with x's number of dimensions."""
    if not isinstance(eps, Tensor):
        return float(eps), None
    eps = _as_broadcastable(eps, x)
    eps = eps.view(*[1] * (x.dim() - eps.dim()), *eps.shape)
    return 0.0, eps.to(x.device, compute_dtype(x.dtype)).contiguous().resolve_neg()


class _Triplet(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, eps, eps_at, seed, ball, low, high):
        return _raw._triplet_fwd(x, eps, eps_at, seed, ball, low, high)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.eps, eps_at, seed, ctx.ball, ctx.low, ctx.high = inputs
        ctx.mark_non_differentiable(output[1])
        if ctx.low is not None:
            ctx.save_for_backward(x, eps_at, seed)

    @staticmethod
    def backward(ctx, grad, _):
        if ctx.low is None:  # the three points move with x
            return grad.view(3, grad.shape[0] // 3, *grad.shape[1:]).sum(0), *[None] * 6
        x, eps_at, seed = ctx.saved_tensors
        where = (ctx.eps, eps_at, seed, ctx.ball, ctx.low, ctx.high)
        return _TripletBackward.apply(grad, x, *where), *[None] * 6


class _TripletBackward(torch.autograd.Function):
    """With clip: a linear map of the points' gradient, which masks by the noise that is made again from the seed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, x, eps, eps_at, seed, ball, low, high):
        return _raw._triplet_bwd(grad, x, eps, eps_at, seed, ball, low, high)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, ctx.eps, eps_at, seed, ctx.ball, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x, eps_at, seed)

    @staticmethod
    def backward(ctx, slope):
        x, eps_at, seed = ctx.saved_tensors
        eps = ctx.eps if eps_at is None else eps_at
        mix, a, b = _weights(x, eps, seed, "l2" if ctx.ball else "linf", ctx.low, ctx.high)
        rows = mix.view(-1, *[1] * (x.dim() - 1))
        slope = slope.to(mix.dtype)
        c = (1 - rows) * a * slope + rows * b * slope
        return torch.cat((a * slope, b * slope, c)).to(x.dtype), *[None] * 7


def _weights(
    x: Tensor, eps: float | Tensor, seed: Tensor, norm: Norm, low: float, high: float
) -> list[Tensor]:
    """mix, and what part of x_a and x_b moves with x: all of it or, where they are clamped, nothing."""
    dtype = compute_dtype(x.dtype)
    points = [x.to(dtype) + noise for noise in _noise(x, eps, seed, norm)]
    return [_mix(x, seed), *(((p >= low) & (p <= high)).to(dtype) for p in points)]


def sample_triplet(
    x: Tensor,
    eps: float | Tensor,
    *,
    norm: Norm = "linf",
    clip: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Two random points of the ball around each sample and a random point between them, as ELLE wants them.

    .. math:: x_a = x + \varepsilon u_a, \quad x_b = x + \varepsilon u_b, \quad x_c = (1 - \alpha) x_a + \alpha x_b

    Args:
        x: (B, ...) float32, float64, float16 or bfloat16 tensor of any strides.
        eps: the ball's radius, not negative: a number, a tensor (C,) with one for each index of dimension 1 (inputs that were
            normalised by channel), or a tensor that broadcasts to x. No gradient flows to it.
        norm: ``"linf"``: u is uniform in [-1, 1] for every element. ``"l2"``: u of a sample is uniform in the unit ball.
        clip: (lowest, highest) value of a point; x_a and x_b are clamped to it.
        generator: on x's device, or on the CPU: then every device draws the same points. Default: torch's for x's device.

    Returns:
        (x_abc, mix): the points as one batch (3B, ...), first all x_a, then x_b, then x_c; and α (B,), uniform in (0, 1), in
        float32 (float64 for float64 x).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: eps is negative, NaN or of a shape that does not fit, clip is no interval, norm is unknown, x is
            0-dimensional, or the generator is on another device.

    Source: Abad Rocamora et al., "Efficient local linearity regularization to overcome catastrophic overfitting", ICLR 2024,
    arXiv:2401.11618.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, 3)
        >>> x_abc, mix = sample_triplet(x, 0.5, generator=torch.Generator().manual_seed(0))
        >>> x_abc.shape, mix.shape, bool(x_abc.abs().max() <= 0.5)
        (torch.Size([6, 3]), torch.Size([2]), True)
    """
    clip = _check(x, eps, norm, clip, generator)
    return triplet_from_seed(x, eps, _draw_seed(x.device, generator), norm=norm, clip=clip)


def _draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    where = device if generator is None else generator.device
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (), generator=generator, device=where)
    return seed if where == device else seed.to(device, non_blocking=True)


def _as_broadcastable(eps: Tensor, x: Tensor) -> Tensor:
    """eps with as many dimensions as x has: one of its own is that of the channels."""
    if eps.dim() == 1 and x.dim() > 1:
        return eps.view(-1, *[1] * (x.dim() - 2))
    return eps


def _check(
    x: Tensor, eps: float | Tensor, norm: str, clip: Any, generator: Any
) -> tuple[float, float] | None:
    check_float_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x must be (B, ...), a batch of samples, got a 0-dimensional tensor")
    if norm not in NORMS:
        raise ValueError(f'norm must be "linf" or "l2", got {norm!r}')
    if isinstance(eps, Tensor):
        _check_eps_tensor(eps, x)
    elif not 0 <= check_scale("eps", eps) < math.inf:
        raise ValueError(f"eps must be a finite number, not negative, got {eps}")
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        if generator.device.type not in ("cpu", x.device.type):
            raise ValueError(f"generator must be on x's device {x.device} or the CPU, got {generator.device}")
    return None if clip is None else _check_clip(clip)


def _check_eps_tensor(eps: Tensor, x: Tensor) -> None:
    check_float_tensor("eps", eps)
    if eps.device != x.device and eps.dim() > 0:
        raise ValueError(f"eps must be on x's device {x.device}, got {eps.device}")
    if eps.requires_grad:
        raise ValueError("eps is a constant and cannot require grad: pass eps.detach()")
    channels = x.shape[1] if x.dim() > 1 else x.shape[0]
    if eps.dim() == 1 and eps.shape[0] not in (1, channels):
        raise ValueError(
            f"eps of one dimension must have an element for each of the {channels} indices of x's dimension "
            f"{min(1, x.dim() - 1)}, got {eps.shape[0]}"
        )
    shape = _as_broadcastable(eps, x).shape
    fits = len(shape) <= x.dim() and all(
        e in (1, s) for e, s in zip(reversed(shape), reversed(x.shape), strict=False)
    )
    if not fits:
        raise ValueError(f"eps must broadcast to x of shape {tuple(x.shape)}, got shape {tuple(eps.shape)}")
    if eps.is_cpu and can_look_at(eps) and not bool(((eps >= 0) & (eps < math.inf)).all()):
        raise ValueError("eps must hold finite numbers that are not negative")


def _check_clip(clip: Any) -> tuple[float, float]:
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise TypeError(f"clip must be a pair (lowest, highest) or None, got {clip!r}")
    low, high = (check_scale(f"clip[{i}]", bound) for i, bound in enumerate(clip))
    if not low <= high:
        raise ValueError(f"clip must be (lowest, highest) with lowest <= highest, got ({low}, {high})")
    return low, high


def _empty_batch(x: Tensor, samples: int) -> Tensor:
    """So many samples, each laid out as x's are."""
    shape = (samples, *x.shape[1:])
    if x.numel() == 0 or x.is_contiguous():
        return x.new_empty(shape)
    sample = torch.empty_like(x[0])
    return torch.empty_strided(shape, (sample.numel(), *sample.stride()), dtype=x.dtype, device=x.device)


def _fake_fwd(x, eps, eps_at, seed, ball, low, high):
    return _empty_batch(x, 3 * x.shape[0]), x.new_empty(x.shape[:1], dtype=compute_dtype(x.dtype))


def _fake_bwd(grad, x, eps, eps_at, seed, ball, low, high):
    return _empty_batch(x, x.shape[0])


if _library.status()["cpu"].loaded:
    torch.library.register_fake("torchlin::_triplet_fwd", _fake_fwd)
    torch.library.register_fake("torchlin::_triplet_bwd", _fake_bwd)
    torch.library.register_vmap("torchlin::_triplet_fwd", one_by_one(_raw._triplet_fwd))
    torch.library.register_vmap("torchlin::_triplet_bwd", one_by_one(_raw._triplet_bwd))
