"""The local-linearity loss, forward and backward, against torch, torch.compile, its closed form in Python, and a copy.

    python -m torchlin.benchmarks.bench_linearity [--quick] [--only loss,value] [--threads 2]

docs/linearity.md says what the floor is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlin.benchmarks.harness import Case, Relation, Session
from torchlin.benchmarks.heap import kept
from torchlin.benchmarks.program import OURS, Program, Sections, compiled
from torchlin.functional import cross_entropy_linearity

SIZES = ((128, 10), (128, 100), (256, 1000), (64, 32000))
GPU_SIZES = ((64, 32000), (4096, 1000))
GOALS = {(128, 10): ">=5", (128, 100): ">=5", (256, 1000): ">=4", (64, 32000): ">=4"}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def composed(z: Tensor, y: Tensor, mix: Tensor) -> Tensor:
    """The loss as its authors write it."""
    a, b, c = F.cross_entropy(z, y.repeat(3), reduction="none").chunk(3)
    return F.mse_loss(c, (1 - mix) * a + mix * b)


class ClosedForm(torch.autograd.Function):
    """The closed form of the gradient in torch's own operations: what a fused loss is without a kernel."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, mix: Tensor) -> Tensor:
        thrice = y.repeat(3).unsqueeze(1)
        p = F.log_softmax(z, -1)
        a, b, c = p.gather(1, thrice).neg_().view(3, -1)
        r = (c - a) - mix * (b - a)
        rho = r * (2 / len(r))
        q = torch.cat(((mix - 1) * rho, -mix * rho, rho)).unsqueeze(1)
        grad = p.exp_().scatter_add_(1, thrice, q.new_full((1, 1), -1).expand_as(thrice)).mul_(q)
        ctx.save_for_backward(grad)
        return r.square().mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (saved,) = ctx.saved_tensors
        return saved * grad, None, None


def closed_form(z: Tensor, y: Tensor, mix: Tensor) -> Tensor:
    return ClosedForm.apply(z, y, mix)  # type: ignore[no-any-return, no-untyped-call]


def _both(loss: Loss, z: Tensor, y: Tensor, mix: Tensor) -> Tensor:
    return torch.autograd.grad(loss(z, y, mix), z)[0]


def _value(loss: Loss, z: Tensor, y: Tensor, mix: Tensor) -> Tensor:
    with torch.no_grad():
        return loss(z, y, mix)


def rows(session: Session, direction: str, args: argparse.Namespace) -> None:
    gpu = session.device == "cuda"
    sizes = ((4, 10),) if session.quick else GPU_SIZES if gpu else SIZES
    run = _both if direction == "both" else _value
    for batch, classes in sizes:
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(3 * batch, classes, generator=generator).to(session.device).requires_grad_()
        y = torch.randint(classes, (batch,), generator=generator).to(session.device)
        mix = torch.rand(batch, generator=generator).to(session.device)
        losses: dict[str, Loss] = {OURS: cross_entropy_linearity, "torch": composed}
        if direction == "both":
            losses["closed form, autograd.Function"] = closed_form
        if not args.no_compile and not gpu and (fast := compiled(composed, z, y, mix)):
            losses["torch.compile"] = fast
        calls = {name: partial(run, loss, z, y, mix) for name, loss in losses.items()}
        source, target = z.detach(), torch.empty_like(z)
        wide = z.detach().double().requires_grad_()
        expected = run(composed, wide, y, mix.double())
        goal = ">=5" if gpu else GOALS.get((batch, classes), "") if direction == "both" else ""
        floor = "<=1.25" if gpu else "<=2" if (batch, classes) == (256, 1000) else ""

        def measure(
            alloc: str,
            calls: dict[str, Callable[[], Tensor]] = calls,
            source: Tensor = source,
            target: Tensor = target,
            shape: tuple[int, int] = (batch, classes),
            expected: Tensor = expected,
            goal: str = goal,
            floor: str = floor if direction == "both" else "",
        ) -> None:
            cases = [Case(name, call, alloc=alloc, result=call) for name, call in calls.items()]
            copy = Case("copy", partial(target.copy_, source), alloc="out=")
            session.compare(
                "cross_entropy_linearity",
                [*cases, copy],
                [
                    *(Relation(case.name, OURS, goal if case.name == "torch" else "") for case in cases[1:]),
                    Relation(OURS, "copy", floor),
                ],
                size=f"{shape[0]} x {shape[1]}",
                shape=(3, *shape),
                dtype=torch.float32,
                direction=direction,
                expected=expected,
            )

        if gpu:
            measure("fresh")
            continue
        # What was freed is there again, as in a training loop: no contender has to ask the system for pages.
        with kept(16 * z.numel() * z.element_size()) as reused:
            measure("reused" if reused else "fresh")


def sections(session: Session, args: argparse.Namespace) -> Sections:
    """What can be measured."""
    return {"loss": lambda: rows(session, "both", args), "value": lambda: rows(session, "forward", args)}


main = Program("linearity", "cross-entropy's local linearity", __doc__, sections).main

if __name__ == "__main__":
    sys.exit(main())
