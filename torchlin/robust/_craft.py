"""How an attack looks at a model: logits of x alone, with gradients to x alone, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from torchlin.nn import mixup_cross_entropy

Net = Callable[[Tensor], Tensor]
# Of logits (B, K) and targets: a number for each sample (B,).
Loss = Callable[[Tensor, Any], Tensor]


@contextmanager
def crafting(model: Net, model_training: bool = False) -> Iterator[Net]:
    """The model as a function of x. Training modes and buffers are what they were when the block ends.

    In eval mode, or with `model_training` in the mode that the model is in; then its buffers are copies for the time
    being, so that BatchNorm takes the statistics of the batch and its running ones stay untouched.
    """
    net = model.module if isinstance(model, DistributedDataParallel) else model
    modes: list[tuple[nn.Module, bool]] = []
    call = net
    if isinstance(net, nn.Module):
        if model_training:
            with torch.inference_mode(False):
                module, buffers = net, {name: buffer.clone() for name, buffer in net.named_buffers()}
            call = lambda x: functional_call(module, buffers, (x,))  # noqa: E731
        else:
            modes = [(module, module.training) for module in net.modules()]
            net.eval()
    try:
        # Gradients are needed although the caller may have switched them off to evaluate.
        with torch.inference_mode(False), torch.enable_grad():
            yield lambda x: _logits(call(x), x)
    finally:
        for module, mode in modes:
            module.training = mode


def _logits(output: Any, x: Tensor) -> Tensor:
    """Checked, and in float32 at least: half-precision logits lose what attacks live on."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(f"model must return logits ({len(x)}, classes), got {shape}")
    if logits.shape[1] < 2:
        raise ValueError(f"model must return logits of two classes or more, got {tuple(logits.shape)}")
    return logits if logits.dtype is torch.float64 else logits.float()


def gradient(net: Net, z: Tensor, target: Any, loss: Loss) -> Tensor:
    """The gradient of each sample's loss by the sample; parameters get none."""
    z = z.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(net(z), target).sum(), z)[0]


# --------------------------------------------------------------------------------------------------- losses


def cross_entropy(logits: Tensor, target: Any, label_smoothing: float = 0.0) -> Tensor:
    """Per sample (B,). Targets: classes (B,), probabilities (B, K), or pairs (y1, y2, weight of y1)."""
    return mixup_cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="none")


def log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """log Σ_{k≠y} exp(z_k) - z_y, the log-odds of y being wrong: the cross-entropy is log(1 + exp(this)).

    Both grow together and have the same steps, in exact arithmetic. But where a model is sure of y the gradient of the
    cross-entropy loses its largest term to rounding, and in the end all of them; this one does not.
    """
    own, others = without(logits, target)
    return others.logsumexp(1) - own


def margin(logits: Tensor, target: Tensor) -> Tensor:
    """The largest other logit less that of y: positive where the model is wrong."""
    own, others = without(logits, target)
    return others.amax(1) - own


def dlr(logits: Tensor, target: Tensor) -> Tensor:
    """The margin over z_(1) - z_(3): blind to shift and scale of the logits (arXiv:2003.01690, equation 3)."""
    if logits.shape[1] < 3:
        raise ValueError(f'loss: "dlr" needs three classes or more, got logits {tuple(logits.shape)}')
    top = logits.topk(3, dim=1).values
    return margin(logits, target) / (top[:, 0] - top[:, 2] + 1e-12)


def without(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The logit of the target (B,), and all logits with -inf in its place (B, K)."""
    if target.is_floating_point() or target.dim() != 1:
        raise ValueError(f"y must be classes ({len(logits)},), got {target.dtype} {tuple(target.shape)}")
    index = target.long()[:, None]
    return logits.gather(1, index)[:, 0], logits.scatter(1, index, -torch.inf)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "log_odds": log_odds, "margin": margin, "dlr": dlr}


def find_loss(loss: str | Loss, targeted: bool = False) -> Loss:
    """What an attack makes large: a loss by name, or the caller's; its negative where y is where to go to."""
    if callable(loss):
        found = loss
    elif loss in LOSSES:
        found = LOSSES[loss]
    else:
        raise ValueError(
            f"loss must be a function of (logits, y) or one of {', '.join(LOSSES)}, got {loss!r}"
        )
    return (lambda logits, y: -found(logits, y)) if targeted else found


def check_labels(x: Tensor, y: Any) -> Any:
    """Targets of as many samples as x has."""
    parts = y if isinstance(y, tuple) else (y,)
    for part in parts[:2]:
        if not isinstance(part, Tensor):
            raise TypeError(f"y must be a tensor of classes, got {type(part).__name__}")
        if part.dim() < 1 or len(part) != len(x):
            raise ValueError(f"y must be of the {len(x)} samples in x, got {tuple(part.shape)}")
    return y
