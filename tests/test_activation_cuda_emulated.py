"""The CUDA kernels of activations, planned as on a device and run by the emulator, against float64 formulas."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from simt.activation import SLOTS, Device
from simt.build import load
from torch import Tensor

from torchlin.catalogue import catalogue
from torchlin.catalogue.formula import PRIMITIVES, evaluate
from torchlin.catalogue.kernels import Kernel, kernels, plan
from torchlin.ops.activation_autograd import _kernel_values

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPE_IDS = [str(d).removeprefix("torch.") for d in DTYPES]
EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@functools.cache
def slot_values() -> dict[str, list[list[float]]]:
    """Of each kernel: the slots of an activation that has it, with parameters somewhat off their defaults."""
    found: dict[str, list[list[float]]] = {}
    for a in catalogue().values():
        for training in (True, False) if a.graph is not None else ():
            chosen = plan(a.name, training)
            if chosen is None or chosen.kernel.name in found:
                continue
            values: dict[str, Any] = {}
            for p in a.parameters.values():
                moved = [
                    v * 1.07 + 0.011 for v in (p.default if isinstance(p.default, tuple) else (p.default,))
                ]
                good = all(m in p for m in moved) and a.root.name not in ("puaf", "pwlu", "app_relu")
                kept = p.default if not good else tuple(moved) if isinstance(p.default, tuple) else moved[0]
                values[p.name] = kept
            for n in a.noises.values():
                if n.like:
                    values[n.name] = [1.0 + 0.01 * i for i in range(len(values[n.like]))]
            of_root = a.root.name == a.name
            slots = [evaluate(s, values) for s in chosen.slots] if of_root else None
            if slots is not None:
                found[chosen.kernel.name] = [list(s) if isinstance(s, (list, tuple)) else [s] for s in slots]
    return found


class Case:
    """One call: inputs, slots and the gradient that comes in; and what float64 makes of it."""

    def __init__(
        self, kernel: Kernel | str, inputs: list[Tensor], *, channels: int = 1, channel_dim: int = 0, split: int = 0,
        split_dim: int = 0, grad: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.kernel = kernels()[kernel] if isinstance(kernel, str) else kernel
        self.inputs = inputs
        rows = slot_values()[self.kernel.name]
        self.lengths = [len(row) for row in rows]
        self.slots = None
        if rows:
            spread = 1 + 0.02 * torch.arange(channels)
            self.slots = torch.tensor([v for row in rows for v in row], dtype=torch.float32)[:, None] * spread
        self.channel_dim, self.split, self.split_dim = channel_dim, split, split_dim
        shape = list(inputs[0].shape)
        if split:
            shape[split_dim] //= 2
        self.grad = torch.randn(shape).to(inputs[0].dtype) if grad is None else grad
        self.device = Device()

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.kernel.id, self.slots, self.lengths, self.channel_dim, self.split, self.split_dim

    def forward(self) -> Tensor:
        return self.device.fwd(self.inputs, *self.arguments)

    def backward(self, needs: int | None = None) -> list[Tensor]:
        if needs is None:
            needs = (1 << len(self.inputs)) - 1 + (0 if self.slots is None else SLOTS)
        return self.device.bwd(self.grad, self.inputs, *self.arguments, needs)

    def launched(self) -> dict[str, Any]:
        self.forward()
        return self.device.launches[0]

    def summed(self) -> dict[str, Any]:
        self.backward()
        return self.device.launches[0]

    def computed(self, dtype: torch.dtype) -> list[Tensor]:
        """Value, gradients by the inputs, gradient by the slots, in plain torch."""
        leaves = [t.to(dtype).clone().requires_grad_() for t in self.inputs]
        slots = None if self.slots is None else self.slots.to(dtype).clone().requires_grad_()
        y = _kernel_values(
            leaves, slots, self.kernel.id, self.lengths, self.channel_dim, self.split, self.split_dim
        )
        points = [*leaves, *([] if slots is None else [slots])]
        if not y.requires_grad:
            return [y, *(torch.zeros_like(p) for p in points)]
        grads = torch.autograd.grad(y, points, self.grad.to(dtype), allow_unused=True)
        return [
            y.detach(),
            *(torch.zeros_like(p) if g is None else g for p, g in zip(points, grads, strict=True)),
        ]

    def check(self) -> None:
        exact, plain = self.computed(torch.float64), self.computed(torch.float32)
        made = [self.forward(), *self.backward()]
        for i, result in enumerate(zip(made, exact, plain, strict=True)):
            of_slots = i == 1 + len(self.inputs)
            self.near(*result, f"tensor {i}", self.grad.numel() if of_slots else 1)
        if self.slots is not None:  # without the slots another kernel runs
            alone = self.backward((1 << len(self.inputs)) - 1)
            for i, result in enumerate(zip(alone, exact[1:-1], plain[1:-1], strict=True)):
                self.near(*result, f"gradient {i} alone")

    def near(self, got: Tensor, want: Tensor, plain: Tensor, what: str, terms: int = 1) -> None:
        """Within a few units, or what conditioning makes of them: a few times what plain torch is off."""
        off = (plain.double() - want).abs()
        largest = off[off.isfinite()].max() if off.isfinite().any() else 0.0
        units = 8 * EPSILON[torch.float32] * math.sqrt(terms) + (
            0.6 * EPSILON[got.dtype] if got.dtype != torch.float32 else 0.0
        )
        allowed = units * want.abs().clamp(min=1.0) + 4 * largest
        bad = (
            ~((got.double() - want).abs() <= allowed) & ~(got.isnan() & want.isnan()) & (got.double() != want)
        )
        assert not bad.any(), (
            f"{self.kernel.name}: {what}: {int(bad.sum())} of {bad.numel()}, got {got[bad][:4].tolist()}, "
            f"want {want[bad][:4].tolist()}, plain {plain[bad][:4].tolist()}, {self.device.launches}"
        )


def values(*shape: int, dtype: torch.dtype = torch.float32, low: float = -5.0, high: float = 5.0) -> Tensor:
    n = math.prod(shape)
    x = torch.linspace(low, high, max(n, 1), dtype=torch.float64)[:n] + 0.00123
    return x[torch.randperm(n)].reshape(shape).to(dtype)


def bits(tensors: list[Tensor]) -> list[bytes]:
    return [t.contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b"" for t in tensors]


@pytest.mark.parametrize("name", kernels())
def test_every_functor(name):
    kernel = kernels()[name]
    Case(kernel, [values(203) for _ in kernel.inputs]).check()


# ------------------------------------------------------------------------------------------------ elementary functions


CPP_UNARY = [op for op, count in PRIMITIVES.items() if count == 1 and op not in ("abs", "sign")]
# Where torch has no such function, or its derivative cancels.
VALUES = {
    "sinc": lambda u: torch.where(u == 0, 1.0, torch.sin(u) / torch.where(u == 0, 1.0, u)),
    "sech": lambda u: 1 / torch.cosh(u),
    "softplus": lambda u: torch.logaddexp(u, torch.zeros_like(u)),
    "ndtr": lambda u: torch.special.erfc(-u * math.sqrt(0.5)) / 2,
    "tanh_softplus": lambda u: (e := torch.exp(u.clamp(max=100))) * (e + 2) / (e * (e + 2) + 2),
    "log1p_sigmoid": lambda u: torch.log1p(torch.sigmoid(u)),
}
SLOPES = {
    "expm1": torch.exp,
    "sinc": lambda u: torch.where(
        u.abs() < 0.1, -u / 3 + u**3 / 30 - u**5 / 840 + u**7 / 45360, (torch.cos(u) - torch.sin(u) / u) / u
    ),
    "tanh": lambda u: 4 * (e := torch.exp(-2 * u.abs())) / (1 + e) ** 2,
    "sigmoid": lambda u: (e := torch.exp(-u.abs())) / (1 + e) ** 2,
    "softplus": torch.sigmoid,
    "tanh_softplus": lambda u: 4 * (e := torch.exp(u.clamp(max=100))) * (e + 1) / (e * (e + 2) + 2) ** 2,
    "log1p_sigmoid": lambda u: (e := torch.exp(-u.abs())) / (1 + e) ** 2 / (1 + torch.sigmoid(u)),
}


def domain(name: str) -> Tensor:
    wide = torch.cat(
        [torch.logspace(-38, 38, 20001), torch.linspace(0, 12, 20001), torch.linspace(12, 120, 5001)]
    )
    wide = torch.cat([wide, -wide, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])]).float()
    if name in ("log", "sqrt"):
        return wide[~(wide < 0)]
    return wide[~(wide <= -1)] if name == "log1p" else wide


def units(got: Tensor, want: Tensor) -> Tensor:
    """How far off, in units in the last place of the exact result."""
    rounded = want.float()
    unit = torch.clamp(rounded.abs().double() * 2.0**-23, min=2.0**-149)
    same = (got == rounded) | (got.isnan() & rounded.isnan())
    return torch.where(same, 0.0, ((got.double() - want).abs() / unit).nan_to_num(nan=math.inf))


@pytest.mark.parametrize("name", CPP_UNARY)
def test_elementary_functions(name):
    """Values within 4 units; derivatives within 8, where they are neither subnormal nor near to infinite."""
    x = domain(name)
    value, slope = torch.empty_like(x), torch.empty_like(x)
    load("activation").elementary(name, x.data_ptr(), x.numel(), value.data_ptr(), slope.data_ptr())
    u = x.double().requires_grad_()
    exact = VALUES.get(name, getattr(torch, name, None))(u)
    exact_slope = SLOPES[name](u) if name in SLOPES else torch.autograd.grad(exact.sum(), u)[0]
    off = units(value, exact.detach())
    worst = off.argmax()
    assert off[worst] <= 4, f"{name}({x[worst]}) = {value[worst]}, not {exact[worst]}: {off[worst]:.1f} units"
    if name == "sinc":  # near the slope's own zeros its terms cancel
        exact_slope = torch.where((exact_slope * u).abs() < 0.1, math.nan, exact_slope)
    usual = exact_slope.isfinite() & (exact_slope.abs() > 1e-36) & (exact_slope.abs() < 1e38)
    off = torch.where(usual, units(slope, exact_slope.detach()), 0.0)
    worst = off.argmax()
    assert off[worst] <= 8, (
        f"{name}'({x[worst]}) = {slope[worst]}, not {exact_slope[worst]}: {off[worst]:.1f} units"
    )


def test_16_bit_results_are_rounded_once():
    """Every 16-bit number, through functions with an exponential, an error function and none."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        for name in ("silu", "gelu", "relu"):
            case = Case(name, [every], grad=torch.ones_like(every))
            exact, *_ = case.computed(torch.float64)
            got = case.forward()
            rounded = exact.to(dtype)
            equal = (got == rounded) | (got.isnan() & rounded.isnan())
            near = (
                (got.double() - exact).abs() <= 0.501 * EPSILON[dtype] * exact.abs().clamp(min=1e-30)
            ) | equal
            assert near.all(), (name, dtype, every[~near][:5], got[~near][:5], exact[~near][:5])


# ------------------------------------------------------------------------------------------------------------- layouts

FEW = ["silu", "leaky_relu", "snake", "kaf"]  # no slot, one, two, coefficient vectors


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1016, 1024, 1025, 2500])
def test_sizes(n, dtype):
    for name in FEW[:3]:
        case = Case(name, [values(n, dtype=dtype)])
        case.check()
        assert all(launch["vectors"] for launch in case.device.launches)
        guarded = torch.full((n + 32,), 7.0, dtype=dtype)
        out = guarded[16 : 16 + n]
        case.device.out(case.inputs, *case.arguments, out)
        assert torch.equal(out, case.forward())
        assert (guarded[:16] == 7).all()
        assert (guarded[16 + n :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_misaligned_and_strided(dtype):
    base = values(4 * 6 * 64 + 8, dtype=dtype)
    for name in FEW:
        for x in (
            base[1:1001], base[: 4 * 6 * 64].view(4, 6, 64)[..., ::2], base[:1536].view(24, 64).t(),
            base[:384].view(6, 64)[:, :61],
            base[:1536].view(4, 6, 8, 8).permute(0, 2, 3, 1), base[:48].view(1, 6, 8).expand(5, 6, 8), base[:1].view(()),
            base[:1536].view(24, 64)[::2], base[:64].view(2, 2, 2, 2, 2, 2).permute(5, 3, 1, 4, 2, 0)[..., :1],
        ):  # fmt: skip
            Case(name, [x]).check()
            Case(name, [x], grad=values(1, dtype=dtype)[0].expand(x.shape)).check()
    rows = base[:1536].view(24, 64)
    gapped = Case("silu", [rows[:, :48]])
    gapped.check()
    assert gapped.device.launches[0]["vectors"], "rows that begin and end on 16 bytes move in vectors"
    assert not Case("silu", [base[1:1001]]).launched()["vectors"]


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((3, 8, 4, 4), 1), ((2, 5, 300), 1), ((2, 5, 512), 1), ((70, 24), 1), ((5, 40, 3), 1), ((6, 50), 0), ((7,), 0),
     ((1, 3, 1), 1)],
)  # fmt: skip
def test_channels(shape, dim, dtype):
    for name in FEW[1:]:
        x = values(*shape, dtype=dtype)
        case = Case(name, [x], channels=shape[dim], channel_dim=dim)
        case.check()
        inner = math.prod(shape[dim + 1 :])
        assert case.summed()["by_columns"] == (inner < 256 and shape[dim] > 1)
        assert case.launched()["vectors"], "channels do not stand in the way of vectors"
        if len(shape) == 4:
            Case(
                name, [x.contiguous(memory_format=torch.channels_last)], channels=shape[dim], channel_dim=dim
            ).check()
        Case(
            name,
            [x.mT if x.dim() > 1 else x],
            channels=x.mT.shape[dim] if x.dim() > 1 else shape[0],
            channel_dim=dim,
        ).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("split", [1, 2, 3, 4])
def test_packed(split, dtype):
    for name in ("swiglu", "geglu", "swiglu_beta"):
        for shape, dim, vectors in (
            ((5, 32), 1, True), ((3, 4, 48), 2, True), ((3, 10), 1, split > 2), ((4, 6, 16), 1, True), ((8, 24), 0, True),
            ((14,), 0, split > 2),
        ):  # fmt: skip
            case = Case(name, [values(*shape, dtype=dtype)], split=split, split_dim=dim)
            case.check()
            launched = case.launched()
            assert launched["vectors"] == vectors, (shape, dim)
            assert launched["interleaved"] == (vectors and split > 2 and dim == len(shape) - 1)
        Case(name, [values(6, 40, dtype=dtype)[:, 3:37]], split=split, split_dim=1).check()
    with_third = Case(
        "highway_gate", [values(5, 32, dtype=dtype), values(5, 16, dtype=dtype)], split=split, split_dim=1
    )
    with_third.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_several_inputs(dtype):
    for name in ("swiglu", "highway_gate", "probact"):
        n = len(kernels()[name].inputs)
        Case(name, [values(11, 24, dtype=dtype) for _ in range(n)]).check()
        Case(
            name,
            [values(11, 24, dtype=dtype), *(values(24, dtype=dtype).expand(11, 24) for _ in range(n - 1))],
        ).check()
        case = Case(name, [values(11, 24, dtype=dtype) for _ in range(n)])
        whole = case.backward((1 << n) - 1)
        for i in range(n):
            assert torch.equal(case.backward(1 << i)[0], whole[i])


def test_in_place():
    for dtype in DTYPES:
        for x in (values(1001, dtype=dtype), values(64, 9, dtype=dtype).t()):
            case = Case("silu", [x])
            want = case.forward()
            case.device.out([x], *case.arguments, x)
            assert torch.equal(x, want)


# ------------------------------------------------------------------------------------------------- sums and large tensors


def test_the_schedule_never_shows():
    for name, shape, channels in (
        ("kaf", (3000,), 1),
        ("leaky_relu", (4, 6, 40), 6),
        ("snake", (3, 5, 300), 5),
        ("swish_plus", (9000,), 1),
    ):
        case = Case(name, [values(*shape)], channels=channels, channel_dim=min(1, len(shape) - 1))
        results = []
        for seed in range(3):
            case.device.seed = seed
            results.append(bits([case.forward(), *case.backward()]))
        assert results[0] == results[1] == results[2]


def test_slots_beyond_shared_memory():
    """Fewer rows at once change nothing but the number of launches."""
    for channels, shape in ((1, (1500,)), (6, (5, 6, 20)), (2, (3, 2, 300))):
        case = Case("kaf", [values(*shape)], channels=channels, channel_dim=1 if channels > 1 else 0)
        whole = bits(case.backward())
        assert len(case.device.launches) == 1
        case.device.shared_per_block = 5 * 512
        assert bits(case.backward()) == whole
        assert len(case.device.launches) == -(-sum(case.lengths) // 5)
        assert all(launch["window"] <= 5 for launch in case.device.launches)


@pytest.mark.parametrize("limit", [1024, 64, 8])
def test_tensors_beyond_32_bits_are_cut(limit):
    """At a limit far below 2^31, at which the cut is the same."""
    for x, channels in (
        (values(2100), 1), (values(5, 6, 70), 6), (values(300, 7), 7), (values(2, 3, 400), 3), (values(1, 60, 9), 60),
        (values(12, 50).t(), 12),
    ):  # fmt: skip
        case = Case("snake", [x], channels=channels, channel_dim=min(1, x.dim() - 1))
        whole = [case.forward(), *case.backward()]
        case.device.limit = limit
        cut = [case.forward(), *case.backward()]
        assert bits(cut[:2]) == bits(whole[:2])
        torch.testing.assert_close(cut[2], whole[2], rtol=1e-5, atol=1e-4)
        assert len(case.device.launches) >= x.numel() / limit


def test_sums_are_spread_over_blocks():
    case = Case("leaky_relu", [values(40000)])
    case.check()
    assert case.summed()["grid"][1] > 4
    columns = Case("leaky_relu", [values(3000, 40)], channels=40, channel_dim=1)
    columns.check()
    assert columns.summed()["grid"][0] == 2
    assert columns.summed()["grid"][1] > 4


def test_refusals():
    many = (
        values(2**13)
        .view([2] * 13)
        .permute(*range(0, 13, 2), *range(1, 13, 2))[(slice(None),) * 12 + (slice(0, 1),)]
    )
    assert Case("silu", [many]).forward().isfinite().all()
    case = Case("silu", [values(3**13).view([3] * 13)[(slice(0, 2),) * 13]])
    out = torch.empty([2] * 13).permute(*range(0, 13, 2), *range(1, 13, 2))
    with pytest.raises(ValueError, match="12 separate dimensions"):
        case.device.out(case.inputs, *case.arguments, out)
