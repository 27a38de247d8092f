"""sample_triplet: the battery on what it is after the seed is drawn, the random numbers themselves, the closed-form oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import battery
import pytest
import torch
from torch import Tensor

from torchlin.functional import sample_triplet
from torchlin.ops.triplet import (
    philox,
    sample_triplet_reference,
    triplet_from_seed,
    triplet_from_seed_reference,
)

ROOT = Path(__file__).resolve().parents[1]


def seed_of(value: int, device: Any = "cpu") -> Tensor:
    return torch.tensor(value, device=device)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[battery.Sample]:
    def x(*shape: int) -> Tensor:
        return battery.randn(*shape, device=device, dtype=dtype)

    def eps(*shape: int) -> Tensor:
        return battery.randn(*shape, device=device, dtype=dtype, requires_grad=False).abs()

    seed = seed_of(-1234567890123456789, device)
    yield battery.Sample("rows", x(4, 6), 0.1, seed)
    yield battery.Sample("one", x(1), 0.5, seed)
    yield battery.Sample("empty", x(0, 5), 0.5, seed)
    yield battery.Sample("channels", x(3, 2, 5, 7), eps(2), seed, clip=(-1.0, 1.0))
    yield battery.Sample("each", x(3, 4, 5), eps(1, 4, 5), seed)
    yield battery.Sample("ball", x(5, 13), eps(5, 1), seed, norm="l2", clip=(-0.5, 0.9))
    yield battery.Sample("large", x(3, 2, 105, 105), eps(2), seed, clip=(-1.0, 1.0))


def emulated() -> dict[str, Callable[..., Any]]:
    from simt import triplet

    return {"_triplet_fwd": triplet.forward, "_triplet_bwd": triplet.backward}


OP = battery.Op(
    name="triplet",
    public=triplet_from_seed,
    reference=triplet_from_seed_reference,
    samples=samples,
    raw=("_triplet_fwd", "_triplet_bwd"),
    forward_ad=True,
    emulated=emulated,
    skip={"vmap": "takes every output as differentiable, mix is not: test_every_slice_of_a_vmap_is_as_alone"},
)

test_battery = battery.tests(OP)

# ------------------------------------------------------------------------------------------------ the stream


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_is_the_published_one(counter, key, expected) -> None:
    """The known answers of the authors' library, Random123, for philox4x32-10."""
    seed = key[1] << 32 | key[0]
    seed -= (seed >> 63) << 64
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    assert tuple(int(word) for word in philox((c0, c1, c2, c3), seed_of(seed))) == expected


def layouts(x: Tensor) -> Iterator[Tensor]:
    for name, (fits, make) in battery.LAYOUTS.items():
        if name != "expanded" and fits(x):
            yield make(x)
    if x.dim() == 4:
        yield x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)[:, :, :, :]
        yield x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


@pytest.mark.parametrize("dtype", battery.FLOATS)
@pytest.mark.parametrize("shape", [(1,), (5, 3, 9, 7), (2, 2500), (4, 3, 33)])
@pytest.mark.parametrize("clip", [None, (0.1, 0.9)])
def test_cube_is_the_reference_to_the_last_bit(dtype, shape, clip) -> None:
    """On every CPU level, for every layout."""
    x = torch.rand(shape, dtype=torch.float64).to(dtype)
    eps = torch.rand(shape[1]) if len(shape) > 2 else 0.3
    expected = triplet_from_seed_reference(x, eps, seed_of(7), clip=clip)
    for level in battery.cpu_isa_levels():
        with level:
            for laid in layouts(x):
                got = triplet_from_seed(laid, eps, seed_of(7), clip=clip)
                assert battery.bits(got) == battery.bits(expected)


@pytest.mark.parametrize("dtype", battery.FLOATS)
@pytest.mark.parametrize("shape", [(3, 1), (5, 3, 9, 7), (2, 5000)])
def test_ball_has_the_same_bits_everywhere(dtype, shape) -> None:
    """Every CPU level, layout and number of threads, and the CUDA kernels on the emulator."""
    from simt import triplet

    x = torch.rand(shape, dtype=torch.float64).to(dtype)
    expected = battery.bits(triplet_from_seed(x, 0.3, seed_of(7), norm="l2"))
    for level in battery.cpu_isa_levels():
        with level:
            for laid in layouts(x):
                assert battery.bits(triplet_from_seed(laid, 0.3, seed_of(7), norm="l2")) == expected
    assert battery.bits(triplet.forward(x, 0.3, None, seed_of(7), True, None, None)) == expected


@pytest.mark.parametrize("dtype", battery.FLOATS)
def test_emulated_kernels_have_the_bits_of_the_cpu(dtype) -> None:
    """Vectors of 16 bytes and single elements, both norms, forward and backward."""
    from simt import triplet

    raw = torch.ops.torchlin
    for shape in ((3, 16), (3, 2, 4, 5), (1, 4100), (5, 3)):
        x = torch.rand(shape, dtype=torch.float64).to(dtype)
        for laid in (x, *([x.contiguous(memory_format=torch.channels_last)] if x.dim() == 4 else [])):
            for ball in (False, True):
                args = (0.3, None, seed_of(-5), ball, 0.2, 0.8)
                points = raw._triplet_fwd(laid, *args)
                assert battery.bits(points) == battery.bits(triplet.forward(laid, *args))
                grad = torch.randn(points[0].shape, dtype=torch.float64).to(dtype)
                slope = raw._triplet_bwd(grad, laid, *args)
                assert battery.bits(slope) == battery.bits(triplet.backward(grad, laid, *args))


def test_dtypes_share_their_points() -> None:
    x = torch.zeros(4, 1000, dtype=torch.float64)
    for norm in ("linf", "l2"):
        points, mix = triplet_from_seed(x, 1.0, seed_of(3), norm=norm)
        for dtype in battery.FLOATS:
            other, same_mix = triplet_from_seed(x.to(dtype), 1.0, seed_of(3), norm=norm)
            assert torch.equal(same_mix.double(), mix)
            assert (other - points).abs().max() <= 2 * torch.finfo(dtype).eps * points.abs().max()


# ------------------------------------------------------------------------------------------------ generators


def test_generators() -> None:
    x = torch.rand(3, 5)
    make = lambda: torch.Generator().manual_seed(11)  # noqa: E731
    generator = make()
    first = sample_triplet(x, 0.1, generator=generator)
    second = sample_triplet(x, 0.1, generator=generator)
    assert battery.bits(first) != battery.bits(second)
    assert battery.bits(sample_triplet(x, 0.1, generator=make())) == battery.bits(first)
    assert battery.bits(sample_triplet_reference(x, 0.1, generator=make())) == battery.bits(first)
    state = torch.get_rng_state()
    sample_triplet(x, 0.1, generator=make())
    assert torch.equal(torch.get_rng_state(), state)  # torch's own is not touched
    torch.manual_seed(5)
    one = battery.bits(sample_triplet(x, 0.1))
    assert battery.bits(sample_triplet(x, 0.1)) != one
    torch.manual_seed(5)
    assert battery.bits(sample_triplet(x, 0.1)) == one


def test_compiled_whole_and_reproducible() -> None:
    torch._dynamo.reset()
    x = torch.rand(4, 3, 8, 8, requires_grad=True)
    compiled = torch.compile(
        lambda x: sample_triplet(x, 8 / 255, clip=(0, 1)), backend="aot_eager", fullgraph=True
    )
    torch.manual_seed(1)
    points, mix = compiled(x)
    (slope,) = torch.autograd.grad(points.sum(), x)
    torch.manual_seed(1)
    again, _ = compiled(x)
    other, _ = compiled(x)
    torch.manual_seed(1)
    eager, eager_mix = sample_triplet(x, 8 / 255, clip=(0, 1))
    assert torch.equal(points, again)
    assert not torch.equal(points, other)
    assert torch.equal(points, eager)
    assert torch.equal(mix, eager_mix)
    assert torch.equal(slope, torch.autograd.grad(eager.sum(), x)[0])
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------ distributions


def unit_noise(batch: int, size: int, norm: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """u_a, u_b (B, size) and mix (B,) in float64."""
    points, mix = triplet_from_seed(
        torch.zeros(batch, size, dtype=torch.float64), 1.0, seed_of(seed), norm=norm
    )
    return points[:batch], points[batch : 2 * batch], mix


def kolmogorov(u: Tensor) -> float:
    """√n times the distance of the empirical distribution from the uniform one on [0, 1]: above 1.95 once in a thousand."""
    u = u.flatten().sort().values
    n = u.numel()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return (torch.maximum((steps[1:] - u).amax(), (u - steps[:-1]).amax()) * math.sqrt(n)).item()


def correlation(a: Tensor, b: Tensor) -> float:
    """√n times the correlation: a standard normal number where there is none."""
    return (torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] * math.sqrt(a.numel())).item()


def test_cube_is_uniform_and_independent() -> None:
    a, b, mix = unit_noise(2000, 100, "linf")
    for u in (a, b):
        assert u.abs().max() <= 1
        assert kolmogorov((u + 1) / 2) < 1.95
        assert abs(u.mean().item()) * math.sqrt(3 * u.numel()) < 3
    assert kolmogorov(mix) < 1.95
    assert 0 < mix.min() < mix.max() < 1
    for u, v in (
        (a, b),
        (a[::2], a[1::2]),  # the two samples of a counter
        (a[::2], b[1::2]),
        (a[:, :-1], a[:, 1:]),  # neighbours
        (a.square(), b.square()),
        (mix[:-1], mix[1:]),
        (mix, a[:, 0]),
        (a, unit_noise(2000, 100, "linf", seed=1)[0]),  # seeds that differ in a bit
    ):
        assert abs(correlation(u, v)) < 4


def test_ball_is_uniform() -> None:
    for size in (1, 2, 3, 5000):
        a, b, _ = unit_noise(2000 if size < 10 else 300, size, "l2", seed=size)
        for u in (a, b):
            radius = u.norm(dim=1)
            assert radius.max() <= 1 + 1e-6
            assert kolmogorov((radius**size).clamp_max(1)) < 1.95
            # Along any axis uniform points of the ball have mean 0 and variance 1/(size + 2).
            z = u[:, 0] * math.sqrt(size + 2)
            assert abs(z.mean().item()) * math.sqrt(len(z)) < 4
            assert abs(z.square().mean().item() - 1) * math.sqrt(len(z)) < 6
        assert abs(correlation(a, b)) < 4
    a, _, _ = unit_noise(4000, 2, "l2", seed=9)
    assert kolmogorov(torch.atan2(a[:, 1], a[:, 0]) / (2 * math.pi) + 0.5) < 1.95


def test_normal_numbers_are_normal() -> None:
    """The directions of a long vector: its elements over their length are nearly normal numbers."""
    a, _, _ = unit_noise(2, 200000, "l2")
    z = a / a.square().mean(1, keepdim=True).sqrt()
    assert kolmogorov(torch.special.ndtr(z)) < 1.95
    assert abs(z.pow(4).mean().item() - 3) * math.sqrt(z.numel() / 96) < 4


def test_linearity_of_a_quadratic_loss() -> None:
    """E r² of L(x) = g·x + x·Hx/2 at the points of a triplet, against its closed form (three standard errors)."""
    size, eps, batch = 12, 0.1, 400_000
    h = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = h + h.mT
    g = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = torch.rand(1, size, dtype=torch.float64).expand(batch, size)
    points, mix = triplet_from_seed(x, eps, seed_of(2024))
    a, b, c = (points @ g + (points @ h * points).sum(1) / 2).view(3, batch)
    squares = (c - (1 - mix) * a - mix * b).square()
    trace, diagonal = h.trace(), h.diagonal().square().sum()
    expected = eps**4 / 120 * (4 / 9 * (trace**2 + 2 * h.square().sum()) - 4 / 15 * diagonal)
    error = squares.std() / math.sqrt(batch)
    assert abs(squares.mean() - expected) < 3 * error
    assert error < expected / 50  # or the test could not fail


# ------------------------------------------------------------------------------------------------ arguments


def test_points_lie_where_they_should() -> None:
    x = torch.rand(6, 3, 8, 8)
    eps = torch.tensor([0.05, 0.1, 0.2])
    points, mix = sample_triplet(x, eps, clip=(0, 1), generator=torch.Generator().manual_seed(0))
    a, b, c = points.view(3, *x.shape)
    assert points.min() == 0
    assert points.max() == 1
    alpha = mix.view(-1, 1, 1, 1)
    assert torch.allclose(c, (1 - alpha) * a + alpha * b, atol=1e-7)
    for p in (a, b):
        assert ((p - x).abs() <= eps.view(3, 1, 1) + 1e-7).all()
        assert ((p - x).abs().amax((0, 2, 3)) > 0.9 * eps).all()


def test_eps_broadcasts() -> None:
    x = torch.rand(4, 3, 6, 5)
    per_channel = torch.rand(3)
    make = lambda eps, x=x: triplet_from_seed(x, eps, seed_of(1))[0]  # noqa: E731
    expected = make(per_channel.view(1, 3, 1, 1).expand(4, 3, 6, 5).contiguous())
    for eps in (per_channel, per_channel.view(3, 1, 1), per_channel.double(), per_channel.view(1, 3, 1, 1)):
        assert torch.equal(make(eps), expected)
        assert torch.equal(make(eps, x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(make(torch.tensor(0.25)), make(0.25))
    assert torch.equal(make(torch.tensor([0.25])), make(0.25))
    each = torch.rand(4, 1, 6, 1)
    assert torch.equal(make(each), make(each.expand(4, 3, 6, 5).contiguous()))
    wide = torch.rand(2, 5, 3, 200)  # runs of neighbours that end inside of a vector, and of a chunk
    rows = torch.rand(5)
    assert torch.equal(make(rows, wide), make(rows.view(1, 5, 1, 1).expand(2, 5, 3, 200).contiguous(), wide))


def test_nothing_moves_at_eps_zero() -> None:
    x = torch.rand(3, 7)
    for norm in ("linf", "l2"):
        points, _ = sample_triplet(x, 0.0, norm=norm)
        assert torch.allclose(points.view(3, 3, 7), x.expand(3, 3, 7), rtol=2e-7)
        assert torch.equal(points[:6].view(2, 3, 7), x.expand(2, 3, 7))


def test_gradient_is_masked_by_clip() -> None:
    x = torch.tensor([[0.0, 0.5, 1.0]], requires_grad=True)
    points, mix = triplet_from_seed(x, 0.25, seed_of(0), clip=(0.0, 1.0))
    a, b, _ = points.detach()
    (slope,) = torch.autograd.grad(points[2].sum(), x)
    inside = [((p > 0) & (p < 1)).float() for p in (a, b)]
    assert torch.allclose(slope[0], (1 - mix) * inside[0] + mix * inside[1])
    assert 0 < slope[0].sum() < 3


@pytest.mark.parametrize("clip", [None, (-0.5, 0.9)])
def test_every_slice_of_a_vmap_is_as_alone(clip) -> None:
    x = torch.randn(3, 4, 5)
    points = lambda x: triplet_from_seed(x, 0.7, seed_of(1), clip=clip)[0]  # noqa: E731
    slope = torch.func.grad(lambda x: points(x).square().sum())
    assert torch.equal(torch.func.vmap(points)(x), torch.stack([points(s) for s in x]))
    assert torch.equal(torch.func.vmap(points, in_dims=1)(x), torch.stack([points(s) for s in x.unbind(1)]))
    assert torch.equal(torch.func.vmap(slope)(x), torch.stack([slope(s) for s in x]))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "x must be float32.*int64", {"x": torch.ones(2, 3, dtype=torch.int64)}),
        (TypeError, "x must be a torch.Tensor", {"x": [1.0]}),
        (ValueError, "x must be .B, ....*0-dimensional", {"x": torch.tensor(1.0)}),
        (ValueError, "eps must be a finite number, not negative, got -0.1", {"eps": -0.1}),
        (ValueError, "eps must be a finite number", {"eps": math.nan}),
        (ValueError, "eps must be a finite number", {"eps": math.inf}),
        (TypeError, "eps must be a float", {"eps": "8/255"}),
        (ValueError, "eps must hold finite numbers", {"eps": torch.tensor([0.1, -0.1, 0.1])}),
        (ValueError, "eps must hold finite numbers", {"eps": torch.tensor([0.1, math.nan, 0.1])}),
        (ValueError, "eps of one dimension must have .* 3 indices of x's dimension 1, got 4", {"eps": torch.ones(4)}),
        (ValueError, r"eps must broadcast to x of shape \(2, 3\), got shape \(2, 2\)", {"eps": torch.ones(2, 2)}),
        (ValueError, "eps must broadcast", {"eps": torch.ones(1, 2, 3)}),
        (ValueError, "eps is a constant", {"eps": torch.ones(3, requires_grad=True)}),
        (TypeError, "eps must be float32.*int64", {"eps": torch.ones(3, dtype=torch.int64)}),
        (ValueError, 'norm must be "linf" or "l2", got 2', {"norm": 2}),
        (ValueError, "clip must be .*lowest <= highest, got .1.0, 0.0", {"clip": (1.0, 0.0)}),
        (ValueError, "clip must be .*lowest <= highest", {"clip": (math.nan, 0.0)}),
        (TypeError, "clip must be a pair", {"clip": 1.0}),
        (TypeError, r"clip\[1\] must be a float", {"clip": (0.0, None)}),
        (TypeError, "generator must be a torch.Generator or None, got int", {"generator": 5}),
    ],
)  # fmt: skip
def test_bad_input(error, message, change) -> None:
    arguments = {"x": torch.ones(2, 3), "eps": 0.1, **change}
    with pytest.raises(error, match=message):
        sample_triplet(**arguments)
