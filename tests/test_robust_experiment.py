"""The experiments on robust training: their data, how λ is chosen, and that a step of each method can be timed."""

from __future__ import annotations

import pytest
import torch

from torchlin.benchmarks import train_robust
from torchlin.benchmarks.experiment import Measured

pytest.importorskip("sklearn")


def test_digits_are_split_once() -> None:
    whole, part = train_robust.digits(), train_robust.digits("validation")
    assert [len(half[0]) for half in (whole.train, whole.test, part.train, part.test)] == [
        1297,
        500,
        1000,
        297,
    ]
    assert torch.equal(torch.cat((part.train[0], part.test[0])), whole.train[0])
    assert torch.equal(torch.cat((part.train[1], part.test[1])), whole.train[1])
    assert float(whole.train[0].min()) == 0
    assert float(whole.train[0].max()) == 1
    tested = {image.numpy().tobytes() for image in whole.test[0]}
    assert len(tested & {image.numpy().tobytes() for image in whole.train[0]}) == 0


def rows(method: str, clean: float, pgd: float) -> list[Measured]:
    constant = Measured("", "", "", "", "", "", 1, "full", "choose", "", method, 0, "", 0.0)
    values = {"clean": clean, "pgd-20-2": pgd}
    return [Measured(**{**vars(constant), "quantity": q, "value": v}) for q, v in values.items()]


def test_the_best_lambda_does_not_cost_too_much() -> None:
    found = [
        *rows("elle, λ = 10", 99, 20),
        *rows("elle, λ = 10", 97, 30),
        *rows("elle, λ = 100", 95, 27),
        *rows("elle, λ = 1000", 80, 60),
        *rows("elle-a, λ = 10", 70, 40),
    ]
    assert train_robust.best(found) == {"elle": 100.0, "elle-a": 10.0}


def test_a_step_of_every_method() -> None:
    batch = torch.rand(8, 1, 8, 8), torch.arange(8)
    for name in (*train_robust.STEPS, train_robust.FASTER):
        step = train_robust.StepTime(name, batch, 0.25)
        before = [p.clone() for p in step.net.parameters()]
        step()
        assert not all(map(torch.equal, before, step.net.parameters())), name
