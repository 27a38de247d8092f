"""Points of triplets against the composition of torch.rand and cat, torch.compile, and a copy of the same bytes.

    python -m torchlin.benchmarks.bench_triplet [--quick] [--only cube,ball] [--threads 2]

docs/triplet.md says what an element costs at least.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from torchlin.benchmarks.harness import Case, Relation, Session
from torchlin.benchmarks.heap import kept
from torchlin.benchmarks.program import OURS, Program, Sections, compiled
from torchlin.functional import sample_triplet
from torchlin.ops.triplet import Norm

EPS = 8 / 255
SIZES = {"CIFAR, 128": (128, 3, 32, 32), "ImageNet, 128": (128, 3, 224, 224)}
QUICK = {"CIFAR, 4": (4, 3, 32, 32)}


def cube(x: Tensor) -> Tensor:
    """The points as one would write them in torch, clamped to [0, 1]."""
    a = (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    b = (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    mix = torch.rand(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device)
    return torch.cat((a, b, (1 - mix) * a + mix * b))


def ball(x: Tensor) -> Tensor:
    """The same in the l2 ball."""

    def inside() -> Tensor:
        noise = torch.randn_like(x).flatten(1)
        radius = torch.rand(x.shape[0], 1) ** (1 / noise.shape[1])
        return (noise * (EPS * radius / noise.norm(dim=1, keepdim=True))).view_as(x)

    a, b = (x + inside()).clamp(0, 1), (x + inside()).clamp(0, 1)
    mix = torch.rand(x.shape[0], *[1] * (x.dim() - 1))
    return torch.cat((a, b, (1 - mix) * a + mix * b))


def rows(
    session: Session, norm: Norm, composed: Callable[[Tensor], Tensor], args: argparse.Namespace
) -> None:
    """Points of images: outputs from a heap that keeps what was freed, and fresh from the system."""
    for size, shape in (QUICK if session.quick else SIZES).items():
        x = torch.rand(shape)
        pairs = x.flatten().repeat(2)  # read and written: the bytes of x read and three times written
        target = torch.empty_like(pairs)
        runs: dict[str, Callable[[], object]] = {
            OURS: partial(sample_triplet, x, EPS, norm=norm, clip=(0, 1)),
            "torch": partial(composed, x),
        }
        if not args.no_compile and (fast := compiled(composed, x)):
            runs["torch.compile"] = partial(fast, x)

        def measure(
            alloc: str, copy: Case, runs: dict[str, Callable[[], object]] = runs, size: str = size
        ) -> None:
            shape = SIZES.get(size) or QUICK[size]
            goals = {"torch": ">=3"} if norm == "linf" else {}
            floor = "<=2" if norm == "linf" and alloc == "reused" and shape[-1] > 100 else ""
            session.compare(
                f"triplet, {norm}",
                [*(Case(name, run, alloc=alloc) for name, run in runs.items()), copy],
                [
                    *(Relation(name, OURS, goals.get(name, "")) for name in list(runs)[1:]),
                    Relation(OURS, copy.name, floor),
                ],
                size=size,
                shape=shape,
                dtype=torch.float32,
            )

        with kept(8 * x.numel() * x.element_size()) as reused:
            if reused:
                measure("reused", Case("copy", partial(target.copy_, pairs), alloc="out="))
        measure("fresh", Case("clone", pairs.clone))


def sections(session: Session, args: argparse.Namespace) -> Sections:
    """What can be measured."""
    return {
        "cube": lambda: rows(session, "linf", cube, args),
        "ball": lambda: rows(session, "l2", ball, args),
    }


main = Program("triplet", "points of triplets", __doc__, sections).main

if __name__ == "__main__":
    sys.exit(main())
