"""Trains the 18 functions of Dubey, Singh and Chaudhuri (arXiv 2109.14545) with one small CNN on real images.

    torchlin bench activation --train [--data digits|fashion-mnist|mnist] [--seeds 5] [--only relu,pau]

docs/activation-benchmark.md says what the protocol is, and what came of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlin
from torchlin._console import progress, table
from torchlin.benchmarks import activation_rivals as rivals
from torchlin.benchmarks import image_data
from torchlin.benchmarks.harness import Case, Relation, Row, Session, append, figure
from torchlin.benchmarks.image_data import Images, MissingData
from torchlin.benchmarks.program import OURS, print_rows
from torchlin.catalogue import find

TORCH, RELU = "torch", "torch, ReLU"
TIMED_BATCHES = 12
WIDTHS = (32, 64, 64)  # of three stages, each of two convolutions


# ----------------------------------------------------------------------------------------------- the functions


class Plain(nn.Module):
    """A composition of torch's operators, with its learned parameters."""

    def __init__(self, function: rivals.Function, *initial: float | Sequence[float]) -> None:
        super().__init__()
        self.function = function
        self.learned = nn.ParameterList([torch.tensor(value).float() for value in initial])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.learned)


@dataclass(frozen=True)
class Entry:
    """One function of the survey: its name here, the survey's parameters, and the same in plain torch."""

    display: str
    name: str
    plain: Callable[[], nn.Module]
    parameters: dict[str, float] | None = None
    learns: bool = False

    def make(self) -> nn.Module:
        how = {} if self.learns else {"learnable": False}
        return torchlin.create("activation", self.name, **how, **(self.parameters or {}))


def _pau() -> nn.Module:
    start = find("pau").parameters
    return Plain(rivals.pau, start["a"].default, start["b"].default)


SURVEY = (
    Entry("Sigmoid", "sigmoid", nn.Sigmoid),
    Entry("Tanh", "tanh", nn.Tanh),
    Entry("Elliott", "elliott", lambda: Plain(rivals.elliott)),
    Entry("ReLU", "relu", nn.ReLU),
    Entry("LReLU", "leaky_relu", nn.LeakyReLU),
    Entry("PReLU", "prelu", nn.PReLU, learns=True),
    Entry("ELU", "elu", nn.ELU),
    Entry("SELU", "selu", nn.SELU),
    Entry("GELU", "gelu", nn.GELU),
    Entry("CELU", "celu", nn.CELU),
    Entry("Softplus", "softplus", nn.Softplus),
    Entry("Swish", "swish_beta", lambda: Plain(rivals.swish, 0.25), {"b": 0.25}, learns=True),
    Entry("ABReLU", "abrelu", lambda: Plain(rivals.abrelu)),
    Entry("LiSHT", "lisht", lambda: Plain(rivals.COMPOSITES["lisht"])),
    Entry("SRS", "srs", lambda: Plain(rivals.srs, 5.0, 3.0), {"a": 5.0, "b": 3.0}, learns=True),
    Entry("Mish", "mish", nn.Mish),
    Entry("PAU", "pau", _pau, learns=True),
    Entry("PDELU", "pdelu", lambda: Plain(rivals.pdelu, 1.0), learns=True),
)


# ---------------------------------------------------------------------------------------------------- the net


def network(activation: Callable[[], nn.Module], classes: int, batch_norm: bool) -> nn.Sequential:
    """Six 3x3 convolutions, each with an activation of its own; halved in size twice; mean; one linear layer."""
    layers: list[nn.Module] = []
    channels = 1
    for stage, width in enumerate(WIDTHS):
        if stage:
            layers.append(nn.MaxPool2d(2))
        for _ in range(2):
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm))
            layers += [nn.BatchNorm2d(width)] if batch_norm else []
            layers.append(activation())
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


@dataclass(frozen=True)
class Protocol:
    """What is the same for all functions. After the survey, but for augmentation, and epochs being fewer."""

    epochs: int
    batch: int = 64
    learning_rate: float = 1e-3
    batch_norm: bool = False

    @property
    def milestone(self) -> int:
        """The epoch after which the rate is a tenth: at 80 %, as there."""
        return max(1, round(0.8 * self.epochs))


def _batches(
    data: Images, size: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(data.train), generator=generator)
    for places in order.split(size):
        yield data.train[places], data.train_labels[places]


def _step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(net(x), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def evaluate(net: nn.Module, data: Images) -> tuple[float, float]:
    """Accuracy and loss on the held-out images."""
    net.eval()
    logits = torch.cat([net(x) for x in data.test.split(500)])
    accuracy = (logits.argmax(1) == data.test_labels).double().mean().item()
    return accuracy, F.cross_entropy(logits, data.test_labels).item()


@dataclass(frozen=True)
class Outcome:
    test_accuracy: float
    test_loss: float
    train_loss: float  # mean over the last epoch
    seconds: float


def train(entry: Entry, data: Images, protocol: Protocol, seed: int) -> Outcome:
    """Trains one net from one seed. Its convolutions start alike, and see the same batches, for every function."""
    torch.manual_seed(seed)
    net = network(entry.make, data.classes, protocol.batch_norm)
    optimizer = torch.optim.Adam(net.parameters(), lr=protocol.learning_rate)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [protocol.milestone], gamma=0.1)
    generator = torch.Generator().manual_seed(seed)
    begun = time.perf_counter()
    losses: list[float] = []
    for _ in range(protocol.epochs):
        losses = [_step(net, optimizer, x, labels) for x, labels in _batches(data, protocol.batch, generator)]
        schedule.step()
    seconds = time.perf_counter() - begun
    return Outcome(*evaluate(net, data), statistics.fmean(losses), seconds)


def epoch_case(name: str, activation: Callable[[], nn.Module], data: Images, protocol: Protocol) -> Case:
    """Some steps of training, as a contender; its time counts for a whole epoch of as many as there are."""
    torch.manual_seed(0)
    net = network(activation, data.classes, protocol.batch_norm)
    optimizer = torch.optim.Adam(net.parameters(), lr=protocol.learning_rate)
    batches = [batch for batch, _ in zip(_batches(data, protocol.batch), range(TIMED_BATCHES), strict=False)]
    images = sum(len(x) for x, _ in batches)

    def steps() -> None:
        for x, labels in batches:
            _step(net, optimizer, x, labels)

    return Case(name, steps, per=images / len(data.train), alloc="")


# ------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Trained:
    """One line of `results/activation_train.csv`: one function, trained once."""

    date: str
    commit: str
    machine: str
    isa: str
    torch: str
    python: str
    threads: int
    mode: str
    data: str
    train_images: int
    test_images: int
    epochs: int
    batch: int
    learning_rate: float
    batch_norm: int
    activation: str
    name: str
    parameters: str
    seed: int
    test_accuracy: float
    test_loss: float
    train_loss: float
    seconds: float

    @property
    def setting(self) -> tuple[object, ...]:
        """What is the same for all functions that are compared."""
        return self.data, self.train_images, self.epochs, self.batch, self.learning_rate, self.batch_norm

    @property
    def size(self) -> str:
        """What the rows of times call it."""
        return timed_as(self.data, bool(self.batch_norm))


def timed_as(data: str, batch_norm: bool) -> str:
    return f"{data}, batch norm" if batch_norm else data


def mean_and_deviation(accuracies: Sequence[float]) -> str:
    """In per cent, with the standard deviation over seeds (of a sample)."""
    deviation = f" ± {100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    return f"{100 * statistics.fmean(accuracies):.2f}{deviation}"


COLUMNS = ("function", "test accuracy, %", "ms an epoch", "epoch over ReLU's", "torch's own over ours")


def lines(rows: Sequence[Trained], times: Sequence[Row]) -> list[list[str]]:
    """The table under `COLUMNS`, the most accurate first."""
    accuracies: dict[str, list[float]] = {}
    for row in rows:
        accuracies.setdefault(row.activation, []).append(row.test_accuracy)
    by_time = {(row.what, row.case, row.base): row for row in times}
    found = []
    for name, values in sorted(accuracies.items(), key=lambda item: -statistics.fmean(item[1])):
        relu, torchs = by_time.get((name, OURS, RELU)), by_time.get((name, TORCH, OURS))
        found.append(
            [
                name,
                mean_and_deviation(values),
                figure(relu.median_ns * 1e-6) if relu else "",
                figure(relu.value) if relu else "",
                figure(torchs.value) if torchs else "",
            ]
        )
    return found


def plot(rows: Sequence[Trained], path: Path) -> None:
    """Each seed's error as a dot, the mean as a bar, one line a function."""
    import matplotlib
    import matplotlib.ticker

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = rows[0]
    errors: dict[str, list[float]] = {}
    for row in rows:  # on a logarithmic scale no error at all counts as half an image
        errors.setdefault(row.activation, []).append(100 * max(1 - row.test_accuracy, 0.5 / row.test_images))
    order = sorted(errors, key=lambda name: -statistics.fmean(errors[name]))
    drawing, axes = plt.subplots(figsize=(7, 0.8 + 0.26 * len(order)), layout="constrained")
    for y, name in enumerate(order):
        axes.plot(errors[name], [y] * len(errors[name]), "o", color="tab:blue", alpha=0.45, markersize=5)
        axes.plot(statistics.fmean(errors[name]), y, "|", color="black", markersize=14, markeredgewidth=1.6)
    axes.set_yticks(range(len(order)), order)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(axis="x", alpha=0.3)
    norm = "batch normalization" if first.batch_norm else "no normalization"
    axes.set_xlabel("error on held-out images, %")
    axes.set_title(
        f"{first.data}, {first.train_images} training images, {first.epochs} epochs, {norm}", fontsize=10
    )
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


# ------------------------------------------------------------------------------------------------------- main


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchlin bench activation --train", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", choices=image_data.DATA, default="digits", help="the images (digits)")
    parser.add_argument("--path", type=Path, help="folder of the images, if not where they are installed")
    parser.add_argument("--train-images", type=int, help="use the first so many")
    parser.add_argument(
        "--seeds", type=int, default=5, help="runs of each function (5); 0: compare times only"
    )
    parser.add_argument("--epochs", type=int, default=20, help="(20)")
    parser.add_argument("--batch-norm", action="store_true", help="between convolution and activation")
    parser.add_argument("--only", default="", metavar="A,B", help="some of the functions")
    parser.add_argument("--threads", type=int, default=1, help="(1)")
    parser.add_argument("--quick", action="store_true", help="one epoch of few images: does it run")
    parser.add_argument("--no-time", action="store_true", help="train only, compare no times")
    parser.add_argument("--out", type=Path, help="folder of the results and the plot")
    return parser


def _chosen(only: str) -> list[Entry]:
    if not only:
        return list(SURVEY)
    known = {key: entry for entry in SURVEY for key in (entry.name, entry.display.lower())}
    wanted = [word.strip().lower() for word in only.split(",")]
    if unknown := [word for word in wanted if word not in known]:
        names = ", ".join(entry.display for entry in SURVEY)
        raise ValueError(f"--only: {', '.join(unknown)} is none of the 18; they are {names}")
    return [known[word] for word in wanted]


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints the table, writes rows and plot; returns the process's exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        entries = _chosen(args.only)
        data = image_data.load(args.data, args.path)
    except (ValueError, MissingData) as error:
        parser.error(str(error))
    data = data.first(256 if args.quick else args.train_images)
    protocol = Protocol(1 if args.quick else args.epochs, batch_norm=args.batch_norm)
    seeds = range(1 if args.quick else args.seeds)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        session = Session(
            "activation_train_time", args.out, args.quick, args.threads, partial=bool(args.only)
        )
        rows: list[Trained] = []
        steps = len(entries) * (len(seeds) + (not args.no_time))
        with progress(steps, "training") as bar:
            for entry in entries:
                for seed in seeds:
                    outcome = train(entry, data, protocol, seed)
                    rows.append(_row(session, args.data, data, protocol, entry, seed, outcome))
                    bar.advance(description=f"{entry.display}, seed {seed}")
                if not args.no_time:
                    _compare_times(session, entry, data, protocol, args.data)
                    bar.advance(description=f"{entry.display}, time")
    finally:
        torch.set_num_threads(threads)
    if not rows:
        print_rows("The 18 functions, an epoch of training", session, session.rows)
        return 0
    file = session.file.with_name("activation_train.csv")
    append(file, rows, Trained)
    table(f"The 18 functions, {args.data}\n{session.heading}", COLUMNS, lines(rows, session.rows))
    print(f"rows appended to {file}")
    picture = file.with_name(f"activation_train_{args.data}{'_bn' if args.batch_norm else ''}.png")
    try:
        plot(rows, picture)
        print(f"plot: {picture}")
    except ModuleNotFoundError:
        print("no plot: pip install matplotlib", file=sys.stderr)
    return 0


def _row(
    session: Session, name: str, data: Images, protocol: Protocol, entry: Entry, seed: int, outcome: Outcome
) -> Trained:
    parameters = ", ".join(f"{key}={value:g}" for key, value in (entry.parameters or {}).items())
    of_session = {f.name: session.constants[f.name] for f in fields(Trained) if f.name in session.constants}
    return Trained(
        **of_session,
        data=name,
        train_images=len(data.train),
        test_images=len(data.test),
        epochs=protocol.epochs,
        batch=protocol.batch,
        learning_rate=protocol.learning_rate,
        batch_norm=int(protocol.batch_norm),
        activation=entry.display,
        name=entry.name,
        parameters=parameters,
        seed=seed,
        **vars(outcome),
    )


def _compare_times(session: Session, entry: Entry, data: Images, protocol: Protocol, name: str) -> None:
    """Epochs with ours, with torch's form, and with torch's ReLU, in turn."""
    makers = {OURS: entry.make, TORCH: entry.plain, RELU: nn.ReLU}
    session.compare(
        entry.display,
        [epoch_case(who, make, data, protocol) for who, make in makers.items()],
        [Relation(OURS, RELU), Relation(TORCH, RELU), Relation(TORCH, OURS)],
        size=timed_as(name, protocol.batch_norm),
        shape=data.train.shape,
        dtype=torch.float32,
        direction="training",
        unit="epoch",
        repeats=None if session.quick else 9,
    )


if __name__ == "__main__":
    sys.exit(main())
