"""One run of Auto-PGD (Croce and Hein, arXiv:2003.01690, algorithm 1), all samples at once, each with a step of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchlin.robust._ball import Ball, direction, per_sample
from torchlin.robust._craft import Loss, Net

MOMENTUM = 0.75  # the weight of the new step; the rest repeats the last one


def checkpoints(steps: int) -> list[int]:
    """The steps after which a sample's step size may be halved: w_j = ceil(p_j · steps), p of section 3.1."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return [math.ceil(round(share * steps, 9)) for share in shares if share <= 1]


def apgd_once(
    net: Net,
    ball: Ball,
    y: Any,
    objective: Loss,
    steps: int,
    rho: float,
    targeted: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """The last point of each sample that the model gets wrong, else the one of the largest objective."""
    x = ball.x
    z = before = ball.random(generator)
    value, slope, done = _look(net, z, y, objective, targeted)
    wrong, is_wrong = z, done
    best, best_value, best_slope = z, value, slope
    step = torch.full((len(x),), 2.0, device=x.device, dtype=x.dtype)  # in eps
    rises = torch.zeros_like(step)  # since the last checkpoint
    value_then, halved_then = best_value, torch.zeros_like(is_wrong)
    checks, last_check = set(checkpoints(steps)[1:]), 0

    for k in range(1, steps + 1):
        target = ball.project(z + per_sample(step, x) * ball.eps * direction(slope, ball.norm))
        weight = MOMENTUM if k > 1 else 1.0
        z, before = ball.project(z + weight * (target - z) + (1 - weight) * (z - before)), z
        last_value = value
        value, slope, done = _look(net, z, y, objective, targeted)
        wrong, is_wrong = _choose(done, z, wrong), is_wrong | done
        rises += value > last_value
        up = value > best_value
        best, best_slope = _choose(up, z, best), _choose(up, slope, best_slope)
        best_value = torch.where(up, value, best_value)
        if k in checks:
            too_few = rises < rho * (k - last_check)
            stuck = ~halved_then & (best_value <= value_then)
            halve = too_few | stuck
            step = torch.where(halve, step / 2, step)
            z, slope = _choose(halve, best, z), _choose(halve, best_slope, slope)
            value = torch.where(halve, best_value, value)
            halved_then, value_then, last_check = halve, best_value, k
            rises.zero_()
    return _choose(is_wrong, wrong, best)


def _look(net: Net, z: Tensor, y: Any, objective: Loss, targeted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample's objective, its gradient, and whether the model is where the attack wants it."""
    z = z.detach().clone().requires_grad_()
    logits = net(z)
    values = objective(logits, y)
    (slope,) = torch.autograd.grad(values.sum(), z)
    hit = logits.argmax(1) == (y.argmax(1) if y.is_floating_point() else y)
    return values.detach(), slope, hit if targeted else ~hit


def _choose(which: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(per_sample(which, a), a, b)
