"""How a composed activation is called: its parameters found in the catalogue, checked, and one rounding at the end."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchlin.catalogue import Activation, find
from torchlin.ops._checks import check_dim, check_float_tensor, compute_dtype
from torchlin.ops.activation_forms import _number_parameter, traced_constant

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {}
_options: dict[str, dict[str, Any]] = {}

_COMPLEX = {
    torch.complex32: torch.complex64,
    torch.complex64: torch.complex64,
    torch.complex128: torch.complex128,
}
_CONTEXT = ("training", "generator", "channel_dim")


def implementation(
    *, widen: bool = True, along: bool = False, complex_: bool = False, sizes: tuple[str, ...] = ()
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Enters a function f(x, *, ...) in IMPLEMENTATIONS, under its name.

    What is entered is called as f(x, activation=name, training=..., generator=..., channel_dim=..., **parameters): the
    parameters that the catalogue gives the name take their defaults from there, all others are options of f.

    Args:
        widen: f computes in float32 if x has 16 bits; False for a function that rounds nothing, or once by itself.
        along: f works along the dimension `dim`, -1 by default; it is never called for one of size 0.
        complex_: f is of complex numbers.
        sizes: parameters of the catalogue that are sizes of the weights: a module's, not the function's.
    """

    def enter(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        takes = {
            key: p.default
            for key, p in inspect.signature(function).parameters.items()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }
        context = tuple(key for key in _CONTEXT if key in takes)
        options = tuple(key for key in takes if key not in _CONTEXT)
        needed = tuple(key for key in options if takes[key] is inspect.Parameter.empty)

        @functools.wraps(function)
        def call(
            x: Tensor,
            *,
            activation: Activation | str,
            training: bool = False,
            generator: torch.Generator | None = None,
            channel_dim: int = 1,
            **given: Any,
        ) -> Tensor:
            name = activation if isinstance(activation, str) else activation.name
            dtype = _check_complex(x) if complex_ else _check_real(x)
            if along:
                given["dim"] = check_dim("dim", given.get("dim", -1), x.dim())
            values = _parameters(name, options, needed, sizes, given)
            around = {"training": training, "generator": generator, "channel_dim": channel_dim}
            for key in context:
                values[key] = around[key]
            if along and x.shape[values["dim"]] == 0:
                return x.clone()
            return function(x.to(dtype) if widen else x, **values).to(x.dtype)

        IMPLEMENTATIONS[function.__name__] = call
        _options[function.__name__] = {key: takes[key] for key in options} | ({"dim": -1} if along else {})
        return call

    return enter


def options(name: str) -> dict[str, Any]:
    """Of a composed activation: the arguments that are no parameters of the catalogue, and their defaults."""
    row = find(name)
    assert row.implementation is not None
    return {k: v for k, v in _options[row.implementation].items() if k not in row.parameters}


def _check_real(x: Tensor) -> torch.dtype:
    check_float_tensor("x", x)
    return compute_dtype(x.dtype)


def _check_complex(x: Tensor) -> torch.dtype:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _COMPLEX:
        raise TypeError(f"x must be complex, got {x.dtype}: torch.view_as_complex makes pairs of numbers so")
    return _COMPLEX[x.dtype]


@traced_constant
def _row(name: str) -> tuple[tuple[tuple[str, Any], ...], tuple[tuple[str, str], ...]]:
    """The defaults of a name's parameters, and the other words for them."""
    row = find(name)
    words = tuple((word, p.name) for p in row.parameters.values() for word in p.words)
    return tuple(row.defaults().items()), words


def _parameters(
    name: str,
    options: tuple[str, ...],
    needed: tuple[str, ...],
    sizes: tuple[str, ...],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    defaults, words = _row(name)
    values = {key: value for key, value in defaults if key not in sizes}
    own = tuple(values)
    known = dict(words)
    for word, value in given.items():
        key = known.get(word, word)
        if key in sizes:
            raise TypeError(
                f"{key} of {name} is a size of its weights: pass the weights, or give {key} to the module, "
                f"torchlin.create('activation', {name!r}, ...)"
            )
        if key in own:
            value = value if isinstance(value, Tensor) else _number_parameter(name, key, value)
        elif key not in options:
            allowed = ", ".join(dict.fromkeys((*own, *options))) or "none"
            raise TypeError(f"{name} has no argument {word!r}; its arguments: {allowed}")
        values[key] = value
    if missing := [key for key in needed if key not in values]:
        raise TypeError(
            f"{name} needs {', '.join(missing)}: pass the weights, or use the module that owns them, "
            f"torchlin.create('activation', {name!r}, ...)"
        )
    return values


# ------------------------------------------------------------------------------------------------------ helpers


def whole(name: str, value: Any, least: int = 1) -> int:
    """A count, which the catalogue holds as a float."""
    if isinstance(value, Tensor) or value != int(value):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {int(value)}")
    return int(value)


def scalar(name: str, value: Any, x: Tensor) -> Any:
    """A number, or a tensor: of one value, or one that broadcasts with x."""
    if not isinstance(value, Tensor):
        return value
    check_parameter(name, value, x)
    return value.to(x.dtype).reshape(()) if value.numel() == 1 else value.to(x.dtype)


def per_channel(name: str, value: Any, x: Tensor, channel_dim: int) -> Any:
    """A parameter that broadcasts with x: a number, or a tensor of one value or of one for each channel."""
    if not isinstance(value, Tensor):
        return value
    check_parameter(name, value, x)
    value = value.to(x.real.dtype)
    if value.numel() == 1:
        return value.reshape(())
    return value.view(channel_shape(name, value, x, channel_dim))


def channel_shape(name: str, value: Tensor, x: Tensor, channel_dim: int) -> list[int]:
    """The shape in which a tensor [channels] broadcasts with x."""
    channel_dim = check_dim("channel_dim", channel_dim, x.dim())
    channels = x.shape[channel_dim]
    if value.shape != (channels,):
        raise ValueError(
            f"{name} must have shape ({channels},), a value for each channel (dimension {channel_dim} of x), "
            f"got {tuple(value.shape)}"
        )
    return [channels if d == channel_dim else 1 for d in range(x.dim())]


def check_parameter(name: str, value: Tensor, x: Tensor) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{name} must hold floating-point numbers, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {value.device}")


def largest(x: Tensor, dim: int, least: float = 0.0) -> Tensor:
    """The largest magnitude along dim, at least `least`, without history: what a scale-free function may divide by."""
    return x.detach().abs().amax(dim, keepdim=True).clamp(min=least)
