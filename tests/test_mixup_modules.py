"""Mixup, MixupSchedule, AdaMixUp and their losses: what is drawn, what is mixed with what weight, and what learns."""

from __future__ import annotations

import copy
import doctest
import io
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchlin
from torchlin.nn import (
    AdaMixUp,
    IntrusionDiscriminator,
    Mixup,
    MixupSchedule,
    intrusion_loss,
    mixup_cross_entropy,
)
from torchlin.nn import mixup as module

CLASSES = 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(samples: int, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Sample i is i everywhere: a mix tells its weights. Labels are the indices."""
    x = torch.arange(samples, dtype=dtype).reshape(-1, *[1] * len(shape)).expand(samples, *shape)
    return x, torch.arange(samples)


def test_examples() -> None:
    found = doctest.testmod(module, extraglobs={"torch": torch, "torchlin": torchlin})
    assert found.failed == 0
    assert found.attempted > 15


def test_page_runs() -> None:
    """The code on docs/mixup-methods.md, block after block in one namespace."""
    page = (Path(__file__).parents[1] / "docs" / "mixup-methods.md").read_text()
    namespace: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for block in blocks:
        exec(block, namespace)
    assert len(blocks) == 4
    assert namespace["schedule"].epoch == 3
    assert all(p.grad is not None for p in namespace["mix"].parameters())


# ------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("alpha", [1e-3, 0.2, 1.0, 8.0])
def test_beta_has_its_moments(alpha: float) -> None:
    n = 200_000
    lam = module._beta(alpha, (n,), seeded(), torch.device("cpu")).double()
    assert lam.min() >= 0
    assert lam.max() <= 1
    assert not lam.isnan().any()
    variance = 1 / (4 * (2 * alpha + 1))
    kurtosis = 3 - 6 / (2 * alpha + 3)  # of Beta(a, a)
    assert abs(lam.mean() - 0.5) < 5 * (variance / n) ** 0.5
    assert abs(lam.var() - variance) < 5 * variance * ((kurtosis - 1) / n) ** 0.5
    expected = torch.special.expit(torch.tensor(0.0))  # the median
    assert abs((lam < expected).double().mean() - 0.5) < 5 * 0.5 / n**0.5


def test_partners_are_a_permutation() -> None:
    perms = [tuple(module._permutation(3, seeded(i), torch.device("cpu")).tolist()) for i in range(300)]
    assert set(perms) == set(itertools.permutations(range(3)))


# ----------------------------------------------------------------------------------------- what a batch becomes


@pytest.mark.parametrize("samples", [1, 2, 7])
@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_pair_says_what_x_is(samples: int, mode: str) -> None:
    x, y = batch(samples, 2, 3, dtype=torch.float64)
    before = x.clone()
    mix = Mixup(0.7, mode=mode, generator=seeded(3))
    mixed, (y1, y2, lam) = mix(x, y)
    assert torch.equal(y1, y)
    assert sorted(y2.tolist()) == y.tolist()
    assert lam.shape == (samples,)
    assert lam.dtype is torch.float64
    weights = lam.view(-1, 1, 1)
    torch.testing.assert_close(mixed, weights * x + (1 - weights) * x[y2])
    assert torch.equal(x, before)
    assert (lam.unique().numel() == 1) or mode == "elem"
    if samples == 7 and mode == "elem":
        assert lam.unique().numel() == 7


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_cutmix_counts_its_pixels(mode: str) -> None:
    x, y = batch(6, 3, 9, 11)
    mix = Mixup(0, 1.0, mode=mode, generator=seeded(1))
    cut = 0
    for _ in range(20):
        mixed, (y1, y2, lam) = mix(x, y)
        own = mixed == x
        assert torch.equal(mixed, torch.where(own, x, x[y2]))
        other = y1 != y2
        torch.testing.assert_close(own.float().mean((1, 2, 3))[other], lam[other])
        cut += int((lam < 1).sum())
    assert cut > 60


def test_switch_prob_is_the_share_of_cutmix() -> None:
    mix, cut = Mixup(1.0, 1.0, switch_prob=0.3, generator=seeded()), 0
    for _ in range(500):
        cut += mix._draw_method()
    assert abs(cut / 500 - 0.3) < 5 * (0.21 / 500) ** 0.5
    assert Mixup(1.0, 1.0, switch_prob=1.0)._draw_method()
    assert not Mixup(1.0, 1.0, switch_prob=0.0)._draw_method()
    assert Mixup(0, 1.0, switch_prob=0.0)._draw_method()


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0)])
def test_prob_is_the_share_that_is_mixed(mode: str, alphas: tuple[float, float]) -> None:
    x, y = batch(50, 1, 16, 16)
    mix = Mixup(*alphas, prob=0.4, mode=mode, lam_y=0.6, generator=seeded(2))
    unmixed = torch.tensor([(mix(x, y)[1][2] == 1).float().mean() for _ in range(100)])
    slack = 5 * (0.24 / (100 if mode == "batch" else 5000)) ** 0.5
    lost = 0.06 if alphas[1] else 0  # boxes of no pixel
    assert -slack < unmixed.mean() - 0.6 < slack + lost
    x, y = batch(5, 2)
    same, (_, _, lam) = Mixup(1.0, prob=0.0)(x, y)
    assert torch.equal(same, x)
    assert torch.equal(lam, torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    x, y = batch(4, 3, dtype=dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    mixed, (_, _, lam) = Mixup(1.0)(x, y)
    assert (mixed.dtype, lam.dtype) == (dtype, wide)
    assert Mixup(1.0, num_classes=4)(x, y)[1].dtype is wide


# ------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dense_labels_are_timms(smoothing: float) -> None:
    x, y = batch(6, 2, dtype=torch.float64)
    dense = Mixup(1.0, mode="elem", num_classes=7, label_smoothing=smoothing, generator=seeded())(x, y)[1]
    _, (y1, y2, lam) = Mixup(1.0, mode="elem", generator=seeded())(x, y)
    off = smoothing / 7
    on = 1 - smoothing + off

    def one_hot(labels: Tensor) -> Tensor:
        return torch.full((6, 7), off, dtype=torch.float64).scatter(1, labels.unsqueeze(1), on)

    expected = lam.unsqueeze(1) * one_hot(y1) + (1 - lam).unsqueeze(1) * one_hot(y2)
    torch.testing.assert_close(dense, expected)
    torch.testing.assert_close(dense.sum(1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(), (CLASSES,), (2, 3)])
def test_floating_targets_are_mixed_as_x(shape: tuple[int, ...]) -> None:
    x, target = torch.randn(6, 4), torch.randn(6, *shape)
    mixed = Mixup(1.0, mode="elem", generator=seeded())(x, target)[1]
    _, (_, partner, lam) = Mixup(1.0, mode="elem", generator=seeded())(x, torch.arange(6))
    lam = lam.view(-1, *[1] * len(shape))
    torch.testing.assert_close(mixed, lam * target + (1 - lam) * target[partner])


def test_weights_of_labels_may_differ_from_those_of_features() -> None:
    x, y = batch(64, 1, dtype=torch.float64)

    def weights(**how: Any) -> tuple[Tensor, Tensor]:
        mixed, (y1, y2, of_labels) = Mixup(mode="elem", generator=seeded(5), **how)(x, y)
        differ = y1 != y2
        of_features = ((mixed[:, 0] - y2) / (y1 - y2))[differ]
        return of_features, of_labels[differ]

    features, labels = weights()
    torch.testing.assert_close(features, labels)
    features, labels = weights(lam_y=0.8)
    torch.testing.assert_close(labels, torch.where(features >= 0.5, 0.8, 0.2).double())
    assert features.unique().numel() > 50
    features, labels = weights(lam_x=0.6, lam_y=0.9)
    torch.testing.assert_close(features, torch.full_like(features, 0.6))
    torch.testing.assert_close(labels, torch.full_like(labels, 0.9))
    features, labels = weights(lam_y=lambda lam: lam**2)
    torch.testing.assert_close(labels, features**2)
    features, labels = weights(lam_y="independent")
    assert ((features - 0.5) * (labels - 0.5) > 0).all()
    assert torch.corrcoef(torch.stack([(features - 0.5).abs(), (labels - 0.5).abs()]))[0, 1].abs() < 0.4
    assert (features - labels).abs().max() > 0.1


# ---------------------------------------------------------------------------------- reproducing, saving, modes


@pytest.mark.parametrize(
    "how", [{}, {"cutmix_alpha": 1.0}, {"mode": "elem", "lam_y": "independent"}], ids=str
)
def test_a_generator_repeats_its_batches(how: dict[str, Any]) -> None:
    x, y = torch.randn(7, 3, 8, 8), torch.arange(7)

    def batches(mix: Mixup, count: int = 6) -> list[Tensor]:
        return [t for _ in range(count) for out in [mix(x, y)] for t in (out[0], *out[1])]

    first = Mixup(generator=seeded(9), **how)
    torch.manual_seed(1)
    all_of_them = batches(first)
    torch.manual_seed(2)
    again = Mixup(generator=seeded(9), **how)
    assert all(map(torch.equal, batches(again, 3), all_of_them[:12]))
    file = io.BytesIO()
    torch.save(again.state_dict(), file)
    file.seek(0)
    resumed = Mixup(generator=seeded(0), **how)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert all(map(torch.equal, batches(resumed, 3), all_of_them[12:]))
    assert not all(map(torch.equal, batches(Mixup(generator=seeded(8), **how)), all_of_them))
    torch.manual_seed(4)  # and torch's own numbers, where there is no generator
    expected = batches(Mixup(**how))
    torch.manual_seed(4)
    assert all(map(torch.equal, batches(Mixup(**how)), expected))


def test_evaluation_passes_through_and_the_switch_keeps_the_form() -> None:
    x, y = torch.randn(5, 3), torch.arange(5)
    mixes: list[nn.Module] = [Mixup(1.0), AdaMixUp(nn.Linear(3, 4), 4)]
    for mix in mixes:
        out = mix.eval()(x, y)
        assert out[0] is x
        assert out[1] is y
        mix.train().mixup_enabled = False
        same, (y1, y2, lam) = mix(x, y)
        assert same is x
        assert torch.equal(y1, y)
        assert torch.equal(y2, y)
        assert torch.equal(lam, torch.ones(5))
        logits = torch.randn(5, 5)
        expected = F.cross_entropy(logits, y)
        torch.testing.assert_close(mixup_cross_entropy(logits, (y1, y2, lam)), expected)
        soft = torch.rand(5, 2)
        assert mix(x, soft)[1] is soft
    dense = Mixup(1.0, num_classes=5, label_smoothing=0.1)
    dense.mixup_enabled = False
    torch.testing.assert_close(dense(x, y)[1], 0.9 * torch.eye(5) + 0.02)


def test_schedule_stops_and_resumes() -> None:
    x, y = torch.randn(5, 3), torch.arange(5)
    mix = Mixup(1.0)
    schedule = MixupSchedule(mix, stop_epoch=3)
    on = []
    for _ in range(5):
        on.append(not torch.equal(mix(x, y)[0], x))
        schedule.step()
    assert on == [True, True, True, False, False]
    state = copy.deepcopy(schedule.state_dict())
    other = Mixup(1.0)
    resumed = MixupSchedule(other, stop_epoch=3)
    assert other.mixup_enabled
    resumed.load_state_dict(state)
    assert not other.mixup_enabled
    assert resumed.epoch == 5
    assert not MixupSchedule(mix, 0).mixup.mixup_enabled
    restored = Mixup(1.0)
    restored.load_state_dict(mix.state_dict())
    assert not restored.mixup_enabled
    with pytest.raises(TypeError, match="mixup must have the switch mixup_enabled, got Linear"):
        MixupSchedule(nn.Linear(1, 1), 3)
    with pytest.raises(TypeError, match="stop_epoch must be an int, got float"):
        MixupSchedule(mix, 3.0)
    with pytest.raises(ValueError, match="stop_epoch must not be negative, got -1"):
        MixupSchedule(mix, -1)


@pytest.mark.parametrize(
    "mix", [Mixup(0.5, mode="elem"), Mixup(0, 1.0, num_classes=7)], ids=["mixup", "cutmix"]
)
def test_compiles_as_a_part_of_a_step(mix: Mixup) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))

    def step(x: Tensor, y: Tensor) -> Tensor:
        mixed, target = mix(x, y)
        return mixup_cross_entropy(net(mixed), target)

    x, y = torch.randn(7, 1, 8, 8), torch.arange(7)
    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    losses = [fast(x, y) for _ in range(3)]
    assert len({loss.item() for loss in losses}) == 3
    losses[0].backward()
    assert net[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Mixup(-1.0), ValueError, "mixup_alpha must be a finite number of at least 0, got -1.0"),
        (lambda: Mixup(1.0, float("inf")), ValueError, "cutmix_alpha must be a finite number"),
        (lambda: Mixup(0), ValueError, "mixup_alpha and cutmix_alpha are both 0"),
        (lambda: Mixup(prob=1.5), ValueError, r"prob must be a number in \[0, 1\], got 1.5"),
        (lambda: Mixup(switch_prob=None), ValueError, r"switch_prob must be a number in \[0, 1\], got None"),
        (lambda: Mixup(mode="pair"), ValueError, "mode must be 'batch' or 'elem', got 'pair'"),
        (lambda: Mixup(lam_x=2), ValueError, r"lam_x must be a number in \[0, 1\], got 2"),
        (lambda: Mixup(lam_y="same"), ValueError, "lam_y must be a number, 'independent', a function or None"),
        (lambda: Mixup(label_smoothing=0.1), ValueError, "label_smoothing is of dense labels: give num_classes"),
        (lambda: Mixup(num_classes=0), ValueError, "num_classes must be a positive int or None, got 0"),
        (lambda: Mixup(generator=3), TypeError, "generator must be a torch.Generator or None, got int"),
        (lambda: AdaMixUp(len, 4), TypeError, "policy must be a torch.nn.Module"),
        (lambda: AdaMixUp(nn.Identity(), 0), ValueError, "feat_dim must be a positive int, got 0"),
    ],
)  # fmt: skip
def test_bad_options_are_named(make, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    ("x", "target", "error", "says"),
    [
        (torch.ones(3, 2, dtype=torch.uint8), torch.arange(3), TypeError, "x must be float32"),
        (torch.tensor(1.0), torch.arange(1), ValueError, "x must have a dimension of samples"),
        (torch.ones(3, 2), torch.arange(4), ValueError, r"target must have one row for each of 3 samples, got \(4,\)"),
        (torch.ones(3, 2), [0, 1, 2], TypeError, "target must be a torch.Tensor, got list"),
        (torch.ones(3, 2), torch.eye(3).bool(), TypeError, "target must be integer labels or floating"),
        (torch.ones(3, 2), torch.eye(3).long(), ValueError, r"integer labels must have shape \(B,\), got \(3, 3\)"),
    ],
)  # fmt: skip
def test_bad_batches_are_named(x, target, error: type[Exception], says: str) -> None:
    for mix in (Mixup(1.0), AdaMixUp(nn.Linear(2, 4), 4)):
        with pytest.raises(error, match=says):
            mix(x, target)
    with pytest.raises(ValueError, match=r"x must be \(B, ..., H, W\), got shape \(3, 2\)"):
        Mixup(0, 1.0)(torch.ones(3, 2), torch.arange(3))


# ------------------------------------------------------------------------------------------- loss of the pair


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.tensor([0, 3, 2, 2]),
        torch.tensor([4, 3, 1, 0]),
        torch.tensor([0.3, 0.5, 1.0, 0.0], dtype=dtype),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_is_that_of_dense_labels(smoothing: float, reduction: str) -> None:
    z = torch.randn(4, CLASSES, dtype=torch.float64, requires_grad=True)
    y1, y2, lam = pair()
    lam.requires_grad_()
    how: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
    got = mixup_cross_entropy(z, (y1, y2, lam), **how)
    dense = lam.unsqueeze(1) * F.one_hot(y1, CLASSES) + (1 - lam).unsqueeze(1) * F.one_hot(y2, CLASSES)
    torch.testing.assert_close(got, F.cross_entropy(z, dense, **how))
    torch.testing.assert_close(mixup_cross_entropy(z, dense, **how), got)
    torch.testing.assert_close(mixup_cross_entropy(z, y1, **how), F.cross_entropy(z, y1, **how))
    torch.testing.assert_close(
        got, mixup_cross_entropy(z, (y2, y1, 1 - lam), **how)
    )  # of which one is first does not matter
    assert torch.autograd.gradcheck(lambda z, lam: mixup_cross_entropy(z, (y1, y2, lam), **how), (z, lam))
    assert torch.autograd.gradgradcheck(lambda z, lam: mixup_cross_entropy(z, (y1, y2, lam), **how), (z, lam))
    each = mixup_cross_entropy(z, (y1, y2, lam), label_smoothing=smoothing, reduction="none")
    (dlam,) = torch.autograd.grad(each.sum(), lam)
    places = torch.arange(4)
    torch.testing.assert_close(dlam, -(1 - smoothing) * (z[places, y1] - z[places, y2]))


def test_loss_of_half_logits_is_computed_in_float() -> None:
    z = torch.randn(4, CLASSES).bfloat16()
    got = mixup_cross_entropy(z, pair(torch.float32))
    assert got.dtype is torch.float32
    assert torch.equal(got, mixup_cross_entropy(z.float(), pair(torch.float32)))


@pytest.mark.parametrize(
    ("target", "error", "says"),
    [
        ((torch.arange(4), torch.arange(4)), TypeError, r"target must be a tensor or \(y1, y2, lam\)"),
        ((torch.ones(4), torch.arange(4), torch.ones(4)), TypeError, "y1 must be integer labels, got torch.float32"),
        ((torch.arange(4), torch.arange(3), torch.ones(4)), ValueError, r"y2 must have shape \(4,\), got \(3,\)"),
        ((torch.arange(4), torch.arange(4), torch.ones(4, 1)), ValueError, r"lam must be a scalar or have shape"),
    ],
)  # fmt: skip
def test_loss_names_bad_targets(target, error: type[Exception], says: str) -> None:
    z = torch.zeros(4, CLASSES)
    with pytest.raises(error, match=says):
        mixup_cross_entropy(z, target)
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'all'"):
        mixup_cross_entropy(z, torch.arange(4), reduction="all")
    with pytest.raises(ValueError, match=r"logits must have shape \(B, K\)"):
        mixup_cross_entropy(torch.zeros(4), torch.arange(4))


# ------------------------------------------------------------------------------------------------- AdaMixUp


def ada(dtype: torch.dtype = torch.float64, **how: Any) -> AdaMixUp:
    policy = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh())
    return AdaMixUp(policy, 8, hidden_dim=5, **how).to(dtype)


def set_region(mix: AdaMixUp, a: float, delta: float) -> None:
    """Makes the policy answer (a, delta, 1 - a - delta) for every pair."""
    nn.init.zeros_(mix.output.weight)
    with torch.no_grad():
        mix.output.bias.copy_(torch.tensor([a, delta, 1 - a - delta]).clamp(1e-30).log())


def test_region_is_a_simplex_and_lambda_lies_in_it() -> None:
    mix = ada(torch.float32, generator=seeded(1))
    for parameter in mix.parameters():
        nn.init.normal_(parameter, std=2)
    x, y = torch.randn(500, 2, 3), torch.arange(500)
    region = torch.stack(mix.region(x, x.flip(0)))
    assert (region >= 0).all()
    torch.testing.assert_close(region.sum(0), torch.ones(500))
    assert (region.std(1) > 0.03).all()  # it depends on the pair
    set_region(mix, 0.25, 0.5)
    _, (_, _, lam) = mix(x, y)
    assert lam.min() >= 0.25
    assert lam.max() <= 0.75
    assert abs(lam.mean() - 0.5) < 5 * 0.5 / (12 * 500) ** 0.5
    assert lam.max() - lam.min() > 0.48
    set_region(mix, 0.0, 1.0)
    assert mix(x, y)[1][2].max() <= 1


def test_without_width_it_is_deterministic() -> None:
    mix, x, y = ada(), torch.randn(50, 2, 3, dtype=torch.float64), torch.arange(50)
    set_region(mix, 0.7, 0.0)
    mixed, (_, partner, lam) = mix(x, y)
    torch.testing.assert_close(lam, torch.full_like(lam, 0.7))
    torch.testing.assert_close(mixed, 0.7 * x + 0.3 * x[partner])


def test_policy_sees_the_noisy_average() -> None:
    seen: list[Tensor] = []

    class Policy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x[:, :4]

    mix = AdaMixUp(Policy(), 4, generator=seeded())
    one, two = torch.ones(4000, 10), torch.zeros(4000, 10)
    mix.region(one, two)
    noise = 2 * seen.pop()  # n1, as x2 = 0
    assert noise.abs().max() <= 2
    assert abs(noise.mean()) < 5 * 0.88 / 200
    assert abs(noise.std() - 0.8796) < 0.01  # of a normal number cut off at two deviations
    mix.region(one, one)
    assert abs((2 * seen.pop()).std() - 0.8796 * 2**0.5) < 0.015


def test_gradients_through_lambda() -> None:
    """With the same u: of x, and of the policy's weights, through features and labels."""
    mix, x, y = ada(), torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True), torch.arange(4)
    net = nn.Linear(6, 4).double()
    names = ["output.weight", "output.bias", "hidden.weight", "policy.1.weight"]
    weights = [dict(mix.named_parameters())[name].detach().requires_grad_() for name in names]

    def loss(x: Tensor, *weights: Tensor) -> Tensor:
        mix.generator = seeded(7)
        values = dict(zip(names, weights, strict=True))
        mixed, target = torch.func.functional_call(mix, values, (x, y))
        return mixup_cross_entropy(net(mixed.flatten(1)), target)

    assert torch.autograd.gradcheck(loss, (x, *weights))
    mix.num_classes = 4  # the same by dense labels
    other = torch.autograd.grad(loss(x, *weights), weights)
    mix.num_classes = None
    torch.testing.assert_close(other, torch.autograd.grad(loss(x, *weights), weights))
    assert all(g.abs().sum() > 0 for g in other)


def test_policy_learns_where_mixes_may_lie() -> None:
    """Class 0 on both sides of class 1: only mixes near their first sample or between classes are no intruders."""
    torch.manual_seed(1)
    mix = AdaMixUp(nn.Sequential(nn.Linear(1, 16), nn.ReLU()), 16, generator=seeded(2))
    optimizer = torch.optim.Adam(mix.parameters(), lr=1e-2)
    x = torch.cat([torch.full((64, 1), -1.0), torch.full((64, 1), 1.0)])
    y = torch.zeros(128, dtype=torch.long)

    def intruders() -> Tensor:
        mixed, _ = mix(x, y)
        return torch.exp(-((mixed / 0.4) ** 2)).mean()  # what a critic would say of mixes at class 1, at 0

    first = intruders().item()
    for _ in range(100):
        loss = intruders()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first


def test_intrusion_loss_is_binary_cross_entropy() -> None:
    z = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    real = torch.tensor([True, False, True, True, False, False])
    expected = F.binary_cross_entropy_with_logits(z[:, 1] - z[:, 0], real.double())
    torch.testing.assert_close(intrusion_loss(z, real), expected)
    assert torch.autograd.gradcheck(lambda z: intrusion_loss(z, real), z)
    critic = IntrusionDiscriminator(9, 4)
    assert [tuple(p.shape) for p in critic.parameters()] == [(4, 9), (4,), (2, 4), (2,)]
    with pytest.raises(ValueError, match=r"logits must have shape \(N, 2\), got \(6, 3\)"):
        intrusion_loss(torch.zeros(6, 3), real)
    with pytest.raises(TypeError, match="is_real must be a bool tensor"):
        intrusion_loss(torch.zeros(6, 2), real.float())
    with pytest.raises(ValueError, match=r"is_real must have shape \(5,\), got \(6,\)"):
        intrusion_loss(torch.zeros(5, 2), real)


def test_policy_of_another_width_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"policy must give features of shape \(3, feat_dim = 5\), got \(3, 4\)"
    ):
        AdaMixUp(nn.Linear(2, 4), 5)(torch.ones(3, 2), torch.arange(3))


def test_ada_mixup_repeats_saves_and_compiles() -> None:
    x, y = torch.randn(9, 2, 3), torch.arange(9)
    first, second = ada(torch.float32, generator=seeded(3)), ada(torch.float32, generator=seeded(4))
    second.load_state_dict(first.state_dict())
    out, again = first(x, y), second(x, y)
    assert torch.equal(out[0], again[0])
    assert all(map(torch.equal, out[1], again[1]))
    free = ada(torch.float32)
    fast = torch.compile(free, fullgraph=True, backend="aot_eager")
    mixed, (_, partner, lam) = fast(x, y)
    torch.testing.assert_close(mixed, lam.view(-1, 1, 1) * x + (1 - lam.view(-1, 1, 1)) * x[partner])
    mixed.sum().backward()
    assert free.output.weight.grad.abs().sum() > 0
