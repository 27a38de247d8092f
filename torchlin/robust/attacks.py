"""Attacks: inputs near x that the model gets wrong. Their argument names are those of torchattacks.

An attack reads logits and takes gradients by the input only: no parameter's `.grad`, no buffer and no training mode is
different afterwards. It works under `no_grad` and `inference_mode`, and draws from `generator` alone where one is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchlin.robust._apgd import apgd_once
from torchlin.robust._ball import Ball, Clip, Eps, uniform
from torchlin.robust._craft import Loss, Net, check_labels, crafting, find_loss, gradient, margin, without
from torchlin.robust._square import square_once

Once = Callable[[Net, Ball, Tensor], Tensor]


def fgsm(
    model: Net,
    x: Tensor,
    y: Tensor,
    eps: Eps,
    alpha: Eps | None = None,
    *,
    norm: str = "linf",
    clip: Clip = None,
    loss: str | Loss = "ce",
    targeted: bool = False,
    model_training: bool = False,
) -> Tensor:
    r"""One step of length ``alpha`` along the gradient: x + α sign ∇L(x), or x + α ∇L(x) / ‖∇L(x)‖ in l2.

    Args:
        model: takes x and returns logits (B, K), not probabilities.
        x: samples (B, ...).
        y: classes (B,), or probabilities (B, K).
        eps: radius of the ball in x's units; a tensor (C,) has one a channel (see :func:`normalized_ball`).
        alpha: length of the step, ``eps`` by default.
        norm: "linf" or "l2".
        clip: (lowest, highest) value of an input, numbers or tensors; ``None``: any. Other libraries always clip to (0, 1).
        loss: what is made large: "ce"; "log_odds", which is log(exp(ce) - 1) and has the same steps, but not the zeros to
            which float32 rounds the gradient of "ce" where the model is sure; "margin" or "dlr" (the largest other logit
            less y's, the latter over a spread of the logits); or a function of (logits, y) that returns (B,).
        targeted: y are the classes to go to instead; the loss is made small.
        model_training: craft in the mode that the model is in, as authors of fast adversarial training do, and not in
            eval mode. BatchNorm then uses the batch's statistics; its running ones stay as they are in either mode.

    Returns:
        Samples like x, within eps of it and inside of clip.

    Source: I. Goodfellow et al., "Explaining and harnessing adversarial examples", 2015 (arXiv:1412.6572).

    Example:
        >>> import torch
        >>> from torchlin.robust import fgsm
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
        >>> fgsm(model, torch.zeros(1, 2), torch.tensor([0]), eps=0.5)
        tensor([[-0.5000,  0.5000]])
    """
    ball, y = Ball.around(x, eps, norm, clip, alpha, 1.0), check_labels(x, y)
    with crafting(model, model_training) as net:
        return ball.step(ball.x, gradient(net, ball.x, y, find_loss(loss, targeted)))


def n_fgsm(
    model: Net,
    x: Tensor,
    y: Tensor,
    eps: Eps,
    alpha: Eps | None = None,
    *,
    noise: float = 2.0,
    clip: Clip = None,
    loss: str | Loss = "ce",
    generator: torch.Generator | None = None,
    model_training: bool = False,
) -> Tensor:
    """A full step of FGSM from a point with noise of up to ``noise`` eps, not brought back into the ball: for training.

    x + η + α sign ∇L(x + η) with η uniform in noise · eps · [-1, 1]: up to noise · eps + alpha away from x.

    Args:
        noise: how far the noise goes, in eps; the authors take 2.
        generator: draws the noise; torch's own by default.
        model, x, y, eps, alpha, clip, loss, model_training: as for :func:`fgsm`. Noise and result are clipped.

    Source: P. de Jorge et al., "Make some noise: reliable and efficient single-step adversarial training", 2022
    (arXiv:2202.01181).
    """
    ball, y = Ball.around(x, eps, "linf", clip, alpha, 1.0), check_labels(x, y)
    with crafting(model, model_training) as net:
        start = ball.inside_clip(ball.x + noise * ball.eps * uniform(ball.x, generator))
        return ball.inside_clip(start + ball.alpha * gradient(net, start, y, find_loss(loss)).sign())


def pgd(
    model: Net,
    x: Tensor,
    y: Tensor,
    eps: Eps,
    alpha: Eps | None = None,
    steps: int = 10,
    random_start: bool = True,
    *,
    restarts: int = 1,
    norm: str = "linf",
    clip: Clip = None,
    loss: str | Loss = "ce",
    targeted: bool = False,
    generator: torch.Generator | None = None,
    model_training: bool = False,
) -> Tensor:
    """Steps of FGSM, each brought back into the ball: the attack that fast adversarial training is held against.

    Args:
        alpha: length of a step; eps / 4 by default.
        steps: how many.
        random_start: start uniformly in the ball, not at x.
        restarts: how often; of each sample a result that the model gets wrong is kept, else the one of the largest loss.
        generator: draws the starts; torch's own by default.
        model, x, y, eps, norm, clip, loss, targeted, model_training: as for :func:`fgsm`.

    Source: A. Madry et al., "Towards deep learning models resistant to adversarial attacks", 2018 (arXiv:1706.06083).
    """
    ball, y = Ball.around(x, eps, norm, clip, alpha), check_labels(x, y)
    _check_counts(steps=steps, restarts=restarts)
    objective = find_loss(loss, targeted)

    def once(net: Net, ball: Ball, y: Tensor) -> Tensor:
        z = ball.random(generator) if random_start else ball.x
        for _ in range(steps):
            z = ball.step(z, gradient(net, z, y, objective))
        return z

    return _worst(model, ball, y, [once] * restarts, objective, targeted, model_training)


def apgd(
    model: Net,
    x: Tensor,
    y: Tensor,
    eps: Eps,
    *,
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    loss: str | Loss = "ce",
    rho: float = 0.75,
    clip: Clip = None,
    targeted: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """PGD with momentum that halves a sample's step where it no longer helps: no step size to choose.

    Args:
        steps: gradients taken.
        loss: the authors use "ce" and "dlr"; or as for :func:`fgsm`.
        rho: the share of steps between two checkpoints that must have raised the loss.
        model, x, y, eps, norm, restarts, clip, targeted, generator: as for :func:`pgd`.

    Source: F. Croce and M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks", 2020 (arXiv:2003.01690), algorithm 1.
    """
    ball, y = Ball.around(x, eps, norm, clip), check_labels(x, y)
    _check_counts(steps=steps, restarts=restarts)
    objective = find_loss(loss, targeted)

    def once(net: Net, ball: Ball, y: Tensor) -> Tensor:
        return apgd_once(net, ball, y, objective, steps, rho, targeted, generator)

    return _worst(model, ball, y, [once] * restarts, objective, targeted)


def multi_targeted(
    model: Net,
    x: Tensor,
    y: Tensor,
    eps: Eps,
    alpha: Eps | None = None,
    steps: int = 20,
    *,
    targets: int | None = None,
    norm: str = "linf",
    clip: Clip = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """PGD toward each other class in turn, on the difference z_t - z_y of two logits, which no saturation hides.

    Args:
        targets: of each sample the so many most likely other classes; all by default.
        model, x, y, eps, alpha, steps, norm, clip, generator: as for :func:`pgd`.

    Source: S. Gowal et al., "An alternative surrogate loss for PGD-based adversarial testing", 2019 (arXiv:1910.09338).
    """
    ball, y = Ball.around(x, eps, norm, clip, alpha), check_labels(x, y)
    _check_counts(steps=steps)
    with crafting(model) as net, torch.no_grad():
        likely = without(net(ball.x), y)[1].argsort(dim=1, descending=True)[:, :-1]
    if targets is not None and not 1 <= targets <= likely.shape[1]:
        raise ValueError(f"targets must be in [1, {likely.shape[1]}], the other classes, got {targets}")
    pairs = torch.cat(
        (y[:, None], likely), 1
    )  # (B, K): the class, and what to take it for, the likeliest first

    def toward(rank: int) -> Once:
        def difference(logits: Tensor, pairs: Tensor) -> Tensor:
            return logits.gather(1, pairs[:, [rank]])[:, 0] - logits.gather(1, pairs[:, :1])[:, 0]

        def once(net: Net, ball: Ball, pairs: Tensor) -> Tensor:
            z = ball.random(generator)
            for _ in range(steps):
                z = ball.step(z, gradient(net, z, pairs, difference))
            return z

        return once

    attempts = [toward(rank) for rank in range(1, 1 + (targets or likely.shape[1]))]
    return _worst(model, ball, pairs, attempts, lambda logits, pairs: margin(logits, pairs[:, 0]), False)


def square(
    model: Net,
    x: Tensor,
    y: Tensor,
    eps: Eps,
    *,
    n_queries: int = 5000,
    p_init: float = 0.8,
    restarts: int = 1,
    clip: Clip = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random search with squares on the corners of the linf ball: a black box, which no masked gradient misleads.

    Each sample has squares of its own at each query, and is asked about until the model gets it wrong.

    Args:
        x: (B, C, ...) with any number of dimensions of places; features (B, D) count as one channel of D places.
        n_queries: forward passes for a sample and restart. The size of the squares follows the authors' schedule for
            10000 queries, scaled to this number.
        p_init: share of the places in a square at first.
        model, y, eps, restarts, clip, generator: as for :func:`pgd`; no gradient is taken.

    Source: M. Andriushchenko et al., "Square attack: a query-efficient black-box adversarial attack via random search",
    2020 (arXiv:1912.00049), algorithms 1 and 2.
    """
    ball, y = Ball.around(x, eps, "linf", clip), check_labels(x, y)
    _check_counts(n_queries=n_queries, restarts=restarts)
    if not 0 < p_init <= 1:
        raise ValueError(f"p_init must be in (0, 1], got {p_init}")

    def once(net: Net, ball: Ball, y: Tensor) -> Tensor:
        return square_once(net, ball, y, n_queries, p_init, generator)

    return _worst(model, ball, y, [once] * restarts, margin, False)


# ------------------------------------------------------------------------------------------------- restarts


def _worst(
    model: Net,
    ball: Ball,
    y: Tensor,
    attempts: list[Once],
    objective: Loss,
    targeted: bool,
    model_training: bool = False,
) -> Tensor:
    """Of each sample the first result that does its work, else the one of the largest objective.

    Samples that are done are not attacked again, except in the training mode, where they are part of the statistics.
    """
    with crafting(model, model_training) as net:
        if len(attempts) == 1 or len(ball.x) == 0:
            return attempts[0](net, ball, y)
        found, best = ball.x.clone(), ball.x.new_full((len(ball.x),), -torch.inf)
        left = torch.arange(len(found), device=found.device)
        for attempt in attempts:
            z = attempt(net, ball.select(left), y[left])
            value, done = judge(net, z, y[left], objective, targeted)
            value = value.to(best.dtype).where(~done, torch.inf)
            better = value > best[left]
            found[left[better]], best[left[better]] = z[better], value[better]
            if not model_training:
                left = left[~done]
                if not len(left):
                    break
    return found


@torch.no_grad()
def judge(net: Net, z: Tensor, y: Any, objective: Loss, targeted: bool) -> tuple[Tensor, Tensor]:
    """Each sample's objective, and whether the model is where the attack wants it (classes only)."""
    logits = net(z)
    classes = y.argmax(1) if y.is_floating_point() else y if y.dim() == 1 else y[:, 0]
    hit = logits.argmax(1) == classes
    return objective(logits, y), hit if targeted else ~hit


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {count!r}")
