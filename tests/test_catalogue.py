"""The catalogue: names; formulas against torch and high precision; kernels as generated C++ against both."""

from __future__ import annotations

import ctypes
import functools
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torchlin import catalogue as package
from torchlin.catalogue import Activation, catalogue, check, find, read
from torchlin.catalogue.cpp_code import CPP_PRIMITIVES, cost, functor, shards, write
from torchlin.catalogue.formula import HOST, Call, evaluate, parse
from torchlin.catalogue.kernels import kernels, plan
from torchlin.catalogue.rewrite import Slot
from torchlin.catalogue.torch_code import reference, source

TESTS = Path(__file__).parent
ALL = catalogue()
WITH_FORMULA = [a for a in ALL.values() if a.graph is not None]
OF_X = [a for a in WITH_FORMULA if a.inputs == ("x",)]  # noise at its evaluation value
GRID = torch.linspace(-8, 8, 1601, dtype=torch.float64)
OFF_GRID = GRID + 0.00123  # beside the kinks, which lie at round numbers

names = functools.partial(pytest.mark.parametrize, "activation", ids=lambda a: a.name)


def perturbed(activation: Activation) -> dict[str, Any]:
    """Other parameters, inside their domains and such that the function is defined."""
    out: dict[str, Any] = {}
    for p in activation.parameters.values():

        def move(v: float, p: Any = p) -> float:
            for candidate in (1.1 * v + 0.013, 0.9 * v - 0.007, 0.5 * (p.low + p.high)):
                if candidate in p and math.isfinite(candidate):
                    return candidate
            return v

        keep = (activation.name, p.name) in {("puaf", "a"), ("pwlu", "n"), ("app_relu", "b")}
        value = p.default
        out[p.name] = value if keep else tuple(map(move, value)) if isinstance(value, tuple) else move(value)
    return out


# ---------------------------------------------------------------------------------------------------------
# data


def test_counts():
    check()
    assert len(ALL) >= 487
    kinds = {kind: sum(a.kind == kind for a in ALL.values()) for kind in package.KINDS}
    assert kinds["elementwise"] + kinds["parametric"] >= 400
    assert kinds["gated"] == 20
    assert sum(len(a.aliases) for a in ALL.values()) > 250
    fused = [k for k in kernels().values() if len(k.inputs) == 1]
    assert len(fused) >= 340


def test_names_and_aliases_are_unique():
    owner: dict[str, str] = {}
    for a in ALL.values():
        for key in (a.name, *a.aliases):
            assert key not in owner, f"{key}: {owner.get(key)} and {a.name}"
            owner[key] = a.name
    for key, name in owner.items():
        assert find(key).name == name
    assert find(" Leaky-ReLU ").name == "leaky_relu"
    with pytest.raises(ValueError, match="'tanhexp'"):
        find("tanhxp")
    with pytest.raises(TypeError, match="name must be a str"):
        find(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "name"),
    {
        "swish": "silu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu_python": "gelu",
        "quick_gelu": "quick_gelu",
        "gelu_10": "gelu_10",
        "relu2": "relu_squared",
        "laplace": "laplace_cdf",
        "linear": "identity",
        "hard_sigmoid": "hardsigmoid",
        "hard_swish": "hardswish",
        "hard_mish": "hardmish",
        "srelu": "srelu",
        "frelu": "funnel_relu",
        "brelu": "brelu_bounded",
        "telu": "tanhexp",
        "golu": "expexpish",
        "log_sigmoid": "logsigmoid",
        "squareplus": "squareplus",
        "sparse_plus": "smelu",
        "silu_and_mul": "swiglu",
        "prelu": "prelu",
        "celu": "celu",
        "glu": "glu",
        "crelu": "crelu",
        "snake": "snake",
        "dyt": "dyt",
        "xielu": "xielu",
    }.items(),
)
def test_ambiguous_names_mean_what_the_ecosystem_means(key, name):
    assert find(key).name == name


@names(list(ALL.values()))
def test_every_section_is_complete(activation):
    a = activation
    assert a.display
    assert a.source
    assert a.year is None or 1800 < a.year < 2100
    assert a.graph is not None or a.implementation, "neither a formula nor code"
    assert a.kind != "parametric" or any(p.learnable for p in a.parameters.values())
    assert a.kind != "elementwise" or not any(p.learnable for p in a.parameters.values())
    assert (a.kind == "stochastic") == bool(a.noises) or a.implementation
    assert a.kind != "gated" or len(a.inputs) in (2, 3)
    for p in a.parameters.values():
        for value in p.default if isinstance(p.default, tuple) else (p.default,):
            assert value in p
        if p.constraint == "sigmoid":
            assert math.isfinite(p.low)
            assert math.isfinite(p.high)
        if p.constraint in ("softplus", "exp"):
            assert math.isfinite(p.low) or math.isfinite(p.high)
    if a.same_as:  # what a shared kernel assumes of its parameters holds for this name's
        for name, node in a.root_bindings.items():
            value = evaluate(node, a.defaults())
            root = a.root.parameters[name]
            assert all(v in root for v in (value if isinstance(value, list) else [value])), name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[a]\nformula = x", ["[a]", "display"]),
        ("[a]\ndisplay = A\nsource = s\nverified = no", ["exactly one of"]),
        ("[a]\ndisplay = A\nsource = s\nverified = no\nformula = tahn(x)", ["[a]", "'tanh'", "^"]),
        ("[a]\ndisplay = A\nsource = s\nverified = no\nformula = x\nbogus = 1", ["'bogus'"]),
        ("[a]\ndisplay = A\nsource = s\nverified = no\nformula = x\nkind = round", ["'round'"]),
        (
            "[a]\ndisplay = A\nsource = s\nverified = no\nformula = p*x\nparam p = 3 in (0, 1)",
            ["outside of (0, 1)"],
        ),
        ("[a]\ndisplay = A\nsource = s\nverified = no\nformula = p*x\nparam p = 3 learned", ["param p"]),
        ("[a]\ndisplay = A\nsource = s\nverified = no\nformula = p*x\nparam p = 3 by exp", ["learnable"]),
        (
            "[a]\ndisplay = A\nsource = s\nverified = no\nformula = x*n\nnoise n = cauchy(0) eval 0",
            ["noise n"],
        ),
        ("[a]\ndisplay = A\nsource = s\nverified = no\nsame_as = b(", ["same_as"]),
        ("[a]\ndisplay = A\ndisplay = B", ["display"]),
        ("[a]\n[a]", ["'a'"]),
        ("x", ["file"]),
    ],
)
def test_a_bad_section_says_what_is_wrong(text, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read(text, "mine.ini")
    for word in ("mine.ini", *words):
        assert word in str(caught.value)


def test_a_section_as_people_write_it():
    (a,) = read(
        "[mine]\ndisplay = Mine\naliases = m, my_own\nformula = u = a*x;\n    u*tanh(exp(u)) + sum(w*x)\n"
        "param a = 2/3 learnable channel in (0, inf) by softplus\nparam w = linspace(0, 1, 3)\n"
        "source = me 2024\nyear = 2024\nverified = no\nnote = 100 % mine"
    )
    assert a.aliases == ("m", "my_own")
    assert a.kind == "parametric"
    p = a.parameters["a"]
    assert p.default == 2 / 3
    assert p.learnable
    assert p.channel
    assert p.constraint == "softplus"
    assert p.domain == "(0, inf)"
    assert 0.0 not in p
    assert a.parameters["w"].default == (0, 0.5, 1)
    assert a.note == "100 % mine"


# ------------------------------------------------------------------------------------------------- against
# torch

TORCH = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "silu": F.silu,
    "prelu": lambda x: F.prelu(x, torch.tensor([0.25], dtype=x.dtype)),
    "gelu": F.gelu,
    "mish": F.mish,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "rrelu_eval": F.rrelu,
    "rrelu": F.rrelu,
    "softsign": F.softsign,
    "threshold_relu": lambda x: F.threshold(x, 1.0, 0.0),
    "threshold": lambda x: F.threshold(x, 1.0, 0.0),
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "tanhshrink": F.tanhshrink,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "arctan": torch.atan,
    "sin": torch.sin,
    "cos": torch.cos,
    "sinc": torch.sinc,
    "exponential": torch.exp,
    "sign": torch.sign,
}
GATED = {
    "glu": lambda a, b: F.glu(torch.cat((a, b), -1)),
    "reglu": lambda a, b: F.relu(a) * b,
    "geglu": lambda a, b: F.gelu(a) * b,
    "geglu_tanh": lambda a, b: F.gelu(a, approximate="tanh") * b,
    "swiglu": lambda a, b: F.silu(a) * b,
    "seglu": lambda a, b: F.selu(a) * b,
    "tanhglu": lambda a, b: torch.tanh(a) * b,
    "mish_glu": lambda a, b: F.mish(a) * b,
    "softplus_glu": lambda a, b: F.softplus(a, threshold=50) * b,
    "mul_and_silu": lambda a, b: a * F.silu(b),
    "star_operation": lambda a, b: F.relu6(a) * b,
}


def test_the_marks_are_kept():
    """What is marked as equal to torch is compared here, and the other way round; code has tests of its own."""

    def marked(start: str) -> set[str]:
        return {a.name for a in WITH_FORMULA if a.verified and a.verified.startswith(start)}

    assert marked("equal to torch.") == TORCH.keys() | {"glu"}
    assert marked("composed of torch") == GATED.keys() - {"glu"}
    assert marked("derived") <= PUBLISHED.keys() | {"sau", "dsilu"}


@pytest.mark.parametrize("name", TORCH)
def test_equal_to_torch(name):
    """Value and derivative, on the kinks too (the grid has the integers and halves), at infinity and NaN."""
    a = find(name)
    special = torch.tensor(
        [-math.inf, math.inf, math.nan, 0.0, -0.0, 20.0, 25.0, -100.0, 100.0, 1e-30, 1e4], dtype=GRID.dtype
    )
    for x in (GRID, special):
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, want = reference(a.eval_graph, {"x": ours}, a.defaults()), TORCH[name](theirs)
        atol = 3e-9 if name in ("softplus",) else 1e-15  # torch's softplus gives up beyond 20
        torch.testing.assert_close(y, want, rtol=1e-12, atol=atol, equal_nan=True)
        g, h = (torch.autograd.grad(v.sum(), t)[0] for v, t in ((y, ours), (want, theirs)))
        there = torch.isfinite(h) & ~torch.isnan(want)
        rtol = 1e-7 if name == "hardsigmoid" else 1e-11  # torch has 1/6 there in single precision
        torch.testing.assert_close(g[there], h[there], rtol=rtol, atol=3e-9 if name == "softplus" else 1e-14)


@pytest.mark.parametrize("name", GATED)
def test_gated_equal_to_torch(name):
    a = find(name)
    generator = torch.Generator().manual_seed(0)
    ours = [(3 * torch.randn(64, dtype=GRID.dtype, generator=generator)).requires_grad_() for _ in range(2)]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    y, want = reference(a.graph, dict(zip("ab", ours, strict=True)), a.defaults()), GATED[name](*theirs)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-15)
    for g, h in zip(torch.autograd.grad(y.sum(), ours), torch.autograd.grad(want.sum(), theirs), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-12, atol=1e-14)


def slope(activation: Activation, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    y = reference(activation.eval_graph, {"x": x}, activation.defaults()) + 0 * x
    return torch.autograd.grad(y.sum(), x)[0]


@names([a for a in OF_X if a.kind == "elementwise"])
def test_inplace_is_said_of_what_has_its_slope_from_the_output(activation):
    x = torch.cat((torch.linspace(-64, 64, 4097, dtype=torch.float64), OFF_GRID))
    y = reference(activation.eval_graph, {"x": x}, activation.defaults())
    same = torch.allclose(slope(activation, x), slope(activation, y), rtol=1e-9, atol=1e-12, equal_nan=True)
    assert activation.inplace == same


def test_conditions_of_inplace():
    assert not any(a.inplace for a in ALL.values() if a.kind != "elementwise")
    assert find("leaky_relu").allows_inplace({"a": 0.2})
    assert not find("leaky_relu").allows_inplace({"a": -0.2})
    assert not find("leaky_relu").allows_inplace({"a": torch.tensor(0.2)})
    assert not find("threshold").allows_inplace({"v": 3.0})


def test_parameters_by_the_words_of_others():
    assert find("leaky_relu").named({"negative_slope": 2}) == {"a": 2}
    assert find("hardtanh").named({"min_val": 2, "b": 3}) == {"a": 2, "b": 3}
    with pytest.raises(TypeError, match="leaky_relu has no parameter 'alpha'; it has a/negative_slope"):
        find("leaky_relu").named({"alpha": 2})
    with pytest.raises(TypeError, match="'a' came twice"):
        find("leaky_relu").named({"a": 1, "negative_slope": 2})


def test_the_double_precision_reference_is_in_double_precision():
    for a in OF_X:
        assert reference(a.eval_graph, {"x": GRID[:2]}, a.defaults()).dtype == torch.float64, a.name
        assert reference(a.eval_graph, {"x": GRID[:2].float()}, a.defaults()).dtype == torch.float32, a.name


# ------------------------------------------------------------------------------------------- against each
# other

# Names that are one function at their defaults.
SAME = """
reu suish; hardmish sqreu; polylu fplus signrelu iplu; sielu gelu_tanh; calu xatlu; mrelu tent; felu elu;
aptx pstanh; threshold_relu threshold; srelu plu; logish lau; loglog gompertz; siglu ptelu trelu trelu2;
blu bent_identity; snake snake_beta; flatten_t_swish pftswish; lisa alisa; relu_squared repu; pau rpau;
relu positive_prelu flexible_relu shilu app_relu tlu dpaf apl splash pwlu saaaf;
elu celu mpelu pfelu shelu svelu pshelu psvelu pelu fpaf; selu sselu; gelu pgelu geu xgelu;
sigmoid shifted_scaled_sigmoid variant_sigmoid assf psigmoid psf;
tanh adaptive_slope_tanh taaf laaf trainable_amplitude dknn rowdy;
silu swish_beta ahaf acon_a acon_c eis3 xsilu saf_swish kan_spline;
softplus softplus_beta grelu_log; leaky_relu dprelu lelelu; identity slaf chpaf lpaf hpaf
"""


@pytest.mark.parametrize("group", [group.split() for group in SAME.split(";")], ids=lambda g: g[0])
def test_names_of_one_function(group):
    first, *others = (reference(find(n).eval_graph, {"x": OFF_GRID}, find(n).defaults()) for n in group)
    for y in others:
        torch.testing.assert_close(y, first, rtol=1e-9, atol=1e-9)


def test_bi_firing_is_plaf_at_other_parameters():
    y = reference(find("bi_firing").graph, {"x": OFF_GRID}, {"a": 1.0})
    torch.testing.assert_close(y, reference(find("plaf").graph, {"x": OFF_GRID}, {"d": 2.0}))


def test_same_as_shares_the_kernel():
    for a in ALL.values():
        if a.same_as and a.graph is not None:
            assert plan(a.name).kernel is plan(a.same_as).kernel
            values = evaluate_plan(a, GRID, a.defaults())
            torch.testing.assert_close(
                values, reference(a.eval_graph, {"x": GRID, "a": GRID, "b": GRID}, a.defaults())
            )


# Forms as published, where the catalogue's is rearranged for accuracy or derived.
PUBLISHED = {
    "felu": "where(x > 0, x, a*(2**(x/log(2)) - 1))",
    "suish": "max(x, x*exp(-abs(x)))",
    "polylu": "where(x > 0, x, 1/(1 - x) - 1)",
    "sqreu": "where(x > 0, x, where(x >= -2, x + x*x/2, 0))",
    "sielu": "x*sigmoid(2*sqrt(2/pi)*(x + 0.044715*x**3))",
    "mrelu": "min(max(0, 1 - x), max(0, 1 + x))",
    "siglu": "where(x > 0, x, (1 - exp(-2*x))/(1 + exp(-2*x)))",
    "slu": "where(x > 0, x, 2*log((exp(x) + 1)/2))",
    "polu": "where(x > 0, x, (1 - x)**(-a) - 1)",
    "srs": "x/(x/a + exp(-x/b))",
    "colu": "x/(1 - x*exp(-(x + exp(x))))",
    "gish": "x*log(2 - exp(-exp(x)))",
    "eis1": "x*softplus(x)/(x + 1.16*exp(-x))",
    "tanhsoft": "tanh(a*x + b*exp(c*x))*log(d + exp(x))",
    "tanhsoft3": "log(1 + exp(x)*tanh(a*x))",
    "hclsh": "where(x > 0, log(cosh(x) + x*cosh(x/2)), log(cosh(x)) + x)",
    "symlog": "sign(x)*log1p(abs(x))",
    "symexp": "sign(x)*expm1(abs(x))",
    "smoothstep": "where(x >= a/2, 1, where(x <= -a/2, 0, -2/a**3*x**3 + 1.5/a*x + 0.5))",
    "rational_tanh": "y = 2*x/3; 1.7159*sign(y)*(1 - 1/(1 + abs(y) + y**2 + 1.41645*y**4))",
    "rmaf": "b*a*x/(0.25*(1 + exp(-x)) + 0.75)**c",
    "sqnl": "where(x > 2, 1, where(x >= 0, x - x*x/4, where(x >= -2, x + x*x/4, -1)))",
    "sq_softplus": "where(x > 0.5, x, where(x >= -0.5, x + (x - 0.5)**2/2, 0))",
    "squish": "where(x > 0, x + x*x/32, where(x >= -2, x + x*x/2, 0))",
    "bi_firing": "where(x > a, x - a/2, where(x < -a, -x - a/2, x*x/(2*a)))",
    "hat": "where(x < 0, 0, where(x <= a/2, x, where(x <= a, a - x, 0)))",
    "linq": "c = 1 - 2*a + a*a;where(x >= 2 - 2*a, a*x + c, where(x <= 2*a - 2, a*x - c, x*(4 - abs(x))/4))",
    "smelu": "where(x >= b, x, where(x <= -b, 0, (x + b)**2/(4*b)))",
    "calu": "x*(atan(x)/pi + 0.5)",
    "lalu": "x*where(x > 0, 1 - 0.5*exp(-x), 0.5*exp(x))",
    "prbf": "where(x >= a, exp(-(x - 2*a)**2/b**2), where(x <= -a, exp(-(x + 2*a)**2/b**2), exp(-x*x/b**2)))",
    "new_sigmoid": "sinh(x)/sqrt(cosh(2*x))",
    "generalized_tanh": "a*(1 - exp(-b*x))/(1 + exp(-b*x))",
    "eanaf": "x*exp(x)/(exp(x) + 2)",
    "ssaf": "sign(x)*sqrt(2*a*abs(x))",
    "hardswish": "x*clamp(x + 3, 0, 6)/6",
    "dsigmoid": "exp(-x)/(1 + exp(-x))**2",
    "pe2_id": "a*x + (1 - a)*(elu(x, 1) - elu(-x, 1))",
    "aqulu": "where(x >= (1 - b)/a, x, where(x >= -b/a, a*x*x + b*x, 0))",
    "xielu": "where(x > 0, p*x*x + b*x, (b + q)*(exp(x) - 1) - (b + q)*x + b*x)",
    "dknn": "a1*tanh(b1*x) + a2*sin(b2*x)",
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("other", [False, True], ids=["defaults", "other parameters"])
def test_rearranged_forms_are_the_published_ones(name, other):
    a = find(name)
    values = perturbed(a) if other else a.defaults()
    published = parse(PUBLISHED[name], list(a.parameters))
    want = reference(published, {"x": OFF_GRID}, values)
    torch.testing.assert_close(reference(a.graph, {"x": OFF_GRID}, values), want, rtol=1e-9, atol=1e-9)


def test_dsilu_is_the_derivative_of_silu():
    x = GRID.clone().requires_grad_()
    want = torch.autograd.grad(F.silu(x).sum(), x)[0]
    torch.testing.assert_close(reference(find("dsilu").graph, {"x": GRID}, {}), want)


def test_sau_is_leaky_relu_convolved_with_a_normal_density():
    a, b = 0.25, 2.0

    def integrand(t: Any, x: float) -> Any:
        leaky = x - t if x > t else a * (x - t)
        return leaky * b / mpmath.sqrt(2 * mpmath.pi) * mpmath.exp(-((b * t) ** 2) / 2)

    for x in (-2.0, -0.3, 0.0, 0.7, 3.0):
        want = mpmath.quad(functools.partial(integrand, x=x), [-8, x, 8])
        got = reference(find("sau").graph, {"x": torch.tensor(x, dtype=torch.float64)}, {"a": a, "b": b})
        assert float(got) == pytest.approx(float(want), rel=1e-9)


# ------------------------------------------------------------------------------------------------- the
# reference

NO_NAN = {"step", "sign", "rsign", "box"}  # steps: a NaN is on one side or the other
RANDOM_POLE = {"softsign_rrelu"}  # has a pole at -1, as published


@names(OF_X)
def test_finite_value_and_gradient(activation):
    a = activation
    x = OFF_GRID.clone().requires_grad_()
    leaves = {
        p.name: [torch.tensor(v, dtype=x.dtype, requires_grad=True) for v in p.default]
        if isinstance(p.default, tuple)
        else torch.tensor(float(p.default), dtype=x.dtype, requires_grad=True)
        for p in a.parameters.values()
    }
    y = reference(a.eval_graph, {"x": x}, leaves)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y, reference(a.eval_graph, {"x": x}, a.defaults()), rtol=1e-12, atol=1e-13)
    if y.requires_grad:
        flat = [t for v in leaves.values() for t in (v if isinstance(v, list) else [v])]
        g, *rest = torch.autograd.grad(y.sum(), [x, *flat], allow_unused=True)
        if g is not None:
            assert torch.isfinite(g).all()
            if not any(isinstance(n, Call) and n.op == "ste" for n in a.graph.walk()):
                step = 1e-6
                ahead, behind = (
                    reference(a.eval_graph, {"x": OFF_GRID + s}, a.defaults()) for s in (step, -step)
                )
                torch.testing.assert_close(g, (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-4)
        exception = {"puaf"}  # x**a for negative x: no function of a
        assert a.name in exception or all(torch.isfinite(r) for r in rest if r is not None)
    nan = reference(a.eval_graph, {"x": torch.tensor(math.nan, dtype=x.dtype)}, a.defaults())
    assert torch.isnan(nan).item() == (a.name not in NO_NAN)


@names(OF_X)
def test_finite_at_round_numbers(activation):
    """Kinks and joints lie at round numbers."""
    a = activation
    x = torch.arange(-16, 17, dtype=torch.float64) / 2
    x.requires_grad_()
    y = reference(a.eval_graph, {"x": x}, a.defaults())
    inside = (x != -1) if a.name in RANDOM_POLE else torch.ones_like(x, dtype=torch.bool)
    assert torch.isfinite(y[inside]).all()
    if y.requires_grad:
        g = torch.autograd.grad(y.sum(), x)[0][inside]
        smooth = x[inside] != 0 if a.name == "frac_prelu" else torch.ones_like(g, dtype=torch.bool)
        assert torch.isfinite(g[smooth]).all()


@names(WITH_FORMULA)
def test_source_runs(activation):
    a = activation
    text = source(a.name, a.eval_graph, a.inputs, a.defaults())
    namespace: dict[str, Any] = {"torch": torch, "F": F, "math": math}
    exec(text, namespace)
    inputs = {n: GRID.roll(31 * i) for i, n in enumerate(a.inputs)}
    want = reference(a.eval_graph, inputs, a.defaults())
    got = namespace[a.name](**inputs)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, check_dtype=False, equal_nan=True)


# ------------------------------------------------------------------------------------------------- kernels,
# in C++


class Native:
    """The generated functors, compiled against the plain primitives of catalogue_primitives.h."""

    def __init__(self, path: Path) -> None:
        self.run_kernel = ctypes.CDLL(str(path)).run_kernel

    def __call__(self, kernel, inputs, slots, *, by: int = 0, seed: int = -1):
        flat: list[float] = []
        offset, size = [], []
        for s in slots:
            values = list(s) if isinstance(s, (list, tuple)) else [s]
            offset.append(len(flat))
            size.append(len(values))
            flat += values
        arrays = [np.ascontiguousarray(x, dtype=np.float64) for x in inputs]
        doubles, ints = ctypes.POINTER(ctypes.c_double), ctypes.POINTER(ctypes.c_int)
        pointers = (doubles * len(arrays))(*(x.ctypes.data_as(doubles) for x in arrays))
        packed = [np.array(flat or [0.0]), np.array(offset or [0], np.int32), np.array(size or [0], np.int32)]
        f, d = np.empty(len(arrays[0])), np.empty(len(arrays[0]))
        status = self.run_kernel(
            kernel.id,
            pointers,
            len(f),
            packed[0].ctypes.data_as(doubles),
            packed[1].ctypes.data_as(ints),
            packed[2].ctypes.data_as(ints),
            by,
            seed,
            f.ctypes.data_as(doubles),
            d.ctypes.data_as(doubles),
        )
        assert status == 0, f"no kernel {kernel.name}"
        assert not (d == -12345.0).any(), "the dual number's value is not the function's"
        return f, d


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Native:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("functors")
    write(folder, 1)
    library = folder / "functors.so"
    done = subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O0",
            "-fPIC",
            "-shared",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{folder}",
            f"-I{TESTS}",
            f"-I{TESTS.parent / 'csrc'}",
            '-DTORCHLIN_ALL_SHARDS="shard_00.inc"',
            str(TESTS / "catalogue_functors.cpp"),
            "-o",
            str(library),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:4000]
    return Native(library)


def slot_values(activation: Activation, values: dict[str, Any], training: bool = False) -> list[Any]:
    chosen = plan(activation.name, training)
    assert chosen is not None
    return [evaluate(s, values) for s in chosen.slots]


def evaluate_plan(activation: Activation, x: torch.Tensor, values: dict[str, Any]) -> torch.Tensor:
    """The kernel's body in torch: what the C++ computes."""
    from torchlin.catalogue.kernels import with_named_slots

    kernel = plan(activation.name, False).kernel
    slots = {f"p{i}": v for i, v in enumerate(slot_values(activation, values))}
    return reference(with_named_slots(kernel.body), dict.fromkeys(kernel.inputs, x), slots)


@names(WITH_FORMULA)
@pytest.mark.parametrize("other", [False, True], ids=["defaults", "other parameters"])
def test_functors_equal_the_reference(activation, other, native):
    """Value and derivative by every input in float64, in training too, with the noise as an input."""
    a = activation
    values = perturbed(a) if other else a.defaults()
    for training in (False, True) if a.noises else (False,):
        graph = a.graph if training else a.eval_graph
        kernel = plan(a.name, training).kernel
        inputs = {n: OFF_GRID.roll(311 * i) for i, n in enumerate(kernel.inputs)}
        vectors = {
            n.name: [1.0 + 0.001 * i for i in range(len(values[n.like]))] for n in a.noises.values() if n.like
        }
        slots = [evaluate(s, {**values, **vectors}) for s in plan(a.name, training).slots]
        leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
        if a.name == "noisy_relu" and training:
            leaves["n"] = torch.ones_like(leaves["n"], requires_grad=True)
        y = reference(graph, leaves, {**values, **vectors})
        f, _ = native(kernel, [t.detach().numpy() for t in leaves.values()], slots)
        torch.testing.assert_close(torch.from_numpy(f), y.detach(), rtol=1e-12, atol=1e-12)
        for by, leaf in enumerate(leaves.values()):
            g = (
                torch.autograd.grad(y.sum(), leaf, retain_graph=True, allow_unused=True)[0]
                if y.requires_grad
                else None
            )
            _, d = native(kernel, [t.detach().numpy() for t in leaves.values()], slots, by=by)
            want = torch.zeros_like(leaf) if g is None else g
            torch.testing.assert_close(torch.from_numpy(d), want, rtol=1e-9, atol=1e-11)


@names([a for a in OF_X if a.parameters])
def test_derivatives_by_parameters_through_slots(activation, native):
    """Kernel derivatives by slots, and autograd through the slots' expressions, give those by parameters."""
    from torchlin.catalogue.torch_code import _FUNCTIONS

    a = activation
    chosen = plan(a.name, False)
    x = OFF_GRID[::7]
    values = perturbed(a)
    leaves = {
        k: [torch.tensor(e, dtype=x.dtype, requires_grad=True) for e in v]
        if isinstance(v, tuple)
        else torch.tensor(v, dtype=x.dtype, requires_grad=True)
        for k, v in values.items()
    }
    flat = [t for v in leaves.values() for t in (v if isinstance(v, list) else [v])]
    y = reference(a.eval_graph, {"x": x}, leaves)
    want = torch.autograd.grad(y.sum(), flat, allow_unused=True) if y.requires_grad else [None] * len(flat)
    slots = [evaluate(s, leaves, _FUNCTIONS) for s in chosen.slots]
    elements = [e for s in slots for e in (s if isinstance(s, list) else [s])]
    numbers = slot_values(a, values)
    total = torch.zeros((), dtype=x.dtype)
    for seed, element in enumerate(elements):
        _, d = native(chosen.kernel, [x.numpy()], numbers, by=-1, seed=seed)
        if isinstance(element, torch.Tensor) and element.requires_grad:
            total = total + float(d.sum()) * element
    got = torch.autograd.grad(total, flat, allow_unused=True) if total.requires_grad else [None] * len(flat)
    for g, h in zip(got, want, strict=True):
        g, h = (torch.zeros(()).to(x) if v is None else v for v in (g, h))
        if a.name in ("puaf",):  # x**a for negative x
            continue
        torch.testing.assert_close(g, h, rtol=1e-8, atol=1e-8)


# Differences of nearly equal numbers that are in the function itself; in float64 the error stays below this.
CANCELS = {
    name: 1e-15
    for name in [
        "hcaf",
        "ccaf",
        "pwlu",
        "era",
        "pau",
        "rational_b",
        "rpau",
        "opau",
        "tanhshrink",
        "pdelu",
        "spocu",
        "sinp",
        "sinc",
        "ssu",
        "dsu",
        "pssilu",
        "aptx",
        "parametric_softplus",
        "softplusplus",
        "uaf",
        "elu_plus",
        "signrelu_plus",
        "softshrink_plus",
        "pan_plus",
        "brelu_plus",
        "srelu_plus",
        "hardtanh_plus",
        "hardshrink_plus",
        "tsaf_plus",
        "apl",
        "saaaf",
    ]
} | {
    "brelu_plus": 1e-14,
    "tsaf_plus": 2e-14,
    "elu_plus": 2e-12,
    "hcaf": 1e-14,
    "kaf": 1e-14,
    "gabor_real": 1e-15,
}
SMALLEST = 1e-300  # what underflows may be 0


def high_precision() -> dict[str, Any]:
    one = lambda f: lambda u: f(mpmath.mpmathify(u))  # noqa: E731
    functions: dict[str, Any] = dict(HOST)
    for name in [
        "sqrt",
        "exp",
        "expm1",
        "log",
        "log1p",
        "tanh",
        "erf",
        "erfc",
        "sin",
        "cos",
        "atan",
        "sinh",
        "cosh",
        "asinh",
        "sech",
        "gamma",
    ]:
        functions[name] = one(getattr(mpmath, name))
    functions |= {
        "div": lambda u, v: mpmath.mpmathify(u) / v if v else mpmath.nan,
        "pow": lambda u, v: mpmath.power(mpmath.mpmathify(u), v),
        "sign": mpmath.sign,
        "hypot": mpmath.hypot,
        "sigmoid": lambda u: 1 / (1 + mpmath.exp(-u)),
        "softplus": lambda u: mpmath.log1p(mpmath.exp(u)),
        "sinc": lambda u: mpmath.sin(u) / u if u else mpmath.mpf(1),
    }
    return functions


@names(OF_X)
def test_functors_against_high_precision(activation, native):
    """The formula as written, with many digits, against the rewritten kernel in float64: relative error."""
    a = activation
    sizes = [1e-6, 1e-3, 0.1, 0.3, 0.7, 1.1, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0, 40.0]
    points = np.array([-s for s in reversed(sizes)] + sizes)
    got, _ = native(plan(a.name, False).kernel, [points], slot_values(a, a.defaults()))
    functions = high_precision()
    for x, y in zip(points, got, strict=True):
        for digits in (60, 320):  # the second for tails: 1 + erf(-28) = 1e-342
            with mpmath.workdps(digits):
                values = {
                    k: [mpmath.mpf(e) for e in v] if isinstance(v, tuple) else mpmath.mpf(v)
                    for k, v in a.defaults().items()
                }
                want = evaluate(a.eval_graph, {**values, "x": mpmath.mpf(float(x))}, functions)
                error = abs(mpmath.mpf(float(y)) - want)
                cancels = CANCELS.get(a.name, 0.0) * max(1.0, abs(x))
                allowed = 2e-14 * max(1.0, abs(x)) * abs(want) + max(cancels, SMALLEST)
                if error <= allowed:
                    break
        assert error <= allowed, f"f({x:g}) = {y:.17g}, not {mpmath.nstr(want, 17)}"


# Where the kernel and the reference part for huge arguments. First what the rewrites gain: the reference
# overflows or cancels.
GAINS_VALUE = set(
    [
        "pflu",
        "fpflu",
        "squareplus",
        "squareplus_msrf",
        "step_plus",
        "melu_component_plus",
        "elu_plus",
        "swish_plus",
        "logish_plus",
        "signrelu_plus",
        "exponential_swish",
        "hyst_af",
    ]
)
GAINS_DERIVATIVE = GAINS_VALUE | set(
    ["rmaf", "sara", "aria", "richards_sigmoid", "eis3", "aranda_ordaz", "agumb", "noisy_relu", "gelu_10"]
)
# then what the derivative of a product gives at infinity: inf*0. Never for a finite argument.
NAN_AT_INFINITY = set(
    [
        "polyrelu",
        "hardswish",
        "hardswish_beta",
        "hardmish",
        "sqreu",
        "hard_elish",
        "hard_srelue",
        "sqrt_af",
        "ssaf",
        "generalized_swish",
        "gish",
        "loglogish",
        "expexpish",
        "tanhexp",
        "erfact",
        "tanhsoft2",
    ]
)
OVERFLOWS = {"etanh"}  # exp(x) times a function: the derivative is inf - inf beyond 700


@names(OF_X)
def test_large_arguments(activation, native):
    a = activation
    x = torch.tensor(
        [-math.inf, -1e4, -300, -100, 100, 300, 1e4, math.inf], dtype=torch.float64, requires_grad=True
    )
    y = reference(a.eval_graph, {"x": x}, a.defaults())
    g = torch.autograd.grad(y.sum(), x)[0] if y.requires_grad else torch.zeros_like(x)
    f, d = map(
        torch.from_numpy,
        native(plan(a.name, False).kernel, [x.detach().numpy()], slot_values(a, a.defaults())),
    )
    finite = torch.isfinite(x)
    if a.name in GAINS_VALUE:
        assert torch.isfinite(f[finite]).all()
    else:
        torch.testing.assert_close(f, y.detach(), rtol=1e-11, atol=1e-13, equal_nan=True)
    if a.name in GAINS_DERIVATIVE:
        assert torch.isfinite(d[finite]).all()
    elif a.name not in OVERFLOWS:
        part = finite if a.name in NAN_AT_INFINITY else torch.ones_like(finite)
        torch.testing.assert_close(d[part], g[part], rtol=1e-9, atol=1e-11, equal_nan=True)
    nan, _ = native(plan(a.name, False).kernel, [np.array([math.nan])], slot_values(a, a.defaults()))
    assert math.isnan(nan[0]) == (a.name not in NO_NAN | {"hyst_af"})


# ------------------------------------------------------------------------------------------------ generated
# code


def test_kernel_table():
    table = kernels()
    assert len({k.id for k in table.values()}) == len(table)
    for name, k in table.items():
        assert k.name == name
        used = {p.index for p in k.body.walk() if isinstance(p, Slot)}
        assert used == set(range(len(k.vector_slots))), name
    for a in WITH_FORMULA:
        for training in (True, False):
            chosen = plan(a.name, training)
            assert chosen.kernel is table[chosen.kernel.name]
            assert len(chosen.slots) == len(chosen.kernel.vector_slots)
    assert plan("softmax") is None
    assert plan("celu").kernel is plan("mpelu").kernel
    assert plan("rt_relu", training=False).kernel is plan("relu").kernel
    assert plan("rrelu", training=False).kernel is plan("leaky_relu").kernel
    assert plan("mish").kernel.id == kernels()["mish"].id


IN_REDUCTIONS_H = {"slot", "element", "sum", "polynomial", "chebyshev", "legendre", "hermite"}


def test_functors_use_only_what_the_list_has():
    import re

    for k in kernels().values():
        used = set(re.findall(r"tl::(\w+)", functor(k)))
        assert used <= {*CPP_PRIMITIVES, "lit", *IN_REDUCTIONS_H}, k.name
        ops = {p.op for p in k.body.walk() if isinstance(p, Call)}
        assert "gamma" not in ops, "gamma is for the host"


def test_shards_are_complete_balanced_and_stable(tmp_path):
    groups = shards(12)
    assert sorted(k.name for g in groups for k in g) == sorted(kernels())
    loads = [sum(map(cost, g)) for g in groups]
    assert max(loads) < 1.1 * min(loads)
    assert [[k.name for k in g] for g in shards(12)] == [[k.name for k in g] for g in groups]
    files = write(tmp_path, 4)
    assert [f.name for f in files] == [
        "shard_00.inc",
        "shard_01.inc",
        "shard_02.inc",
        "shard_03.inc",
        "kernels.inc",
    ]
    before = {f: (f.stat().st_mtime_ns, f.read_text()) for f in files}
    write(tmp_path, 4)
    assert {f: (f.stat().st_mtime_ns, f.read_text()) for f in files} == before, "rewritten without need"
    assert str(tmp_path) not in "".join(text for _, text in before.values())


def test_the_generator_needs_no_torch(tmp_path):
    """The build runs it before anything is built, from the source tree alone."""
    folder = Path(package.__file__).parent.parent
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None\n"
        f"sys.path.insert(0, {str(folder)!r})\n"
        "from catalogue.cpp_code import write\n"
        f"print(len(write({str(tmp_path)!r}, 3)))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "4"
    again = tmp_path / "again"
    write(again, 3)
    for file in again.iterdir():  # another process, another hash seed: the same bytes
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def test_inis_are_packaged():
    folder = Path(package.__file__).parent
    assert len(list(folder.glob("*.ini"))) >= 15
    for path in folder.glob("*.ini"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# ")
        assert "\t" not in text
