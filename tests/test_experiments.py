"""The experiments on methods: their data are what the pages say, runs repeat, and tables come from rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from torchlin.benchmarks import experiment, harness, report, train_mixup, train_projection
from torchlin.benchmarks.experiment import Measured


def measured(**changes: object) -> Measured:
    plain = Measured(
        date="2026-01-02T03:04:05Z", commit="abc1234", machine="Some CPU", isa="avx2", torch="2.13.0", python="3.11.2",
        threads=1, mode="full", experiment="patches", setting="some", method="plain", seed=0, quantity="accuracy", value=50.0,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def test_patches_hold_what_they_should() -> None:
    protocol = train_mixup.Patches(width=30)
    x, y = protocol.draw(500, 0.1, torch.Generator().manual_seed(0))
    features = x[:, :, :4]
    whole = (features == 1).sum((1, 2))
    assert (whole == 1).all()
    sample, _, which = (features == 1).nonzero(as_tuple=True)
    assert torch.equal(which, y + 2 * (sample < 50))
    faint = features[:, :, :2] == protocol.faint
    assert (faint.sum((1, 2)) == 1).all()
    assert not (features[:, :, 2:] == protocol.faint).any()
    noisy = x[:, :, 4:].abs().sum(2) > 0
    assert (noisy.sum(1) == protocol.patches - 1 - protocol.faint_patches).all()
    assert abs(x[:, :, 4:][noisy].std() - protocol.noise) < 0.005
    assert (features[noisy] == 0).all()


def test_the_net_of_the_analysis() -> None:
    net = train_mixup.TwoLayerCNN(6, 3, 1.0, torch.Generator().manual_seed(0))
    x = torch.randn(4, 5, 6)
    expected = torch.stack(
        [sum((x[:, p] @ w.T).square().sum(1) for p in range(5)) for w in net.weight], dim=1
    )
    torch.testing.assert_close(net(x), expected)


def test_class_one_is_between() -> None:
    task = train_mixup.line(epochs=1)
    place = (task.train.mean(1) * 4).round()
    assert ((place == 1).long() == task.train_labels).double().mean() > 0.95
    mix = train_mixup.Mixup(lam_x=0.5)
    assert 10 < train_mixup.intruding(mix, task) < 35  # of nine kinds of pairs two, (0, 2) and (2, 0)
    assert train_mixup.intruding(train_mixup.Mixup(lam_x=1.0), task) < 5


def test_best_weights_of_a_linear_net() -> None:
    """Trained without a head, the weights are those of `Features.solution`."""
    protocol = train_projection.Protocol(features=4, most_noise=1.0, steps=800, learning_rate=0.02)
    encoder, _ = train_projection.train("no head", 0, protocol)
    found = train_projection.weights(encoder, 4, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, protocol.data().solution, rtol=0.1, atol=0)
    torch.testing.assert_close(found, encoder.weight.detach().norm(dim=0), rtol=1e-3, atol=0)
    assert train_projection.probe(encoder, 0, protocol, torch.Generator().manual_seed(2)) > 95


@pytest.mark.parametrize("program", [train_mixup, train_projection])
def test_programs_run_and_repeat(program, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    family = program.__name__.rsplit("_", 1)[1]
    rows = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        train_projection.train.cache_clear()
        assert program.main(["--quick", "--out", str(folder)]) == 0
        rows.append(harness.read(folder / f"{family}_train.csv", Measured))
    what = [[(r.experiment, r.method, r.quantity) for r in run] for run in rows]
    assert what[0] == what[1]
    values = [[r.value for r in run] for run in rows]
    assert values[0] == pytest.approx(values[1], rel=1e-3)  # least squares differ in the last digits
    assert {r.mode for r in rows[0]} == {"quick"}
    assert all(r.value == r.value for r in rows[0])
    out = capsys.readouterr().out
    assert "method" in out
    names = {name for name in report.BLOCKS if name.startswith(f"{family}-")}
    assert names == {f"{family}-{r.experiment}" for r in rows[0]}
    assert all(
        report.BLOCKS[name](tmp_path / "one") == [] for name in names
    )  # a quick run is reported nowhere


def test_rows_become_a_table(tmp_path: Path) -> None:
    early = measured(date="2025-01-01T00:00:00Z", value=1.0)
    rows = [measured(seed=seed, value=50.0 + seed) for seed in (0, 1, 2)]
    rows += [measured(method="mixup", seed=seed, quantity="loss", value=0.1234) for seed in (0, 1)]
    other = measured(experiment="line")
    harness.append(tmp_path / "mixup_train.csv", [early, *rows, other], Measured)
    (text,) = report.BLOCKS["mixup-patches"](tmp_path)
    assert "3 seeds; Some CPU" in text
    assert "| method | accuracy | loss |" in text
    assert "| plain | 51.0 ± 1.0 | |" in text
    assert "| mixup | | 0.123 ± 0.000 |" in text
    assert experiment.mean_and_deviation([1.0]) == "1.00"
