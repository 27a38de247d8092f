"""C++ functors from the catalogue, one for each kernel, and their split into translation units. Run by the
build; needs no torch.

A kernel becomes

    struct K_elu {
      static constexpr int id = 1033905283, inputs = 1, slots = 1, reductions = 0;
      static constexpr unsigned vectors = 0x0;  // bit i: slot i is a coefficient vector
      template <class T, class P> static TORCHLIN_FUNCTOR auto f(T x, const P& p) { ... }
    };

which computes in terms of T and these names; TORCHLIN_FUNCTOR is `inline` unless it is defined before. T is a
SIMD vector, a scalar, or a dual number (value and derivatives) of either. A constant C is T itself, or the
value type of a dual number: it mixes with T in everything below, converts to T, and has no derivative at all
rather than one of 0, which would cost a multiplication and make 0 * inf of it.

    T + T  T - T  T * T  T / T  -T, with C on either side too
    tl::lit<T>(c)                  the C of a double, known when compiling but in loops over coefficients
    tl::slot<T, i>(p)              slot i of p, broadcast: a C, or a T where derivatives by slots are wanted
    tl::element<T, i>(p, j)        element j of the coefficient vector in slot i
    tl::gt ge lt le eq ne (u, v)   a mask; false where either is NaN (not ne); of dual numbers, by value
    tl::where(mask, u, v)          value and derivative of one, whatever the other holds (inf, NaN)
    tl::max(u, v), tl::min(u, v)   NaN if either is NaN; value and derivative of u at a tie: relu is max(0, x)
    tl::clamp(u, lo, hi)           min(hi, max(lo, u)): derivative 0 for u <= lo and u >= hi; NaN for u NaN
    tl::abs, tl::sign              derivatives sign(u) and 0; sign(0) = sign(NaN) = 0
    tl::sqrt                       derivative 1/(2 sqrt(u)), infinite at 0
    tl::pow(u, v)                  as C's pow: negative u with an integral v too. Derivatives v pow(u, v - 1),
                                   0 for v = 0, and pow(u, v) log(u), 0 for u = 0 and v >= 0
    tl::exp expm1 log log1p tanh sigmoid erf erfc ndtr sin cos atan sinh cosh asinh
    tl::softplus                   log(1 + exp(u)) without overflow; derivative sigmoid(u)
    tl::sech                       1/cosh(u) without overflow; derivative -sech(u) tanh(u)
    tl::sinc                       sin(u)/u, 1 at 0; derivative (cos(u) - sinc(u))/u, -u/3 near 0
    tl::hypot(k, u)                sqrt(k^2 + u^2), also where u^2 overflows; derivatives k/hypot, u/hypot
    tl::tanh_softplus              tanh(softplus(u)) = n/(n + 2), n = e (e + 2), e = exp(u)
    tl::log1p_sigmoid              log(1 + sigmoid(u))
    tl::ste(u, v)                  the value of u with the derivative of v (straight-through)
    tl::sum<k, T, i, ...>(p, term) sum of term(j) over the coefficient vectors in slots i, ...: the k-th
                                   reduction of this functor
    tl::polynomial<k, T, i>(p, u)  sum of arg<T>(p, i, j) u^j; chebyshev, legendre and hermite likewise, with
                                   T_j(u), P_j(u) and H_j(u)

Slots and reductions are written once, in csrc/activation/reductions.h, to be included in namespace tl: in terms
of the others and of tl::arg<T>(p, i), tl::arg<T>(p, i, j) and tl::length(p, i), an int of at least 1. What P says
makes derivatives by all coefficients in one more run (see there). f of two inputs takes a T and a T1, which may
depend on other variables; it returns what both make, or, for a function without its inputs, a C.

Masks come from comparisons only and go to where() only. Derivatives follow what torch's autograd gives for
its own functions; a function of a saturated argument should have the derivative 0, not 0 * inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .formula import COMPARISONS, PRIMITIVES, REDUCTIONS, Call, Input, Node, Number
from .kernels import Kernel, kernels, with_named_slots
from .rewrite import Slot

# What the C++ side has to provide, beside arithmetic, lit, arg, length and reductions.h.
CPP_PRIMITIVES = (*PRIMITIVES, *COMPARISONS.values())
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_TIGHT = {"add": 1, "sub": 1, "mul": 2, "div": 2}
_INLINE_LIMIT = 90  # characters; a longer subexpression gets a name


class _Emitter:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.lines: list[str] = []
        self.text: dict[Node, tuple[str, int]] = {}  # an expression and how tightly it binds
        self.count = self.reductions = 0
        self.uses: dict[Node, int] = {}
        self.in_loop: set[Node] = (
            set()
        )  # computed once for all elements of a loop over coefficients: never inside it
        for part in kernel.body.walk():
            for arg in part.args:
                self.uses[arg] = self.uses.get(arg, 0) + 1
                if part.is_vector or (isinstance(part, Call) and part.op in REDUCTIONS):
                    self.in_loop.add(arg)

    def emit(self) -> list[str]:
        for part in self.kernel.body.walk():
            if isinstance(part, Slot) and not part.vector:
                self.line(f"const auto p{part.index} = tl::slot<T, {part.index}>(p);")
                self.text[part] = f"p{part.index}", 9
            elif not part.is_vector:
                self.enter(part)
        self.lines.append(f"return {self.text[self.kernel.body][0]};")
        return self.lines

    def line(self, text: str) -> None:
        self.lines.append(text)

    def inside(self, node: Node, power: int) -> str:
        text, own = self.text[node]
        return f"({text})" if own < power else text

    def enter(self, part: Node) -> None:
        if isinstance(part, Number):
            self.text[part] = f"tl::lit<T>({_double(part.value)})", 9
        elif isinstance(part, Input):
            self.text[part] = part.name, 9
        elif isinstance(part, Call) and part.op in REDUCTIONS:
            self.text[part] = self.reduction(part), 9
        elif isinstance(part, Call):
            text, own = self.expression(part)
            shared = self.uses.get(part, 0) > 1 or (part in self.in_loop and not part.is_vector)
            if shared or (len(text) > _INLINE_LIMIT and part is not self.kernel.body):
                name = f"t{self.count}"
                self.count += 1
                self.line(f"const auto {name} = {text};")
                text, own = name, 9
            self.text[part] = text, own

    def expression(self, part: Call) -> tuple[str, int]:
        if part.op == "neg":
            return "-" + self.inside(part.args[0], 3), 3
        if part.op in _INFIX:
            own = _TIGHT[part.op]
            left, right = self.inside(part.args[0], own), self.inside(part.args[1], own + 1)
            return f"{left} {_INFIX[part.op]} {right}", own
        return f"tl::{part.op}({', '.join(self.text[arg][0] for arg in part.args)})", 9

    def reduction(self, part: Call) -> str:
        """Writes a reduction over coefficients; returns the name of the total."""
        total = f"s{self.count}"
        self.count += 1
        vectors = [v for v in part.args[0].walk() if isinstance(v, Slot) and v.vector]
        template = ", ".join([f"{self.reductions}, T", *(str(v.index) for v in vectors)])
        self.reductions += 1
        if part.op != "sum":
            name = "polynomial" if part.op == "poly" else part.op
            self.line(f"const auto {total} = tl::{name}<{template}>(p, {self.text[part.args[1]][0]});")
            return total
        self.line(f"const auto {total} = tl::sum<{template}>(p, [&](int j) {{")
        start = len(self.lines)
        for v in vectors:
            self.line(f"const auto p{v.index} = tl::element<T, {v.index}>(p, j);")
            self.text[v] = f"p{v.index}", 9
        for node in part.args[0].walk():
            if node.is_vector and not isinstance(node, Slot):
                self.enter(node)
        self.line(f"return {self.text[part.args[0]][0]};")
        self.lines[start:] = ["  " + line for line in self.lines[start:]]
        self.line("});")
        for node in part.args[0].walk():  # names of this loop end with it
            if node.is_vector:
                self.text.pop(node, None)
        return total


def _double(value: float) -> str:
    return repr(float(value))


def functor(kernel: Kernel) -> str:
    """The C++ struct of a kernel."""
    emitter = _Emitter(kernel)
    body = "\n".join(f"    {line}" for line in emitter.emit())
    types = ["T", *(f"T{i}" for i in range(1, len(kernel.inputs)))]
    inputs = ", ".join(f"{t} {name}" for t, name in zip(types, kernel.inputs, strict=True))
    template = ", ".join(f"class {t}" for t in (*types, "P"))
    p = " p" if kernel.vector_slots else ""
    vectors = sum(1 << i for i, vector in enumerate(kernel.vector_slots) if vector)
    return (
        f"// {kernel.name}: {with_named_slots(kernel.body)}\n"
        f"struct K_{kernel.name} {{\n"
        f"  static constexpr int id = {kernel.id}, inputs = {len(kernel.inputs)}, "
        f"slots = {len(kernel.vector_slots)}, reductions = {emitter.reductions};\n"
        f"  static constexpr unsigned vectors = {vectors:#x};\n"
        f"  template <{template}>\n"
        f"  static TORCHLIN_FUNCTOR auto f({inputs}, const P&{p}) {{\n{body}\n  }}\n}};\n"
    )


# Rough cost in operations, for shards that take equally long to compile.
_COST = dict.fromkeys(PRIMITIVES, 20) | dict.fromkeys(
    ("where", "max", "min", "clamp", "abs", "sign", "sqrt", "ste"), 2
)


def cost(kernel: Kernel) -> int:
    return 30 + sum(_COST.get(part.op, 1) for part in kernel.body.walk() if isinstance(part, Call))


def shards(count: int, table: Sequence[Kernel] | None = None) -> list[list[Kernel]]:
    """The kernels in `count` groups of about the same cost; the same groups every time."""
    groups: list[list[Kernel]] = [[] for _ in range(count)]
    load = [0] * count
    for kernel in sorted(kernels().values() if table is None else table, key=lambda k: (-cost(k), k.name)):
        lightest = load.index(min(load))
        groups[lightest].append(kernel)
        load[lightest] += cost(kernel)
    return [sorted(group, key=lambda k: k.name) for group in groups]


_HEAD = """// Written by torchlin/catalogue/cpp_code.py from the catalogue: edit that.
#ifndef TORCHLIN_FUNCTOR
#define TORCHLIN_FUNCTOR inline
#endif
"""


def shard(group: Sequence[Kernel]) -> str:
    """Functors as a file, which ends with `TORCHLIN_SHARD(X)`: X(functor) for each."""
    calls = " \\\n".join(f"  X(K_{kernel.name})" for kernel in group)
    functors = "\n".join(functor(kernel) for kernel in group)
    return f"{_HEAD}\n{functors}\n#define TORCHLIN_SHARD(X) \\\n{calls}\n"


def write(directory: str | Path, count: int) -> list[Path]:
    """Writes shard_00.inc ... and kernels.inc; leaves a file alone that has the right content, so that
    nothing recompiles.

    kernels.inc defines `TORCHLIN_KERNELS(X)`, which calls X(functor, "name", id, inputs, slots) for all, in
    the order of the names, and `TORCHLIN_SHARDS(X)`, which calls X(shard_00) for each shard.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = {f"shard_{number:02}.inc": shard(group) for number, group in enumerate(shards(count))}
    every = " ".join(f"X({Path(name).stem})" for name in files)
    rows = " \\\n".join(
        f'  X(K_{k.name}, "{k.name}", {k.id}, {len(k.inputs)}, {len(k.vector_slots)})'
        for k in sorted(kernels().values(), key=lambda k: k.name)
    )
    tables = f"#define TORCHLIN_KERNELS(X) \\\n{rows}\n\n#define TORCHLIN_SHARDS(X) {every}\n"
    files["kernels.inc"] = f"{_HEAD}\n{tables}"
    for name, content in files.items():
        path = directory / name
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
    return [directory / name for name in files]
