"""How linear a loss is inside the ball, and how far its gradient turns: what goes wrong where FGSM's overfitting begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlin.robust._ball import Ball, Clip, Eps, check_eps, check_norm, triplet
from torchlin.robust._craft import check_labels, crafting, cross_entropy, gradient

ASCENT_STEPS, ASCENT_RATE, ASCENT_EDGE = (
    10,
    0.075,
    0.01,
)  # of the worst mixing weight, as ELLE's authors look for it


def linearity_error(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor | None,
    eps: Eps,
    *,
    of: str = "loss",
    mix: float | str = "random",
    norm: str = "linf",
    clip: Clip = None,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The squared error of linear interpolation between two random points of the ball, of the loss or of the logits.

    Measured in eval mode, without gradients to parameters; the model is as it was afterwards.

    Args:
        model: returns logits (B, K).
        x, y: samples (B, ...) and classes (B,) or probabilities (B, K); with ``of="logits"`` y is not needed.
        of: "loss", what ELLE makes small, or "logits": the mean over classes.
        mix: the weight of the second point: "random", a number in [0, 1] (0.5: the middle), or "worst", the largest
            error that a sample has in ten steps of ascent from a random one.
        reduction: "mean", or "none" for one number a sample.
        eps, norm, clip, generator: as for :class:`torchlin.robust.ELLE`.

    Example:
        >>> import torch
        >>> from torchlin.robust import linearity_error
        >>> linear = torch.nn.Linear(4, 3, dtype=torch.float64)
        >>> error = linearity_error(linear, torch.randn(8, 4, dtype=torch.float64), None, eps=1.0, of="logits")
        >>> bool(error < 1e-30)
        True
    """
    if of not in ("loss", "logits"):
        raise ValueError(f'of must be "loss" or "logits", got {of!r}')
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    if isinstance(mix, str) and mix not in ("random", "worst"):
        raise ValueError(f'mix must be a number in [0, 1], "random" or "worst", got {mix!r}')
    if not isinstance(mix, str) and not 0 <= mix <= 1:
        raise ValueError(f"mix must be in [0, 1], got {mix}")
    if of == "loss":
        check_labels(x, y)
    points, weights = triplet(x.detach(), check_eps(eps), check_norm(norm), clip, generator)
    a, b, _ = points.chunk(3)
    if not isinstance(mix, str):
        weights = torch.full_like(weights, mix)

    with crafting(model) as net, torch.no_grad():

        def values(z: Tensor) -> Tensor:  # (B,), or (B, K)
            logits = net(z).double()  # of a small difference of large numbers
            return cross_entropy(logits, y) if of == "loss" else logits

        ends = values(a), values(b)

        def error(weights: Tensor) -> Tensor:  # (B,)
            middle = values(torch.lerp(a, b, weights.to(a).view(-1, *[1] * (a.dim() - 1))))
            w = weights.double().view(-1, *[1] * (middle.dim() - 1))
            return (middle - torch.lerp(*ends, w)).square().reshape(len(a), -1).mean(1)

        errors = error(weights)
        for _ in range(ASCENT_STEPS if mix == "worst" else 0):
            with torch.enable_grad():
                weights = weights.detach().requires_grad_()
                (slope,) = torch.autograd.grad(error(weights).sum(), weights)
            weights = weights.detach() + ASCENT_RATE * slope.sign()
            weights = weights.clamp(ASCENT_EDGE, 1 - ASCENT_EDGE)
            errors = torch.maximum(errors, error(weights))
    return errors.mean() if reduction == "mean" else errors


def gradient_alignment(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Any,
    eps: Eps,
    *,
    norm: str = "linf",
    clip: Clip = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The mean cosine of the loss's gradients at x and at a random point of the ball: 1 where the loss is linear.

    Measured in eval mode; arguments as for :func:`linearity_error`.

    Source: M. Andriushchenko and N. Flammarion, 2020 (arXiv:2007.02617), equation 3.
    """
    ball, y = Ball.around(x, eps, norm, clip), check_labels(x, y)
    with crafting(model) as net:
        slopes = [gradient(net, z, y, cross_entropy) for z in (ball.x, ball.random(generator))]
    one, other = (slope.double().flatten(1) for slope in slopes)
    return F.cosine_similarity(one, other, eps=1e-30).mean()
