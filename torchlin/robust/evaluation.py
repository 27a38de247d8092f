"""Accuracy of a model on clean and on attacked samples, by several attacks, one of them without gradients."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchlin._console import progress, table
from torchlin.robust import attacks as made
from torchlin.robust._ball import Ball, Clip, Eps, check_norm
from torchlin.robust._craft import crafting

Attack = Callable[..., Tensor]
DEFAULT = ("fgsm", "pgd-20-2", "apgd-50", "square-500")
MASKED = (
    0.02  # an attack without gradients beats the ones with them by so much: their gradients tell them nothing
)
WITHOUT_GRADIENTS = ("square",)


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found: accuracies in [0, 1] by attack; "clean" is without one, "worst" against all of them."""

    accuracy: Mapping[str, float]
    samples: int
    setting: str = field(repr=False)

    def __getitem__(self, attack: str) -> float:
        return self.accuracy[attack]

    @property
    def masked(self) -> bool:
        """Whether the attack without gradients does better than all others: then their figures mean nothing."""
        blind = [a for name, a in self.accuracy.items() if name.startswith(WITHOUT_GRADIENTS)]
        seeing = [
            a
            for name, a in self.accuracy.items()
            if name not in ("clean", "worst") and not name.startswith(WITHOUT_GRADIENTS)
        ]
        return bool(blind and seeing) and min(blind) < min(seeing) - MASKED

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {100 * value:.1f}" for name, value in self.accuracy.items())
        return f"accuracy in % on {self.samples} samples, {self.setting}: {figures}"

    def table(self) -> None:
        """Prints one line an attack."""
        rows = [(name, f"{100 * value:.1f}") for name, value in self.accuracy.items()]
        table(f"accuracy on {self.samples} samples, {self.setting}", ("attack", "%"), rows)
        if self.masked:
            print("gradients are masked: the attack without gradients does better than those with them")


def evaluate(
    model: Callable[[Tensor], Tensor],
    data: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]],
    eps: Eps,
    *,
    attacks: Sequence[str] | Mapping[str, str | Attack] = DEFAULT,
    norm: str = "linf",
    clip: Clip = None,
    batch_size: int = 500,
    generator: torch.Generator | None = None,
) -> Evaluation:
    """Accuracy of a model in eval mode on samples as they are, and against each attack.

    Each attack is tried on the samples that the model gets right; a sample counts for "worst" if no attack changes that.

    Args:
        model: returns logits (B, K). It is as it was afterwards, training mode included.
        data: (x, y), or batches of them, as a DataLoader gives; moved to the model's device.
        attacks: names: "fgsm", "pgd-20-2" (20 steps of eps / 4, 2 starts; "pgd-50-10" is the papers' PGD-50-10),
            "apgd-50" (of steps; "-ce" or "-dlr" after it, both by default), "multi-20" (multi-targeted, of steps),
            "square-500" (of queries). The iterated ones make the cross-entropy large in the form "log_odds", which loses
            nothing to rounding; "fgsm" takes it as it is. Or a dict of names to such names or to functions (model, x, y)
            that return x_adv.
        eps, norm, clip: as for :func:`torchlin.robust.fgsm`. "square" is of linf only.
        batch_size: into which (x, y) is split.
        generator: draws the starts; on the device of the data.

    Example:
        >>> import torch
        >>> from torchlin.robust import evaluate
        >>> x = torch.tensor([[0.3, 0.0], [0.0, 0.1]])
        >>> found = evaluate(torch.nn.Flatten(), (x, torch.tensor([0, 1])), eps=0.1, attacks=("fgsm", "pgd-10-1"))
        >>> print(found)
        accuracy in % on 2 samples, linf, eps 0.1: clean 100.0, fgsm 50.0, pgd-10-1 50.0, worst 50.0
    """
    norm = check_norm(norm)
    run = _attacks(attacks, eps, norm, clip, generator)
    batches = _batches(data, batch_size)
    right = {name: 0 for name in ("clean", *run, "worst")}
    samples, doubted = 0, False
    device = next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None
    known = len(batches) * (1 + len(run)) if isinstance(batches, Sequence) else None
    with progress(known, "evaluating") if known else progress(0, "evaluating") as bar:
        for x, y in batches:
            x, y = x.to(device or x.device), y.to(device or y.device)
            if not samples:
                _check_range(x, clip)
            with crafting(model) as net, torch.no_grad():
                logits = net(x)
            doubted = doubted or _look_like_probabilities(logits)
            held = logits.argmax(1) == y
            samples += len(x)
            right["clean"] += int(held.sum())
            bar.advance(description="evaluating")
            still = held.clone()
            for name, attack in run.items():
                left = held.nonzero()[:, 0]
                if len(left):
                    z = attack(model, x[left], y[left])
                    with crafting(model) as net, torch.no_grad():
                        stays = net(z).argmax(1) == y[left]
                    right[name] += int(stays.sum())
                    still[left[~stays]] = False
                bar.advance(description=f"evaluating {name}")
            right["worst"] += int(still.sum())
    if not samples:
        raise ValueError("data must hold at least one sample, got none")
    if doubted:
        warnings.warn(
            "the model's outputs look like probabilities: attacks need logits, and find much less without them",
            stacklevel=2,
        )
    size = f"{eps:g}" if isinstance(eps, (int, float)) else "per channel"
    return Evaluation({name: n / samples for name, n in right.items()}, samples, f"{norm}, eps {size}")


def _batches(data: Any, batch_size: int) -> Any:
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        x, y = data
        if len(x) != len(y):
            raise ValueError(f"data: x has {len(x)} samples, y has {len(y)}")
        return list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    return data


def _check_range(x: Tensor, clip: Clip) -> None:
    """Inputs outside of clip would be moved into it by the attack: they are normalised, or the range is wrong."""
    if clip is not None and not torch.equal(Ball.around(x, 0.0, "linf", clip).inside_clip(x), x):
        raise ValueError(
            f"clip: x reaches from {float(x.min()):.4g} to {float(x.max()):.4g}, which is outside of it; for normalised inputs "
            "see torchlin.robust.normalized_ball"
        )


def _look_like_probabilities(logits: Tensor) -> bool:
    one = torch.ones_like(logits[:, 0])
    return bool((logits >= 0).all()) and torch.allclose(logits.sum(1), one, atol=1e-3)


# -------------------------------------------------------------------------------------------------- attacks


def _attacks(
    attacks: Sequence[str] | Mapping[str, str | Attack],
    eps: Eps,
    norm: str,
    clip: Clip,
    generator: torch.Generator | None,
) -> dict[str, Attack]:
    if isinstance(attacks, str):
        raise TypeError(f"attacks must be a sequence of names or a dict, got the str {attacks!r}")
    named = attacks if isinstance(attacks, Mapping) else {name: name for name in attacks}
    if taken := {"clean", "worst"} & set(named):
        raise ValueError(f"attacks: {taken.pop()!r} is always there, and no name of an attack")
    return {
        name: find_attack(attack, eps, norm, clip, generator) if isinstance(attack, str) else attack
        for name, attack in named.items()
    }


def find_attack(name: str, eps: Eps, norm: str, clip: Clip, generator: torch.Generator | None) -> Attack:
    """A function of (model, x, y) for a name such as "pgd-50-10"."""
    kind, *words = name.lower().split("-")
    counts = [int(word) for word in words if re.fullmatch("[1-9][0-9]*", word)]
    losses = [word for word in words if word in ("ce", "dlr")]
    known = {"fgsm": 0, "pgd": 2, "apgd": 1, "multi": 1, "square": 1}
    unfit = len(counts) + len(losses) != len(words) or (losses and kind != "apgd")
    if kind not in known or unfit or len(counts) > known[kind]:
        raise ValueError(
            f"attacks: {name!r} is no attack; there are fgsm, pgd-STEPS-STARTS, apgd-STEPS (-ce, -dlr), multi-STEPS and "
            "square-QUERIES"
        )
    how: dict[str, Any] = {"norm": norm, "clip": clip}
    if kind == "fgsm":
        return partial(_call, made.fgsm, eps, how)
    how["generator"] = generator
    if kind == "square":
        if norm != "linf":
            raise ValueError(f'attacks: square is of norm="linf", got norm={norm!r}')
        del how["norm"]
        return partial(_call, made.square, eps, {**how, "n_queries": (*counts, 500)[0]})
    how["steps"] = (*counts, 20)[0]
    if kind == "pgd":
        return partial(_call, made.pgd, eps, {**how, "loss": "log_odds", "restarts": (*counts[1:], 1)[0]})
    if kind == "multi":
        return partial(_call, made.multi_targeted, eps, how)
    return partial(_apgd, eps, how, losses or ["ce", "dlr"])


def _call(attack: Attack, eps: Eps, how: dict[str, Any], model: Any, x: Tensor, y: Tensor) -> Tensor:
    return attack(model, x, y, eps, **how)


def _apgd(eps: Eps, how: dict[str, Any], losses: list[str], model: Any, x: Tensor, y: Tensor) -> Tensor:
    """With each loss in turn, on the samples that the one before has left."""
    found, left = x.clone(), torch.arange(len(x), device=x.device)
    for loss in losses:
        objective = "log_odds" if loss == "ce" else loss
        found[left] = made.apgd(model, x[left], y[left], eps, loss=objective, **how)
        with crafting(model) as net, torch.no_grad():
            left = left[net(found[left]).argmax(1) == y[left]]
        if not len(left):
            break
    return found
