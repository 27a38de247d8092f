"""What computes a name of the catalogue: its kernel, the numbers in the kernel's slots, its noise, its reference.

A name is a kernel, which computes element by element, and a few numbers that fill the kernel's slots: expressions in
the name's parameters. The gradients of the kernel by its slots, carried on by autograd through these expressions, are
the gradients of the parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchlin.catalogue import find
from torchlin.catalogue.formula import evaluate
from torchlin.catalogue.kernels import devices, nonnegative, plan, with_id, with_named_slots
from torchlin.catalogue.program import Program, program, run, value_of
from torchlin.catalogue.rewrite import simplify
from torchlin.catalogue.torch_code import guarded
from torchlin.ops._checks import compute_dtype
from torchlin.ops.hadamard import make_constant

_caches: list[Any] = []
_Function = TypeVar("_Function", bound=Callable[..., Any])


def traced_constant(function: _Function) -> _Function:
    """Remembers results; torch.compile calls the function while tracing and takes the result as a constant."""
    cached = functools.lru_cache(maxsize=4096)(function)
    _caches.append(cached)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return cached(*args)

    # torch.compiler.assume_constant_result, without its import of the whole compiler.
    call._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


@dataclass(frozen=True)
class Form:
    """What computes a name, in training or in evaluation. Plain data only: a traced graph holds it as a constant."""

    name: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    words: tuple[tuple[str, str], ...]  # by what else a parameter is called, and its name
    defaults: tuple[float | tuple[float, ...], ...]
    # Name, distribution, arguments, and the vector it is like or "".
    noises: tuple[tuple[str, str, Program, str], ...]
    reference: Program
    kernel: int  # 0 where there is none
    devices: tuple[str, ...]  # types of devices that have it
    slots: Program
    vectors: tuple[bool, ...]  # which slots are coefficient vectors


@traced_constant
def form_of(name: str, training: bool) -> Form:
    row = find(name)
    graph = row.graph if training else row.eval_graph
    assert graph is not None
    noises = row.noises.values() if training else ()
    planned = plan(row.name, training)
    return Form(
        name=row.name,
        inputs=(*row.inputs, *(n.name for n in noises if not n.like)),
        parameters=tuple(row.parameters),
        words=tuple((word, p.name) for p in row.parameters.values() for word in p.words),
        defaults=tuple(row.defaults().values()),
        noises=tuple((n.name, n.distribution, program(*n.arguments), n.like or "") for n in noises),
        reference=program(guarded(simplify(graph, nonnegative(row)))),
        kernel=planned.kernel.id if planned else 0,
        devices=devices(planned.kernel) if planned else (),
        slots=program(*planned.slots) if planned else ((), ()),
        vectors=planned.kernel.vector_slots if planned else (),
    )


@traced_constant
def kind_of(name: str) -> tuple[str, str, int, str]:
    """Canonical name, implementation or "", how many tensors the function is of, and which is a gate, or ""."""
    row = find(name)
    return row.name, row.implementation or "", len(row.inputs), row.gate or ""


@traced_constant
def kernel_reference(kernel: int) -> tuple[tuple[str, ...], Program]:
    """Inputs and body of a kernel; slot i is the parameter p{i}."""
    found = with_id(kernel)
    return found.inputs, program(guarded(with_named_slots(found.body)))


@traced_constant
def _host_slots(
    name: str, training: bool, items: tuple[tuple[str, Any], ...]
) -> tuple[tuple[float, ...], ...]:
    """The slots' values, one tuple a slot, in double precision."""
    planned = plan(find(name).name, training)
    assert planned is not None
    values = dict(items)
    return tuple(
        tuple(v) if isinstance(v := evaluate(slot, values), list) else (v,) for slot in planned.slots
    )


@traced_constant
def keeps_slope(name: str, items: tuple[tuple[str, Any], ...]) -> bool:
    """Whether f'(f(x)) = f'(x): then the output tells the gradient, and the input may be overwritten."""
    return find(name).allows_inplace(dict(items))


def forget() -> None:
    """Drops what was derived from the catalogue."""
    for cache in _caches:
        cache.cache_clear()


# ------------------------------------------------------------------------------------------------------ parameters


@dataclass
class Call:
    """One call, checked: the form, and the parameters, by name, as numbers (tuples for vectors) or tensors of a value a
    channel (lists of such for vectors)."""

    form: Form
    training: bool
    values: dict[str, Any]
    items: tuple[tuple[str, Any], ...] | None  # the same where all of them are numbers
    channels: int  # values of the largest parameter
    # Slots of numbers, by dtype and device.
    constants: dict[Any, tuple[Tensor, Sequence[int]]] = field(default_factory=dict)


def prepare(
    name: str, training: bool, parameters: Mapping[str, Any], like: Tensor, generator: torch.Generator | None
) -> Call:
    """The parameters, checked; those that stay numbers are checked once."""
    # What a traced graph takes for numbers may be symbols: there they become tensors.
    traced = bool(parameters) and torch.compiler.is_compiling()
    items = None if traced else _plain_numbers(parameters)
    if items is not None:
        call = _number_call(name, training, items)
        if call.items is not None:
            return call
    form = form_of(name, training)
    values = _named_values(form, _filled(parameters, like) if traced else parameters)
    channels = 1
    for key, value in values.items():
        if isinstance(value, Tensor):
            is_vector = isinstance(form.defaults[form.parameters.index(key)], tuple)
            values[key], count = _tensor_parameter(key, value, is_vector, like)
            if count > 1 and channels > 1 and count != channels:
                raise ValueError(
                    f"{key} has {count} values for the channels, another parameter of {form.name} has {channels}"
                )
            channels = max(channels, count)
    for key, distribution, arguments, vector in form.noises:
        if vector:
            size, numbers = len(values[vector]), run(arguments, values, torch.float32)
            noise = _draw(distribution, numbers, (size,), like, generator)
            values[key] = list(noise.to(compute_dtype(like.dtype)).unsqueeze(-1).unbind(0))
    return Call(form, training, values, None, channels)


def _filled(parameters: Mapping[str, Any], like: Tensor) -> dict[str, Any]:
    """Numbers as tensors, of a value each."""
    filled: dict[str, Any] = {}
    for key, value in parameters.items():
        if isinstance(value, (list, tuple)):
            filled[key] = torch.stack(
                [torch.full((), v, dtype=compute_dtype(like.dtype), device=like.device) for v in value]
            )
        elif isinstance(value, Tensor):
            filled[key] = value
        else:
            filled[key] = torch.full((1,), value, dtype=compute_dtype(like.dtype), device=like.device)
    return filled


def _plain_numbers(parameters: Mapping[str, Any]) -> tuple[tuple[str, Any], ...] | None:
    """Parameters that are numbers, or sequences of numbers, in a form to remember; None if there are others."""
    items: list[tuple[str, Any]] = []
    for key, value in parameters.items():
        if isinstance(value, (list, tuple)):
            for element in value:
                if not isinstance(element, (int, float)) or isinstance(element, bool):
                    return None
            items.append((key, tuple(value)))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            items.append((key, value))
        else:
            return None
    return tuple(items)


@traced_constant
def _number_call(name: str, training: bool, items: tuple[tuple[str, Any], ...]) -> Call:
    form = form_of(name, training)
    values = _named_values(form, dict(items))
    drawn = any(like for *_, like in form.noises)  # a coefficient vector that changes with every call
    return Call(form, training, values, None if drawn else tuple(values.items()), 1)


def _named_values(form: Form, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters by name: defaults, numbers that came and were checked, tensors that came as they are."""
    values: dict[str, Any] = dict(zip(form.parameters, form.defaults, strict=True))
    words, given = dict(form.words), set()
    for word, value in parameters.items():
        key = words.get(word, word)
        if key not in values:
            known = ", ".join((*form.parameters, *words)) or "none"
            raise TypeError(f"{form.name} has no parameter {word!r}; its parameters: {known}")
        if key in given:
            raise TypeError(f"{form.name}: the parameter {key!r} came twice, as {word!r} too")
        given.add(key)
        values[key] = value if isinstance(value, Tensor) else _number_parameter(form.name, key, value)
    return values


def _tensor_parameter(key: str, value: Tensor, is_vector: bool, like: Tensor) -> tuple[Any, int]:
    """A tensor [channels], or a list of such for a coefficient vector, in the dtype of arithmetic; how many channels."""
    if not value.is_floating_point():
        raise TypeError(f"{key} must hold floating-point numbers, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{key} must be on x's device {like.device}, got {value.device}")
    value = value.to(compute_dtype(like.dtype))
    if is_vector:
        if value.dim() not in (1, 2) or value.shape[0] == 0:
            raise ValueError(
                f"{key} is a coefficient vector: it must be a tensor [length] or [length, channels], "
                f"got shape {tuple(value.shape)}"
            )
        rows = value.unsqueeze(-1) if value.dim() == 1 else value
        return list(rows.unbind(0)), rows.shape[1]
    if value.dim() > 1 or value.numel() == 0:
        raise ValueError(f"{key} must be a number or a tensor [channels], got shape {tuple(value.shape)}")
    return value.reshape(-1), value.numel()


def _number_parameter(name: str, key: str, value: Any) -> Any:
    if torch.compiler.is_compiling():  # a traced graph cannot look into the catalogue
        return tuple(value) if isinstance(value, (tuple, list)) else float(value)
    parameter = find(name).parameters[key]
    if parameter.is_vector:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
            raise TypeError(
                f"{key} of {name} is a coefficient vector: it must be a sequence of numbers or a tensor, got {value!r}"
            )
        value = tuple(_number(key, v) for v in value)
    else:
        value = _number(key, value)
    for v in value if isinstance(value, tuple) else (value,):
        if v not in parameter:
            raise ValueError(f"{key} of {name} must be in {parameter.domain}, got {v:g}")
    return value


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{key} must be a number or a tensor, got {value!r}")
    return float(value)


def _draw(
    distribution: str,
    arguments: list[Any],
    shape: Sequence[int],
    like: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    if distribution == "uniform":
        low, high = arguments
        return torch.rand(shape, generator=generator, **options) * (high - low) + low
    if distribution == "bernoulli":
        return (torch.rand(shape, generator=generator, **options) < arguments[0]).to(like.dtype)
    noise = torch.randn(shape, generator=generator, **options)
    if distribution == "half_normal":
        return noise.abs() * arguments[0]
    mean, std = arguments
    return noise * std + mean


def noise_inputs(call: Call, like: Tensor, generator: torch.Generator | None) -> list[Tensor]:
    """Noise for each element, of like's shape and dtype."""
    drawn = []
    for _, distribution, arguments, vector in call.form.noises:
        if not vector:
            values = run(arguments, call.values, torch.float32)
            drawn.append(_draw(distribution, values, like.shape, like, generator))
    return drawn


def slots_of(call: Call, like: Tensor) -> tuple[Tensor | None, Sequence[int]]:
    """What the host hands to the kernel: slots [R, C] in the dtype of arithmetic, and the rows of each."""
    form, dtype = call.form, compute_dtype(like.dtype)
    if not form.vectors:
        return None, ()
    if call.items is not None:
        if torch.compiler.is_compiling():
            # Made in the graph, of numbers: it has one place only for tensors that one function gave it.
            slots = _host_slots(form.name, call.training, call.items)
            filled = [torch.full((1,), v, dtype=dtype, device=like.device) for slot in slots for v in slot]
            return torch.stack(filled), [len(slot) for slot in slots]
        known = call.constants.get((dtype, like.device))
        if known is None:
            slots = _host_slots(form.name, call.training, call.items)
            numbers = [[v] for slot in slots for v in slot]
            made = make_constant(lambda: torch.tensor(numbers, dtype=dtype, device="cpu"), like.device)
            known = call.constants[(dtype, like.device)] = made, [len(slot) for slot in slots]
        return known
    rows: list[Tensor] = []
    sizes: list[int] = []
    values = {
        key: [torch.full((1,), v, dtype=dtype, device=like.device) for v in value]
        if isinstance(value, tuple)
        else value
        for key, value in call.values.items()
    }
    for slot in run(form.slots, values, dtype):
        elements = slot if isinstance(slot, list) else [slot]
        sizes.append(len(elements))
        for element in elements:
            row = (
                element
                if isinstance(element, Tensor)
                else torch.full((1,), element, dtype=dtype, device=like.device)
            )
            rows.append(row.expand(call.channels))
    return torch.stack(rows), sizes


def formula_reference(call: Call, inputs: Sequence[Tensor], channel_dim: int) -> Tensor:
    """The formula in plain torch, rounded once."""
    dtype = compute_dtype(inputs[0].dtype)
    shape = [1] * inputs[0].dim()
    if call.channels > 1:
        shape[channel_dim] = call.channels
    values: dict[str, Any] = {}
    for key, value in call.values.items():
        if isinstance(value, list):
            values[key] = [v.view(_shape(v, shape)) for v in value]
        else:
            values[key] = value.view(_shape(value, shape)) if isinstance(value, Tensor) else value
    for key, tensor in zip(call.form.inputs, inputs, strict=True):
        values[key] = tensor.to(dtype)
    y = value_of(call.form.reference, values, values[call.form.inputs[0]])
    return y.to(inputs[0].dtype)


def _shape(value: Tensor, shape: list[int]) -> list[int]:
    return shape if value.numel() > 1 else [1] * len(shape)


def unpacked(inputs: Sequence[Tensor], split: int, split_dim: int) -> Sequence[Tensor]:
    """The kernel's inputs, as views of what packs them."""
    if not split:
        return inputs
    packed = inputs[0]
    half = packed.shape[split_dim] // 2
    if split <= 2:
        first, second = packed.narrow(split_dim, 0, half), packed.narrow(split_dim, half, half)
    else:
        pairs = packed.unflatten(split_dim, (half, 2))
        first, second = pairs.select(split_dim + 1, 0), pairs.select(split_dim + 1, 1)
    pair = (second, first) if split in (2, 4) else (first, second)
    return [*pair, *inputs[1:]]


@traced_constant
def vector_slots(kernel: int) -> tuple[bool, ...]:
    """Which slots of a kernel are coefficient vectors."""
    return with_id(kernel).vector_slots
