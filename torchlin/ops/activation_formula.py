"""Activations that a program defines while it runs, by a formula, with the kernels that the built-in ones have."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
import re
import threading
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torchlin import catalogue, registry
from torchlin._compile import CompileError
from torchlin.catalogue import Activation, kernels
from torchlin.catalogue.formula import RESERVED, Input, Param
from torchlin.ops import activation_kernel
from torchlin.ops.activation import activation, forget, gated_activation

if TYPE_CHECKING:
    from torch import nn

Default = float | Sequence[float] | str

_lock = threading.RLock()
_defined: dict[str, FormulaActivation] = {}


def activation_from_formula(
    formula: str,
    name: str | None = None,
    *,
    parameters: Mapping[str, Default] | None = None,
    inputs: Sequence[str] = ("x",),
    compile: bool | str = "auto",
    overwrite: bool = False,
) -> FormulaActivation:
    """Define an activation by a formula: differentiable, and one fused kernel where a C++ compiler is at hand.

    The formula is parsed, never run as code: numbers, `+ - * / **`, parentheses, functions, `where(x > 0, u, v)`, and local
    definitions `t = exp(x);` in front. `pi` and `e` are constants. The functions are those of the catalogue
    (docs/add-an-activation.md lists them).

    Args:
        formula: the text.
        name: a name makes it one among the others: `torchlin.functional.activation(x, name)`, `torchlin.nn.Activation(name)`,
            `torchlin.create("activation", name)`. Defining the same again is harmless.
        parameters: what else the formula depends on, by name: a default, numbers for a coefficient vector (used inside
            `sum(...)` or `poly(c, x)`), or text as in a catalogue file, "1 learnable channel in (0, inf) by softplus".
        inputs: names of the tensors: one, or two for a gated unit.
        compile: "auto" compiles a kernel if that is possible, and warns and runs the pure-torch reference if it is not;
            True raises then; False does not try. A formula that is that of a built-in activation has its kernel anyway.
            A kernel is compiled once, in about a second, and kept in a cache folder (`TORCHLIN_CACHE`, or torchlin in the
            user's cache folder).
        overwrite: take a name from an earlier formula; Modules of that name, too, compute the new one from then on (graphs
            that were compiled or exported do not). What is built in keeps its name.

    Returns:
        The activation as a callable object; its `module(...)` makes Modules.

    Raises:
        FormulaError: a ValueError that shows where the formula cannot be read.
        ValueError: a name that is taken or no name, a parameter or input that the formula does not use, a default outside of
            the parameter's own domain.
        CompileError: with compile=True, what the compiler said, or why there is none.

    Example:
        >>> import torch, torchlin
        >>> f = torchlin.activation_from_formula("x*sigmoid(a*x) + a", parameters={"a": 1.5}, compile=False)
        >>> f(torch.tensor([0.0, 2.0]), a=0.0)
        tensor([0., 1.])
    """
    if compile not in ("auto", True, False):
        raise ValueError(f"compile must be 'auto', True or False, got {compile!r}")
    if not isinstance(formula, str):
        raise TypeError(f"formula must be a str, got {type(formula).__name__}")
    texts = {key: _parameter_text(key, value) for key, value in _items(parameters)}
    tensors = _input_names(inputs)
    key = _name(name) if name is not None else _content_name(formula, texts, tensors)
    row = _row(key, formula, texts, tensors)
    made = FormulaActivation(row, name is not None, texts, "auto" if compile else False)
    with _lock:
        new = _is_new(row, name is not None, overwrite)
        made._load(compile)
        if new:
            _enter(made)
    return made


class FormulaActivation:
    """An activation defined by a formula: call it with tensors, or let it make a Module.

    Attributes:
        name: what `torchlin.functional.activation` and the registry know it by.
        formula: the formula as written.
        inputs: the names of its tensors.
        parameters: defaults by name.
        kernel: what computes it on the CPU: the name of a built-in kernel or of one compiled from the formula, or None for the
            pure-torch reference; then `why_not` says why.
    """

    def __init__(
        self, row: Activation, named: bool, parameters: Mapping[str, str], compile: bool | str
    ) -> None:
        self._row, self._named, self._texts, self._compile = row, named, dict(parameters), compile
        self.kernel: str | None = None
        self.why_not = ""

    @property
    def name(self) -> str:
        return self._row.name

    @property
    def formula(self) -> str:
        assert self._row.formula is not None
        return self._row.formula

    @property
    def inputs(self) -> tuple[str, ...]:
        return self._row.inputs

    @property
    def parameters(self) -> dict[str, float | tuple[float, ...]]:
        return self._row.defaults()

    def __call__(self, x: Tensor, other: Tensor | None = None, /, **options: Any) -> Tensor:
        """The activation of a tensor; a gated unit's of two, or of the halves of one. The options, parameters among them,
        are those of `torchlin.functional.activation` and `gated_activation`."""
        if len(self.inputs) > 1:
            return gated_activation(x, other, self.name, **options)
        if other is not None:
            raise TypeError(f"{self.name} takes one tensor, got two")
        return activation(x, self.name, **options)

    def module(self, **options: Any) -> nn.Module:
        """A `torchlin.nn.Activation`, or a `GatedActivation` for two inputs, which takes the options."""
        from torchlin import nn

        return (nn.Activation if len(self.inputs) == 1 else nn.GatedActivation)(self.name, **options)

    def __repr__(self) -> str:
        return f"FormulaActivation({self.formula!r}, name={self.name!r}, kernel={self.kernel!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        name = self.name if self._named else None
        return _again, (self.formula, name, self._texts, self.inputs, self._compile)

    def __deepcopy__(self, memo: dict[int, Any]) -> FormulaActivation:
        return self  # nothing in it changes

    def _load(self, compile: bool | str) -> None:
        kernel = kernels.kernel_of(self._row)
        if compile is False and not kernels.devices(kernel):
            self.why_not = "compile=False"
            return
        kernels.loaded(kernel)
        try:
            activation_kernel.load(kernel)
            self.kernel = kernel.name
        except CompileError as error:
            if compile is True:
                raise
            self.why_not = str(error)
            message = f"{self.name} runs its slower pure-torch reference: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        finally:
            forget()


def _again(
    formula: str,
    name: str | None,
    parameters: dict[str, Default],
    inputs: tuple[str, ...],
    compile: bool | str,
) -> FormulaActivation:
    return activation_from_formula(formula, name, parameters=parameters, inputs=inputs, compile=compile)


# ------------------------------------------------------------------------------------------------------------ names


def _is_new(row: Activation, named: bool, overwrite: bool) -> bool:
    known = catalogue.added(row.name)
    if known == row:
        return False
    if known is None and named:
        with contextlib.suppress(registry.UnknownNameError):
            owner = registry.describe("activation", row.name)
            raise ValueError(
                f"name: {row.name!r} is a name of the activation {owner.name!r} already: choose another"
            )
    if known is not None and not overwrite:
        raise ValueError(
            f"name: {row.name!r} is the formula {known.formula!r} already; overwrite=True gives the name to this one"
        )
    return True


def _enter(made: FormulaActivation) -> None:
    """Gives the activation its name, in the catalogue and in the registry."""
    catalogue.add(made._row)
    if made._named:
        registry.register("activation", made.name, _maker(made.name), override=True)
    _defined[made.name] = made
    kernels.forget()
    forget()


def _maker(name: str) -> Any:
    from torchlin.nn.activation import Named, _module_of  # modules are built on what is here

    _module_of.cache_clear()
    return Named(name)


def defined(name: str) -> FormulaActivation | None:
    """The formula of a name that a formula defined. A Module keeps it, so that it brings it along where it is unpickled."""
    return _defined.get(name)


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"name must be a str or None, got {type(name).__name__}")
    folded = name.strip().lower().replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", folded):
        raise ValueError(
            f"name: {name!r} is no name; a name has letters, digits, '_' and '-', a letter first"
        )
    return folded


def _content_name(formula: str, parameters: Mapping[str, str], inputs: Sequence[str]) -> str:
    text = repr((formula, sorted(parameters.items()), inputs))
    return f"formula_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _input_names(inputs: object) -> tuple[str, ...]:
    if (
        isinstance(inputs, str)
        or not isinstance(inputs, Sequence)
        or not all(isinstance(i, str) for i in inputs)
    ):
        raise TypeError(f"inputs must be a sequence of names, got {inputs!r}")
    if not 1 <= len(inputs) <= 2 or len(set(inputs)) != len(inputs):
        raise ValueError(f"inputs must be one name or two different ones, got {tuple(inputs)}")
    return _checked("inputs", inputs)


def _checked(what: str, names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII):
            raise ValueError(
                f"{what}: {name!r} is no name; a name has letters, digits and '_', no digit first"
            )
        if name in RESERVED:
            raise ValueError(f"{what}: {name!r} is a function already: choose another name")
    return tuple(names)


def _items(parameters: object) -> list[tuple[str, Any]]:
    if parameters is None:
        return []
    if not isinstance(parameters, Mapping) or not all(isinstance(key, str) for key in parameters):
        raise TypeError(f"parameters must be a mapping of names to defaults, got {parameters!r}")
    _checked("parameters", tuple(parameters))
    return list(parameters.items())


def _parameter_text(name: str, value: Any) -> str:
    """A parameter as a catalogue file has it."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and len(value) > 0:
        return f"[{', '.join(_number_text(name, v) for v in value)}]"
    return _number_text(name, value)


def _number_text(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"parameters: {name!r} must be a number, a sequence of numbers, or text as in a catalogue file; got {value!r}"
        )
    return repr(float(value))


def _check_parameters(names: Collection[str], inputs: tuple[str, ...]) -> None:
    """Parameters are arguments by their names: no other argument may have one of these."""
    from torchlin import nn

    calls = (activation, nn.Activation) if len(inputs) == 1 else (gated_activation, nn.GatedActivation)
    for name in names:
        if name in inputs:
            raise ValueError(f"parameters: {name!r} is one of the inputs already")
        for call in calls:
            if name in inspect.signature(call).parameters:
                raise ValueError(
                    f"parameters: {name!r} is an argument of {call.__name__} already: choose another name"
                )


def _row(name: str, formula: str, parameters: Mapping[str, str], inputs: tuple[str, ...]) -> Activation:
    section = {
        "display": name,
        "formula": formula,
        "inputs": ", ".join(inputs),
        "source": "Defined by torchlin.activation_from_formula",
        "verified": "no",
        **({"kind": "gated"} if len(inputs) > 1 else {}),
        **{f"param {key}": text for key, text in parameters.items()},
    }
    _check_parameters(parameters, inputs)
    row = catalogue.define(name, section)
    for parameter in row.parameters.values():
        values = parameter.default if isinstance(parameter.default, tuple) else (parameter.default,)
        if not all(map(math.isfinite, values)):
            raise ValueError(f"parameters: the default of {parameter.name!r} must be finite")
    graph = row.graph
    assert graph is not None
    used = {part.name for part in graph.walk() if isinstance(part, (Input, Param))}
    for what, names in (("inputs", inputs), ("parameters", tuple(row.parameters))):
        if unused := [key for key in names if key not in used]:
            raise ValueError(f"{what}: {unused[0]!r} does not occur in the formula {formula!r}")
    return row
