"""The composed activations, each against its definition written out in numpy, in double precision."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import torchlin
from torchlin import catalogue
from torchlin.functional import activation
from torchlin.nn.activation import Activation
from torchlin.nn.activation_composed import MODULES
from torchlin.ops._composed import options
from torchlin.ops.activation_composed import IMPLEMENTATIONS, BatchNorm

Array = np.ndarray
COMPOSED = [row.name for row in catalogue.catalogue().values() if row.implementation]

# ------------------------------------------------------------------------------------------------ oracles


def rows(function: Callable[..., Array]) -> Callable[..., Array]:
    """An oracle for one vector, along a dimension of an array."""
    return lambda x, dim=-1, **p: np.apply_along_axis(lambda v: function(v, **p), dim, x)


def softmax(v: Array) -> Array:
    e = np.exp(v - v.max())
    return e / e.sum()


def share(w: Array) -> Array:
    return w / w.sum()


def entmax(v: Array, alpha: float) -> Array:
    """The best of all supports: p_i = ((alpha - 1)v_i - tau)^(1/(alpha - 1)) on one, of sum 1, maximises p·v + H(p)."""
    best, value = None, -math.inf
    for size in range(1, len(v) + 1):
        for support in itertools.combinations(range(len(v)), size):
            z = (alpha - 1) * v[list(support)]
            low, high = z.max() - 1, z.min()
            mass = lambda t, z=z: np.maximum(z - t, 0) ** (1 / (alpha - 1))  # noqa: E731
            if mass(high).sum() > 1:  # no threshold below all of them has sum 1
                continue
            for _ in range(200):
                middle = (low + high) / 2
                low, high = (middle, high) if mass(middle).sum() >= 1 else (low, middle)
            p = np.zeros_like(v)
            p[list(support)] = mass(low)
            entropy = (p - p**alpha).sum() / (alpha * (alpha - 1))
            if p @ v + entropy > value:
                best, value = p, p @ v + entropy
    assert best is not None
    return best


def power_mean(v: Array, a: float, b: float) -> float:
    t = b * math.log(a)
    return v.mean() if t == 0 else math.log(np.exp(t * v).mean()) / t


def lehmer_mean(v: Array, a: float, b: float) -> float:
    s = math.log(a)
    return math.log(np.exp((b + 1) * s * v).sum() / np.exp(b * s * v).sum()) / s


def gp_softmax(v: Array, a: float, b: float, c: float, d: float, mean: str = "power") -> Array:
    of = power_mean if mean == "power" else lehmer_mean
    centred = v - of(v, a, b)
    return softmax(centred / of(centred, c, d))


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def grouped(x: Array, dim: int, size: int, of: Callable[[Array], Array]) -> Array:
    def one(v: Array) -> Array:
        return np.concatenate([np.atleast_1d(of(v[i : i + size])) for i in range(0, len(v), size)])

    return np.apply_along_axis(one, dim, x)


def kwta(x: Array, k: float) -> Array:
    flat = x.reshape(len(x), -1)
    count = max(1, math.floor(k * flat.shape[1] + 1e-9))
    kept = np.zeros_like(flat)
    for row, out in zip(flat, kept, strict=True):
        best = np.argsort(row)[-count:]
        out[best] = row[best]
    return kept.reshape(x.shape)


def bins(x: Array, a: Array, b: Array, width: float) -> Array:
    y = np.empty_like(x)
    for at, v in np.ndenumerate(x):
        k = min(max(math.floor(v / width) + len(a) // 2, 0), len(a) - 1)
        c = at[1] if a.ndim == 2 else ...
        y[at] = a[k][c] * v + b[k][c]
    return y


def anchors(x: Array, y: Array, lo: float, width: float, kernel: str = "cosine") -> Array:
    """The sum over all anchors, as the paper has it."""
    places = lo + width * np.arange(len(y))
    t = np.abs(np.clip(x, places[0], places[-1])[..., None] - places) / width
    r = np.where(t < 1, (1 + np.cos(np.pi * t)) / 2 if kernel == "cosine" else 1 - t, 0)
    if y.ndim == 1:
        return (r * y).sum(-1)
    return np.einsum("nc...k,kc->nc...", r, y)


def convolved(x: Array, w: Array, bias: Array | None = None) -> Array:
    """Depthwise, by its definition."""
    k = w.shape[-1] // 2
    padded = np.pad(x, [(0, 0), (0, 0), (k, k), (k, k)])
    y = np.zeros_like(x)
    for i, j in np.ndindex(w.shape[2:]):
        y += w[None, :, 0, i, j, None, None] * padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
    return y if bias is None else y + bias[:, None, None]


def normalised(x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    dims = tuple(d for d in range(x.ndim) if d != 1)
    shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
    y = (x - x.mean(dims, keepdims=True)) / np.sqrt(x.var(dims, keepdims=True) + eps)
    return y * weight.reshape(shape) + bias.reshape(shape)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def along_channels(v: Array, ndim: int) -> Array:
    return v.reshape(v.shape + (1,) * (ndim - v.ndim))


def dynamic_relu(x: Array, w1: Array, b1: Array, w2: Array, b2: Array, k: int, shared: bool = False) -> Array:
    y = np.empty_like(x)
    for n, sample in enumerate(x):
        hidden = relu(w1 @ sample.mean((1, 2)) + b1)
        theta = (2 * sigmoid(w2 @ hidden + b2) - 1).reshape(-1, 2 * k)
        for c, plane in enumerate(sample):
            own = theta[0 if shared else c]
            slopes = [1.0 * (i == 0) + 1.0 * own[i] for i in range(k)]
            offsets = [0.5 * own[k + i] for i in range(k)]
            y[n, c] = np.max([a * plane + b for a, b in zip(slopes, offsets, strict=True)], 0)
    return y


def meta_acon(x: Array, p1: Array, p2: Array, w1: Array, b1: Array, w2: Array, b2: Array) -> Array:
    beta = sigmoid((x.mean((2, 3)) @ w1.T + b1) @ w2.T + b2)[:, :, None, None]
    p1, p2 = p1[:, None, None], p2[:, None, None]
    return (p1 - p2) * x * sigmoid(beta * (p1 - p2) * x) + p2 * x


def evonorm(x: Array, groups: int, v: Array, weight: Array, bias: Array, eps: float) -> Array:
    std = np.sqrt(x.reshape(len(x), groups, -1).var(-1) + eps)
    std = np.repeat(std, x.shape[1] // groups, 1)[:, :, None, None]
    v, weight, bias = (t[:, None, None] for t in (v, weight, bias))
    return x * sigmoid(v * x) / std * weight + bias


def frn(x: Array, eps: float, weight: Array, bias: Array, tau: Array) -> Array:
    weight, bias, tau = (t[:, None, None] for t in (weight, bias, tau))
    rms = np.sqrt((x**2).mean((2, 3), keepdims=True) + eps)
    return np.maximum(weight * x / rms + bias, tau)


def polynorm(v: Array, a: Array, b: float, eps: float) -> Array:
    return sum(c * v**i / np.sqrt((v ** (2 * i)).mean() + eps) for i, c in enumerate(a, 1)) + b


# ------------------------------------------------------------------------------------------------ cases


@dataclass
class Case:
    """A call, and what computes it otherwise; tensors are by names, so that they can be differentiated by."""

    name: str
    oracle: Callable[..., Array]  # of x and of what is in `arguments`, by the oracle's names
    shape: tuple[int, ...] = (3, 6)
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)  # parameters that are random tensors
    options: dict[str, Any] = field(default_factory=dict)
    complex: bool = False
    row: tuple[int, ...] | None = (-1,)  # dimensions that a NaN spreads along; None: all of them
    scale: float = 1.5
    float32: float = 3e-6  # tolerance
    label: str = ""

    def __str__(self) -> str:
        return f"{self.name}{'-' + self.label if self.label else ''}"

    def x(self, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.complex:
            kind = torch.complex128 if dtype is torch.float64 else torch.complex64
            return torch.randn(self.shape, generator=generator, dtype=kind) * self.scale * scale
        return (torch.randn(self.shape, generator=generator, dtype=torch.float64) * self.scale * scale).to(
            dtype
        )

    def arguments(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(7)
        return {
            key: (torch.randn(shape, generator=generator, dtype=torch.float64) / 2).to(dtype)
            for key, shape in self.tensors.items()
        }

    def call(self, x: Tensor, **tensors: Tensor) -> Tensor:
        return activation(x, self.name, **self.options, **tensors)

    def expected(self, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        wide = {key: t.detach().double().numpy() for key, t in tensors.items()}
        wide_x = x.detach().to(torch.complex128 if x.is_complex() else torch.float64)
        return torch.from_numpy(np.asarray(self.oracle(wide_x.numpy(), **wide)))


def mean_offset(x: Array, b: float, c: float, dims: tuple[int, ...] | None) -> Array:
    m = x.mean(dims, keepdims=True)
    return relu(x - b * m) + c * m


IMAGE = (2, 6, 2, 3)
FC = {"fc1_weight": (4, 6), "fc1_bias": (4,)}
CASES = [
    Case("abrelu", lambda x: relu(x - x.mean()), row=None),
    Case("abrelu", lambda x: relu(x - x.mean(1, keepdims=True)), options={"dim": 1}, label="dim"),
    Case("aoaf_static", lambda x: mean_offset(x, 0.17, 0.17, None), row=None),
    Case("aoaf", lambda x: mean_offset(x, 0.17, 0.17, (0, 2, 3)), IMAGE, row=(0, 2, 3)),
    Case("softmax", rows(softmax)),
    Case("softmax", lambda x: rows(softmax)(x, 1), IMAGE, options={"dim": 1}, row=(1,), label="dim"),
    Case("log_softmax", rows(lambda v: v - v.max() - np.log(np.exp(v - v.max()).sum()))),
    Case("softmin", rows(lambda v: softmax(-v))),
    Case("beta_softmax", lambda x, beta: rows(softmax)(beta * x), tensors={"beta": ()}),
    Case("beta_softmax", rows(lambda v: softmax(-2.5 * v)), options={"beta": -2.5}, label="negative"),
    Case("softermax", rows(lambda v: share(2.0**v))),
    Case("softmax_one", rows(lambda v: np.exp(v) / (1 + np.exp(v).sum()))),
    Case("taylor_softmax", rows(lambda v: share(1 + v + v**2 / 2))),
    Case("spherical_softmax", rows(lambda v: share(v**2 + 1e-8))),
    Case("sqmax", rows(lambda v: share((v + 4) ** 2))),
    Case("sqmax", lambda x, c: rows(lambda v: share((v + c) ** 2))(x), tensors={"c": ()}, label="learnt"),
    Case("gp_softmax", rows(lambda v: gp_softmax(v, math.e, 0, math.e, 2))),
    Case(
        "gp_softmax",
        rows(lambda v: gp_softmax(v, 1.5, 0.3, 2, 1.2, "lehmer")),
        options={"a": 1.5, "b": 0.3, "c": 2.0, "d": 1.2, "mean": "lehmer"},
        label="lehmer",
    ),
    Case("hardmax", rows(lambda v: np.eye(len(v))[v.argmax()])),
    Case("solu", rows(lambda v: v * softmax(v))),
    Case("sparsemax", rows(lambda v: entmax(v, 2))),
    Case("sparsemax", lambda x: rows(lambda v: entmax(v, 2))(x, 0), (5, 3), options={"dim": 0}, row=(0,),
         label="dim"),
    Case("entmax15", rows(lambda v: entmax(v, 1.5))),
    Case("entmax15", rows(lambda v: entmax(v, 1.25)), options={"alpha": 1.25}, label="1.25"),
    Case("entmax15", rows(lambda v: entmax(v, 1.8)), options={"alpha": 1.8}, label="1.8"),
    Case("gumbel_softmax", rows(lambda v: softmax(v / 0.5)), options={"tau": 0.5}),
    Case("maxout", lambda x: grouped(x, 1, 3, np.max), options={"k": 3}, row=(1,)),
    Case("maxout", lambda x: grouped(x, 1, 2, np.max), IMAGE, row=(1,), label="image"),
    Case("minmax_groupsort", lambda x: grouped(x, 1, 2, np.sort), row=(1,)),
    Case("minmax_groupsort", lambda x: grouped(x, 1, 3, lambda v: np.sort(v)[::-1]), IMAGE,
         options={"g": 3, "descending": True}, row=None, label="falling"),
    Case("oplu", lambda x: grouped(x, 1, 2, lambda v: np.sort(v)[::-1]), row=(1,)),
    Case("lwta", lambda x: grouped(x, 1, 3, lambda v: np.where(v == v.max(), v, 0)), options={"group": 3},
         row=None),
    Case("crelu", lambda x: np.concatenate([relu(x), relu(-x)], 1), IMAGE, row=(1,)),
    Case("ncrelu", lambda x: np.concatenate([relu(x), -relu(-x)], -1), options={"dim": -1}, row=(1,)),
    Case("paired_relu", lambda x, a, b: np.concatenate([relu(a[:, None, None] * x - b), relu(-0.5 * x)], 1), IMAGE,
         tensors={"a": (6,), "b": ()}, row=(1,)),
    Case("bipolar_relu", lambda x: np.where(np.arange(6) % 2 == 1, -relu(-x), relu(x)), row=()),
    Case("kwta", lambda x: kwta(x, 0.2), IMAGE, row=(1, 2, 3)),
    Case("kwta", lambda x: rows(lambda v: np.where(v >= np.sort(v)[-3], v, 0))(x, 1), (3, 6, 2),
         options={"k": 0.5, "dim": 1}, row=(1,), label="dim"),
    Case("vbaf", rows(lambda v: np.sqrt(((v - v.mean()) ** 2).mean(keepdims=True)))),
    Case("batchnorm_drelu", lambda x: np.maximum(x, (x.max() + x.min()) / 2), row=None),
    Case("squash", rows(lambda v: (v @ v) / (1 + v @ v) * v / np.linalg.norm(v))),
    Case("squash", rows(lambda v: (v @ v) / (1 + v @ v) * v / np.linalg.norm(v)), scale=0.1, label="short"),
    Case("mtlu", lambda x, a, b: bins(x, a, b, 0.05), tensors={"a": (40,), "b": (40,)}, row=(), scale=0.7),
    Case("mtlu", lambda x, a, b: bins(x, a, b, 0.3), IMAGE, tensors={"a": (11, 6), "b": (11, 6)},
         options={"width": 0.3}, row=(), label="channels"),
    Case("lutu", lambda x, y: anchors(x, y, -12, 0.1), tensors={"y": (241,)}, row=(), float32=3e-5),  # slopes of 10
    Case("lutu", lambda x, y: anchors(x, y, -1, 0.25), IMAGE, tensors={"y": (9, 6)},
         options={"lo": -1, "width": 0.25}, row=(), label="channels"),
    Case("lutu", lambda x, y: anchors(x, y, -2, 0.5, "linear"), tensors={"y": (9,)},
         options={"lo": -2, "width": 0.5, "kernel": "linear"}, row=(), label="linear"),
    Case("funnel_relu", lambda x, weight, bias: np.maximum(x, convolved(x, weight, bias)), IMAGE,
         tensors={"weight": (6, 1, 3, 3), "bias": (6,)}, row=None),
    Case("scaa", lambda x, weight: np.maximum(x, convolved(x, weight)), IMAGE, tensors={"weight": (6, 1, 5, 5)},
         row=None),
    Case("dy_relu", lambda x, **w: dynamic_relu(x, *w.values(), k=2), IMAGE,
         tensors={**FC, "fc2_weight": (24, 4), "fc2_bias": (24,)}, row=None),
    Case("dy_relu", lambda x, **w: dynamic_relu(x, *w.values(), k=3, shared=True), IMAGE,
         tensors={**FC, "fc2_weight": (6, 4), "fc2_bias": (6,)}, options={"shared": True}, row=None,
         label="shared"),
    Case("meta_acon", lambda x, **w: meta_acon(x, *w.values()), IMAGE,
         tensors={"p1": (6,), "p2": (6,), **FC, "fc2_weight": (6, 4), "fc2_bias": (6,)}, row=None),
    Case("evonorm_s0", lambda x, **w: evonorm(x, 3, **w, eps=1e-5), IMAGE,
         tensors={"v": (6,), "weight": (6,), "bias": (6,)}, options={"groups": 3}, row=None),
    Case("frn_tlu", lambda x, **w: frn(x, 1e-6, **w), IMAGE, tensors={"weight": (6,), "bias": (6,), "tau": (6,)},
         row=(2, 3)),
    Case("polynorm", lambda x, a, b: rows(lambda v: polynorm(v, a, b, 1e-6))(x), tensors={"a": (3,), "b": ()}),
    Case("modrelu", lambda z, b: relu(abs(z) + b) * np.exp(1j * np.angle(z)), tensors={"b": (6,)}, complex=True,
         row=()),
    Case("zrelu", lambda z: np.where((np.angle(z) >= 0) & (np.angle(z) <= np.pi / 2), z, 0), complex=True,
         row=()),
    Case("cardioid", lambda z: (1 + np.cos(np.angle(z))) / 2 * z, complex=True, row=()),
    Case("crelu_complex", lambda z: relu(z.real) + 1j * relu(z.imag), complex=True, row=()),
]  # fmt: skip
every = pytest.mark.parametrize("case", CASES, ids=str)


def test_every_composed_name_has_a_case_an_implementation_and_a_module() -> None:
    assert {case.name for case in CASES} == set(COMPOSED) == set(MODULES)
    assert {catalogue.find(name).implementation for name in COMPOSED} == set(IMPLEMENTATIONS)


# ------------------------------------------------------------------------------------------------ every case


@every
def test_value(case: Case) -> None:
    x, tensors = case.x(), case.arguments()
    kept = x.clone()
    y = case.call(x, **tensors)
    torch.testing.assert_close(y, case.expected(x, tensors), rtol=1e-11, atol=1e-12)
    assert torch.equal(x, kept), "the input was written to"
    assert torch.equal(case.call(x, **tensors), y), "not the same bits again"


def half_a_step(y: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding to a dtype may change, and a little of float32 arithmetic before it."""
    info = torch.finfo(dtype)
    size = y.abs().clamp(min=info.tiny)
    step = 2 ** size.log2().floor() * info.eps
    return 0.5 * step + 3e-6 * y.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if not c.complex], ids=str)
def test_16_bits_are_rounded_once(case: Case, dtype: torch.dtype) -> None:
    x, tensors = case.x(dtype), case.arguments(dtype)
    y = case.call(x, **tensors)
    assert y.dtype is dtype
    expected = case.expected(x, tensors)
    off = (y.double() - expected).abs() > half_a_step(expected, dtype)
    assert not off.any(), f"{y[off][:3]} for {expected[off][:3]}"


@every
def test_float32(case: Case) -> None:
    x, tensors = case.x(torch.float32), case.arguments(torch.float32)
    y = case.call(x, **tensors)
    assert y.dtype is (torch.complex64 if case.complex else torch.float32)
    torch.testing.assert_close(y, case.expected(x, tensors).to(y.dtype), rtol=case.float32, atol=case.float32)


@every
def test_derivatives(case: Case) -> None:
    tensors = case.arguments()
    leaves = [case.x(seed=1), *tensors.values()]
    for leaf in leaves:
        leaf.requires_grad_()

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return case.call(x, **dict(zip(tensors, values, strict=True)))

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@every
def test_gradients_of_16_bits_are_finite_and_near(case: Case) -> None:
    def gradients(dtype: torch.dtype) -> list[Tensor]:
        x, tensors = (
            case.x(torch.bfloat16).to(dtype),
            {k: v.to(dtype) for k, v in case.arguments(torch.bfloat16).items()},
        )
        leaves = [x.requires_grad_(), *(t.requires_grad_() for t in tensors.values())]
        y = case.call(x, **tensors)
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        return list(torch.autograd.grad(y, leaves, seed.bfloat16().to(dtype)))

    if case.complex:
        pytest.skip("complex numbers have no 16-bit arithmetic")
    for low, high in zip(gradients(torch.bfloat16), gradients(torch.float64), strict=True):
        assert low.dtype is torch.bfloat16
        torch.testing.assert_close(low.double(), high, rtol=1e-2, atol=1e-2 * high.abs().max().item())


@every
def test_compiled_in_one_graph_for_batches_of_any_size(case: Case) -> None:
    torch.compiler.reset()
    compiled = torch.compile(case.call, fullgraph=True, dynamic=True, backend="aot_eager")
    for copies in (1, 2):
        results = []
        for function in (case.call, compiled):
            x, tensors = torch.cat([case.x()] * copies), case.arguments()
            leaves = [x.requires_grad_(), *(t.requires_grad_() for t in tensors.values())]
            y = function(x, **tensors)
            results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
        for plain, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, plain, rtol=1e-10, atol=1e-12)


EXPORTED = {"entmax15", "gumbel_softmax", "mtlu", "funnel_relu", "dy_relu", "evonorm_s0", "lwta", "modrelu"}


@pytest.mark.parametrize("case", [c for c in CASES if c.name in EXPORTED and not c.label], ids=str)
def test_exported(case: Case) -> None:
    """As a graph of aten operators alone."""

    class Module(nn.Module):
        def forward(self, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
            return case.call(x, **tensors)

    x, tensors = case.x(), case.arguments()
    exported = torch.export.export(Module(), (x, tensors))
    torch.testing.assert_close(exported.module()(x, tensors), case.call(x, **tensors), rtol=1e-12, atol=1e-13)
    operators = [n.target for n in exported.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert {op.namespace for op in operators} <= {"aten"}


@every
def test_vmap(case: Case) -> None:
    xs = torch.stack([case.x(seed=s) for s in range(3)], 1)
    tensors = case.arguments()
    batched = torch.func.vmap(lambda x: case.call(x, **tensors), in_dims=1)(xs)
    for s, y in enumerate(batched):
        torch.testing.assert_close(y, case.call(case.x(seed=s), **tensors), rtol=1e-12, atol=1e-13)
    slope = torch.func.vmap(
        torch.func.grad(lambda x: case.call(x, **tensors).abs().square().sum()), in_dims=1
    )(xs)
    for s, one in enumerate(slope):
        x = case.x(seed=s).requires_grad_()
        case.call(x, **tensors).abs().square().sum().backward()
        torch.testing.assert_close(one, x.grad, rtol=1e-10, atol=1e-11)


@every
def test_strides_do_not_matter(case: Case) -> None:
    x, tensors = case.x(), case.arguments()
    y = case.call(x, **tensors)
    order = list(reversed(range(x.dim())))
    transposed = x.permute(order).contiguous().permute(order)
    spread = torch.full((*x.shape, 2), 9, dtype=x.dtype)[..., 0].copy_(x)
    for other in (transposed, spread, x.unsqueeze(0).expand(2, *x.shape)[1]):
        torch.testing.assert_close(case.call(other, **tensors), y, rtol=1e-12, atol=1e-13)


@every
def test_empty_batch(case: Case) -> None:
    x, tensors = case.x()[:0], case.arguments()
    y = case.call(x.requires_grad_(), **tensors)
    full = case.call(case.x(), **tensors)
    assert y.shape == (0, *full.shape[1:])
    assert y.dtype is full.dtype
    y.abs().sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@every
def test_nan_goes_as_far_as_the_element_does(case: Case) -> None:
    """To the element's own place and no further than what depends on it."""
    x, tensors = case.x(), case.arguments()
    clean = case.call(x, **tensors)
    at = tuple(s // 2 for s in x.shape)
    x[at] = torch.nan
    y = case.call(x, **tensors)
    assert y.isnan().any()
    if case.row is None:
        return
    reach = [slice(None) if d in {r % x.dim() for r in case.row} else i for d, i in enumerate(at)]
    outside = torch.ones(clean.shape, dtype=torch.bool)
    outside[tuple(reach)] = False
    assert torch.equal(y[outside], clean[outside]), "a NaN went too far"
    if y.shape == x.shape and not case.complex:
        assert y[at].isnan(), "the NaN itself is gone"


@pytest.mark.parametrize("case", [c for c in CASES if not c.complex and c.row is not None], ids=str)
def test_a_sample_does_not_see_the_others(case: Case) -> None:
    if 0 in {r % len(case.shape) for r in case.row or ()}:
        pytest.skip("of the whole batch by definition")
    x, tensors = case.x(), case.arguments()
    alone = torch.cat([case.call(x[i : i + 1], **tensors) for i in range(len(x))])
    torch.testing.assert_close(case.call(x, **tensors), alone, rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------------------------------------ softmax family

SIMPLEX = ["softmax", "softmin", "beta_softmax", "softermax", "taylor_softmax", "spherical_softmax", "sqmax",
           "gp_softmax", "hardmax", "sparsemax", "entmax15", "gumbel_softmax"]  # fmt: skip


@pytest.mark.parametrize("name", SIMPLEX)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shares_sum_to_one_for_numbers_of_every_size(name: str, dtype: torch.dtype) -> None:
    for scale in (1e-20, 1e-3, 1.0, 1e3, 1e18, 1e37):
        x = (torch.randn(4, 33) * scale).to(dtype).requires_grad_()
        y = activation(x, name)
        assert (y >= 0).all()
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(y.float().sum(-1), torch.ones(4), rtol=0, atol=40 * step)
        (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
        if name != "gp_softmax" or scale > 1e-10:  # whose slope is one over the variance
            assert grad.isfinite().all(), f"{name} at {scale:g}"


@pytest.mark.parametrize("name", ["softmax_one", "solu", "squash", "vbaf", "polynorm", "log_softmax"])
def test_large_numbers_do_not_overflow(name: str) -> None:
    x = (torch.randn(4, 33) * 1e30).requires_grad_()
    y = activation(x, name)
    assert y.isfinite().all()
    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", ["softmax", "softermax", "sparsemax", "entmax15", "beta_softmax", "gumbel_softmax",
                                  "softmax_one"])  # fmt: skip
def test_masked_elements_get_nothing(name: str) -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    masked = x.clone()
    masked[:, 4:] = -torch.inf
    y = activation(masked.requires_grad_(), name)
    assert (y[:, 4:] == 0).all()
    torch.testing.assert_close(y[:, :4], activation(x[:, :4], name))
    (grad,) = torch.autograd.grad(y, masked, torch.randn_like(y))
    assert grad.isfinite().all()
    assert (grad[:, 4:] == 0).all()


@pytest.mark.parametrize(("name", "key", "value"), [("beta_softmax", "beta", 0.7), ("entmax15", "alpha", 1.3),
                                                    ("entmax15", "alpha", 1.5)])  # fmt: skip
def test_masked_elements_leave_a_learnt_temperature_finite(name: str, key: str, value: float) -> None:
    x = torch.tensor([[0.3, -torch.inf, 1.0, 0.1]], dtype=torch.float64)
    learnt = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor([[1.0, 2.0, 3.0, 5.0]], dtype=torch.float64)
    (masked,) = torch.autograd.grad(activation(x, name, **{key: learnt}), learnt, seed)
    short, rest = x[:, [0, 2, 3]], seed[:, [0, 2, 3]]
    (plain,) = torch.autograd.grad(activation(short, name, **{key: learnt}), learnt, rest)
    torch.testing.assert_close(masked, plain)


def test_published_example_of_entmax() -> None:
    """The numbers in the README of the authors' package."""
    x = torch.tensor([-2.0, 0.0, 0.5])
    for name, expected in [("sparsemax", [0.0, 0.25, 0.75]), ("entmax15", [0.0, 0.3260, 0.6740])]:
        torch.testing.assert_close(activation(x, name), torch.tensor(expected), rtol=0, atol=6e-5)


@pytest.mark.parametrize("alpha", [1.05, 1.25, 1.5, 1.75, 2.0, 2.5])
def test_entmax_zeros_are_exact_and_so_is_the_jacobian(alpha: float) -> None:
    x = torch.randn(1, 7, dtype=torch.float64) * 3
    y = activation(x, "entmax15", alpha=alpha)
    expected = entmax(x[0].numpy(), alpha)
    assert torch.equal(y[0] == 0, torch.from_numpy(expected < 1e-12))
    torch.testing.assert_close(y[0], torch.from_numpy(expected), rtol=1e-9, atol=1e-12)
    s = torch.where(y[0] > 0, y[0].clamp(min=1e-300) ** (2 - alpha), 0)  # proposition 2 of the paper
    jacobian = torch.autograd.functional.jacobian(lambda x: activation(x, "entmax15", alpha=alpha), x)[
        0, :, 0
    ]
    torch.testing.assert_close(jacobian, torch.diag(s) - torch.outer(s, s) / s.sum(), rtol=1e-8, atol=1e-10)


def test_entmax_is_differentiable_by_alpha_and_takes_one_a_head() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64) * 2
    alpha = torch.tensor([1.2, 1.5, 2.0], dtype=torch.float64).view(1, 3, 1).requires_grad_()
    y = activation(x, "entmax15", alpha=alpha)
    for head, value in enumerate((1.2, 1.5, 2.0)):
        torch.testing.assert_close(
            y[:, head], activation(x[:, head], "entmax15", alpha=value), rtol=1e-9, atol=1e-12
        )
    assert gradcheck(lambda a: activation(x, "entmax15", alpha=a), alpha)
    assert gradgradcheck(lambda x, a: activation(x, "entmax15", alpha=a), (x.requires_grad_(), alpha))


@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
def test_sparse_shares_of_long_rows(name: str) -> None:
    x = torch.randn(4, 50_000) * 2
    y, exact = activation(x, name), activation(x.double(), name)
    torch.testing.assert_close(y, exact.float(), rtol=1e-4, atol=2e-6)
    assert ((y > 0) != (exact > 1e-6)).sum() <= 4, "another support"


@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
def test_equal_elements_share(name: str) -> None:
    for n in (1, 2, 5):
        torch.testing.assert_close(activation(torch.full((2, n), 3.0), name), torch.full((2, n), 1 / n))


def test_hardmax_takes_the_first_of_equal_elements_and_has_no_gradient() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0]], requires_grad=True)
    y = activation(x, "hardmax")
    assert y.tolist() == [[0, 1, 0]]
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.tolist() == [[0, 0, 0]]


def test_equal_elements_get_equal_shares_of_gp_softmax() -> None:
    x = torch.full((2, 4), 1.5, requires_grad=True)
    y = activation(x, "gp_softmax")
    torch.testing.assert_close(y, torch.full((2, 4), 0.25))
    (grad,) = torch.autograd.grad(y, x, torch.randn(2, 4))
    assert grad.isfinite().all()


@pytest.mark.parametrize("t", [1e-7, 1e-3, 0.3, 20.0])
def test_generalised_means_are_accurate_between_their_forms(t: float) -> None:
    """A series near 0, logsumexp far from it: both, in float32, near the definition in double precision."""
    x = torch.randn(8, 40)
    y = activation(x, "gp_softmax", b=0.0, d=t)
    exact = np.stack([gp_softmax(v, math.e, 0, math.e, t) for v in x.double().numpy()]) if t > 1e-6 else None
    if exact is None:  # S is t/2 the variance: all but one share vanish
        assert (y.argmax(-1) == x.argmax(-1)).all()
        assert (y.amax(-1) > 0.99).all()
    else:
        torch.testing.assert_close(y.double(), torch.from_numpy(exact), rtol=2e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------ noise


def test_gumbel_softmax_is_torchs_from_the_same_seed() -> None:
    x = torch.randn(5, 7)
    for hard in (False, True):
        torch.manual_seed(3)
        y = activation(x, "gumbel_softmax", training=True, tau=0.7, hard=hard)
        torch.manual_seed(3)
        torch.testing.assert_close(y, nn.functional.gumbel_softmax(x, tau=0.7, hard=hard))


def test_gumbel_softmax_draws_from_softmax() -> None:
    x = torch.tensor([0.5, -1.0, 1.5, 0.0])
    generator = torch.Generator().manual_seed(11)
    draws = activation(x.expand(40_000, 4), "gumbel_softmax", training=True, hard=True, generator=generator)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert (draws.sum(-1) == 1).all()
    torch.testing.assert_close(draws.mean(0), torch.softmax(x, -1), rtol=0, atol=0.01)


def test_gumbel_softmax_generator_and_evaluation() -> None:
    x = torch.randn(5, 7, requires_grad=True)
    first, second = (
        activation(x, "gumbel_softmax", training=True, generator=torch.Generator().manual_seed(2))
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, activation(x, "gumbel_softmax", training=True))
    state = torch.random.get_rng_state()
    still = activation(x, "gumbel_softmax", tau=0.5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(still, torch.softmax(x / 0.5, -1))
    hard = activation(x, "gumbel_softmax", tau=0.5, hard=True)
    assert torch.equal(hard.detach(), activation(x.detach(), "hardmax"))
    seed = torch.randn(5, 7)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, x, seed, retain_graph=True)[0] for y in (hard, still))
    )


# ------------------------------------------------------------------------------------------------ groups, kinks


def test_groupsort_keeps_the_norm_of_gradients_at_ties() -> None:
    x = torch.tensor([[1.0, 1.0, 2.0, 2.0]], requires_grad=True)
    for name in ("minmax_groupsort", "oplu"):
        seed = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        (grad,) = torch.autograd.grad(activation(x, name), x, seed)
        assert sorted(grad.flatten().tolist()) == [1, 2, 3, 4]


def test_ties() -> None:
    x = torch.tensor([[2.0, 2.0, 1.0, 0.0]], requires_grad=True)
    assert activation(x, "lwta", group=4).tolist() == [[2, 2, 0, 0]]
    assert activation(x, "kwta", k=0.25).tolist() == [[2, 2, 0, 0]]
    (grad,) = torch.autograd.grad(activation(x, "maxout", k=2).sum(), x)
    assert grad.sum() == 2
    assert grad[0, :2].sum() == 1


@pytest.mark.parametrize(("n", "kept"), [(1, 1), (4, 1), (5, 1), (10, 2), (15, 3), (1000, 200)])
def test_kwta_keeps_its_share(n: int, kept: int) -> None:
    x = torch.randperm(n)[None].double() + 1
    assert (activation(x, "kwta", k=0.2) != 0).sum() == kept


def test_subgradients_at_zero_are_relus() -> None:
    for name, given in [("crelu", {}), ("ncrelu", {}), ("bipolar_relu", {}), ("paired_relu", {})]:
        x = torch.zeros(1, 4, requires_grad=True)
        (grad,) = torch.autograd.grad(activation(x, name, **given).sum(), x)
        assert grad.tolist() == [[0, 0, 0, 0]], name


def test_complex_functions_at_zero_have_finite_gradients() -> None:
    for name in ("modrelu", "zrelu", "cardioid", "crelu_complex"):
        z = torch.zeros(2, 3, dtype=torch.complex64, requires_grad=True)
        y = activation(z, name, **({"b": torch.full((3,), 0.5)} if name == "modrelu" else {}))
        assert (y == 0).all()
        (grad,) = torch.autograd.grad(y, z, torch.ones_like(y))
        assert torch.view_as_real(grad).isfinite().all(), name


def test_zrelu_keeps_the_borders_of_the_quadrant() -> None:
    z = torch.tensor([1 + 0j, 1j, 0j, -1 + 1j, 1 - 1j, -1 - 1j])
    assert activation(z, "zrelu").tolist() == [1, 1j, 0, 0, 0, 0]


def test_norms_at_zero_have_finite_gradients() -> None:
    for name in ("squash", "vbaf", "polynorm"):
        x = torch.zeros(2, 5, requires_grad=True)
        (grad,) = torch.autograd.grad(activation(x, name).sum(), x)
        assert grad.isfinite().all(), name


# ------------------------------------------------------------------------------------------------ tables


def test_outer_bins_reach_to_infinity_and_nan_is_nan() -> None:
    a, b = torch.tensor([2.0, 0.5, 1.0, 3.0]), torch.tensor([0.0, 1.0, 0.0, -1.0])
    x = torch.tensor([-1e30, -1.5, -1.0, -0.1, 0.0, 0.9, 1.0, 1e30, torch.inf, torch.nan])
    y = activation(x, "mtlu", a=a, b=b, width=1.0)
    expected = torch.tensor([-2e30, -3.0, 0.5, 0.95, 0.0, 0.9, 2.0, 3e30, torch.inf, torch.nan])
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_beyond_the_anchors_is_the_last_value() -> None:
    y = torch.tensor([3.0, 1.0, 2.0])
    x = torch.tensor([-torch.inf, -7.0, -1.0, 0.0, 1.0, 5.0, torch.inf, torch.nan], requires_grad=True)
    out = activation(x, "lutu", y=y, lo=-1.0, width=1.0)
    expected = torch.tensor([3.0, 3.0, 3.0, 1.0, 2.0, 2.0, 2.0, torch.nan])
    torch.testing.assert_close(out, expected, equal_nan=True)
    (grad,) = torch.autograd.grad(out[:-1].sum(), x)
    torch.testing.assert_close(grad[[0, 1, 2, 3, 4, 5, 6]], torch.zeros(7), rtol=0, atol=1e-6)


def test_table_gradients_are_sums_over_who_read_and_the_same_on_any_number_of_threads() -> None:
    x = torch.randn(8, 5, 40, 40)
    seed = torch.randn_like(x)
    seen = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        a, b = (torch.zeros(40, 5, requires_grad=True) for _ in range(2))
        seen.append(torch.autograd.grad(activation(x, "mtlu", a=a, b=b), (a, b), seed))
    assert all(torch.equal(p, q) for other in seen[1:] for p, q in zip(other, seen[0], strict=True))
    k = ((x / 0.05).floor() + 20).clamp(0, 39)
    for i, of_entry in enumerate((seed * x, seed)):
        expected = torch.stack([(of_entry.double() * (k == bin)).sum((0, 2, 3)) for bin in range(40)])
        torch.testing.assert_close(seen[0][i].double(), expected, rtol=1e-4, atol=1e-3)


def test_lutu_starts_as_the_identity() -> None:
    x = torch.linspace(-12, 12, 999, dtype=torch.float64)
    torch.testing.assert_close(activation(x, "lutu", kernel="linear"), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(activation(x, "lutu"), x, rtol=0, atol=0.1 * 0.11)


def test_mtlu_starts_as_relu() -> None:
    x = torch.randn(4, 8)
    assert torch.equal(activation(x, "mtlu"), torch.relu(x))


# ------------------------------------------------------------------------------------------------ batch statistics


def test_funnel_with_batch_norm() -> None:
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    weight = torch.randn(6, 1, 3, 3, dtype=torch.float64)
    scale, shift = torch.rand(6, dtype=torch.float64) + 0.5, torch.randn(6, dtype=torch.float64)
    mean, var = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    norm = BatchNorm(mean, var, scale, shift)
    context = convolved(x.numpy(), weight.numpy())
    y = activation(x, "funnel_relu", training=True, weight=weight, norm=norm)
    expected = np.maximum(x.numpy(), normalised(context, scale.numpy(), shift.numpy()))
    torch.testing.assert_close(y, torch.from_numpy(expected))
    n = context.size / 6
    torch.testing.assert_close(mean.numpy(), 0.1 * context.mean((0, 2, 3)))
    torch.testing.assert_close(var.numpy(), 0.9 + 0.1 * context.var((0, 2, 3)) * n / (n - 1))
    frozen = mean.clone(), var.clone()
    y = activation(x, "funnel_relu", weight=weight, norm=norm)
    assert torch.equal(mean, frozen[0])
    assert torch.equal(var, frozen[1])
    scaled = (context - mean.numpy()[:, None, None]) / np.sqrt(var.numpy()[:, None, None] + 1e-5)
    expected = np.maximum(x.numpy(), scaled * scale.numpy()[:, None, None] + shift.numpy()[:, None, None])
    torch.testing.assert_close(y, torch.from_numpy(expected))


def test_meta_acon_with_batch_norm() -> None:
    x = torch.randn(5, 6, 4, 4, dtype=torch.float64)
    names = {
        "p1": (6,),
        "p2": (6,),
        "fc1_weight": (4, 6),
        "fc1_bias": (4,),
        "fc2_weight": (6, 4),
        "fc2_bias": (6,),
    }
    w = {key: torch.randn(shape, dtype=torch.float64) for key, shape in names.items()}
    norms = [BatchNorm(None, None, *(torch.randn(c, dtype=torch.float64) for _ in range(2))) for c in (4, 6)]
    y = activation(x, "meta_acon", training=True, **w, norm1=norms[0], norm2=norms[1])
    a = {key: t.numpy() for key, t in w.items()}
    h = x.numpy().mean((2, 3)) @ a["fc1_weight"].T + a["fc1_bias"]
    h = normalised(h, norms[0].weight.numpy(), norms[0].bias.numpy()) @ a["fc2_weight"].T + a["fc2_bias"]
    beta = sigmoid(normalised(h, norms[1].weight.numpy(), norms[1].bias.numpy()))[:, :, None, None]
    u = (a["p1"] - a["p2"])[:, None, None] * x.numpy()
    expected = u * sigmoid(beta * u) + a["p2"][:, None, None] * x.numpy()
    torch.testing.assert_close(y, torch.from_numpy(expected))


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 3, 4, 2)], ids=str)
@pytest.mark.parametrize("name", ["evonorm_s0", "frn_tlu", "aoaf", "maxout", "kwta"])
def test_any_number_of_places(name: str, shape: tuple[int, ...]) -> None:
    """As images: the places in one row."""
    x = torch.randn(shape, dtype=torch.float64)
    given = {"groups": 3} if name == "evonorm_s0" else {}
    image = x.reshape(4, 6, -1, 1)
    y = activation(x, name, **given)
    expected = activation(image, name, **given).reshape(y.shape)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    "name", ["evonorm_s0", "frn_tlu", "aoaf", "maxout", "crelu", "mtlu", "meta_acon", "dy_relu"]
)
def test_channels_may_be_last(name: str) -> None:
    case = next(c for c in CASES if c.name == name and c.shape == IMAGE)
    x, tensors = case.x(), case.arguments()
    first = case.call(x, **tensors)
    last = activation(x.movedim(1, -1), name, channel_dim=-1, **case.options, **tensors)
    torch.testing.assert_close(last.movedim(-1, 1), first)


# ------------------------------------------------------------------------------------------------ bad input

X = torch.randn(4, 6)
IMAGES = torch.randn(2, 6, 4, 4)
FC2 = {"fc1_weight": torch.randn(3, 6), "fc1_bias": None, "fc2_bias": None}


@pytest.mark.parametrize(
    ("error", "words", "x", "name", "given"),
    [
        (ValueError, "dim must be in", X, "softmax", {"dim": 2}),
        (TypeError, "dim must be an int", X, "sparsemax", {"dim": 1.0}),
        (ValueError, "0-dimensional", torch.tensor(1.0), "softmax", {}),
        (TypeError, "x must be float32", torch.arange(4), "softmax", {}),
        (TypeError, r"x must be a torch\.Tensor", [1.0], "softmax", {}),
        (TypeError, "x must be complex", X, "modrelu", {}),
        (TypeError, "x must be float32", X + 0j, "softmax", {}),
        (TypeError, r"softmax has no argument 'tau'; its arguments: dim", X, "softmax", {"tau": 1.0}),
        (ValueError, r"alpha of entmax15 must be in \(1, inf\), got 1", X, "entmax15", {"alpha": 1}),
        (ValueError, "alpha must be a number, or a tensor", X, "entmax15", {"alpha": torch.full((6,), 1.5)}),
        (ValueError, r"tau of gumbel_softmax must be in \(0, inf\), got 0", X, "gumbel_softmax", {"tau": 0.0}),
        (ValueError, r"k of kwta must be in \(0, 1\], got 2", X, "kwta", {"k": 2}),
        (ValueError, "k must divide the 6 features", X, "maxout", {"k": 4}),
        (ValueError, "k must divide the 4 features", X, "maxout", {"k": 3, "dim": 0}),
        (TypeError, r"k must be a whole number, got 2\.5", X, "maxout", {"k": 2.5}),
        (ValueError, "channel_dim must be in", torch.randn(6), "maxout", {}),
        (ValueError, "g must divide", X[:, :5], "minmax_groupsort", {}),
        (ValueError, "must divide the 5 features", X[:, :5], "oplu", {}),
        (ValueError, "group must divide", X[:, :5], "lwta", {}),
        (ValueError, "mean must be 'power' or 'lehmer'", X, "gp_softmax", {"mean": "median"}),
        (ValueError, r"a must have shape \(6,\)", X, "paired_relu", {"a": torch.randn(5)}),
        (TypeError, "a must hold floating-point numbers", X, "paired_relu", {"a": torch.ones(6, dtype=torch.int64)}),
        (ValueError, "one length, got 40 and 39", X, "mtlu", {"b": [0.0] * 39}),
        (ValueError, "values for 5 channels, which does not fit the 6", X, "mtlu", {"a": torch.randn(40, 5)}),
        (ValueError, r"width of mtlu must be in \(0, inf\)", X, "mtlu", {"width": 0.0}),
        (ValueError, "at least 2 anchors", X, "lutu", {"y": [1.0]}),
        (ValueError, "kernel must be 'cosine' or 'linear'", X, "lutu", {"kernel": "hat"}),
        (TypeError, "y of lutu is a coefficient vector", X, "lutu", {"y": 1.0}),
        (TypeError, "funnel_relu needs weight: pass the weights, or use the module", IMAGES, "funnel_relu", {}),
        (TypeError, "kernel of funnel_relu is a size of its weights", IMAGES, "funnel_relu", {"kernel": 3}),
        (ValueError, "the window must be odd", IMAGES, "scaa", {"weight": torch.randn(6, 1, 2, 2)}),
        (ValueError, r"weight must be \[6, 1, \*window\]", IMAGES, "scaa", {"weight": torch.randn(5, 1, 3, 3)}),
        (ValueError, r"weight must be \[channels, 1", X, "scaa", {"weight": torch.randn(6, 1, 3, 3)}),
        (ValueError, "groups must divide the 6 channels", IMAGES, "evonorm_s0", {}),
        (ValueError, r"weight must have shape \(6,\)", IMAGES, "frn_tlu", {"weight": torch.randn(4)}),
        (ValueError, r"eps of frn_tlu must be in \[0, inf\)", IMAGES, "frn_tlu", {"eps": -1.0}),
        (ValueError, "fc2_weight must have 2·k·channels rows", IMAGES, "dy_relu", {**FC2, "fc2_weight": torch.randn(5, 3)}),
        (ValueError, r"fc1_weight must be \[outputs, 6\]", IMAGES, "dy_relu",
         {**FC2, "fc1_weight": torch.randn(3, 5), "fc2_weight": torch.randn(24, 3)}),
        (ValueError, "channel_dim must not be 0", IMAGES, "frn_tlu", {"channel_dim": 0}),
        (ValueError, "inplace=True", X, "crelu", {"inplace": True}),
        (ValueError, "out must have", X, "crelu", {"out": torch.empty(4, 6)}),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], words: str, x: Any, name: str, given: dict[str, Any]) -> None:
    with pytest.raises(error, match=words):
        activation(x, name, **given)


def test_out_and_inplace() -> None:
    out = torch.empty(4, 12)
    assert activation(X, "crelu", out=out) is out
    assert torch.equal(out, activation(X, "crelu"))
    x = X.clone()
    assert activation(x, "softmax", inplace=True) is x
    assert torch.equal(x, torch.softmax(X, -1))


# ------------------------------------------------------------------------------------------------ modules

SIZES: dict[str, dict[str, int]] = {
    "funnel_relu": {"channels": 32},
    "scaa": {"channels": 32},
    "dy_relu": {"channels": 32},
    "meta_acon": {"channels": 32},
    "evonorm_s0": {"num_features": 32},
    "frn_tlu": {"num_features": 32},
}
COMPLEX = {"modrelu", "zrelu", "cardioid", "crelu_complex"}


def make(name: str, **given: Any) -> nn.Module:
    return torchlin.create("activation", name, **SIZES.get(name, {}), **given)


def sample(name: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.complex64 if name in COMPLEX else torch.float32
    return torch.randn(3, 32, 4, 4, generator=generator, dtype=dtype)


@pytest.mark.parametrize("name", COMPOSED)
def test_module_state_goes_to_another_one(name: str) -> None:
    first, second = make(name), make(name)
    first.train()
    with torch.no_grad():
        for p in first.parameters():
            p.add_(torch.randn_like(p) / 10)
    first(sample(name, 1))  # running statistics
    second.load_state_dict(first.state_dict())
    x = sample(name)
    assert torch.equal(first.eval()(x), second.eval()(x))
    assert repr(first) == repr(second)
    assert type(first).__name__ in repr(first)


@pytest.mark.parametrize("name", COMPOSED)
def test_module_gradients_reach_every_parameter(name: str) -> None:
    module = make(name)
    x = sample(name).requires_grad_()
    y = module(x)
    y.backward(torch.randn_like(y))
    assert x.grad is not None
    for key, p in module.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        if key != "learnt_eps" and not (name == "gp_softmax" and key == "a"):  # b = 0 hides a
            assert p.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", [n for n in COMPOSED if n not in COMPLEX])
def test_module_computes_as_the_function(name: str) -> None:
    module = make(name).eval()
    if isinstance(module, Activation):
        x = sample(name)
        torch.testing.assert_close(module(x), activation(x, name))
    if name in ("softmax", "log_softmax"):
        torch.testing.assert_close(module(x), getattr(torch, name)(x, -1))


@pytest.mark.parametrize("name", ["funnel_relu", "meta_acon"])
def test_running_statistics_are_for_evaluation(name: str) -> None:
    module, x = make(name), sample(name)
    before = {k: v.clone() for k, v in module.state_dict().items() if "running" in k or "tracked" in k}
    module.eval()
    alone = module(x[:1])
    torch.testing.assert_close(module(x)[:1], alone, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(module.state_dict()[k], v) for k, v in before.items())
    module.train()
    together = module(x)
    assert all(not torch.equal(module.state_dict()[k], v) for k, v in before.items())
    assert not torch.allclose(together[:1], alone)
    assert not torch.allclose(together[:1], module(x[:2])[:1]), "training does not see the batch"


def test_funnel_module_is_conv_norm_max() -> None:
    module, x = make("funnel_relu"), sample("funnel_relu")
    conv, norm = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32)
    conv.load_state_dict(module.conv.state_dict())
    assert torch.equal(module(x), torch.maximum(x, norm(conv(x))))
    given = {"weight": module.conv.weight, "bias": module.conv.bias}
    norm = BatchNorm(module.norm.running_mean, module.norm.running_var, module.norm.weight, module.norm.bias)
    module.eval()
    torch.testing.assert_close(activation(x, "funnel_relu", **given, norm=norm), module(x))
    std = torchlin.create("activation", "funnel_relu", channels=4000).conv.weight.std()
    torch.testing.assert_close(std, torch.tensor(math.sqrt(2 / 9)), rtol=0.05, atol=0)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_funnel_of_any_dimensions(dims: int) -> None:
    module = torchlin.create("activation", "funnel_relu", channels=4, dims=dims, kernel=5)
    x = torch.randn(2, 4, *[6] * dims)
    assert (module(x) >= x).all()
    assert module.conv.weight.shape == (4, 1, *[5] * dims)
    with pytest.raises(ValueError, match="channels = 4"):
        module(torch.randn(2, 3, *[6] * dims))


def test_modules_start_as_their_sources_do() -> None:
    x = sample("frn_tlu")
    frn_module = make("frn_tlu")
    rms = (x.square().mean((2, 3), keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(frn_module(x), torch.relu(x / rms))
    learnt = make("frn_tlu", learnable_eps=True)
    assert (learnt.learnt_eps == 1e-4).all()
    torch.testing.assert_close(learnt(x), torch.relu(x / (rms.square() + 1e-4).sqrt()))
    evo = make("evonorm_s0")
    std = (x.view(3, 32, 1, 16).var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(evo(x), nn.functional.silu(x) / std)
    dynamic = make("dy_relu")
    assert dynamic.fc1.out_features == 8
    assert dynamic.fc2.out_features == 2 * 2 * 32
    with torch.no_grad():
        dynamic.fc2.weight.zero_(), dynamic.fc2.bias.zero_()
    torch.testing.assert_close(dynamic(x), torch.relu(x))  # slopes (1, 0), offsets 0
    assert make("meta_acon").fc1.out_features == 16
    assert torchlin.create("activation", "meta_acon", channels=512).fc1.out_features == 32


@pytest.mark.parametrize("name", sorted(SIZES))
def test_reset_parameters_starts_again(name: str) -> None:
    module = make(name)
    constant = {
        k for k, v in module.state_dict().items() if v.is_floating_point() and (v == v.flatten()[0]).all()
    }
    fresh = {k: v.clone() for k, v in module.state_dict().items()}
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(77)
    module.reset_parameters()
    for key, value in module.state_dict().items():
        assert not (value == 77).any(), key
        if key in constant:
            assert torch.equal(value, fresh[key]), key


def test_solu_with_the_papers_layer_norm() -> None:
    module, x = make("solu", normalized_shape=4), sample("solu")
    plain = make("solu")(x)
    torch.testing.assert_close(plain, x * torch.softmax(x, -1))
    torch.testing.assert_close(module(x), nn.functional.layer_norm(plain, [4]))


def test_learnt_parameters_of_channels() -> None:
    mtlu = torchlin.create("activation", "mtlu", num_parameters=6)
    assert mtlu.a.shape == (40, 6)
    assert torch.equal(mtlu(X), torch.relu(X))
    paired = torchlin.create("activation", "paired_relu")
    assert {k: tuple(v.shape) for k, v in paired.named_parameters()} == dict.fromkeys("abcd", (1,))
    sparse = torchlin.create("activation", "entmax15", learnable=["alpha"], alpha=1.3)
    torch.testing.assert_close(sparse(X), activation(X, "entmax15", alpha=1.3))
    sparse(X).square().sum().backward()
    assert next(sparse.parameters()).grad.abs() > 0


def test_options_of_modules() -> None:
    module = torchlin.create("activation", "softmax", dim=0)
    assert torch.equal(module(X), torch.softmax(X, 0))
    assert "dim=0" in repr(module)
    assert "hard" in torchlin.describe("activation", "gumbel_softmax").signature
    assert "channels" in torchlin.describe("activation", "funnel_relu").signature
    with pytest.raises(TypeError, match="no parameter 'dimension'"):
        torchlin.create("activation", "softmax", dimension=0)


@pytest.mark.parametrize(
    "given", [{"kernel": 4}, {"kernel": 0}, {"dims": 4}, {"channels": 0}, {"channels": 2.5}], ids=str
)
def test_bad_sizes_of_funnels(given: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(given))):
        torchlin.create("activation", "funnel_relu", **{"channels": 4, **given})


def test_groups_of_evonorm_must_fit() -> None:
    with pytest.raises(ValueError, match="groups must divide num_features = 24, got 32"):
        torchlin.create("activation", "evonorm_s0", num_features=24)


@pytest.mark.parametrize("name", sorted({*SIZES, "gumbel_softmax", "mtlu", "polynorm"}))
def test_modules_are_compiled_in_one_graph(name: str) -> None:
    torch.compiler.reset()
    module, x = make(name).eval(), sample(name)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


@pytest.mark.parametrize("name", COMPOSED)
def test_options_are_named_in_the_signature_of_the_implementation(name: str) -> None:
    function = inspect.unwrap(IMPLEMENTATIONS[catalogue.find(name).implementation or ""])
    taken = set(inspect.signature(function).parameters)
    sizes = {"kernel", "k", "r"} if name in SIZES else set()
    assert set(catalogue.find(name).parameters) - sizes <= taken
    assert set(options(name)) <= taken | {"dim"}
