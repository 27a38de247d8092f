"""mixup and cutmix against their compositions in torch, torch.compile, and a copy of the batch.

python -m torchlin.benchmarks.bench_mixup [--quick] [--only forward,backward] [--threads 2]
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
from torchlin.functional import cutmix, mixup
from torchlin.ops.mixup import cutmix_boxes, cutmix_reference, mixup_reference

SIZES = {"CIFAR, 128": (128, 3, 32, 32), "ImageNet, 128": (128, 3, 224, 224)}
QUICK = {"CIFAR, 4": (4, 3, 32, 32)}


class Batch:
    """Images, weights, partners and boxes, the same for every contender."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(shape, generator=generator)
        self.lam = torch.rand(shape[0], generator=generator)
        self.perm = torch.randperm(shape[0], generator=generator)
        self.boxes = cutmix_boxes(self.lam, *shape[-2:], generator=generator)
        self.grad = torch.rand(shape, generator=generator)
        self.target = torch.empty(shape)


def one_by_one(x: Tensor, perm: Tensor, boxes: Tensor) -> Tensor:
    """cutmix as the packages write boxes that differ from sample to sample: a loop."""
    out = x.clone()
    for i, (top, bottom, left, right) in enumerate(boxes.tolist()):
        out[i, ..., top:bottom, left:right] = x[perm[i], ..., top:bottom, left:right]
    return out


def first_of(function: Callable[..., tuple[Tensor, Tensor]], b: Batch) -> Tensor:
    """The mixed images of cutmix."""
    return function(b.x, None, b.perm, boxes=b.boxes)[0]


def forward_rows(session: Session, args: argparse.Namespace) -> None:
    """Images without gradients, as a data loader's batch is mixed."""
    for size, shape in (QUICK if session.quick else SIZES).items():
        b = Batch(shape)
        wide = b.x.double()
        mixes: dict[str, Callable[[], Tensor]] = {
            OURS: partial(mixup, b.x, b.lam, b.perm),
            "torch": partial(mixup_reference, b.x, b.lam, b.perm),
        }
        if not args.no_compile and (fast := compiled(mixup_reference, b.x, b.lam, b.perm)):
            mixes["torch.compile"] = partial(fast, b.x, b.lam, b.perm)
        cuts: dict[str, Callable[[], Tensor]] = {
            OURS: partial(first_of, cutmix, b),
            "torch": partial(first_of, cutmix_reference, b),
            "torch, one by one": partial(one_by_one, b.x, b.perm, b.boxes),
        }
        expected = {
            "mixup": mixup_reference(wide, b.lam.double(), b.perm),
            "cutmix": cutmix_reference(wide, None, b.perm, boxes=b.boxes)[0],
        }
        with kept(8 * b.x.numel() * b.x.element_size()) as reused:
            for what, runs in (("mixup", mixes), ("cutmix", cuts)):
                alloc = "reused" if reused else "fresh"
                cases = [Case(name, run, alloc=alloc, result=run) for name, run in runs.items()]
                cases.append(Case("copy", partial(b.target.copy_, b.x), alloc="out="))
                session.compare(
                    what,
                    cases,
                    [*(Relation(name, OURS) for name in list(runs)[1:]), Relation(OURS, "copy")],
                    size=size,
                    shape=shape,
                    dtype=b.x.dtype,
                    expected=expected[what],
                )


def backward_rows(session: Session, args: argparse.Namespace) -> None:
    """Gradients of features and λ (AdaMixUp), forward and backward."""
    for size, shape in (QUICK if session.quick else SIZES).items():
        b = Batch(shape)
        x, lam = b.x.requires_grad_(), b.lam.requires_grad_()

        def training(
            f: Callable[..., Tensor], x: Tensor = x, lam: Tensor = lam, b: Batch = b
        ) -> Callable[[], object]:
            return lambda: torch.autograd.grad(f(x, lam, b.perm), (x, lam), b.grad)

        runs = {OURS: training(mixup), "torch": training(mixup_reference)}
        if not args.no_compile and (fast := compiled(mixup_reference, x, lam, b.perm)):
            runs["torch.compile"] = training(fast)
        with kept(12 * x.numel() * x.element_size()) as reused:
            session.compare(
                "mixup",
                [Case(name, run, alloc="reused" if reused else "fresh") for name, run in runs.items()],
                [Relation(name, OURS) for name in list(runs)[1:]],
                size=size,
                shape=shape,
                dtype=x.dtype,
                direction="both",
            )


def sections(session: Session, args: argparse.Namespace) -> Sections:
    """What can be measured."""
    return {
        "forward": lambda: forward_rows(session, args),
        "backward": lambda: backward_rows(session, args),
    }


main = Program("mixup", "mixup and cutmix", __doc__, sections).main

if __name__ == "__main__":
    sys.exit(main())
