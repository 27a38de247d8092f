"""What a projection head does to the features before it, after Xue et al. (arXiv 2403.11391).

    python -m torchlin.benchmarks.train_projection [--only weights|mismatch] [--seeds 5]

docs/projection-head.md says what is measured, and what came of it.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from torchlin.benchmarks import experiment
from torchlin.benchmarks.experiment import Experiment, Measured
from torchlin.nn import IdentityHead, ProjectionHead, ReweightingHead, spectral_contrastive_loss


@dataclass(frozen=True)
class Features:
    """Samples of independent features ±1, which the augmentation disturbs by noise of each one's own deviation."""

    noise: Tensor  # (D,)

    @property
    def count(self) -> int:
        return len(self.noise)

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        signs = torch.randint(0, 2, (samples, self.count), generator=generator)
        return signs.mul(2).sub(1).float()

    def augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x + self.noise * torch.randn(x.shape, generator=generator)

    @property
    def solution(self) -> Tensor:
        """|W e_i| of the best linear map: the loss is -2 tr(M Σ⁺) + tr(M Σ M Σ) with M = WᵀW, Σ⁺ = I, Σ = I + diag(noise²)."""
        return 1 / (1 + self.noise.square())


@dataclass(frozen=True)
class Protocol:
    features: int = 16
    most_noise: float = 3.0  # of the last feature; the first has none
    batch: int = 256
    steps: int = 5000
    learning_rate: float = 0.01
    initial: float = 0.1  # gain of orthogonal weights: small, and balanced between the layers
    kappa: float = 1.1
    labels: int = 16  # labelled samples of the downstream task
    probe_noise: float = 0.3  # of the downstream samples, the same for all features
    ridge: float = 1.0

    def data(self) -> Features:
        return Features(torch.linspace(0, self.most_noise, self.features))

    @property
    def text(self) -> str:
        return (
            f"{self.features} features, noise 0 to {self.most_noise:g}, batches of {self.batch}, {self.steps} steps of "
            f"SGD at {self.learning_rate:g}, kappa {self.kappa:g}"
        )


HEADS: dict[str, Callable[[int, float], nn.Module]] = {
    "no head": lambda dim, kappa: nn.Identity(),
    "linear head": lambda dim, kappa: ProjectionHead(dim, dim, dim, num_layers=1, bias=False),
    "identity head": lambda dim, kappa: IdentityHead(dim),
    "MLP head": lambda dim, kappa: ProjectionHead(dim, dim, dim, norm=None, bias=False),
    "reweighting head": lambda dim, kappa: ReweightingHead(dim, kappa),
}


@functools.cache
def train(head: str, seed: int, protocol: Protocol) -> tuple[nn.Module, nn.Module]:
    """Encoder and head after training with the spectral contrastive loss. Both experiments look at the same nets."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data = protocol.data()
    encoder, top = nn.Linear(data.count, data.count, bias=False), HEADS[head](data.count, protocol.kappa)
    small: list[nn.Module] = [encoder, *top.modules()] if head == "linear head" else [encoder]
    for layer in small:  # the others start as they usually do: an MLP of little weight would never leave zero
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain=protocol.initial)
    net = nn.Sequential(encoder, top)
    optimizer = torch.optim.SGD(net.parameters(), lr=protocol.learning_rate)
    for _ in range(protocol.steps):
        x = data.draw(protocol.batch, generator)
        views = net(torch.cat([data.augment(x, generator), data.augment(x, generator)]))
        optimizer.zero_grad()
        spectral_contrastive_loss(*views.chunk(2)).backward()
        optimizer.step()
    return encoder.eval(), top.eval()


@torch.no_grad()
def weights(map: Callable[[Tensor], Tensor], features: int, generator: torch.Generator) -> Tensor:
    """How strongly each feature is in a representation: the norm of its coefficients in the best linear fit, (D,)."""
    x = torch.randint(0, 2, (8192, features), generator=generator).mul(2).sub(1).float()
    return torch.linalg.lstsq(x, map(x)).solution.norm(dim=1)


@torch.no_grad()
def probe(
    map: Callable[[Tensor], Tensor], label: int, protocol: Protocol, generator: torch.Generator
) -> float:
    """Accuracy of a ridge classifier of few labelled samples, whose label is one feature's sign."""
    data = protocol.data()
    x, unseen = data.draw(protocol.labels, generator), data.draw(2000, generator)
    y, expected = x[:, label], unseen[:, label]
    noisy, unseen = (
        v + protocol.probe_noise * torch.randn(v.shape, generator=generator) for v in (x, unseen)
    )
    z, tested = map(noisy), map(unseen)
    scale = z.square().mean().sqrt() * z.shape[1] ** 0.5  # the ridge means the same for every representation
    z, tested = z / scale, tested / scale
    gram = z @ z.T + protocol.ridge / protocol.labels * torch.eye(len(z))
    answer = tested @ (z.T @ torch.linalg.solve(gram, y))
    return 100 * (answer.sign() == expected).double().mean().item()


def measure_weights(method: str, seed: int, protocol: Protocol) -> dict[str, float]:
    encoder, top = train(method, seed, protocol)
    generator = torch.Generator().manual_seed(1000 + seed)
    before = weights(encoder, protocol.features, generator)
    after = weights(nn.Sequential(encoder, top), protocol.features, generator)
    data = protocol.data()
    expected, x = data.solution, data.draw(4096, generator)
    with torch.no_grad():
        views = [top(encoder(data.augment(x, generator))) for _ in range(2)]
    return {
        "loss": spectral_contrastive_loss(*views).item(),
        "best linear loss": -expected.square().sum().item(),
        "strongest over weakest weight, before": (before.max() / before.min()).item(),
        "after": (after.max() / after.min()).item(),
        "theory, before": (expected.max() / expected.min()).sqrt().item(),
        "theory, after": (expected.max() / expected.min()).item(),
    }


def measure_mismatch(method: str, seed: int, protocol: Protocol) -> dict[str, float]:
    encoder, top = train(method, seed, protocol)
    found = {}
    places = {"least": 0, "middle": protocol.features // 2, "most": protocol.features - 1}
    representations: dict[str, Callable[[Tensor], Tensor]] = {
        "before": encoder,
        "after": nn.Sequential(encoder, top),
    }
    for where, representation in representations.items():
        for name, label in places.items():
            generator = torch.Generator().manual_seed(2000 + seed)
            repeats = [probe(representation, label, protocol, generator) for _ in range(20)]
            found[f"{where}, {name} disturbed"] = statistics.fmean(repeats)
    return found


def plot(protocol: Protocol, seed: int = 0) -> Callable[[Sequence[Measured], Path], None]:
    """Weights of all features before and after each head, and what theory says, of one seed."""

    def draw(rows: Sequence[Measured], path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        drawing, panels = plt.subplots(
            1, len(HEADS), figsize=(3 * len(HEADS), 3), sharey=True, layout="constrained"
        )
        noise, expected = protocol.data().noise, protocol.data().solution
        for axes, name in zip(panels, HEADS, strict=True):
            encoder, top = train(name, seed, protocol)
            generator = torch.Generator().manual_seed(1000 + seed)
            axes.plot(noise, weights(encoder, protocol.features, generator), label="before the head")
            if name != "no head":
                after = weights(nn.Sequential(encoder, top), protocol.features, generator)
                axes.plot(noise, after, label="after it")
            axes.plot(noise, expected, "k:", linewidth=1, label="1 / (1 + noise²)")
            axes.plot(noise, expected.sqrt(), "k--", linewidth=1, label="its root")
            axes.set_title(name, fontsize=10)
            axes.set_xlabel("augmentation noise of the feature")
        panels[0].set_ylim(bottom=0)
        panels[0].set_ylabel("weight of the feature")
        panels[1].legend(fontsize=7)
        drawing.savefig(path, dpi=110)
        plt.close(drawing)

    return draw


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiments; returns the process's exit status."""
    parser = experiment.parser(
        "torchlin.benchmarks.train_projection", __doc__.splitlines()[0], ("weights", "mismatch"), seeds=5
    )
    args = parser.parse_args(argv)
    protocol = Protocol(features=8, batch=64, steps=20) if args.quick else Protocol()
    what = f"{protocol.text}; {{}}"
    experiments = [
        Experiment(
            "weights", protocol.text, list(HEADS), functools.partial(measure_weights, protocol=protocol)
        ),
        Experiment(
            "mismatch",
            what.format(f"ridge probe of {protocol.labels} labels, accuracy in %"),
            list(HEADS),
            functools.partial(measure_mismatch, protocol=protocol),
        ),
    ]
    chosen = [e for e in experiments if args.only in (None, e.name)]
    return experiment.run("projection", chosen, args, {"weights": plot(protocol)})


if __name__ == "__main__":
    sys.exit(main())
