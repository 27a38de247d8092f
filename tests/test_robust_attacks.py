"""Attacks: where they may go, how far they get where that is known, what they leave alone, and torchattacks beside them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlin.robust import apgd, evaluate, fgsm, multi_targeted, n_fgsm, normalized_ball, pgd, square
from torchlin.robust._apgd import checkpoints
from torchlin.robust._craft import cross_entropy, log_odds
from torchlin.robust._square import share

ATTACKS: dict[str, Callable[..., Tensor]] = {
    "fgsm": fgsm,
    "pgd": partial(pgd, steps=9),
    "pgd, restarts": partial(pgd, steps=9, restarts=2),
    "apgd": partial(apgd, steps=12),
    "apgd, dlr": partial(apgd, steps=12, loss="dlr", restarts=2),
    "multi": partial(multi_targeted, steps=9),
    "square": partial(square, n_queries=40),
}
L2 = [name for name in ATTACKS if name != "square"]


def small_net(seed: int = 0) -> nn.Sequential:
    """With BatchNorm and dropout, in training mode but for its last part."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.Flatten(), nn.Linear(8 * 36, 16), nn.ReLU(), nn.Linear(16, 4)),
    )
    net(torch.rand(64, 2, 6, 6))  # running statistics that are none of the initial ones
    net[5:].eval()
    return net


def images(count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 2, 6, 6, generator=generator), torch.arange(count) % 4


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A net that gets most of 200 samples right, and is easily fooled."""
    torch.manual_seed(0)
    y = torch.arange(200) % 4
    x = (0.5 + 0.25 * torch.randn(4, 2, 6, 6)[y] + 0.25 * torch.randn(200, 2, 6, 6)).clamp(0, 1)
    net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval(), x, y


# ------------------------------------------------------------------------------------------- where they may go


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(
    "clip", [None, (0.0, 1.0), (torch.tensor([0.0, -1.0]).view(2, 1, 1), torch.ones(2, 1, 1))]
)
def test_linf_ball_and_clip(name: str, clip) -> None:
    x, y = images()
    for eps in (0.0, 0.1, torch.tensor([0.05, 0.2])):
        z = ATTACKS[name](small_net(), x, y, eps, clip=clip)
        size = eps.view(1, 2, 1, 1) if isinstance(eps, Tensor) else eps
        assert not z.requires_grad
        assert z.shape == x.shape
        assert bool((z >= x - size).all())
        assert bool((z <= x + size).all())
        if clip is not None:
            assert bool((z >= clip[0]).all())
            assert bool((z <= clip[1]).all())
        assert isinstance(eps, Tensor) or eps == 0 or not torch.equal(z, x)


@pytest.mark.parametrize("name", L2)
@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_l2_ball_and_clip(name: str, clip) -> None:
    x, y = images()
    z = ATTACKS[name](small_net(), x, y, 0.5, clip=clip, norm="L2")
    lengths = (z.double() - x.double()).flatten(1).norm(dim=1)
    assert float(lengths.max()) <= 0.5 * (1 + 1e-6)
    assert float(lengths.max()) > 0.3
    if clip is not None:
        assert 0 <= float(z.min()) <= float(z.max()) <= 1


def test_random_starts_fill_the_ball() -> None:
    x = torch.zeros(20000, 3)
    flat = nn.Linear(3, 2)
    nn.init.zeros_(flat.weight)  # no gradient: pgd stays where it starts
    generator = torch.Generator().manual_seed(0)
    y = torch.zeros(len(x), dtype=torch.long)
    cube = pgd(flat, x, y, 0.5, steps=1, generator=generator)
    assert cube.abs().max() <= 0.5
    torch.testing.assert_close(cube.var(0), torch.full((3,), 0.5**2 / 3), rtol=0.04, atol=0)
    ball = pgd(flat, x, y, 0.5, steps=1, norm="l2", generator=generator)
    inside = (ball.norm(dim=1) <= 0.25).double().mean()
    assert abs(float(inside) - 1 / 8) < 0.01, "an eighth of a ball is within half of its radius"


def test_n_fgsm_goes_further_on_purpose() -> None:
    x, y = images()
    z = n_fgsm(small_net(), x, y, 0.1, generator=torch.Generator().manual_seed(0))
    assert 0.2 < float((z - x).abs().max()) <= 0.3 + 1e-6
    z = n_fgsm(small_net(), x, y, 0.1, clip=(0.0, 1.0))
    assert 0 <= float(z.min()) <= float(z.max()) <= 1


def test_normalized_ball_is_the_same_ball(trained) -> None:
    net, x, y = trained
    mean, std = torch.tensor([0.4, 0.6]), torch.tensor([0.2, 0.5])
    m, s = mean.view(2, 1, 1), std.view(2, 1, 1)
    plain = pgd(net, x, y, 0.1, steps=5, random_start=False, clip=(0.0, 1.0))
    outside = pgd(
        lambda z: net(z * s + m),
        (x - m) / s,
        y,
        alpha=0.025 / std,
        steps=5,
        random_start=False,
        **normalized_ball(0.1, mean, std),
    )
    torch.testing.assert_close(outside * s + m, plain, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------- how far they get


@pytest.mark.parametrize("name", [*ATTACKS, "n-fgsm without noise"])
def test_linear_model_linf(name: str) -> None:
    """Of two linear logits the worst point is x - eps sign(w_y - w_other), a corner."""
    torch.manual_seed(0)
    linear = nn.Linear(9, 2).double()
    x, y = torch.randn(32, 9, dtype=torch.float64), torch.arange(32) % 2
    toward = linear.weight[1 - y] - linear.weight[y]
    worst = x + 0.01 * toward.sign()  # too little to fool: the attacks go on to the end
    attack: Callable[..., Tensor] = partial(n_fgsm, noise=0.0)
    if name in ATTACKS:
        attack = partial(square, n_queries=600) if name == "square" else ATTACKS[name]
    if name == "apgd, dlr":
        with pytest.raises(ValueError, match="three classes"):
            attack(linear, x, y, 0.01)
        return
    some = linear(worst).argmax(1) == y
    assert some.sum() > 10
    z = attack(linear, x, y, 0.01)
    torch.testing.assert_close(z[some], worst[some].detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd", "multi"])
def test_linear_model_l2(name: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(9, 2).double()
    x, y = torch.randn(32, 9, dtype=torch.float64), torch.arange(32) % 2
    toward = linear.weight[1 - y] - linear.weight[y]
    worst = (x + 0.01 * toward / toward.norm(dim=1, keepdim=True)).detach()
    some = linear(worst).argmax(1) == y
    attack = ATTACKS[name] if name == "fgsm" else partial(ATTACKS[name], steps=60)
    z = attack(linear, x, y, 0.01, norm="l2")
    torch.testing.assert_close(z[some], worst[some], rtol=0, atol=2e-5)
    gain = ((z - x) * toward).sum(1) / (0.01 * toward.norm(dim=1))
    assert float(gain[some].detach().min()) > 1 - 1e-4


def test_apgd_beats_pgd(trained) -> None:
    net, x, y = trained
    loss = lambda z: log_odds(net(z), y).mean().item()  # noqa: E731
    own = torch.Generator().manual_seed(0)
    by_pgd = pgd(net, x, y, 0.13, steps=20, loss="log_odds", generator=own, clip=(0.0, 1.0))
    by_apgd = apgd(net, x, y, 0.13, steps=20, loss="log_odds", generator=own, clip=(0.0, 1.0))
    wrong = [(net(z).argmax(1) != y).sum().item() for z in (by_pgd, by_apgd)]
    assert wrong[1] >= wrong[0] - 1
    assert loss(x) < loss(by_pgd)
    right = net(by_apgd).argmax(1) == y
    gap = (log_odds(net(by_apgd), y) - log_odds(net(by_pgd), y))[right].detach()
    assert float(gap.mean()) > -0.01, "of what is not fooled, the best point that was seen is returned"


def test_restarts_never_do_worse(trained) -> None:
    net, x, y = trained
    fooled = []
    for restarts in (1, 4):
        z = pgd(net, x, y, 0.13, steps=2, restarts=restarts, generator=torch.Generator().manual_seed(3))
        fooled.append(net(z).argmax(1) != y)
    assert bool((fooled[1] | ~fooled[0]).all()), "the first start is the same one"


def test_targeted_goes_there(trained) -> None:
    net, x, y = trained
    aim = (y + 1) % 4
    for attack in (fgsm, partial(pgd, steps=20), partial(apgd, steps=20)):
        z = attack(net, x, aim, 0.3, targeted=True)
        assert (net(z).argmax(1) == aim).double().mean() > (net(x).argmax(1) == aim).double().mean() + 0.5


def test_a_sure_model_hides_nothing() -> None:
    """float32 rounds the gradient of the cross-entropy to zero where the model is sure; the log-odds keep it."""
    net = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        net.weight.copy_(200 * torch.eye(3, 4))
    x, y = torch.tensor([[1.0, 0.0, 0.0, 0.3]]), torch.tensor([0])
    assert torch.equal(fgsm(net, x, y, 0.6), x)
    assert not torch.equal(fgsm(net, x, y, 0.6, loss="log_odds"), x)
    assert evaluate(net, (x, y), 0.6, attacks=("fgsm", "pgd-10-1", "apgd-10-ce")).accuracy == {
        **dict.fromkeys(("clean", "fgsm"), 1.0),
        **dict.fromkeys(("pgd-10-1", "apgd-10-ce", "worst"), 0.0),
    }
    wide = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    classes = torch.arange(6) % 5
    for value in (cross_entropy, log_odds):
        value(wide, classes).sum().backward()
    torch.testing.assert_close(cross_entropy(wide, classes), F.softplus(log_odds(wide, classes)))


def test_apgd_checkpoints_are_the_papers() -> None:
    assert checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]


def test_square_schedule_is_the_papers() -> None:
    at = {0: 1, 10: 1, 11: 2, 51: 4, 201: 8, 501: 16, 1001: 32, 2001: 64, 4001: 128, 6001: 256, 8001: 512}
    for query, divisor in at.items():
        assert share(query, 10000, 0.8) == 0.8 / divisor
    assert share(11, 100, 0.8) == share(1100, 10000, 0.8)


def test_square_asks_so_often_and_takes_no_gradient() -> None:
    asked = []

    def net(z: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        asked.append(len(z))
        return torch.stack((z.flatten(1).sum(1) * 0 + 1, torch.zeros(len(z))), 1)

    x, y = images(5)
    square(net, x, y * 0, 0.1, n_queries=17)
    assert asked == [5] * 17
    asked.clear()
    square(net, x, y * 0 + 1, 0.1, n_queries=17)
    assert asked == [5], "what is wrong already is not asked about again"


def test_square_sees_through_masked_gradients(trained) -> None:
    net, x, y = trained

    def masked(z: Tensor) -> Tensor:
        return net((z * 16).round().div(16).detach() + 0 * z)

    found = evaluate(masked, (x, y), 0.2, clip=(0.0, 1.0), attacks=("pgd-10-1", "square-300"))
    assert found["square-300"] < found["pgd-10-1"] - 0.2
    assert found.masked
    assert found["worst"] == found["square-300"]
    assert not evaluate(net, (x, y), 0.05, attacks=("pgd-10-1", "square-100")).masked


@pytest.mark.parametrize("shape", [(7,), (2, 9), (2, 5, 7), (1, 4, 5, 6)])
def test_square_takes_any_places(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, *shape)
    net = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 2))
    y = net(x).argmax(1)
    z = square(net, x, y, 0.3, n_queries=200)
    assert (net(z).argmax(1) != y).sum() >= (net(x).argmax(1) != y).sum()
    assert bool(((z - x).abs() <= 0.3 + 1e-6).all())


# ----------------------------------------------------------------------------------------- what they leave alone


@pytest.mark.parametrize("name", [*ATTACKS, "n-fgsm"])
@pytest.mark.parametrize("model_training", [False, True])
@pytest.mark.parametrize("where", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_is_left_behind(name: str, model_training: bool, where) -> None:
    attack = ATTACKS.get(name, n_fgsm)
    target = attack.func if isinstance(attack, partial) else attack
    takes = "model_training" in inspect.signature(target).parameters
    if model_training and not takes:
        pytest.skip("always in eval mode")
    net = small_net()
    x, y = images()
    for p in net.parameters():
        p.grad = torch.full_like(p, 3.0)
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    inputs = x.clone()
    with where():
        z = attack(net, x, y, 0.1, **({"model_training": True} if model_training else {}))
        assert torch.is_grad_enabled() == (where is torch.enable_grad)
    assert not torch.equal(z, x)
    assert torch.equal(inputs, x)
    assert modes == [m.training for m in net.modules()]
    assert True in modes
    assert False in modes
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    for p in net.parameters():
        assert torch.equal(p.grad, torch.full_like(p, 3.0))
        assert p.requires_grad


def test_a_forward_before_an_attack_can_still_go_backward() -> None:
    net, (x, y) = small_net().train(), images()
    loss = F.cross_entropy(net(x), y)
    fgsm(net, x, y, 0.1, model_training=True)
    loss.backward()
    assert net[0].weight.grad is not None


def test_modes_come_back_where_the_model_fails() -> None:
    net, (x, y) = small_net(), images()
    modes = [m.training for m in net.modules()]
    with pytest.raises(RuntimeError):
        fgsm(net, x[:, :1], y, 0.1)
    assert modes == [m.training for m in net.modules()]


def test_training_mode_is_the_batchs_statistics() -> None:
    """In the model's own mode the gradient is that of the training forward."""
    net = small_net().train()
    net[3].p = 0.0
    x, y = images()
    moved = copy.deepcopy(net)
    z = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(moved(z), y, reduction="sum"), z)
    assert torch.equal(fgsm(net, x, y, 0.1, model_training=True), x + (0.1 * slope.sign()))
    assert not torch.equal(fgsm(net, x, y, 0.1), x + (0.1 * slope.sign()))


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "fgsm"] + ["n-fgsm"])
def test_a_generator_repeats(name: str) -> None:
    attack = ATTACKS.get(name, n_fgsm)
    net, (x, y) = small_net().eval(), images()
    state = torch.get_rng_state()
    one, two, other = (
        attack(net, x, y, 0.1, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state()), "torch's own generator is not used then"


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"eps": -0.1}, ValueError, "eps must be a finite number >= 0, got -0.1"),
        ({"eps": float("nan")}, ValueError, "eps"),
        ({"eps": "8/255"}, TypeError, "eps must be a float or a tensor"),
        ({"eps": torch.tensor([0.1, -0.1])}, ValueError, "eps must not be negative"),
        ({"eps": torch.ones(3)}, ValueError, r"eps must be a number, one a channel \(2,\)"),
        ({"eps": torch.ones(2), "norm": "l2"}, ValueError, "eps must be one number a sample"),
        ({"norm": "l1"}, ValueError, 'norm must be "linf" or "l2"'),
        ({"clip": 1.0}, TypeError, "clip must be"),
        ({"clip": (1.0, 0.0)}, ValueError, "lowest < highest"),
        ({"steps": 0}, ValueError, "steps must be a whole number >= 1"),
        ({"restarts": 1.5}, ValueError, "restarts must be a whole number"),
        ({"alpha": -1.0}, ValueError, "alpha must be"),
        ({"loss": "kl"}, ValueError, "loss must be a function .* or one of ce, log_odds"),
        ({"y": torch.zeros(3, dtype=torch.long)}, ValueError, "y must be of the 12 samples"),
        ({"x": torch.zeros(12, dtype=torch.long)}, TypeError, "x must be float32"),
        ({"model": lambda z: z}, ValueError, r"model must return logits \(12, classes\)"),
        ({"model": lambda z: z.flatten(1)[:, :1]}, ValueError, "two classes"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], words: str) -> None:
    x, y = images()
    arguments = {"model": small_net(), "x": x, "y": y, "eps": 0.1, **change}
    with pytest.raises(error, match=words):
        pgd(**arguments)


# ------------------------------------------------------------------------------------------------- torchattacks


@pytest.fixture
def torchattacks():
    return pytest.importorskip("torchattacks")


def test_fgsm_and_pgd_are_torchattacks(torchattacks, trained) -> None:
    net, x, y = trained
    theirs = torchattacks.FGSM(net, eps=0.1)(x, y)
    torch.testing.assert_close(fgsm(net, x, y, 0.1, clip=(0.0, 1.0)), theirs, rtol=0, atol=1e-6)
    theirs = torchattacks.PGD(net, eps=0.1, alpha=0.02, steps=7, random_start=False)(x, y)
    ours = pgd(net, x, y, eps=0.1, alpha=0.02, steps=7, random_start=False, clip=(0.0, 1.0))
    assert ((ours - theirs).abs() > 1e-5).double().mean() < 1e-3  # a sign of a gradient next to zero
    theirs = torchattacks.PGDL2(net, eps=0.5, alpha=0.1, steps=7, random_start=False)(x, y)
    ours = pgd(net, x, y, eps=0.5, alpha=0.1, steps=7, random_start=False, norm="l2", clip=(0.0, 1.0))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_apgd_finds_what_torchattacks_finds(torchattacks, trained, loss: str, norm: str) -> None:
    net, x, y = trained
    eps = 0.15 if norm == "Linf" else 1.0
    theirs = torchattacks.APGD(net, norm=norm, eps=eps, steps=20, loss=loss)(x, y)
    ours = apgd(net, x, y, eps, norm=norm, steps=20, loss=loss, clip=(0.0, 1.0))
    held = [(net(z).argmax(1) == y).double().mean().item() for z in (ours, theirs)]
    assert 0.05 < held[1] < 0.95, "a case that tells something"
    assert held[0] <= held[1] + 0.015


def test_square_finds_what_torchattacks_finds(torchattacks, trained) -> None:
    net, x, y = trained
    theirs = torchattacks.Square(net, eps=0.15, n_queries=300)(x, y)
    ours = square(net, x, y, 0.15, n_queries=300, clip=(0.0, 1.0))
    held = [(net(z).argmax(1) == y).double().mean().item() for z in (ours, theirs)]
    assert 0.05 < held[1] < 0.95
    assert held[0] <= held[1] + 0.03
