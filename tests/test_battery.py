"""The battery itself: a right op passes every check, a wrong one fails the check meant for its fault."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import battery
import pytest
import torch
from torch import Tensor

from torchlin import registry

# y = w · x / (1 + |x|), w per element of the last dimension. Raw ops in Python, all else as in a real family.

_lib = torch.library.Library("torchlin_toy", "DEF")
_lib.define("_soft_fwd(Tensor x, Tensor w) -> Tensor")
_lib.define("_soft_bwd(Tensor grad, Tensor x, Tensor w) -> (Tensor, Tensor)")
_raw = torch.ops.torchlin_toy


def reference(x: Tensor, w: Tensor) -> Tensor:
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    v = x.to(wide)
    return (v / (1 + v.abs()) * w.to(wide)).to(x.dtype)


def _sum_to_last(t: Tensor) -> Tensor:
    return t.sum(tuple(range(t.dim() - 1))) if t.dim() > 1 else t  # sum(()) would sum everything


def _slopes(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    g, v, f = grad.to(wide), x.to(wide), w.to(wide)
    d = 1 + v.abs()
    return (g * f / (d * d)).to(x.dtype), _sum_to_last(g * v / d).to(w.dtype)


def _fwd(x: Tensor, w: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(reference(x, w))


def _bwd(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    gx, gw = _slopes(grad, x, w)
    return torch.empty_like(x).copy_(gx), gw.contiguous()


def _fake_bwd(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(w, memory_format=torch.contiguous_format)


_lib.impl("_soft_fwd", _fwd, "CPU")
_lib.impl("_soft_bwd", _bwd, "CPU")
torch.library.register_fake("torchlin_toy::_soft_fwd", lambda x, w: torch.empty_like(x))
torch.library.register_fake("torchlin_toy::_soft_bwd", _fake_bwd)


def _batch_first(info: Any, dims: Any, *args: Tensor) -> list[Tensor]:
    """Each argument with the batch dimension in front, w's rows broadcasting over all between."""
    full = [
        t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip(args, dims, strict=True)
    ]
    *others, w = full
    return [*others, w.reshape(w.shape[0], *[1] * (others[0].dim() - w.dim()), *w.shape[1:])]


def _vmap_fwd(info: Any, dims: Any, *args: Tensor) -> Any:
    return reference(*_batch_first(info, dims, *args)), 0


def _vmap_bwd(info: Any, dims: Any, *args: Tensor) -> Any:
    grad, x, w = _batch_first(info, dims, *args)
    product = grad * x / (1 + x.abs())
    gw = product.flatten(1, -2).sum(1) if x.dim() > 2 else product
    return (grad * w / (1 + x.abs()) ** 2, gw), (0, 0)


torch.library.register_vmap("torchlin_toy::_soft_fwd", _vmap_fwd)
torch.library.register_vmap("torchlin_toy::_soft_bwd", _vmap_bwd)


class Soft(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return _raw._soft_fwd(x, w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _slopes(grad, x, w)  # differentiable once more
        return _raw._soft_bwd(grad, x, w)


class SoftForward(Soft):
    """With a forward derivative, which torch.compile refuses to trace: only for a forward-mode level."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        Soft.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, dx, dw):
        x, w = ctx.saved_tensors
        d = 1 + x.abs()
        along_x = 0 if dx is None else dx * w / (d * d)
        return along_x if dw is None else along_x + dw * x / d


def soft(x: Tensor, w: Tensor, *, inplace: bool = False, out: Tensor | None = None) -> Tensor:
    grad = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    if inplace:
        if torch.is_grad_enabled() and x.requires_grad and x.is_leaf:
            raise ValueError("inplace=True cannot overwrite a leaf")
        if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
            raise ValueError("inplace=True cannot overwrite an expanded x")
        return SoftInplace.apply(x, w)
    if out is not None:
        if out.shape != x.shape or out.dtype != x.dtype or out.requires_grad or out._is_zerotensor():
            raise ValueError("out cannot take the result")
        shared = out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        if out.numel() and (
            shared or any(st == 0 and si > 1 for st, si in zip(out.stride(), out.shape, strict=True))
        ):
            raise ValueError("out overlaps")
        return out.copy_(reference(x, w))
    if torch.autograd.forward_ad._current_level >= 0:  # dual tensors do not say requires_grad
        return SoftForward.apply(x, w)
    return Soft.apply(x, w) if grad else _raw._soft_fwd(x, w)


class SoftInplace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x.clone(), w)
        ctx.mark_dirty(x)
        return x.copy_(reference(x, w))

    @staticmethod
    def backward(ctx, grad):
        return _slopes(grad, *ctx.saved_tensors)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[battery.Sample]:
    for shape in ((4, 6), (3, 13), (1,), (0, 5), (2, 3, 4, 5), (257, 256)):
        make = lambda *s, seed: battery.randn(*s, device=device, dtype=dtype, seed=seed)  # noqa: E731
        yield battery.Sample("x".join(map(str, shape)), make(*shape, seed=1), w=make(shape[-1], seed=2))


TOY = battery.Op(
    name="soft",
    public=soft,
    reference=reference,
    samples=samples,
    raw=("torchlin_toy::_soft_fwd", "torchlin_toy::_soft_bwd"),
    preserves_format=True,
    inplace=True,
    out=True,
    forward_ad=True,
)

# TOY has no CPU levels and no CUDA kernels of its own: without these the checks for them would be vacuous.
TOY = replace(
    TOY,
    isa=lambda: [contextlib.nullcontext("only")],
    emulated=lambda: {"torchlin_toy::_soft_fwd": _fwd, "torchlin_toy::_soft_bwd": _bwd},
)

test_right_op_passes = battery.tests(TOY)

# --------------------------------------------------------------------------------- one fault for every check


def function(base: Any = Soft, **parts: Any) -> Any:
    """soft() through an autograd.Function of which some parts are replaced."""
    members = {"generate_vmap_rule": True, **{k: staticmethod(v) for k, v in parts.items()}}
    broken = type("Broken", (base,), members)
    return lambda x, w: broken.apply(x, w)


def _dense(g: Tensor) -> Tensor:
    return g.as_strided(g.shape, torch.empty(g.shape).stride()) if g.dim() and g.stride(-1) == 2 else g


def _abs_of_infinity(x: Tensor, w: Tensor) -> Tensor:
    y = soft(x, w)
    return torch.where(y.isinf(), y.abs(), y)


def constants(device: torch.device, dtype: torch.dtype) -> Iterator[battery.Sample]:
    """The samples with nothing to differentiate."""
    for sample in samples(device, dtype):
        plain = sample.map(torch.clone)
        plain.tensors = [t.detach() for t in plain.tensors]
        yield plain


def _as_if_contiguous(x: Tensor, w: Tensor) -> Tensor:
    dense = torch.empty(x.shape).stride()
    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return soft(x if room < x.numel() else x.as_strided(x.shape, dense, x.storage_offset()), w)


def _writes_input(x: Tensor, w: Tensor) -> Tensor:
    y = soft(x, w)
    if x.is_contiguous():
        x.data.mul_(2)  # .data: no version counter tells
    return y


def _touches_version(x: Tensor, w: Tensor) -> Tensor:
    y = _raw._soft_fwd(x, w)
    with torch.no_grad():
        return y if any(st == 0 for st in x.stride()) else (x.add_(0), y)[1]


def _writes_around(x: Tensor, w: Tensor) -> Tensor:
    y = soft(x, w)
    if x.storage_offset():
        x.data.as_strided((1,), (1,), x.storage_offset() - 1).zero_()
    return y


def _counting(times: list[int]) -> Any:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        times[0] += 1
        return soft(x, w) * (1 + times[0] * 2**-6)

    return fn


_level = ["good"]


def _levels() -> Iterator[Any]:
    return map(_at, ("good", "avx2"))


@contextlib.contextmanager
def _at(level: str) -> Iterator[str]:
    _level[0] = level
    yield level
    _level[0] = "good"


_lib.define("_unannotated(Tensor x, Tensor w) -> Tensor")
_lib.impl("_unannotated", lambda x, w: x.mul_(2) * w, "CPU")
torch.library.register_fake("torchlin_toy::_unannotated", lambda x, w: torch.empty_like(x))
_lib.define("_misshapen(Tensor x, Tensor w) -> Tensor")
_lib.impl("_misshapen", _fwd, "CPU")
torch.library.register_fake("torchlin_toy::_misshapen", lambda x, w: x.new_empty((*x.shape, 1)))
_lib.define("_slow_vmap(Tensor x, Tensor w) -> Tensor")
_lib.impl("_slow_vmap", _fwd, "CPU")
_lib.define("_misbatched(Tensor x, Tensor w) -> Tensor")
_lib.impl("_misbatched", _fwd, "CPU")
_lib.define("_autograd(Tensor x, Tensor w) -> Tensor")
_lib.impl("_autograd", _fwd, "CPU")
_lib.impl("_autograd", lambda x, w: x * w, "Autograd")
_lib.define("public_name(Tensor x, Tensor w) -> Tensor")
_lib.impl("public_name", _fwd, "CPU")


@functools.partial(torch.library.register_vmap, "torchlin_toy::_misbatched")
def _vmap_that_forgets_w(info: Any, dims: Any, x: Tensor, w: Tensor) -> Any:
    x = x.expand(info.batch_size, *x.shape) if dims[0] is None else x.movedim(dims[0], 0)
    return reference(x, w if dims[1] is None else w.movedim(dims[1], 0)[0]), 0


def _rounding_often(x: Tensor, w: Tensor) -> Tensor:
    return x / (1 + x.abs()) * w * 3 / 3 * 5 / 5 * 7 / 7


def _transposed_on_meta(x: Tensor, w: Tensor) -> Tensor:
    return soft(x, w).mT if x.is_meta and x.dim() > 1 else soft(x, w)


def _item(x: Tensor, w: Tensor) -> Tensor:
    return soft(x, w) * (1.0 if float(w.detach().sum()) > -1e9 else 2.0)


def _not_exported(x: Tensor, w: Tensor) -> Tensor:
    return soft(x, w) * (2 if torch.compiler.is_exporting() else 1)


def _wrong_when_compiled(x: Tensor, w: Tensor) -> Tensor:
    return soft(x, w) * (1.001 if torch.compiler.is_compiling() else 1)


def _inplace(change: Any) -> Any:
    def fn(x: Tensor, w: Tensor, *, inplace: bool = False) -> Tensor:
        return change(x, w) if inplace else soft(x, w)

    return fn


def _out(change: Any) -> Any:
    return lambda x, w, *, out=None: soft(x, w) if out is None else change(x, w, out)


class _NotDirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x.clone(), w)
        x.data.copy_(reference(x, w))  # written behind autograd's back, as a raw kernel would
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _slopes(grad, *ctx.saved_tensors)


def _inplace_unmarked(x: Tensor, w: Tensor) -> Tensor:
    if (torch.is_grad_enabled() and x.requires_grad and x.is_leaf) or 0 in x.stride():
        raise ValueError("inplace")
    return _NotDirty.apply(x, w) if torch.is_grad_enabled() else x.copy_(reference(x, w))


def _inplace_on_leaf(x: Tensor, w: Tensor) -> Tensor:
    if 0 in x.stride():
        raise ValueError("inplace")
    return x.data.copy_(reference(x, w)) if torch.is_grad_enabled() else x.copy_(reference(x, w))


def _out_of_any_dtype(x: Tensor, w: Tensor, out: Tensor) -> Tensor:
    if out.shape != x.shape:
        raise ValueError("out")
    return out.copy_(reference(x, w))


def _out_everywhere(x: Tensor, w: Tensor, out: Tensor) -> Tensor:
    room = out.untyped_storage()
    torch.empty(0, dtype=out.dtype).set_(room).zero_()
    return out.copy_(reference(x, w))


def _out_over_input(x: Tensor, w: Tensor, out: Tensor) -> Tensor:
    shared = out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    return out.copy_(reference(x, w)) if shared and out.numel() else soft(x, w, out=out)


def broken(public: Any, **changes: Any) -> battery.Op:
    return replace(TOY, public=public, **changes)


def second(change: Any, base: Any = Soft) -> battery.Op:
    """The right gradients, then changed."""
    return broken(function(base, backward=lambda ctx, grad: change(*_slopes(grad, *ctx.saved_tensors), ctx)))


def raw_only(name: str) -> battery.Op:
    """One raw op, called straight."""
    raw = getattr(_raw, name)
    return broken(
        lambda x, w: raw(x.detach(), w.detach()), raw=(f"torchlin_toy::{name}",), inplace=False, out=False
    )


def through(name: str) -> battery.Op:
    """Another raw op in the forward pass."""
    raw = getattr(_raw, name)
    return broken(function(forward=lambda x, w: raw(x, w)))


# What is wrong: (the check that must say so, what it must say, the op).
FAULTS: dict[str, tuple[str, str, battery.Op]] = {
    "a little wrong": ("value", "largest error", broken(lambda x, w: soft(x, w) * 1.02)),
    "16-bit arithmetic": ("value", "mean square", broken(_rounding_often)),
    "wrong dtype": ("value", "the reference has torch.float32", broken(lambda x, w: soft(x, w).double())),
    "wrong shape": ("value", "shape", broken(lambda x, w: soft(x, w)[None])),
    "one output too many": ("value", "2 outputs", broken(lambda x, w: (soft(x, w), w))),
    "wrong slope": ("gradient", "output 1: largest", second(lambda gx, gw, ctx: (gx, gw * 1.1))),
    "slope of w only with that of x": (
        "gradient",
        "tensor 1 alone",
        second(lambda gx, gw, ctx: (gx, gw if ctx.needs_input_grad[0] else torch.zeros_like(gw))),
    ),
    "slope takes its layout for granted": (
        "gradient",
        "sliced output gradients",
        broken(function(backward=lambda ctx, g: _slopes(_dense(g), *ctx.saved_tensors))),
    ),
    "strides ignored": ("layout", "transposed input: largest", broken(_as_if_contiguous)),
    "memory format lost": ("layout", "strides", broken(lambda x, w: soft(x, w).contiguous() + 0)),
    "input overwritten": ("untouched", "wrote to its input", broken(_writes_input)),
    "memory around overwritten": ("untouched", "wrote to its input", broken(_writes_around)),
    "input marked as changed": ("untouched", "version counter", broken(_touches_version, samples=constants)),
    "result is a view of the input": ("untouched", "aliases", broken(lambda x, w: x.view_as(x))),
    "NaN swallowed": ("nonfinite", "isnan differs", broken(lambda x, w: soft(x.nan_to_num(), w))),
    "infinity of the wrong sign": ("nonfinite", "isposinf differs", broken(_abs_of_infinity)),
    "another value each time": ("deterministic", "two runs differ", broken(_counting([0]))),
    "depends on threads": (
        "deterministic",
        "threads differ",
        broken(lambda x, w: soft(x, w) * (1 + torch.get_num_threads() * 2**-6)),
    ),
    "one ISA wrong": (
        "isa",
        "CPU ISA avx2",
        broken(lambda x, w: soft(x, w) * (2 if _level[0] == "avx2" else 1), isa=_levels),
    ),
    "emulated kernel wrong": (
        "emulated",
        "emulated, contiguous",
        replace(TOY, emulated=lambda: {"torchlin_toy::_soft_fwd": lambda x, w: _fwd(x, w) * 2}),
    ),
    "emulated kernel never run": ("emulated", "no raw op was emulated", replace(TOY, emulated=dict)),
    "first derivative off": ("gradcheck", "Jacobian mismatch", second(lambda gx, gw, _: (gx, gw * 2))),
    "second derivative cut off": (
        "gradcheck",
        "expected to be zero",
        second(lambda gx, gw, _: (gx.detach(), gw.detach()), SoftForward),
    ),
    "raw op writes to its input": (
        "opcheck",
        "(?i)mutat",
        raw_only("_unannotated"),
    ),
    "fake of another shape": (
        "opcheck",
        "(?i)shape|size",
        raw_only("_misshapen"),
    ),
    "meta strides": ("meta", "expected", broken(_transposed_on_meta)),
    "graph break": ("compile", "data-dependent", broken(_item)),
    "compiled to another value": ("inductor", "compiled by inductor", broken(_wrong_when_compiled)),
    "exported to another value": ("export", "exported", broken(_not_exported)),
    "autocast followed": (
        "autocast",
        "expected torch.float32",
        broken(lambda x, w: soft(x.bfloat16() if torch.is_autocast_enabled("cpu") else x, w)),
    ),
    "autocast not followed": ("autocast", "policy float32", replace(TOY, autocast="float32")),
    "vmap by a loop": ("vmap", "falls back to a loop", through("_slow_vmap")),
    "vmap over the wrong dimension": ("vmap", "largest error", through("_misbatched")),
    "wrong tangent": ("jvp", "largest error", broken(function(SoftForward, jvp=lambda ctx, dx, dw: dx * 0))),
    "no tangent": ("jvp", "largest error", broken(lambda x, w: _raw._soft_fwd(x, w))),
    "out not written": ("out", "another tensor is returned", broken(_out(lambda x, w, out: soft(x, w)))),
    "out of any dtype accepted": ("out", "another dtype was not refused", broken(_out(_out_of_any_dtype))),
    "out overwrites its surroundings": ("out", "outside", broken(_out(_out_everywhere))),
    "out over the input": ("out", "overlaps the input was not refused", broken(_out(_out_over_input))),
    "in place on a copy": ("inplace", "not in place", broken(_inplace(soft))),
    "in place on a leaf": ("inplace", "requires grad was not refused", broken(_inplace(_inplace_on_leaf))),
    "in place behind autograd's back": ("inplace", "DID NOT RAISE", broken(_inplace(_inplace_unmarked))),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_op_fails(fault: str) -> None:
    name, message, op = FAULTS[fault]
    failures = [str(failure) for failure in _failures(name, op)]
    assert any(re.search(message, failure) for failure in failures), f"{name} on {fault}: {failures}"


def _failures(name: str, op: battery.Op) -> list[BaseException]:
    chk, failures = battery.CHECKS[name], []
    for dtype in chk.dtypes:
        for sample in battery.samples_of(op, "cpu", dtype)[::-1]:
            if chk.applies(op, sample):
                try:
                    chk.run(op, sample.map(torch.clone))
                except (Exception, pytest.fail.Exception) as failure:
                    failures.append(failure)
    return failures


def test_every_check_has_been_seen_to_fail() -> None:
    assert {name for name, _, _ in FAULTS.values()} == set(battery.CHECKS)


@pytest.mark.parametrize("kind", ["empty", "size-1", "odd", "4-D", "large"])
def test_samples_without_a_corner_fail(kind: str) -> None:
    lacks = {
        "empty": lambda s: s.name != "0x5",
        "size-1": lambda s: s.name != "1",
        "odd": lambda s: s.name != "3x13",
        "4-D": lambda s: s.tensors[0].dim() < 4,
        "large": lambda s: s.numel < battery.LARGE,
    }[kind]
    op = replace(TOY, samples=lambda device, dtype: filter(lacks, samples(device, dtype)))
    with pytest.raises(AssertionError, match=kind):
        battery.check_samples(op)
    battery.check_samples(replace(op, skip={f"samples:{kind}": "shown to be excusable"}))


def test_skips_need_a_known_check_and_a_reason() -> None:
    with pytest.raises(AssertionError, match="no check is called"):
        battery.check_samples(replace(TOY, skip={"vallue": "typo"}))
    with pytest.raises(AssertionError, match="reason"):
        battery.check_samples(replace(TOY, skip={"value": ""}))


@pytest.mark.parametrize(
    ("raw", "public", "message"),
    [
        ("torchlin_toy::_autograd", lambda x, w: _raw._autograd(x.detach(), w), "kernel for Autograd"),
        ("torchlin_toy::public_name", lambda x, w: _raw.public_name(x.detach(), w), "starts with _"),
        (
            "torchlin_toy::_soft_bwd",
            lambda x, w: _raw._soft_fwd(x.detach(), w.detach()),
            "no sample of soft reaches it",
        ),
    ],
)
def test_raw_ops_that_break_the_rules(raw: str, public: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        battery.check_raw(replace(TOY, raw=(raw,), public=public, inplace=False, out=False))


def test_layouts_keep_values_and_differ_in_memory() -> None:
    t = torch.randn(3, 4, 2, 5)
    for name in battery.LAYOUTS:
        laid = battery.lay_out(t, name)
        assert torch.equal(laid, t[:1].expand_as(t) if name == "expanded" else t), name
        assert laid.untyped_storage().data_ptr() != t.untyped_storage().data_ptr(), name
    assert battery.lay_out(t, "offset").data_ptr() % 16
    assert battery.lay_out(t, "negated").is_neg()
    assert battery.lay_out(t, "expanded").stride(0) == 0
    assert battery.lay_out(t, "sliced").stride(-1) == 2


def test_generators_are_rewound_for_each_call() -> None:
    generator = torch.Generator().manual_seed(3)
    sample = battery.Sample("noise", torch.zeros(4), generator=generator)
    noise = lambda x, generator: x + torch.rand(4, generator=generator)  # noqa: E731
    assert torch.equal(sample.call(noise), sample.call(noise))


# ------------------------------------------------------------------------------------------------ coverage


def test_everything_registered_is_covered() -> None:
    kinds = ("activation", "attention", "norm", "transform", "quantizer", "loss")
    names = [(kind, name) for kind in kinds for name in registry.names(kind)]
    problems = battery.uncovered(battery.families(), battery.registered_ops(), names)
    assert not problems, "\n".join(problems)


def test_a_forgotten_op_or_name_is_reported() -> None:
    op = replace(TOY, raw=("_a",), names=(("norm", "n"),))
    fine = battery.uncovered([op], ["torchlin::_a", *battery.INFRASTRUCTURE], [("norm", "n")])
    assert fine == []
    problems = battery.uncovered([op], ["torchlin::_b", *battery.INFRASTRUCTURE], [("loss", "m")])
    assert problems == [
        "operator torchlin::_b has no samples",
        "operator torchlin::_a is covered but not registered",
        "loss 'm' has no samples",
        "norm 'n' is covered but not registered",
    ]


def test_registered_ops_are_found() -> None:
    assert "torchlin_toy::_soft_fwd" in battery.registered_ops("torchlin_toy")
