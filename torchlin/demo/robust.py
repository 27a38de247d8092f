"""Trains small nets on real digits by single attack steps, with ELLE beside it, and attacks what comes out."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from torchlin._console import progress, table
from torchlin.benchmarks import train_robust
from torchlin.benchmarks.train_robust import CLIP, Data, Method, Protocol
from torchlin.demo import need
from torchlin.robust import evaluate, linearity_error

PROTOCOL = Protocol(epochs=24, eps_warmup=6)
SEEDS = (0, 1, 2)
METHODS = {
    "FGSM": Method("fgsm"),
    "FGSM + ELLE": Method("fgsm+elle", term={"lam": train_robust.LAM}),
    "FGSM + ELLE-A": Method("fgsm+elle-a", term={"lam": train_robust.LAM}),
    "PGD-4": Method("pgd", {"steps": 4}),
}
ATTACKS = ("fgsm", "pgd-20-2", "square-500")
PICTURE = Path("demo-output") / "robust.png"
LOOK_EVERY = 3  # epochs, at the first images of the test half
LOOK_AT = 200
WORKERS = os.cpu_count() or 1


@dataclass(frozen=True)
class Run:
    """One net: its accuracies in the end, and what it was along the way, {epoch: (PGD accuracy, linearity error)}."""

    accuracy: Mapping[str, float]
    error: float
    way: dict[int, tuple[float, float]]
    seconds: float


def run() -> None:
    """The stop: train, attack, compare."""
    need("sklearn")
    data = train_robust.digits()
    tasks = [(name, seed) for name in METHODS for seed in SEEDS]
    runs: dict[str, list[Run]] = {name: [] for name in METHODS}
    with progress(len(tasks), "training nets") as bar:
        for (name, _), result in zip(tasks, _each(tasks, data), strict=True):
            runs[name].append(result)
            bar.advance()
    show(runs, data)
    if find_spec("matplotlib"):
        plot(runs)
        print(f"along training: {PICTURE}")
    check(runs)


def _each(tasks: list[tuple[str, int]], data: Data) -> Iterator[Run]:
    """The nets, as many at a time as there are cores: each is too small for more than one thread."""
    jobs = [(METHODS[name], seed, data, PROTOCOL, ATTACKS) for name, seed in tasks]
    if WORKERS == 1:
        yield from (one(*job) for job in jobs)
        return
    context = multiprocessing.get_context(
        "spawn"
    )  # a forked process would inherit torch's threads half alive
    with ProcessPoolExecutor(WORKERS, context, _in_worker) as pool:
        yield from (done.result() for done in [pool.submit(one, *job) for job in jobs])


def _in_worker() -> None:
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 -- progress of each net


def one(method: Method, seed: int, data: Data, protocol: Protocol, attacks: Sequence[str]) -> Run:
    """Trains a net from one seed, and attacks it."""
    way: dict[int, tuple[float, float]] = {}
    few = data.test[0][:LOOK_AT], data.test[1][:LOOK_AT]

    def look(epoch: int, net: nn.Module) -> dict[str, float]:
        if epoch % LOOK_EVERY == 0 or epoch == 1:
            found = evaluate(net, few, protocol.eps, clip=CLIP, attacks=("pgd-10-1",), generator=_generator())
            way[epoch] = found["pgd-10-1"], _error(net, few, protocol.eps)
        return {}

    net, seconds = train_robust.learn(method, seed, data, protocol, on_epoch=look)
    found = evaluate(net, data.test, protocol.eps, clip=CLIP, attacks=attacks, generator=_generator())
    return Run(found.accuracy, _error(net, data.test, protocol.eps), way, seconds)


def _error(net: nn.Module, images: tuple[Tensor, Tensor], eps: float) -> float:
    x, y = images
    return float(linearity_error(net, x, y, eps, generator=_generator()))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def show(runs: dict[str, list[Run]], data: Data) -> None:
    columns = [
        "trained by",
        "seed",
        "clean",
        "FGSM",
        "PGD-20-2",
        "square-500",
        "all of them",
        "linearity error",
    ]
    names = ("clean", *ATTACKS, "worst")
    rows = []
    for name, found in runs.items():
        for seed, r in zip(SEEDS, found, strict=True):
            figures = [f"{100 * r.accuracy[key]:.1f}" for key in names]
            rows.append([name, str(seed), *figures, f"{r.error:.1e}"])
        means = [f"{100 * fmean(r.accuracy[key] for r in found):.1f}" for key in names]
        rows.append([name, "mean", *means, f"{fmean(r.error for r in found):.1e}"])
    table(
        f"accuracy in % on {len(data.test[0])} digits of scikit-learn that no net saw, under attacks of eps "
        f"{PROTOCOL.eps:g} of the grey scale; {PROTOCOL.epochs} epochs on {len(data.train[0])} digits",
        columns,
        rows,
    )
    print(
        "FGSM training is right under FGSM and wrong under PGD. ELLE keeps the loss near linear in the ball, by one forward of "
        "three random points.\nPGD-4 takes four attack steps for each training step, and is the yardstick."
    )


def plot(runs: dict[str, list[Run]]) -> None:
    """PGD accuracy and linearity error along training, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, (above, below) = plt.subplots(2, 1, figsize=(7, 6.4), sharex=True, layout="constrained")
    for i, (name, found) in enumerate(runs.items()):
        for seed, r in enumerate(found):
            epochs = sorted(r.way)
            how: dict[str, Any] = {
                "color": f"C{i}",
                "linewidth": 1.4,
                "alpha": 0.85,
                "label": "" if seed else name,
            }
            above.plot(epochs, [100 * r.way[epoch][0] for epoch in epochs], **how)
            below.plot(epochs, [max(r.way[epoch][1], 1e-9) for epoch in epochs], **how)
    above.set_ylabel("accuracy under PGD-10, %")
    above.legend(fontsize=9)
    below.set_ylabel("linearity error of the loss")
    below.set_yscale("log")
    below.set_xlabel(f"epoch; eps grows to {PROTOCOL.eps:g} in the first {PROTOCOL.eps_warmup:g}")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    PICTURE.parent.mkdir(exist_ok=True)
    drawing.savefig(PICTURE, dpi=110)
    plt.close(drawing)


def check(runs: dict[str, list[Run]]) -> None:
    """Raises where a claim of this stop does not hold."""

    def mean(name: str, attack: str) -> float:
        return 100 * fmean(r.accuracy[attack] for r in runs[name])

    gap = mean("FGSM", "fgsm") - mean("FGSM", "pgd-20-2")
    if not gap >= 30:
        raise RuntimeError(f"FGSM training is no failure here: PGD takes {gap:.1f} points more than FGSM")
    for name, least in (("FGSM + ELLE", 5), ("FGSM + ELLE-A", 5), ("PGD-4", 15)):
        gain = mean(name, "pgd-20-2") - mean("FGSM", "pgd-20-2")
        if not gain >= least:
            raise RuntimeError(f"{name} gains {gain:.1f} points under PGD over FGSM, and not {least}")
    if not mean("FGSM + ELLE-A", "clean") >= 88:
        raise RuntimeError(
            f"FGSM + ELLE-A gets {mean('FGSM + ELLE-A', 'clean'):.1f} % of the clean digits right"
        )
    flatter = fmean(r.error for r in runs["FGSM + ELLE"]) / fmean(r.error for r in runs["FGSM"])
    if not flatter < 0.5:
        raise RuntimeError(f"ELLE leaves {flatter:.2f} of FGSM's linearity error")
