"""Formulas: text to an expression graph, by a tokenizer and an operator-precedence parser. Nothing is ever
evaluated as code.

    formula    := { name "=" expression ";" } expression
    expression := numbers, names, + - * / **, unary minus, calls, parentheses; comparisons only as the first
    argument of where

Names are inputs (`x`; `a`, `b` of a gated unit), parameters, local definitions and the constants `pi` and
`e`; what comes first in this list hides what comes later. Equal subexpressions are one node, so "shared"
means "the same object".

Conventions at kinks, which every evaluator keeps: sign and step have derivative 0; abs'(0) = 0; at a tie max,
min and clamp take the derivative of the argument that does not depend on the inputs (of the first one, if
both do), so relu'(0) = 0 and hardtanh'(±1) = 0; where(c, u, v) takes value and derivative from the branch
that c chooses, whatever the other one holds. max and min are NaN if an argument is.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, NoReturn
from weakref import WeakValueDictionary

MAX_LENGTH = 4000  # characters
MAX_SIZE = 20_000  # operations, definitions written out
MAX_DEPTH = 60  # nested parentheses, signs and powers; keeps every recursion over a formula shallow


class FormulaError(ValueError):
    """A formula that cannot be read; the message points at the fault, `position` counts characters from 0."""

    def __init__(self, message: str, formula: str, position: int) -> None:
        start = formula.rfind("\n", 0, position) + 1
        line = formula[start:].split("\n", 1)[0].replace("\t", " ")
        column = position - start
        left = max(0, column - 60)  # a long line is shown around the fault only
        shown = ("…" if left else "") + line[left : column + 40] + ("…" if len(line) > column + 40 else "")
        caret = " " * (column - left + bool(left)) + "^"
        super().__init__(f"formula: {message} (at character {position})\n  {shown}\n  {caret}")
        self.formula = formula
        self.position = position


# ---------------------------------------------------------------------------------------------------- graph


@dataclass(frozen=True, eq=False)
class Node:
    """Part of a formula. The functions below make nodes, and give the same object for the same content."""

    @property
    def args(self) -> tuple[Node, ...]:
        return ()

    @cached_property
    def varies(self) -> bool:
        """Depends on an input: has to be computed for every element."""
        return any(arg.varies for arg in self.args)

    @cached_property
    def is_vector(self) -> bool:
        """Depends on a coefficient vector outside a reduction over it."""
        return any(arg.is_vector for arg in self.args)

    def walk(self) -> Iterator[Node]:
        """Every node once, arguments before what uses them, in the order of evaluation."""
        seen: set[Node] = set()
        stack: list[tuple[Node, bool]] = [(self, False)]
        while stack:
            node, done = stack.pop()
            if done:
                yield node
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack.extend((arg, False) for arg in reversed(node.args) if arg not in seen)

    def __str__(self) -> str:
        return to_text(self)


@dataclass(frozen=True, eq=False)
class Number(Node):
    value: float


@dataclass(frozen=True, eq=False)
class Input(Node):
    name: str
    varies = True


@dataclass(frozen=True, eq=False)
class Param(Node):
    name: str
    vector: bool = False

    @cached_property
    def is_vector(self) -> bool:
        return self.vector


@dataclass(frozen=True, eq=False)
class Call(Node):
    op: str
    operands: tuple[Node, ...]

    @property
    def args(self) -> tuple[Node, ...]:
        return self.operands

    @cached_property
    def is_vector(self) -> bool:
        return self.op not in REDUCTIONS and any(arg.is_vector for arg in self.args)


_nodes: WeakValueDictionary[tuple, Node] = WeakValueDictionary()
_lock = threading.Lock()


def _intern(key: tuple, make: Callable[[], Node]) -> Node:
    with _lock:
        node = _nodes.get(key)
        if node is None:
            node = make()
            _ = node.varies, node.is_vector  # now, while the parts know theirs: asked later, it would recurse
            _nodes[key] = node
        return node


def number(value: float) -> Node:
    value = float(value)
    return _intern(("number", value.hex()), lambda: Number(value))  # hex: 0.0 and -0.0 stay apart


def input_(name: str) -> Node:
    return _intern(("input", name), lambda: Input(name))


def param(name: str, vector: bool = False) -> Node:
    return _intern(("param", name, vector), lambda: Param(name, vector))


def call(op: str, *args: Node) -> Node:
    """A node of a primitive. What decides ties goes first in max and min; the sign of a number is its own."""
    if op == "neg" and isinstance(args[0], Number):
        return number(-args[0].value)
    if op in ("max", "min") and args[0].varies and not args[1].varies:
        args = (args[1], args[0])
    return _intern(("call", op, *args), lambda: Call(op, args))


def written_out(node: Node) -> int:
    """How many nodes the formula has where nothing is shared."""
    size: dict[Node, int] = {}
    for part in node.walk():
        size[part] = 1 + sum(size[arg] for arg in part.args)
    return size[node]


def substitute(node: Node, replacement: Mapping[Node, Node]) -> Node:
    """The formula with nodes replaced by others."""
    done: dict[Node, Node] = {}
    for part in node.walk():
        if part in replacement:
            done[part] = replacement[part]
        elif part.args:
            done[part] = call(part.op, *(done[arg] for arg in part.args))  # type: ignore[attr-defined]
        else:
            done[part] = part
    return done[node]


# ------------------------------------------------------------------------------------------------ functions

# Operations that every evaluator has, with the number of their arguments. docs and C++ semantics:
# cpp_code.py.
OPERATORS = {"+": "add", "-": "sub", "*": "mul", "/": "div", "**": "pow"}
COMPARISONS = {">": "gt", ">=": "ge", "<": "lt", "<=": "le", "==": "eq", "!=": "ne"}
PRIMITIVES = {
    "where": 3,
    "max": 2,
    "min": 2,
    "clamp": 3,
    "abs": 1,
    "sign": 1,
    "sqrt": 1,
    "pow": 2,
    "exp": 1,
    "expm1": 1,
    "log": 1,
    "log1p": 1,
    "tanh": 1,
    "sigmoid": 1,
    "softplus": 1,
    "erf": 1,
    "erfc": 1,
    "ndtr": 1,
    "sin": 1,
    "cos": 1,
    "sinc": 1,
    "atan": 1,
    "sinh": 1,
    "cosh": 1,
    "sech": 1,
    "asinh": 1,
    "hypot": 2,
    "ste": 2,
    "tanh_softplus": 1,
    "log1p_sigmoid": 1,
}
# Over the elements of coefficient vectors: Σ body, Σ c_j u^j, Σ c_j T_j(u), Σ c_j P_j(u), Σ c_j H_j(u)
# (physicists' Hermite).
REDUCTIONS = {"sum": 1, "poly": 2, "chebyshev": 2, "legendre": 2, "hermite": 2}
HOST_ONLY = {"gamma": 1}  # of parameters only
CONSTANTS = {"pi": math.pi, "e": math.e}

_HALF = number(0.5)
_ONE = number(1)


def _gelu_tanh(u: Node) -> Node:
    cubic = call("add", u, call("mul", number(0.044715), call("pow", u, number(3))))
    inner = call("mul", number(math.sqrt(2 / math.pi)), cubic)
    return call("mul", call("mul", _HALF, u), call("add", _ONE, call("tanh", inner)))


def _elu(u: Node, a: Node) -> Node:
    return call("where", call("gt", u, number(0)), u, call("mul", a, call("expm1", u)))


def _cauchy(u: Node) -> Node:
    negative = call("lt", u, number(0))  # atan(u) + pi/2 = atan(-1/u) there, without the cancellation
    t = call("atan", call("where", negative, call("div", number(-1), u), u))
    return call("div", call("where", negative, t, call("add", t, number(math.pi / 2))), number(math.pi))


# Functions that stand for an expression in the primitives.
MACROS: dict[str, tuple[int, Callable[..., Node]]] = {
    "relu": (1, lambda u: call("max", number(0), u)),
    "square": (1, lambda u: call("mul", u, u)),
    "cube": (1, lambda u: call("mul", call("mul", u, u), u)),
    "step": (1, lambda u: call("where", call("ge", u, number(0)), _ONE, number(0))),
    "Phi": (1, lambda u: call("ndtr", u)),  # the distribution function of the normal distribution,
    "cauchy": (1, _cauchy),  # of the Cauchy distribution
    "neg_abs": (1, lambda u: call("min", u, call("neg", u))),  # -abs(u), with derivative 1 at 0 instead of 0
    "gelu": (1, lambda u: call("mul", u, call("ndtr", u))),
    "gelu_tanh": (1, _gelu_tanh),
    "silu": (1, lambda u: call("mul", u, call("sigmoid", u))),
    "mish": (1, lambda u: call("mul", u, call("tanh", call("softplus", u)))),
    "elu": (2, _elu),
    "selu": (
        1,
        lambda u: call("mul", number(1.0507009873554805), _elu(u, number(1.6732632423543772))),
    ),
    "softsign": (1, lambda u: call("div", u, call("add", _ONE, call("abs", u)))),
}
FUNCTIONS = {
    **PRIMITIVES,
    **REDUCTIONS,
    **HOST_ONLY,
    **{name: arity for name, (arity, _) in MACROS.items()},
}

# Names that a parameter or an input cannot have: they would make a formula hard to read.
RESERVED = frozenset(FUNCTIONS)


# --------------------------------------------------------------------------------------------------- tokens


class Token(NamedTuple):
    kind: str  # number, name, operator, end
    text: str
    position: int


_TOKEN = re.compile(
    r"(?P<space>\s+)"
    r"|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<operator>\*\*|<=|>=|==|!=|[-+*/(),;=<>])",
    re.ASCII,
)


def tokenize(formula: str) -> list[Token]:
    """The formula's tokens, closed by one of kind "end"."""
    if not isinstance(formula, str):
        raise TypeError(f"formula must be a str, got {type(formula).__name__}")
    if len(formula) > MAX_LENGTH:
        raise FormulaError(f"longer than {MAX_LENGTH} characters", formula, MAX_LENGTH)
    tokens: list[Token] = []
    position = 0
    while position < len(formula):
        match = _TOKEN.match(formula, position)
        if match is None:
            raise FormulaError(f"unexpected character {formula[position]!r}", formula, position)
        if match.lastgroup != "space":
            tokens.append(Token(str(match.lastgroup), match.group(), position))
        position = match.end()
    tokens.append(Token("end", "", len(formula)))
    return tokens


# --------------------------------------------------------------------------------------------------- parser

# Binding powers. A minus sign binds tighter than a product and looser than a power, as in Python: -x**2 =
# -(x**2).
_POWER = {**dict.fromkeys(COMPARISONS, 10), "+": 20, "-": 20, "*": 30, "/": 30, "**": 50}
_SIGN = 40


class _Parser:
    def __init__(
        self, formula: str, inputs: Collection[str], parameters: Collection[str], vectors: Collection[str]
    ):
        self.formula = formula
        self.tokens = tokenize(formula)
        self.at = 0
        self.depth = 0
        self.locals: dict[str, Node] = {}
        self.names: dict[str, Node] = {name: number(value) for name, value in CONSTANTS.items()}
        self.names.update((name, param(name)) for name in parameters)
        self.names.update((name, param(name, True)) for name in vectors)
        self.names.update((name, input_(name)) for name in inputs)
        self.inputs = inputs

    @property
    def token(self) -> Token:
        return self.tokens[self.at]

    def fail(self, message: str, token: Token | None = None) -> NoReturn:
        raise FormulaError(message, self.formula, (token or self.token).position)

    def next(self) -> Token:
        token = self.token
        self.at += 1
        return token

    def expect(self, text: str, why: str) -> None:
        if self.token.text != text:
            self.fail(f"expected {text!r} {why}, got {self.describe(self.token)}")
        self.at += 1

    @staticmethod
    def describe(token: Token) -> str:
        return "the end" if token.kind == "end" else repr(token.text)

    def parse(self) -> Node:
        while self.token.kind == "name" and self.tokens[self.at + 1].text == "=":
            self.definition()
        start = self.token
        node = self.value()
        self.small(node, start)
        if self.token.kind != "end":
            self.fail(f"expected an operator or the end, got {self.describe(self.token)}")
        if node.is_vector:
            self.fail("the result is a vector: a coefficient vector belongs inside sum() or poly()", start)
        return node

    def definition(self) -> None:
        name = self.next()
        if name.text in FUNCTIONS or (name.text in self.names and name.text not in CONSTANTS):
            self.fail(f"{name.text!r} has a meaning already and cannot be defined again", name)
        if name.text in self.locals:
            self.fail(f"{name.text!r} is defined twice", name)
        self.next()
        self.locals[name.text] = self.value()
        self.expect(";", f"after the definition of {name.text!r}")

    def small(self, node: Node, token: Token) -> None:
        """Definitions that use one another can write out to any size; some things are written out."""
        if written_out(node) > MAX_SIZE:
            self.fail(f"larger than {MAX_SIZE} operations when its definitions are written out", token)

    def value(self) -> Node:
        """An expression that is no comparison."""
        start = self.token
        node = self.expression(0)
        if isinstance(node, Call) and node.op in COMPARISONS.values():
            self.fail(
                "a comparison is a condition, not a number: it can only be where()'s first argument", start
            )
        return node

    def expression(self, power: int) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"nested deeper than {MAX_DEPTH} levels")
        start = self.token
        left = self.prefix()
        while (right_power := _POWER.get(self.token.text, -1)) > power and self.token.kind == "operator":
            operator = self.next()
            self.numeric(start, left)
            start_right = self.token
            # a ** b ** c is a ** (b ** c); comparisons do not chain
            right = self.expression(right_power - (operator.text == "**"))
            self.numeric(start_right, right)
            if operator.text in COMPARISONS:
                left = call(COMPARISONS[operator.text], left, right)
                if self.token.text in COMPARISONS:
                    self.fail("comparisons cannot be chained: nest where() instead")
            else:
                left = call(OPERATORS[operator.text], left, right)
        self.depth -= 1
        return left

    def numeric(self, token: Token, node: Node) -> None:
        if isinstance(node, Call) and node.op in COMPARISONS.values():
            self.fail("a comparison cannot be computed with: it can only be where()'s first argument", token)

    def prefix(self) -> Node:
        token = self.next()
        if token.kind == "number":
            value = float(token.text)
            if math.isinf(value):
                self.fail(f"{token.text} is too large for a number", token)
            return number(value)
        if token.text in ("-", "+"):
            start = self.token
            node = self.expression(_SIGN)
            self.numeric(start, node)
            if token.text == "+":
                return node
            return call("neg", node)
        if token.text == "(":
            node = self.expression(0)
            self.expect(")", "to close the parenthesis")
            return node
        if token.kind == "name":
            return self.call(token) if self.token.text == "(" else self.name(token)
        self.fail(f"expected a number, a name or '(', got {self.describe(token)}", token)

    def name(self, token: Token) -> Node:
        node = self.locals.get(token.text) or self.names.get(token.text)
        if node is not None:
            return node
        if token.text in FUNCTIONS:
            self.fail(f"{token.text!r} is a function and needs arguments in parentheses", token)
        known = [*self.names, *self.locals]
        self.fail(f"unknown name {token.text!r}{_closest(token.text, known)}; {_list('names', known)}", token)

    def call(self, token: Token) -> Node:
        arity = FUNCTIONS.get(token.text)
        if arity is None:
            if token.text in self.names or token.text in self.locals:
                self.fail(f"{token.text!r} is not a function; write {token.text}*(...) for a product", token)
            hint = _closest(token.text, FUNCTIONS) or f"; {_list('functions', FUNCTIONS)}"
            self.fail(f"unknown function {token.text!r}{hint}", token)
        self.next()
        starts: list[Token] = []
        args: list[Node] = []
        while self.token.text != ")":
            if args:
                self.expect(",", f"or ')' in the arguments of {token.text}()")
            starts.append(self.token)
            condition = token.text == "where" and not args
            args.append(self.expression(0) if condition else self.value())
            if condition and not (isinstance(args[0], Call) and args[0].op in COMPARISONS.values()):
                self.fail("where()'s first argument must be a comparison", starts[0])
        close = self.next()
        if len(args) != arity:
            takes = f"{arity} argument{'s' * (arity != 1)}"
            self.fail(
                f"{token.text}() takes {takes}, got {len(args)}",
                starts[arity] if len(args) > arity else close,
            )
        self.check(token, starts, args)
        return MACROS[token.text][1](*args) if token.text in MACROS else call(token.text, *args)

    def check(self, token: Token, starts: list[Token], args: list[Node]) -> None:
        if token.text in HOST_ONLY and (args[0].varies or args[0].is_vector):
            self.fail(f"{token.text}() takes scalar parameters and numbers only", starts[0])
        if token.text in REDUCTIONS:
            if not args[0].is_vector:
                self.fail(f"{token.text}() needs a coefficient vector in its first argument", starts[0])
            if token.text != "sum":
                if args[0].varies:
                    self.fail(f"the coefficients of {token.text}() cannot depend on the input", starts[0])
                if args[1].is_vector:
                    self.fail(
                        f"the second argument of {token.text}() must be a number, not a vector", starts[1]
                    )


def parse(
    formula: str,
    parameters: Collection[str] = (),
    *,
    inputs: Collection[str] = ("x",),
    vectors: Collection[str] = (),
) -> Node:
    """Reads a formula.

    Args:
        formula: the text; `name = expression;` in front defines names for use in what follows.
        parameters: names of scalar parameters; `vectors`: of coefficient vectors.
        inputs: names of the inputs.

    Raises:
        FormulaError: the text is no formula; the message shows where and, for a name, the closest known ones.

    Example:
        >>> from torchlin.catalogue.formula import parse
        >>> str(parse("where(x > 0, x, a*expm1(x))", ["a"]))
        'where(x > 0, x, a*expm1(x))'
    """
    for name in (*inputs, *parameters, *vectors):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII) or name in RESERVED:
            raise ValueError(f"parameters: {name!r} cannot be a name in a formula")
    return _Parser(formula, inputs, parameters, vectors).parse()


def _closest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    close = close or [other for other in known if other.lower() == name.lower()]
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _list(what: str, known: Collection[str]) -> str:
    return f"the {what} here are {', '.join(known)}"


# ---------------------------------------------------------------------------------------------------- print

_SYMBOL = {op: text for text, op in (OPERATORS | COMPARISONS).items()}


def to_text(node: Node) -> str:
    """The formula as text that parses to the same graph; local definitions are written out."""
    shown: dict[Node, tuple[str, int]] = {}  # the text and how tightly its outermost operator binds

    def inside(node: Node, power: int) -> str:
        text, own = shown[node]
        return f"({text})" if own <= power else text

    for part in node.walk():
        if isinstance(part, Number):
            shown[part] = number_text(part.value), 0 if part.value < 0 else 99
        elif isinstance(part, (Input, Param)):
            shown[part] = part.name, 99
        elif isinstance(part, Call) and part.op == "neg":
            shown[part] = "-" + inside(part.args[0], _SIGN), _SIGN
        elif isinstance(part, Call) and part.op in _SYMBOL:
            symbol = _SYMBOL[part.op]
            own = _POWER[symbol]
            gap = " " if own <= 20 else ""
            left = inside(part.args[0], own - (symbol != "**"))
            right = inside(part.args[1], own - (symbol == "**"))
            shown[part] = left + gap + symbol + gap + right, own
        elif isinstance(part, Call):
            arguments = ", ".join(shown[arg][0] for arg in part.args)
            shown[part] = f"{part.op}({arguments})", 99
    return shown[node][0]


def number_text(value: float) -> str:
    if value == math.pi:
        return "pi"
    return str(int(value)) if value.is_integer() and abs(value) < 1e16 else repr(value)


# ----------------------------------------------------------------------------------------------------- host


def _host_pow(u: float, v: float) -> float:
    try:
        return math.pow(u, v)
    except ValueError:  # 0 to a negative power, or a negative number to a fraction
        return math.inf if u == 0 else math.nan


def _checked(
    function: Callable[[float], float], outside: Callable[[float], float]
) -> Callable[[float], float]:
    def checked(u: float) -> float:
        try:
            return function(u)
        except (ValueError, OverflowError):
            return outside(u)

    return checked


def _sigmoid(u: float) -> float:
    return 1 / (1 + math.exp(-u)) if u > -700 else math.exp(u)


def _divide(u: float, v: float) -> float:
    if v == 0:
        return math.nan if u == 0 or math.isnan(u) else math.copysign(math.inf, u) * math.copysign(1, v)
    return u / v


_exp = _checked(math.exp, lambda u: math.inf)
_log = _checked(math.log, lambda u: -math.inf if u == 0 else math.nan)
HOST: dict[str, Callable[..., float]] = {
    "add": lambda u, v: u + v,
    "sub": lambda u, v: u - v,
    "mul": lambda u, v: u * v,
    "div": _divide,
    "neg": lambda u: -u,
    "gt": lambda u, v: u > v,
    "ge": lambda u, v: u >= v,
    "lt": lambda u, v: u < v,
    "le": lambda u, v: u <= v,
    "eq": lambda u, v: u == v,
    "ne": lambda u, v: u != v,
    "where": lambda c, u, v: u if c else v,
    "max": max,
    "min": min,
    "clamp": lambda u, lo, hi: min(max(u, lo), hi),
    "abs": abs,
    "sign": lambda u: float((u > 0) - (u < 0)),
    "pow": _host_pow,
    "sqrt": _checked(math.sqrt, lambda u: math.nan),
    "exp": _exp,
    "expm1": _checked(math.expm1, lambda u: math.inf),
    "log": _log,
    "log1p": _checked(math.log1p, lambda u: -math.inf if u == -1 else math.nan),
    "tanh": math.tanh,
    "sigmoid": _sigmoid,
    "softplus": lambda u: max(u, 0.0) + math.log1p(math.exp(-abs(u))),
    "erf": math.erf,
    "erfc": math.erfc,
    "ndtr": lambda u: 0.5 * math.erfc(-u * math.sqrt(0.5)),
    "sin": math.sin,
    "cos": math.cos,
    "sinc": lambda u: math.sin(u) / u if u else 1.0,
    "atan": math.atan,
    "sinh": _checked(math.sinh, lambda u: math.copysign(math.inf, u)),
    "cosh": _checked(math.cosh, lambda u: math.inf),
    "asinh": math.asinh,
    "sech": lambda u: 2 / (math.exp(abs(u)) + math.exp(-abs(u))) if abs(u) < 700 else 0.0,
    "gamma": _checked(math.gamma, lambda u: math.nan),
    "ste": lambda u, v: u,
    "hypot": math.hypot,
    "tanh_softplus": lambda u: math.tanh(HOST["softplus"](u)),
    "log1p_sigmoid": lambda u: math.log1p(_sigmoid(u)),
}


Value = Any  # a number, a tensor, or a list of them: the elements of what depends on a coefficient vector


def evaluate(
    node: Node, values: Mapping[str, Value], functions: Mapping[str, Callable[..., Value]] = HOST
) -> Value:
    """The value of a graph, given those of its inputs and parameters by name.

    A coefficient vector is a sequence; what depends on it is computed for each of its elements. With the
    default functions it works on floats, in double precision; other functions make it work on anything.
    """
    done: dict[Node, Value] = {}
    for part in node.walk():
        if isinstance(part, Number):
            done[part] = part.value
        elif isinstance(part, (Input, Param)):
            value = values[part.name]
            done[part] = list(value) if part.is_vector else value
        elif isinstance(part, Call):
            args = [done[arg] for arg in part.args]
            if part.op in REDUCTIONS:
                done[part] = reduce_vector(part.op, args, functions)
            elif any(isinstance(arg, list) for arg in args):
                lengths = {len(arg) for arg in args if isinstance(arg, list)}
                if len(lengths) > 1:
                    raise ValueError(
                        f"coefficient vectors of different lengths, {sorted(lengths)}, in {part}"
                    )
                rows = zip(
                    *(arg if isinstance(arg, list) else [arg] * max(lengths) for arg in args), strict=True
                )
                done[part] = [functions[part.op](*row) for row in rows]
            else:
                done[part] = functions[part.op](*args)
        else:
            raise TypeError(f"{type(part).__name__} is no part of a formula as written")
    return done[node]


# Three-term recurrences f_{j+1} = alpha(j) u f_j - gamma(j) f_{j-1} with f_0 = 1.
RECURRENCES: dict[str, tuple[Callable[[int], float], Callable[[int], float]]] = {
    "chebyshev": (lambda j: 2.0 if j else 1.0, lambda j: 1.0 if j else 0.0),
    "legendre": (lambda j: (2 * j + 1) / (j + 1), lambda j: j / (j + 1)),
    "hermite": (lambda j: 2.0, lambda j: 2.0 * j),
}


def reduce_vector(op: str, args: list[Value], functions: Mapping[str, Callable[..., Value]]) -> Value:
    """One of REDUCTIONS of its arguments, the first of which is a list."""
    add, sub, mul = functions["add"], functions["sub"], functions["mul"]
    if op == "sum":
        return functools.reduce(add, args[0])
    coefficients, u = args
    if op == "poly":
        return functools.reduce(lambda total, c: add(mul(total, u), c), reversed(coefficients))
    alpha, gamma = RECURRENCES[op]
    total, before, now = coefficients[0], 0.0, 1.0
    for j, c in enumerate(coefficients[1:]):
        before, now = now, sub(mul(mul(alpha(j), u), now), mul(gamma(j), before))
        total = add(total, mul(c, now))
    return total
