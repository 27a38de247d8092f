"""The local-linearity loss: the battery, its identities, its edges, bad input."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import battery
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import torchlin
from torchlin.functional import cross_entropy_linearity, local_linearity
from torchlin.nn.linearity import LocalLinearityLoss
from torchlin.ops import linearity
from torchlin.ops.linearity import PENALTIES, cross_entropy_linearity_reference, local_linearity_reference

pytestmark = pytest.mark.filterwarnings("ignore:cross_entropy_linearity got torch.*16 logits")

# ------------------------------------------------------------------------------------------------ the battery


def _shares(
    *shape: int, seed: int = 0, device: Any = None, dtype: Any = torch.float64, grad: bool = True
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    return values.to(device, dtype).requires_grad_(grad)


def _labels(size: int, classes: int, seed: int = 0, device: Any = None) -> Tensor:
    return torch.randint(classes, (size,), generator=torch.Generator().manual_seed(seed)).to(device)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[battery.Sample]:
    def logits(size: int, classes: int, seed: int = 0) -> Tensor:
        return battery.randn(3 * size, classes, device=device, dtype=dtype, seed=seed)

    def mix(*shape: int) -> Tensor:
        return _shares(*shape, device=device, dtype=dtype)

    def labels(size: int, classes: int, seed: int = 0) -> Tensor:
        return _labels(size, classes, seed, device)

    def sample(name: str, size: int, classes: int, **options: Any) -> battery.Sample:
        return battery.Sample(name, logits(size, classes), labels(size, classes), mix(size), **options)

    weight = _shares(13, seed=2, device=device, dtype=dtype, grad=False)
    soft = _shares(4, 13, seed=3, device=device, dtype=dtype, grad=False)
    pair = (labels(4, 13), labels(4, 13, 1), _shares(4, seed=4, device=device, dtype=dtype, grad=False))
    ignored = labels(6, 5).index_fill(0, torch.tensor([1, 4], device=device), -100)
    three = [battery.randn(4, 7, device=device, dtype=dtype, seed=s) for s in range(3)]
    yield sample("4x13", 4, 13)
    yield sample("empty", 0, 5, reduction="none")
    yield battery.Sample("one of 600 classes", logits(1, 600), labels(1, 600), mix(1))
    yield battery.Sample("one class, one mix", logits(5, 1), labels(5, 1), mix())
    yield battery.Sample(
        "three tensors, mix of an image", three, labels(4, 7), mix(4, 1, 1, 1), reduction="sum"
    )
    yield sample(
        "none, huber, losses", 4, 17, penalty="huber", beta=0.5, reduction="none", return_losses=True
    )
    yield sample("sum, abs, smooth", 4, 33, penalty="abs", label_smoothing=0.2, reduction="sum")
    yield sample("weight, smooth", 4, 13, weight=weight, label_smoothing=0.1)
    yield battery.Sample("ignored, losses", logits(6, 5), ignored, mix(6), return_losses=True)
    yield battery.Sample(
        "soft, weight, smooth", logits(4, 13), soft, mix(4), weight=weight, label_smoothing=0.3
    )
    yield battery.Sample("pair, weight", logits(4, 13), pair, mix(4), weight=weight)
    yield sample("large", 70, 333)


def _inside(fn: Any) -> Any:
    """fn with its mix clamped to [0, 1]: what else an op would refuse, and the battery tries, is outside."""
    return lambda logits, target, mix, **options: fn(logits, target, mix.clamp(0, 1), **options)


def emulated() -> dict[str, Any]:
    from simt import linearity as kernels

    return {
        "_linearity_fwd": kernels.fwd,
        "_linearity_fwd_grad": kernels.fwd_grad,
        "_linearity_bwd": kernels.bwd,
        "_linearity_scale_": kernels.scale,
    }


OP = battery.Op(
    name="cross_entropy_linearity",
    public=_inside(cross_entropy_linearity),
    reference=_inside(cross_entropy_linearity_reference),
    samples=samples,
    raw=("_linearity_fwd", "_linearity_fwd_grad", "_linearity_bwd", "_linearity_scale_"),
    names=(("loss", "local_linearity"),),
    nonfinite="spread",  # of infinite weights and probabilities; logits have tests of their own below
    ulps=3.0,
    forward_ad=True,
    emulated=emulated,
    skip={
        "emulated/float64": "float64 on CUDA runs the reference",
        # The truth here is the reference itself, and what is compared a difference of losses: tests below allow 1e-11.
        "gradient/float64": "no more exact than the reference: test_torch_composed_of_its_cross_entropy",
        "isa/float64": "no more exact than the reference: test_every_length_of_a_row",
    },
)

test_battery = battery.tests(OP)

# ------------------------------------------------------------------------------------------------ what it is


def _composed(losses: Tensor, mix: Tensor, penalty: str, beta: float, reduction: str) -> Tensor:
    """The penalty as its authors compose it of torch's losses, (3, B)."""
    a, b, c = losses
    chord = (1 - mix) * a + mix * b
    if penalty == "square":
        return F.mse_loss(c, chord, reduction=reduction)
    if penalty == "huber":
        return F.smooth_l1_loss(c, chord, beta=beta, reduction=reduction)
    return F.l1_loss(c, chord, reduction=reduction)


WEIGHT = _shares(7, seed=5, grad=False) + 0.5


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weight"])
@pytest.mark.parametrize("kind", ["labels", "soft"])
def test_torch_composed_of_its_cross_entropy(
    penalty: Any, reduction: Any, smoothing: float, weight: Tensor | None, kind: str
) -> None:
    size, classes, beta = 5, 7, 0.4
    target = _labels(size, classes) if kind == "labels" else _shares(size, classes, seed=6, grad=False)
    z, mix = battery.randn(3 * size, classes, device="cpu", dtype=torch.float64), _shares(size)
    options = {"weight": weight, "label_smoothing": smoothing}
    value, losses = cross_entropy_linearity(
        z, target, mix, penalty=penalty, beta=beta, reduction=reduction, return_losses=True, **options
    )
    thrice = target.repeat(3, *[1] * (target.dim() - 1))
    expected_losses = F.cross_entropy(z, thrice, reduction="none", **options).view(3, size)
    expected = _composed(expected_losses, mix, penalty, beta, reduction)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-12)
    cotangents = [torch.randn_like(value), torch.randn_like(losses)]
    slopes = torch.autograd.grad([value, losses], [z, mix], cotangents)
    expected_slopes = torch.autograd.grad([expected, expected_losses], [z, mix], cotangents)
    torch.testing.assert_close(slopes, expected_slopes, rtol=1e-11, atol=1e-12)
    alone = cross_entropy_linearity(
        z, target, mix, penalty=penalty, beta=beta, reduction=reduction, **options
    )
    (slope,) = torch.autograd.grad(alone, z, cotangents[0])
    (expected_slope,) = torch.autograd.grad(
        _composed(
            F.cross_entropy(z, thrice, reduction="none", **options).view(3, size),
            mix,
            penalty,
            beta,
            reduction,
        ),
        z,
        cotangents[0],
    )
    torch.testing.assert_close(slope, expected_slope, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(
        value,
        local_linearity(*losses, mix, penalty=penalty, beta=beta, reduction=reduction),
        rtol=1e-12,
        atol=0,
    )


def _case(
    size: int, classes: int, dtype: Any = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    z = battery.randn(3 * size, classes, device="cpu", dtype=dtype, seed=seed)
    return z, _labels(size, classes, seed), _shares(size, seed=seed, dtype=dtype)


def _slope(z: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return torch.autograd.grad(cross_entropy_linearity(z, *arguments, **options), z)[0]


@pytest.mark.parametrize("level", battery.available_isa_levels() or [""])
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 130, 257, 1100])
def test_every_length_of_a_row(level: str, classes: int) -> None:
    before = torch.ops.torchlin._cpu_isa() if level else ""
    size = 3
    dense = _shares(size, classes, seed=7, grad=False)
    targets = {
        "labels": (_labels(size, classes), {}),
        "smooth": (_labels(size, classes), {"label_smoothing": 0.1}),
    }
    targets["dense"] = (dense, {})
    try:
        if level:
            torch.ops.torchlin._set_cpu_isa(level)
        for target, options in targets.values():
            z, _, mix = _case(size, classes)
            _, losses = cross_entropy_linearity(z, target, mix, return_losses=True, **options)
            slope = _slope(z, target, mix, **options)
            expected = F.cross_entropy(
                z, target.repeat(3, *[1] * (target.dim() - 1)), reduction="none", **options
            )
            torch.testing.assert_close(losses, expected.view(3, size), rtol=1e-12, atol=1e-12)
            reference = cross_entropy_linearity_reference(z, target, mix, **options)
            torch.testing.assert_close(slope, torch.autograd.grad(reference, z)[0], rtol=1e-10, atol=1e-13)
            single = z.detach().float().requires_grad_()
            target = target.float() if target.is_floating_point() else target
            torch.testing.assert_close(
                _slope(single, target, mix.detach().float(), **options).double(), slope, rtol=1e-4, atol=1e-5
            )
    finally:
        if level:
            torch.ops.torchlin._set_cpu_isa(before)


@pytest.mark.parametrize("classes", [7, 8, 512, 516, 519, 1100])
@pytest.mark.parametrize("kind", ["labels", "smooth", "weight", "soft", "pair"])
def test_emulated_kernels(classes: int, kind: str) -> None:
    """A warp and a block for a sample, single elements and vectors, every kind of target, against the CPU's kernels."""
    from simt import linearity as kernels

    size = 5 if classes < 100 else 1
    z, y, mix = (t.detach() for t in _case(size, classes, torch.float32))
    y[0] = -100 if size > 1 else y[0]
    options: dict[str, Any] = {"penalty": 1, "beta": 0.5, "reduction": 1}
    target = y
    if kind in ("smooth", "weight"):
        options["smoothing"] = 0.1
    if kind == "weight":
        options["weight"] = _shares(classes, grad=False).float()
    if kind == "soft":
        target = _shares(size, classes, seed=1, grad=False).float()
    if kind == "pair":
        options |= {"others": _labels(size, classes, 4), "lam": _shares(size, seed=2, grad=False).float()}
    names = ("b", "c", "others", "lam", "weight", "smoothing", "ignore_index", "penalty", "beta", "reduction")
    defaults = dict(zip(names, (None, None, None, None, None, 0.0, -100, 0, 1.0, 1), strict=True))
    arguments = (z, target, mix, *(defaults | options).values())
    grads = torch.tensor(0.7), torch.randn(3, size)
    raw = torch.ops.torchlin
    for got, expected in (
        (kernels.fwd(*arguments), raw._linearity_fwd(*arguments)),
        (kernels.fwd_grad(*arguments), raw._linearity_fwd_grad(*arguments)),
        (kernels.bwd(*grads, *arguments), raw._linearity_bwd(*grads, *arguments)),
    ):
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
    rows, by = torch.randn(3 * size, classes), torch.randn(size)
    expected_rows = rows * by.repeat(3).unsqueeze(1)
    kernels.scale(rows, by)
    torch.testing.assert_close(rows, expected_rows)


def test_emulated_kernels_refuse_a_class_out_of_range() -> None:
    from simt import linearity as kernels
    from simt.build import load

    z, y, mix = (t.detach() for t in _case(3, 4, torch.float32))
    with pytest.raises(load("linearity").Error, match="class number out of range"):
        kernels.fwd(z, y + 4, mix)


def test_rows_sum_to_nothing() -> None:
    """A constant on all logits of a row changes no loss: every row's gradient sums to 0, also where T does not sum to 1."""
    z, y, mix = _case(6, 11)
    for target in (y, _shares(6, 11, grad=False), (y, y.flip(0), 0.3)):
        assert _slope(z, target, mix).sum(-1).abs().max() < 1e-15
        shifted = z + torch.randn(18, 1, dtype=torch.float64)
        same = cross_entropy_linearity(z, target, mix)
        torch.testing.assert_close(
            cross_entropy_linearity(shifted, target, mix), same, rtol=1e-12, atol=1e-14
        )


def test_blocks_sum_to_nothing() -> None:
    """The residual's coefficients (mix - 1, -mix, 1) sum to 0: of three equal rows, so do the gradients."""
    z, y, mix = _case(4, 5)
    same = z.detach()[:4].repeat(3, 1).requires_grad_()
    assert cross_entropy_linearity(same, y, mix).item() < 1e-30
    slope = _slope(same, y, mix, penalty="abs", reduction="sum")
    assert torch.equal(slope.view(3, 4, 5).sum(0), torch.zeros(4, 5, dtype=torch.float64))
    # with a residual of one kind of its own, through the losses' cotangents
    _, losses = cross_entropy_linearity(same, y, mix, return_losses=True)
    rho = torch.randn(4, dtype=torch.float64)
    q = torch.stack(((mix - 1) * rho, -mix * rho, rho)).detach()
    (slope,) = torch.autograd.grad(losses, same, q)
    assert slope.view(3, 4, 5).sum(0).abs().max() < 1e-15
    assert slope.abs().max() > 0.01


def test_swapping_the_ends() -> None:
    z, y, mix = _case(5, 6)
    a, b, c = z.chunk(3)
    value, swapped = (
        cross_entropy_linearity((a, b, c), y, mix),
        cross_entropy_linearity((b, a, c), y, 1 - mix),
    )
    torch.testing.assert_close(value, swapped, rtol=1e-13, atol=0)
    order = torch.tensor([4, 2, 0, 1, 3])
    moved = cross_entropy_linearity((a[order], b[order], c[order]), y[order], mix[order])
    torch.testing.assert_close(value, moved, rtol=1e-13, atol=0)


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_the_third_point_at_an_end(mix: float) -> None:
    z, y, _ = _case(5, 6)
    a, b, _ = z.detach().chunk(3)
    for penalty in PENALTIES:
        ends = torch.cat((a, b, b if mix else a)).requires_grad_()
        assert cross_entropy_linearity(ends, y, mix, penalty=penalty).item() == 0
        assert not _slope(ends, y, mix, penalty=penalty).any()


def test_one_class() -> None:
    z, y, mix = _case(4, 1)
    for options in ({}, {"label_smoothing": 0.3}, {"penalty": "abs"}, {"weight": torch.rand(1).double()}):
        value, losses = cross_entropy_linearity(z, y, mix, return_losses=True, **options)
        assert value.item() == 0
        assert not losses.any()
        assert not torch.autograd.grad(value + losses.sum(), z)[0].any()
        assert not _slope(z, y, mix, **options).any()


def test_empty_batch() -> None:
    z, y, mix = _case(0, 4)
    assert math.isnan(cross_entropy_linearity(z, y, mix))
    assert cross_entropy_linearity(z, y, mix, reduction="sum").item() == 0
    value, losses = cross_entropy_linearity(z, y, mix, reduction="none", return_losses=True)
    assert (value.shape, losses.shape) == ((0,), (3, 0))
    assert _slope(z, y, 0.5).shape == (0, 4)


def test_pairs_are_mixed_probabilities() -> None:
    z, first, mix = _case(6, 5)
    second, lam = (
        _labels(6, 5, 1).index_copy(0, torch.tensor([2]), first[2:3]),
        _shares(6, seed=9, grad=False),
    )
    for share in (lam, lam[0], 0.3, 0.0, 1.0):
        part = share if isinstance(share, float) or not share.dim() else share.unsqueeze(1)
        dense = part * F.one_hot(first, 5).double() + (1 - part) * F.one_hot(second, 5).double()
        for options in ({}, {"label_smoothing": 0.1, "weight": _shares(5, seed=3, grad=False)}):
            pair, soft = (first, second, share), dense
            torch.testing.assert_close(
                cross_entropy_linearity(z, pair, mix, **options),
                cross_entropy_linearity(z, soft, mix, **options),
            )
            torch.testing.assert_close(_slope(z, pair, mix, **options), _slope(z, soft, mix, **options))
    once = cross_entropy_linearity(z, (first, second, lam), mix)
    torch.testing.assert_close(once, cross_entropy_linearity(z, (second, first, 1 - lam), mix))


def test_gradients_of_what_is_seldom_learnt() -> None:
    """lam, soft targets and weights have theirs too: by the reference, never none."""
    z, y, mix = _case(3, 4)
    lam, soft, weight = _shares(3, seed=1), _shares(3, 4, seed=2), _shares(4, seed=3)
    torch.autograd.gradcheck(lambda s: cross_entropy_linearity(z, (y, y.flip(0), s), mix), (lam,))
    torch.autograd.gradcheck(lambda t, w: cross_entropy_linearity(z, t, mix, weight=w), (soft, weight))


# ------------------------------------------------------------------------------------------------ edges


def test_masked_classes() -> None:
    """A logit of -inf is a class that is not there, with gradient 0; if it should have been, the loss is +inf."""
    z, y, mix = _case(4, 6)
    masked = z.detach().clone()
    masked[:, 3] = -math.inf
    y = torch.where(y == 3, 0, y)
    masked.requires_grad_()
    rest = torch.cat((z[:, :3], z[:, 4:]), 1).detach().requires_grad_()
    fewer = torch.where(y > 3, y - 1, y)
    torch.testing.assert_close(
        cross_entropy_linearity(masked, y, mix), cross_entropy_linearity(rest, fewer, mix), rtol=1e-12, atol=0
    )
    slope, expected = _slope(masked, y, mix), _slope(rest, fewer, mix)
    assert not slope[:, 3].any()
    torch.testing.assert_close(torch.cat((slope[:, :3], slope[:, 4:]), 1), expected, rtol=1e-12, atol=1e-15)
    soft = _shares(4, 6, grad=False)
    soft[:, 3] = 0
    value, losses = cross_entropy_linearity(masked, soft, mix, return_losses=True)  # torch: 0 * inf
    assert torch.isfinite(losses).all()
    assert not _slope(masked, soft, mix)[:, 3].any()
    torch.testing.assert_close(
        value,
        cross_entropy_linearity(rest, torch.cat((soft[:, :3], soft[:, 4:]), 1), mix),
        rtol=1e-12,
        atol=0,
    )
    for target, options in ((torch.full((4,), 3), {}), (y, {"label_smoothing": 0.1}), (soft + 0.1, {})):
        _, losses = cross_entropy_linearity(masked, target, mix, return_losses=True, **options)
        assert torch.isposinf(losses).all()


@pytest.mark.parametrize("spoil", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [5, 70])
def test_a_spoilt_row_is_its_samples_own(spoil: float, dtype: torch.dtype, classes: int) -> None:
    z, y, mix = _case(5, classes, dtype)
    for block, options in itertools.product(range(3), ({}, {"penalty": "abs"}, {"label_smoothing": 0.1})):
        spoilt = z.detach().clone()
        row = block * 5 + 2
        spoilt[row] = (
            spoil if spoil == -math.inf else torch.where(torch.arange(classes) == 4, spoil, spoilt[row])
        )
        spoilt.requires_grad_()
        value = cross_entropy_linearity(spoilt, y, mix, reduction="none", **options)
        clean = cross_entropy_linearity(z, y, mix, reduction="none", **options)
        others = torch.tensor([0, 1, 3, 4])
        assert torch.isnan(value[2])
        assert torch.equal(value[others], clean[others])
        slope, expected = (torch.autograd.grad(v.sum(), t)[0] for v, t in ((value, spoilt), (clean, z)))
        assert torch.equal(slope.view(3, 5, -1)[:, others], expected.view(3, 5, -1)[:, others])
        assert torch.isnan(slope.view(3, 5, -1)[:, 2]).all()


def test_ignored_samples() -> None:
    """They are 0 everywhere, whatever their logits, and the mean is over the others."""
    z, y, mix = _case(6, 5)
    kept = torch.tensor([0, 2, 3, 5])
    y = y.index_fill(0, torch.tensor([1, 4]), -7)
    spoilt = z.detach().clone()
    spoilt.view(3, 6, 5)[:, 1] = math.nan
    spoilt.requires_grad_()
    rows = z.view(3, 6, 5)[:, kept].reshape(12, 5)
    for penalty in PENALTIES:
        value, losses = cross_entropy_linearity(
            spoilt, y, mix, penalty=penalty, ignore_index=-7, return_losses=True
        )
        torch.testing.assert_close(
            value, cross_entropy_linearity(rows, y[kept], mix[kept], penalty=penalty), rtol=1e-13, atol=0
        )
        assert not losses[:, [1, 4]].any()
        slope, slope_mix = torch.autograd.grad(value, (spoilt, mix), retain_graph=True)
        assert not slope.view(3, 6, 5)[:, [1, 4]].any()
        assert not slope_mix[[1, 4]].any()
        assert torch.equal(_slope(spoilt, y, mix, penalty=penalty, ignore_index=-7), slope)
    none = cross_entropy_linearity(z, y, mix, ignore_index=-7, reduction="none")
    assert torch.equal(none == 0, y == -7)
    pair = cross_entropy_linearity(z, (y, _labels(6, 5, 2), 0.5), mix, ignore_index=-7, reduction="none")
    assert torch.equal(pair == 0, y == -7)
    nobody = torch.full((6,), -100)
    assert math.isnan(cross_entropy_linearity(z, nobody, mix))
    assert not _slope(z, nobody, mix).any()
    # a class may be the one that is ignored
    third = cross_entropy_linearity(z, _labels(6, 5), mix, ignore_index=3, reduction="none")
    assert torch.equal(third == 0, _labels(6, 5) == 3)


# ------------------------------------------------------------------------------------------------ theory


def test_curvature_of_a_quadratic() -> None:
    """Of L = g x + x H x / 2 the residual is -mix (1 - mix)/2 d H d, d = x_b - x_a, at every sample."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    g, root, a, b = draw(6), draw(6, 6), draw(50, 6), draw(50, 6)
    h, mix = root + root.T, torch.rand(50, generator=generator, dtype=torch.float64)
    loss = lambda x: x @ g + ((x @ h) * x).sum(-1) / 2  # noqa: E731
    c, d = torch.lerp(a, b, mix.unsqueeze(1)), b - a
    expected = -mix * (1 - mix) / 2 * ((d @ h) * d).sum(-1)
    value = local_linearity(loss(a), loss(b), loss(c), mix, penalty="square", reduction="none")
    torch.testing.assert_close(value, expected.square(), rtol=1e-11, atol=1e-13)
    size = local_linearity(loss(a), loss(b), loss(c), mix, penalty="abs", reduction="none")
    torch.testing.assert_close(size, expected.abs(), rtol=1e-11, atol=1e-13)


def test_mean_of_a_quadratic_over_the_cube() -> None:
    """E r² = eps⁴/120 (4/9 (tr² H + 2 |H|²) - 4/15 Σ H_ii²) for x_a, x_b uniform in the cube, mix in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    dims, count, eps = 8, 400_000, 0.1
    root = torch.randn(dims, dims, generator=generator, dtype=torch.float64)
    h = root + root.T
    a, b = (
        eps * (2 * torch.rand(count, dims, generator=generator, dtype=torch.float64) - 1) for _ in range(2)
    )
    mix = torch.rand(count, generator=generator, dtype=torch.float64)
    loss = lambda x: ((x @ h) * x).sum(-1) / 2  # noqa: E731
    r2 = local_linearity(loss(a), loss(b), loss(torch.lerp(a, b, mix.unsqueeze(1))), mix, reduction="none")
    trace, frobenius, diagonal = h.trace(), h.square().sum(), h.diagonal().square().sum()
    expected = eps**4 / 120 * (4 / 9 * (trace**2 + 2 * frobenius) - 4 / 15 * diagonal)
    assert (r2.mean() - expected).abs() < 4 * r2.std() / count**0.5


def test_curvature_of_cross_entropy_on_a_segment() -> None:
    """Between linear logits the second derivative is the variance of the slopes: the residual lies within its extremes."""
    z, y, mix = _case(40, 5)
    a, b, _ = z.detach().chunk(3)
    mix = mix.detach()
    at = lambda t: torch.lerp(a, b, t)  # noqa: E731
    value, losses = cross_entropy_linearity((a, b, at(mix.unsqueeze(1))), y, mix, return_losses=True)
    r = (losses[2] - losses[0]) - mix * (losses[1] - losses[0])
    torch.testing.assert_close(value, r.square().mean(), rtol=1e-12, atol=0)
    d, curvatures = b - a, []
    for t in torch.linspace(0, 1, 401, dtype=torch.float64):
        p = at(t).softmax(-1)
        curvatures.append((p * d.square()).sum(-1) - (p * d).sum(-1).square())
    curvature = torch.stack(curvatures)
    ratio = r / (-mix * (1 - mix) / 2)
    assert (ratio <= curvature.amax(0) + 1e-3).all()
    assert (ratio >= curvature.amin(0) - 1e-3).all()


def test_scale_laws() -> None:
    """r is linear in the losses, and of order eps² in the size of the segment where the loss is smooth."""
    losses, mix = torch.randn(3, 9, dtype=torch.float64), _shares(9, grad=False)
    one = local_linearity(*losses, mix)
    torch.testing.assert_close(local_linearity(*(3 * losses), mix), 9 * one)
    size = local_linearity(*losses, mix, penalty="abs")
    torch.testing.assert_close(local_linearity(*(3 * losses), mix, penalty="abs"), 3 * size)
    affine = torch.stack((losses[0], losses[1], torch.lerp(losses[0], losses[1], mix)))
    assert local_linearity(*affine, mix).item() < 1e-30
    z, y, mix = _case(64, 10)
    a, d = z.detach()[:64], z.detach()[64:128]
    values = []
    for eps in (1e-2, 5e-3):
        ends = a, a + eps * d
        values.append(cross_entropy_linearity((*ends, torch.lerp(*ends, mix.unsqueeze(1))), y, mix.detach()))
    assert abs((values[0] / values[1]).item() - 16) < 0.5


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("step", [1.0, 0.02], ids=["far", "near"])
def test_gradients_are_twice_as_exact_as_torch(classes: int, step: float) -> None:
    """Largest error against float64, far from a linear point and near one, where the residual is a small difference."""
    errors = {"ours": 0.0, "torch": 0.0}
    for seed in range(4):
        z, y, mix = _case(32, classes, torch.float32, seed)
        a, d = z.detach()[:32], step * z.detach()[32:64]
        points = torch.cat((a, a + d, torch.lerp(a, a + d, mix.detach().unsqueeze(1)))).requires_grad_()
        slope = lambda fn, *t: torch.autograd.grad(fn(*t), t[0])[0].double()  # noqa: E731
        wide = points.detach().double().requires_grad_()
        composed = lambda t, target, m: _composed(  # noqa: E731
            F.cross_entropy(t, target.repeat(3), reduction="none").view(3, -1), m, "square", 1.0, "mean"
        )
        truth = slope(composed, wide, y, mix.detach().double())
        for name, fn in (("ours", cross_entropy_linearity), ("torch", composed)):
            error = (slope(fn, points, y, mix.detach()) - truth).abs().max() / truth.abs().max()
            errors[name] += error.item()
    assert errors["ours"] <= errors["torch"] / 2, errors


def test_bits_do_not_depend_on_the_batch_or_the_layout() -> None:
    z, y, mix = _case(70, 333, torch.float32)
    whole = _slope(z, y, mix, reduction="sum").view(3, 70, 333)
    part = z.detach().view(3, 70, 333)[:, 11:14].reshape(9, 333).requires_grad_()
    assert torch.equal(_slope(part, y[11:14], mix[11:14], reduction="sum").view(3, 3, 333), whole[:, 11:14])
    three = [t.detach().clone().requires_grad_() for t in z.chunk(3)]
    value = cross_entropy_linearity(three, y, mix, reduction="sum")
    slopes = torch.autograd.grad(value, three)
    assert torch.equal(torch.cat(slopes).view(3, 70, 333), whole)
    wide = torch.randn(210, 400)
    wide[:, 30:363] = z.detach()
    assert torch.equal(
        _slope(wide[:, 30:363].requires_grad_(), y, mix, reduction="sum").view(3, 70, 333), whole
    )


def test_small_batches_stay_on_their_thread() -> None:
    """A parallel region starts torch's worker threads; a process that had small batches only has none."""
    code = (
        "import os, torch, torchlin; torch.set_num_threads(4); y = torch.zeros(128, dtype=torch.long)\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "def run(k):\n"
        "    z = torch.randn(384, k, requires_grad=True)\n"
        "    before = count()\n"
        "    torchlin.functional.cross_entropy_linearity(z, y, torch.rand(128)).backward(torch.tensor(2.0))\n"
        "    return count() - before\n"
        "print(run(100), run(4000))"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("counts threads in /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    small, large = map(int, done.stdout.split())
    assert small == 0
    assert large > 0


# ------------------------------------------------------------------------------------------------ autograd


def test_the_gradient_is_given_away_once() -> None:
    z, y, mix = _case(4, 9, torch.float32)
    value = cross_entropy_linearity(z, y, mix)
    first = torch.autograd.grad(value, (z, mix), torch.tensor(3.0), retain_graph=True)
    kept = [t.clone() for t in first]
    for t in first:
        t.zero_()
    second = torch.autograd.grad(value, (z, mix), torch.tensor(3.0), retain_graph=True)
    assert all(map(torch.equal, kept, second))
    z.grad = None
    for _ in range(2):
        value.backward(torch.tensor(3.0), retain_graph=True, inputs=[z])
    assert torch.equal(z.grad, kept[0] * 2)
    middle = z * 1
    value = cross_entropy_linearity(middle, y, mix)
    value.backward(retain_graph=True)
    with torch.no_grad():
        middle.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_mean_of_none_is_mean() -> None:
    z, y, mix = _case(5, 9)
    for penalty in PENALTIES:
        none = cross_entropy_linearity(z, y, mix, penalty=penalty, reduction="none")
        slope = _slope(z, y, mix, penalty=penalty)
        torch.testing.assert_close(torch.autograd.grad(none.mean(), z)[0], slope, rtol=1e-13, atol=1e-16)


def test_penalized_gradient_is_differentiated_twice() -> None:
    z, y, mix = _case(3, 4)
    for options in ({}, {"penalty": "huber", "beta": 0.2}, {"reduction": "sum", "return_losses": True}):

        def norm(fn: Any, options: Any = options) -> Tensor:
            value = fn(z, y, mix, **options)
            value = value[0] + value[1].square().sum() if isinstance(value, tuple) else value
            slope = torch.autograd.grad(value, (z, mix), create_graph=True)
            return torch.autograd.grad(slope[0].square().sum() + slope[1].square().sum(), z)[0]

        torch.testing.assert_close(norm(cross_entropy_linearity), norm(cross_entropy_linearity_reference))


def test_half_logits_are_upcast_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linearity, "_warned_of_half", False)
    z, y, mix = _case(4, 9, torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="rounding is far larger"):
        value = cross_entropy_linearity(z, y, mix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(value, cross_entropy_linearity(z, y, mix))
        assert value.dtype is torch.float32
        assert torch.equal(value, cross_entropy_linearity(z.float(), y, mix.float()))
    assert torch.autograd.grad(value, z)[0].dtype is torch.bfloat16


def test_rounding_logits_is_what_destroys_the_value() -> None:
    """Why there is a warning: bfloat16 logits of a small ball have a value many times the true one."""
    z, y, mix = _case(256, 10)
    mix = mix.detach()
    a = z.detach()[:256]
    b = a + 0.02 * z.detach()[256:512]
    points = torch.cat((a, b, torch.lerp(a, b, mix.unsqueeze(1)))).float()
    true = cross_entropy_linearity(points, y, mix.float())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cross_entropy_linearity(points.bfloat16(), y, mix.float()) > 30 * true


# ------------------------------------------------------------------------------------------------ arguments


def test_integer_targets_and_mixes_of_other_shapes() -> None:
    z, y, mix = _case(4, 5)
    value = cross_entropy_linearity(z, y, mix)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(cross_entropy_linearity(z, y.to(dtype), mix), value)
    assert torch.equal(cross_entropy_linearity(z, y, mix.view(4, 1, 1, 1)), value)
    half = cross_entropy_linearity(z, y, 0.5)
    for same in (torch.tensor(0.5), torch.full((1,), 0.5), torch.full((4,), 0.5), torch.full((1, 1), 0.5)):
        assert torch.equal(cross_entropy_linearity(z, y, same), half)
    assert torch.equal(
        local_linearity(*torch.ones(3, 4, 2), mix.view(4, 1, 1), reduction="sum"), torch.zeros(()).double()
    )
    of_logits = local_linearity(*z.view(3, 4, 5), mix, reduction="none")
    assert of_logits.shape == (4, 5)
    a, b, c = z.view(3, 4, 5)
    expected = (c - (1 - mix.unsqueeze(1)) * a - mix.unsqueeze(1) * b).square()
    torch.testing.assert_close(of_logits, expected)


GOOD = (torch.zeros(6, 4), torch.tensor([0, 3]), torch.tensor([0.2, 0.7]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(5, 4)}, ValueError, r"logits must be \(3B, K\).*\(5, 4\)"),
        ({0: torch.zeros(6)}, ValueError, r"logits must be \(3B, K\).*\(6,\)"),
        ({0: torch.zeros(6, 0)}, ValueError, r"logits must be \(3B, K\) with K >= 1.*\(6, 0\)"),
        ({0: torch.zeros(6, 4).long()}, TypeError, "logits must be float32.*int64"),
        ({0: [torch.zeros(2, 4)] * 2}, ValueError, "three.*got 2"),
        (
            {0: [torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 3)]},
            ValueError,
            r"logits\[2\] must be like",
        ),
        (
            {0: [torch.zeros(2, 4), torch.zeros(2, 4).double(), torch.zeros(2, 4)]},
            ValueError,
            r"logits\[1\].*float64",
        ),
        ({0: "z"}, TypeError, "logits must be a tensor or a sequence of three, got str"),
        ({0: torch.zeros(9, 4)}, ValueError, r"target must have shape \(3,\)"),
        ({1: torch.tensor([0, 4])}, IndexError, r"target must hold class numbers in \[0, 3\].*got 4"),
        ({1: torch.tensor([0, -1])}, IndexError, r"target must hold class numbers.*got -1"),
        ({1: torch.tensor([0, 3] * 3)}, ValueError, r"target must have shape \(2,\).*three points.*\(6,\)"),
        ({1: torch.zeros(2, 5)}, ValueError, r"target of probabilities must have shape \(2, 4\).*\(2, 5\)"),
        ({1: torch.tensor([True, False])}, TypeError, "target must hold class numbers.*bool"),
        ({1: [0, 3]}, TypeError, r"target must be a tensor of class numbers.*got list"),
        (
            {1: (GOOD[1], GOOD[1], torch.zeros(3))},
            ValueError,
            r"target\[2\] must have one element or shape \(2,\)",
        ),
        ({1: (GOOD[1], GOOD[1] + 1, 0.5)}, IndexError, r"target\[1\] must hold class numbers.*got 4"),
        ({1: (GOOD[1], GOOD[1][:1], 0.5)}, ValueError, r"target\[1\] must have shape \(2,\)"),
        ({2: torch.tensor([0.2, 1.5])}, ValueError, r"mix must be in \[0, 1\], got 1.5"),
        ({2: -0.5}, ValueError, r"mix must be in \[0, 1\], got -0.5"),
        (
            {2: torch.tensor([0.2, 0.1, 0.3])},
            ValueError,
            r"mix must have one element or shape \(2,\).*\(3,\)",
        ),
        ({2: torch.tensor([0, 1])}, TypeError, "mix must be float32.*int64"),
        ({2: "half"}, TypeError, "mix must be a float or a torch.Tensor, got str"),
        ({"penalty": "cube"}, ValueError, "penalty must be one of 'square', 'huber', 'abs', got 'cube'"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of.*got 'avg'"),
        ({"beta": 0.0}, ValueError, "beta must be positive and finite, got 0.0"),
        ({"beta": "1"}, TypeError, "beta must be a float, got str"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"label_smoothing": True}, TypeError, "label_smoothing must be a float"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \(4,\)"),
        ({"weight": [1, 1, 1, 1]}, TypeError, "weight must be a torch.Tensor, got list"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int, got float"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_bad_input(change: dict[Any, Any], error: type[Exception], message: str, grad: bool) -> None:
    arguments: list[Any] = list(GOOD)
    for at, value in change.items():
        if isinstance(at, int):
            arguments[at] = value
    if isinstance(arguments[0], Tensor) and arguments[0].is_floating_point():
        arguments[0] = arguments[0].clone().requires_grad_(grad)
    options = {at: value for at, value in change.items() if isinstance(at, str)}
    for fn in (cross_entropy_linearity, cross_entropy_linearity_reference):
        with pytest.raises(error, match=message):
            fn(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.ones(2), torch.ones(3), torch.ones(2), 0.5),
            ValueError,
            r"loss_b must have the shape.*\(3,\)",
        ),
        ((torch.ones(2), torch.ones(2), [1.0], 0.5), TypeError, "loss_c must be a torch.Tensor, got list"),
        ((torch.ones(2), torch.ones(2), torch.ones(2), 2), ValueError, r"mix must be in \[0, 1\], got 2"),
        ((*torch.ones(3, 2), torch.tensor([0.1, 1.1])), ValueError, r"mix must be in \[0, 1\], got 1.1"),
        ((*torch.ones(3, 2), torch.ones(3)), ValueError, r"mix must have one element or shape \(2,\)"),
    ],
)
def test_bad_losses(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        local_linearity(*arguments)


def test_module() -> None:
    z, y, mix = _case(4, 5)
    loss = torchlin.create("loss", "local_linearity", penalty="huber", beta=0.3, label_smoothing=0.1)
    assert isinstance(loss, LocalLinearityLoss)
    expected = cross_entropy_linearity(z, y, mix, penalty="huber", beta=0.3, label_smoothing=0.1)
    assert torch.equal(loss(z, y, mix), expected)
    assert repr(loss) == "LocalLinearityLoss('huber', reduction='mean', beta=0.3, label_smoothing=0.1)"
    weighted = LocalLinearityLoss(weight=torch.rand(5), return_losses=True).double()
    value, losses = weighted(z, y, mix)
    assert value.dtype is losses.dtype is torch.float64
    assert not weighted.state_dict()


@pytest.mark.parametrize("penalty", PENALTIES)
def test_local_linearity_has_derivatives_of_every_order(penalty: Any) -> None:
    losses, mix = torch.randn(3, 4, dtype=torch.float64).unbind(), _shares(4)
    losses = [t.requires_grad_() for t in losses]
    fn = lambda *t: local_linearity(*t, penalty=penalty, beta=0.5, reduction="none")  # noqa: E731
    torch.autograd.gradcheck(fn, (*losses, mix), check_forward_ad=True)
    torch.autograd.gradgradcheck(fn, (*losses, mix))
    torch.testing.assert_close(
        fn(*losses, mix), local_linearity_reference(*losses, mix, penalty=penalty, beta=0.5, reduction="none")
    )
    at_zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert (
        torch.autograd.grad(local_linearity(at_zero, at_zero, at_zero * 1, 0.5, penalty=penalty), at_zero)[0]
        == 0
    )
