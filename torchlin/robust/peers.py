"""The methods that ELLE is compared with, in its interface. All but TRADES take a gradient of a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlin.robust._ball import Ball, Eps
from torchlin.robust._craft import crafting, gradient
from torchlin.robust.regularizer import Regularizer


class GradAlign(Regularizer):
    r"""λ (1 - cos(∇L(x), ∇L(x + η))), η uniform in the ball: the gradient should not turn inside of it.

    The gradient at x is not differentiated, as in the authors' code; samples where one of the two is zero are left out.

    Args:
        model, eps, norm, clip, loss_fn, generator: as for :class:`torchlin.robust.ELLE`.
        lam: λ; the authors take exp(ε ln(10) / 8 + ln 0.02) with ε in 255ths: 0.2 at 8 / 255, 2 at 16 / 255.

    Source: M. Andriushchenko and N. Flammarion, "Understanding and improving fast adversarial training", 2020
    (arXiv:2007.02617).
    """

    def __init__(self, model: Callable[[Tensor], Any], eps: Eps, lam: float = 0.2, **options: Any) -> None:
        super().__init__(model, eps, lam, **options)

    def forward(
        self, x: Tensor, y: Any, x_adv: Tensor | None = None, *, slope: Tensor | None = None
    ) -> Tensor:
        """As all terms; ``slope``: the gradient at x where the attack has computed it, which saves a pass."""
        self.check(x)
        if x_adv is None:
            return self.term(x, y, slope)
        return self.loss_fn(self.model(x_adv), y).mean() + self.term(x, y, slope)

    def term(self, x: Tensor, y: Any, slope: Tensor | None = None) -> Tensor:
        one = self.gradient(x, y, differentiable=False)[1] if slope is None else slope
        ball = Ball.around(x, self.eps, self.norm, self.clip)
        _, other = self.gradient(ball.random(self.generator), y, differentiable=True)
        cosine = F.cosine_similarity(one.detach().flatten(1), other.flatten(1), eps=1e-30)
        counts = (one.flatten(1).abs().amax(1) > 0) & (other.detach().flatten(1).abs().amax(1) > 0)
        return self.weight * torch.where(counts, 1 - cosine, 0.0).sum() / counts.sum().clamp(min=1)


class LLR(Regularizer):
    r"""λ (L(x₃) - L(x₂) - ⟨x₃ - x₂, ∇L(x₂)⟩)², with x₂ and x₃ uniform in the ball: the error of the tangent plane.

    This is the form that ELLE's authors compare with; the original looks for the worst point of the ball instead.

    Args:
        model, eps, norm, clip, loss_fn, generator: as for :class:`torchlin.robust.ELLE`.
        lam: λ; ELLE's authors take 200 for CIFAR-10 at 8 / 255.

    Source: C. Qin et al., "Adversarial robustness through local linearization", 2019 (arXiv:1907.02610).
    """

    def __init__(self, model: Callable[[Tensor], Any], eps: Eps, lam: float = 200.0, **options: Any) -> None:
        super().__init__(model, eps, lam, **options)

    def term(self, x: Tensor, y: Any) -> Tensor:
        ball = Ball.around(x, self.eps, self.norm, self.clip)
        one, other = ball.random(self.generator), ball.random(self.generator)
        loss, slope = self.gradient(one, y, differentiable=True)
        tangent = loss + ((other - one) * slope).flatten(1).sum(1)
        return self.weight * (self.losses(other, y) - tangent).square().mean()


class CURE(Regularizer):
    r"""λ ‖∇L(x + h) - ∇L(x)‖², h a step of length ε along the gradient (or x_adv - x): the curvature where it matters.

    Args:
        model, eps, norm, clip, loss_fn: as for :class:`torchlin.robust.ELLE`.
        lam: λ; ELLE's authors take 1000 for CIFAR-10 at 8 / 255.

    Source: S.-M. Moosavi-Dezfooli et al., "Robustness via curvature regularization, and vice versa", 2019
    (arXiv:1811.09716), with the points of ELLE's authors: their h is the attack's step.
    """

    def __init__(self, model: Callable[[Tensor], Any], eps: Eps, lam: float = 1000.0, **options: Any) -> None:
        super().__init__(model, eps, lam, **options)

    def forward(self, x: Tensor, y: Any, x_adv: Tensor | None = None) -> Tensor:
        self.check(x)
        if x_adv is None:
            return self.weight * self._change(x, y, None)[1]
        losses, change = self._change(x, y, x_adv)
        return losses.mean() + self.weight * change

    def _change(self, x: Tensor, y: Any, x_adv: Tensor | None) -> tuple[Tensor, Tensor]:
        _, here = self.gradient(x, y, differentiable=True)
        if x_adv is None:
            ball = Ball.around(x, self.eps, self.norm, self.clip, share=1.0)
            x_adv = ball.step(ball.x, here.detach())
        losses, there = self.gradient(x_adv, y, differentiable=True)
        return losses, (there - here).square().flatten(1).sum(1).mean()


class TRADES(Regularizer):
    r"""β KL(p(x) ‖ p(x′)), with x′ in the ball by projected ascent on it. Add the cross-entropy of x itself: term(x, y, x).

    Args:
        model, eps, norm, clip, generator: as for :class:`torchlin.robust.ELLE`.
        lam: β; the authors take 1 and 6.
        steps: of the ascent.
        alpha: length of a step, eps / 4 by default.
        model_training: ascend in the model's own mode; the authors do so in eval mode.

    Source: H. Zhang et al., "Theoretically principled trade-off between robustness and accuracy", 2019 (arXiv:1901.08573).
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        eps: Eps,
        lam: float = 6.0,
        *,
        steps: int = 10,
        alpha: Eps | None = None,
        model_training: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, eps, lam, **options)
        self.steps, self.alpha, self.model_training = steps, alpha, model_training

    def forward(self, x: Tensor, y: Any, x_adv: Tensor | None = None) -> Tensor:
        self.check(x)
        outputs = self.model(x)
        term = self.weight * _divergence(outputs, self.model(self.attack(x)))
        if x_adv is None:
            return term
        return self.loss_fn(outputs if x_adv is x else self.model(x_adv), y).mean() + term

    def attack(self, x: Tensor) -> Tensor:
        """x′: from noise of 0.001, as there, steps along the gradient of the divergence."""
        ball = Ball.around(x, self.eps, self.norm, self.clip, self.alpha)
        with crafting(self.model, self.model_training) as net:
            p = net(ball.x).detach()
            noise = torch.randn(ball.x.shape, generator=self.generator, device=x.device, dtype=x.dtype)
            z = ball.project(ball.x + 1e-3 * noise)
            for _ in range(self.steps):
                z = ball.step(z, gradient(net, z, p, lambda logits, p: _divergence(p, logits, "none")))
        return z


def _divergence(p: Tensor, q: Tensor, reduction: str = "batchmean") -> Tensor:
    """KL of two predictions by their logits."""
    return F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction=reduction, log_target=True)
