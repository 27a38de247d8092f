"""Mixup and rare features (Zou et al., arXiv 2303.08433); mixup and intruding mixes (Guo et al., arXiv 1809.02499).

    python -m torchlin.benchmarks.train_mixup [--only patches|line|digits] [--seeds 5]

docs/mixup-methods.md says what is measured, and what came of it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchlin.benchmarks import experiment, image_data
from torchlin.benchmarks.experiment import Experiment, Measured
from torchlin.nn import (
    AdaMixUp,
    IntrusionDiscriminator,
    Mixup,
    MixupSchedule,
    intrusion_loss,
    mixup_cross_entropy,
)

# ---------------------------------------------------------------- rare features, in patches (arXiv 2303.08433)


@dataclass(frozen=True)
class Patches:
    """Two classes; each sample has its class's common feature in one patch, or, rarely, its class's rare one.

    Of the other patches some hold a common feature of either class, faintly, and the rest noise, orthogonal to all
    features. Which patch is which differs from sample to sample.
    """

    samples: int = 200
    rare: float = 0.1
    width: int = 400
    patches: int = 5
    faint_patches: int = 1
    faint: float = 0.3
    noise: float = 0.15
    steps: int = 2000
    learning_rate: float = 0.2
    filters: int = 10
    initial: float = 0.01

    def draw(self, samples: int, rare: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(N, patches, width) and labels. The features are the first four unit vectors: v, u (common), v', u' (rare)."""
        y = torch.randint(0, 2, (samples,), generator=generator)
        is_rare = torch.arange(samples) < round(rare * samples)
        x = self.noise * torch.randn(samples, self.patches, self.width, generator=generator)
        x[:, :, :4] = 0
        order = torch.rand(samples, self.patches, generator=generator).argsort(1)
        rows = torch.arange(samples)
        for k in range(1 + self.faint_patches):
            x[rows, order[:, k]] = 0
        x[rows, order[:, 0], y + 2 * is_rare] = 1
        for k in range(1, 1 + self.faint_patches):
            x[rows, order[:, k], torch.randint(0, 2, (samples,), generator=generator)] = self.faint
        return x, y

    @property
    def text(self) -> str:
        return (
            f"{self.samples} samples, {100 * self.rare:g} % rare, {self.patches} patches of {self.width}, "
            f"noise {self.noise:g}, {self.steps} steps"
        )


class TwoLayerCNN(nn.Module):
    """F_k(x) = sum of <w_kr, x_p>^2 over filters r and patches p: the net of the paper's analysis."""

    def __init__(self, width: int, filters: int, initial: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(initial * torch.randn(2, filters, width, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        responses = x @ self.weight.flatten(0, 1).T  # (N, patches, 2 filters)
        return responses.square().sum(1).unflatten(1, self.weight.shape[:2]).sum(2)


PATCH_METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "mixup, Beta(1, 1)": {},
    "labels drawn on their own": {"lam_y": "independent"},
    "mixup, 0.6 : 0.4": {"lam_x": 0.6},
    "labels 0.9 : 0.1": {"lam_x": 0.6, "lam_y": 0.9},
    "0.6 : 0.4, first quarter only": {"lam_x": 0.6, "stop": 0.25},
    "0.6 : 0.4, first half only": {"lam_x": 0.6, "stop": 0.5},
}


def learn_patches(method: str, seed: int, protocol: Patches) -> tuple[TwoLayerCNN, float]:
    """The net, after so many steps of gradient descent on all samples, and its loss on them as they are."""
    generator = torch.Generator().manual_seed(seed)
    x, y = protocol.draw(protocol.samples, protocol.rare, generator)
    net = TwoLayerCNN(protocol.width, protocol.filters, protocol.initial, generator)
    optimizer = torch.optim.SGD(net.parameters(), lr=protocol.learning_rate)
    mix, schedule = None, None
    if (how := PATCH_METHODS[method]) is not None:
        how = dict(how)
        stop = how.pop("stop", 1.0)
        mix = Mixup(1.0, mode="elem", generator=generator, **how)
        schedule = MixupSchedule(mix, round(stop * protocol.steps))
    for _ in range(protocol.steps):
        inputs, target = (x, y) if mix is None else mix(x, y)
        loss = mixup_cross_entropy(net(inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    with torch.no_grad():
        return net, mixup_cross_entropy(net(x), y).item()


@torch.no_grad()
def accuracy(net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """In per cent."""
    return 100 * (net(x).argmax(1) == y).double().mean().item()


def measure_patches(method: str, seed: int, protocol: Patches) -> dict[str, float]:
    net, loss = learn_patches(method, seed, protocol)
    generator = torch.Generator().manual_seed(1000 + seed)
    common, rare = (accuracy(net, *protocol.draw(2000, share, generator)) for share in (0, 1))
    strength = net.weight.detach().square().sum(1)  # (2, width), of each direction in each output
    learnt = strength[0, 2] - strength[1, 2] + strength[1, 3] - strength[0, 3]
    return {
        "accuracy, common": common,
        "accuracy, rare": rare,
        "rare feature's margin": learnt.item() / 2,
        "training loss": loss,
    }


# ------------------------------------------------------------------- mixes that intrude (arXiv 1809.02499)


@dataclass(frozen=True)
class Task:
    """Samples of several classes, in any shape, with bodies of nets for them."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int
    body: Callable[[], nn.Module]
    feat_dim: int
    epochs: int
    batch: int = 64
    learning_rate: float = 2e-3


def line(samples: int = 512, width: int = 16, noise: float = 0.2, epochs: int = 40) -> Task:
    """Class 0 on both sides of class 1: a mix of two samples of class 0 may be a sample of class 1.

    Every element shares in the place (0, 1 or 2 along the diagonal), and it is never negative: the noise with which the
    policy sees a pair hides the sign of each element.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        place = torch.randint(0, 3, (count,), generator=generator)
        x = noise * torch.randn(count, width, generator=generator)
        return x + place.unsqueeze(1) / width**0.5, (place == 1).long()

    def body() -> nn.Module:
        return nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())

    return Task(*draw(samples), *draw(4000), 2, body, 64, epochs)


def digits(images: int = 300, epochs: int = 60) -> Task:
    """Few of scikit-learn's digits, pixels in [0, 1], as the paper mixes them."""
    data = image_data.load("digits").first(images)
    low, high = data.train.min(), data.train.max()
    train, test = ((x - low) / (high - low) for x in (data.train, data.test))

    def body() -> nn.Module:
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        return nn.Sequential(*layers)

    return Task(train, data.train_labels, test, data.test_labels, data.classes, body, 128, epochs)


@dataclass(frozen=True)
class Ada:
    critic: float = 1.0  # weight of the critic's loss
    policy_rate: float = 1.0  # learning rate of the policy, over the classifier's


INTRUSION_METHODS: dict[str, Ada | None] = {
    "plain": None,
    "mixup": None,
    "AdaMixUp": Ada(),
    "AdaMixUp, policy's rate 1/10": Ada(policy_rate=0.1),
    "AdaMixUp, critic's loss times 3": Ada(critic=3.0),
}


class Classifier(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.body = task.body()
        self.last = nn.Linear(task.feat_dim, task.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x))


def learn_task(method: str, seed: int, task: Task) -> tuple[Classifier, Mixup | AdaMixUp | None]:
    """As the paper trains: half of each batch is mixed, and the classifier sees these mixes and the originals.

    AdaMixUp's critic takes both originals and the other half, which no mix was made of, for real. The others are trained
    on the same first halves.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net, critic = Classifier(task), IntrusionDiscriminator(task.feat_dim, task.classes)
    groups: list[dict[str, Any]] = [{"params": [*net.parameters(), *critic.parameters()]}]
    mix: Mixup | AdaMixUp | None = None
    if (ada := INTRUSION_METHODS[method]) is not None:
        mix = AdaMixUp(task.body(), task.feat_dim, generator=generator)
        groups.append({"params": list(mix.parameters()), "lr": ada.policy_rate * task.learning_rate})
    elif method == "mixup":
        mix = Mixup(1.0, mode="elem", generator=generator)
    optimizer = torch.optim.Adam(groups, lr=task.learning_rate)
    for _ in range(task.epochs):
        for places in torch.randperm(len(task.train), generator=generator).split(2 * task.batch):
            seen, unseen = places.tensor_split(2)
            x, y = task.train[seen], task.train_labels[seen]
            loss = mixup_cross_entropy(net(x), y)
            if mix is not None:
                mixed, target = mix(x, y)
                features = net.body(mixed)
                loss = (loss + mixup_cross_entropy(net.last(features), target)) / 2
                if ada is not None:
                    real = net.body(torch.cat([x, task.train[unseen]]))
                    logits = critic(torch.cat([real, features]))
                    loss = loss + ada.critic * intrusion_loss(logits, torch.arange(len(logits)) < len(real))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net, mix


@torch.no_grad()
def intruding(mix: Mixup | AdaMixUp | None, task: Task) -> float:
    """Of a batch of mixes, the share whose nearest held-out sample has a class that neither parent has, in per cent.

    Without mixing it is the error of the nearest neighbour.
    """
    x, y = task.train, task.train_labels
    mixed, (y1, y2, _) = (x, (y, y, None)) if mix is None else mix(x, y)
    distances = torch.cdist(mixed.flatten(1), task.test.flatten(1))
    nearest = task.test_labels[distances.argmin(1)]
    return 100 * ((nearest != y1) & (nearest != y2)).double().mean().item()


@torch.no_grad()
def measure_task(method: str, seed: int, task: Task) -> dict[str, float]:
    with torch.enable_grad():
        net, mix = learn_task(method, seed, task)
    found = {
        "accuracy": accuracy(net.eval(), task.test, task.test_labels),
        "test loss": F.cross_entropy(net(task.test), task.test_labels).item(),
        "intruding mixes, %": intruding(mix, task),
    }
    if isinstance(mix, AdaMixUp):
        a, delta, _ = mix.region(task.train, task.train.roll(1, 0))
        found |= {"lowest λ": a.mean().item(), "highest λ": (a + delta).mean().item()}
        found["deviation of lowest λ over pairs"] = a.std().item()
    elif mix is not None:
        found |= {"lowest λ": 0.0, "highest λ": 1.0}
    return found


# ------------------------------------------------------------------------------------------------------- main


def plot_patches(rows: Sequence[Measured], path: Path) -> None:
    """Accuracy on rare-feature samples, each seed a dot, the mean as a bar, one line a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found: dict[str, list[float]] = {}
    for row in rows:
        if row.quantity == "accuracy, rare":
            found.setdefault(row.method, []).append(row.value)
    drawing, axes = plt.subplots(figsize=(7, 0.9 + 0.35 * len(found)), layout="constrained")
    for y, values in enumerate(reversed(found.values())):
        axes.plot(values, [y] * len(values), "o", color="tab:blue", alpha=0.45, markersize=5)
        axes.plot(sum(values) / len(values), y, "|", color="black", markersize=16, markeredgewidth=1.6)
    axes.set_yticks(range(len(found)), list(reversed(found)))
    axes.axvline(50, color="gray", linewidth=0.8, linestyle=":")
    axes.set_xlabel("accuracy on samples with the rare feature, %")
    axes.grid(axis="x", alpha=0.3)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


def _experiments(quick: bool, only: str | None) -> list[Experiment]:
    patches = Patches(width=20, steps=20) if quick else Patches()
    found = [
        Experiment(
            "patches", patches.text, list(PATCH_METHODS), functools.partial(measure_patches, protocol=patches)
        )
    ]
    epochs = {"epochs": 1} if quick else {}
    tasks: dict[str, Callable[..., Task]] = {"line": line, "digits": digits}
    for name, make in tasks.items():
        if only in (None, name):
            task = make(**epochs)
            setting = f"{len(task.train)} training and {len(task.test)} test samples, {task.epochs} epochs"
            run = functools.partial(measure_task, task=task)
            found.append(Experiment(name, setting, list(INTRUSION_METHODS), run))
    return [e for e in found if only in (None, e.name)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiments; returns the process's exit status."""
    parser = experiment.parser(
        "torchlin.benchmarks.train_mixup", __doc__.splitlines()[0], ("patches", "line", "digits"), seeds=5
    )
    args = parser.parse_args(argv)
    return experiment.run("mixup", _experiments(args.quick, args.only), args, {"patches": plot_patches})


if __name__ == "__main__":
    sys.exit(main())
