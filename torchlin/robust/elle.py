"""ELLE and ELLE-A: a loss that is near linear inside the ball, without a gradient of a gradient."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchlin.functional import cross_entropy_linearity, local_linearity
from torchlin.robust._ball import Clip, Eps, triplet
from torchlin.robust._craft import cross_entropy
from torchlin.robust.adaptive import AdaptiveLambda
from torchlin.robust.regularizer import LossFn, Regularizer

CHECK_EVERY = 100  # steps between two looks at whether the model still tells samples apart
NOTHING = 1e-3  # of the information that would tell the labels of the batch: a model that says so little is constant


class CollapseWarning(UserWarning):
    """The model gives every sample the same prediction, which is perfectly linear, and useless."""


class ELLE(Regularizer):
    r"""The penalty on a loss that is not linear between two random points of the ball around a sample.

    .. math:: \lambda \, \frac1B \sum_i \Big( L(x_c) - (1 - \alpha) L(x_a) - \alpha L(x_b) \Big)^2,
              \quad x_a, x_b \sim U(\text{ball}(x_i, \epsilon)), \; \alpha \sim U(0, 1), \; x_c = (1 - \alpha) x_a + \alpha x_b

    One forward of 3B rows and its backward: any model works, also one whose ops have no second derivative. Add it to the
    loss on attacked samples::

        elle = ELLE(model, eps=8 / 255, adaptive=True)
        loss = adversarial_loss(model, x, y, attack="fgsm", eps=8 / 255) + elle(x, y)

    The model should give its logits in float32: in bfloat16 their rounding alone is an error fifty times that of a linear
    model. A constant model has no error at all, and too large a λ leads there: then ELLE warns (:class:`CollapseWarning`; it
    looks every 100 steps, which is when it waits for the device), and ``collapsed`` is True.

    Args:
        model: what is trained; returns logits (B, K), or what ``loss_fn`` takes.
        eps: radius of the ball in x's units, a number or, for linf, one a channel (C,).
        lam: λ, or where ``adaptive`` its largest value; by default 1000, or 4000, which the authors take for CIFAR-10 at
            8 / 255. The error grows like ε⁴, so other radii and data need other values: choose on a validation split.
        adaptive: ELLE-A: λ starts at 0, jumps to ``lam`` where the error does and decays otherwise (:class:`AdaptiveLambda`,
            here as ``schedule``; ``decay``, ``sensitivity`` and ``window`` are its arguments).
        n_triplets: how many pairs of points for each sample.
        joint_forward: one forward for x_adv and the three points, which must be given then: ``elle(x, y, x_adv)``. With
            BatchNorm it is another function. The authors do so for ImageNet, and not for CIFAR.
        penalty: "square", or "huber" with ``beta`` (smooth L1; the authors' for ImageNet), or "abs".
        norm: "linf" or "l2" of the ball.
        clip: (lowest, highest) value of an input, for the three points.
        label_smoothing: of the cross-entropy, which is also the one of x_adv.
        loss_fn: another loss, of (model's output, y), that returns one number for each sample (B,).
        generator: draws the points; torch's own by default.
        start: λ before the first step where ``adaptive``.

    Attributes:
        error: the last step's penalty without λ, detached.
        lam: λ of the next step.

    Shape:
        x (B, ...), y (B,) classes, (B, K) probabilities, or the pairs of mixup (y1, y2, weight of y1); the result is one
        number.

    Raises:
        ValueError: the model is in eval mode; an argument has a value that it can not have.

    Source: E. Abad Rocamora et al., "Efficient local linearity regularization to overcome catastrophic overfitting", 2024
    (arXiv:2401.11618).

    Example:
        >>> import torch
        >>> from torchlin.robust import ELLE
        >>> x, y = torch.randn(8, 20), torch.arange(8) % 3
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> elle = ELLE(model, eps=0.1, lam=100.0)
        >>> loss = torch.nn.functional.cross_entropy(model(x), y) + elle(x, y)
        >>> loss.backward()
        >>> bool(elle.error > 0)
        True
    """

    error: Tensor

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        eps: Eps,
        lam: float | None = None,
        adaptive: bool = False,
        *,
        decay: float = 0.99,
        sensitivity: float = 2.0,
        window: int | None = None,
        n_triplets: int = 1,
        joint_forward: bool = False,
        penalty: str = "square",
        beta: float = 1.0,
        norm: str = "linf",
        clip: Clip = None,
        label_smoothing: float = 0.0,
        loss_fn: LossFn | None = None,
        generator: torch.Generator | None = None,
        start: float = 0.0,
    ) -> None:
        lam = (4000.0 if adaptive else 1000.0) if lam is None else lam
        super().__init__(model, eps, lam, norm=norm, clip=clip, loss_fn=loss_fn, generator=generator)
        if isinstance(n_triplets, bool) or not isinstance(n_triplets, int) or n_triplets < 1:
            raise ValueError(f"n_triplets must be a whole number >= 1, got {n_triplets!r}")
        if loss_fn is not None and label_smoothing:
            raise ValueError("label_smoothing is of the cross-entropy: leave it to loss_fn")
        if loss_fn is None and label_smoothing:
            self.loss_fn = partial(cross_entropy, label_smoothing=label_smoothing)
        self.fused = loss_fn is None
        self.n_triplets, self.joint_forward = n_triplets, joint_forward
        self.penalty, self.beta, self.label_smoothing = penalty, beta, label_smoothing
        self.schedule = (
            AdaptiveLambda(lam, decay=decay, sensitivity=sensitivity, window=window, start=start)
            if adaptive
            else None
        )
        self.error = torch.tensor(math.nan)
        self.collapsed = False
        self._steps = 0

    @property
    def lam(self) -> Tensor | float:
        """λ of the next step."""
        return self.weight if self.schedule is None else self.schedule()

    def forward(self, x: Tensor, y: Any, x_adv: Tensor | None = None) -> Tensor:
        """λ times the error; with ``x_adv`` the mean loss of the model on it is added."""
        if not self.joint_forward:
            return super().forward(x, y, x_adv)
        self.check(x)
        if x_adv is None:
            raise ValueError("x_adv must be given with joint_forward=True: elle(x, y, x_adv)")
        points, mix, targets = self._points(x, y)
        outputs = self.model(torch.cat((x_adv, points)))
        return self.loss_fn(outputs[: len(x_adv)], y).mean() + self._weighted(
            outputs[len(x_adv) :], targets, mix
        )

    def term(self, x: Tensor, y: Any) -> Tensor:
        points, mix, targets = self._points(x, y)
        return self._weighted(self.model(points), targets, mix)

    def _points(self, x: Tensor, y: Any) -> tuple[Tensor, Tensor, Any]:
        """The three points of each sample and triplet (3nB, ...), their mixing weights (nB,) and targets (nB,)."""
        n = self.n_triplets
        if n > 1:
            x, y = (
                _repeat(x, n),
                tuple(_repeat(part, n) for part in y) if isinstance(y, tuple) else _repeat(y, n),
            )
        points, mix = triplet(x.detach(), self.eps, self.norm, self.clip, self.generator)
        return points, mix, y

    def _weighted(self, outputs: Any, y: Any, mix: Tensor) -> Tensor:
        how: dict[str, Any] = {"penalty": self.penalty, "beta": self.beta}
        if self.fused:
            error = cross_entropy_linearity(outputs, y, mix, label_smoothing=self.label_smoothing, **how)
        else:
            thrice = tuple(_repeat(part, 3) for part in y) if isinstance(y, tuple) else _repeat(y, 3)
            losses, n = self.loss_fn(outputs, thrice), len(mix)
            if losses.shape != (3 * n,):
                raise ValueError(
                    f"loss_fn must return one loss a sample ({3 * n},), got shape {tuple(losses.shape)}"
                )
            error = local_linearity(losses[:n], losses[n : 2 * n], losses[2 * n :], mix, **how)
        self.error = error.detach()
        weighted = (self.lam * error).to(error.dtype)
        if torch.is_grad_enabled():
            if self.schedule is not None:
                self.schedule.update(self.error)
            self._steps += 1
            if self.fused and self._steps % CHECK_EVERY == 0:
                self._look_for_collapse(outputs, y)
        return weighted

    def _look_for_collapse(self, logits: Tensor, y: Any) -> None:
        """Whether the predictions of two looks in a row said nothing about which sample they were of."""
        said = information(logits)
        possible = _entropy(_distribution(y, logits.shape[1]))
        nothing = bool(said < NOTHING * possible)
        if nothing and self._said_nothing and not self.collapsed:
            self.collapsed = True
            warnings.warn(
                f"the model gives every sample the same prediction (it tells {float(said):.1e} nats of the labels' "
                f"{float(possible):.2f} after {self._steps} steps): its linearity error, {float(self.error):.1e}, is small "
                f"because it is constant. lam={self.weight:g} is too large for eps and this model, or the training has failed "
                "otherwise: start again with a smaller lam, chosen on a validation split",
                CollapseWarning,
                stacklevel=2,
            )
        elif not nothing:
            self.collapsed = False
        self._said_nothing = nothing

    _said_nothing = False


def information(logits: Tensor) -> Tensor:
    """How much the predictions of a batch (B, K) say about which sample they are of, in nats: 0 where all are the same."""
    p = logits.detach().float().softmax(1)
    return _entropy(p.mean(0)) - _entropy(p).mean()


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def _distribution(y: Any, classes: int) -> Tensor:
    """The shares of the classes in a batch of targets (K,)."""
    if isinstance(y, tuple):
        y = torch.cat((y[0], y[1]))
    if y.is_floating_point():
        return y.float().mean(0)
    counts = torch.bincount(y.clamp(min=0).long(), minlength=classes).float()
    return counts / counts.sum()


def _repeat(x: Any, n: int) -> Any:
    """n copies one after the other; a number stays a number."""
    return x.repeat(n, *[1] * (x.dim() - 1)) if isinstance(x, Tensor) and x.dim() else x
