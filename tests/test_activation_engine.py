"""The CPU kernels of activations through the raw ops: all of them against the reference in float64, then every way in which
memory, channels, packed halves, types and threads can be arranged, against the plainest arrangement, bit for bit."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchlin import _library
from torchlin.catalogue import catalogue
from torchlin.catalogue.cpp_code import shard
from torchlin.catalogue.formula import evaluate, parse
from torchlin.catalogue.kernels import Kernel, kernels, plan, with_named_slots
from torchlin.catalogue.rewrite import prepare
from torchlin.catalogue.torch_code import reference

if "_activation_fwd" not in _library.ops():
    pytest.skip("torchlin's compiled library is missing", allow_module_level=True)

raw: Any = torch.ops.torchlin
CSRC = Path(__file__).parent.parent / "csrc"
LEVELS = raw._cpu_isa_names().split(",")
SLOTS = 8  # the bit of `needs`


def default_slots() -> dict[str, tuple[Kernel, list[Any]]]:
    """Every kernel, with the slots of the first name that has it."""
    found: dict[str, tuple[Kernel, list[Any]]] = {}
    for training, a in itertools.product((True, False), catalogue().values()):
        if a.graph is None:
            continue
        chosen, values = plan(a.name, training), a.defaults()
        assert chosen is not None
        for noise in a.noises.values():
            if noise.like:
                values[noise.name] = tuple(1 + 0.001 * i for i in range(len(values[noise.like])))
        found.setdefault(chosen.kernel.name, (chosen.kernel, [evaluate(s, values) for s in chosen.slots]))
    return found


KERNELS = default_slots()


TWO_SLOTS = plan("mpelu").kernel.name  # type: ignore[union-attr]


def slots_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, list[int]]:
    values = KERNELS[name][1]
    rows = [v for s in values for v in (s if isinstance(s, list) else [s])]
    lengths = [len(s) if isinstance(s, list) else 1 for s in values]
    return (torch.tensor(rows, dtype=dtype)[:, None] if rows else None), lengths


def forward(
    name: str, inputs: list[Tensor], slots: Any = "default", dim: int = 0, split: tuple[int, int] = (0, 0)
) -> Tensor:
    compute = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    default, lengths = slots_of(name, compute)
    given = default if isinstance(slots, str) else slots
    return raw._activation_fwd(inputs, KERNELS[name][0].id, given, lengths, dim, *split)


def backward(
    name: str,
    grad: Tensor,
    inputs: list[Tensor],
    needs: int,
    slots: Any = "default",
    dim: int = 0,
    split: tuple[int, int] = (0, 0),
) -> list[Tensor]:
    compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
    default, lengths = slots_of(name, compute)
    given = default if isinstance(slots, str) else slots
    return raw._activation_bwd(grad, inputs, KERNELS[name][0].id, given, lengths, dim, *split, needs)


@pytest.fixture
def level(request):
    before = raw._cpu_isa()
    raw._set_cpu_isa(request.param)
    yield request.param
    raw._set_cpu_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )


# ------------------------------------------------------------------------------------------------------ every kernel

# What float32 cannot give at these points, by kernel: differences of nearly equal numbers, that is.
LOOSE = {"step_plus": 2e-3, "bipolar_plus": 3e-3, "sbaf": 1e-2}
# x**p for negative x is real where p is an integer; its derivative by p is not.
NO_SLOT_GRADIENT = {"puaf"}


@pytest.mark.parametrize("name", KERNELS)
def test_value_and_gradients(name):
    """At every level, in float32 and (values, all gradients) in float64."""
    kernel, _ = KERNELS[name]
    inputs = [random(403, seed=i) for i in range(len(kernel.inputs))]
    grad = random(403, seed=7, scale=1.0)
    slots, lengths = slots_of(name, torch.float64)
    leaves = [x.double().requires_grad_() for x in inputs]
    flat = [] if slots is None else [v.clone().requires_grad_() for v in slots[:, 0]]
    rows, given = iter(flat), {}
    for i, (length, vector) in enumerate(zip(lengths, kernel.vector_slots, strict=True)):
        values = list(itertools.islice(rows, length))
        given[f"p{i}"] = values if vector else values[0]
    y = reference(with_named_slots(kernel.body), dict(zip(kernel.inputs, leaves, strict=True)), given)
    found = (
        torch.autograd.grad((y * grad.double()).sum(), leaves + flat, allow_unused=True)
        if y.requires_grad
        else []
    )
    found = [
        torch.zeros_like(t) if g is None else g
        for g, t in zip(found or [None] * 99, leaves + flat, strict=False)
    ]
    wanted = [y.detach(), *found[: len(leaves)]]
    by_slots = torch.stack(found[len(leaves) :])[:, None] if flat else None
    every = (1 << len(inputs)) - 1

    before = raw._cpu_isa()
    try:
        for dtype, level_name in [*((torch.float32, each) for each in LEVELS), (torch.float64, LEVELS[-1])]:
            raw._set_cpu_isa(level_name)
            rtol = 1e-9 if dtype == torch.float64 else LOOSE.get(name, 2e-5)
            xs, g = [x.to(dtype) for x in inputs], grad.to(dtype)
            got = [forward(name, xs), *backward(name, g, xs, every)]
            for a, b in zip(got, wanted, strict=True):
                assert_near(a, b, rtol, f"{name} {level_name}")
            if by_slots is not None:
                *same, sums = backward(name, g, xs, every | SLOTS)
                for a, b in zip(same, wanted[1:], strict=True):
                    assert_near(a, b, rtol, f"{name} {level_name}, beside slots")
                if name not in NO_SLOT_GRADIENT:
                    rtol = max(
                        rtol, 1e-3 if dtype == torch.float32 else 1e-9
                    )  # of sums in which terms cancel
                    assert_near(sums, by_slots, rtol, f"{name} {level_name}, slots")
    finally:
        raw._set_cpu_isa(before)


def assert_near(got: Tensor, want: Tensor, rtol: float, what: str) -> None:
    scale = want.abs().nan_to_num(0, 0, 0).mean()
    error = (got.double() - want).abs()
    good = (error <= rtol * (want.abs() + scale)) | (got.double() == want) | (got.isnan() & want.isnan())
    assert good.all(), f"{what}: {got[~good].flatten()[:3]}, not {want[~good].flatten()[:3]}"


# ----------------------------------------------------------------------------------------------------- arrangements

# One input and none, one and several slots, coefficient vectors, two and three inputs.
SOME = ["silu", "leaky_relu", TWO_SLOTS, "pau", "fsa", "swiglu", "eelu"]


def arrangements(x: Tensor) -> dict[str, Tensor]:
    """The values of x (4 dimensions), in tensors of other strides."""
    n, c, h, w = x.shape
    wide = torch.full((n, c + 3, h, 2 * w + 1), 99.0, dtype=x.dtype)
    strided = wide[:, 1 : c + 1, :, 1::2]
    strided.copy_(x)
    return {
        "contiguous": x.clone(),
        "channels_last": x.clone(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3).contiguous().transpose(0, 3),
        "permuted": x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
        "strided": strided,
        "offset": torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    }


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 3, 5, 70), (1, 70, 2, 3), (3, 1, 9, 11)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_arrangements_of_memory(name, shape, dtype):
    count = len(KERNELS[name][0].inputs)
    plain = [random(*shape, seed=i, dtype=dtype) for i in range(count)]
    grad = random(*shape, seed=9, dtype=dtype)
    want = forward(name, plain)
    needs = (1 << count) - 1
    wants = backward(name, grad, plain, needs)
    others = [arrangements(x) for x in plain]
    grads = arrangements(grad)
    keys = list(grads)
    for i, key in enumerate(keys):
        for mixed in (False, True):
            inputs = [o[keys[(i + k * mixed) % len(keys)]] for k, o in enumerate(others)]
            y = forward(name, inputs)
            assert torch.equal(y, want), key
            assert y.stride() == torch.empty_like(inputs[0]).stride(), key
            got = backward(name, grads[keys[(i + 2 * mixed) % len(keys)]], inputs, needs)
            for g, h, x in zip(got, wants, inputs, strict=True):
                assert torch.equal(g, h), key
                assert g.stride() == torch.empty_like(x).stride(), key
            out = torch.empty_like(others[0][keys[i - mixed]])
            slots, lengths = slots_of(name, torch.float64 if dtype == torch.float64 else torch.float32)
            raw._activation_out(inputs, KERNELS[name][0].id, slots, lengths, 0, 0, 0, out)
            assert torch.equal(out, want), key
            for alone in range(count):  # one gradient of several
                assert torch.equal(backward(name, grad, inputs, 1 << alone)[0], wants[alone])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_ends_of_every_length(level, dtype):
    x, g = random(67, dtype=dtype), random(67, seed=1, dtype=dtype)
    for name in ("silu", TWO_SLOTS):
        every, by_x = forward(name, [x]), backward(name, g, [x], 1)[0]
        for n in range(1, 68):
            assert torch.equal(forward(name, [x[:n]]), every[:n])
            assert torch.equal(forward(name, [x[67 - n :]]), every[67 - n :])
            assert torch.equal(backward(name, g[:n], [x[:n]], 1)[0], by_x[:n])
            out = torch.full((80,), 5.0, dtype=dtype)
            slots, lengths = slots_of(name, torch.float64 if dtype == torch.float64 else torch.float32)
            raw._activation_out([x[:n]], KERNELS[name][0].id, slots, lengths, 0, 0, 0, out[3 : n + 3])
            assert torch.equal(out[3 : n + 3], every[:n])
            assert (out[:3] == 5).all()
            assert (out[n + 3 :] == 5).all(), "written beyond the end"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_16_bits_are_float32_rounded_once(level, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for name in ("silu", TWO_SLOTS, "relu"):
        got, want = forward(name, [x]), forward(name, [x.float()]).to(dtype)
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
        assert torch.equal(got.isnan(), want.isnan())
        got, want = backward(name, x, [x], 1)[0], backward(name, x.float(), [x.float()], 1)[0].to(dtype)
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    x = random(3, 1000, dtype=dtype)
    by_x, by_slots = backward(TWO_SLOTS, x, [x], 1 | SLOTS)
    want_x, want_slots = backward(TWO_SLOTS, x.float(), [x.float()], 1 | SLOTS)
    assert torch.equal(by_x, want_x.to(dtype))
    torch.testing.assert_close(by_slots, want_slots)
    assert by_slots.dtype == torch.float32


def test_expanded_tensors():
    x, g = random(1, 7, 1), random(1)
    wide, grad = x.expand(5, 7, 130), g.expand(5, 7, 130)
    assert torch.equal(forward("silu", [wide]), forward("silu", [wide.contiguous()]))
    assert torch.equal(
        backward("silu", grad, [wide], 1)[0], backward("silu", grad.contiguous(), [wide.contiguous()], 1)[0]
    )
    pair = [wide, random(5, 7, 130)]
    assert torch.equal(forward("swiglu", pair), forward("swiglu", [t.contiguous() for t in pair]))
    by_slots = backward(TWO_SLOTS, grad, [wide], SLOTS)[0]
    torch.testing.assert_close(
        by_slots, backward(TWO_SLOTS, grad.contiguous(), [wide.contiguous()], SLOTS)[0]
    )


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (), (1,), (1, 1, 1)], ids=str)
def test_empty_and_single_elements(shape):
    x = random(*shape)
    y = forward(TWO_SLOTS, [x])
    assert y.shape == x.shape
    assert torch.equal(y, forward(TWO_SLOTS, [x.reshape(-1)]).reshape(shape))
    by_x, by_slots = backward(TWO_SLOTS, x, [x], 1 | SLOTS)
    assert by_x.shape == x.shape
    assert by_slots.shape == (2, 1)
    if x.numel() == 0:
        assert (by_slots == 0).all()
    slots, _ = slots_of(TWO_SLOTS)
    assert torch.equal(raw._activation(x, KERNELS[TWO_SLOTS][0].id, slots), y)
    assert torch.equal(raw._activation(x, KERNELS["silu"][0].id), forward("silu", [x]))


def test_in_place():
    for x in (random(3, 70, 65), random(3, 70, 65)[:, ::3, 1:], random(3, 64).bfloat16()):
        want = forward("silu", [x])
        raw._activation_out([x], KERNELS["silu"][0].id, None, [], 0, 0, 0, x)
        assert torch.equal(x, want)


# --------------------------------------------------------------------------------------------------------- channels


@pytest.mark.parametrize("name", ["leaky_relu", TWO_SLOTS, "pau", "fsa", "pwlu"])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((6, 5), 1),
        ((6, 5), 0),
        ((3, 70), 1),
        ((2, 5, 3, 4), 1),
        ((2, 3, 5, 70), 1),
        ((4, 3, 2, 130), 3),
        ((300,), 0),
        ((2, 3, 1500), 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels(name, shape, dim, layout, dtype):
    """One value a channel: as one call for each channel."""
    x, grad = random(*shape, dtype=dtype), random(*shape, seed=1, dtype=dtype)
    if layout == "channels_last":
        x = x.movedim(dim, -1).contiguous().movedim(-1, dim)
    elif layout == "strided":
        x = torch.stack((x, x), -1).flatten(-2)[..., ::2]
    channels = shape[dim]
    scalar, _ = slots_of(name)
    slots = scalar * (1 + 0.01 * torch.arange(channels))
    y = forward(name, [x], slots, dim)
    by_x, by_slots = backward(name, grad, [x], 1 | SLOTS, slots, dim)
    # Beside slots' derivatives the compiler may contract other products into sums.
    torch.testing.assert_close(backward(name, grad, [x], 1, slots, dim)[0], by_x, atol=1e-5, rtol=2e-6)
    assert torch.equal(backward(name, grad, [x], SLOTS, slots, dim)[0], by_slots)
    some = range(channels) if channels < 10 else (0, 1, channels // 2, channels - 1)
    for c in some:
        part, g = x.select(dim, c).contiguous(), grad.select(dim, c).contiguous()
        own = slots[:, c : c + 1].contiguous()
        assert torch.equal(y.select(dim, c), forward(name, [part], own))
        want_x, want_slots = backward(name, g, [part], 1 | SLOTS, own)
        assert torch.equal(by_x.select(dim, c), want_x)
        scale = backward(name, g.abs(), [part], SLOTS, own)[0].abs().amax().item()
        torch.testing.assert_close(by_slots[:, c : c + 1], want_slots, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("shape", [(64, 5000), (4, 7, 300, 40), (300_001,)], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_threads_change_no_bit(threads, shape, dim):
    if dim >= len(shape):
        pytest.skip("one dimension")
    x, grad = random(*shape), random(*shape, seed=1)
    slots = slots_of(TWO_SLOTS)[0] * (1 + 0.01 * torch.arange(shape[dim])) if len(shape) > 1 else "default"
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(
            [forward(TWO_SLOTS, [x], slots, dim), *backward(TWO_SLOTS, grad, [x], 1 | SLOTS, slots, dim)]
        )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    # and the sums are as exact as float32 can hold
    exact = backward(
        TWO_SLOTS,
        grad.double(),
        [x.double()],
        SLOTS,
        slots.double() if isinstance(slots, Tensor) else "default",
        dim,
    )
    error = (results[0][2].double() - exact[0]).abs().amax()
    assert error <= 1e-5 * exact[0].abs().amax() + 1e-3


# ----------------------------------------------------------------------------------------------------- packed inputs


@pytest.mark.parametrize("name", ["swiglu", "star_operation", "eelu"])
@pytest.mark.parametrize("split", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_packed_halves(name, split, dtype):
    further = len(KERNELS[name][0].inputs) - 2
    for shape, dim in [((4, 10), 1), ((3, 6, 70), 2), ((3, 6, 70), 1), ((2, 4, 3, 300), 0), ((2, 260), 1)]:
        for strided in (False, True):
            packed = random(*shape, dtype=dtype)
            if strided:
                packed = packed.transpose(0, 1).contiguous().transpose(0, 1)
            if split <= 2:
                a, b = packed.chunk(2, dim)
            else:
                a, b = packed.unflatten(dim, (-1, 2)).unbind(dim + 1)
            a, b = (a, b) if split % 2 else (b, a)
            rest = [random(*a.shape, seed=5 + i, dtype=dtype) for i in range(further)]
            y = forward(name, [packed, *rest], split=(split, dim))
            assert y.is_contiguous()
            assert torch.equal(y, forward(name, [a, b, *rest]))
            grad = random(*a.shape, seed=9, dtype=dtype)
            by_packed = backward(name, grad, [packed, *rest], 1, split=(split, dim))[0]
            assert by_packed.stride() == torch.empty_like(packed).stride()
            by_a, by_b = backward(name, grad, [a, b, *rest], 3)
            by_a, by_b = (by_a, by_b) if split % 2 else (by_b, by_a)
            want = (
                torch.cat((by_a, by_b), dim)
                if split <= 2
                else torch.stack((by_a, by_b), dim + 1).flatten(dim, dim + 1)
            )
            assert torch.equal(by_packed, want)
            if further:
                by_rest = backward(name, grad, [packed, *rest], 2, split=(split, dim))[0]
                assert torch.equal(by_rest, backward(name, grad, [a, b, *rest], 4)[0])


# ------------------------------------------------------------------------------------------------- errors, switches


def test_errors():
    x = random(4)
    with pytest.raises(RuntimeError, match="no kernel has id 12345"):
        raw._activation(x, 12345)
    with pytest.raises(RuntimeError, match="takes 2 tensors, got 1"):
        raw._activation(x, KERNELS["swiglu"][0].id)
    with pytest.raises(RuntimeError, match="has 1 slots, got none"):
        raw._activation(x, KERNELS["leaky_relu"][0].id)
    with pytest.raises(RuntimeError, match="do not fit channel_dim"):
        forward("leaky_relu", [x], torch.ones(1, 3))
    with pytest.raises(RuntimeError, match="shape or dtype"):
        forward("swiglu", [x, random(5)])
    with pytest.raises(RuntimeError, match="expected float32"):
        forward("silu", [torch.ones(3, dtype=torch.int32)])


def test_huge_pages():
    before = raw._huge_pages()
    try:
        for threshold in (-1, 0, 1 << 22):
            raw._set_huge_pages(threshold)
            assert raw._huge_pages() == threshold
            x = random(3 << 20)
            assert torch.equal(forward("relu", [x]), x.clamp(min=0))
    finally:
        raw._set_huge_pages(before)
    code = "import torch, torchlin; print(torch.ops.torchlin._huge_pages())"
    for value, shown in (("0", "-1"), ("many", str(before))):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"TORCHLIN_HUGE_PAGES": value},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == shown, done.stderr
        assert ("'many'" in done.stderr) == (value == "many")


LIBRARY = """#include "activation/kernel.h"
#define TORCHLIN_SHARD_FILE "functor.inc"
#define TORCHLIN_KERNEL "activation/kernel_cpu.h"
#include "simd/foreach_isa.h"
TORCHLIN_ACTIVATION_LIBRARY
"""


def test_load_at_run_time(tmp_path):
    """A kernel that a compiler made of a formula, without torch's headers."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    prepared = prepare(parse("k*tanh(exp(x)) + 3*x", ["k"], inputs=("x",)))
    kernel = Kernel("of_a_test", ("x",), prepared.body, tuple(s.is_vector for s in prepared.slots))
    assert kernel.id not in {k.id for k in kernels().values()}
    (tmp_path / "functor.inc").write_text(shard([kernel]))
    (tmp_path / "kernel.cpp").write_text(LIBRARY)
    flags = [
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-shared",
        "-fno-math-errno",
        "-fno-trapping-math",
        f"-I{CSRC}",
        f"-I{tmp_path}",
    ]
    library = tmp_path / "kernel.so"
    subprocess.run([compiler, *flags, str(tmp_path / "kernel.cpp"), "-o", str(library)], check=True)
    assert raw._activation_load(str(library)) == [kernel.id]
    x = random(100)
    y = raw._activation(x, kernel.id, torch.tensor([[2.0]]))
    torch.testing.assert_close(y, 2 * torch.tanh(torch.exp(x)) + 3 * x)
    by_x, by_slot = raw._activation_bwd(x, [x], kernel.id, torch.tensor([[2.0]]), [1], 0, 0, 0, 1 | SLOTS)
    torch.testing.assert_close(by_slot, (x * torch.tanh(torch.exp(x))).sum().reshape(1, 1))
    assert by_x.shape == x.shape
    assert torch.equal(forward("silu", [x]), forward("silu", [x.clone()]))  # the others are still there

    with pytest.raises(RuntimeError, match=r"nowhere\.so"):
        raw._activation_load(str(tmp_path / "nowhere.so"))
    with pytest.raises(RuntimeError, match="no torchlin_activation_table"):
        raw._activation_load(next(str(p) for p in Path(torch.__file__).parent.glob("lib/libtorch.so*")))
