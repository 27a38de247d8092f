"""The catalogue: every activation that torchlin knows, defined once in the .ini files of this folder.

A section is one name:

    [celu]
    display = CELU
    aliases = other, names
    formula = where(x > 0, x, a*expm1(x/a))
    param a = 1 learnable in (0, inf) by softplus
    source = who, where, when
    year = 2017
    verified = how the formula was checked, or no
    note = why it is this one, where sources disagree

Formulas are in the language of formula.py. A parameter has a default and then what applies of: `learnable`;
`channel`, if the source learns one value for each channel; `in` its domain; `by` softplus, exp or sigmoid of
a free parameter, or by clamp: how a learnable one is kept inside its domain; and after `as` the words by which
other libraries call it, that of their state_dict first. `[1, 2]`, `linspace(0, 1, 5)` and `repeat(0, 5)` as
default make a coefficient vector. `inputs` are the tensors, x unless said otherwise; `gate` is the one of a
gated unit that decides how much of the other gets through; `noise` lines: see stochastic.ini.

`inplace = yes`, or a condition on the parameters: f'(f(x)) = f'(x) for every x, so that a backward pass can
read the output where it has overwritten the input. Of the input only: a parameter's gradient needs the input.

`same_as = name(param=expression, ...)` in place of a formula makes it another name of a function, with its
own defaults; parameters that are not bound keep their names. `implementation = name` marks what no formula
over elements can say (softmax, maxout): code of that name computes it.

This package needs neither torch nor a compiled library, only torch_code does: the build imports it on its
own, as `catalogue`.
"""

from __future__ import annotations

import configparser
import contextlib
import difflib
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from .formula import FormulaError, Node, Param, evaluate, number, param, parse, substitute

__all__ = ["Activation", "FormulaError", "Noise", "Parameter", "catalogue", "find", "parse"]

_Value = TypeVar("_Value")

_LONGEST = 10_000  # coefficients

KINDS = ("elementwise", "parametric", "stochastic", "gated", "multi_input")
_KEYS = {
    "display",
    "aliases",
    "kind",
    "inputs",
    "gate",
    "inplace",
    "formula",
    "same_as",
    "implementation",
    "source",
    "year",
    "verified",
    "note",
}


@dataclass(frozen=True)
class Parameter:
    """A parameter of an activation; one with a tuple as default is a coefficient vector."""

    name: str
    default: float | tuple[float, ...]
    learnable: bool = False
    channel: bool = False
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = True
    open_high: bool = True
    constraint: str | None = None  # softplus, exp, sigmoid, clamp
    words: tuple[str, ...] = ()  # what else it is called

    @property
    def is_vector(self) -> bool:
        return isinstance(self.default, tuple)

    @property
    def domain(self) -> str:
        """The interval as text, "(0, inf)"."""
        return f"{'(['[not self.open_low]}{self.low:g}, {self.high:g}{')]'[not self.open_high]}"

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below


@dataclass(frozen=True)
class Noise:
    """A random input: drawn in training for each element, or for each element of the vector `like`."""

    name: str
    distribution: str  # uniform(low, high), normal(mean, std), half_normal(std), bernoulli(p)
    arguments: tuple[Node, ...]  # expressions in the parameters
    like: str | None
    mean: Node  # what takes its place in evaluation


@dataclass(frozen=True)
class Activation:
    """One name of the catalogue."""

    name: str
    display: str
    aliases: tuple[str, ...]
    kind: str
    inputs: tuple[str, ...]
    formula: str | None  # as written; None for same_as and implementation
    same_as: str | None
    bindings: Mapping[str, Node]  # of a same_as: parameters of the other name, in terms of the own ones
    implementation: str | None
    gate: str | None  # of a gated unit: the input that is the gate
    inplace_if: Node | None  # 1 for parameters with which f'(f(x)) = f'(x), else 0; None: never
    parameters: Mapping[str, Parameter]
    noises: Mapping[str, Noise]
    source: str
    year: int | None
    verified: str | None
    note: str | None

    @functools.cached_property
    def root(self) -> Activation:
        """The name whose formula this one shares: itself, or the end of a chain of same_as."""
        return catalogue()[self.same_as].root if self.same_as else self

    @functools.cached_property
    def root_bindings(self) -> dict[str, Node]:
        """The root's parameters in terms of the own ones."""
        if not self.same_as:
            return {p.name: param(p.name, p.is_vector) for p in self.parameters.values()}
        other = catalogue()[self.same_as]
        own = {
            param(p.name, p.is_vector): self.bindings.get(p.name, param(p.name, p.is_vector))
            for p in other.parameters.values()
        }
        return {name: substitute(node, own) for name, node in other.root_bindings.items()}

    @functools.cached_property
    def graph(self) -> Node | None:
        """The formula, in the own parameters, with noise as inputs; None where code takes its place."""
        if self.same_as:
            root = self.root
            graph = root.graph
            assert graph is not None
            own = {param(p.name, p.is_vector): self.root_bindings[p.name] for p in root.parameters.values()}
            return substitute(graph, own)
        if self.formula is None:
            return None
        return _parse(self.formula, self.parameters, self.noises, self.inputs)

    @functools.cached_property
    def eval_graph(self) -> Node | None:
        """The formula with noise replaced by what takes its place in evaluation."""
        if self.graph is None or not self.noises:
            return self.graph
        noise = {node: n.mean for n in self.noises.values() for node in [_noise_node(n)]}
        return substitute(self.graph, noise)

    def defaults(self) -> dict[str, float | tuple[float, ...]]:
        return {p.name: p.default for p in self.parameters.values()}

    @property
    def inplace(self) -> bool:
        """Whether the gradient can be had from the output alone, at the default parameters."""
        return self.allows_inplace({})

    def allows_inplace(self, parameters: Mapping[str, Any]) -> bool:
        """Whether f'(f(x)) = f'(x) for every x, at these parameters and defaults for the rest.

        Tensors as parameters are not looked into: a condition on them does not hold.
        """
        if self.inplace_if is None:
            return False
        used = {p.name for p in self.inplace_if.walk() if isinstance(p, Param)}
        values = {name: value for name, value in {**self.defaults(), **parameters}.items() if name in used}
        if not all(isinstance(value, (int, float)) for value in values.values()):
            return False
        return bool(evaluate(self.inplace_if, values))

    def named(self, given: Mapping[str, _Value]) -> dict[str, _Value]:
        """Parameters by their names here, given by these or by the words of other libraries.

        Raises:
            TypeError: it has no such parameter (the message lists what it has), or one came twice.
        """
        if given.keys() <= self.parameters.keys():
            return dict(given)
        words = {word: p.name for p in self.parameters.values() for word in (*p.words, p.name)}
        out: dict[str, _Value] = {}
        for word, value in given.items():
            if word not in words:
                has = ", ".join("/".join((p.name, *p.words)) for p in self.parameters.values())
                raise TypeError(f"{self.name} has no parameter {word!r}; it has {has or 'none'}")
            if words[word] in out:
                raise TypeError(f"{self.name}: {words[word]!r} came twice, as {word!r} too")
            out[words[word]] = value
        return out


def _noise_node(noise: Noise) -> Node:
    from .formula import input_

    return param(noise.name, True) if noise.like else input_(noise.name)


def _parse(
    formula: str, parameters: Mapping[str, Parameter], noises: Mapping[str, Noise], inputs: tuple[str, ...]
) -> Node:
    scalars = [p.name for p in parameters.values() if not p.is_vector]
    vectors = [p.name for p in parameters.values() if p.is_vector] + [
        n.name for n in noises.values() if n.like
    ]
    elements = [n.name for n in noises.values() if not n.like]
    return parse(formula, scalars, inputs=(*inputs, *elements), vectors=vectors)


@functools.cache
def catalogue() -> Mapping[str, Activation]:
    """Every activation by name, in the order of the files."""
    found: dict[str, Activation] = {}
    for path in sorted(Path(__file__).parent.glob("*.ini")):
        # The formulas are read when they are asked for: all of them take longer than everything else here.
        for activation in read(path.read_text(encoding="utf-8"), path.name, check_formulas=False):
            if activation.name in found:
                raise ValueError(f"{path.name}: [{activation.name}] is defined twice")
            found[activation.name] = activation
    return MappingProxyType(found)


@functools.cache
def _aliases() -> Mapping[str, str]:
    return {key: a.name for a in catalogue().values() for key in (a.name, *a.aliases)}


def find(name: str) -> Activation:
    """The activation of a name or alias; upper and lower case, "-" and "_" are the same.

    Raises:
        ValueError: no such name; the closest ones are given.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {name!r}")
    known = _aliases()
    folded = name.strip().lower().replace("-", "_")
    if folded in _added:
        return _added[folded]
    if folded not in known:
        close = difflib.get_close_matches(folded, [*known, *_added], n=3)
        hint = f"; the closest: {', '.join(map(repr, close))}" if close else ""
        raise ValueError(f"name: {name!r} is no activation of the catalogue{hint}")
    return catalogue()[known[folded]]


_added: dict[str, Activation] = {}


def added(name: str) -> Activation | None:
    """What :func:`add` made known under a name."""
    return _added.get(name)


def add(activation: Activation) -> None:
    """Makes known to :func:`find` what no file has; it takes the place of one of that name that was added before.

    Raises:
        ValueError: the name is one of a file's.
    """
    if activation.name in _aliases():
        raise ValueError(
            f"name: {activation.name!r} is a name of the catalogue's {catalogue()[_aliases()[activation.name]].display}"
        )
    _added[activation.name] = activation


# ------------------------------------------------------------------------------------------------------ read

_FLAGS = re.compile(
    r"(?P<default>\[[^]]*\]|[^\[\]]*?)"
    r"(?P<learnable>\s+learnable)?(?P<channel>\s+channel)?"
    r"(?:\s+in\s+(?P<open>[(\[])\s*(?P<low>[^,]+),\s*(?P<high>[^,)\]]+)(?P<close>[)\]]))?"
    r"(?:\s+by\s+(?P<by>softplus|exp|sigmoid|clamp))?"
    r"(?:\s+as\s+(?P<words>\w+(?:\s*,\s*\w+)*))?",
    re.DOTALL,
)
_NOISE = re.compile(
    r"(?P<distribution>uniform|normal|half_normal|bernoulli)\((?P<arguments>.*)\)"
    r"(?:\s+like\s+(?P<like>\w+))?\s+eval\s+(?P<mean>.+)",
    re.DOTALL,
)


def read(text: str, origin: str = "<string>", *, check_formulas: bool = True) -> list[Activation]:
    """Parses the text of a catalogue file.

    Raises:
        ValueError: with the file, the section and what is wrong there.
    """
    parser = configparser.ConfigParser(
        interpolation=None,
        delimiters=("=",),
        comment_prefixes=("#",),
        default_section="DEFAULT",
        strict=True,
        empty_lines_in_values=False,
    )
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # parameter names keep their case
    try:
        parser.read_string(text, origin)
    except configparser.Error as error:
        raise ValueError(f"{origin}: {error}") from error
    activations = []
    for name in parser.sections():
        try:
            activation = define(name, dict(parser[name]))
            if check_formulas and activation.formula is not None:
                _ = activation.graph
            activations.append(activation)
        except ValueError as error:
            raise ValueError(f"{origin}: [{name}] {error}") from error
    return activations


def define(name: str, section: Mapping[str, str]) -> Activation:
    """The activation that a section's keys and values define.

    Raises:
        ValueError: what is wrong with them.
    """
    parameters: dict[str, Parameter] = {}
    for key, value in section.items():
        if key.startswith("param "):
            parameter = _parameter(key[6:].strip(), value)
            parameters[parameter.name] = parameter
    noises: dict[str, Noise] = {}
    for key, value in section.items():
        if key.startswith("noise "):
            noise = _noise(key[6:].strip(), value, parameters)
            noises[noise.name] = noise
        elif not key.startswith("param ") and key not in _KEYS:
            raise ValueError(f"has no key {key!r}; the keys are {', '.join(sorted(_KEYS))}, param and noise")
    ways = [key for key in ("formula", "same_as", "implementation") if key in section]
    if len(ways) != 1:
        raise ValueError(f"needs exactly one of formula, same_as and implementation, has {ways or 'none'}")
    for key in ("display", "source", "verified"):
        if not section.get(key):
            raise ValueError(f"needs {key!r}")
    other: str | None = None
    bindings: dict[str, Node] = {}
    if "same_as" in section:
        other, bindings = _same_as(section["same_as"], parameters)
    kind = section.get("kind") or (
        "parametric" if any(p.learnable for p in parameters.values()) else "elementwise"
    )
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    inputs = _names(section.get("inputs", "x"))
    gate = section.get("gate")
    if gate is not None and gate not in inputs:
        raise ValueError(f"gate {gate!r} is none of the inputs {', '.join(inputs)}")
    return Activation(
        name=name,
        display=section["display"],
        aliases=_names(section.get("aliases", "")),
        kind=kind,
        inputs=inputs,
        formula=section.get("formula"),
        same_as=other,
        bindings=bindings,
        implementation=section.get("implementation"),
        gate=gate,
        inplace_if=_inplace(section.get("inplace", "no"), parameters),
        parameters=parameters,
        noises=noises,
        source=section["source"],
        year=int(section["year"]) if "year" in section else None,
        verified=None if section["verified"] == "no" else section["verified"],
        note=section.get("note"),
    )


def _inplace(text: str, parameters: Mapping[str, Parameter]) -> Node | None:
    if text in ("yes", "no"):
        return number(1) if text == "yes" else None
    return parse(f"where({text}, 1, 0)", tuple(parameters), inputs=())


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def _number(text: str) -> float:
    with contextlib.suppress(ValueError):
        return float(text)
    value = evaluate(parse(text, inputs=()), {})
    assert isinstance(value, float)
    return value


def _parameter(name: str, text: str) -> Parameter:
    match = _FLAGS.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError(f"got {text!r}")
        default, interval = _default(match["default"].strip()), _interval(match)
    except ValueError as error:
        form = "<default> [learnable] [channel] [in <interval>] [by softplus, exp, sigmoid or clamp] [as <words>]"
        raise ValueError(f"param {name}: must be of the form {form}: {error}") from error
    parameter = Parameter(
        name,
        default,
        bool(match["learnable"]),
        bool(match["channel"]),
        constraint=match["by"],
        words=_names(match["words"] or ""),
        **interval,
    )
    for value in default if isinstance(default, tuple) else (default,):
        if value not in parameter:
            raise ValueError(f"param {name}: the default {value:g} is outside of {parameter.domain}")
    if parameter.constraint and not parameter.learnable:
        raise ValueError(f"param {name}: 'by' is for learnable parameters")
    return parameter


def _default(body: str) -> float | tuple[float, ...]:
    if body.startswith("["):
        return tuple(_number(part) for part in body[1:-1].split(","))
    if series := re.fullmatch(r"(linspace|repeat)\((.*)\)", body):
        *values, count = series[2].split(",")
        numbers, n = [_number(v) for v in values], int(count)
        expected = 1 if series[1] == "repeat" else 2
        if len(numbers) != expected or not expected <= n <= _LONGEST:
            raise ValueError(f"{body!r} is not repeat(value, length) or linspace(low, high, length)")
        if series[1] == "repeat":
            return (numbers[0],) * n
        low, high = numbers
        return tuple(low + (high - low) * i / (n - 1) for i in range(n))
    return _number(body)


def _interval(match: re.Match[str]) -> dict[str, Any]:
    if not match["open"]:
        return {}
    return {
        "low": _number(match["low"]),
        "high": _number(match["high"]),
        "open_low": match["open"] == "(",
        "open_high": match["close"] == ")",
    }


def _noise(name: str, text: str, parameters: Mapping[str, Parameter]) -> Noise:
    match = _NOISE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"noise {name}: {text!r} is not of the form <distribution>(...) [like <vector>] eval <mean>"
        )
    scalars = [p.name for p in parameters.values() if not p.is_vector]
    arguments = tuple(parse(part, scalars, inputs=()) for part in match["arguments"].split(","))
    like = match["like"]
    if like is not None and not (like in parameters and parameters[like].is_vector):
        raise ValueError(f"noise {name}: like {like!r} is no vector parameter")
    return Noise(name, match["distribution"], arguments, like, parse(match["mean"], scalars, inputs=()))


def _same_as(text: str, parameters: Mapping[str, Parameter]) -> tuple[str, dict[str, Node]]:
    match = re.fullmatch(r"(\w+)\s*(?:\((.*)\))?", text.strip(), re.DOTALL)
    if match is None:
        raise ValueError(f"same_as: {text!r} is not of the form name or name(param=expression, ...)")
    scalars = [p.name for p in parameters.values() if not p.is_vector]
    vectors = [p.name for p in parameters.values() if p.is_vector]
    bindings = {}
    for part in re.split(r",\s*(?=\w+\s*=)", match[2] or ""):
        if part.strip():
            key, _, value = part.partition("=")
            bindings[key.strip()] = parse(value, scalars, inputs=(), vectors=vectors)
    return match[1], bindings


def check() -> None:
    """What can only be seen with all files read.

    Raises:
        ValueError: a name or alias that two activations have, or a same_as that does not fit.
    """
    owner: dict[str, str] = {}
    for a in catalogue().values():
        for key in (a.name, *a.aliases):
            if not re.fullmatch(r"[a-z][a-z0-9_]*", key):
                raise ValueError(f"[{a.name}] {key!r} is no name: lower case letters, digits and '_'")
            if owner.setdefault(key, a.name) != a.name or (key in a.aliases and key == a.name):
                raise ValueError(f"[{a.name}] {key!r} is a name of [{owner[key]}] already")
        if a.same_as:
            other = catalogue().get(a.same_as)
            if other is None:
                raise ValueError(f"[{a.name}] same_as: there is no [{a.same_as}]")
            unknown = set(a.bindings) - set(other.parameters)
            loose = set(other.parameters) - set(a.bindings) - set(a.parameters)
            if unknown or loose:
                raise ValueError(
                    f"[{a.name}] same_as {a.same_as}: binds unknown {sorted(unknown)}, "
                    f"leaves unbound {sorted(loose)}"
                )
        words = [word for p in a.parameters.values() for word in (p.name, *p.words)]
        if len(set(words)) < len(words):
            raise ValueError(f"[{a.name}] one word for two parameters among {', '.join(words)}")
        used = {p.name for p in (a.graph.walk() if a.graph else ()) if isinstance(p, Param)}
        used |= {
            p.name
            for n in a.noises.values()
            for e in (*n.arguments, n.mean)
            for p in e.walk()
            if isinstance(p, Param)
        }
        if a.graph and (unused := set(a.parameters) - used):
            raise ValueError(f"[{a.name}] does not use the parameters {sorted(unused)}")
