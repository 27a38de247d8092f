"""The schedule of ELLE-A: a penalty's weight that jumps up where the penalty does, and decays otherwise."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class AdaptiveLambda(nn.Module):
    r"""A weight that is set to its maximum when the penalty is unusually large, and decays at all other steps.

    .. math:: \lambda \leftarrow \begin{cases} \lambda_\text{max} & v > \text{mean}(h) + s \cdot \text{std}(h), \; |h| > 2 \\
              d \cdot \lambda & \text{otherwise} \end{cases}

    where h are the values seen before v: all of them, or the last ``window``. All state is on the device, in float64, and no
    step waits for it. A value that is not finite changes nothing. Under torch.distributed the value is first averaged over
    the ranks, so that they agree.

    Args:
        maximum: λ_max.
        decay: d, in (0, 1]. 0.99 halves λ in 69 steps.
        sensitivity: s >= 0, in standard deviations (of a population).
        window: the number of values that are compared with; ``None`` for all. At least 3.
        start: λ before the first step.
        process_group: whose ranks agree; all by default.

    Source: E. Abad Rocamora et al., "Efficient local linearity regularization to overcome catastrophic overfitting", 2024
    (arXiv:2401.11618), the variant ELLE-A.

    Example:
        >>> import torch
        >>> from torchlin.robust import AdaptiveLambda
        >>> lam = AdaptiveLambda(100.0)
        >>> for value in (1.0, 1.1, 0.9, 5.0, 1.0):
        ...     lam.update(torch.tensor(value))
        >>> lam.value
        tensor(99., dtype=torch.float64)
    """

    value: Tensor
    count: Tensor
    mean: Tensor
    squares: Tensor
    history: Tensor

    def __init__(
        self,
        maximum: float,
        *,
        decay: float = 0.99,
        sensitivity: float = 2.0,
        window: int | None = None,
        start: float = 0.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        for name, number in (("maximum", maximum), ("sensitivity", sensitivity), ("start", start)):
            if not 0 <= number < float("inf"):
                raise ValueError(f"{name} must be a finite number >= 0, got {number}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {decay}")
        if window is not None and window < 3:
            raise ValueError(f"window must be at least 3 values, or None for all, got {window}")
        self.maximum, self.decay, self.sensitivity = float(maximum), float(decay), float(sensitivity)
        self.window, self.process_group = window, process_group
        self.register_buffer("value", torch.tensor(float(start), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        if window is None:  # Welford's running mean and sum of squared deviations
            self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
            self.register_buffer("squares", torch.zeros((), dtype=torch.float64))
        else:
            self.register_buffer("history", torch.zeros(window, dtype=torch.float64))

    @torch.no_grad()
    def update(self, value: Tensor) -> None:
        """Takes the step's penalty, without its weight; the new λ is for the next step.

        Args:
            value: one number.
        """
        if value.numel() != 1:
            raise ValueError(f"value must be one number, got shape {tuple(value.shape)}")
        new = self._agreed(value.detach().to(self.value).reshape(()))
        finite = new.isfinite()
        mean, std, compared = self._seen()
        surprising = (compared > 2) & (new > mean + self.sensitivity * std)
        weight = torch.where(surprising, self.maximum, self.value * self.decay)
        self.value.copy_(torch.where(finite, weight, self.value))
        self._remember(new, finite)

    def _agreed(self, value: Tensor) -> Tensor:
        if dist.is_available() and dist.is_initialized():
            value = value.clone()
            dist.all_reduce(value, group=self.process_group)
            value /= dist.get_world_size(self.process_group)
        return value

    def _seen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation of the values that count, and how many they are."""
        if self.window is None:
            return self.mean, (self.squares / self.count.clamp(min=1)).sqrt(), self.count
        compared = self.count.clamp(max=self.window)
        there = torch.arange(self.window, device=self.history.device) < compared
        mean = self.history.sum() / compared.clamp(min=1)  # places that are empty hold zeros
        deviations = torch.where(there, self.history - mean, 0.0)
        return mean, (deviations.square().sum() / compared.clamp(min=1)).sqrt(), compared

    def _remember(self, value: Tensor, finite: Tensor) -> None:
        if self.window is None:
            count = (self.count + finite).clamp(min=1)
            change = torch.where(finite, value - self.mean, 0.0)
            self.mean += change / count
            self.squares += torch.where(finite, change * (value - self.mean), 0.0)
        else:
            place = (self.count % self.window).view(1)
            old = self.history.index_select(0, place)
            self.history.index_copy_(0, place, torch.where(finite, value.view(1), old))
        self.count += finite

    def forward(self) -> Tensor:
        """λ as it is now, a copy: a graph may keep it while the next value comes."""
        return self.value.clone()

    def extra_repr(self) -> str:
        window = "" if self.window is None else f", window={self.window}"
        return f"maximum={self.maximum:g}, decay={self.decay:g}, sensitivity={self.sensitivity:g}{window}"
