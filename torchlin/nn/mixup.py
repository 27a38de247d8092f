"""Mixup and CutMix of a batch, mixup that stops early, and mixup that learns how far it may go."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchlin.functional import cutmix, mixup
from torchlin.ops._checks import check_float_tensor, compute_dtype

Pair = tuple[Tensor, Tensor, Tensor]  # y1, y2, and the weight of y1, each (B,)
Target = Tensor | Pair


# --------------------------------------------------------------------------------------------------- drawing
# By the given generator on its own device, so that one seed gives the same batches on every device.


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    where = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=where).to(device, non_blocking=True)


def _permutation(n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    return _uniform((n,), generator, device).argsort()  # not randperm, which inductor does not compile here


def _beta(
    alpha: float, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Numbers of Beta(alpha, alpha), which torch.distributions draws without a generator."""
    where = device if generator is None else generator.device
    # Gamma(a) = Gamma(a + 1) U^(1/a), by its logarithm: for a small alpha both Gammas of the usual quotient underflow.
    gamma = torch._standard_gamma(torch.full((2, *shape), alpha + 1.0, device=where), generator=generator)
    power = torch.empty((2, *shape), device=where).exponential_(generator=generator) / alpha
    first, second = (gamma.log() - power).unbind()
    return torch.sigmoid(first - second).to(device, non_blocking=True)


# --------------------------------------------------------------------------------------------------- targets


def _check_target(target: object, samples: int) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor, got {type(target).__name__}")
    if target.dim() == 0 or len(target) != samples:
        raise ValueError(f"target must have one row for each of {samples} samples, got {tuple(target.shape)}")
    if target.dtype is torch.bool or target.is_complex():
        raise TypeError(f"target must be integer labels or floating, got {target.dtype}")
    if not target.is_floating_point() and target.dim() != 1:
        raise ValueError(f"target: integer labels must have shape (B,), got {tuple(target.shape)}")


def _dense(target: Tensor, partner: Tensor, lam: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B, K) of both labels' smoothed one-hots, differentiable in lam."""
    off = smoothing / classes
    rows = lam.new_full((len(target), classes), off)
    for labels, weight in ((target, lam), (partner, 1 - lam)):
        rows = rows.scatter_add(1, labels.long().unsqueeze(1), (1 - smoothing) * weight.unsqueeze(1))
    return rows


def mixup_cross_entropy(
    logits: Tensor, target: Target, *, label_smoothing: float = 0.0, reduction: str = "mean"
) -> Tensor:
    r"""Cross-entropy with the target of a mixed batch: :math:`\lambda\,CE(z, y_1) + (1 - \lambda)\,CE(z, y_2)`.

    Two gathers from one log-softmax; no (B, K) matrix of labels is made. Differentiable in logits and λ.

    Args:
        logits: (B, K). float16 and bfloat16 are computed in float32.
        target: (y1, y2, lam) with integer y1, y2 (B,) and lam (B,), a scalar or a number; or what `F.cross_entropy` takes,
            labels (B,) or probabilities (B, K), so that one loss serves training and evaluation.
        label_smoothing: in [0, 1], of both labels.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or (B,) for "none"; float32 (float64 for float64).

    Raises:
        TypeError: logits are no floating tensor, or labels no integers.
        ValueError: shapes that do not fit, or an option outside of what is allowed.

    Example:
        >>> logits = torch.zeros(3, 4)
        >>> pair = (torch.tensor([0, 1, 2]), torch.tensor([3, 1, 0]), torch.tensor([0.3, 1.0, 0.5]))
        >>> mixup_cross_entropy(logits, pair, reduction="none")
        tensor([1.3863, 1.3863, 1.3863])
    """
    check_float_tensor("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape (B, K), got {tuple(logits.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    smoothing = _check_share("label_smoothing", label_smoothing)
    logits = logits.to(compute_dtype(logits.dtype))
    if isinstance(target, Tensor):
        target = target.to(logits.dtype) if target.is_floating_point() else target.long()
        return F.cross_entropy(logits, target, reduction=reduction, label_smoothing=smoothing)
    y1, y2, lam = _check_pair(target, len(logits))
    log_p = logits.log_softmax(1)
    first, second = (log_p.gather(1, y.long().unsqueeze(1)).squeeze(1) for y in (y1, y2))
    losses = -(lam * first + (1 - lam) * second)
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * log_p.mean(1)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def _check_pair(target: object, samples: int) -> Pair:
    if (
        not isinstance(target, tuple)
        or len(target) != 3
        or not all(isinstance(y, Tensor) for y in target[:2])
    ):
        raise TypeError(
            f"target must be a tensor or (y1, y2, lam), of two tensors and a weight, got {type(target).__name__}"
        )
    y1, y2, lam = target
    lam = lam if isinstance(lam, Tensor) else torch.tensor(_check_share("target: lam", lam), device=y1.device)
    for name, y in (("y1", y1), ("y2", y2)):
        if y.is_floating_point() or y.dtype is torch.bool:
            raise TypeError(f"target: {name} must be integer labels, got {y.dtype}")
        if y.shape != (samples,):
            raise ValueError(f"target: {name} must have shape ({samples},), got {tuple(y.shape)}")
    if lam.shape not in ((), (samples,)):
        raise ValueError(f"target: lam must be a scalar or have shape ({samples},), got {tuple(lam.shape)}")
    return y1, y2, lam


def _check_share(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
    return float(value)


# ------------------------------------------------------------------------------------------------ the modules


class _Mixing(nn.Module):
    """What the mixing modules share: the form of the target, the generator, and the switch."""

    def __init__(
        self, num_classes: int | None, label_smoothing: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        if num_classes is not None and (
            isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1
        ):
            raise ValueError(f"num_classes must be a positive int or None, got {num_classes!r}")
        self.num_classes = num_classes
        self.label_smoothing = _check_share("label_smoothing", label_smoothing)
        if self.label_smoothing and num_classes is None:
            raise ValueError(
                "label_smoothing is of dense labels: give num_classes, or smooth in the loss "
                "(mixup_cross_entropy has label_smoothing)"
            )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        self.generator = generator
        self.mixup_enabled = True

    def _target(self, target: Tensor, perm: Tensor, lam: Tensor) -> Target:
        if target.is_floating_point():
            return mixup(target, lam.to(compute_dtype(target.dtype)), perm)
        if self.num_classes is None:
            return target, target[perm], lam
        return _dense(target, target[perm], lam, self.num_classes, self.label_smoothing)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Target]:
        if not self.training:
            return x, target
        check_float_tensor("x", x)
        if x.dim() == 0:
            raise ValueError("x must have a dimension of samples, got a 0-dimensional tensor")
        _check_target(target, len(x))
        if not self.mixup_enabled:
            return self._unmixed(x, target)
        return self._mixed(x, target)

    def _mixed(self, x: Tensor, target: Tensor) -> tuple[Tensor, Target]:
        raise NotImplementedError  # how is what the classes below differ in

    def _unmixed(self, x: Tensor, target: Tensor) -> tuple[Tensor, Target]:
        """In the form that a mixed batch has, so that the loss need not know."""
        itself = torch.arange(len(x), device=x.device)
        lam = torch.ones(len(x), device=x.device, dtype=compute_dtype(x.dtype))
        return x, target if target.is_floating_point() else self._target(target, itself, lam)

    def get_extra_state(self) -> dict[str, Any]:
        """The switch and the generator's state: a checkpoint goes on with the batches it would have had."""
        state = None if self.generator is None else self.generator.get_state()
        return {"mixup_enabled": self.mixup_enabled, "generator": state}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.mixup_enabled = state["mixup_enabled"]
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])


class Mixup(_Mixing):
    r"""Mixup or CutMix of a batch with itself, :math:`\lambda x + (1 - \lambda) x_\pi`, in training only.

    With the arguments of timm's `Mixup` where that has them; but any batch size, one tensor that is never overwritten,
    a random partner, and torch's random numbers.

    Args:
        mixup_alpha: λ is drawn from Beta(alpha, alpha); 0: no mixup.
        cutmix_alpha: of the share that a pasted box leaves; 0: no CutMix. Where both are on, each batch is one or the
            other.
        prob: of a batch (with mode "elem": of a sample) to be mixed at all.
        switch_prob: of CutMix, where both are on.
        mode: "batch": one λ for all; "elem": one for each sample.
        num_classes: integer labels become rows (B, K), as of timm. None: they become a pair (y1, y2, λ), which
            :func:`mixup_cross_entropy` and `torchlin.functional.cross_entropy_linearity` take.
        label_smoothing: of dense labels; both one-hots are smoothed before they are mixed.
        lam_x: λ is this number instead of being drawn.
        lam_y: the labels' weight, if not the features' own. A number: the weight of that label of which there are more
            features. "independent": drawn on its own, on λ's side of 1/2, so that the label of which there are more
            features has the larger weight. A function: of λ, a tensor () or (B,). Samples that are not mixed keep weight 1.
        generator: of all that is drawn. Its device's: one seed gives the same batches on every device.

    Shape:
        x (B, ...), target integer labels (B,) or floating (B, ...), which is mixed as x is. x keeps shape and dtype; λ and
        dense labels are float32 (float64 if x is). CutMix takes images (B, C, H, W); its λ is the share of pixels that
        stayed.

    In evaluation mode both arguments are returned as they came. `mixup_enabled = False` (timm's switch) keeps x, with
    targets in the form of training.

    Raises:
        ValueError: an option outside of what is allowed, nothing to mix with (both alphas 0 and no lam_x), or a target
            that does not fit.
        TypeError: x is no floating tensor (images of bytes are scaled first), or target is of another kind.

    Source: Zhang et al., arXiv:1710.09412; Yun et al., arXiv:1905.04899 (CutMix); two weights: Zou, Cao, Li and Gu,
    arXiv:2303.08433.

    Example:
        >>> import torch, torchlin
        >>> mix = torchlin.nn.Mixup(0.4, mode="elem", generator=torch.Generator().manual_seed(0))
        >>> x, (y1, y2, lam) = mix(torch.randn(5, 3, 32, 32), torch.arange(5))
        >>> logits = torch.randn(5, 10)
        >>> loss = torchlin.nn.mixup_cross_entropy(logits, (y1, y2, lam), label_smoothing=0.1)
    """

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        cutmix_alpha: float = 0.0,
        *,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
        lam_x: float | None = None,
        lam_y: float | str | Callable[[Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, label_smoothing, generator)
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {alpha!r}")
        if mixup_alpha == cutmix_alpha == 0 and lam_x is None:
            raise ValueError(
                "mixup_alpha and cutmix_alpha are both 0, and there is no lam_x: nothing to mix with"
            )
        if mode not in ("batch", "elem"):
            raise ValueError(f"mode must be 'batch' or 'elem', got {mode!r}")
        if isinstance(lam_y, str) and lam_y != "independent":
            raise ValueError(f"lam_y must be a number, 'independent', a function or None, got {lam_y!r}")
        self.mixup_alpha, self.cutmix_alpha = float(mixup_alpha), float(cutmix_alpha)
        self.prob = _check_share("prob", prob)
        self.switch_prob = _check_share("switch_prob", switch_prob)
        self.mode = mode
        self.lam_x = None if lam_x is None else _check_share("lam_x", lam_x)
        is_rule = lam_y is None or isinstance(lam_y, str) or callable(lam_y)
        self.lam_y = lam_y if is_rule else _check_share("lam_y", lam_y)

    def _mixed(self, x: Tensor, target: Tensor) -> tuple[Tensor, Target]:
        samples, device, is_cut = len(x), x.device, self._draw_method()
        shape = () if self.mode == "batch" else (samples,)
        alpha = self.cutmix_alpha if is_cut else self.mixup_alpha
        perm = _permutation(samples, self.generator, device)
        is_mixed = _uniform(shape, self.generator, device) < self.prob
        lam = torch.where(is_mixed, self._draw(alpha, shape, device), 1.0).to(compute_dtype(x.dtype))
        if is_cut:
            x, kept = cutmix(x, lam, perm, generator=self.generator)
            lam = kept.to(lam.dtype)
        else:
            x = mixup(x, lam, perm)
        return x, self._target(target, perm, self._of_labels(lam, alpha).expand(samples))

    def _draw_method(self) -> bool:
        """Whether this batch is cut: a choice between two kernels, which the CPU makes."""
        if self.cutmix_alpha == 0 or (self.mixup_alpha == 0 and self.lam_x is None):
            return self.cutmix_alpha > 0
        return bool(_uniform((), self.generator, torch.device("cpu")) < self.switch_prob)

    def _draw(self, alpha: float, shape: tuple[int, ...], device: torch.device) -> Tensor:
        if self.lam_x is not None:
            return torch.full(shape, self.lam_x, device=device)
        return _beta(alpha, shape, self.generator, device)

    def _of_labels(self, lam: Tensor, alpha: float) -> Tensor:
        """The labels' weights, of the features'."""
        if self.lam_y is None:
            return lam
        if callable(self.lam_y):
            weight = self.lam_y(lam)
        else:
            if isinstance(self.lam_y, str):
                other = _beta(alpha or 1.0, tuple(lam.shape), self.generator, lam.device).to(lam.dtype)
                larger = torch.maximum(other, 1 - other)
            else:
                larger = torch.full_like(lam, self.lam_y)
            weight = torch.where(lam >= 0.5, larger, 1 - larger)
        return torch.where(lam == 1, 1.0, weight)

    def extra_repr(self) -> str:
        words = [f"mixup_alpha={self.mixup_alpha:g}", f"cutmix_alpha={self.cutmix_alpha:g}"]
        defaults = {
            "prob": 1.0,
            "switch_prob": 0.5,
            "mode": "batch",
            "num_classes": None,
            "label_smoothing": 0.0,
        }
        defaults |= {"lam_x": None, "lam_y": None, "mixup_enabled": True}
        changed = {key: getattr(self, key) for key, value in defaults.items() if getattr(self, key) != value}
        return ", ".join(words + [f"{key}={value!r}" for key, value in changed.items()])


class MixupSchedule:
    """Early-stopped mixup: on for the first `stop_epoch` epochs, off from there on.

    What mixup gives to the features that a net learns it gives early; trained with it to the end, a net fits the mixed
    labels instead of the plain ones.

    Args:
        mixup: a :class:`Mixup`, or anything with timm's switch `mixup_enabled`.
        stop_epoch: epochs with mixup. The unit is that of the calls of :meth:`step`: calls after every batch make it
            steps.

    Raises:
        ValueError: stop_epoch is negative.
        TypeError: stop_epoch is no int, or mixup has no switch.

    Source: Zou, Cao, Li and Gu, "The Benefits of Mixup for Feature Learning", arXiv:2303.08433.

    Example:
        >>> import torch, torchlin
        >>> mix = torchlin.nn.Mixup(1.0)
        >>> schedule = torchlin.nn.MixupSchedule(mix, stop_epoch=2)
        >>> for epoch in range(4):
        ...     print(epoch, mix.mixup_enabled)
        ...     schedule.step()
        0 True
        1 True
        2 False
        3 False
    """

    def __init__(self, mixup: Any, stop_epoch: int) -> None:
        if not hasattr(mixup, "mixup_enabled"):
            raise TypeError(f"mixup must have the switch mixup_enabled, got {type(mixup).__name__}")
        if isinstance(stop_epoch, bool) or not isinstance(stop_epoch, int):
            raise TypeError(f"stop_epoch must be an int, got {type(stop_epoch).__name__}")
        if stop_epoch < 0:
            raise ValueError(f"stop_epoch must not be negative, got {stop_epoch}")
        self.mixup, self.stop_epoch = mixup, stop_epoch
        self._enter(0)

    def _enter(self, epoch: int) -> None:
        self.epoch = epoch
        self.mixup.mixup_enabled = epoch < self.stop_epoch

    def step(self) -> None:
        """Ends an epoch."""
        self._enter(self.epoch + 1)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._enter(state["epoch"])


class AdaMixUp(_Mixing):
    r"""Mixup whose λ stays in a region that a policy network gives for each pair: :math:`\lambda = a + \Delta u`.

    The policy sees a noisy average of the pair, :math:`(n_1 x + n_2 x_\pi) / 2` with truncated normal n1, n2 for every
    element, and gives :math:`(a, \Delta, 1 - a - \Delta)` by a softmax; u is uniform, one for each sample. The loss of
    the mixed batch and that of an :class:`IntrusionDiscriminator` on it reach a and Δ through λ, in the features and
    in the labels.

    Args:
        policy: from a batch like x to features (B, feat_dim): the classifier's body again, with weights of its own.
        feat_dim: width of its features.
        hidden_dim: of the layer between features and the three outputs.
        num_classes, label_smoothing, generator: as in :class:`Mixup`.

    Shape:
        As :class:`Mixup`, and with its switch: the one takes the other's place in a loop.

    Raises:
        As :class:`Mixup`; ValueError: the policy's features are not (B, feat_dim).

    Source: Guo, Mao and Zhang, "MixUp as Locally Linear Out-Of-Manifold Regularization", arXiv:1809.02499.

    Example:
        >>> import torch, torchlin
        >>> policy = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU())
        >>> mix = torchlin.nn.AdaMixUp(policy, feat_dim=32)
        >>> x, (y1, y2, lam) = mix(torch.randn(7, 1, 8, 8), torch.arange(7))
        >>> lam.requires_grad, x.requires_grad
        (True, True)
    """

    def __init__(
        self,
        policy: nn.Module,
        feat_dim: int,
        hidden_dim: int = 100,
        *,
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_classes, label_smoothing, generator)
        if not isinstance(policy, nn.Module):
            raise TypeError(f"policy must be a torch.nn.Module, got {type(policy).__name__}")
        for name, size in (("feat_dim", feat_dim), ("hidden_dim", hidden_dim)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive int, got {size!r}")
        self.feat_dim = feat_dim
        self.policy = policy
        self.hidden = nn.Linear(feat_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, 3)

    def region(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The policy's answer for the pairs (x1, x2): a, Δ and the rest, each (B,), not negative, of sum 1."""
        bound = math.erf(math.sqrt(2))  # of a normal number that is cut off at two deviations
        uniform = _uniform((2, *x1.shape), self.generator, x1.device) * (2 * bound) - bound
        n1, n2 = (math.sqrt(2) * uniform.erfinv()).to(x1.dtype).unbind()
        features = self.policy((n1 * x1 + n2 * x2) / 2)
        if features.shape != (len(x1), self.feat_dim):
            raise ValueError(
                f"policy must give features of shape ({len(x1)}, feat_dim = {self.feat_dim}), "
                f"got {tuple(features.shape)}"
            )
        a, delta, rest = self.output(F.relu(self.hidden(features))).softmax(1).unbind(1)
        return a, delta, rest

    def _mixed(self, x: Tensor, target: Tensor) -> tuple[Tensor, Target]:
        perm = _permutation(len(x), self.generator, x.device)
        a, delta, _ = self.region(x, x[perm])
        u = _uniform((len(x),), self.generator, x.device)
        lam = (a + delta * u).to(compute_dtype(x.dtype)).clamp(max=1)  # rounding may lead past 1
        return mixup(x, lam, perm), self._target(target, perm, lam)


class IntrusionDiscriminator(nn.Module):
    """Tells real samples from mixed ones by the features of the classifier that it shares: AdaMixUp's second critic.

    Where a mix collides with the manifold of real data, this fails, and its loss drives the policy elsewhere.

    Args:
        feat_dim: width of the classifier's features.
        num_classes: width of the layer between, as of the classifier's own output.

    Shape:
        (N, feat_dim) to logits (N, 2) of (mixed, real), for :func:`intrusion_loss`.

    Source: Guo, Mao and Zhang, arXiv:1809.02499.

    Example:
        >>> import torch, torchlin
        >>> critic = torchlin.nn.IntrusionDiscriminator(32, num_classes=10)
        >>> critic(torch.randn(8, 32)).shape
        torch.Size([8, 2])
    """

    def __init__(self, feat_dim: int, num_classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(feat_dim, num_classes)
        self.output = nn.Linear(num_classes, 2)

    def forward(self, features: Tensor) -> Tensor:
        return self.output(self.hidden(features))


def intrusion_loss(logits: Tensor, is_real: Tensor) -> Tensor:
    """Binary cross-entropy of an :class:`IntrusionDiscriminator`, mean over the samples.

    Args:
        logits: (N, 2), of (mixed, real).
        is_real: bool (N,): samples as they came, those that were mixed among them, are real; mixes are not.

    Raises:
        TypeError: logits are no floating tensor, or is_real is not of bools.
        ValueError: the shapes do not fit.

    Source: Guo, Mao and Zhang, arXiv:1809.02499.

    Example:
        >>> intrusion_loss(torch.zeros(4, 2), torch.tensor([True, True, False, False]))
        tensor(0.6931)
    """
    check_float_tensor("logits", logits)
    if logits.dim() != 2 or logits.shape[1] != 2:
        raise ValueError(f"logits must have shape (N, 2), got {tuple(logits.shape)}")
    if not isinstance(is_real, Tensor) or is_real.dtype is not torch.bool:
        raise TypeError(
            f"is_real must be a bool tensor, got {getattr(is_real, 'dtype', type(is_real).__name__)}"
        )
    if is_real.shape != logits.shape[:1]:
        raise ValueError(f"is_real must have shape ({len(logits)},), got {tuple(is_real.shape)}")
    return F.cross_entropy(logits.to(compute_dtype(logits.dtype)), is_real.long())
