"""Rewrites of a parsed formula that make its kernel faster or more accurate, and the split into host and
device work.

Each rule is an identity of real numbers that keeps the derivative, and says why it pays. What the rules may
assume about parameters is their domain: `nonnegative` names those that are never below 0.

After the rules, :func:`prepare` replaces every largest part that does not depend on the inputs by a slot: the
host computes its value once for a call, in double precision (with autograd, where a parameter is learned),
and the kernel reads a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

from .formula import COMPARISONS, PRIMITIVES, REDUCTIONS, Call, Node, Number, Param, call, evaluate, number

ZERO, ONE, TWO, HALF = number(0), number(1), number(2), number(0.5)
# exp(80) = 5.5e34 is finite in float32, and still is when a derivative multiplies it; whatever saturates has
# done so long before.
LARGE = number(80)
MAX_POWER = 16  # powers up to this one become products


def _add(u: Node, v: Node) -> Node:
    return call("add", u, v)


def _sub(u: Node, v: Node) -> Node:
    return call("sub", u, v)


def _mul(u: Node, v: Node) -> Node:
    return call("mul", u, v)


def _div(u: Node, v: Node) -> Node:
    return call("div", u, v)


def _neg(u: Node) -> Node:
    return call("neg", u)


# ---------------------------------------------------------------------------------------------------- rules

Rule = Callable[["Rewriter", Call], "Node | None"]
RULES: list[tuple[str, Rule]] = []


def rule(reason: str) -> Callable[[Rule], Rule]:
    def enter(function: Rule) -> Rule:
        RULES.append((reason, function))
        return function

    return enter


class Rewriter:
    """Applies the rules from the leaves up, until none does anything."""

    def __init__(self, nonnegative: Collection[str] = ()) -> None:
        self.known = frozenset(nonnegative)
        self.done: dict[Node, Node] = {}

    def simplify(self, node: Node) -> Node:
        for part in node.walk():
            if part in self.done:
                continue
            if not isinstance(part, Call):
                self.done[part] = part
                continue
            new: Node = call(part.op, *(self.done[arg] for arg in part.args))
            if isinstance(new, Call):
                for _, apply in RULES:
                    changed = apply(self, new)
                    if changed is not None:
                        new = self.simplify(changed)
                        break
            self.done[part] = new
            self.done[new] = new
        return self.done[node]

    def is_negation(self, u: Node, v: Node) -> bool:
        return self.simplify(_neg(u)) is v

    def is_nonnegative(self, node: Node) -> bool:
        if isinstance(node, Number):
            return node.value >= 0
        if isinstance(node, Param):
            return node.name in self.known
        if not isinstance(node, Call):
            return False
        if node.op in ("abs", "exp", "sqrt", "sigmoid", "softplus", "hypot"):
            return True
        if node.op == "mul" and node.args[0] is node.args[1]:
            return True
        if node.op in ("add", "mul", "div", "min"):
            return all(self.is_nonnegative(arg) for arg in node.args)
        return node.op == "max" and any(self.is_nonnegative(arg) for arg in node.args)


def _is(node: Node, op: str) -> bool:
    return isinstance(node, Call) and node.op == op


@rule("constants are computed once, in double precision")
def fold(r: Rewriter, n: Call) -> Node | None:
    if (
        n.op in REDUCTIONS
        or n.op in COMPARISONS.values()
        or not all(isinstance(arg, Number) for arg in n.args)
    ):
        return None
    value = float(evaluate(n, {}))
    return number(value) if math.isfinite(value) else None


@rule(
    "one order of operands, numbers and parameters first, so that the other rules need to know one form only"
)
def order(r: Rewriter, n: Call) -> Node | None:
    if n.op in ("add", "mul"):
        u, v = n.args
        if (u.varies and not v.varies) or (
            v.varies == u.varies and isinstance(v, Number) and not isinstance(u, Number)
        ):
            return call(n.op, v, u)
    return None


@rule("neutral elements cost an instruction each")
def neutral(r: Rewriter, n: Call) -> Node | None:
    match n:
        case Call("add", (Number(value=0.0), u)) | Call("sub", (u, Number(value=0.0))):
            return u
        case Call("sub", (Number(value=0.0), u)):
            return _neg(u)
        case Call("mul", (Number(value=1.0), u)) | Call("div" | "pow", (u, Number(value=1.0))):
            return u
        case Call("mul", (Number(value=-1.0), u)) | Call("div", (u, Number(value=-1.0))):
            return _neg(u)
        case Call("neg", (Call("neg", (u,)),)):
            return u
        case Call("where", (_, u, v)) if u is v:
            return u
    return None


@rule("a sign that moves outwards or into a constant is free")
def signs(r: Rewriter, n: Call) -> Node | None:
    match n:
        case Call("neg", (Call("mul", (k, u)),)) if not k.varies:
            return _mul(_neg(k), u)
        case Call("neg", (Call("sub", (u, v)),)):
            return _sub(v, u)
        case Call("neg", (Call("add", (k, u)),)) if not k.varies and u.varies:
            return _sub(_neg(k), u)
        case Call("sub", (k, Call("mul", (m, u)))) if not k.varies and not m.varies and u.varies:
            return _add(k, _mul(_neg(m), u))
        case Call("add", (u, Call("neg", (v,)))) if v.varies:
            return _sub(u, v)
        case Call("add", (Call("neg", (u,)), v)) if u.varies:
            return _sub(v, u)
        case Call("sub", (u, Call("neg", (v,)))) if v.varies:
            return _add(u, v)
        case Call("sub", (u, k)) if not k.varies and u.varies:
            return _add(_neg(k), u)
        case Call("mul", (Call("neg", (u,)), Call("neg", (v,)))):
            return _mul(u, v)
        case Call("mul", (k, Call("neg", (u,)))) if not k.varies:
            return _mul(_neg(k), u)
        case Call("mul", (Call("neg", (u,)), v)) | Call("mul", (v, Call("neg", (u,)))) if u.varies:
            return _neg(_mul(u, v))
        case Call("div", (Call("neg", (u,)), v)) if u.varies:
            return _neg(_div(u, v))
        case Call("abs", (Call("neg", (u,)),)):
            return call("abs", u)
    return None


@rule(
    "a division costs five times a multiplication: by a constant it becomes one; constant factors gather in "
    "front, where the host multiplies them"
)
def products(r: Rewriter, n: Call) -> Node | None:
    match n:
        case Call("div", (u, k)) if u.varies and not k.varies:
            return _mul(_div(ONE, k), u)
        case Call("mul", (k, Call("mul", (m, u)))) if not k.varies and not m.varies and u.varies:
            return _mul(_mul(k, m), u)
        case Call("mul", (Call("mul", (k, u)), v)) if not k.varies and u.varies and v.varies:
            return _mul(k, _mul(u, v))
        case Call("mul", (u, Call("mul", (k, v)))) if u.varies and not k.varies and v.varies:
            return _mul(k, _mul(u, v))
        case Call("mul", (k, Call("div", (m, u)))) if not k.varies and not m.varies and m is not ONE:
            return _div(_mul(k, m), u)
        case Call("div", (Call("mul", (k, u)), v)) if not k.varies and u.varies and v.varies:
            return _mul(k, _div(u, v))
        case Call("div", (u, Call("mul", (k, v)))) if not k.varies and v.varies:
            return _div(_div(u, k), v) if not u.varies else _mul(_div(ONE, k), _div(u, v))
        case Call("mul", (u, Call("div", (Number(value=1.0), v)))) if u.varies:
            return _div(u, v)
        case Call("mul", (Call("div", (Number(value=1.0), v)), u)) if u.varies and v.varies:
            return _div(u, v)
    return None


@rule("constant terms gather, where the host adds them")
def sums(r: Rewriter, n: Call) -> Node | None:
    match n:
        case Call("add", (k, Call("add", (m, u)))) if not k.varies and not m.varies and u.varies:
            return _add(_add(k, m), u)
        case Call("add", (k, Call("sub", (m, u)))) if not k.varies and not m.varies and u.varies:
            return _sub(_add(k, m), u)
        case Call("sub", (k, Call("add", (m, u)))) if not k.varies and not m.varies and u.varies:
            return _sub(_sub(k, m), u)
    return None


@rule("a product costs a twentieth of a power, is exact where that is not, and takes a negative base")
def powers(r: Rewriter, n: Call) -> Node | None:
    match n:
        case Call("pow", (u, Number(value=p))):
            if p == 0.5:
                return call("sqrt", u)
            if p == -0.5:
                return _div(ONE, call("sqrt", u))
            if p.is_integer() and 2 <= abs(p) <= MAX_POWER:
                power = _power(u, int(abs(p)))
                return power if p > 0 else _div(ONE, power)
            if p == -1:
                return _div(ONE, u)
        case Call("pow", (Number(value=base), u)) if base > 0 and u.varies:
            return call("exp", _mul(number(math.log(base)), u))
    return None


def _power(u: Node, n: int) -> Node:
    if n == 1:
        return u
    half = _power(u, n // 2)
    return _mul(_mul(half, half), u) if n % 2 else _mul(half, half)


@rule("exp(u) - 1 and log(1 + u) lose all digits near 0; expm1 and log1p cost the same and do not")
def exp_log(r: Rewriter, n: Call) -> Node | None:
    match n:
        case Call("add", (Number(value=-1.0), Call("exp", (u,)))):
            return call("expm1", u)
        case Call("sub", (Number(value=1.0), Call("exp", (u,)))):
            return _neg(call("expm1", u))
        case Call("log", (Call("add", (Number(value=1.0), u)),)) if u.varies:
            return call("log1p", u)
        case Call("log1p", (Call("exp", (u,)),)):
            return call("softplus", u)
        case Call("mul", (Call("exp", (u,)), Call("exp", (v,)))) if u.varies and v.varies:
            return call("exp", _add(u, v))
    return None


@rule("the logistic function in its own words: one exp and one division, and no overflow")
def logistic(r: Rewriter, n: Call) -> Node | None:
    match n:
        case Call("div", (u, Call("add", (Number(value=1.0), Call("exp", (v,)))))):
            return _mul(u, call("sigmoid", _neg(v)))
        case Call("div", (u, Call("add", (Number(value=1.0), Call("mul", (k, Call("exp", (v,)))))))):
            if not k.varies and r.is_nonnegative(k):  # k exp(v) = exp(v + log k)
                return _mul(u, call("sigmoid", _neg(_add(call("log", k), v))))
        case Call("pow", (Call("add", (Number(value=1.0), Call("exp", (v,)))), p)) if not p.varies:
            return call("exp", _mul(p, call("softplus", v)))
        case Call("pow", (Call("add", (Number(value=1.0), Call("mul", (k, Call("exp", (v,)))))), p)):
            if not k.varies and not p.varies and r.is_nonnegative(k):
                return call("exp", _mul(p, call("softplus", _add(call("log", k), v))))
        case Call("mul", (Call("exp", (u,)), Call("sigmoid", (v,)))) if r.is_negation(u, v):
            return call("sigmoid", u)  # exp(u) sigmoid(-u) = sigmoid(u), which does not overflow
        case Call("mul", (Call("sigmoid", (v,)), Call("exp", (u,)))) if r.is_negation(u, v):
            return call("sigmoid", u)
        case Call("mul", (Call("sigmoid", (u,)) as s, Call("sub", (Number(value=1.0), t)))) if s is t:
            # sigmoid(u) (1 - sigmoid(u)) cancels for u >> 0
            h = call("sech", _mul(HALF, u))
            return _mul(number(0.25), _mul(h, h))
    return None


@rule("1 + tanh and 1 + erf cancel in the negative tail, 1 - cos near 0; at the same cost others do not")
def tails(r: Rewriter, n: Call) -> Node | None:
    match n:
        case Call("add", (Number(value=1.0), Call("tanh", (u,)))):
            return _mul(TWO, call("sigmoid", _mul(TWO, u)))
        case Call("sub", (Number(value=1.0), Call("tanh", (u,)))):
            return _mul(TWO, call("sigmoid", _mul(number(-2), u)))
        case Call("sub", (Number(value=1.0), Call("mul", (Call("tanh", (u,)) as t, s)))) if s is t:
            h = call("sech", u)
            return _mul(h, h)
        case Call("add", (Number(value=1.0), Call("erf", (u,)))):
            return call("erfc", _neg(u))
        case Call("sub", (Number(value=1.0), Call("erf", (u,)))):
            return call("erfc", u)
        case Call("sub", (Number(value=1.0), Call("ndtr", (u,)))):
            return call("ndtr", _neg(u))
        case Call("sub", (Number(value=1.0), Call("cos", (u,)))):
            h = call("sin", _mul(HALF, u))
            return _mul(TWO, _mul(h, h))
    return None


@rule(
    "erfc(-u/sqrt(2)) = 2 Phi(u), and Phi squares u exactly: the square of the product would be 50 units off"
)
def normal(r: Rewriter, n: Call) -> Node | None:
    match n:
        case Call("erfc", (Call("mul", (Number(value=c), u)),)) if math.isclose(abs(c), math.sqrt(0.5)):
            return _mul(TWO, call("ndtr", _neg(u) if c > 0 else u))
    return None


@rule(
    "compositions that collapse to one exp: tanh(softplus(u)) = n/(n + 2) with n = exp(u) (exp(u) + 2); "
    "tanh(log1p(s)) = s (s + 2)/(s (s + 2) + 2)"
)
def compositions(r: Rewriter, n: Call) -> Node | None:
    match n:
        case Call("tanh", (Call("softplus", (u,)),)):
            return call("tanh_softplus", u)
        case Call("log1p", (Call("sigmoid", (u,)),)):
            return call("log1p_sigmoid", u)
        case Call("tanh", (Call("log1p_sigmoid", (u,)),)):
            s = call("sigmoid", u)
            v = _mul(s, _add(TWO, s))
            return _div(v, _add(TWO, v))
    return None


# What costs several times more than choosing its argument.
_COSTLY = frozenset(PRIMITIVES) - {"where", "max", "min", "clamp", "abs", "sign", "ste"}


@rule("where() computes both branches: of two that end in one function it chooses the argument")
def choice(r: Rewriter, n: Call) -> Node | None:
    match n:
        case Call("where", (condition, Call(f, us), Call(g, vs))) if f == g and f in _COSTLY:
            return call(f, *(call("where", condition, u, v) for u, v in zip(us, vs, strict=True)))
        case Call("where", (condition, Call("mul", (k, Call(f, us))), Call("mul", (m, Call(g, vs))))):
            if f == g and f in _COSTLY and not k.varies and not m.varies:
                chosen = call(f, *(call("where", condition, u, v) for u, v in zip(us, vs, strict=True)))
                return _mul(call("where", condition, k, m), chosen)
    return None


@rule(
    "an exp that overflows in a function that has saturated gives the derivative 0 * inf: it stops at exp(80)"
)
def saturation(r: Rewriter, n: Call) -> Node | None:
    if n.op not in ("exp", "expm1", "tanh", "erf", "sigmoid", "atan"):
        return None
    match n.args[0]:
        case Call("exp", (u,)):
            factor: Node | None = None
        case Call("neg", (Call("exp", (u,)),)):
            factor = number(-1)
        case Call("mul", (k, Call("exp", (u,)))) if not k.varies:
            factor = k
        case _:
            return None
    if n.op in ("exp", "expm1") and (factor is None or r.is_nonnegative(factor)):
        return None  # grows: infinity is the answer
    match u:
        case Call("min", (Number(), _)):
            return None
    e = call("exp", call("min", LARGE, u))
    return call(n.op, e if factor is None else _mul(factor, e))


@rule(
    "sqrt(k + u^2) overflows for u > 1e19 in float32, where hypot does not; sqrt(1 + u^2) - 1 and "
    "u + sqrt(k + u^2) cancel"
)
def roots(r: Rewriter, n: Call) -> Node | None:
    if not n.varies:
        return None
    match n:
        case Call("sqrt", (Call("add", (k, Call("mul", (u, v)))),)) if (
            u is v and not k.varies and r.is_nonnegative(k)
        ):
            return call("hypot", call("sqrt", k), u)
        case Call("sqrt", (Call("add", (k, Call("mul", (m, Call("mul", (u, v)))))),)):
            if u is v and not k.varies and not m.varies and r.is_nonnegative(k) and r.is_nonnegative(m):
                return call("hypot", call("sqrt", k), _mul(call("sqrt", m), u))
        case Call("add", (Number(value=-1.0), Call("hypot", (Number(value=1.0), u)) as h)):
            small = _mul(u, _div(u, _add(ONE, h)))  # for large u as it was: inf - 1 is better than inf/inf
            large = _sub(call("max", ONE, h), ONE)  # max: h - 1 itself would come back here
            return call("where", call("gt", call("abs", u), ONE), large, small)
        case Call("add", (Number(value=1.0), Call("div", (u, Call("hypot", (k, v)) as h)))) if (
            u is v and not k.varies
        ):
            return _div(_add(u, h), h)  # and the next case
        case Call("add", (u, Call("hypot", (k, v)) as h)) if u is v and u.varies and not k.varies:
            return call("where", call("gt", u, ZERO), _add(h, u), _div(_mul(k, k), _sub(h, u)))
        case Call("sub", (u, Call("hypot", (k, v)) as h)) if u is v and u.varies and not k.varies:
            return _neg(call("where", call("gt", u, ZERO), _div(_mul(k, k), _add(h, u)), _sub(h, u)))
    return None


def simplify(node: Node, nonnegative: Collection[str] = ()) -> Node:
    """The formula after all rules."""
    return Rewriter(nonnegative).simplify(node)


# -------------------------------------------------------------------------------------------------- prepare


@dataclass(frozen=True, eq=False)
class Slot(Node):
    """A value that the host prepares for the kernel; a vector where it stands for coefficients."""

    index: int
    vector: bool = False

    @cached_property
    def is_vector(self) -> bool:
        return self.vector


_slots: dict[tuple[int, bool], Slot] = {}


def slot(index: int, vector: bool = False) -> Slot:
    return _slots.setdefault((index, vector), Slot(index, vector))


@dataclass(frozen=True)
class Prepared:
    """A kernel's body, in inputs and slots, and what the host puts into the slots."""

    body: Node
    slots: tuple[Node, ...]


def prepare(node: Node, nonnegative: Collection[str] = ()) -> Prepared:
    """Simplifies a formula and splits it into the work of the host and that of the kernel.

    Formulas that differ only in what the host computes get the same body: it can be compared with `is`.
    """
    simple = simplify(node, nonnegative)
    slots: list[Node] = []
    index: dict[Node, Slot] = {}
    done: dict[Node, Node] = {}

    def enter(part: Node) -> Node:
        if isinstance(part, Number) or _on_device(part):
            return done[part]
        if part not in index:
            index[part] = slot(len(slots), part.is_vector)
            slots.append(part)
        return index[part]

    for part in _needed(simple):
        done[part] = call(part.op, *(enter(arg) for arg in part.args)) if isinstance(part, Call) else part
    return Prepared(enter(simple), tuple(slots))


def _on_device(part: Node) -> bool:
    return part.varies or (isinstance(part, Call) and part.op in COMPARISONS.values())


def _needed(node: Node) -> Iterator[Node]:
    """The parts that the kernel computes, in order."""
    return (part for part in node.walk() if _on_device(part) or isinstance(part, Number))
