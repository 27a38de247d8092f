"""Activations against a copy, torch's own operators, plain compositions, torch.compile and packages.

    torchlin bench activation [--quick] [--only stream,half] [--threads 1,2] [--no-compile]
    torchlin bench activation --all      every name of one tensor in the catalogue, forward and backward, over a copy
    torchlin bench activation --train    the 18 functions of Dubey et al., trained (--train --help tells more)

docs/how-we-measure.md says how each row comes about.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlin._console import progress
from torchlin.benchmarks import activation_rivals as rivals
from torchlin.benchmarks import heap
from torchlin.benchmarks.activation_rivals import COMPOSITES, OWN, Function
from torchlin.benchmarks.harness import SAME, Case, Relation, Session, WrongResult, relative_error
from torchlin.benchmarks.program import (
    KIB,
    MIB,
    OURS,
    Program,
    Sections,
    binary,
    compiled,
    randn,
)
from torchlin.catalogue import catalogue
from torchlin.catalogue.formula import Call
from torchlin.catalogue.kernels import plan
from torchlin.ops.activation import activation, activation_reference, gated_activation

SCALE = 2.0  # standard deviation of the inputs: both tails of the functions are met
SAMPLED = 1 << 14  # elements of an output that are held against the reference
TORCH, COMPILE, COPY, ADD = "torch", "torch.compile", "copy_", "add(x, g, out=)"
SMALL_PAGES = f"{OURS}, pages of 4 KiB"
STREAMING = MIB  # elements from which on no cache keeps them
RESERVE = 512 * MIB  # what a few tensors of 64 MiB and their gradients take

ONE = ("exp", "expm1", "sigmoid", "tanh", "sech", "sinh", "cosh", "erf", "erfc", "tanh_softplus")
MORE = ("softplus", "log", "log1p", "log1p_sigmoid", "pow", "sin", "cos", "sinc", "atan", "asinh")


def is_cheap(name: str) -> bool:
    """Whether the kernel evaluates at most one exponential (tanh, erf and the like are one) and nothing dearer."""
    found = plan(name, training=False)
    assert found is not None
    ops = [node.op for node in found.kernel.body.walk() if isinstance(node, Call)]
    vectors = any(found.kernel.vector_slots)
    return sum(op in ONE for op in ops) <= 1 and not any(op in MORE for op in ops) and not vectors


def goal(session: Session, name: str, dtype: torch.dtype, direction: str = "forward") -> str:
    """Streaming, over the floor: a copy forward, three streams backward. On a CPU, stated for two threads."""
    if session.device == "cuda":
        return "<=1.053" if direction == "forward" else "<=1.111"  # 95 % and 90 % of the floor's bandwidth
    if session.threads < 2:
        return ""
    if direction == "forward" and dtype is torch.float32:
        return "<=1.3" if is_cheap(name) else "<=2"
    return "<=1.5" if is_cheap(name) else ""


def inputs(session: Session, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (SCALE * randn(*shape, device=session.device)).to(dtype)


def gradients(session: Session, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(*shape, dtype=dtype, device=session.device)


def sample(x: Tensor) -> Tensor:
    """Evenly spaced elements, in memory order: all of 64 MiB in float64 would take longer than the timing."""
    return x.detach().reshape(-1)[:: max(1, x.numel() // SAMPLED)]


def reference(name: str, x: Tensor) -> Tensor:
    """What every contender is checked against, at the sampled places."""
    return activation_reference(sample(x).double(), name)


def gradient(name: str, x: Tensor, grad: Tensor) -> Tensor:
    """The same for the gradient."""
    leaf = sample(x).double().requires_grad_()
    y = activation_reference(leaf, name)
    if not y.requires_grad:  # a step
        return torch.zeros_like(y)
    return torch.autograd.grad(y, leaf, sample(grad).double())[0]


def case(name: str, run: Callable[[], Tensor], alloc: str = "fresh") -> Case:
    return Case(name, run, alloc=alloc, result=lambda: sample(run()))


def copy(x: Tensor) -> Case:
    """The floor of what reads one tensor and writes another."""
    out = torch.empty_like(x)
    return Case(COPY, lambda: out.copy_(x), alloc="out=")


def add(x: Tensor, grad: Tensor) -> Case:
    """The floor of what reads two tensors and writes a third."""
    x, out = x.detach(), torch.empty_like(grad)
    return Case(ADD, lambda: torch.add(x, grad, out=out), alloc="out=")


def plain(name: str) -> Function:
    """The name in torch: its operator, or the composition."""
    return OWN[name][0] if name in OWN else COMPOSITES[name]


# ---------------------------------------------------------------------------------------------------- forward


def contenders(name: str, x: Tensor, alloc: str, fresh: str, with_compile: bool) -> list[Case]:
    """Ours, torch, and torch.compile. What has no out= makes its output, in memory that `fresh` tells of."""
    if alloc == "out=":
        out = torch.empty_like(x)
        cases = [case(OURS, lambda: activation(x, name, out=out), alloc)]
    else:
        cases = [case(OURS, lambda: activation(x, name), alloc)]
    function = plain(name)
    if alloc == "out=" and name in OWN:
        into, other = OWN[name][1], torch.empty_like(x)

        def own() -> Tensor:
            into(x, other)
            return other

        cases.append(case(TORCH, own, alloc))
    else:
        cases.append(case(TORCH, lambda: function(x), fresh))
    if with_compile and (fast := compiled(function, x)):
        cases.append(case(COMPILE, lambda: fast(x), fresh))
    return cases


def small_rows(session: Session, n: int, names: Sequence[str], compile_names: Sequence[str]) -> None:
    """In the L2 cache: arithmetic and the cost of a call."""
    x = inputs(session, n)
    for name in names:
        for alloc in ("out=", "fresh"):
            if alloc == "out=" and name not in OWN:
                continue
            cases = contenders(name, x, alloc, "fresh", alloc == "fresh" and name in compile_names)
            relations = [Relation(TORCH, OURS, ">=1" if name in OWN else ">=5")]
            if len(cases) == 3:
                relations.append(Relation(COMPILE, OURS, "" if name in OWN else ">=3"))
            relations += [Relation(OURS, COPY), Relation(TORCH, COPY)]
            session.compare(
                name,
                [*cases, copy(x)],
                relations,
                size=binary(n),
                shape=x.shape,
                dtype=x.dtype,
                expected=reference(name, x),
            )


def stream_rows(
    session: Session, n: int, names: Sequence[str], dtype: torch.dtype, compile_names: Sequence[str] = ()
) -> None:
    """From and to memory, into a tensor that exists; what needs new ones gets them without page faults."""
    x = inputs(session, n, dtype=dtype)
    with heap.kept(RESERVE) as kept:
        fresh = "reused" if kept else "fresh"
        for name in names:
            cases = contenders(name, x, "out=", fresh, name in compile_names)
            session.compare(
                name,
                [*cases, copy(x)],
                [
                    Relation(OURS, COPY, goal(session, name, dtype)),
                    *(Relation(other.name, COPY) for other in cases[1:]),
                    *(Relation(other.name, OURS) for other in cases[1:]),
                ],
                size=binary(n),
                shape=x.shape,
                dtype=dtype,
                expected=reference(name, x),
                repeats=STREAM_REPEATS,
            )


def on_small_pages(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same without torchlin's advice to the system that large outputs should have huge pages."""
    raw = torch.ops.torchlin

    def run() -> Tensor:
        threshold = raw._huge_pages()
        raw._set_huge_pages(-1)
        try:
            return function()
        finally:
            raw._set_huge_pages(threshold)

    return run


def fresh_rows(session: Session, n: int, names: Sequence[str]) -> None:
    """Outputs that malloc takes from the system: a page fault for each 4 KiB, or for each 2 MiB."""
    x = inputs(session, n)
    for name in names:
        ours, own = functools.partial(activation, x, name), functools.partial(plain(name), x)
        session.compare(
            name,
            [
                case(OURS, ours),
                case(SMALL_PAGES, on_small_pages(ours)),
                case(TORCH, own),
                Case("clone", x.clone),
            ],
            [
                Relation(OURS, "clone"),
                Relation(TORCH, "clone"),
                Relation(SMALL_PAGES, OURS),
                Relation(TORCH, OURS),
            ],
            size=binary(n),
            shape=x.shape,
            dtype=x.dtype,
            expected=reference(name, x),
            repeats=STREAM_REPEATS,
        )


# --------------------------------------------------------------------------------------------------- backward


def backward_case(name: str, function: Function, leaves: Sequence[Tensor], grad: Tensor, alloc: str) -> Case:
    """The gradients of the leaves, from a graph that is there; the result is that of the first."""
    y = function(*leaves)
    run = lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)[0]  # noqa: E731
    return case(name, run, alloc)


def both_case(name: str, function: Function, leaves: Sequence[Tensor], grad: Tensor, alloc: str) -> Case:
    """The same with the forward that it needs."""
    return case(name, lambda: torch.autograd.grad(function(*leaves), leaves, grad)[0], alloc)


def training_rows(
    session: Session, n: int, names: Sequence[str], alloc: str, compile_names: Sequence[str] = ()
) -> None:
    """Backward alone, over its three streams; and with the forward that it needs."""
    leaf, grad = inputs(session, n).requires_grad_(), gradients(session, n)
    for name in names:
        functions = {OURS: functools.partial(activation, name=name), TORCH: plain(name)}
        if name in compile_names and (fast := compiled(functions[TORCH], leaf)):
            functions[COMPILE] = fast
        for direction, make in (("backward", backward_case), ("both", both_case)):
            cases = [make(who, function, [leaf], grad, alloc) for who, function in functions.items()]
            relations = [Relation(who, OURS) for who in functions if who != OURS]
            if direction == "backward":
                cases.append(add(leaf, grad))
                limit = goal(session, name, leaf.dtype, direction) if n >= STREAMING else ""
                relations = [Relation(OURS, ADD, limit), Relation(TORCH, ADD), *relations]
            session.compare(
                name,
                cases,
                relations,
                size=binary(n),
                shape=leaf.shape,
                dtype=leaf.dtype,
                direction=direction,
                expected=gradient(name, leaf, grad),
                repeats=STREAM_REPEATS if n >= STREAMING else None,
            )


def backward_rows(session: Session, n: int, names: Sequence[str]) -> None:
    """The same from and to memory, without page faults: the floor has none either."""
    with heap.kept(RESERVE) as kept:
        training_rows(session, n, names, "reused" if kept else "fresh")


# ------------------------------------------------------------------------------------------- gates, parameters


def gated_rows(session: Session, rows: int, width: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with heap.kept(RESERVE) as kept:
            swiglu_rows(session, rows, width, dtype, "reused" if kept else "fresh")


def swiglu_rows(session: Session, rows: int, width: int, dtype: torch.dtype, alloc: str) -> None:
    """SwiGLU of two tensors, of halves and of interleaved columns; torch takes the packed ones apart by views."""
    packed = inputs(session, rows, 2 * width, dtype=dtype)
    grad = gradients(session, rows, width, dtype=dtype)
    split = [half.contiguous() for half in packed.chunk(2, -1)]
    layouts: dict[str, tuple[list[Tensor], Callable[..., Sequence[Tensor]]]] = {
        "split": (split, lambda a, b: (a, b)),
        "halves": ([packed], lambda x: x.chunk(2, -1)),
        "interleaved": ([packed], lambda x: (x[..., 0::2], x[..., 1::2])),
    }
    target = torch.empty_like(grad)
    floor = Case("mul(a, b, out=)", lambda: torch.mul(*split, out=target), alloc="out=")
    for layout, (leaves, halves) in layouts.items():
        functions: dict[str, Function] = {
            OURS: functools.partial(gated_activation, name="swiglu", layout=layout),
            TORCH: functools.partial(_swiglu, halves),
        }
        # A row is enough for the check.
        row = [leaf[:1].double().requires_grad_() for leaf in leaves]
        y = _swiglu(halves, *row)
        expected = {"forward": y, "both": torch.autograd.grad(y, row, grad[:1].double())[0]}
        learning = [leaf.detach().requires_grad_() for leaf in leaves]
        for direction in expected:
            cases = [
                _of_rows(who, f, leaves, learning, grad, direction, alloc) for who, f in functions.items()
            ]
            session.compare(
                f"swiglu, {layout}",
                [*cases, floor],
                [Relation(TORCH, OURS), Relation(OURS, floor.name)],
                size=binary(grad.numel()),
                shape=leaves[0].shape,
                dtype=dtype,
                direction=direction,
                expected=expected[direction],
                repeats=STREAM_REPEATS,
            )


def _swiglu(halves: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> Tensor:
    a, b = halves(*tensors)
    return F.silu(a) * b


def _of_rows(
    name: str,
    function: Function,
    constant: Sequence[Tensor],
    learning: Sequence[Tensor],
    grad: Tensor,
    direction: str,
    alloc: str,
) -> Case:
    """A case whose result is the first row (or image) of the output, or of the first gradient."""
    if direction == "forward":
        run: Callable[[], Any] = functools.partial(function, *constant)
    elif direction == "both":
        run = functools.partial(_gradients_of, function, learning, grad)
    else:
        run = functools.partial(torch.autograd.grad, function(*learning), learning, grad, retain_graph=True)

    def first() -> Tensor:
        y = run()
        return (y if isinstance(y, Tensor) else y[0])[:1]

    return Case(name, run, alloc=alloc, result=first)


def _gradients_of(function: Function, leaves: Sequence[Tensor], grad: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(function(*leaves), leaves, grad)


def channel_rows(session: Session, shape: tuple[int, int, int, int]) -> None:
    """Parameters with a value a channel: their gradients are sums over all the rest."""
    x, grad = inputs(session, *shape), gradients(session, *shape)
    a, b = torch.rand(2, shape[1]).add(0.5).to(session.device)
    learned: dict[str, tuple[list[Tensor], Function, Function]] = {
        "prelu": ([x, a], lambda x, a: activation(x, "prelu", a=a), F.prelu),
        "pelu": ([x, a, b], lambda x, a, b: activation(x, "pelu", a=a, b=b), rivals.pelu),
    }
    with heap.kept(RESERVE) as kept:
        alloc = "reused" if kept else "fresh"
        for name, (constant, ours, eager) in learned.items():
            learning = [leaf.clone().requires_grad_() for leaf in constant]
            double = [x[:1].double().requires_grad_(), *(p.double().requires_grad_() for p in constant[1:])]
            y = eager(*double)
            slope = torch.autograd.grad(y, double, grad[:1].double())[0]
            for direction in ("forward", "backward", "both"):
                functions = {OURS: ours, TORCH: eager}
                cases = [
                    _of_rows(who, f, constant, learning, grad, direction, alloc)
                    for who, f in functions.items()
                ]
                floor = copy(x) if direction == "forward" else add(x, grad)
                session.compare(
                    f"{name}, per channel",
                    [*cases, floor],
                    [Relation(TORCH, OURS), Relation(OURS, floor.name)],
                    size=binary(x.numel()),
                    shape=shape,
                    dtype=x.dtype,
                    direction=direction,
                    expected=y if direction == "forward" else slope,
                    repeats=STREAM_REPEATS,
                )


# -------------------------------------------------------------------------------------------- calls, packages


def call_rows(session: Session) -> None:
    """What a call costs that computes next to nothing."""
    x = inputs(session, 16)
    leaf, grad = inputs(session, 16).requires_grad_(), gradients(session, 16)

    def nothing(x: Tensor) -> None:
        pass

    for name in ("relu", "silu", "tanhexp"):
        own = plain(name)
        forward = [case(OURS, lambda n=name: activation(x, n)), case(TORCH, lambda f=own: f(x))]
        both = [
            both_case(OURS, functools.partial(activation, name=name), [leaf], grad, "fresh"),
            both_case(TORCH, own, [leaf], grad, "fresh"),
        ]
        for direction, cases, goal, expected in (
            ("forward", forward, "<=2.6", reference(name, x)),
            ("both", both, "", gradient(name, leaf, grad)),
        ):
            session.compare(
                name,
                [Case("nothing", lambda: nothing(x), alloc=""), *cases],
                [
                    Relation(OURS, "nothing", goal, kind="minus"),
                    Relation(TORCH, "nothing", kind="minus"),
                    Relation(TORCH, OURS),
                ],
                size="16",
                shape=x.shape,
                dtype=x.dtype,
                direction=direction,
                expected=expected,
            )


def peer_rows(session: Session, n: int) -> None:
    """Packages from PyPI, each with the allocation that is its own."""
    found, missing = rivals.peers()
    for package, why in missing.items():
        print(
            f"{package} is left out ({why}); `pip install --no-deps {package}` may bring it", file=sys.stderr
        )
    x, grad = inputs(session, n), gradients(session, n)
    leaf = x.clone().requires_grad_()
    for (package, name), theirs in found.items():
        if not (error := relative_error(sample(theirs(x)), reference(name, x))) <= SAME[x.dtype]:
            print(f"{package}'s {name} is another function (relative error {error:.2g})", file=sys.stderr)
            continue
        ours = functools.partial(activation, name=name)
        for direction, cases, expected in (
            (
                "forward",
                [case(who, functools.partial(f, x)) for who, f in ((OURS, ours), (package, theirs))],
                reference(name, x),
            ),
            (
                "both",
                [both_case(who, f, [leaf], grad, "fresh") for who, f in ((OURS, ours), (package, theirs))],
                gradient(name, x, grad),
            ),
        ):
            session.compare(
                name,
                cases,
                [Relation(package, OURS)],
                size=binary(n),
                shape=x.shape,
                dtype=x.dtype,
                direction=direction,
                expected=expected,
            )


# ---------------------------------------------------------------------------------------- the whole catalogue

SCALAR = ("elementwise", "parametric", "stochastic")


def scalar_names() -> list[str]:
    """Every name that is a function of one tensor, element by element; what is random, as in evaluation."""
    return [a.name for a in catalogue().values() if a.kind in SCALAR and plan(a.name, training=False)]


def learnable(name: str, device: str) -> dict[str, Tensor]:
    """The learnable parameters of a name at their defaults, as leaves."""
    parameters = catalogue()[name].parameters.values()
    return {
        p.name: torch.tensor(p.default, device=device, requires_grad=True) for p in parameters if p.learnable
    }


def _with(keys: Sequence[str], name: str, x: Tensor, *values: Tensor) -> Tensor:
    return activation(x, name, **dict(zip(keys, values, strict=True)))


def catalogue_rows(session: Session, n: int, names: Sequence[str]) -> None:
    """Each name over a copy, its backward over three streams; then with the gradients of what it learns."""
    x, grad = inputs(session, n), gradients(session, n)
    leaf, out = x.detach().requires_grad_(), torch.empty_like(x)
    copied, added = copy(x), add(x, grad)
    with heap.kept(RESERVE) as kept, progress(len(names), "names") as bar:
        alloc = "reused" if kept else "fresh"
        for name in names:
            ours = functools.partial(activation, name=name)
            slope = gradient(name, x, grad)
            comparisons = [
                (
                    "forward",
                    case(OURS, functools.partial(ours, x, out=out), "out="),
                    copied,
                    reference(name, x),
                ),
                ("backward", backward_case(OURS, ours, [leaf], grad, alloc), added, slope),
            ]
            if parameters := learnable(name, session.device):
                all_of = functools.partial(_with, list(parameters), name)
                contender = backward_case(OURS, all_of, [leaf, *parameters.values()], grad, alloc)
                comparisons.append(("backward, parameters too", contender, added, slope))
            for direction, contender, floor, expected in comparisons:
                limit = "" if "," in direction else goal(session, name, x.dtype, direction)
                try:
                    session.compare(
                        name,
                        [contender, floor],
                        [Relation(OURS, floor.name, limit)],
                        size=binary(n),
                        shape=x.shape,
                        dtype=x.dtype,
                        direction=direction,
                        expected=expected,
                        repeats=SWEEP_REPEATS,
                    )
                except WrongResult as error:  # the others are worth their row all the same
                    print(f"no row, {direction}: {error}", file=sys.stderr)
            bar.advance(description=name)


# ------------------------------------------------------------------------------------------------------- main

STREAM_REPEATS, SWEEP_REPEATS = 11, 7
COMPILED = ("silu", "gelu", "tanh", "mish", *COMPOSITES)
TRAINED = ("relu", "silu", "gelu", "tanh", "mish", "softplus", "gcu", "tanhexp", "logish", "serf")
QUICK = ("relu", "silu", "mish", "tanhexp")


def sections(session: Session, args: argparse.Namespace) -> Sections:
    """What can be measured on the session's device."""
    quick = session.quick
    with_compile = not (args.no_compile or quick)
    small, large = (KIB, 16 * KIB) if quick else (64 * KIB, 16 * MIB)
    names = QUICK if quick else (*OWN, *COMPOSITES)
    trained = QUICK if quick else TRAINED
    rows, width = (4, 256) if quick else (2048, 8192)
    image = (2, 4, 16, 16) if quick else (16, 64, 128, 128)
    cached = COMPILED if with_compile else ()
    # A compilation for each size, direction and number of threads: three names and the most threads will do.
    streamed = ("mish", "tanhexp", "serf") if with_compile and session.threads == max(args.threads) else ()
    streaming: dict[str, Callable[[], None]] = {
        "stream": lambda: stream_rows(session, large, names, torch.float32, streamed),
        "half": lambda: stream_rows(session, large, names, torch.bfloat16),
        "backward": lambda: backward_rows(session, large, trained),
        "gated": lambda: gated_rows(session, rows, width),
        "channel": lambda: channel_rows(session, image),
    }
    if session.device == "cuda":
        return streaming
    every: dict[str, Callable[[], None]] = {
        "call": lambda: call_rows(session),
        "small": lambda: small_rows(session, small, names, cached),
        "training": lambda: training_rows(session, small, trained, "fresh", streamed),
        "peers": lambda: peer_rows(session, small),
        "fresh": lambda: fresh_rows(session, large, ("relu", "silu", "mish")),
        **streaming,
    }
    if session.threads > 1:  # these are about one core
        del every["call"], every["peers"]
    return every


def catalogue_sections(session: Session, args: argparse.Namespace) -> Sections:
    """The whole catalogue in one section."""
    names = scalar_names()
    if session.quick:
        names = names[:: len(names) // 8]
    n = 16 * KIB if session.quick else 16 * MIB
    return {"catalogue": lambda: catalogue_rows(session, n, names)}


def options(parser: argparse.ArgumentParser) -> None:
    others = parser.add_argument_group("other benchmarks of this family, with options of their own")
    others.add_argument("--all", action="store_true", help="every name of the catalogue, over a copy")
    others.add_argument("--train", action="store_true", help="the 18 functions of Dubey et al., trained")


TITLE = "Activations"
PROGRAM = Program("activation", TITLE, __doc__, sections, options, threads="1,2")
CATALOGUE = Program(
    "activation_all", f"{TITLE}: the whole catalogue, the worst 30", __doc__, catalogue_sections, options,
    choose=lambda rows: sorted(rows, key=lambda row: -row.value)[:30], threads="2",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one of the family's benchmarks; returns the process's exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--train" in argv:
        from torchlin.benchmarks import train_activation

        argv.remove("--train")
        return train_activation.main(argv)
    return (CATALOGUE if "--all" in argv else PROGRAM).main(argv)


if __name__ == "__main__":
    sys.exit(main())
