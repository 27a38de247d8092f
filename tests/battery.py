"""What every op has to pass, from nothing but a list of samples.

    OPS = [battery.Op(name="hadamard", public=..., reference=..., raw=(...), samples=samples)]
    test_battery = battery.tests(*OPS)

in tests/test_<family>.py makes one pytest item per op, check, dtype and sample. Values are judged against the
reference run in float64; the yardstick of an error is what the reference itself makes in the tested dtype: no
tolerance is tuned by hand. test_battery.py feeds broken ops to every check, and sees that no op is forgotten.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LARGE = 1 << 16  # elements from which a sample is expected to reach a kernel's parallel and blocked paths
GRADCHECK_LIMIT = 4096  # elements up to which finite differences are worth their time
EMULATION_LIMIT = 2048  # elements up to which a CUDA kernel is emulated, one fiber a thread


class Sample:
    """The arguments of one call; its tensors that require grad are the ones to differentiate and to batch."""

    def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.name = name
        leaves, self._spec = tree_flatten((args, kwargs))
        self._slots = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        self.tensors: list[Tensor] = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def call(self, fn: Callable[..., Any], tensors: Iterable[Tensor] | None = None, **extra: Any) -> Any:
        """fn of this sample's arguments, or of the same arguments with other tensors."""
        given = iter(self.tensors if tensors is None else tensors)
        leaves = [next(given) if slot is None else _fresh(slot[0]) for slot in self._slots]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return fn(*args, **kwargs, **extra)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Sample:
        """The same call on fn(tensor), each result again a leaf that requires grad where the original did."""
        other = object.__new__(Sample)
        other.name, other._spec, other._slots = self.name, self._spec, self._slots
        other.tensors = [_leaf(fn(t.detach()), t.requires_grad) for t in self.tensors]
        return other

    @property
    def numel(self) -> int:
        return max((t.numel() for t in self.tensors), default=0)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def differentiable(self) -> list[int]:
        return [i for i, t in enumerate(self.tensors) if t.requires_grad]


@dataclass(frozen=True)
class Op:
    """One public function and what is promised about it."""

    name: str
    public: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[torch.device, torch.dtype], Iterator[Sample]]
    raw: tuple[
        str, ...
    ] = ()  # operators behind it, "torchlin::_x_fwd" or "_x_fwd"; each must be reached by a sample
    names: tuple[tuple[str, str], ...] = ()  # registry entries that run it: (kind, name)
    dtypes: tuple[torch.dtype, ...] = FLOATS
    autocast: str = "keep"  # "keep": as without autocast; "float32" or "lower": inputs are cast to that first
    relative_to: str = (
        "tensor"  # what an error is measured against: the largest of the "tensor", its "row", the "element"
    )
    ulps: float = (
        1.0  # epsilons allowed beyond twice the yardstick; half of it in 16-bit types, which round only once
    )
    nonfinite: str = (
        "equal"  # "equal": NaN and infinities as in the reference; "spread": non-finite where it is
    )
    preserves_format: bool = False  # output strides are those of torch.empty_like(first tensor)
    # Raw op -> its CUDA kernels in the emulator, for CPU tensors; made when first needed.
    emulated: Callable[[], Mapping[str, Callable[..., Any]]] | None = None
    inplace: bool = False  # takes inplace=True
    out: bool = False  # takes out=
    forward_ad: bool = False
    inductor: tuple[
        str, ...
    ] = ()  # samples for the slow default backend of torch.compile; the first one if not given
    isa: Callable[[], Iterable[contextlib.AbstractContextManager[Any]]] = field(
        default=lambda: cpu_isa_levels()
    )
    skip: Mapping[str, str] = field(default_factory=dict)  # check or check/dtype -> why it cannot hold

    def __hash__(self) -> int:
        return id(self)


@dataclass(frozen=True)
class Check:
    run: Callable[[Op, Sample], None]
    dtypes: tuple[torch.dtype, ...]
    applies: Callable[[Op, Sample], bool]
    devices: tuple[str, ...]


CHECKS: dict[str, Check] = {}


def check(
    *,
    dtypes: Sequence[torch.dtype] = FLOATS,
    applies: Callable[[Op, Sample], bool] = lambda op, sample: True,
    devices: Sequence[str] = ("cpu", "cuda"),
) -> Callable[[Callable[[Op, Sample], None]], Callable[[Op, Sample], None]]:
    def add(run: Callable[[Op, Sample], None]) -> Callable[[Op, Sample], None]:
        CHECKS[run.__name__.removeprefix("check_")] = Check(run, tuple(dtypes), applies, tuple(devices))
        return run

    return add


def tests(*ops: Op) -> Callable[..., None]:
    """A pytest function that runs every check on every sample; assign it to a name starting with `test`."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    items = []
    for op in ops:
        items.append(pytest.param(lambda op=op: check_samples(op), id=f"{op.name}/samples"))
        items.append(pytest.param(lambda op=op: check_raw(op), id=f"{op.name}/raw"))
        for name, chk in CHECKS.items():
            for device in devices:
                for dtype in op.dtypes:
                    if device not in chk.devices or dtype not in chk.dtypes:
                        continue
                    for sample in samples_of(op, device, dtype):
                        if not chk.applies(op, sample):
                            continue
                        parts = [
                            op.name,
                            name,
                            *([device] if device != "cpu" else []),
                            dtype_name(dtype),
                            sample.name,
                        ]
                        reason = op.skip.get(name) or op.skip.get(f"{name}/{dtype_name(dtype)}")
                        marks = [pytest.mark.skip(reason=reason)] if reason else []
                        run = lambda op=op, chk=chk, sample=sample: chk.run(op, sample)  # noqa: E731
                        items.append(pytest.param(run, id="/".join(parts), marks=marks))

    @pytest.mark.parametrize("item", items)
    def test(item: Callable[[], None]) -> None:
        item()

    test.ops = ops  # type: ignore[attr-defined]
    return test


@cache
def samples_of(op: Op, device: str, dtype: torch.dtype) -> tuple[Sample, ...]:
    return tuple(op.samples(torch.device(device), dtype))


def randn(*shape: int, device: Any, dtype: torch.dtype, requires_grad: bool = True, seed: int = 0) -> Tensor:
    """Reproducible normal numbers, the same (up to rounding) for every device and dtype."""
    generator = torch.Generator().manual_seed(seed * 1000003 + sum(shape) + len(shape))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(device, dtype).requires_grad_(requires_grad and dtype.is_floating_point)


# ------------------------------------------------------------------------------------------------ layouts


def _storage(t: Tensor, numel: int) -> Tensor:
    """Room for a view, filled with a number that shows where a kernel reads what it should not."""
    return torch.full((numel,), 77, dtype=torch.float64).to(t.device, t.dtype)


def _offset(t: Tensor) -> Tensor:
    room = _storage(t, t.numel() + 8)  # one element in: as misaligned as the dtype allows
    return room[1 : 1 + t.numel()].view(t.shape).copy_(t)


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def _sliced(t: Tensor) -> Tensor:
    room = _storage(t, 2 * t.numel() + 3)[3:].view(*t.shape[:-1], 2 * t.shape[-1])
    return room[..., ::2].copy_(t)


def _padded(t: Tensor) -> Tensor:
    width = t.shape[-1] + 3
    room = _storage(t, math.prod(t.shape[:-1]) * width).view(*t.shape[:-1], width)
    return room[..., : t.shape[-1]].copy_(t)


# Each returns a fresh view with the values of t (expanded: with those of t[:1]).
LAYOUTS: dict[str, tuple[Callable[[Tensor], bool], Callable[[Tensor], Tensor]]] = {
    "contiguous": (lambda t: True, lambda t: t.clone(memory_format=torch.contiguous_format)),
    "offset": (lambda t: True, _offset),
    "transposed": (lambda t: t.dim() > 1, _transposed),
    "sliced": (lambda t: t.dim() > 0, _sliced),
    "padded": (lambda t: t.dim() > 1, _padded),
    "expanded": (
        lambda t: t.is_floating_point() and t.dim() > 0 and t.shape[0] > 1,
        lambda t: t[:1].clone().expand_as(t),
    ),
    "channels_last": (lambda t: t.dim() == 4, lambda t: t.clone(memory_format=torch.channels_last)),
    # The only negative view that torch has: a bit on the tensor, as x.conj().imag sets it.
    "negated": (lambda t: t.is_floating_point(), lambda t: torch._neg_view(t.neg())),
}


def lay_out(t: Tensor, layout: str) -> Tensor:
    fits, make = LAYOUTS[layout]
    return make(t) if fits(t) else t.clone()


def layouts_of(sample: Sample) -> list[str]:
    return [name for name, (fits, _) in LAYOUTS.items() if any(fits(t) for t in sample.tensors)]


# ------------------------------------------------------------------------------------------------ judging


def double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t.clone()


class Oracle:
    """What an op should give: the reference's value in float64 and in its dtype, and the error allowed.

    That is twice the error of the reference in its dtype, plus op.ulps: a tiny sample can be lucky.
    Nothing is more exact than float64 here: its yardstick is float32's error, times the ratio of epsilons.
    """

    def __init__(self, op: Op, sample: Sample, run: Callable[[Sample], Any]) -> None:
        self.truth, self.plain = tree_leaves(run(sample.map(double))), tree_leaves(run(sample))
        dtype, measured = sample.dtype, (self.plain, self.truth)
        if dtype is torch.float64:
            dtype = torch.float32
            single = sample.map(lambda t: t.to(dtype) if t.is_floating_point() else t.clone())
            measured = (tree_leaves(run(single)), tree_leaves(run(single.map(double))))
        self.op = op
        self.yardstick = [  # largest and mean error, in epsilons
            [e / torch.finfo(plain.dtype).eps for e in _errors(op, plain, truth)]
            if _counts(plain)
            else [0.0, 0.0]
            for plain, truth in zip(*measured, strict=True)
        ]

    def check(self, actual: Any, what: str) -> None:
        actual = tree_leaves(actual)
        assert len(actual) == len(self.truth), (
            f"{what}: {len(actual)} outputs, the reference has {len(self.truth)}"
        )
        for i, (got, true, plain, yardstick) in enumerate(
            zip(actual, self.truth, self.plain, self.yardstick, strict=True)
        ):
            at = f"{what}, output {i}" if len(actual) > 1 else what
            if not isinstance(plain, Tensor):
                assert got == plain, f"{at}: {got}, the reference has {plain}"
                continue
            got, true, plain = got.detach(), true.detach(), plain.detach()
            assert got.shape == true.shape, (
                f"{at}: shape {tuple(got.shape)}, the reference has {tuple(true.shape)}"
            )
            assert got.dtype == plain.dtype, f"{at}: {got.dtype}, the reference has {plain.dtype}"
            assert got.device == plain.device, f"{at}: on {got.device}, the reference on {plain.device}"
            if not got.is_floating_point():
                assert torch.equal(got, plain), f"{at}: differs from the reference"
                continue
            kinds = (
                (torch.isnan, torch.isposinf, torch.isneginf)
                if self.op.nonfinite == "equal"
                else (torch.isfinite,)
            )
            for kind in kinds:
                wrong = kind(got) != kind(plain)
                assert not wrong.any(), f"{at}: {kind.__name__} differs from the reference at {_first(wrong)}"
            if not _counts(got):
                continue
            eps, floor = torch.finfo(got.dtype).eps, self.op.ulps / (2 if got.element_size() == 2 else 1)
            measures = zip(
                ("largest", "root mean square"), _errors(self.op, got, true), yardstick, strict=True
            )
            # Chance evens out over many different elements: there the mean needs a far smaller floor than the largest.
            for name, error, plain_error in list(measures)[: 2 if true.unique().numel() >= 1024 else 1]:
                allowed = 2 * plain_error + (floor if name == "largest" else floor / 128)
                assert error <= allowed * eps, (
                    f"{at}: {name} error {error / eps:.3g} eps, allowed {allowed:.3g} eps "
                    f"(plain torch makes {plain_error:.3g})"
                )


def _counts(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point() and t.numel() > 0


def _errors(op: Op, got: Tensor, true: Tensor) -> tuple[float, float]:
    """Largest and root mean square of |got - true| over what op.relative_to names, where both are finite."""
    got, true = got.detach(), true.detach()
    size = torch.where(torch.isfinite(true), true.abs(), 0.0)
    if op.relative_to == "row" and size.dim() > 0:
        size = size.amax(-1, keepdim=True)
    elif op.relative_to == "tensor":
        size = size.amax()
    error = (got.double() - true).abs() / size.clamp_min(torch.finfo(got.dtype).tiny)
    error = torch.where(torch.isfinite(got) & torch.isfinite(true), error, 0.0)
    return error.amax().item(), error.square().mean().sqrt().item()


def assert_value(op: Op, actual: Any, sample: Sample, what: str = "value") -> None:
    with torch.no_grad():
        Oracle(op, sample, lambda s: s.call(op.reference)).check(actual, what)


def bits(value: Any) -> list[bytes]:
    """Every output as its bytes: equal means equal to the last bit, NaN and signed zeros included."""
    return [_bytes(torch.empty(t.shape, dtype=t.dtype).copy_(t.detach())) for t in _tensors(value)]


def cotangents(outputs: Any, layout: str = "contiguous") -> list[Tensor]:
    """A gradient for each differentiable output, the same for float64 and the dtype under test."""
    return [
        lay_out(randn(*t.shape, device=t.device, dtype=t.dtype, requires_grad=False, seed=97 + i), layout)
        for i, t in enumerate(_differentiable(outputs))
    ]


def gradients(fn: Callable[..., Any], sample: Sample, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    inputs = [sample.tensors[i] for i in sample.differentiable]
    outputs = _differentiable(sample.call(fn))
    grads = [g.to(t.dtype) for g, t in zip(grads, outputs, strict=True)]
    return torch.autograd.grad(outputs, inputs, grads, allow_unused=True, materialize_grads=True)


def assert_gradients(
    op: Op,
    sample: Sample,
    actual: Any = None,
    *,
    grads: Sequence[Tensor] | None = None,
    what: str = "gradient",
) -> None:
    """The gradients of op.public, or the given ones, against those of the reference."""
    grads = cotangents(sample.call(op.public)) if grads is None else grads
    actual = gradients(op.public, sample, grads) if actual is None else actual
    Oracle(op, sample, lambda s: gradients(op.reference, s, grads)).check(actual, what)


# ------------------------------------------------------------------------------------------------ checks


def check_samples(op: Op) -> None:
    """The samples themselves reach the corners that kernels get wrong."""
    samples = samples_of(op, "cpu", op.dtypes[0])
    names = [s.name for s in samples]
    assert len(names) == len(set(names)), f"{op.name}: two samples have one name: {names}"
    for dtype in op.dtypes:
        assert [s.name for s in samples_of(op, "cpu", dtype)] == names, (
            f"{op.name}: other samples for {dtype}"
        )
    unknown = {n for n in op.skip if n.split("/")[0] not in CHECKS and not n.startswith("samples:")}
    assert not unknown, f"{op.name}: skips {sorted(unknown)}, which no check is called"
    assert all(op.skip.values()), f"{op.name}: every skipped check needs its reason"
    kinds: dict[str, Callable[[Tensor], bool]] = {
        "empty": lambda t: t.numel() == 0,
        "size-1": lambda t: t.numel() == 1,
        "odd": lambda t: t.numel() > 8 and t.numel() % 8 != 0,
        "4-D": lambda t: t.dim() == 4,
        "large": lambda t: t.numel() >= LARGE,
    }
    for kind, fits in kinds.items():
        if f"samples:{kind}" not in op.skip:
            assert any(fits(t) for s in samples for t in s.tensors), (
                f"{op.name}: no sample with a tensor that is {kind}"
            )


def check_raw(op: Op) -> None:
    """Raw ops are private, have no Autograd kernel (5 to 15 us a call) and are all reached by the samples."""
    reached: set[str] = set()
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for sample in samples_of(op, device, op.dtypes[0]):
            reached |= {overload.name().split(".")[0] for overload, _, _ in raw_calls(op, sample)}
    for name in map(qualified, op.raw):
        assert name.split("::")[1].startswith("_"), f"{name}: a raw op's name starts with _"
        for key in ("Autograd", "AutogradCPU", "AutogradCUDA", "CompositeImplicitAutograd"):
            assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (
                f"{name} has a kernel for {key}"
            )
        assert name in reached, f"{name}: no sample of {op.name} reaches it (reached: {sorted(reached)})"


@check()
def check_value(op: Op, sample: Sample) -> None:
    fresh = sample.map(torch.clone)
    assert_value(op, fresh.call(op.public), sample)


@check(applies=lambda op, sample: bool(sample.differentiable))
def check_gradient(op: Op, sample: Sample) -> None:
    for layout in ("contiguous", "expanded", "sliced", "transposed"):
        fresh = sample.map(torch.clone)
        grads = cotangents(fresh.call(op.public), layout)
        assert_gradients(op, fresh, grads=grads, what=f"gradient for {layout} output gradients")
    if len(sample.differentiable) > 1:  # each input alone: a backward that computes only what is asked for
        for i in sample.differentiable:
            alone = sample.map(torch.clone)
            for j in sample.differentiable:
                alone.tensors[j].requires_grad_(i == j)
            assert_gradients(op, alone, what=f"gradient of tensor {i} alone")


@check(dtypes=(torch.float32, torch.bfloat16))
def check_layout(op: Op, sample: Sample) -> None:
    for layout in layouts_of(sample):
        laid = sample.map(lambda t, layout=layout: lay_out(t, layout))
        result = laid.call(op.public)
        assert_value(op, result, laid, f"{layout} input")
        if op.preserves_format:
            expected = torch.empty_like(laid.tensors[0]).stride()
            got = tree_leaves(result)[0].stride()
            assert got == expected, f"{layout} input: strides {got}, torch.empty_like has {expected}"
        if laid.differentiable:
            assert_gradients(op, laid, what=f"gradient for {layout} input")


@check(dtypes=(torch.float32, torch.bfloat16))
def check_untouched(op: Op, sample: Sample) -> None:
    """Neither forward nor backward writes to an input, nor to what lies around it, nor returns it."""
    for layout in layouts_of(sample):
        laid = sample.map(lambda t, layout=layout: lay_out(t, layout))
        before, versions = [_all_bytes(t) for t in laid.tensors], [t._version for t in laid.tensors]
        result = laid.call(op.public)
        starts = {t.untyped_storage().data_ptr() for t in laid.tensors if t.numel()}
        for t in _tensors(result):
            assert not t.numel() or t.untyped_storage().data_ptr() not in starts, (
                f"{layout}: the result aliases an input"
            )
        if laid.differentiable:
            gradients(op.public, laid, cotangents(result))
        assert [_all_bytes(t) for t in laid.tensors] == before, f"{layout}: the op wrote to its input"
        assert [t._version for t in laid.tensors] == versions, f"{layout}: the input's version counter moved"


@check(applies=lambda op, sample: sample.numel > 0)
def check_nonfinite(op: Op, sample: Sample) -> None:
    """NaN and the infinities come out where the reference gives them and, unless they only spread, alike."""
    for i, t in enumerate(sample.tensors):
        if not t.is_floating_point() or not t.numel():
            continue
        for special in (math.nan, math.inf, -math.inf):
            spoiled = _spoil(sample, i, special)
            assert_value(op, spoiled.call(op.public), spoiled, f"{special} in tensor {i}")


@check()
def check_deterministic(op: Op, sample: Sample) -> None:
    """The same bits from every run and from every number of threads, forward and backward."""
    fresh = sample.map(torch.clone)
    grads = cotangents(fresh.call(op.public)) if fresh.differentiable else []

    def run() -> list[bytes]:
        value = bits(fresh.call(op.public))
        return value + (bits(gradients(op.public, fresh, grads)) if fresh.differentiable else [])

    first = run()
    for _ in range(2):
        assert run() == first, "two runs differ"
    if fresh.device.type == "cpu":
        threads = torch.get_num_threads()
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                assert run() == first, f"{n} threads differ from {threads}"
        finally:
            torch.set_num_threads(threads)


@check(devices=("cpu",))
def check_isa(op: Op, sample: Sample) -> None:
    """Every instruction set that this machine has gives a right value and gradient."""
    for level in op.isa():
        with level as name:
            assert_value(op, sample.map(torch.clone).call(op.public), sample, f"CPU ISA {name}")
            if sample.differentiable:
                assert_gradients(op, sample.map(torch.clone), what=f"gradient on CPU ISA {name}")


@check(
    devices=("cpu",), applies=lambda op, sample: op.emulated is not None and sample.numel <= EMULATION_LIMIT
)
def check_emulated(op: Op, sample: Sample) -> None:
    """The public function with its raw ops run by the CUDA kernels on the emulator: value and gradient."""
    assert op.emulated is not None
    kernels = {qualified(name): kernel for name, kernel in op.emulated().items()}
    ran = set()

    class Emulate(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.name().split(".")[0]
            if name not in kernels:
                return func(*args, **(kwargs or {}))
            ran.add(name)
            return kernels[name](*args, **(kwargs or {}))

    for layout in ("contiguous", "offset", "transposed"):
        laid = sample.map(lambda t, layout=layout: lay_out(t, layout))
        with Emulate():
            value = laid.call(op.public)
            grads = cotangents(value) if laid.differentiable else []
            slopes = gradients(op.public, laid, grads) if laid.differentiable else None
            with torch.no_grad():  # an op may leave derivatives to plain torch
                plain = laid.call(op.public)
        assert_value(op, value, laid, f"emulated, {layout}")
        assert_value(op, plain, laid, f"emulated without grad, {layout}")
        if slopes is not None:
            assert_gradients(op, laid, slopes, grads=grads, what=f"emulated gradient, {layout}")
    for i, t in enumerate(sample.tensors):
        if t.is_floating_point() and t.numel():
            for special in (math.nan, math.inf):
                spoiled = _spoil(sample, i, special)
                with Emulate(), torch.no_grad():
                    value = spoiled.call(op.public)
                assert_value(op, value, spoiled, f"emulated, {special} in tensor {i}")
    assert ran, "no raw op was emulated"


@check(
    dtypes=(torch.float64,),
    applies=lambda op, sample: bool(sample.differentiable) and 0 < sample.numel <= GRADCHECK_LIMIT,
)
def check_gradcheck(op: Op, sample: Sample) -> None:
    """First and second derivatives against finite differences."""
    fn, inputs = _differentiable_function(op, sample.map(torch.clone))
    fast = sample.numel > 32  # a random projection of the Jacobian instead of all of it
    torch.autograd.gradcheck(
        fn, inputs, fast_mode=fast, check_forward_ad=op.forward_ad, check_batched_grad=not fast
    )
    torch.autograd.gradgradcheck(fn, inputs, fast_mode=fast or sample.numel > 8)


@check(dtypes=(torch.float32, torch.bfloat16), applies=lambda op, sample: bool(op.raw))
def check_opcheck(op: Op, sample: Sample) -> None:
    """torch.library.opcheck of each raw call that the public function makes on this sample."""
    seen = set()
    for overload, args, kwargs in raw_calls(op, sample.map(torch.clone)):
        key = (
            overload.name(),
            str([(tuple(a.shape), a.stride()) if isinstance(a, Tensor) else a for a in args]),
        )
        if key not in seen:
            seen.add(key)
            try:
                torch.library.opcheck(overload, args, kwargs)
            except Exception as error:  # opcheck raises many kinds; all of them mean that the op is not right
                raise AssertionError(f"opcheck of {overload.name()}: {error}") from error


@check(dtypes=(torch.float32,))
def check_meta(op: Op, sample: Sample) -> None:
    """On the meta device: shape, strides and dtype of the real result, and no data."""
    real = _tensors(sample.map(torch.clone).call(op.public))
    meta = _tensors(sample.map(lambda t: t.to("meta")).call(op.public))
    assert len(real) == len(meta), f"meta: {len(meta)} outputs instead of {len(real)}"
    for r, m in zip(real, meta, strict=True):
        got, expected = (
            (m.device.type, m.dtype, tuple(m.shape), m.stride()),
            ("meta", r.dtype, tuple(r.shape), r.stride()),
        )
        assert got == expected, f"meta: {got}, expected {expected}"


def _chosen(op: Op, sample: Sample) -> bool:
    return sample.name in (op.inductor or (samples_of(op, "cpu", op.dtypes[0])[0].name,))


@check(
    dtypes=(torch.float32, torch.bfloat16),
    applies=lambda op, sample: (
        all(t.dtype is not torch.bfloat16 for t in sample.tensors) or _chosen(op, sample)
    ),
)
def check_compile(op: Op, sample: Sample) -> None:
    """torch.compile traces the op whole, for any size, forward and backward."""
    _check_compiled(op, sample, "aot_eager")


@check(dtypes=(torch.float32,), applies=_chosen)
def check_inductor(op: Op, sample: Sample) -> None:
    _check_compiled(op, sample, "inductor")


def _check_compiled(op: Op, sample: Sample, backend: str) -> None:
    torch._dynamo.reset()
    fresh = sample.map(torch.clone)
    compiled = torch.compile(
        lambda *tensors: sample.call(op.public, tensors), backend=backend, fullgraph=True, dynamic=True
    )
    fn = lambda *_args, **_kwargs: compiled(*fresh.tensors)  # noqa: E731
    try:
        result = fresh.call(fn)
        assert_value(op, result, sample, f"compiled by {backend}")
        if fresh.differentiable:
            grads = cotangents(result)
            slopes = gradients(fn, fresh, grads)
            assert_gradients(
                op, sample.map(torch.clone), slopes, grads=grads, what=f"gradient compiled by {backend}"
            )
        with torch.no_grad():
            assert_value(op, fresh.call(fn), sample, f"compiled by {backend} without grad")
    finally:
        torch._dynamo.reset()


@check(dtypes=(torch.float32,))
def check_export(op: Op, sample: Sample) -> None:
    class Call(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return sample.call(op.public, tensors)

    tensors = tuple(t.detach().clone() for t in sample.tensors)
    program = torch.export.export(Call(), tensors)
    assert_value(op, program.module()(*tensors), sample, "exported")


@check(dtypes=(torch.float32, torch.bfloat16))
def check_autocast(op: Op, sample: Sample) -> None:
    """Under autocast the op does what its policy says, and gradients have the dtype of their inputs."""
    assert op.autocast in ("keep", "float32", "lower"), f"{op.name}: no such autocast policy: {op.autocast}"
    lower = torch.float16 if sample.device.type == "cuda" else torch.bfloat16
    target = {"keep": None, "float32": torch.float32, "lower": lower}[op.autocast]
    cast = sample if target is None else sample.map(lambda t: t.to(target) if t.is_floating_point() else t)
    fresh = sample.map(torch.clone)
    with torch.autocast(sample.device.type, dtype=lower):
        result = fresh.call(op.public)
    expected = cast.map(torch.clone).call(op.public)
    for got, want in zip(_tensors(result), _tensors(expected), strict=True):
        assert got.dtype == want.dtype, f"autocast policy {op.autocast}: {got.dtype}, expected {want.dtype}"
    assert bits(result) == bits(expected), f"autocast policy {op.autocast}: not the value of the cast inputs"
    for outputs in (_differentiable(result),):
        for i, g in zip(fresh.differentiable, _grad(outputs, fresh), strict=True):
            assert g is None or g.dtype == fresh.tensors[i].dtype, f"gradient of tensor {i} is {g.dtype}"


@check(
    dtypes=(torch.float32,), applies=lambda op, sample: bool(sample.differentiable) and sample.numel < LARGE
)
def check_vmap(op: Op, sample: Sample) -> None:
    """torch.func.vmap of the op and its gradient, over the first and last dimension, all tensors and each."""
    count = 3
    grads = cotangents(sample.call(op.public))

    def gradient(*tensors: Tensor) -> Any:
        def loss(*inner: Tensor) -> Tensor:
            outputs = [o for o in _tensors(sample.call(op.public, inner)) if o.is_floating_point()]
            return sum((o * g).sum() for o, g in zip(outputs, grads, strict=True))  # type: ignore[return-value]

        return torch.func.grad(loss, argnums=tuple(sample.differentiable))(*tensors)

    chosen = [tuple(sample.differentiable)]
    if len(sample.differentiable) > 1:
        chosen += [(i,) for i in sample.differentiable]
    for batched in chosen:
        for where in (0, -1):
            stacks = [
                torch.stack([_varied(t, b) for b in range(count)], where)
                if i in batched
                else t.detach().clone()
                for i, t in enumerate(sample.tensors)
            ]
            dims = tuple(where if i in batched else None for i in range(len(stacks)))
            what = f"vmap of tensors {batched} over dimension {where}"
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*performance drop.*batching rule.*")
                try:
                    values = torch.func.vmap(lambda *t: sample.call(op.public, t), in_dims=dims)(*stacks)
                    slopes = torch.func.vmap(gradient, in_dims=dims)(*stacks)
                except UserWarning as error:
                    raise AssertionError(f"{what}: falls back to a loop: {error}") from error
            for b in range(count):
                one = sample.map(torch.clone)
                one.tensors = [
                    _leaf(_varied(t, b) if i in batched else t.detach().clone(), t.requires_grad)
                    for i, t in enumerate(sample.tensors)
                ]
                assert_value(op, [t[b] for t in _tensors(values)], one, what)
                assert_gradients(
                    op, one, [t[b] for t in _tensors(slopes)], grads=grads, what=f"gradient in {what}"
                )


@check(dtypes=(torch.float32,), applies=lambda op, sample: op.forward_ad and bool(sample.differentiable))
def check_jvp(op: Op, sample: Sample) -> None:
    """torch.func.jvp: the directional derivative that the reference has."""
    where = sample.differentiable

    def derivative(fn: Callable[..., Any], at: Sample) -> Any:
        def of(*inputs: Tensor) -> Any:
            tensors = [t.detach() for t in at.tensors]
            for i, t in zip(where, inputs, strict=True):
                tensors[i] = t
            return at.call(fn, tensors)

        primals = [at.tensors[i].detach() for i in where]
        tangents = [
            randn(*p.shape, device=p.device, dtype=sample.dtype, requires_grad=False, seed=31)
            for p in primals
        ]
        return torch.func.jvp(
            of, tuple(primals), tuple(t.to(p.dtype) for t, p in zip(tangents, primals, strict=True))
        )[1]

    Oracle(op, sample, lambda s: derivative(op.reference, s)).check(derivative(op.public, sample), "jvp")


@check(applies=lambda op, sample: op.out)
def check_out(op: Op, sample: Sample) -> None:
    """out= of any layout receives the value, nothing around it does; what cannot hold it is refused."""
    plain = sample.map(torch.clone)
    for t in plain.tensors:
        t.requires_grad_(False)
    value = plain.call(op.public)
    for layout in LAYOUTS:
        fits, make = LAYOUTS[layout]
        if not fits(value) or layout in ("expanded", "negated"):
            continue
        out = make(torch.full_like(value, 55))
        around = _outside(out)
        assert plain.call(op.public, out=out) is out, f"{layout} out: another tensor is returned"
        assert bits(out) == bits(value), f"{layout} out: not the value without out"
        assert torch.equal(_outside(out), around), f"{layout} out: written outside of it"
    refused: dict[str, Tensor] = {
        "another shape": value.new_empty((*value.shape, 2)),
        "another dtype": value.to(torch.int32),
        "a leaf that requires grad": value.clone().requires_grad_(),
    }
    if value.dim() and value.shape[0] > 1 and value.numel():
        refused["an expanded tensor"] = value[:1].clone().expand_as(value)
    if value.numel() > 1 and value.shape == plain.tensors[0].shape and value.dtype == plain.dtype:
        room = torch.cat([plain.tensors[0].flatten(), plain.tensors[0].flatten()[:1]])
        plain.tensors[0] = room[:-1].view(value.shape)
        refused["one that overlaps the input"] = room[1:].view(value.shape)
    before = [_all_bytes(t) for t in plain.tensors]
    for kind, out in refused.items():
        _refused(lambda out=out: plain.call(op.public, out=out), "out", f"out that is {kind}")
        assert [_all_bytes(t) for t in plain.tensors] == before, (
            f"out that is {kind}: the input was written to"
        )


@check(applies=lambda op, sample: op.inplace and bool(sample.differentiable))
def check_inplace(op: Op, sample: Sample) -> None:
    """inplace=True gives the same bits in the input's memory, tells autograd, refuses what it would ruin."""
    for layout in layouts_of(sample):
        laid = sample.map(lambda t, layout=layout: lay_out(t, layout))
        first = laid.tensors[0]
        if not LAYOUTS[layout][0](first):
            continue
        if layout == "expanded":
            with torch.no_grad():
                _refused(lambda laid=laid: laid.call(op.public, inplace=True), "inplace", "an expanded input")
            continue
        with torch.no_grad():
            value, around, version = laid.call(op.public), _outside(first), first._version
            result = laid.call(op.public, inplace=True)
        where = (result.data_ptr(), result.stride())
        assert where == (first.data_ptr(), first.stride()), f"{layout}: not in place"
        assert bits(first) == bits(value), f"{layout}: another value in place"
        assert torch.equal(_outside(first), around), f"{layout}: written outside of the input"
        assert first._version > version, f"{layout}: the version counter did not move"

    leaf = sample.map(torch.clone)
    before = _all_bytes(leaf.tensors[0])
    _refused(lambda: leaf.call(op.public, inplace=True), "inplace", "a leaf that requires grad")
    assert _all_bytes(leaf.tensors[0]) == before, "the refused leaf was written to"

    # What is overwritten cannot serve the gradient of another input: only the first tensor's is promised.
    alone = sample.map(torch.clone)
    for t in alone.tensors[1:]:
        t.requires_grad_(False)
    if not alone.differentiable:
        return
    grads = cotangents(alone.call(op.public))
    inner = lambda x, *args, **kwargs: op.public(x * 1, *args, inplace=True, **kwargs)  # noqa: E731
    slopes = gradients(inner, alone, grads)
    assert_gradients(op, alone, slopes, grads=grads, what="gradient through inplace")

    if alone.tensors[0].numel():  # an earlier op that needs the overwritten value has to notice
        middle = alone.tensors[0] * 1
        square = middle * middle
        sample.call(op.public, [middle, *alone.tensors[1:]], inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.sum().backward()


# ------------------------------------------------------------------------------------------------ coverage


# Operators that compute nothing for a user, each with the test that holds it instead.
INFRASTRUCTURE: dict[str, str] = {
    "torchlin::_cpu_isa": "says which CPU level runs; check_isa uses it",
    "torchlin::_cpu_isa_names": "says which CPU levels there are; check_isa uses it",
    "torchlin::_set_cpu_isa": "chooses the CPU level; check_isa uses it",
    "torchlin::_activation_load": "loads kernels that were compiled at run time; test_activation_formula.py",
    "torchlin::_huge_pages": "says from what size on outputs lie in huge pages; test_activation_engine.py",
    "torchlin::_set_huge_pages": "chooses that size; test_activation_engine.py",
    "torchlin::_plane_cells": "integrals that make grids; test_quant_grids.py",
    "torchlin::_plane_search": "the solver of grids in the plane; test_quant_grids.py",
    "torchlin::_sample_cells": "a step of the solver of grids; test_quant_grids.py",
    "torchlin::_bench_arithmetic": "a ceiling of the machine; test_benchmarks.py",
    "torchlin::_bench_copy": "a ceiling of the machine; test_benchmarks.py",
    "torchlin::_bench_cycles": "a ceiling of the machine; test_benchmarks.py",
}


def families() -> list[Op]:
    """The ops of every tests/test_*.py that uses the battery."""
    ops: list[Op] = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if "battery.tests(" in path.read_text() and path.stem != "test_battery":
            module = importlib.import_module(path.stem)
            for value in vars(module).values():
                ops += getattr(value, "ops", ()) if callable(value) else ()
    return ops


def uncovered(ops: Sequence[Op], registered: Iterable[str], names: Iterable[tuple[str, str]]) -> list[str]:
    """What is registered and neither covered nor excused, and what is one of these but not registered."""
    registered, names = set(registered), set(names)
    covered = {qualified(raw) for op in ops for raw in op.raw}
    named = {tuple(name) for op in ops for name in op.names}
    problems = [
        f"operator {name} has no samples" for name in sorted(registered - covered - set(INFRASTRUCTURE))
    ]
    problems += [f"operator {name} is covered but not registered" for name in sorted(covered - registered)]
    problems += [
        f"operator {name} is excused but not registered" for name in sorted(set(INFRASTRUCTURE) - registered)
    ]
    problems += [f"{kind} {name!r} has no samples" for kind, name in sorted(names - named)]
    problems += [f"{kind} {name!r} is covered but not registered" for kind, name in sorted(named - names)]
    return problems


def registered_ops(namespace: str = "torchlin") -> list[str]:
    return sorted(
        {n.split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith(f"{namespace}::")}
    )


def qualified(raw: str) -> str:
    return raw if "::" in raw else f"torchlin::{raw}"


# ------------------------------------------------------------------------------------------------ helpers


def cpu_isa_levels() -> Iterator[contextlib.AbstractContextManager[str]]:
    """A context for each CPU level that this machine and this build have."""

    @contextlib.contextmanager
    def at(level: str) -> Iterator[str]:
        before = torch.ops.torchlin._cpu_isa()
        torch.ops.torchlin._set_cpu_isa(level)
        try:
            yield level
        finally:
            torch.ops.torchlin._set_cpu_isa(before)

    return map(at, available_isa_levels())


@cache
def available_isa_levels() -> tuple[str, ...]:
    if not hasattr(torch.ops.torchlin, "_set_cpu_isa"):
        return ()
    return tuple(torch.ops.torchlin._cpu_isa_names().split(","))


def raw_calls(op: Op, sample: Sample) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The raw operators that the public function runs: forward, backward, into out and in place."""
    wanted = set(map(qualified, op.raw))
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.name().split(".")[0] in wanted:
                copy = lambda a: a.detach().clone() if isinstance(a, Tensor) else a  # noqa: E731
                calls.append((func, tuple(map(copy, args)), {k: copy(v) for k, v in (kwargs or {}).items()}))
            return func(*args, **(kwargs or {}))

    with Record():
        result = sample.call(op.public)
        if sample.differentiable:
            gradients(op.public, sample, cotangents(result))
        with torch.no_grad():
            sample.call(op.public)
            if op.out:
                sample.call(op.public, out=torch.empty_like(result))
            if op.inplace:
                sample.map(torch.clone).call(op.public, inplace=True)
    return calls


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _leaf(t: Tensor, requires_grad: bool) -> Tensor:
    return t.requires_grad_(requires_grad and t.is_floating_point())


def _fresh(value: Any) -> Any:
    """A generator is copied for each call: every run of a stochastic op draws the same numbers."""
    if not isinstance(value, torch.Generator):
        return value
    twin = torch.Generator(value.device)
    twin.set_state(value.get_state())
    return twin


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _differentiable(outputs: Any) -> list[Tensor]:
    return [t for t in _tensors(outputs) if t.requires_grad]


def _grad(outputs: list[Tensor], sample: Sample) -> Sequence[Tensor | None]:
    inputs = [sample.tensors[i] for i in sample.differentiable]
    return (
        torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs], allow_unused=True)
        if inputs
        else ()
    )


def _differentiable_function(op: Op, sample: Sample) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    where = sample.differentiable
    outputs = [i for i, t in enumerate(_tensors(sample.call(op.public))) if t.requires_grad]

    def fn(*inputs: Tensor) -> Any:
        tensors = list(sample.tensors)
        for i, t in zip(where, inputs, strict=True):
            tensors[i] = t
        result = _tensors(sample.call(op.public, tensors))
        return tuple(result[i] for i in outputs) if len(outputs) > 1 else result[outputs[0]]

    return fn, tuple(sample.tensors[i] for i in where)


def _spoil(sample: Sample, i: int, special: float) -> Sample:
    """The sample with one element of its i-th tensor replaced."""
    spoiled = sample.map(torch.clone)
    with torch.no_grad():
        spoiled.tensors[i].view(-1)[spoiled.tensors[i].numel() // 2] = special
    return spoiled


def _varied(t: Tensor, b: int) -> Tensor:
    """Another tensor of the same values in another order, so that any domain is kept."""
    t = t.detach().clone()
    return t.roll(b, 0) if t.dim() else t


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())


def _bytes(t: Tensor) -> bytes:
    return t.view(-1).view(torch.uint8).numpy().tobytes()


def _all_bytes(t: Tensor) -> bytes:
    """The whole storage: the tensor and what lies around it."""
    return _bytes(torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.detach().untyped_storage()).cpu())


def _outside(t: Tensor) -> Tensor:
    """The storage's elements that are not the tensor's."""
    plain = torch._neg_view(t.detach()) if t.is_neg() else t.detach()
    size = plain.untyped_storage().nbytes() // plain.element_size()
    inside = torch.zeros(size, dtype=torch.bool, device=plain.device)
    inside.as_strided(plain.shape, plain.stride(), plain.storage_offset()).fill_(True)
    return plain.as_strided((size,), (1,), 0)[~inside].clone()


def _refused(call: Callable[[], Any], argument: str, what: str) -> None:
    refusal: Exception | None = None
    try:
        call()
    except (ValueError, TypeError) as error:
        refusal = error
    assert refusal is not None, f"{what} was not refused"
    assert argument in str(refusal), f"{what}: the error does not name {argument}: {refusal}"
