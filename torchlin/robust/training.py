"""The loss on attacked samples, and a training loop around it and ELLE or one of its peers."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchlin._console import progress, table
from torchlin.robust._ball import Clip, Eps, check_eps
from torchlin.robust._craft import cross_entropy
from torchlin.robust.attacks import fgsm, n_fgsm, pgd
from torchlin.robust.elle import ELLE
from torchlin.robust.peers import CURE, LLR, TRADES, GradAlign
from torchlin.robust.regularizer import LossFn, Regularizer

ATTACKS: dict[str, Callable[..., Tensor]] = {"fgsm": fgsm, "n-fgsm": n_fgsm, "pgd": pgd}
TERMS: dict[str, Callable[..., Regularizer]] = {
    "elle": ELLE,
    "elle-a": partial(ELLE, adaptive=True),
    "gradalign": GradAlign,
    "llr": LLR,
    "cure": CURE,
    "trades": TRADES,
}
METHODS = f"{' or '.join(ATTACKS)} or standard, alone or with + and one of {', '.join(TERMS)}"


def adversarial_loss(
    model: Callable[[Tensor], Any],
    x: Tensor,
    y: Any,
    attack: str | Callable[..., Tensor] = "fgsm",
    eps: Eps = 8 / 255,
    *,
    loss_fn: LossFn | None = None,
    **options: Any,
) -> Tensor:
    """The mean cross-entropy of the model on attacked samples: what adversarial training makes small.

    Args:
        model: is in training mode here; the attack is crafted in eval mode unless ``model_training=True``.
        x, y: samples (B, ...) and classes (B,) or probabilities (B, K).
        attack: "fgsm", "n-fgsm", "pgd", or a function (model, x, y, eps, **options) that returns attacked samples.
        eps: radius of the ball in x's units.
        loss_fn: another loss, of (model's output, y), that returns one number a sample.
        options: of the attack: ``alpha``, ``clip``, ``steps``, ``model_training`` ...

    Example:
        >>> import torch
        >>> from torchlin.robust import adversarial_loss
        >>> model = torch.nn.Linear(4, 3)
        >>> adversarial_loss(model, torch.randn(8, 4), torch.zeros(8, dtype=torch.long), eps=0.1).backward()
    """
    if not callable(attack) and attack not in ATTACKS:
        raise ValueError(f"attack must be a function or one of {', '.join(ATTACKS)}, got {attack!r}")
    craft = attack if callable(attack) else ATTACKS[attack]
    return (loss_fn or cross_entropy)(model(craft(model, x, y, eps, **options)), y).mean()


# --------------------------------------------------------------------------------------------------- method


def method_parts(method: str) -> tuple[str, str]:
    """The attack and the term of a method: ("fgsm", "elle-a") of "fgsm+elle-a" or "elle-a"; "" where there is none."""
    words = [word.strip() for word in method.lower().split("+")]
    if len(words) == 1 and words[0] in TERMS:
        words = ["standard" if words[0] == "trades" else "fgsm", *words]
    attack, term = (*words, "")[:2]
    if len(words) > 2 or attack not in ("standard", *ATTACKS) or (len(words) == 2 and term not in TERMS):
        raise ValueError(f"method must be {METHODS}, got {method!r}")
    return "" if attack == "standard" else attack, term


class Step:
    """The loss of one batch by a method; the radius may change between steps."""

    def __init__(
        self,
        model: nn.Module,
        method: str,
        eps: Eps,
        clip: Clip,
        attack: Mapping[str, Any],
        term: Mapping[str, Any],
    ) -> None:
        self.model, self.eps = model, eps
        kind, name = method_parts(method)
        self.craft = partial(ATTACKS[kind], clip=clip, **attack) if kind else None
        self.term = TERMS[name](model, eps, **term) if name else None
        self._alpha = attack.get("alpha")
        if isinstance(self.term, TRADES) and self.craft is not None:
            raise ValueError(f'method: TRADES makes attacks of its own; take "trades", not {method!r}')

    def __call__(self, x: Tensor, y: Any, ramp: float = 1.0) -> Tensor:
        eps = self.eps * ramp
        x_adv = x
        if self.craft is not None:
            alpha = {} if self._alpha is None else {"alpha": self._alpha * ramp}
            x_adv = self.craft(self.model, x, y, eps, **alpha)
        if self.term is None:
            return cross_entropy(self.model(x_adv), y).mean()
        self.term.eps = eps
        return self.term(x, y, x_adv)


# ----------------------------------------------------------------------------------------------------- loop


@dataclass
class Training:
    """What :func:`train` did: a dict an epoch, and the averaged model where there is one."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    ema: nn.Module | None = field(default=None, repr=False)

    def table(self) -> None:
        """Prints a line an epoch."""
        columns = list(dict.fromkeys(key for row in self.epochs for key in row))
        rows = [[_short(row.get(key)) for key in columns] for row in self.epochs]
        table("", columns, rows)


def _short(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def triangle(progress: float) -> float:
    """0 to 1 to 0: the cyclic learning rate of fast adversarial training."""
    return 2 * min(progress, 1 - progress)


def train(
    model: nn.Module,
    data: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]],
    *,
    method: str = "fgsm+elle-a",
    eps: Eps,
    epochs: int,
    batch_size: int = 128,
    lr: float = 0.1,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    schedule: Callable[[float], float] = triangle,
    eps_warmup: float = 0.0,
    clip: Clip = None,
    attack: Mapping[str, Any] | None = None,
    term: Mapping[str, Any] | None = None,
    ema: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    on_epoch: Callable[[int, nn.Module], Mapping[str, float]] | None = None,
) -> Training:
    """Train a classifier on attacked samples, in place.

    All randomness is torch's own: ``torch.manual_seed`` before the model is made fixes a run.

    Args:
        model: returns logits (B, K); left in training mode.
        data: (x, y) on any device, shuffled anew each epoch; or batches of them, as a DataLoader gives.
        method: an attack, "fgsm", "n-fgsm", "pgd" or "standard" (none), alone or with a term: "fgsm+elle", "fgsm+elle-a",
            "n-fgsm+elle-a", "fgsm+gradalign", "fgsm+llr", "fgsm+cure", or "trades". "elle-a" is short for "fgsm+elle-a".
        eps: radius of the ball in x's units.
        epochs: how many in all; those in the checkpoint count.
        batch_size: of (x, y); a last, smaller batch is left out.
        lr: largest learning rate of SGD with momentum 0.9 and weight decay 5e-4.
        optimizer: makes another one of the parameters: ``lambda p: torch.optim.AdamW(p, 1e-3)``.
        schedule: factor of the learning rate, of the share of all steps that is done: a triangle.
        eps_warmup: epochs over which eps (and alpha) grow from 0.
        clip: (lowest, highest) value of an attacked input.
        attack: options of the attack, as ``{"steps": 4, "model_training": True}``.
        term: options of the term, as ``{"lam": 300.0}``; it has a clip of its own, none by default.
        ema: decay of an exponential average of the weights, returned as ``.ema``.
        checkpoint: file that is written after each epoch, whole or not at all. If it is there, training goes on from it, and
            ends with the very numbers that an uninterrupted run has: optimizer, schedule, ELLE-A's state, average and the
            states of torch's and Python's random numbers are in it. (Workers of a DataLoader are seeded by torch's.)
        on_epoch: called with (epoch, model) after each; its figures join the epoch's row. Numbers that it draws from torch's
            own generator change the run: give its attacks a generator.

    Raises:
        ValueError: an argument has a value that it can not have; the checkpoint is of other settings.
        FloatingPointError: the loss of an epoch is not finite.

    Example:
        >>> import torch
        >>> from torchlin.robust import train
        >>> model = torch.nn.Linear(8, 3)
        >>> data = torch.randn(64, 8), torch.randint(3, (64,))
        >>> done = train(model, data, method="elle-a", eps=0.1, epochs=2, batch_size=16, term={"lam": 10.0})
        >>> [sorted(row) for row in done.epochs][0]
        ['epoch', 'error', 'lam', 'loss', 'seconds']
    """
    eps = check_eps(eps)
    step = Step(model, method, eps, clip, attack or {}, term or {})
    parameters = [p for p in model.parameters() if p.requires_grad]
    updates = (
        torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=5e-4)
        if optimizer is None
        else optimizer(parameters)
    )
    length = _length(data, batch_size)
    total = epochs * length
    rate = torch.optim.lr_scheduler.LambdaLR(updates, lambda done: schedule(done / total))
    average = None if ema is None else _average(model, ema)
    state = _State(model, updates, rate, step.term, average)
    settings = {"method": method, "eps": str(eps), "epochs": epochs, "batches": length}
    path = None if checkpoint is None else Path(checkpoint)
    rows = state.load(path, settings) if path is not None and path.exists() else []

    model.train()
    device = next(model.parameters()).device
    with progress(total - len(rows) * length, f"training, {method}") as bar:
        for epoch in range(len(rows), epochs):
            begun, sums = time.perf_counter(), torch.zeros(2, dtype=torch.float64, device=device)
            for i, (x, y) in enumerate(_batches(data, batch_size)):
                x, y = x.to(device), y.to(device)
                done = epoch + (i + 1) / length
                loss = step(x, y, min(1.0, done / eps_warmup) if eps_warmup else 1.0)
                updates.zero_grad()
                loss.backward()
                updates.step()
                rate.step()
                if average is not None:
                    average.update_parameters(model)
                sums += torch.stack((loss.detach(), getattr(step.term, "error", loss.detach()))).double()
                bar.advance()
            means = (sums / length).tolist()
            row = {"epoch": epoch + 1, "loss": means[0], "seconds": time.perf_counter() - begun}
            if isinstance(step.term, ELLE):
                row |= {"error": means[1], "lam": float(step.term.lam)}
            if not torch.isfinite(sums[0]):
                raise FloatingPointError(f"the loss is {means[0]} in epoch {epoch + 1} of {method}")
            if on_epoch is not None:
                row |= on_epoch(epoch + 1, model)
                model.train()
            rows.append(row)
            if path is not None:
                state.save(path, settings, rows)
    return Training(rows, None if average is None else average.module)


def _length(data: Any, batch_size: int) -> int:
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        if len(data[0]) != len(data[1]):
            raise ValueError(f"data: x has {len(data[0])} samples, y has {len(data[1])}")
        if len(data[0]) < batch_size:
            raise ValueError(f"batch_size must be at most the {len(data[0])} samples, got {batch_size}")
        return len(data[0]) // batch_size
    if not isinstance(data, Sized) or not len(data):
        raise ValueError("data must be (x, y), or batches that have a length, as a DataLoader; and not empty")
    return len(data)


def _batches(data: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    if not (isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor)):
        yield from data
        return
    x, y = data
    order = torch.randperm(len(x))
    for places in order[: len(x) // batch_size * batch_size].split(batch_size):
        yield x[places], y[places]


def _average(model: nn.Module, decay: float) -> AveragedModel:
    if not 0 <= decay < 1:
        raise ValueError(f"ema must be a decay in [0, 1), got {decay}")
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


# ----------------------------------------------------------------------------------------------- checkpoint


class _State:
    """All that a run goes on from."""

    def __init__(self, model: nn.Module, *parts: Any) -> None:
        names = ("optimizer", "schedule", "term", "average")
        self.parts = {"model": model, **{n: p for n, p in zip(names, parts, strict=True) if p is not None}}

    def save(self, path: Path, settings: dict[str, Any], rows: list[dict[str, float]]) -> None:
        state: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"settings": settings, "rows": rows, "random": _random_state()}
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".new")
        torch.save(state, beside)
        os.replace(beside, path)

    def load(self, path: Path, settings: dict[str, Any]) -> list[dict[str, float]]:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state.get("settings") != settings:
            raise ValueError(
                f"checkpoint: {path} is of another run, {state.get('settings')}, and not of {settings}"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        _set_random_state(state["random"])
        return state["rows"]


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
