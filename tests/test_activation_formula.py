"""activation_from_formula: the function and its gradients, the compiler and the cache, bad and hostile input, the page."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
import pickle
import re
import stat
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchlin
from torchlin import _compile, _library, _nvrtc, catalogue, registry
from torchlin.catalogue import FormulaError, kernels
from torchlin.ops import activation as public
from torchlin.ops import activation_formula, activation_kernel
from torchlin.ops.activation import activation_reference
from torchlin.ops.activation_formula import FormulaActivation, activation_from_formula

PAGE = Path(__file__).resolve().parents[1] / "docs" / "add-an-activation.md"


def has_compiler() -> bool:
    try:
        _compile.find_compiler()
    except _compile.CompileError:
        return False
    return "_activation_load" in _library.ops()


needs_compiler = pytest.mark.skipif(
    not has_compiler(), reason="no C++ compiler, or torchlin without its CPU library"
)


@pytest.fixture(scope="session")
def cache(build_folder: Path) -> Path:
    """A cache of the tests' own, kept: what did not change is not compiled again."""
    return build_folder / "formula_cache"


@pytest.fixture(autouse=True)
def _own_names(own_registry: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Names end with their test."""
    monkeypatch.setenv("TORCHLIN_CACHE", str(cache))
    monkeypatch.setattr(catalogue, "_added", {})
    monkeypatch.setattr(activation_formula, "_defined", {})
    yield
    kernels.forget()
    public.forget()


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As in a new process of a new user; returns the cache folder, which is not there yet."""
    monkeypatch.setattr(kernels, "_loaded", {})
    monkeypatch.setenv("TORCHLIN_CACHE", str(tmp_path / "cache"))
    _compile._version.cache_clear()
    return tmp_path / "cache"


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# ---------------------------------------------------------------------------------------------------------- values

# formula, parameters, inputs, and the same in torch, of the inputs in order and then the parameters.
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], Any]] = {
    "one input": ("x*tanh(exp(x))*cos(x)", {}, ("x",), lambda x: x * torch.tanh(torch.exp(x)) * torch.cos(x)),
    "parameters": (
        "x*sigmoid(a*x) + b*sin(x)**2",
        {"a": 1.25, "b": 0.5},
        ("x",),
        lambda x, a, b: x * torch.sigmoid(a * x) + b * torch.sin(x) ** 2,
    ),
    "kinks": (
        "where(x > a, a*x**2, clamp(x, -2, 1)) + max(x, -1/2)*abs(x)",
        {"a": 0.75},
        ("x",),
        lambda x, a: torch.where(x > a, a * x**2, F.hardtanh(x, -2, 1)) + torch.clamp(x, min=-0.5) * x.abs(),
    ),
    "local definitions": (
        "t = exp(-x**2); u = t/(1 + t); x*u + t",
        {},
        ("x",),
        lambda x: x * torch.sigmoid(-(x**2)) + torch.exp(-(x**2)),
    ),
    "names that C++ has": (
        "int*erf(T) + p0*t0",
        {"T": 0.5, "p0": 2.0, "t0": 0.25},
        ("int",),
        lambda x, T, p0, t0: x * torch.erf(T) + p0 * t0,
    ),
    "two inputs": ("u*softplus(v) - u*v", {}, ("u", "v"), lambda u, v: u * F.softplus(v) - u * v),
    "two inputs and a parameter": (
        "u*sigmoid(k*v) + v",
        {"k": 1.5},
        ("u", "v"),
        lambda u, v, k: u * torch.sigmoid(k * v) + v,
    ),
    "sum": (
        "x + sum(c*sin(w*x))",
        {"c": [0.5, -0.25, 0.125], "w": [1.0, 2.0, 3.0]},
        ("x",),
        lambda x, c, w: x + sum(c[j] * torch.sin(w[j] * x) for j in range(3)),
    ),
    "poly": (
        "poly(c, tanh(x))*a",
        {"c": [0.0, 1.0, -0.5, 0.25], "a": 2.0},
        ("x",),
        lambda x, c, a: a * sum(c[j] * torch.tanh(x) ** j for j in range(4)),
    ),
}


def define(case: str, compile: bool | str = "auto") -> tuple[FormulaActivation, Any]:
    formula, parameters, inputs, torch_form = CASES[case]
    return activation_from_formula(formula, parameters=parameters, inputs=inputs, compile=compile), torch_form


def arguments(case: str, dtype: torch.dtype, size: int = 67) -> tuple[list[Tensor], dict[str, Tensor]]:
    _, parameters, inputs, _ = CASES[case]
    tensors = [(2 * torch.randn(3, size, dtype=torch.float64)).to(dtype).requires_grad_() for _ in inputs]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    values = {key: torch.tensor(value, dtype=wide).requires_grad_() for key, value in parameters.items()}
    return tensors, values


@pytest.mark.parametrize(
    "compile", [pytest.param(True, marks=needs_compiler), False], ids=["kernel", "reference"]
)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_torchs(case: str, compile: bool) -> None:
    f, torch_form = define(case, compile)
    if compile:
        assert f.kernel is not None
    tensors, values = arguments(case, torch.float64)
    y, expected = f(*tensors, **values), torch_form(*tensors, *values.values())
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(y)
    leaves = [*tensors, *values.values()]
    got = torch.autograd.grad(y, leaves, weights)
    wanted = torch.autograd.grad(expected, leaves, weights)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(f(*tensors), y, rtol=1e-12, atol=1e-12)  # the defaults are the same numbers


@needs_compiler
@pytest.mark.parametrize("case", ["parameters", "two inputs and a parameter", "sum", "poly"])
def test_transforms_of_kernels(case: str) -> None:
    f, _ = define(case, True)
    tensors, values = arguments(case, torch.float64, size=3)
    keys, count = list(values), len(tensors)

    def call(*leaves: Tensor) -> Tensor:
        return f(*leaves[:count], **dict(zip(keys, leaves[count:], strict=True)))

    assert torch.autograd.gradcheck(call, (*tensors, *values.values()))
    assert torch.autograd.gradgradcheck(call, (*tensors, *values.values()))
    (x, *_) = tensors
    batched = torch.vmap(lambda row: f(row, *(t[0] for t in tensors[1:])))(x)
    torch.testing.assert_close(batched, f(x, *(t[0].expand_as(x) for t in tensors[1:])))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["one input", "parameters", "two inputs", "sum"])
def test_kernel_rounds_once(case: str, dtype: torch.dtype) -> None:
    f, torch_form = define(case, True)
    tensors, values = arguments(case, dtype)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = torch_form(*wide, *(v.detach().double() for v in values.values()))
    y = f(*tensors, **values)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=eps, atol=4 * max(eps / 8, 2e-7))
    got = torch.autograd.grad(y.sum(), tensors)
    wanted = torch.autograd.grad(expected.sum(), wide)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=eps, atol=8 * max(eps / 8, 4e-7))


@needs_compiler
def test_compiled_kernel_is_that_of_the_build() -> None:
    """The same functor in the same template: the bits of a built-in kernel."""
    row = catalogue.find("tanhexp")
    plan = kernels.plan(row.name)
    assert plan is not None
    twin = kernels.Kernel("twin_of_tanhexp", plan.kernel.inputs, plan.kernel.body, ())
    activation_kernel.load(twin)
    raw = torch.ops.torchlin
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = (4 * torch.randn(1003)).to(dtype)
        assert torch.equal(raw._activation(x, twin.id), raw._activation(x, plan.kernel.id))
        grad = torch.randn_like(x)
        one, other = (
            raw._activation_bwd(grad, [x], k.id, None, [], 0, 0, 0, 1)[0] for k in (twin, plan.kernel)
        )
        assert torch.equal(one, other)


def test_formula_of_a_built_in_uses_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compile, "shared_library", None)  # would be a TypeError
    assert activation_from_formula("u*tanh(log(1 + exp(u)))", inputs=("u",), compile=False).kernel == "mish"
    assert activation_from_formula("a/(1 + exp(-a))*b", inputs=("a", "b"), compile=False).kernel == "swiglu"
    scaled = activation_from_formula("where(x > 0, x, k*x)", parameters={"k": 0.25}, compile=False)
    x = torch.randn(9)
    assert scaled.kernel is not None
    assert torch.equal(scaled(x), F.leaky_relu(x, 0.25))


# --------------------------------------------------------------------------------------------------- as the others


def test_name_works_as_one_of_the_catalogue() -> None:
    f = activation_from_formula(
        "x*tanh(exp(a*x)) + 0.1*x",
        "My-Own",
        parameters={"a": "0.5 learnable channel in (0, inf) by softplus"},
    )
    x = torch.randn(4, 3, 5)
    expected = x * torch.tanh(torch.exp(0.5 * x)) + 0.1 * x
    assert f.name == "my_own"
    for y in (
        f(x),
        torchlin.functional.activation(x, "my_own"),
        torchlin.functional.activation(x, "MY_OWN", a=0.5),
    ):
        torch.testing.assert_close(y, expected)
    with pytest.raises(ValueError, match=r"a of my_own must be in \(0, inf\), got -1"):
        f(x, a=-1.0)
    module = torchlin.create("activation", "my_own", num_parameters=3)
    assert {key: tuple(p.shape) for key, p in module.named_parameters()} == {"a": (3,)}
    torch.testing.assert_close(module(x), expected)
    module(x).sum().backward()
    assert module.a.grad.abs().min() > 0
    entry = torchlin.describe("activation", "my_own")
    assert "x*tanh(exp(a*x)) + 0.1*x" in entry.summary
    assert "a=0.5" in entry.signature
    assert "my_own" in torchlin.names("activation", "my*")
    assert f.parameters == {"a": 0.5}
    assert "my_own" in repr(f)


def test_learnable_parameter_trains() -> None:
    module = activation_from_formula(
        "x*sigmoid(b*x) + b", "trained", parameters={"b": "1 learnable"}
    ).module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    x = torch.randn(256)
    target = x * torch.sigmoid(3 * x) + 3
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(module(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-4 * losses[0]


def test_gated_unit() -> None:
    f = activation_from_formula("u*sigmoid(v)**2", "own_gate", inputs=("u", "v"))
    packed = torch.randn(4, 10)
    u, v = packed.chunk(2, -1)
    expected = u * torch.sigmoid(v) ** 2
    for y in (f(u, v), f(packed), f.module()(packed), torchlin.functional.gated_activation(u, v, "own_gate")):
        torch.testing.assert_close(y, expected)
    assert isinstance(torchlin.create("activation", "own_gate"), torchlin.nn.GatedActivation)
    with pytest.raises(TypeError, match="takes one tensor"):
        activation_from_formula("x*cos(x)*2", compile=False)(u, v)


def test_definition_is_idempotent_and_names_are_guarded() -> None:
    first = activation_from_formula("x*cos(x) - x", "twice", compile=False)
    assert activation_from_formula("x*cos(x) - x", "twice", compile=False).kernel == first.kernel
    with pytest.raises(
        ValueError, match=r"name: 'twice' is the formula 'x\*cos\(x\) - x' already; overwrite=True"
    ):
        activation_from_formula("x*cos(x) - 2*x", "twice")
    x = torch.randn(7)
    torchlin.functional.activation(x, "twice")
    second = activation_from_formula("x*cos(x) - 2*x", "twice", overwrite=True, compile=False)
    torch.testing.assert_close(second(x), x * x.cos() - 2 * x)
    torch.testing.assert_close(torchlin.functional.activation(x, "twice"), x * x.cos() - 2 * x)
    gated = activation_from_formula("u*cos(v)", "twice", inputs=("u", "v"), overwrite=True, compile=False)
    assert isinstance(gated.module(), torchlin.nn.GatedActivation)
    assert isinstance(torchlin.create("activation", "twice"), torchlin.nn.GatedActivation)


@pytest.mark.parametrize("name", ["mish", "Swish", "squared-relu"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_built_in_names_stay(name: str, overwrite: bool) -> None:
    before = torchlin.functional.activation(torch.ones(3), name)
    with pytest.raises(ValueError, match=r"name: .* is a name of the activation '.*' already"):
        activation_from_formula("2*x + cos(x)", name, overwrite=overwrite)
    assert torch.equal(torchlin.functional.activation(torch.ones(3), name), before)


def test_a_name_of_another_registered_thing_stays() -> None:
    registry.register("activation", "cube_of_mine", torch.nn.Identity)
    with pytest.raises(ValueError, match="cube_of_mine"):
        activation_from_formula("2*x + cos(x)", "cube_of_mine")
    assert registry.create("activation", "cube_of_mine").__class__ is torch.nn.Identity


@pytest.mark.parametrize("case", ["one input", "parameters", "sum"])
def test_torch_compile_and_export(case: str) -> None:
    f, _ = define(case)
    tensors, values = arguments(case, torch.float32)
    expected = f(*tensors, **values)

    def call(tensors: list[Tensor], values: dict[str, Tensor]) -> Tensor:
        return f(*tensors, **values)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(tensors, values)
    torch.testing.assert_close(compiled, expected)
    leaves = [*tensors, *values.values()]
    for a, b in zip(
        torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)
    module = f.module()
    x = tensors[0].detach()
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), module(x))
    if f.kernel is not None:
        assert "torchlin._activation" in exported.graph_module.code


def test_pickled_module_brings_its_formula_along(tmp_path: Path, cache: Path) -> None:
    f = activation_from_formula("x*erf(a*x) + 1", "carried", parameters={"a": "0.5 learnable"})
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 3), f.module(a=0.75), activation_from_formula("x - cos(x)").module()
    )
    assert copy.deepcopy(model)[1].name == "carried"
    assert pickle.loads(pickle.dumps(f)).formula == f.formula
    plain = activation_from_formula("x*erf(x) - 1", compile=False)
    assert pickle.loads(pickle.dumps(plain)).why_not == "compile=False"
    x = torch.randn(2, 3)
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    script = f"""
        import torch
        model, x, y = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        import torchlin
        torch.testing.assert_close(model(x), y)
        print(torchlin.describe("activation", "carried").summary, model[1].a.item())
    """
    done = run(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("carried: x*erf(a*x) + 1")
    assert done.stdout.split()[-1] == "0.75"


# -------------------------------------------------------------------------------------------- compiler and cache

FORMULA = "x*tanh(exp(x))*cos(x) - sin(x)"


@needs_compiler
def test_second_process_compiles_nothing(nothing_loaded: Path) -> None:
    script = f"""
        import torch
        from torchlin import _compile
        from torchlin.ops.activation_formula import activation_from_formula
        built = []
        write = _compile._write
        _compile._write = lambda *args: (built.append(1), write(*args))
        f = activation_from_formula({FORMULA!r}, compile=True)
        x = torch.linspace(-2, 2, 9)
        torch.testing.assert_close(f(x), x*torch.tanh(torch.exp(x))*torch.cos(x) - torch.sin(x))
        print(f.kernel, len(built))
    """
    first, second = run(script), run(script)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    kernel, built = first.stdout.split()
    assert (built, second.stdout.split()) == ("1", [kernel, "0"])
    (library,) = nothing_loaded.iterdir()  # and nothing else is left
    assert library.name.startswith(kernel)
    assert stat.S_IMODE(library.stat().st_mode) == 0o700
    assert stat.S_IMODE(nothing_loaded.stat().st_mode) == 0o700


@needs_compiler
def test_two_processes_at_once(nothing_loaded: Path) -> None:
    script = textwrap.dedent(f"""
        import sys, torch
        from torchlin.ops.activation_formula import activation_from_formula
        print("ready", flush=True)
        sys.stdin.readline()
        print(activation_from_formula({FORMULA!r}, compile=True)(torch.ones(1)).item())
    """)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", script], **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0] for process in both]
    assert said[0] == said[1] != ""
    assert [path.suffix for path in nothing_loaded.iterdir()] == [".so"]


VISIBLE = 'extern "C" __attribute__((visibility("default"))) int number()'
SOURCE = {"kernel.cpp": '#include "number.inc"', "number.inc": f"{VISIBLE} {{ return 4711; }}"}


@needs_compiler
@pytest.mark.parametrize("harm", ["cut", "altered", "foreign", "empty", "writable", "link"])
def test_spoilt_library_is_compiled_again(nothing_loaded: Path, harm: str) -> None:
    library = _compile.shared_library("number", SOURCE)
    content = library.read_bytes()
    if harm == "link":
        library.rename(nothing_loaded.parent / "elsewhere.so")
        library.symlink_to(nothing_loaded.parent / "elsewhere.so")
    elif harm == "writable":
        library.chmod(0o777)
    else:
        altered = bytearray(content)
        altered[len(content) // 2] ^= 1
        spoilt = {"cut": content[:-100], "altered": bytes(altered), "foreign": b"#!/bin/sh\n", "empty": b""}
        library.unlink()
        library.write_bytes(spoilt[harm])
    assert _compile.shared_library("number", SOURCE) == library
    assert not library.is_symlink()
    assert stat.S_IMODE(library.stat().st_mode) == 0o700
    assert ctypes.CDLL(str(library)).number() == 4711
    before = library.stat().st_ino
    _compile.shared_library("number", SOURCE)
    assert library.stat().st_ino == before  # what is intact stays


@needs_compiler
def test_key_has_all_that_matters(nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _compile.shared_library("number", SOURCE)
    keys = {first}
    for what, other in (
        ("_FLAGS", (*_compile._FLAGS, "-DOTHER")),
        ("headers_text", lambda: "edited"),
        ("_version", lambda compiler: "another compiler"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(_compile, what, other)
            keys.add(_compile.shared_library("number", SOURCE))
    keys.add(_compile.shared_library("number", {**SOURCE, "number.inc": f"{VISIBLE} {{ return 12; }}"}))
    assert len(keys) == 5
    assert _compile.shared_library("number", SOURCE) == first


def test_no_compiler(nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(nothing_loaded))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(
        RuntimeWarning, match="pure-torch reference: no C\\+\\+ compiler: none of c\\+\\+, g\\+\\+"
    ):
        f = activation_from_formula(FORMULA, "no_compiler")
    assert f.kernel is None
    assert "CXX is not set" in f.why_not
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    expected = x * torch.tanh(torch.exp(x)) * torch.cos(x) - torch.sin(x)
    torch.testing.assert_close(f(x), expected)
    assert torch.autograd.gradcheck(f, (x,))
    with pytest.raises(_compile.CompileError, match="no C\\+\\+ compiler"):
        activation_from_formula(FORMULA, "no_compiler", compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert activation_from_formula(FORMULA, "no_compiler", compile=False).why_not == "compile=False"


def test_no_cpu_library(nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "ops", list)
    for formula in (FORMULA, "x*tanh(softplus(x))"):
        with pytest.warns(
            RuntimeWarning, match="pure-torch reference: torchlin's CPU library has no activations"
        ):
            f = activation_from_formula(formula)
        assert f.kernel is None
        assert "CPU library" in f.why_not


@needs_compiler
def test_library_that_is_older_than_the_headers(
    nothing_loaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a source tree, between an edit and a build."""
    folder = tmp_path / "csrc"
    (folder / "simd").mkdir(parents=True)
    (folder / "simd" / "simd.h").touch()
    monkeypatch.setattr(_compile, "headers", lambda: folder)
    with pytest.raises(_compile.CompileError, match=r"simd.h is newer than _C.*so: build it first"):
        activation_from_formula(FORMULA, compile=True)


COMPILERS = {  # what follows `for --version`, and for a source
    "says no": (
        "exit 0",
        "echo 'kernel.cpp:1: a fault of mine' >&2; exit 3",
        "fails: kernel.cpp:1: a fault of mine",
    ),
    "writes nothing": ("exit 0", "exit 0", "fails: exit status 0"),
    "writes rubbish": ("exit 0", 'for last; do :; done; echo rubbish > "$last"', "does not load"),
    "has no version": ("exit 9", "exit 0", "--version fails: exit status 9"),
    "hangs": ("exit 0", "exec sleep 30", "took longer than 1 s"),
}


@pytest.mark.skipif("_activation_load" not in _library.ops(), reason="torchlin without its CPU library")
@pytest.mark.parametrize("case", COMPILERS)
def test_broken_compiler(
    nothing_loaded: Path, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, script, message = COMPILERS[case]
    compiler = tmp_path / "my c++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *--version) {version};; esac\n{script}\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", f"'{compiler}' -pipe")
    monkeypatch.setattr(_compile, "_TIMEOUT", 1.0)
    with pytest.raises(_compile.CompileError, match=re.escape(message)):
        activation_from_formula(FORMULA, compile=True)
    with pytest.warns(RuntimeWarning, match=re.escape(message)):
        f = activation_from_formula(FORMULA)
    assert f.kernel is None
    torch.testing.assert_close(f(torch.zeros(2)), torch.zeros(2))


def test_compiler_that_is_not_there(nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.warns(
        RuntimeWarning, match="CXX=no-such-compiler -O1: there is no program 'no-such-compiler'"
    ):
        activation_from_formula(FORMULA)


@needs_compiler
def test_cache_folder_that_others_can_write_to(nothing_loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode, message in ((0o777, "chmod go-w"), (0o770, "others can write to")):
        nothing_loaded.mkdir(exist_ok=True)
        nothing_loaded.chmod(mode)
        with pytest.raises(_compile.CompileError, match=message):
            activation_from_formula(FORMULA, compile=True)
    nothing_loaded.chmod(0o700)
    nothing_loaded.parent.chmod(0o777)  # may be renamed, and another put in its place
    with pytest.raises(_compile.CompileError, match="others can write to"):
        activation_from_formula(FORMULA, compile=True)
    nothing_loaded.parent.chmod(0o1777)
    assert activation_from_formula(FORMULA, compile=True).kernel is not None
    file = nothing_loaded.parent / "file"
    file.touch()
    monkeypatch.setattr(kernels, "_loaded", {})
    monkeypatch.setenv("TORCHLIN_CACHE", str(file))
    with pytest.raises(_compile.CompileError, match="cache folder"):
        activation_from_formula(FORMULA, compile=True)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHLIN_CACHE", str(tmp_path / "own"))
    assert _compile.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("TORCHLIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _compile.cache_folder() == tmp_path / "torchlin"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _compile.cache_folder().is_relative_to(tmp_path)


# ------------------------------------------------------------------------------------------------------------ CUDA


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRTC of this torch, or of a package beside a torch without CUDA."""
    for name in (f"libnvrtc.so.{torch.version.cuda and torch.version.cuda.split('.')[0]}", "libnvrtc.so.13"):
        with contextlib.suppress(_compile.CompileError):
            found = _nvrtc.load(name)
            monkeypatch.setattr(_nvrtc, "library", lambda found=found: found)
            return
    pytest.skip("no NVRTC")


@pytest.mark.parametrize("case", ["one input", "two inputs and a parameter", "sum"])
def test_nvrtc_compiles_the_kernels(nvrtc: None, case: str) -> None:
    """All that can be seen without a GPU: it is machine code for one, with these kernels."""
    f, _ = define(case, False)
    kernel = kernels.plan(f.name).kernel  # type: ignore[union-attr]
    code = activation_kernel._code(kernel, "sm_90")
    assert code.startswith(b"\x7fELF")
    names = set(re.findall(rb"\0\.text\.(torchlin_\w+)", code))
    slots = {b"torchlin_backward_slots"} if kernel.vector_slots else set()
    assert names == {b"torchlin_forward", b"torchlin_backward", *slots}


def test_nvrtc_says_what_is_wrong(nvrtc: None) -> None:
    with pytest.raises(_compile.CompileError, match=r"(?s)NVRTC fails: .*kernel.cu\(1\): error"):
        _nvrtc.compile({"kernel.cu": "not C++"}, [], "sm_90")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_cuda_kernels(case: str, dtype: torch.dtype) -> None:
    f, _ = define(case)
    tensors, values = arguments(case, dtype)
    there = [t.detach().cuda().requires_grad_() for t in tensors]
    values_there = {key: v.detach().cuda().requires_grad_() for key, v in values.items()}
    y, expected = f(*there, **values_there), f(*tensors, **values)
    assert "cuda" in kernels.devices(kernels.plan(f.name).kernel)  # type: ignore[union-attr]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.cpu(), expected, rtol=8 * eps, atol=8 * eps)
    got = torch.autograd.grad(y.sum(), [*there, *values_there.values()])
    wanted = torch.autograd.grad(expected.sum(), [*tensors, *values.values()])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=64 * eps, atol=64 * eps)


def test_gpus_of_one_kind_get_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, architecture in (
        ([(9, 0)], "sm_90"),
        ([(8, 9), (8, 6)], "sm_86"),
        ([(12, 0), (8, 0)], "compute_80"),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda capabilities=capabilities: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i, c=capabilities: c[i])
        assert activation_kernel._architecture() == architecture


# ------------------------------------------------------------------------------------------- bad and hostile input

BAD = [
    ("x*sigmoid(b*x)", {}, 10, r"unknown name 'b'.*the names here are pi, e, x"),
    ("x*sigmod(x)", {}, 2, "unknown function 'sigmod'; did you mean 'sigmoid'"),
    ("x*(1 + x", {}, 8, r"expected '\)' to close the parenthesis, got the end"),
    ("x > 0", {}, 0, "a comparison is a condition"),
    ("x +", {}, 3, "expected a number, a name"),
    ("", {}, 0, "expected a number, a name"),
    ("x*c", {"c": [1, 2]}, 0, "the result is a vector"),
    ("x + 1e999", {}, 4, "too large"),
    # what would be code elsewhere
    ('x"; system("reboot"); "', {}, 1, "unexpected character '\"'"),
    ("__import__('os').system('reboot')", {}, 11, 'unexpected character "\'"'),
    ("x.__class__", {}, 1, "unexpected character '.'"),
    ("x; } } extern int y", {}, 3, "unexpected character '}'"),
    ("x; int y", {}, 1, "expected an operator or the end"),
    ("x{0}", {}, 1, "unexpected character '{'"),
    ("x\\\n#include <x>", {}, 1, "unexpected character"),
    ("x /* */ + 1", {}, 3, "expected a number"),
    ("open(x)", {}, 0, "unknown function 'open'; the functions here are where, max"),
    ("x\0", {}, 1, "unexpected character"),
    ("х", {}, 0, "unexpected character"),  # a Cyrillic letter
    ("x*²", {}, 2, "unexpected character"),
    ("x" + "+x" * 3000, {}, 4000, "longer than 4000 characters"),
    ("(" * 500 + "x" + ")" * 500, {}, 60, "nested deeper than 60 levels"),
    ("-" * 900 + "x", {}, 60, "nested deeper than 60 levels"),
    (
        "; ".join(f"t{i + 1} = t{i}*t{i}" for i in range(40)).replace("t0", "x") + "; t40",
        {},
        0,
        "larger than 20000",
    ),
]


@pytest.mark.parametrize(
    ("formula", "parameters", "position", "message"), BAD, ids=[repr(b[0][:24]) for b in BAD]
)
def test_bad_formula_says_where(formula: str, parameters: Any, position: int, message: str) -> None:
    with pytest.raises(FormulaError, match=message) as caught:
        activation_from_formula(formula, parameters=parameters)
    if position or "larger" not in message:
        assert caught.value.position == position
        assert f"(at character {position})" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"formula": 3}, TypeError, "formula must be a str"),
        ({"compile": "yes"}, ValueError, "compile must be 'auto', True or False"),
        ({"name": "3x"}, ValueError, "name: '3x' is no name"),
        ({"name": "a b"}, ValueError, "name: 'a b' is no name"),
        ({"name": 'x"\n#include'}, ValueError, "is no name"),
        ({"name": "naïve"}, ValueError, "is no name"),
        ({"name": 3}, TypeError, "name must be a str or None"),
        ({"inputs": "x"}, TypeError, "inputs must be a sequence of names"),
        ({"inputs": ("x", "x")}, ValueError, "one name or two different ones"),
        ({"inputs": ()}, ValueError, "one name or two"),
        ({"inputs": ("x", "y", "z")}, ValueError, "one name or two"),
        ({"inputs": ("x", "y")}, ValueError, "inputs: 'y' does not occur"),
        ({"inputs": ("x, y",)}, ValueError, "inputs: 'x, y' is no name"),
        ({"inputs": ("exp",)}, ValueError, "inputs: 'exp' is a function already"),
        ({"parameters": {"a": 1}}, ValueError, "parameters: 'a' does not occur"),
        ({"parameters": {"x": 1}}, ValueError, "parameters: 'x' is one of the inputs"),
        ({"parameters": {"out": 1}}, ValueError, "parameters: 'out' is an argument of activation"),
        (
            {"parameters": {"learnable": 1}},
            ValueError,
            "parameters: 'learnable' is an argument of Activation",
        ),
        ({"parameters": {"a;b": 1}}, ValueError, "parameters: 'a;b' is no name"),
        ({"parameters": {"tanh": 1}}, ValueError, "parameters: 'tanh' is a function already"),
        ({"parameters": ["a"]}, TypeError, "parameters must be a mapping"),
        ({"parameters": {"a": True}}, TypeError, "parameters: 'a' must be a number"),
        ({"parameters": {"a": None}}, TypeError, "parameters: 'a' must be a number"),
        ({"parameters": {"a": []}}, TypeError, "parameters: 'a' must be a number"),
        ({"parameters": {"a": float("inf")}}, ValueError, "param a: .*outside of"),
        ({"parameters": {"a": "2 in (0, 1)"}}, ValueError, r"param a: the default 2 is outside of \(0, 1\)"),
        ({"parameters": {"a": "1 learn"}}, ValueError, "param a: must be of the form"),
        ({"parameters": {"a": "__import__('os')"}}, ValueError, "param a: must be of the form"),
        ({"parameters": {"a": "repeat(0, 100000000000)"}}, ValueError, r"is not repeat\(value, length\)"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    known = dict(catalogue._added)
    with pytest.raises(error, match=message):
        activation_from_formula(**{"formula": "x*2 + cos(x)", **arguments})
    assert catalogue._added == known


HOSTILE = {
    "long": "+".join(f"sin({i}*x)/{i}" for i in range(1, 270)),
    "deep": "sin(" * 25 + "x" + ")" * 25,
    "chain": "x" + "*x" * 1900,
    "grows when it is rewritten": "; ".join(f"t{i + 1} = sqrt(1 + t{i}**2) - 1" for i in range(60)).replace(
        "t0", "x"
    )
    + "; t60",
    "huge numbers": "x*1e308*1e308 + 1e-320 + 123456789012345678901234567890*x",
    "many parameters": "+".join(f"sin(a{i}*x)" for i in range(40)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_formula_compiles_or_says_why_not(case: str) -> None:
    """In bounded time: a warning and the reference where it would take too long."""
    formula = HOSTILE[case]
    parameters = {f"a{i}": 0.1 * i for i in range(40)} if case == "many parameters" else {}
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        f = activation_from_formula(formula, parameters=parameters)
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    y = f(x)
    torch.testing.assert_close(y, activation_reference(x, f.name), rtol=1e-9, atol=1e-9, equal_nan=True)
    if case in ("grows when it is rewritten", "many parameters"):
        assert f.kernel is None
        assert "more than" in f.why_not


@needs_compiler
def test_source_holds_nothing_of_the_users_text() -> None:
    """Numbers, and names of torchlin's own: whatever inputs and parameters are called."""
    from torchlin.catalogue.cpp_code import shard

    f = activation_from_formula(
        "secret_local = exp(-secret_in**2); secret_in*sin(secret_p*secret_in) + secret_local",
        "secret_name",
        parameters={"secret_p": 2.0},
        inputs=("secret_in",),
        compile=False,
    )
    assert "secret" not in shard([kernels.plan(f.name).kernel])  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------------- page


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_page_runs() -> None:
    """The Python blocks one after the other, as a reader would."""
    scope: dict[str, Any] = {}
    for block in blocks("python"):
        exec(block, scope)
    x = scope["x"]
    torch.testing.assert_close(scope["f"](x, a=0.2), x * torch.tanh(torch.exp(x)) - 0.2 * torch.sin(x))
    assert scope["z"].shape == (4, 8)


def test_page_section_is_one_of_the_catalogue() -> None:
    (section,) = blocks("ini")
    (row,) = catalogue.read(section)
    catalogue.add(row)  # a name that is free
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    y = torchlin.functional.activation(x, row.name, a=0.2)
    torch.testing.assert_close(y, x * torch.sigmoid(x) * torch.cos(0.2 * x))
    module = torchlin.nn.Activation(row.name, num_parameters=4)
    assert module.a.shape == (4,)


def test_page_has_all_keys_and_functions() -> None:
    from torchlin.catalogue import formula

    page = PAGE.read_text()
    cells = re.findall(r"^\| (`.*?`(?:, `.*?`)*) \|", page, re.MULTILINE)
    keys = {key.split()[0].strip("[]") for cell in cells for key in re.findall(r"`(.*?)`", cell)}
    assert catalogue._KEYS | {"param", "noise", "name"} <= keys
    language = page.split("## The language")[1]
    words = set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", " ".join(re.findall(r"`([^`]*)`", language))))
    assert set(formula.FUNCTIONS) <= words


def test_page_shows_a_real_error() -> None:
    (shown,) = blocks("text")
    with pytest.raises(FormulaError) as caught:
        activation_from_formula("x*tanh(y)", parameters={"a": 1})
    assert str(caught.value) == shown.rstrip("\n")
