"""The Hadamard transform against its arithmetic, a copy, plain torch and packages; on a GPU, torch.clone.

    python -m torchlin.benchmarks.bench_hadamard [--quick] [--only hot,peers] [--device cuda] [--threads 2]

docs/how-we-measure.md says how each row comes about.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchlin.benchmarks import ceilings
from torchlin.benchmarks import hadamard_rivals as rivals
from torchlin.benchmarks.harness import Case, Relation, Samples, Session
from torchlin.benchmarks.program import MIB, OURS, Program, Sections, bytes_of, compiled, power_name, randn
from torchlin.functional import hadamard_transform
from torchlin.ops.hadamard import hadamard_transform_reference
from torchlin.ops.hadamard_matrix import core_matrix, hadamard_order


def reference(x: Tensor, **how: Any) -> Tensor:
    """What every contender is checked against: the reference in float64."""
    if how.get("signs") is not None:
        how["signs"] = how["signs"].double()
    return hadamard_transform_reference(x.double(), **how)


def ours_inplace(x: Tensor, name: str = OURS) -> Case:
    """The public function in place. Orthonormal, so that x keeps its size however often it is transformed."""
    work = x.clone()
    return Case(
        name,
        lambda: hadamard_transform(work, inplace=True),
        per=x.numel(),
        alloc="in place",
        result=lambda: hadamard_transform(x.clone(), inplace=True),
    )


# ------------------------------------------------------------------------------------------- hot in the cache

L1_FLOATS = 1 << 12  # 16 KiB: half of the smallest L1 data cache in use
HOT_FLOATS = 1 << 20  # transformed by one call, so that the call itself is below 1 %


def raw_inplace(x: Tensor) -> Callable[[], Tensor]:
    """A call of the raw op, in place on x's last dimension, with none of Python's checks."""
    raw, n, dim = torch.ops.torchlin._hadamard_out, x.shape[-1], x.dim() - 1
    k, _ = hadamard_order(n)
    had_k, scale = core_matrix(k) if k > 1 else None, 1 / math.sqrt(n)

    def run() -> Tensor:
        raw(x, scale, dim, n, None, had_k, False, x)
        return x

    return run


def hot(n: int, name: str = OURS) -> Case:
    """Rows that stay in L1 (or one larger row), transformed over and over by one call of the raw op.

    The leading dimension of the view has stride 0: every index of it is the same rows. The public function
    rightly refuses such a tensor in place; on one thread the op starts again where it began, as wanted here.
    The maps are orthogonal: however often they are applied, the numbers keep their size.
    """
    rows = max(1, L1_FLOATS // n)
    times = max(8, HOT_FLOATS // (rows * n))  # 8: what came between two samples is forgotten
    again = randn(rows, n).expand(times, rows, n)
    return Case(
        name,
        raw_inplace(again),
        per=times * rows * n,
        alloc="in place",
        result=raw_inplace(randn(rows, n)),
    )


def hot_rows(session: Session, powers: Sequence[int]) -> None:
    goals = {8: "<=1.22"} | dict.fromkeys(range(10, 21), "<=1.10")
    for power in powers:
        n = 1 << power
        case = hot(n)
        # n log2(n) / 16 cycles a row: two adds of 8 floats each cycle, which is what AVX2 machines do.
        cycles = ceilings.cycles(16 / power, "add floor")
        session.compare(
            "hot in cache",
            [case, cycles],
            [Relation(OURS, cycles.name, goals.get(power, ""))],
            size=power_name(n),
            shape=(max(1, L1_FLOATS // n), n),
            dtype=torch.float32,
            unit="element",
            expected=reference(randn(max(1, L1_FLOATS // n), n)),
        )


# -------------------------------------------------------------------------------------------------- streaming


def streaming_rows(session: Session, powers: Sequence[int], total: int) -> None:
    goals = dict.fromkeys(range(1, 11), "<=1.0") | dict.fromkeys(range(11, 15), "<=1.3")
    target = torch.empty(total // 4)
    for power in powers:
        x = randn(total // 4 >> power, 1 << power)
        session.compare(
            f"streaming, {bytes_of(total)}",
            [ours_inplace(x), ceilings.copy(x, target.view_as(x))],
            [Relation(OURS, "memcpy", goals.get(power, ""))],
            size=power_name(1 << power),
            shape=x.shape,
            dtype=x.dtype,
            unit="element",
            expected=reference(x),
        )


def half_rows(session: Session, powers: Sequence[int], total: int) -> None:
    for power in powers:
        n = 1 << power
        for dtype, goal in ((torch.bfloat16, ">=1.6"), (torch.float16, "")):
            full, short = randn(total // 4 // n, n), randn(total // 2 // n, n, dtype=dtype)
            name = str(dtype).removeprefix("torch.")
            session.compare(
                f"16-bit against fp32, per element, streaming, {bytes_of(total)}",
                [ours_inplace(short, name), dataclasses.replace(ours_inplace(full, "float32"), result=None)],
                [Relation("float32", name, goal)],
                size=power_name(n),
                shape=short.shape,
                dtype=dtype,
                unit="element",
                expected=reference(short),
            )


# ----------------------------------------------------------------------------------------------- plain torch


def torch_rows(session: Session, powers: Sequence[int], rows: int, with_compile: bool) -> None:
    goals = {8: ">=8", 14: ">=20"}
    for power in powers:
        n = 1 << power
        x = randn(rows, n)
        out = torch.empty_like(x)

        def ours(x: Tensor = x, out: Tensor = out) -> Tensor:
            return hadamard_transform(x, 1.0, out=out)

        def eager(x: Tensor = x) -> Tensor:
            return hadamard_transform_reference(x, 1.0)

        forms = [rivals.kronecker(x, 2), rivals.kronecker(x, 3), rivals.butterfly(x)]
        forms.append(Case("reference, eager", eager, result=eager))
        cases = [Case(OURS, ours, alloc="out=", result=ours), *forms]
        matmul = rivals.dense(x) if power <= 14 else None
        cases += [matmul] if matmul else []
        if with_compile and (fast := compiled(lambda x: hadamard_transform_reference(x, 1.0), x)):

            def run(x: Tensor = x, fast: Callable[..., Tensor] = fast) -> Tensor:
                return fast(x)

            cases.append(Case("reference, torch.compile", run, result=run))

        def relations(
            samples: dict[str, Samples],
            forms: list[Case] = forms,
            cases: list[Case] = cases,
            goal: str = goals.get(power, ""),
        ) -> list[Relation]:
            best = min(forms, key=lambda form: samples[form.name].median).name
            each = [Relation(case.name, OURS) for case in cases[1:]]
            return [Relation(best, OURS, goal, title="best form in plain torch"), *each]

        session.compare(
            "plain torch over ours",
            cases,
            relations,
            size=power_name(n),
            shape=x.shape,
            dtype=x.dtype,
            expected=reference(x, scale=1.0),
        )


# ------------------------------------------------------------------------------------------- composite orders


def composite_rows(session: Session, orders: Sequence[int], total: int) -> None:
    for n in orders:
        k, _ = hadamard_order(n)
        above = 1 << n.bit_length()
        goal = "<=1.5" if k <= 60 else "<=2.5" if k == 172 else ""
        size = f"{n} = {k}*{n // k}"
        names = (OURS, f"n = {power_name(above)}")
        x = randn(max(1, L1_FLOATS // n), n)
        session.compare(
            "composite order over the next power of two, per element, hot in cache",
            [hot(n), dataclasses.replace(hot(above, names[1]), result=None)],
            [Relation(*names, goal)],
            size=size,
            shape=x.shape,
            dtype=torch.float32,
            unit="element",
            expected=reference(x),
        )
        x, y = (randn(total // 4 // order, order) for order in (n, above))
        session.compare(
            f"composite order over the next power of two, per element, streaming, {bytes_of(total)}",
            [ours_inplace(x), dataclasses.replace(ours_inplace(y, names[1]), result=None)],
            [Relation(*names, goal)],
            size=size,
            shape=x.shape,
            dtype=torch.float32,
            unit="element",
            expected=reference(x),
        )


# ------------------------------------------------------------------------------------------------------ peers


def peer_rows(session: Session, powers: Sequence[int], total: int) -> None:
    found, missing = rivals.peers()
    for package, why in missing.items():
        print(f"{package} is left out ({why}); `pip install {package}` may bring it", file=sys.stderr)
    for power in powers:
        n = 1 << power
        x = randn(max(1, total // 4 // n), n)
        theirs = [(peer, peer.make(x)) for peer in found if n <= peer.largest]
        if not theirs:
            continue
        work = x.clone()

        def inplace(work: Tensor = work) -> Tensor:
            return hadamard_transform(work, inplace=True)

        def fresh(x: Tensor = x) -> Tensor:
            return hadamard_transform(x, 1.0)

        # Each is held against ours with the allocation that is its own.
        ours = {
            True: Case(f"{OURS} in place", inplace, alloc="in place"),
            False: Case(OURS, fresh, result=fresh),
        }
        session.compare(
            f"packages over ours, {bytes_of(total)}",
            [*ours.values(), *(case for _, case in theirs)],
            [Relation(peer.name, ours[peer.inplace].name, ">=1") for peer, _ in theirs],
            size=power_name(n),
            shape=x.shape,
            dtype=x.dtype,
            expected=reference(x, scale=1.0),
        )


# --------------------------------------------------------------------------------------------------- one call


def call_rows(session: Session) -> None:
    x = randn(16)

    def nothing(x: Tensor) -> None:
        pass

    y = hadamard_transform(x)
    raw, scale = torch.ops.torchlin._hadamard_fwd, 0.25
    session.compare(
        "one call, 16 elements, no grad",
        [
            Case("nothing", lambda: nothing(x), alloc=""),
            Case(OURS, lambda: hadamard_transform(x), result=lambda: hadamard_transform(x)),
            Case("raw op", lambda: raw(x, scale, 0, 16, None, None, False), result=lambda: y),
            Case("torch.mul(x, 1.5)", lambda: torch.mul(x, 1.5)),
            Case("torch.neg(x)", lambda: torch.neg(x)),
        ],
        [
            Relation(OURS, "nothing", "<=2.6", kind="minus"),
            Relation("raw op", "nothing", kind="minus"),
            Relation("torch.mul(x, 1.5)", "nothing", kind="minus"),
            Relation("torch.neg(x)", "nothing", kind="minus"),
            Relation(OURS, "torch.mul(x, 1.5)", "<=1"),
            Relation(OURS, "torch.neg(x)"),
        ],
        size="16",
        shape=x.shape,
        dtype=x.dtype,
        expected=reference(x),
    )


# ------------------------------------------------------------------------------- strided dim, signs, backward


def strided_rows(session: Session, powers: Sequence[int], total: int) -> None:
    inner = 128
    for power in powers:
        n = 1 << power
        x = randn(max(1, total // 4 // (n * inner)), n, inner)

        def ours(x: Tensor = x) -> Tensor:
            return hadamard_transform(x, dim=1)

        def by_copies(x: Tensor = x) -> Tensor:
            rows = x.transpose(1, 2).contiguous()
            return hadamard_transform(rows, inplace=True).transpose(1, 2).contiguous()

        session.compare(
            "a dim that is not last, against transposing twice",
            [Case(OURS, ours, result=ours), Case("transposing copies", by_copies, result=by_copies)],
            [Relation("transposing copies", OURS)],
            size=power_name(n),
            shape=x.shape,
            dtype=x.dtype,
            expected=reference(x, dim=1),
        )


def signs_rows(session: Session, sizes: Sequence[int], total: int) -> None:
    for n in sizes:
        x = randn(total // 4 // n, n)
        signs = randn(n).sign()
        out = torch.empty_like(x)

        def plain(x: Tensor = x, out: Tensor = out) -> Tensor:
            return hadamard_transform(x, out=out)

        def signed(x: Tensor = x, out: Tensor = out, signs: Tensor = signs) -> Tensor:
            return hadamard_transform(x, signs=signs, out=out)

        def two_steps(x: Tensor = x, out: Tensor = out, signs: Tensor = signs) -> Tensor:
            return hadamard_transform(torch.mul(x, signs, out=out), inplace=True)

        session.compare(
            "random signs",
            [
                Case(OURS, signed, alloc="out=", result=signed),
                Case("no signs", plain, alloc="out="),
                Case("x * signs first", two_steps, alloc="out=", result=two_steps),
            ],
            [Relation(OURS, "no signs"), Relation("x * signs first", OURS)],
            size=power_name(n),
            shape=x.shape,
            dtype=x.dtype,
            expected=reference(x, signs=signs),
        )


def backward_rows(session: Session, sizes: Sequence[int], total: int, with_compile: bool) -> None:
    """Gradients of x and of the signs, backward alone and with the forward that it needs."""
    for n in sizes:
        x = randn(total // 4 // n, n).requires_grad_()
        signs = randn(n).sign().requires_grad_()
        grad = randn(total // 4 // n, n)
        functions: dict[str, Callable[..., Tensor]] = {
            OURS: lambda x, signs: hadamard_transform(x, signs=signs),
            "reference, eager": lambda x, signs: hadamard_transform_reference(x, signs=signs),
        }
        if with_compile and (fast := compiled(functions["reference, eager"], x, signs)):
            functions["reference, torch.compile"] = fast
        both, back = [], []
        for name, function in functions.items():
            y = function(x, signs)

            def run_both(
                f: Callable[..., Tensor] = function, x: Tensor = x, signs: Tensor = signs, grad: Tensor = grad
            ) -> Tensor:
                return torch.autograd.grad(f(x, signs), (x, signs), grad)[0]

            def run_back(y: Tensor = y, x: Tensor = x, signs: Tensor = signs, grad: Tensor = grad) -> Tensor:
                return torch.autograd.grad(y, (x, signs), grad, retain_graph=True)[0]

            both.append(Case(name, run_both, result=run_both))
            back.append(Case(name, run_back, result=run_back))
        expected = reference(grad, signs=signs.detach(), transpose=True)
        for direction, cases in (("backward", back), ("both", both)):
            session.compare(
                "plain torch over ours, grad of x and signs",
                cases,
                [Relation(name, OURS) for name in functions if name != OURS],
                size=power_name(n),
                shape=x.shape,
                dtype=x.dtype,
                direction=direction,
                expected=expected,
            )


# --------------------------------------------------------------------------------------------------- on a GPU


def gpu_rows(session: Session, powers: Sequence[int], quick: bool) -> None:
    """Over a copy of the same bytes: L2-resident (one buffer) and DRAM-bound (several, beyond the L2)."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    dao = rivals.dao_kernel()
    for place in ("L2-resident", "DRAM-bound"):
        # Input and output together: half of the L2, or several buffers of a size that no L2 keeps.
        resident = place == "L2-resident"
        total, buffers = (l2 // 4, 1) if resident else (l2, 2) if quick else (max(l2, 64 * MIB), 4)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for power in powers:
                n = 1 << power
                goal = "<=1.05" if power <= 13 else "<=1.15" if (power, dtype) == (15, torch.float16) else ""
                rows = total // dtype.itemsize // n
                xs = [randn(rows, n, dtype=dtype, device="cuda") for _ in range(buffers)]
                outs = [torch.empty_like(x) for x in xs]
                # copy_ into a buffer is torch.clone's kernel; its allocation is not seen by a graph anyway.
                pairs = list(zip(xs, outs, strict=True))
                clones = [lambda x=x, out=out: out.copy_(x) for x, out in pairs]
                ours = [lambda x=x, out=out: hadamard_transform(x, out=out) for x, out in pairs]
                cases = [
                    Case(OURS, ours, alloc="out=", result=lambda ours=ours: ours[0]()),  # type: ignore[misc]
                    Case("torch.clone", clones, alloc="out="),
                ]
                relations = [Relation(OURS, "torch.clone", goal)]
                if dao is not None:
                    theirs = [lambda x=x: dao(x, x.shape[-1] ** -0.5) for x in xs]
                    result = lambda theirs=theirs: theirs[0]()  # noqa: E731
                    cases.append(Case("fast-hadamard-transform", theirs, result=result))
                    relations.append(Relation("fast-hadamard-transform", OURS, ">=1"))
                session.compare(
                    f"GPU, {place}",
                    cases,
                    relations,
                    size=power_name(n),
                    shape=(rows, n),
                    dtype=dtype,
                    expected=reference(xs[0]),
                )


# ------------------------------------------------------------------------------------------------------- main


def sections(session: Session, args: argparse.Namespace) -> Sections:
    """What can be measured on the session's device."""
    quick, with_compile = session.quick, not (args.no_compile or session.quick)
    if session.device == "cuda":
        return {"gpu": lambda: gpu_rows(session, [8] if quick else range(5, 16), quick)}
    total = 1 << 18 if quick else args.stream_mib * MIB
    cached = 1 << 16 if quick else MIB
    powers = [8, 10]
    composites = [576] if quick else [576, 768, 896, 1280, 1408, 3584, 3840, 5120, 6656, 11008, 13824, 14336]
    every: dict[str, Callable[[], None]] = {
        "machine": lambda: ceilings.rows(session),
        "hot": lambda: hot_rows(session, powers if quick else range(8, 21)),
        "streaming": lambda: streaming_rows(session, powers if quick else range(6, 17), total),
        "torch": lambda: torch_rows(
            session, powers if quick else [8, 10, 12, 14, 16], 16 if quick else 256, with_compile
        ),
        "composite": lambda: composite_rows(session, composites, total),
        "half": lambda: half_rows(session, powers if quick else [8, 10, 12, 14], total),
        "peers": lambda: peer_rows(session, powers if quick else [6, 8, 10, 12, 14, 16, 18, 20], cached),
        "call": lambda: call_rows(session),
        "strided": lambda: strided_rows(session, powers if quick else [5, 7, 10, 12], total),
        "signs": lambda: signs_rows(session, [256] if quick else [256, 576, 1024, 4096], total),
        "backward": lambda: backward_rows(
            session, [256] if quick else [256, 1024, 4096], cached, with_compile
        ),
    }
    if session.threads > 1:  # these are about one core
        for one_core in ("machine", "hot", "composite", "peers"):
            del every[one_core]
    return every


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stream-mib", type=int, default=64, help="size of the streaming rows (64)")


main = Program(
    "hadamard", "Hadamard transform", __doc__, sections, options, unusual=lambda args: args.stream_mib != 64
).main

if __name__ == "__main__":
    sys.exit(main())
