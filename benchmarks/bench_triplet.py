"""Points of triplets against the composition of torch.rand and cat, torch.compile, and a copy of the same bytes.

    python -m torchlin.benchmarks.bench_triplet [--quick] [--only cube,ball] [--threads 2]

docs/triplet.md says what an element costs at least.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from torchlin.benchmarks.harness import Case, Relation, Session
from torchlin.benchmarks.heap import kept
from torchlin.benchmarks.program import OURS, Program, Sections, compiled
from torchlin.functional import sample_triplet

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


def rows(session: Session, norm: str, composed: Callable[[Tensor], Tensor], args: argparse.Namespace) -> None:
    """Points of images: outputs from a heap that keeps what was freed, and fresh from the system."""
    for size, shape in (QUICK if session.quick else SIZES).items():
        x = torch.rand(shape)
        source = x.flatten().repeat(2)
        target = torch.empty_like(source)

        def ours(x: Tensor = x) -> Tensor:
            return sample_triplet(x, EPS, norm=norm, clip=(0, 1))[0]

        def copied(source: Tensor = source, target: Tensor = target) -> Tensor:
            return target.copy_(source)

        def cases(alloc: str, x: Tensor = x, ours: Callable[[], Tensor] = ours) -> list[Case]:
            made = [Case(OURS, ours, alloc=alloc), Case("torch", lambda: composed(x), alloc=alloc)]
            if not args.no_compile and (fast := compiled(composed, x)):
                made.append(Case("torch.compile", lambda: fast(x), alloc=alloc))
            # Two elements read and two written: the bytes of one read and three written.
            return [*made, Case("copy", copied, alloc="out=")]

        def relations(made: list[Case], large: bool = x.numel() > 1 << 20) -> list[Relation]:
            over_copy = "<=2" if norm == "linf" and large else ""
            goal = ">=3" if norm == "linf" else ""
            others = [Relation(c.name, OURS, goal if c.name == "torch" else "") for c in made[1:-1]]
            return [*others, Relation(OURS, "copy", over_copy)]

        def measure(alloc: str, x: Tensor = x, shape: tuple[int, ...] = shape, size: str = size) -> None:
            made = cases(alloc)
            session.compare(f"triplet, {norm}", made, relations(made), size=size, shape=shape, dtype=x.dtype)

        with kept(8 * x.numel() * x.element_size()) as reused:
            if reused:
                measure("reused")
        measure("fresh")


def sections(session: Session, args: argparse.Namespace) -> Sections:
    """What can be measured."""
    return {
        "cube": lambda: rows(session, "linf", cube, args),
        "ball": lambda: rows(session, "l2", ball, args),
    }


main = Program("triplet", "points of triplets", __doc__, sections).main

if __name__ == "__main__":
    sys.exit(main())
