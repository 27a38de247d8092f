"""The training loop goes on bit by bit, every method trains, and the table of an evaluation counts what it says."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torchlin.robust import ELLE, adversarial_loss, evaluate, fgsm, n_fgsm, train
from torchlin.robust.training import method_parts

METHODS = [
    *(
        "standard",
        "fgsm",
        "n-fgsm",
        "pgd",
        "elle",
        "elle-a",
        "fgsm+gradalign",
        "fgsm+llr",
        "fgsm+cure",
        "trades",
    ),
    *("n-fgsm+elle-a", "pgd+elle", "standard+elle"),
]


def data(count: int = 96) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 3
    x = torch.randn(3, 8, generator=generator)[y] + 0.3 * torch.randn(count, 8, generator=generator)
    return x, y


def net(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(dropout), nn.Linear(24, 3)
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method: str) -> None:
    x, y = data()
    model = net()
    before = F.cross_entropy(model.eval()(x), y)
    done = train(
        model.train(),
        (x, y),
        method=method,
        eps=0.2,
        epochs=6,
        batch_size=32,
        term={"lam": 0.5} if "elle" in method or "+" in method else {},
    )
    assert model.training
    assert [row["epoch"] for row in done.epochs] == list(range(1, 7))
    assert all(math.isfinite(row["loss"]) for row in done.epochs)
    assert F.cross_entropy(model.eval()(x), y) < 0.7 * before
    assert ("lam" in done.epochs[-1]) == ("elle" in method)


@pytest.mark.parametrize("method", ["fgsm+elle-a", "n-fgsm", "pgd"])
def test_resume_is_bit_exact(method: str, tmp_path) -> None:
    """Six epochs at once, and in two processes' worth of pieces: weights, average, schedule and rows are the same."""
    x, y = data()
    run = partial(
        train,
        data=(x, y),
        method=method,
        eps=0.2,
        epochs=6,
        batch_size=32,
        ema=0.9,
        eps_warmup=3.0,
        term={"lam": 5.0} if "elle" in method else {},
    )

    def seeded() -> nn.Module:
        model = net()
        torch.manual_seed(11)
        return model

    whole = seeded()
    expected = run(whole)

    def stop(epoch: int, model: nn.Module) -> dict[str, float]:
        if epoch == 4:
            raise KeyboardInterrupt
        return {}

    file = tmp_path / "run" / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        run(seeded(), checkpoint=file, on_epoch=stop)
    assert [path.name for path in file.parent.iterdir()] == ["state.pt"]
    torch.manual_seed(99)  # another process knows nothing of this one
    again = nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 3))
    found = run(again, checkpoint=file)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    for key, value in expected.ema.state_dict().items():
        assert torch.equal(value, found.ema.state_dict()[key]), key
    assert not torch.equal(found.ema[0].weight, again[0].weight)
    plain = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in r.epochs] for r in (expected, found)
    ]
    assert plain[0] == plain[1]
    weights = [p.clone() for p in again.parameters()]
    run(again, checkpoint=file)
    assert all(map(torch.equal, weights, again.parameters())), "a finished run has nothing to do"
    with pytest.raises(ValueError, match="of another run"):
        run(again, checkpoint=file, epochs=7)


def test_elle_a_state_is_in_the_checkpoint(tmp_path) -> None:
    file = tmp_path / "state.pt"
    train(
        net(), data(), method="elle-a", eps=0.5, epochs=4, batch_size=16, term={"lam": 2.0}, checkpoint=file
    )
    state = torch.load(file, weights_only=True)
    assert int(state["term"]["schedule.count"]) == 4 * 6
    assert float(state["term"]["schedule.value"]) > 0


def test_loader_optimizer_and_columns() -> None:
    x, y = data()
    loader = DataLoader(TensorDataset(x, y), batch_size=24, shuffle=True)
    made = []

    def adam(parameters) -> torch.optim.Optimizer:
        made.append(torch.optim.AdamW(parameters, 1e-2))
        return made[-1]

    rates = []

    def look(epoch: int, model: nn.Module) -> dict[str, float]:
        rates.append(made[0].param_groups[0]["lr"])
        return {"accuracy": evaluate(model, (x, y), 0.1, attacks=("fgsm",))["fgsm"]}

    done = train(net(), loader, method="fgsm", eps=0.1, epochs=4, optimizer=adam, on_epoch=look, eps_warmup=1)
    assert rates == pytest.approx([0.005, 0.01, 0.005, 0.0])
    assert done.epochs[-1]["accuracy"] > 0.9


def test_eps_and_alpha_grow_together() -> None:
    seen = []

    class Watch(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return super().forward(x)

    x, y = torch.zeros(8, 4), torch.arange(8) % 3
    torch.manual_seed(0)
    train(
        Watch(4, 3),
        (x, y),
        method="fgsm",
        eps=0.4,
        epochs=4,
        batch_size=8,
        eps_warmup=2,
        attack={"alpha": 0.4},
    )
    moved = [float(z.abs().max()) for z in seen[1::2]]
    assert moved == pytest.approx([0.2, 0.4, 0.4, 0.4])


def test_a_loss_that_is_not_finite_stops() -> None:
    x, y = data()
    x[5] = math.inf
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 1 of fgsm"):
        train(net(), (x, y), method="fgsm", eps=0.1, epochs=2, batch_size=32)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"method": "elle-b"}, ValueError, "method must be fgsm or n-fgsm"),
        ({"method": "fgsm+elle+cure"}, ValueError, "method must be"),
        ({"method": "fgsm+trades"}, ValueError, "attacks of its own"),
        ({"eps": -1.0}, ValueError, "eps must be"),
        ({"batch_size": 97}, ValueError, "batch_size must be at most the 96 samples"),
        ({"data": (torch.zeros(3, 8), torch.zeros(2))}, ValueError, "x has 3 samples, y has 2"),
        ({"data": iter([])}, ValueError, "data must be"),
        ({"ema": 1.0}, ValueError, "ema must be a decay"),
        ({"attack": {"stepps": 3}}, TypeError, "stepps"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        train(
            net(), **{"data": data(), "eps": 0.1, "epochs": 1, "batch_size": 32, "method": "fgsm", **change}
        )


def test_method_names() -> None:
    assert method_parts("elle-a") == ("fgsm", "elle-a")
    assert method_parts("N-FGSM + ELLE") == ("n-fgsm", "elle")
    assert method_parts("trades") == ("", "trades")
    assert method_parts("standard") == ("", "")


def test_adversarial_loss_is_the_loss_on_the_attack() -> None:
    x, y = data()
    model = net(0.0)
    z = fgsm(model, x, y, 0.1, clip=(-1.0, 1.0))
    loss = adversarial_loss(model, x, y, attack="fgsm", eps=0.1, clip=(-1.0, 1.0))
    torch.testing.assert_close(loss, F.cross_entropy(model(z), y))
    own = adversarial_loss(model, x, y, attack=lambda model, x, y, eps: x + eps, eps=0.1)
    torch.testing.assert_close(own, F.cross_entropy(model(x + 0.1), y))
    assert adversarial_loss(model, x, y, "n-fgsm", 0.1, noise=0.0, loss_fn=lambda z, y: z[:, 0]).requires_grad
    with pytest.raises(ValueError, match="attack must be a function or one of fgsm, n-fgsm, pgd"):
        adversarial_loss(model, x, y, attack="cw", eps=0.1)


def test_the_issues_two_lines() -> None:
    x, y = data()
    model = net()
    elle = ELLE(model, eps=8 / 255, adaptive=True)
    loss = adversarial_loss(model, x, y, attack="fgsm", eps=8 / 255) + elle(x, y)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


# ---------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_counts() -> None:
    """Of a model whose margins are known, by every attack in batches of any size."""
    x = torch.tensor([[0.30, 0.0], [0.05, 0.0], [0.0, 0.3], [0.2, 0.0], [0.0, 0.15]])
    y = torch.tensor([0, 0, 1, 1, 1])  # margins 0.3, 0.05, 0.3, wrong, 0.15; eps 0.1 takes up to 0.2
    model = nn.Identity()
    for batch_size in (2, 500):
        found = evaluate(
            model,
            (x, y),
            0.1,
            batch_size=batch_size,
            attacks=("fgsm", "pgd-20-2", "apgd-20-ce", "multi-9", "square-200"),
        )
        assert found["clean"] == 0.8
        assert all(found[name] == 0.4 for name in found.accuracy if name != "clean"), found
        assert not found.masked
    mixed = evaluate(
        model,
        [(x[:3], y[:3]), (x[3:], y[3:])],
        0.1,
        attacks={
            "none": lambda model, x, y: x,
            "strong": "fgsm",
            "first": lambda model, x, y: x + torch.tensor([[-0.6, 0]]),
        },
    )
    assert mixed.accuracy == {"clean": 0.8, "none": 0.8, "strong": 0.4, "first": 0.4, "worst": 0.2}


def test_evaluate_prints(capsys: pytest.CaptureFixture) -> None:
    x, y = data(6)
    found = evaluate(net(), (x, y), 0.1, attacks=("fgsm", "pgd-5-1"))
    found.table()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "accuracy on 6 samples, linf, eps 0.1"
    assert [line.split()[0] for line in lines[3:]] == ["clean", "fgsm", "pgd-5-1", "worst"]
    assert str(found).startswith("accuracy in % on 6 samples, linf, eps 0.1: clean ")


def test_evaluate_leaves_the_model_alone() -> None:
    x, y = data()
    model = net().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evaluate(model, (x, y), 0.1, attacks=("fgsm", "apgd-5", "square-20"))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_evaluate_warns_of_probabilities() -> None:
    x, y = data()
    with pytest.warns(UserWarning, match="look like probabilities"):
        evaluate(nn.Sequential(net(), nn.Softmax(1)), (x, y), 0.1, attacks=("fgsm",))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"attacks": "fgsm"}, TypeError, "sequence of names"),
        ({"attacks": ("cw",)}, ValueError, "'cw' is no attack; there are fgsm, pgd-STEPS-STARTS"),
        ({"attacks": ("pgd-20-2-3",)}, ValueError, "no attack"),
        ({"attacks": ("pgd-20-ce",)}, ValueError, "no attack"),
        ({"attacks": ("square",), "norm": "l2"}, ValueError, 'square is of norm="linf"'),
        ({"attacks": {"clean": "fgsm"}}, ValueError, "'clean' is always there"),
        ({"clip": (0.0, 1.0)}, ValueError, r"x reaches from .*\.normalized_ball"),
        ({"data": (torch.zeros(2, 8), torch.zeros(3))}, ValueError, "x has 2 samples"),
        ({"data": []}, ValueError, "at least one sample"),
    ],
)
def test_evaluate_bad_input(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        evaluate(net(), **{"data": data(), "eps": 0.1, **change})


def test_n_fgsm_training_is_not_projected() -> None:
    x, y = data(8)
    assert float((n_fgsm(net(), x, y, 0.1) - x).abs().max()) > 0.1
