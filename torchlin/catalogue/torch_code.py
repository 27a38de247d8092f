"""Formulas in plain torch: the reference that kernels are tested against, and readable source for the
documentation.

Only aten operators, so that autograd, torch.compile, export and ONNX work; derivatives at kinks as formula.py
says. A branch of where() that is not taken sees an argument from inside its own domain instead of the real
one, since autograd multiplies what it finds there by 0: `0 * inf` would spoil the gradient of the other
branch. For the same reason an exp inside a function that has saturated stops short of overflow
(rewrite.saturation).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .formula import (
    COMPARISONS,
    HOST,
    REDUCTIONS,
    Call,
    Input,
    Node,
    Number,
    Param,
    call,
    evaluate,
    number,
    number_text,
    substitute,
)
from .rewrite import Rewriter, saturation

__all__ = ["guarded", "reference", "source"]

# Where softplus(u) equals u in double precision; torch's own default, 20, is off by 2e-9.
_SOFTPLUS_THRESHOLD = 40.0


def _max(a: Any, b: Any) -> Any:
    """At a tie, and only there, the derivative is a's; NaN if either is NaN."""
    if not isinstance(a, Tensor):
        return torch.relu(b) if a == 0 else torch.where(b <= a, a, b)
    keep = b <= a
    return torch.where(keep | (a != a), a, b)


def _min(a: Any, b: Any) -> Any:
    if not isinstance(a, Tensor):
        return torch.where(b >= a, a, b)
    return torch.where((b >= a) | (a != a), a, b)


def _clamp(u: Any, low: Any, high: Any) -> Any:
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return (
            _min(high, _max(low, u)) if isinstance(u, Tensor) else torch.clamp(torch.as_tensor(u), low, high)
        )
    return F.hardtanh(u, low, high)  # whose derivative at the bounds is 0; torch.clamp has 1 there


def _sech(u: Tensor) -> Tensor:
    e = torch.exp(-torch.abs(u))
    return 2 * e / (1 + e * e)


def _pow(u: Any, v: Any) -> Any:
    return torch.pow(u, v)


def _hypot(u: Any, v: Any) -> Any:
    return torch.sqrt(u * u + v * v)


def _softplus(u: Tensor) -> Tensor:
    return F.softplus(u, threshold=_SOFTPLUS_THRESHOLD)


def _where(dtype: torch.dtype, condition: Any, u: Any, v: Any) -> Any:
    if not isinstance(condition, Tensor):
        return u if condition else v
    if not isinstance(u, Tensor) and not isinstance(v, Tensor):
        u = torch.full_like(
            condition, u, dtype=dtype
        )  # of two numbers torch.where would make the default dtype
    return torch.where(condition, u, v)


_TORCH: dict[str, Any] = {
    "max": _max,
    "min": _min,
    "clamp": _clamp,
    "abs": torch.abs,
    "sign": torch.sign,
    "sqrt": torch.sqrt,
    "pow": _pow,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": _softplus,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "ndtr": lambda u: 0.5 * torch.erfc(-math.sqrt(0.5) * u),  # torch.special.ndtr cancels
    "sin": torch.sin,
    "cos": torch.cos,
    "sinc": lambda u: torch.sinc(u / torch.pi),
    "atan": torch.atan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "sech": _sech,
    "asinh": torch.asinh,
    "hypot": _hypot,
    "ste": lambda u, like: (u.detach() if isinstance(u, Tensor) else u) + (like - like.detach()),
    "tanh_softplus": lambda u: torch.tanh(_softplus(u)),
    "log1p_sigmoid": lambda u: torch.log1p(torch.sigmoid(u)),
    "gamma": lambda u: torch.exp(torch.lgamma(u)),
}


def _dispatch(op: str) -> Any:
    host = HOST[op]
    on_tensors = _TORCH.get(
        op, host
    )  # arithmetic and comparisons are the operators, on floats and tensors alike

    def apply(*args: Any) -> Any:
        return on_tensors(*args) if any(isinstance(arg, Tensor) for arg in args) else host(*args)

    return apply


_FUNCTIONS = {op: _dispatch(op) for op in HOST}
_FUNCTIONS["div"] = lambda u, v: (
    u / v if isinstance(u, Tensor) or isinstance(v, Tensor) else HOST["div"](u, v)
)


# --------------------------------------------------------------------------------------------------- guards

# Functions of bounded derivative (and abs): what cannot turn a gradient of 0 into NaN at any finite argument.
_TAME = frozenset({"add", "sub", "neg", "abs", "sign", "max", "min", "clamp", "where"}) | frozenset(
    COMPARISONS.values()
)


def _is_tame(node: Node) -> bool:
    return all(
        not isinstance(part, Call)
        or not part.varies
        or part.op in _TAME
        or (part.op == "mul" and isinstance(part.args[0], Number))
        for part in node.walk()
    )


def _leaf_and_bound(condition: Call) -> tuple[Node, Node, str, bool] | None:
    """What a condition bounds, the bound, the comparison, and whether it bounds the absolute value."""
    left, right = condition.args
    op = condition.op
    if right.varies and not left.varies:
        mirrored = {"gt": "lt", "ge": "le", "lt": "gt", "le": "ge"}
        left, right, op = right, left, mirrored.get(op, op)
    absolute = isinstance(left, Call) and left.op == "abs"
    leaf = left.args[0] if absolute else left
    if isinstance(leaf, Number) or right.varies or right.is_vector or leaf.is_vector:
        return None
    return leaf, right, op, absolute


@functools.lru_cache(maxsize=4096)
def guarded(node: Node) -> Node:
    """The same function, with branches of where() shielded from arguments that they are not taken for."""
    done: dict[Node, Node] = {}
    for part in node.walk():
        if not isinstance(part, Call):
            done[part] = part
            continue
        args = [done[arg] for arg in part.args]
        if part.op == "where":
            condition, on_true, on_false = args
            assert isinstance(condition, Call)
            found = _leaf_and_bound(part.args[0])  # type: ignore[arg-type]
            if found:
                leaf, bound, op, absolute = found
                one = number(1)
                above, below = call("add", bound, one), call("sub", bound, one)
                inside = number(0) if absolute else below
                # a value of the leaf for which the branch is the one taken
                safe = {
                    "gt": (above, inside),
                    "ge": (above, inside),
                    "lt": (inside, above),
                    "le": (inside, above),
                    "eq": (bound, above),
                    "ne": (above, bound),
                }[op]
                if not _is_tame(on_true):
                    on_true = substitute(on_true, {leaf: call("where", condition, leaf, safe[0])})
                if not _is_tame(on_false):
                    on_false = substitute(on_false, {leaf: call("where", condition, safe[1], leaf)})
            args = [condition, on_true, on_false]
        new = call(part.op, *args)
        done[part] = saturation(Rewriter(), new) or new  # type: ignore[arg-type]
    return done[node]


def reference(node: Node, inputs: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> Tensor:
    """Computes a formula with torch operators, in the dtype of the inputs.

    Args:
        node: the graph, as `Activation.graph`.
        inputs: tensors by name; `parameters`: floats, or tensors that broadcast with them; a sequence of such
            for a coefficient
            vector.
    """
    first = next(iter(inputs.values()))
    functions = _FUNCTIONS | {"where": functools.partial(_where, first.dtype)}
    value = evaluate(guarded(node), {**inputs, **parameters}, functions)
    if isinstance(value, Tensor):
        return value
    return torch.full_like(first, value)  # a formula without its input


# ---------------------------------------------------------------------------------------------------- source

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**"} | {
    op: s for s, op in COMPARISONS.items()
}
_POWER = {"+": 20, "-": 20, "*": 30, "/": 30, "**": 50, **dict.fromkeys(COMPARISONS, 10)}
_ATOM, _SIGN, _PRODUCT, _LOOSE = 99, 40, 30, 0
_TENSOR_TEXT = {
    "clamp": "F.hardtanh({}, {}, {})",
    "max": "torch.maximum({}, {})",
    "min": "torch.minimum({}, {})",
    "softplus": "F.softplus({})",
    "sinc": "torch.sinc(({}) / math.pi)",
    "sech": "(1 / torch.cosh({}))",
    "hypot": "torch.sqrt(({0})**2 + ({1})**2)",
    "ndtr": "torch.special.ndtr({})",
    "ste": "({0} + ({1} - ({1}).detach()))",
    "tanh_softplus": "torch.tanh(F.softplus({}))",
    "log1p_sigmoid": "torch.log1p(torch.sigmoid({}))",
}
_NUMBER_TEXT = {
    "where": "({1} if {0} else {2})",
    "max": "max({}, {})",
    "min": "min({}, {})",
    "abs": "abs({})",
    "clamp": "min(max({}, {}), {})",
    "sign": "math.copysign(1, {})",
    "sigmoid": "(1 / (1 + math.exp(-({}))))",
    "softplus": "math.log1p(math.exp({}))",
    "sech": "(1 / math.cosh({}))",
}
_TERMS = {
    "poly": "({1})**j",
    "chebyshev": "torch.special.chebyshev_polynomial_t({1}, j)",
    "legendre": "torch.special.legendre_polynomial_p({1}, j)",
    "hermite": "torch.special.hermite_polynomial_h({1}, j)",
}


class _Source:
    def __init__(self, node: Node, taken: set[str]) -> None:
        self.lines: list[str] = []
        self.shown: dict[Node, tuple[str, int]] = {}
        self.taken = taken
        self.uses: dict[Node, int] = {}
        for part in node.walk():
            for arg in part.args:
                self.uses[arg] = self.uses.get(arg, 0) + 1
        for part in node.walk():
            self.enter(part)

    def inside(self, part: Node, power: int) -> str:
        text, own = self.shown[part]
        return f"({text})" if own <= power else text

    def enter(self, part: Node) -> None:
        if isinstance(part, Number):
            text = number_text(part.value).replace("pi", "math.pi")
            self.shown[part] = text, _LOOSE if part.value < 0 else _ATOM
        elif isinstance(part, (Input, Param)):
            self.shown[part] = f"{part.name}_j" if part.is_vector else part.name, _ATOM
        elif isinstance(part, Call):
            text, own = self.text(part)
            if self.uses.get(part, 0) > 1 and not part.is_vector and len(text) > 12:
                local = next(n for i in range(10**6) if (n := f"t{i}") not in self.taken)
                self.taken.add(local)
                self.lines.append(f"{local} = {text}")
                text, own = local, _ATOM
            self.shown[part] = text, own

    def text(self, part: Call) -> tuple[str, int]:
        args = part.args
        if part.op == "neg":
            return "-" + self.inside(args[0], _SIGN), _SIGN
        if part.op in _INFIX:
            symbol = _INFIX[part.op]
            own = _POWER[symbol]
            left = self.inside(args[0], own - (symbol != "**"))
            return f"{left} {symbol} {self.inside(args[1], own - (symbol == '**'))}", own
        if part.op in REDUCTIONS:
            vectors = [v.name for v in args[0].walk() if isinstance(v, Param) and v.vector]
            elements, values = ", ".join(f"{v}_j" for v in vectors), ", ".join(vectors)
            each = f"{elements} in zip({values})" if len(vectors) > 1 else f"{elements} in {values}"
            if part.op == "sum":
                return f"sum({self.shown[args[0]][0]} for {each})", _ATOM
            term = _TERMS[part.op].format(*(self.shown[arg][0] for arg in args))
            elements = f"({elements})" if len(vectors) > 1 else elements
            values = f"zip({values})" if len(vectors) > 1 else values
            return (
                f"sum({self.inside(args[0], _PRODUCT)} * {term} for j, {elements} in enumerate({values}))",
                _ATOM,
            )
        texts = [self.shown[arg][0] for arg in args]
        if not part.varies or (part.op == "where" and not args[0].varies):
            form = _NUMBER_TEXT.get(part.op, f"math.{part.op}({', '.join('{}' for _ in args)})")
        elif part.op in ("max", "min") and not args[0].varies:
            is_relu = part.op == "max" and isinstance(args[0], Number) and args[0].value == 0
            bound = "min" if part.op == "max" else "max"  # the larger of two: bounded from below
            form = "torch.relu({1})" if is_relu else f"torch.clamp({{1}}, {bound}={{0}})"
        else:
            form = _TENSOR_TEXT.get(part.op, f"torch.{part.op}({', '.join('{}' for _ in args)})")
            if part.op == "where":  # of two integers torch would make an integer
                texts[1:] = [
                    repr(a.value) if isinstance(a, Number) else t
                    for a, t in zip(args[1:], texts[1:], strict=True)
                ]
        return form.format(*texts), _ATOM


def source(name: str, node: Node, inputs: tuple[str, ...], parameters: Mapping[str, Any]) -> str:
    """The formula as a Python function for people to read: shared parts are named, the shields of branches
    left out.

    It runs, given `math`, `torch` and `torch.nn.functional as F`.

    Example:
        >>> from torchlin.catalogue import find
        >>> a = find("mish")
        >>> print(source("mish", a.graph, a.inputs, a.defaults()))
        def mish(x):
            return x * torch.tanh(F.softplus(x))
    """
    written = _Source(node, {*inputs, *parameters})
    arguments = [*inputs]
    for key, default in parameters.items():
        text = repr(default) if isinstance(default, tuple) else number_text(float(default))
        arguments.append(f"{key}={text}")
    body = [*written.lines, f"return {written.shown[node][0]}"]
    return "\n".join([f"def {name}({', '.join(arguments)}):", *(f"    {line}" for line in body)])
