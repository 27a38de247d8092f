"""The local-linearity loss as a module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from torchlin import registry
from torchlin.functional import cross_entropy_linearity
from torchlin.ops.linearity import Penalty, Reduction


class LocalLinearityLoss(nn.Module):
    """:func:`torchlin.functional.cross_entropy_linearity` with fixed options: the ELLE regularizer on logits at three points.

    Args:
        penalty, beta, reduction, label_smoothing, weight, ignore_index, return_losses: as of the function. ``weight`` is kept
            as a buffer, which is not saved with the state.

    Shape:
        (logits, target, mix): (3B, K) or three (B, K); (B,), (B, K) or a pair (y1, y2, lam); a number or (B,). The result is a
        scalar, or (B,) with ``reduction="none"``; with ``return_losses`` a pair of it and the losses (3, B).

    Raises:
        TypeError, ValueError, IndexError: as the function, when called.

    Source: Abad Rocamora et al., "Efficient local linearity regularization to overcome catastrophic overfitting", ICLR 2024,
    arXiv:2401.11618.

    Example:
        >>> import torch, torchlin
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.SiLU(), torch.nn.Linear(16, 3))
        >>> loss = torchlin.nn.LocalLinearityLoss()
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> points, mix = torchlin.functional.sample_triplet(x, eps=0.1)
        >>> bool(loss(model(points), y, mix) >= 0)
        True
    """

    weight: Tensor | None

    def __init__(
        self,
        penalty: Penalty = "square",
        *,
        beta: float = 1.0,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        return_losses: bool = False,
    ) -> None:
        super().__init__()
        self.penalty, self.beta, self.reduction = penalty, beta, reduction
        self.label_smoothing, self.ignore_index, self.return_losses = (
            label_smoothing,
            ignore_index,
            return_losses,
        )
        self.register_buffer("weight", weight, persistent=False)

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        target: Tensor | tuple[Tensor, Tensor, float | Tensor],
        mix: float | Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return cross_entropy_linearity(
            logits,
            target,
            mix,
            penalty=self.penalty,
            beta=self.beta,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            weight=self.weight,
            ignore_index=self.ignore_index,
            return_losses=self.return_losses,
        )

    def extra_repr(self) -> str:
        words = [repr(self.penalty), f"reduction={self.reduction!r}"]
        if self.penalty == "huber":
            words.append(f"beta={self.beta}")
        if self.label_smoothing:
            words.append(f"label_smoothing={self.label_smoothing}")
        if self.ignore_index != -100:
            words.append(f"ignore_index={self.ignore_index}")
        if self.return_losses:
            words.append("return_losses=True")
        return ", ".join(words)


def register() -> None:
    """Plug-in entry point of this family."""
    registry.register("loss", "local_linearity", LocalLinearityLoss, aliases=("elle",))
