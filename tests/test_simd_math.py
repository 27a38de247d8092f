"""csrc/simd/math.h and dual.h at every CPU level of this machine: accuracy, special values, derivatives; and
the catalogue's functors made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "tests" / "native"
FLAGS = ["-O2", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]

# The functions in float64, to a unit or two of its last place.


def _torch(f: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: f(torch.from_numpy(x)).numpy()


def _sigmoid(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, e) / (1.0 + e)


def _sech(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return 2.0 * e / (1.0 + e * e)


def _tanh_softplus(x: np.ndarray) -> np.ndarray:
    e = np.exp(np.minimum(x, 40.0))
    return e * (e + 2.0) / (e * (e + 2.0) + 2.0)


def _sinc(x: np.ndarray) -> np.ndarray:
    return np.where(x == 0, 1.0, np.sin(x) / np.where(x == 0, 1.0, x))


def _sinc_slope(x: np.ndarray) -> np.ndarray:
    z = x * x
    series = -x / 3 * (1 - z / 10 * (1 - z / 28 * (1 - z / 54 * (1 - z / 88 * (1 - z / 130)))))
    return np.where(np.abs(x) < 0.5, series, (np.cos(x) - _sinc(x)) / np.where(x == 0, 1.0, x))


def _normal(x: np.ndarray) -> np.ndarray:
    return 0.5 * torch.erfc(torch.from_numpy(-x) * math.sqrt(0.5)).numpy()


TWO_OVER_ROOT_PI = 2.0 / math.sqrt(math.pi)
# value, derivative, and the units in the last place allowed to the value
FUNCTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], float]] = {
    "exp": (np.exp, np.exp, 2),
    "expm1": (np.expm1, np.exp, 2),
    "log": (np.log, lambda x: 1 / x, 2),
    "log1p": (np.log1p, lambda x: 1 / (1 + x), 2),
    "tanh": (np.tanh, lambda x: _sech(x) ** 2, 2.6),
    "sigmoid": (_sigmoid, lambda x: _sigmoid(x) * _sigmoid(-x), 2.8),
    "softplus": (lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))), _sigmoid, 4),
    "erf": (_torch(torch.erf), lambda x: TWO_OVER_ROOT_PI * np.exp(-x * x), 2.3),
    "erfc": (_torch(torch.erfc), lambda x: -TWO_OVER_ROOT_PI * np.exp(-x * x), 3.8),
    "ndtr": (_normal, lambda x: np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi), 3.6),
    "sin": (np.sin, np.cos, 4),
    "cos": (np.cos, lambda x: -np.sin(x), 4),
    "sinc": (_sinc, _sinc_slope, 4),
    "atan": (np.arctan, lambda x: 1 / (1 + x * x), 2),
    "sinh": (np.sinh, np.cosh, 4),
    "cosh": (np.cosh, np.sinh, 4),
    "asinh": (np.arcsinh, lambda x: 1 / np.hypot(1.0, x), 4),
    "sech": (_sech, lambda x: -_sech(x) * np.tanh(x), 4),
    "sqrt": (np.sqrt, lambda x: 0.5 / np.sqrt(x), 0.5),
    "tanh_softplus": (_tanh_softplus, lambda x: _sech(np.logaddexp(0, x)) ** 2 * _sigmoid(x), 4),
    "log1p_sigmoid": (
        lambda x: np.log1p(_sigmoid(x)),
        lambda x: _sigmoid(x) * _sigmoid(-x) / (1 + _sigmoid(x)),
        4,
    ),
}


@pytest.fixture(scope="module")
def math_module(build_folder: Path) -> ModuleType:
    return _load(build_folder, "simd_math", [NATIVE / "simd_math.cpp"])


def _load(build_folder: Path, name: str, sources: list[Path], *more: str) -> ModuleType:
    import pybind11
    from torch.utils import cpp_extension

    build = build_folder / name
    build.mkdir(exist_ok=True)
    return cpp_extension.load(
        name=f"torchlin_{name}",
        sources=[str(s) for s in sources],
        extra_include_paths=[str(ROOT / "csrc"), str(NATIVE), str(build), pybind11.get_include()],
        extra_cflags=[*FLAGS, *(more or ["-DTORCHLIN_TEST_FUNCTORS=0"])],
        build_directory=str(build),
    )


def levels(module: ModuleType) -> list[str]:
    return module.levels()


def call(module: ModuleType, level: str, name: str, *inputs: np.ndarray, slots: Any = ()) -> Any:
    run = module.run_float if inputs[0].dtype == np.float32 else module.run_double
    values: list[float] = []
    offset, size = [], []
    for s in slots:
        flat = list(s) if isinstance(s, (list, tuple)) else [s]
        offset.append(len(values))
        size.append(len(flat))
        values += flat
    inputs = tuple(np.broadcast_to(x, inputs[0].shape).copy() for x in inputs)
    f, d = run(level, name, inputs, values, offset, size)
    assert not (d == -12345.0).any(), f"{name}: the value of the dual number is not the function's"
    return f, d


def sweep() -> np.ndarray:
    """Every exponent and sign alike, then the range where activations live."""
    bits = np.arange(0, 1 << 32, 6151, dtype=np.uint64).astype(np.uint32).view(np.float32)
    return np.concatenate([bits, np.linspace(-110, 110, 200_003, dtype=np.float32), near_one()])


def near_one() -> np.ndarray:
    return (1 + np.linspace(-0.7, 1.2, 100_003)).astype(np.float32)


def ulps(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """The error in units in the last place of a float of the right value; NaN and infinity must agree."""
    with np.errstate(over="ignore"):
        rounded = want.astype(np.float32)
    unit = np.spacing(np.minimum(np.abs(rounded), np.float32(3e38))).astype(np.float64)
    unit = np.maximum(unit, 2.0**-149)
    with np.errstate(invalid="ignore"):
        error = np.abs(got.astype(np.float64) - want) / unit
    agree = (np.isnan(got) & np.isnan(want)) | (got == rounded)
    # below the smallest normal number a result may be 0: the processor takes a hundred times longer for it
    error = np.where((got == 0) & (np.abs(want) < 2.0**-126), 0.0, error)
    # at the edge of the range one may round to infinity and the other not
    edge = np.isinf(got) & (np.abs(want) > 3.4028e38)
    error = np.where(np.isfinite(error), error, np.where(agree, 0.0, np.inf))
    return np.where(edge & ~agree, 1.0, error)


def largest(x: np.ndarray, error: np.ndarray) -> str:
    i = int(error.argmax())
    return f"{error[i]:.2f} ulp at {x[i]!r}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float_values(name, math_module):
    value, _, allowed = FUNCTIONS[name]
    x = sweep()
    with np.errstate(all="ignore"):
        want = value(x.astype(np.float64))
    for level in levels(math_module):
        got, _ = call(math_module, level, name, x)
        error = ulps(got, want)
        assert error.max() <= allowed, f"{level}: {largest(x, error)}"
        zero = (want == 0) & (x == 0)
        assert (np.signbit(got[zero]) == np.signbit(want[zero])).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float_derivatives(name, math_module):
    value, slope, _ = FUNCTIONS[name]
    x = sweep()
    with np.errstate(all="ignore"):
        want = slope(x.astype(np.float64))
        finite = np.isfinite(value(x.astype(np.float64))) & np.isfinite(want) & (np.abs(want) < 3.4e38)
    # (cos x - sinc x)/x is small by cancellation where the two agree
    scale = np.abs(want) + (1 / (1 + np.abs(x)) if name == "sinc" else 0)
    for level in levels(math_module):
        _, d = call(math_module, level, name, x)
        error = np.abs(d.astype(np.float64) - want)[finite] / (scale[finite] * 2.0**-23 + 1e-37)
        assert error.max() <= 5, f"{level}: {largest(x[finite], error)}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_double(name, math_module):
    value, slope, _ = FUNCTIONS[name]
    x = np.concatenate([np.linspace(-30, 30, 3001), np.linspace(-0.7, 1.2, 500), [1e-200, -1e-9, 300.0]])
    with np.errstate(all="ignore"):
        want, d_want = value(x), slope(x)
    for level in levels(math_module):
        got, d = call(math_module, level, name, x)
        np.testing.assert_allclose(got, want, rtol=1e-14, atol=1e-300)
        defined = np.isfinite(want)
        np.testing.assert_allclose(
            d[defined], d_want[defined], rtol=1e-12, atol=1e-13 if name == "sinc" else 1e-140
        )


def test_the_oracle_itself():
    """float64 against many digits, at a few points of each function."""
    precise = {
        name: getattr(mpmath, name) for name in ("exp", "expm1", "log", "log1p", "tanh", "erf", "erfc")
    } | {"ndtr": mpmath.ncdf}
    with mpmath.workdps(60):
        for name, f in precise.items():
            points = [0.003, 0.5, 0.96, 1.7, 4.2, 9.1]
            points = points if name.startswith("log") else [*points, *(-p for p in points)]
            for x, y in zip(points, FUNCTIONS[name][0](np.array(points)), strict=True):
                assert abs(f(mpmath.mpf(x)) - float(y)) <= (2e-14 if name == "ndtr" else 1e-15) * abs(
                    f(mpmath.mpf(x))
                )


def test_special_values(math_module):
    inf, nan = math.inf, math.nan
    table = {
        "exp": {-inf: 0.0, inf: inf, 0.0: 1.0, -104.0: 0.0, 89.0: inf},
        "expm1": {-inf: -1.0, inf: inf, -0.0: -0.0},
        "log": {-0.0: -inf, inf: inf, -1.0: nan, 1.0: 0.0},
        "log1p": {-1.0: -inf, -2.0: nan, inf: inf, -0.0: -0.0},
        "tanh": {-inf: -1.0, inf: 1.0, -0.0: -0.0},
        "sigmoid": {-inf: 0.0, inf: 1.0, 0.0: 0.5},
        "softplus": {-inf: 0.0, inf: inf},
        "erf": {-inf: -1.0, inf: 1.0, -0.0: -0.0},
        "erfc": {-inf: 2.0, inf: 0.0, 0.0: 1.0},
        "ndtr": {-inf: 0.0, inf: 1.0, 0.0: 0.5},
        "sin": {inf: nan, -0.0: -0.0},
        "cos": {-inf: nan, 0.0: 1.0},
        "sinc": {0.0: 1.0},
        "atan": {inf: math.pi / 2, -inf: -math.pi / 2, -0.0: -0.0},
        "sinh": {inf: inf, -inf: -inf, -0.0: -0.0},
        "cosh": {inf: inf, -inf: inf},
        "asinh": {inf: inf, -inf: -inf, -0.0: -0.0},
        "sech": {inf: 0.0, -inf: 0.0, 0.0: 1.0},
        "sqrt": {inf: inf, -1.0: nan, 0.0: 0.0},
        "tanh_softplus": {inf: 1.0, -inf: 0.0},
        "log1p_sigmoid": {inf: math.log(2.0), -inf: 0.0},
        "abs": {-inf: inf, -0.0: 0.0},
        "sign": {-inf: -1.0, inf: 1.0, 0.0: 0.0, nan: 0.0},
    }
    for level in levels(math_module):
        for dtype in (np.float32, np.float64):
            for name, row in table.items():
                if dtype == np.float64:
                    row = {x: y for x, y in row.items() if abs(x) not in (89.0, 104.0)}
                got, _ = call(math_module, level, name, np.array(list(row), dtype))
                want = np.array(list(row.values()), dtype)
                np.testing.assert_array_equal(got, want, err_msg=f"{level} {name}")
                assert (np.signbit(got) == np.signbit(want))[~np.isnan(want)].all(), f"{level} {name}"
                if name != "sign":
                    assert np.isnan(call(math_module, level, name, np.array([nan], dtype))[0]).all()
            saturated = np.array([-1e4, 1e4], dtype)
            for name in ("tanh", "sigmoid", "erf", "erfc", "ndtr", "tanh_softplus", "log1p_sigmoid", "sech"):
                assert (call(math_module, level, name, saturated)[1] == 0).all()


def test_two_arguments(math_module):
    rng = np.random.default_rng(0)
    inf, nan = math.inf, math.nan
    corner = [0.0, -0.0, 1.0, -1.0, 2.0, 3.0, -3.0, 0.5, -2.5, 1e-40, 1e38, -1e38, inf, -inf, nan]
    u, v = (g.ravel().astype(np.float32) for g in np.meshgrid(corner, corner))
    n = 200_000
    bits = rng.integers(0, 1 << 32, (2, n), dtype=np.uint64).astype(np.uint32).view(np.float32)
    base = np.exp(rng.uniform(-80, 80, n)).astype(np.float32)
    power = (rng.uniform(-100, 88, n) / np.log(base)).astype(np.float32)
    whole = rng.integers(-9, 10, n).astype(np.float32)
    wide = [np.concatenate([u, bits[0], base, -base]), np.concatenate([v, bits[1], power, whole])]
    exact = [a.astype(np.float64) for a in wide]
    with np.errstate(all="ignore"):
        powers = np.power(*exact)
        lengths = np.sqrt(exact[0] ** 2 + exact[1] ** 2)
    for level in levels(math_module):
        for name, want, allowed in (("pow", powers, 4), ("hypot", lengths, 2)):
            error = ulps(call(math_module, level, name, *wide)[0], want)
            assert error.max() <= allowed, (level, name, error.max(), *(w[error.argmax()] for w in wide))
        for name, f in (("max", np.maximum), ("min", np.minimum)):
            np.testing.assert_array_equal(call(math_module, level, name, u, v)[0], f(u, v))
            np.testing.assert_array_equal(call(math_module, level, name + "_of_constant", u, v)[0], f(u, v))


def test_derivatives_of_two_arguments(math_module):
    x = np.array([-2.0, 0.0, 0.5, 1.0, 3.0])
    one = np.ones_like(x)
    for dtype in (np.float32, np.float64):
        for level in levels(math_module):

            def slope(name: str, *inputs: Any, level: str = level, dtype: Any = dtype) -> list[float]:
                arrays = [np.broadcast_to(np.asarray(i, dtype), x.shape) for i in inputs]
                return call(math_module, level, name, *arrays)[1].tolist()

            assert slope("max_of_constant", x, 0 * x) == [0, 0, 1, 1, 1]  # relu'(0) = 0
            assert slope("max", x, 0 * x) == [0, 1, 1, 1, 1]
            assert slope("min", x, one) == [1, 1, 1, 1, 0]
            assert slope("min_of_constant", x, one) == [1, 1, 1, 0, 0]
            assert slope("clamp", x, 0 * x, one) == [0, 0, 1, 0, 0]  # as hardtanh at its bounds
            assert slope("abs", x) == [-1, 0, 1, 1, 1]
            assert slope("sign", x) == [0] * 5
            assert slope("where_gt", x, 0 * x, one) == [0, 0, 1, 2, 6]
            assert slope("ste", x, 3 * one) == [3] * 5
            assert slope("pow", x, 3 * one) == [12, 0, 0.75, 3, 27]
            assert slope("pow", x, 0 * x) == [0] * 5
            np.testing.assert_allclose(slope("hypot", x, one), x / np.hypot(1, x), rtol=1e-6)
            exponent = slope("pow_of_constant", x, 2 * one)
            np.testing.assert_allclose(exponent, 2**x * math.log(2), rtol=1e-6)
            assert slope("pow_of_constant", abs(x), 0 * x) == [0] * 5


def test_several_variables(math_module):
    """Derivatives by all arguments at once, against autograd."""
    rng = np.random.default_rng(0)
    numbers = rng.uniform(0.3, 3, (3, 1001)) * np.where(rng.random((3, 1001)) < 0.5, 1, -1)
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "max_of_two": torch.maximum,
        "min_of_two": torch.minimum,
        "hypot_of_two": torch.hypot,
        "pow_of_two": lambda x, y: torch.pow(x, y),
        "clamp_of_three": lambda x, y, z: torch.minimum(z, torch.maximum(y, x)),
        "where_of_three": lambda x, y, z: torch.where(x > y, x * y, -z),
        "arithmetic_of_three": lambda x, y, z: (x - y) / (y * z) + torch.tanh(x * z),
    }
    for name, function in functions.items():
        count = 3 if name.endswith("three") else 2
        exact = numbers[:count].astype(np.float32).astype(np.float64)
        if name == "pow_of_two":
            exact[0] = np.abs(exact[0])
        x = [torch.from_numpy(v).requires_grad_() for v in exact]
        y = function(*x)
        g = slopes(y, x)
        for level in levels(math_module):
            for dtype, tolerance in ((np.float32, 3e-6), (np.float64, 1e-12)):
                f, d = call(math_module, level, name, *exact.astype(dtype))
                np.testing.assert_allclose(
                    f, y.detach().numpy(), rtol=tolerance, atol=tolerance, err_msg=name
                )
                np.testing.assert_allclose(d, g, rtol=tolerance, atol=tolerance, err_msg=name)


# ------------------------------------------------------------------------------------- the catalogue


@pytest.fixture(scope="module")
def functor_module(math_module: ModuleType, build_folder: Path) -> tuple[ModuleType, str]:
    from torchlin.catalogue.cpp_code import write

    level = levels(math_module)[-1]
    folder = build_folder / "simd_functors"
    write(folder, 1)
    width = {"baseline": 16, "avx2": 32, "avx512": 64}[level]
    source = NATIVE / "simd_math.cpp"
    return _load(build_folder, folder.name, [source], "-O1", f"-DTORCHLIN_TEST_FUNCTORS={width}"), level


# The error in float relative to 1 + |f| (or 1 + |f'|). More where the formula multiplies what it rounded:
# sin(30 x), slopes of 1000.
TOLERANCE = 4e-6
STEEP = {"bipolar_plus": 1e-5, "sbaf": 4e-5, "siren": 5e-4, "finer": 2e-4}


def slopes(y: torch.Tensor, x: list[torch.Tensor]) -> list[np.ndarray]:
    if not y.requires_grad:
        return [np.zeros(v.shape) for v in x]
    return [g.numpy() for g in torch.autograd.grad(y.sum(), x, allow_unused=True, materialize_grads=True)]


def test_functors_of_the_catalogue(functor_module):
    """Every functor, in float, against the reference in float64 on [-8, 8]: value and derivatives by inputs."""
    from torchlin.catalogue import catalogue
    from torchlin.catalogue.formula import evaluate
    from torchlin.catalogue.kernels import plan, with_named_slots
    from torchlin.catalogue.torch_code import reference

    module, level = functor_module
    even = (np.linspace(-8, 8, 4001) + 0.00123).astype(np.float32)
    shuffled = np.random.default_rng(0).permuted(np.stack([even, even]), axis=1)
    wrong = []
    for a in catalogue().values():
        if a.graph is None:
            continue
        for training in (False, True) if a.noises else (False,):
            chosen = plan(a.name, training)
            names = chosen.kernel.inputs
            points = dict(zip(names, (even, *shuffled), strict=False))
            for noise in names[len(a.inputs) :]:
                points[noise] = np.abs(points[noise]) / 8
            x = {n: torch.from_numpy(v.astype(np.float64)).requires_grad_() for n, v in points.items()}
            values = a.defaults()
            values |= {n.name: [0.5] * len(values[n.like]) for n in a.noises.values() if n.like}
            slots = [evaluate(s, values) for s in chosen.slots]
            if training:  # by the kernel's own formula: its noise has another name than the catalogue's
                named = {f"p{i}": s for i, s in enumerate(slots)}
                y = reference(with_named_slots(chosen.kernel.body), x, named)
            else:
                y = reference(a.eval_graph, x, a.defaults())
            g = slopes(y, list(x.values()))
            f, d = call(module, level, f"K_{chosen.kernel.name}", *points.values(), slots=slots)
            for got, want in ((f, y.detach().numpy()), *zip(np.atleast_2d(d), g, strict=True)):
                error = np.abs(got - np.asarray(want)) / (1 + np.abs(want))
                worst = np.nan_to_num(error, nan=np.inf).argmax()
                if not error[worst] <= STEEP.get(a.name, TOLERANCE):
                    at = [v[worst] for v in points.values()]
                    wrong.append(f"{a.name}: {got[worst]!r} for {want[worst]!r} at {at}: {error[worst]:.1e}")
    assert not wrong, "\n".join(wrong)
