"""ELLE against its parts and a closed form, the schedule against a list of numbers, the peers on quadratic losses."""

from __future__ import annotations

import copy
import math
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from torchlin.functional import sample_triplet
from torchlin.robust import (
    CURE,
    ELLE,
    LLR,
    TRADES,
    AdaptiveLambda,
    CollapseWarning,
    GradAlign,
    gradient_alignment,
    linearity_error,
)
from torchlin.robust.elle import CHECK_EVERY

TERMS = [ELLE, partial(ELLE, adaptive=True), GradAlign, LLR, CURE, TRADES]


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def samples(count: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 6, dtype=torch.float64, generator=generator), torch.arange(count) % 4


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------- the schedule


def by_list(
    values: list[float], maximum: float, window: int | None, decay: float = 0.99, sensitivity: float = 2.0
):
    """The schedule as its authors write it: λ after each value."""
    lam, seen, found = 0.0, [], []
    for value in values:
        if math.isfinite(value):
            h = seen if window is None else seen[-window:]
            if len(h) > 2 and value > np.mean(h) + sensitivity * np.std(h):
                lam = maximum
            else:
                lam *= decay
            seen.append(value)
        found.append(lam)
    return found


@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("broken", [False, True])
def test_schedule_is_that_of_a_list(window: int | None, broken: bool) -> None:
    rng = np.random.default_rng(0)
    values = (1e-3 * np.exp(rng.normal(size=400))).tolist()
    if broken:
        for place, bad in ((0, math.nan), (50, math.inf), (51, -math.inf), (120, math.nan)):
            values[place] = bad
    lam = AdaptiveLambda(300.0, window=window)
    found = []
    for value in values:
        lam.update(torch.tensor(value, dtype=torch.float64))
        found.append(float(lam.value))
    expected = by_list(values, 300.0, window)
    assert 10 < sum(value == 300.0 for value in expected) < 200
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)
    if window is None:
        good = [v for v in values if math.isfinite(v)]
        assert float(lam.mean) == pytest.approx(np.mean(good), rel=1e-12)
        assert float((lam.squares / lam.count).sqrt()) == pytest.approx(np.std(good), rel=1e-12)


@pytest.mark.parametrize("window", [None, 8])
def test_equal_values_make_the_threshold_exact(window: int | None) -> None:
    for last, expected in ((1.0, 0.0), (1.0 + 1e-12, 5.0)):
        lam = AdaptiveLambda(5.0, window=window)
        for value in (1.0, 1.0, 1.0, last):
            lam.update(torch.tensor(value, dtype=torch.float64))
        assert float(lam.value) == expected


def test_schedule_resumes() -> None:
    values = np.random.default_rng(1).exponential(size=60).tolist()
    for window in (None, 7):
        whole, first, second = (AdaptiveLambda(10.0, window=window) for _ in range(3))
        for i, value in enumerate(values):
            whole.update(torch.tensor(value))
            part = first if i < 30 else second
            if i == 30:
                second.load_state_dict(copy.deepcopy(first.state_dict()))
            part.update(torch.tensor(value))
        assert torch.equal(whole.value, second.value)
        assert float(whole.value) > 0


def _rank(rank: int, file: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    lam, elle = AdaptiveLambda(10.0), []
    for i in range(8):
        # One rank sees the jump, and later one sees a NaN; alone the other would see neither.
        value = 1.0 + 0.01 * i + (50.0 if rank == 0 and i == 5 else 0.0)
        lam.update(torch.tensor(math.nan if rank == 1 and i == 6 else value))
        elle.append(float(lam.value))
    results.put((rank, elle, float(lam.mean), int(lam.count)))
    torch.distributed.destroy_process_group()


def test_ranks_agree(tmp_path) -> None:
    context = mp.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, str(tmp_path / "store"), results)) for r in range(2)]
    for process in ranks:
        process.start()
    found = sorted(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert found[0][1:] == found[1][1:]
    _, lam, mean, count = found[0]
    assert lam[5] == 10.0
    assert lam[6] == 10.0, "a NaN of any rank changes nothing on all of them"
    assert lam[7] == pytest.approx(9.9)
    assert count == 7
    assert mean == pytest.approx(np.mean([1, 1.01, 1.02, 1.03, 1.04, 26.05, 1.07]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"maximum": -1.0}, "maximum must be"),
        ({"decay": 0.0}, r"decay must be in \(0, 1\]"),
        ({"sensitivity": math.inf}, "sensitivity must be"),
        ({"window": 2}, "window must be at least 3"),
    ],
)
def test_schedule_bad_input(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AdaptiveLambda(**{"maximum": 1.0, **change})


# ------------------------------------------------------------------------------------------------------- ELLE


@pytest.mark.parametrize("penalty", ["square", "huber", "abs"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_elle_is_its_parts(penalty: str, smoothing: float) -> None:
    """Value and every parameter's gradient, against sampler, cross-entropy and residual written out."""
    model, (x, y) = net(), samples()
    elle = ELLE(model, 0.3, 50.0, penalty=penalty, beta=0.01, label_smoothing=smoothing, generator=seeded())
    loss = elle(x, y)
    loss.backward()
    found = [p.grad.clone() for p in model.parameters()]

    points, mix = sample_triplet(x, 0.3, generator=seeded())
    a, b, c = F.cross_entropy(model(points), y.repeat(3), reduction="none", label_smoothing=smoothing).chunk(
        3
    )
    r = c - (1 - mix) * a - mix * b
    value = {
        "square": r.square(),
        "huber": F.smooth_l1_loss(r, 0 * r, beta=0.01, reduction="none"),
        "abs": r.abs(),
    }
    expected = 50.0 * value[penalty].mean()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(elle.error * 50, expected.detach(), rtol=1e-9, atol=0)
    for grad, wanted in zip(found, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-7, atol=1e-12)


def test_targets_of_every_kind() -> None:
    model, (x, y) = net(), samples()
    one_hot = F.one_hot(y, 4).double()
    plain, soft, pair = (
        ELLE(model, 0.3, generator=seeded())(x, target)
        for target in (y, one_hot, (y, y.flip(0), torch.ones(len(y), dtype=torch.float64)))
    )
    torch.testing.assert_close(soft, plain)
    torch.testing.assert_close(pair, plain)
    half = 0.5 * one_hot + 0.5 * one_hot.flip(0)
    for term in (ELLE, partial(ELLE, n_triplets=2)):
        mixed = [
            term(model, 0.3, generator=seeded())(x, target, x)
            for target in (half, (y, y.flip(0), torch.full((len(y),), 0.5, dtype=torch.float64)))
        ]
        torch.testing.assert_close(*mixed)


def test_x_adv_and_joint_forward() -> None:
    """Without BatchNorm one forward or two is the same function; with it, it is not."""
    model, (x, y) = net(), samples()
    x_adv = x + 0.1
    apart = ELLE(model, 0.3, 50.0, generator=seeded())(x, y, x_adv)
    joint = ELLE(model, 0.3, 50.0, joint_forward=True, generator=seeded())(x, y, x_adv)
    alone = ELLE(model, 0.3, 50.0, generator=seeded())(x, y)
    torch.testing.assert_close(joint, apart)
    torch.testing.assert_close(apart, alone + F.cross_entropy(model(x_adv), y))
    normed = nn.Sequential(nn.BatchNorm1d(6), net()).double()
    values = [
        ELLE(normed, 0.3, joint_forward=joint, generator=seeded())(x, y, x + 2) for joint in (False, True)
    ]
    assert abs(float((values[0] / values[1]).detach()) - 1) > 1e-3
    with pytest.raises(ValueError, match="x_adv must be given"):
        ELLE(model, 0.3, joint_forward=True)(x, y)


def test_n_triplets_is_a_mean() -> None:
    """Of more triplets: the same expectation, a smaller spread."""
    model, (x, y) = net(), samples()
    drawn = {}
    for n in (1, 8):
        elle = ELLE(model, 0.5, 1.0, n_triplets=n, generator=seeded())
        drawn[n] = torch.stack([elle(x, y).detach() for _ in range(400)])
    assert float(drawn[1].mean() / drawn[8].mean()) == pytest.approx(1, abs=0.15)
    assert float(drawn[1].std() / drawn[8].std()) == pytest.approx(math.sqrt(8), rel=0.3)


class Quadratic(nn.Module):
    """g·x + x·Hx/2 of each sample, a loss by itself."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        h = torch.randn(size, size, dtype=torch.float64, generator=generator)
        self.h = nn.Parameter(h + h.mT)
        self.g = nn.Parameter(torch.randn(size, dtype=torch.float64, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.g + 0.5 * ((x @ self.h) * x).sum(1)


def as_it_is(losses: Tensor, y: Tensor) -> Tensor:
    return losses


def test_elle_of_a_quadratic_loss() -> None:
    """E[r²] = ε⁴/120 (4/9 ((tr H)² + 2 |H|²) - 4/15 Σ H_ii²), by 10⁶ samples."""
    model, eps, count = Quadratic(), 0.3, 1_000_000
    h = model.h.detach()
    expected = (
        eps**4 / 120 * (4 / 9 * (h.trace() ** 2 + 2 * h.square().sum()) - 4 / 15 * h.diag().square().sum())
    )
    elle = ELLE(model, eps, 1.0, loss_fn=as_it_is, generator=seeded())
    with torch.no_grad():
        points = torch.zeros(count, 6, dtype=torch.float64)
        found = elle(points, torch.zeros(count))
    assert float(found) == pytest.approx(float(expected), rel=0.01)


def test_adaptive_uses_the_new_weight_at_the_next_step() -> None:
    model, (x, y) = net(), samples()
    elle = ELLE(model, 0.3, 100.0, adaptive=True, generator=seeded())
    errors, expected = [], 0.0
    for i in range(30):
        loss = elle(x, y if i != 20 else y.flip(0))
        assert float(loss.detach()) == pytest.approx(expected * float(elle.error), rel=1e-9)
        errors.append(float(elle.error))
        expected = by_list(errors, 100.0, None)[-1]
        assert float(elle.lam) == pytest.approx(expected, rel=1e-12)
    assert expected > 0
    with torch.no_grad():
        elle(x, y)
    assert int(elle.schedule.count) == 30, "a look without gradients is no step"
    loss = elle(x, y)
    elle(x, y)
    loss.backward()  # λ changed meanwhile: the graph has its own copy
    again = ELLE(model, 0.3, 100.0, adaptive=True)
    again.load_state_dict(elle.state_dict())
    assert torch.equal(again.lam, elle.lam)
    assert not list(elle.parameters()), "the model's are not its own"


def test_defaults_are_the_authors() -> None:
    assert ELLE(net(), 0.1).lam == 1000.0
    elle = ELLE(net(), 0.1, adaptive=True)
    assert elle.schedule.maximum == 4000.0
    assert (elle.schedule.decay, elle.schedule.sensitivity, elle.schedule.window) == (0.99, 2.0, None)
    assert float(elle.lam) == 0.0


def test_eps_per_channel_and_clip() -> None:
    seen: list[Tensor] = []

    class Watch(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            seen.append(z)
            return z.flatten(1)[:, :3]

    x, y = torch.rand(9, 2, 3, 3), torch.zeros(9, dtype=torch.long)
    eps = torch.tensor([0.1, 0.4])
    for clip in ((0.0, 1.0), (torch.zeros(2, 1, 1), torch.tensor([1.0, 0.5]).view(2, 1, 1))):
        ELLE(Watch(), eps, clip=clip)(x, y)
        a, b, c = seen[-1].chunk(3)
        for z in (a, b, c):
            far = (z - x).abs().amax((0, 2, 3))
            assert float(far[0]) <= 0.1 + 1e-6
            assert float(z.min()) >= 0
            assert bool((z.amax((0, 2, 3)) <= torch.as_tensor(clip[1]).flatten()).all())
        assert 0.3 < float((a - x).abs().max()) <= 1


def test_collapse_is_seen_once() -> None:
    x, y = samples(32)
    constant = nn.Linear(6, 4).double()
    nn.init.zeros_(constant.weight)
    elle = ELLE(constant, 0.1, 5000.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4 * CHECK_EVERY):
            elle(x, y)
    assert [w.category for w in caught] == [CollapseWarning]
    assert re.search("same prediction .*lam=5000 is too large", str(caught[0].message))
    assert elle.collapsed
    assert float(elle.error) < 1e-20
    alive = ELLE(net(), 0.1)
    for _ in range(2 * CHECK_EVERY):
        alive(x, y)
    assert not alive.collapsed


# ------------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("make", TERMS)
def test_terms_share_one_interface(make) -> None:
    model, (x, y) = net(), samples()
    term = make(model, 0.2, generator=seeded())
    alone = term(x, y)
    assert alone.shape == ()
    assert alone.requires_grad
    with_loss = make(model, 0.2, generator=seeded())(x, y, x)
    assert float(with_loss.detach()) > 0
    with_loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    model.eval()
    with pytest.raises(ValueError, match="model is in eval mode"):
        term(x, y)
    with torch.no_grad():
        if make in TERMS[:2]:
            assert float(term(x, y)) >= 0
    model.train()
    with pytest.raises(ValueError, match="lam must be"):
        make(model, 0.2, lam=-1.0)
    with pytest.raises(ValueError, match="eps must be"):
        make(model, -0.2)
    with pytest.raises(ValueError, match="norm must be"):
        make(model, 0.2, norm="l0")


def test_llr_of_a_quadratic_loss() -> None:
    """The tangent plane misses d·Hd/2, d = x3 - x2 the difference of two uniform points."""
    model, eps, count = Quadratic(), 0.3, 400_000
    h = model.h.detach()
    # E[(d·Hd)²] for independent coordinates of variance v = 2ε²/3 and fourth moment m = 16ε⁴/15.
    v, m = 2 * eps**2 / 3, 16 * eps**4 / 15
    expected = (v**2 * (h.trace() ** 2 + 2 * h.square().sum()) + (m - 3 * v**2) * h.diag().square().sum()) / 4
    found = LLR(model, eps, 1.0, loss_fn=as_it_is, generator=seeded())(
        torch.randn(count, 6, dtype=torch.float64), torch.zeros(count)
    )
    assert float(found.detach()) == pytest.approx(float(expected), rel=0.02)


def test_cure_of_a_quadratic_loss() -> None:
    model, (x, y), eps = Quadratic(), samples(), 0.3
    with torch.no_grad():
        h = eps * (model.g + x @ model.h).sign()
        expected = (h @ model.h).square().sum(1).mean()
    cure = CURE(model, eps, 2.0, loss_fn=as_it_is)
    torch.testing.assert_close(cure(x, y).detach(), 2 * expected)
    x_adv = x + 0.1
    change = (0.1 * torch.ones_like(x) @ model.h).square().sum(1).mean()
    torch.testing.assert_close(cure(x, y, x_adv), model(x_adv).mean() + 2 * change)


def test_gradalign_of_a_quadratic_loss() -> None:
    model, (x, y), eps = Quadratic(), samples(), 0.3
    found = GradAlign(model, eps, 2.0, loss_fn=as_it_is, generator=seeded())(x, y)
    start = x + eps * (2 * torch.rand(x.shape, generator=seeded(), dtype=x.dtype) - 1)
    h = 0.5 * (model.h + model.h.mT)
    slopes = model.g + x @ h, model.g + start @ h
    expected = 2 * (1 - F.cosine_similarity(slopes[0].detach(), slopes[1])).mean()
    torch.testing.assert_close(found, expected)
    for grad, wanted in zip(
        torch.autograd.grad(found, list(model.parameters())),
        torch.autograd.grad(expected, list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(grad, wanted)
    known = GradAlign(model, eps, 2.0, loss_fn=as_it_is, generator=seeded())
    torch.testing.assert_close(known(x, y, slope=slopes[0].detach()), expected)
    flat = nn.Linear(6, 4).double()
    nn.init.zeros_(flat.weight)
    assert float(GradAlign(flat, eps)(x, y).detach()) == 0, "samples without a gradient are left out"


def test_trades_goes_where_the_prediction_changes() -> None:
    model, (x, y) = net(), samples()
    trades = TRADES(model, 0.3, 1.0, generator=seeded())
    z = trades.attack(x)
    assert float((z - x).abs().max()) <= 0.3 + 1e-12
    log_p, log_q = (model(points).log_softmax(1) for points in (x, z))
    expected = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    torch.testing.assert_close(TRADES(model, 0.3, 1.0, generator=seeded())(x, y), expected)
    noise = x + 0.3 * torch.randn_like(x).sign()
    log_q = model(noise).log_softmax(1)
    assert float(expected.detach()) > float((log_p.exp() * (log_p - log_q)).sum(1).mean().detach())


# -------------------------------------------------------------------------------------------------- diagnostics


def test_linearity_error_forms() -> None:
    model, (x, y) = net(), samples(200)
    before = copy.deepcopy(model.state_dict())
    errors = {}
    for of in ("loss", "logits"):
        for mix in ("random", 0.5, 0.0, "worst"):
            errors[of, mix] = linearity_error(
                model, x, y, 0.5, of=of, mix=mix, reduction="none", generator=seeded()
            )
    points, mix = sample_triplet(x, 0.5, generator=seeded())
    a, b, c = F.cross_entropy(model(points), y.repeat(3), reduction="none").chunk(3)
    torch.testing.assert_close(
        errors["loss", "random"], (c - (1 - mix) * a - mix * b).square(), rtol=1e-6, atol=1e-15
    )
    za, zb, zc = model(points).chunk(3)
    logits = (zc - torch.lerp(za, zb, mix[:, None])).square().mean(1)
    torch.testing.assert_close(errors["logits", "random"], logits, rtol=1e-6, atol=1e-15)
    for of in ("loss", "logits"):
        assert float(errors[of, 0.0].max()) < 1e-25
        assert bool((errors[of, "worst"] >= errors[of, "random"] * (1 - 1e-9)).all())
        assert errors[of, "worst"].mean() > 1.2 * errors[of, "random"].mean()
    assert linearity_error(model, x, None, 0.5, of="logits").shape == ()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    for change, words in (
        ({"of": "gradient"}, "of must be"),
        ({"mix": "middle"}, "mix must be"),
        ({"mix": 1.5}, r"mix must be in \[0, 1\]"),
        ({"reduction": "sum"}, "reduction must be"),
    ):
        with pytest.raises(ValueError, match=words):
            linearity_error(model, x, y, 0.5, **change)


def test_linearity_error_is_of_fourth_order() -> None:
    model, (x, y) = net(), samples(200)
    errors = [float(linearity_error(model, x, y, eps, generator=seeded())) for eps in (0.01, 0.02)]
    assert errors[1] / errors[0] == pytest.approx(16, rel=0.05)


def test_gradient_alignment() -> None:
    (x, y) = samples(50)
    linear = nn.Linear(6, 2).double()
    assert float(gradient_alignment(linear, x, y * 0, 1.0)) == pytest.approx(1)
    bent = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 4)).double()
    assert float(gradient_alignment(bent, x, y, 0.01)) > float(gradient_alignment(bent, x, y, 3.0))
