"""Every activation of the catalogue as a module, with what it learns."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchlin import catalogue, registry
from torchlin.catalogue import Parameter
from torchlin.functional import activation, gated_activation
from torchlin.ops._composed import options
from torchlin.ops.activation_formula import defined

Value = float | Sequence[float] | Tensor


@dataclass(frozen=True)
class _Learnt:
    """A parameter that is learnt: where it is, and how it stays inside its domain."""

    key: str  # of the state_dict
    constraint: str | None
    low: float
    high: float

    def value(self, free: Tensor) -> Tensor:
        """The parameter, of what is stored. A function of it: writing into the stored one would not be traced."""
        if self.constraint is None:
            return free
        if self.constraint == "clamp":
            return free.clamp(self.low, self.high)
        free = free.to(torch.promote_types(free.dtype, torch.float32))
        if self.constraint == "sigmoid":
            return self.low + (self.high - self.low) * free.sigmoid()
        distance = free.exp() if self.constraint == "exp" else nn.functional.softplus(free)
        return self.low + distance if math.isfinite(self.low) else self.high - distance

    def free(self, value: float) -> float:
        """What is stored for a value inside the domain."""
        if self.constraint in (None, "clamp"):
            return value
        if self.constraint == "sigmoid":
            part = (value - self.low) / (self.high - self.low)
            return math.log(part) - math.log1p(-part)
        distance = value - self.low if math.isfinite(self.low) else self.high - value
        return math.log(distance) if self.constraint == "exp" else distance + math.log(-math.expm1(-distance))


def _constraint(p: Parameter) -> str | None:
    """The catalogue's, or for a parameter that it does not learn: what fits the domain."""
    low, high = math.isfinite(p.low), math.isfinite(p.high)
    if p.constraint or not (low or high):
        return p.constraint
    if low and high:
        return "sigmoid" if p.open_low or p.open_high else "clamp"
    return "softplus" if (p.open_low if low else p.open_high) else "clamp"


class _Named(nn.Module):
    """What both modules share: the name and its parameters, fixed and learnt."""

    def __init__(
        self,
        name: str,
        learnable: bool | Collection[str] | None,
        num_parameters: int,
        channel_dim: int,
        device: Any,
        dtype: torch.dtype | None,
        parameters: dict[str, Value],
    ) -> None:
        super().__init__()
        row = catalogue.find(name)
        self.name = row.name
        if (formula := defined(row.name)) is not None:
            self._formula = formula  # defines the name where this is unpickled
        self.channel_dim = channel_dim
        self.num_parameters = num_parameters
        given = row.named(parameters)
        learnt = _learnt_names(row, learnable)
        if isinstance(num_parameters, bool) or not isinstance(num_parameters, int) or num_parameters < 1:
            raise ValueError(f"num_parameters must be a positive int, got {num_parameters!r}")
        if num_parameters > 1 and not learnt:
            raise ValueError(f"num_parameters = {num_parameters}, but this {row.name} has nothing to learn")
        marked = {key for key in learnt if row.parameters[key].channel} or learnt
        self._fixed: dict[str, float | tuple[float, ...]] = {}
        self._buffer_keys: dict[str, str] = {}
        self._learnt: dict[str, _Learnt] = {}
        for p in row.parameters.values():
            value = given.get(p.name, p.default)
            key = next(word for word in (*p.words, p.name) if not hasattr(self, word))
            if p.name in learnt:
                stored = _Learnt(key, _constraint(p), p.low, p.high)
                channels = num_parameters if p.name in marked else 1
                tensor = _initial(row.name, p, stored, value, channels, device, dtype)
                self.register_parameter(key, nn.Parameter(tensor))
                self._learnt[p.name] = stored
            elif isinstance(value, Tensor):
                self.register_buffer(key, value.detach().clone().to(device=device, dtype=dtype))
                self._buffer_keys[p.name] = key
            elif p.name in given:
                number = _fixed(row.name, p, value)
                if number != p.default:
                    self._fixed[p.name] = number

    def _parameters_now(self) -> dict[str, Any]:
        """Those that are not the catalogue's defaults."""
        values: dict[str, Any] = dict(self._fixed)
        for name, key in self._buffer_keys.items():
            values[name] = getattr(self, key)
        for name, learnt in self._learnt.items():
            values[name] = learnt.value(getattr(self, learnt.key))
        return values

    def value(self, parameter: str) -> float | tuple[float, ...] | Tensor:
        """What the function is computed with now: of a learnt parameter the value inside its domain.

        Raises:
            TypeError: the activation has no such parameter.

        Example:
            >>> import torchlin
            >>> torchlin.nn.Activation("pelu", a=2.0).value("a")
            tensor([2.], grad_fn=<AddBackward0>)
        """
        row = catalogue.find(self.name)
        (name,) = row.named({parameter: None})
        return self._parameters_now().get(name, row.parameters[name].default)

    def extra_repr(self) -> str:
        words = [repr(self.name)]
        words += [f"{name}={value:g}" for name, value in self._fixed.items() if isinstance(value, float)]
        words += [f"{name}=..." for name, value in self._fixed.items() if not isinstance(value, float)]
        words += [f"{name}=[{getattr(self, key).numel()}]" for name, key in self._buffer_keys.items()]
        if self._learnt:
            words.append(f"learnable={list(self._learnt)}")
        if self.num_parameters != 1:
            words.append(f"num_parameters={self.num_parameters}")
        if self.channel_dim != 1:
            words.append(f"channel_dim={self.channel_dim}")
        return ", ".join(words + self._more_repr())

    def _more_repr(self) -> list[str]:
        return []


def _learnt_names(row: catalogue.Activation, learnable: bool | Collection[str] | None) -> set[str]:
    if learnable is False:
        return set()
    if learnable is True:
        return set(row.parameters)
    marked = {p.name for p in row.parameters.values() if p.learnable}
    if learnable is None:
        return marked
    if isinstance(learnable, str) or not isinstance(learnable, Collection):
        raise TypeError(f"learnable must be a bool or a list of parameters' names, got {learnable!r}")
    return marked | row.named(dict.fromkeys(learnable)).keys()


def _fixed(name: str, p: Parameter, value: Any) -> float | tuple[float, ...]:
    if not p.is_vector:
        return _number(name, p, value)
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise TypeError(f"{p.name} of {name} must be a sequence of numbers or a Tensor, got {value!r}")
    return tuple(_number(name, p, v) for v in value)


def _number(name: str, p: Parameter, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{p.name} of {name} must be a number or a Tensor, got {value!r}")
    if value not in p:
        raise ValueError(f"{p.name} of {name} must be in {p.domain}, got {value:g}")
    return float(value)


def _initial(
    name: str, p: Parameter, learnt: _Learnt, value: Any, channels: int, device: Any, dtype: Any
) -> Tensor:
    """What is stored for an initial value: [channels]; of a coefficient vector [length] or [length, channels]."""
    if isinstance(value, Tensor):
        if value.dim() > 1 + p.is_vector:
            raise ValueError(f"{p.name} of {name} got a tensor of shape {tuple(value.shape)}")
        device, dtype = device or value.device, dtype or value.dtype
        value = value.tolist()

    def free(number: Any) -> float:
        number = _number(name, p, number)
        if learnt.constraint in ("softplus", "exp", "sigmoid") and number in (p.low, p.high):
            raise ValueError(
                f"{p.name} of {name} is learnt by {learnt.constraint}, which only nears {number:g}"
            )
        return learnt.free(number)

    def row(values: Any) -> list[float]:
        values = values if isinstance(values, list) else [values]
        values = values * channels if len(values) == 1 else values
        if channels not in (1, len(values)):
            raise ValueError(
                f"{p.name} of {name} must have one value or num_parameters = {channels}, got {len(values)}"
            )
        return [free(v) for v in values]

    if not p.is_vector:
        return torch.tensor(row(value), device=device, dtype=dtype)
    numbers: Any = value if isinstance(value, list) else _fixed(name, p, value)
    rows = [row(v) for v in numbers]
    whole = torch.tensor(rows, device=device, dtype=dtype)
    return whole.squeeze(1) if whole.shape[1] == 1 else whole


class Activation(_Named):
    """The activation `name` of the catalogue, y = f(x; parameters), as a module.

    Parameters that the catalogue calls learnable become `nn.Parameter`; the others are numbers. One with a domain is
    stored free of it and mapped into it in forward (:meth:`value` gives the effective one), so that optimizers, DDP
    and torch.compile see an ordinary parameter. In a state_dict parameters go by the names of the catalogue, or by
    those of the library that others load from: PReLU's is `weight`, as in `torch.nn.PReLU`.

    Args:
        name: a name or alias: `torchlin.names("activation")` lists them.
        inplace: overwrite the input; with gradients only where the output tells them, as with relu.
        learnable: False: nothing is learnt. True, or a list of parameters: these are learnt too.
        num_parameters: learn this many values, one for each channel, of the parameters that are of a channel in the
            source; of all learnt ones if none is.
        channel_dim: the dimension of the channels.
        generator: of the noise that stochastic activations draw in training.
        device, dtype: of the parameters.
        parameters: initial values by the catalogue's names or torch's (`negative_slope`, `alpha`, ...): numbers, or
            tensors [channels]; for a coefficient vector a sequence, or a tensor [length] or [length, channels].

    Shape:
        Any, to the same; float32, float64, float16 or bfloat16, the output in the input's dtype.

    Raises:
        ValueError: an unknown name (the closest ones are given), a value outside of its parameter's domain or one
            that does not fit num_parameters.
        TypeError: a parameter that the activation does not have.

    Source: `torchlin show <name>` gives formula and source of each.

    Example:
        >>> import torch, torchlin
        >>> torchlin.nn.Activation("leaky_relu", negative_slope=0.5)(torch.tensor([-2.0, 1.0]))
        tensor([-1.,  1.])
        >>> torchlin.nn.Activation("prelu", num_parameters=64)
        Activation('prelu', learnable=['a'], num_parameters=64)
    """

    def __init__(
        self,
        name: str,
        *,
        inplace: bool = False,
        learnable: bool | Collection[str] | None = None,
        num_parameters: int = 1,
        channel_dim: int = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **parameters: Value,
    ) -> None:
        super().__init__(name, learnable, num_parameters, channel_dim, device, dtype, parameters)
        row = catalogue.find(name)
        if len(row.inputs) > 1:
            raise ValueError(f"name: {row.name!r} is of {len(row.inputs)} tensors, use GatedActivation")
        self.inplace = inplace
        self.generator = generator
        # A name without noise has one form only; asking for it as in evaluation is the shorter way.
        self.stochastic = bool(row.noises) or row.implementation is not None
        self._is_plain = not (self.stochastic or self._fixed or self._buffer_keys or self._learnt)

    @property
    def allows_inplace(self) -> bool:
        """Whether the output alone tells the gradient, so that the input may be overwritten in training."""
        row = catalogue.find(self.name)
        return not self._learnt and row.allows_inplace(self._parameters_now())

    def forward(self, x: Tensor) -> Tensor:
        if (
            self._is_plain and not self.inplace
        ):  # collecting no parameters takes as long as a small tensor's arithmetic
            return activation(x, self.name)
        return activation(
            x,
            self.name,
            training=self.training and self.stochastic,
            inplace=self.inplace,
            channel_dim=self.channel_dim,
            generator=self.generator,
            **self._parameters_now(),
        )

    def _more_repr(self) -> list[str]:
        return ["inplace=True"] if self.inplace else []


class GatedActivation(_Named):
    """A gated unit of the catalogue, as SwiGLU, of two tensors or of the halves of one.

    Args:
        name: a name or alias of a function of two tensors.
        layout: how one packed tensor holds both: "halves" or "interleaved" along `dim`. A call with two tensors needs
            none.
        gate: "first" or "second": which of the two is the gate. None is the convention of the name: first in
            silu(a)·b (LLaMA), second in a·sigmoid(b) (torch.nn.GLU).
        dim: the packed dimension, of even size.
        learnable, num_parameters, channel_dim, device, dtype, parameters: as in :class:`Activation`.

    Shape:
        (..., 2n, ...) to (..., n, ...), or two tensors that broadcast; dtypes as in :class:`Activation`.

    Raises:
        ValueError, TypeError: as :class:`Activation`; on a call with a `dim` of odd size.

    Source: Dauphin et al., arXiv:1612.08083; Shazeer, arXiv:2002.05202.

    Example:
        >>> import torch, torchlin
        >>> torchlin.nn.GatedActivation("swiglu")(torch.randn(8, 256)).shape
        torch.Size([8, 128])
    """

    def __init__(
        self,
        name: str,
        *,
        layout: str = "halves",
        gate: str | None = None,
        dim: int = -1,
        learnable: bool | Collection[str] | None = None,
        num_parameters: int = 1,
        channel_dim: int = 1,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **parameters: Value,
    ) -> None:
        super().__init__(name, learnable, num_parameters, channel_dim, device, dtype, parameters)
        row = catalogue.find(name)
        if len(row.inputs) < 2:
            raise ValueError(f"name: {row.name!r} is of one tensor, use Activation")
        if layout not in ("halves", "interleaved"):
            raise ValueError(
                f"layout must be 'halves' or 'interleaved' (two tensors are passed as two), got {layout!r}"
            )
        if gate not in ("first", "second", None):
            raise ValueError(f"gate must be 'first', 'second' or None, got {gate!r}")
        self.layout, self.gate, self.dim = layout, gate, dim
        self.further = row.inputs[2:]

    def forward(self, a: Tensor, b: Tensor | None = None, *further: Tensor) -> Tensor:
        if len(further) != len(self.further):
            raise TypeError(
                f"{self.name} needs the tensors {', '.join(('a', 'b', *self.further))}, got {2 + len(further)}"
            )
        return gated_activation(
            a,
            b,
            self.name,
            layout=self.layout if b is None else "split",
            gate=self.gate,
            dim=self.dim,
            channel_dim=self.channel_dim,
            **dict(zip(self.further, further, strict=True)),
            **self._parameters_now(),
        )

    def _more_repr(self) -> list[str]:
        words = [f"layout={self.layout!r}"] if self.layout != "halves" else []
        words += [f"gate={self.gate!r}"] if self.gate is not None else []
        return words + ([f"dim={self.dim}"] if self.dim != -1 else [])


# -------------------------------------------------------------------------------------------------- registry


@functools.cache
def _module_of(name: str) -> type[nn.Module]:
    from torchlin.nn.activation_composed import MODULES

    row = catalogue.find(name)
    return MODULES.get(row.name) or (GatedActivation if len(row.inputs) > 1 else Activation)


@dataclass(frozen=True)
class Named:
    """What the registry has for a name of the catalogue: called, it makes the module."""

    name: str

    def __call__(self, **kwargs: Any) -> nn.Module:
        module = _module_of(self.name)
        return module(self.name, **kwargs) if issubclass(module, _Named) else module(**kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The module's arguments, with the parameters of this name in place of **parameters."""
        row, module = catalogue.find(self.name), _module_of(self.name)
        keyword = inspect.Parameter.KEYWORD_ONLY
        if not issubclass(module, _Named):
            named = inspect.signature(module).parameters.values()
            return inspect.Signature([p.replace(kind=keyword) for p in named])
        own = [inspect.Parameter(p.name, keyword, default=p.default) for p in row.parameters.values()]
        if row.implementation:
            own += [inspect.Parameter(k, keyword, default=v) for k, v in options(self.name).items()]
        general = [
            p
            for p in inspect.signature(module).parameters.values()
            if p.kind is keyword and p.name not in row.parameters and (p.name != "inplace" or row.inplace)
        ]
        return inspect.Signature([*own, *general])


def _documentation(named: Named) -> str:
    row = catalogue.find(named.name)
    formula = row.root.formula if row.same_as is None else str(row.graph)
    text = f"{row.display}: {formula or row.note}"
    return f"{text}. {row.source}." if formula else f"{text} {row.source}."


# Set afterwards: in the body of the class it would be the class's own.
Named.__doc__ = property(_documentation)  # type: ignore[assignment]


def register() -> None:
    """Plug-in entry point of this family."""
    for row in catalogue.catalogue().values():
        registry.register("activation", row.name, Named(row.name), aliases=row.aliases)
