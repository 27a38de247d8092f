"""Activations by name, through the public functions: the battery, every name in every way that all have in common, and how
exact they are.

The float64 kernel is the oracle here: test_catalogue.py holds it against the formulas as written, with many digits.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import battery
import pytest
import torch
import torch.nn.functional as F
from test_catalogue import TORCH
from torch import Tensor

from torchlin import registry
from torchlin.catalogue import Activation, catalogue
from torchlin.functional import activation, gated_activation
from torchlin.ops.activation import activation_reference, exportable, gated_activation_reference

# ------------------------------------------------------------------------------------------------------- battery


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[battery.Sample]:
    def x(*shape: int) -> Tensor:
        return battery.randn(*shape, device=device, dtype=dtype, seed=1)

    def a(*shape: int) -> Tensor:
        return (
            0.5 + battery.randn(*shape, device=device, dtype=dtype, seed=2).detach().abs()
        ).requires_grad_()

    yield battery.Sample("mish-5x7", x(5, 7), "mish")
    yield battery.Sample("gelu-1", x(1), "gelu")
    yield battery.Sample("tanhexp-0x3", x(0, 3), "tanhexp")
    yield battery.Sample("silu-2x3x5x7", x(2, 3, 5, 7), "silu")
    yield battery.Sample("leaky_relu-numbers", x(3, 37), "leaky_relu", negative_slope=0.2)
    yield battery.Sample("prelu-scalar", x(3, 19), "prelu", a=a(1))
    yield battery.Sample("prelu-channels", x(2, 5, 3, 4), "prelu", a=a(5))
    yield battery.Sample("pelu-channels-last-dim", x(7, 21), "pelu", a=a(21), b=a(21), channel_dim=-1)
    yield battery.Sample("pau-numbers", x(4, 9), "pau")
    yield battery.Sample("pau-learnt", x(4, 9), "pau", a=x(6), b=x(4))
    yield battery.Sample("apl-channels", x(2, 3, 11), "apl", a=x(4, 3), b=x(4, 3))
    yield battery.Sample("lau-260x257", x(260, 257), "lau", a=a(1))
    yield battery.Sample("tanh-70001", x(70001), "tanh")


def gated_samples(device: torch.device, dtype: torch.dtype) -> Iterator[battery.Sample]:
    def x(*shape: int, seed: int = 1) -> Tensor:
        return battery.randn(*shape, device=device, dtype=dtype, seed=seed)

    yield battery.Sample("swiglu-two", x(5, 7), x(5, 7, seed=2), "swiglu")
    yield battery.Sample("geglu-halves", x(3, 34), None, "geglu")
    yield battery.Sample("swiglu_oai-interleaved", x(3, 34), None, "swiglu_oai", layout="interleaved")
    yield battery.Sample("glu-first-dim1", x(2, 6, 5, 3), None, "glu", dim=1, gate="first")
    yield battery.Sample("glu-interleaved-second", x(2, 10), None, "glu", layout="interleaved", gate="second")
    yield battery.Sample("glu-1", x(1), x(1, seed=2), "glu")
    yield battery.Sample("reglu-0", x(0, 4), None, "reglu")
    yield battery.Sample("highway", x(4, 5), x(4, 5, seed=2), "highway_gate", x=x(4, 5, seed=3))
    yield battery.Sample("swiglu_beta-learnt", x(2, 18), None, "swiglu_beta", beta=x(1))
    yield battery.Sample("mish_glu-130x1026", x(130, 1026), None, "mish_glu")


def emulated_kernels() -> dict[str, Any]:
    from simt.activation import raw_ops

    return raw_ops()


FORMULAS = [a for a in catalogue().values() if a.graph is not None]
OF_ONE = [a for a in FORMULAS if len(a.inputs) == 1]
COMPOSED = [a.name for a in catalogue().values() if a.graph is None]

ACTIVATION = battery.Op(
    name="activation",
    public=activation,
    reference=activation_reference,
    samples=samples,
    raw=("_activation", "_activation_fwd", "_activation_bwd", "_activation_out"),
    names=tuple(("activation", name) for name in registry.names("activation")),
    autocast="keep",
    ulps=16,
    preserves_format=True,
    emulated=emulated_kernels,
    out=True,
    forward_ad=True,
    inductor=("mish-5x7", "prelu-channels"),
)
GATED = battery.Op(
    name="gated_activation",
    public=gated_activation,
    reference=gated_activation_reference,
    samples=gated_samples,
    raw=("_activation_fwd", "_activation_bwd"),
    autocast="keep",
    ulps=4,
    emulated=emulated_kernels,
    forward_ad=True,
    inductor=("geglu-halves",),
)

test_battery = battery.tests(ACTIVATION, GATED)


def test_gated_tensors_broadcast():
    a, b = torch.randn(4, 3, 7, requires_grad=True), torch.randn(7, requires_grad=True)
    y = gated_activation(a, b, "swiglu")
    want = F.silu(a) * b
    torch.testing.assert_close(y, want)
    got = torch.autograd.grad(y.sum(), (a, b))
    for g, w in zip(got, torch.autograd.grad(want.sum(), (a, b)), strict=True):
        torch.testing.assert_close(g, w)


# ---------------------------------------------------------------------------------------------------- every name

every = pytest.mark.parametrize("row", FORMULAS, ids=lambda a: a.name)
every_of_one = pytest.mark.parametrize("row", OF_ONE, ids=lambda a: a.name)
# Points apart from the kinks of all names at their defaults.
POINTS = (-7.3, -4.17, -2.63, -1.377, -0.813, -0.271, -0.043, 0.057, 0.319, 0.777, 1.419, 2.731, 4.313, 6.641)


def call_of(row: Activation, dtype: torch.dtype = torch.float64) -> Any:
    """A function of the row's tensors and learnable parameters, and such tensors."""
    sign = (1, -1, 0.5)
    tensors = [torch.tensor(POINTS, dtype=dtype).mul(s) for s, _ in zip(sign, row.inputs, strict=False)]
    # Away from the defaults, which are often on a kink: |b| at 0, a limit that is also a point of x.
    learnt = {k: torch.tensor(p.default, dtype=dtype) for k, p in row.parameters.items() if p.learnable}
    learnt = {k: torch.where(v.abs() < 1e-3, v + 0.01, v * 0.98) for k, v in learnt.items()}
    keys = list(learnt)

    def call(*given: Tensor) -> Tensor:
        inputs, values = given[: len(tensors)], dict(zip(keys, given[len(tensors) :], strict=True))
        if len(inputs) == 1:
            return activation(inputs[0], row.name, **values)
        extra = dict(zip(row.inputs[2:], inputs[2:], strict=True))
        return gated_activation(inputs[0], inputs[1], row.name, **extra, **values)

    return call, tensors + list(learnt.values())


# Their derivative is by definition that of another function, which in plain torch makes NaN of a NaN that the value ignores.
STRAIGHT_THROUGH = {"rsign", "hyst_af"}


@every
def test_battery_of_every_name(row):
    """What tests/battery.py asks of every op and needs no compiler for, on a small sample of every name."""
    call, tensors = call_of(row)

    def reference(*given: Tensor) -> Tensor:
        with exportable():
            return call(*given)

    def samples(device: torch.device, dtype: torch.dtype) -> Iterator[battery.Sample]:
        # Parameters keep the arithmetic's dtype: what rounding does to them is no error of the activation.
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        given = []
        # The gradient of a parameter is a sum that may cancel: gradcheck holds it, and test_activation_engine.py.
        n = len(row.inputs)
        for i, tensor in enumerate(tensors):
            own = tensor.detach().to(device, dtype if i < n else wide, copy=True)
            given.append(own.requires_grad_(i < n or dtype is torch.float64))
        yield battery.Sample(row.name, *given)

    op = battery.Op(row.name, call, reference, samples, ulps=32, nonfinite="spread")
    for name in ("value", "gradient", "gradcheck", "nonfinite", "untouched", "layout", "isa"):
        if name in ("gradcheck", "nonfinite") and row.name in STRAIGHT_THROUGH:
            continue
        check = battery.CHECKS[name]
        for dtype in check.dtypes:
            if dtype is torch.float64 and name != "gradcheck":
                continue  # two ways to compute a value, neither of them exact: gradcheck holds the derivatives
            for sample in battery.samples_of(op, "cpu", dtype):
                if check.applies(op, sample):
                    check.run(op, sample)


# ------------------------------------------------------------------------------------------------- how exact they are

TABLE = Path(__file__).with_name("activation_accuracy.csv")
TINY = 2.0**-126
# An exponential that is no normal number may be 0, whatever it is multiplied by: an underflow costs as much as a hundred
# instructions.
UNDERFLOW = 2.0**-120  # of max(1, |x|)


@cache
def allowances() -> dict[str, float]:
    """Names that cannot hold 4 ULP: the absolute error, in units of max(1, |x|), that they hold."""
    with TABLE.open(encoding="utf-8") as file:
        return {r["name"]: float(r["absolute"]) for r in csv.DictReader(file)}


def finite(dtype: torch.dtype) -> Tensor:
    """Every finite number of a 16-bit type, in float32."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).float()
    return values[torch.isfinite(values)]


@cache
def sweep() -> Tensor:
    """All 16-bit numbers, and float32 numbers densely where activations bend."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.linspace(-12, 12, 24_001)
    near = torch.randn(12_000, generator=generator) * 2
    far = torch.rand(8_000, generator=generator) * 400 - 200
    return torch.cat([finite(torch.bfloat16), finite(torch.float16), dense, near, far])


def ulp(y: Tensor) -> Tensor:
    """The distance of float32 numbers at y."""
    return torch.exp2(torch.floor(torch.log2(y.abs().clamp_min(TINY))) - 23)


def errors(row: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """Of the sweep: x, the error in ULP beyond underflow, and the absolute error over max(1, |x|)."""
    x = sweep()
    y, truth = activation(x, row.name).double(), activation(x.double(), row.name)
    fits = torch.isfinite(truth) & (truth.abs() <= torch.finfo(torch.float32).max) & torch.isfinite(y)
    x, y, truth = x[fits], y[fits], truth[fits]
    error, scale = (y - truth).abs(), x.double().abs().clamp_min(1)
    return x, (error - UNDERFLOW * scale).clamp_min(0) / ulp(truth), error / scale


@every_of_one
def test_float32_is_within_4_ulp_or_its_stated_bound(row):
    for level in battery.cpu_isa_levels():
        with level:
            x, in_ulp, absolute = errors(row)
            bound = allowances().get(row.name)
            if bound is None:
                worst = int(in_ulp.argmax())
                assert in_ulp[worst] <= 4, f"{in_ulp[worst]:.2f} ULP at {x[worst]:.9g}"
            else:
                wrong = (in_ulp > 4) & (absolute > bound)
                assert not wrong.any(), f"{absolute[wrong].max():.3g} of max(1, |x|) at {x[wrong][0]:.9g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_of_one
def test_16_bits_exhaustively(row, dtype):
    """All 65,536 inputs: value and derivative are those of float32, rounded once."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    short, single = x.clone().requires_grad_(), x.float().requires_grad_()
    y, wide = activation(short, row.name), activation(single, row.name)
    assert torch.equal(torch.nan_to_num(y, 77.0), torch.nan_to_num(wide.to(dtype), 77.0))
    assert torch.equal(torch.isnan(y), torch.isnan(wide))
    (got,) = torch.autograd.grad(y, short, torch.ones_like(y))
    (want,) = torch.autograd.grad(wide, single, torch.ones_like(wide))
    assert torch.equal(torch.nan_to_num(got, 77.0), torch.nan_to_num(want.to(dtype), 77.0))


def test_the_table_of_bounds_is_not_loose():
    """Each name in it needs its bound at some CPU level, and uses a good part of it."""
    for row in OF_ONE:
        bound = allowances().get(row.name)
        if bound is not None:
            used = 0.0
            for level in battery.cpu_isa_levels():
                with level:
                    _, in_ulp, absolute = errors(row)
                used = max(used, absolute.where(in_ulp > 4, 0.0).max().item())
            assert used > 0, f"{row.name} holds 4 ULP: it needs no bound"
            assert bound <= 10 * used, f"{row.name}: {used:.3g} measured, {bound:.3g} stated"
    assert set(allowances()) <= {row.name for row in OF_ONE}


# ----------------------------------------------------------------------------------------- as torch has them

# Kinks, zeros of both signs, the ends of what float32 has, and what is not finite.
CORNERS = (
    0.0,
    -0.0,
    0.5,
    -0.5,
    1.0,
    -1.0,
    3.0,
    -3.0,
    6.0,
    20.5,
    -20.5,
    100.0,
    -100.0,
    1e4,
    -1e4,
    math.inf,
    -math.inf,
    math.nan,
)


@pytest.mark.parametrize("level", battery.available_isa_levels())
@pytest.mark.parametrize("name", TORCH)
def test_corners_are_torchs(name, level):
    """Values everywhere, signs of zero, and derivatives at every number."""
    before = torch.ops.torchlin._cpu_isa()
    torch.ops.torchlin._set_cpu_isa(level)
    try:
        x, own = (torch.tensor(CORNERS, requires_grad=True) for _ in range(2))
        y, want = activation(own, name), TORCH[name](x)
        if name == "gelu":  # torch's kernel has NaN there on some machines
            want = torch.where(x == math.inf, x, want)
        torch.testing.assert_close(y, want, equal_nan=True, atol=1e-6, rtol=1e-5)
        assert torch.equal(torch.signbit(y[:2]), torch.signbit(want[:2])), "the sign of zero"
        (got,) = torch.autograd.grad(y, own, torch.ones_like(y))
        (slope,) = torch.autograd.grad(want, x, torch.ones_like(want))
        numbers = torch.isfinite(x)
        torch.testing.assert_close(got[numbers], slope[numbers], atol=2e-6, rtol=1e-4)
    finally:
        torch.ops.torchlin._set_cpu_isa(before)
