"""What ELLE and its peers share: a term of the training loss, made from a model, a radius and a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchlin.robust._ball import Clip, Eps, check_eps, check_norm
from torchlin.robust._craft import cross_entropy

LossFn = Callable[[Any, Any], Tensor]


class Regularizer(nn.Module):
    """A term of the training loss: ``term(x, y)``, or ``term(x, y, x_adv)`` with the loss on x_adv added.

    The model is not a submodule: parameters() and state_dict() hold what the term itself has.
    """

    model: Callable[[Tensor], Any]

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        eps: Eps,
        lam: float,
        *,
        norm: str = "linf",
        clip: Clip = None,
        loss_fn: LossFn | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not callable(model):
            raise TypeError(f"model must be a torch.nn.Module or a function, got {type(model).__name__}")
        if isinstance(lam, bool) or not isinstance(lam, (int, float)) or not 0 <= lam < float("inf"):
            raise ValueError(f"lam must be a finite number >= 0, got {lam!r}")
        object.__setattr__(self, "model", model)
        self.eps, self.weight = check_eps(eps), float(lam)
        self.norm, self.clip = check_norm(norm), clip
        self.loss_fn: LossFn = loss_fn or cross_entropy
        self.generator = generator

    def forward(self, x: Tensor, y: Any, x_adv: Tensor | None = None) -> Tensor:
        """The term; with ``x_adv`` the mean loss of the model on it is added.

        Args:
            x: the samples themselves (B, ...), not the attacked ones.
            y: their targets.
            x_adv: attacked samples.
        """
        self.check(x)
        if x_adv is None:
            return self.term(x, y)
        return self.loss_fn(self.model(x_adv), y).mean() + self.term(x, y)

    def term(self, x: Tensor, y: Any) -> Tensor:
        raise NotImplementedError

    def check(self, x: Tensor) -> None:
        if isinstance(self.model, nn.Module) and not self.model.training and torch.is_grad_enabled():
            raise ValueError(
                f"model is in eval mode, and {type(self).__name__} is a term of a training loss: call model.train(). "
                "To measure, take torchlin.robust.linearity_error, or call it under torch.no_grad()"
            )
        if not x.is_floating_point():
            raise TypeError(f"x must be a tensor of floats, got {x.dtype}")

    def losses(self, x: Tensor, y: Any) -> Tensor:
        """The loss of each sample (B,)."""
        losses = self.loss_fn(self.model(x), y)
        if losses.shape != x.shape[:1]:
            raise ValueError(
                f"loss_fn must return one loss a sample ({len(x)},), got shape {tuple(losses.shape)}"
            )
        return losses

    def gradient(self, x: Tensor, y: Any, *, differentiable: bool) -> tuple[Tensor, Tensor]:
        """The loss of each sample, and its gradient by the sample, itself differentiable where asked for."""
        x = x.detach().clone().requires_grad_()
        losses = self.losses(x, y)
        (slope,) = torch.autograd.grad(losses.sum(), x, create_graph=differentiable)
        return losses, slope

    def extra_repr(self) -> str:
        eps = f"{self.eps:g}" if isinstance(self.eps, float) else f"{self.eps.numel()} values"
        return f"eps={eps}, lam={self.weight:g}, norm={self.norm!r}"
