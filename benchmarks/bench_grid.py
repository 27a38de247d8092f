"""Linear layers on grid codes against F.linear and other quantized products; encoding.

    python -m torchlin.benchmarks.bench_grid [--quick] [--only linear,peers] [--threads 2]

Weights are rotated through enough copies that no cache holds them, as in a model that is larger than the cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlin.benchmarks import grid_rivals as rivals
from torchlin.benchmarks.harness import Case, Relation, Session
from torchlin.benchmarks.program import MIB, OURS, Program, Sections, randn
from torchlin.functional import grid_dequantize, grid_encode, grid_linear, grid_pack
from torchlin.ops.grid_codes import code_dtype, packed_bytes
from torchlin.quant.grid_solver import canonical

FULL, QUICK = 4096, 256

# Layers to look at in each detail, and all others.
MAIN = ((1, 16), (2, 16), (2, 256))
OTHERS = (
    *((1, n) for n in (4, 8, 32, 64, 256)),
    *((2, n) for n in (64, 88, 1024)),
    *((3, n) for n in (64, 512, 4096)),
    *((4, n) for n in (256, 4096, 65536)),
    (8, 65536),
)
# Of the time of F.linear.
FP32 = {(1, 16): "<=0.25", (2, 16): "<=0.20", (2, 256): "<=0.45"}
BF16 = {(1, 16): "<=0.45"}


def name_of(p: int, n: int) -> str:
    return f"p={p} n={n}"


class Layer:
    """A quantized weight, several times in memory."""

    def __init__(self, p: int, n: int, out: int, k: int, total: int) -> None:
        generator = torch.Generator().manual_seed(0)
        count = -(-k // p)
        codes = torch.randint(0, n, (out, count), generator=generator).to(code_dtype(n))
        packed = grid_pack(codes, n)
        self.grid = canonical(torch.randn(n, p, generator=generator)).float()  # rounded as the library's are
        self.scales = torch.rand(out, 1, generator=generator).add(0.5).half()
        self.copies = [packed.clone() for _ in range(max(2, total // max(1, packed.numel())))]
        self.weight = grid_dequantize(packed, self.scales, self.grid, k)

    def runs(self, x: Tensor) -> list[Callable[[], Tensor]]:
        return [
            lambda packed=packed: grid_linear(x, packed, self.scales, self.grid) for packed in self.copies
        ]  # type: ignore[misc]

    def case(self, x: Tensor, name: str = OURS) -> Case:
        runs = self.runs(x)
        return Case(name, runs, result=runs[0])


def dense(x: Tensor, weight: Tensor, total: int, name: str) -> Case:
    """F.linear on copies of a weight."""
    weight = weight.to(x.dtype)
    copies = [weight.clone() for _ in range(max(2, total // (weight.numel() * weight.itemsize)))]
    runs = [lambda w=w: F.linear(x, w) for w in copies]  # type: ignore[misc]
    return Case(name, runs, result=runs[0])


def compare_layer(
    session: Session, what: str, layer: Layer, batch: int, total: int, fp32: str, bf16: str, size: str
) -> None:
    out, k = layer.weight.shape
    x = randn(batch, k)
    expected = x.double() @ layer.weight.double().T
    short = x.bfloat16()
    cases = [
        layer.case(x),
        dense(x, layer.weight, total, "F.linear fp32"),
        Case("F.linear bf16", dense(short, layer.weight, total, "").run),
        Case(f"{OURS} bf16", layer.case(short).run),
    ]
    relations = [
        Relation(OURS, "F.linear fp32", fp32),
        Relation(OURS, "F.linear bf16", bf16),
        Relation(f"{OURS} bf16", "F.linear bf16"),
    ]
    session.compare(
        what, cases, relations, size=size, shape=(batch, k, out), dtype=x.dtype, expected=expected
    )  # fmt: skip


def linear_rows(session: Session, features: int, batches: Sequence[int], total: int) -> None:
    for p, n in MAIN:
        layer = Layer(p, n, features, features, total)
        for batch in batches:
            first = batch == 1
            fp32 = FP32[p, n] if first else "<=0.8" if batch == 16 else "<=1.15" if batch == 512 else ""
            compare_layer(
                session,
                f"linear {features}x{features}, {name_of(p, n)}",
                layer,
                batch,
                total,
                fp32,
                BF16.get((p, n), "") if first else "",
                f"batch {batch}",
            )


def other_rows(
    session: Session, features: int, grids: Sequence[tuple[int, int]], batches: Sequence[int], total: int
) -> None:
    for p, n in grids:
        layer = Layer(p, n, features, features, total)
        for batch in batches:
            what = f"linear {features}x{features}, {name_of(p, n)}"
            compare_layer(
                session, what, layer, batch, total, "<=1" if batch == 1 else "", "", f"batch {batch}"
            )


def shape_rows(session: Session, shapes: Sequence[tuple[int, int]], total: int) -> None:
    """The layers of a small language model."""
    for out, k in shapes:
        for p, n in MAIN:
            layer = Layer(p, n, out, k, total // 8)
            compare_layer(
                session, f"linear {k}->{out}, {name_of(p, n)}", layer, 1, total, "<=1", "", "batch 1"
            )


def peer_rows(session: Session, features: int, batches: Sequence[int], total: int) -> None:
    layer = Layer(1, 16, features, features, total)
    found, missing = rivals.rivals(layer.weight)
    for package, why in missing.items():
        print(f"{package} is left out ({why})", file=sys.stderr)
    pairs = Layer(2, 256, features, features, total)
    for batch in batches:
        x = randn(batch, features, dtype=torch.bfloat16)
        cases = [Case(OURS, layer.runs(x)), Case(f"{OURS} p=2 n=256", pairs.runs(x))]
        for name, (bits, _) in found.items():
            make = next(make for rival, _, make in rivals.RIVALS if rival == name)
            copies = [make(layer.weight) for _ in range(max(2, total // (features * features * bits // 8)))]
            cases.append(Case(name, [lambda run=run, x=x: run(x) for run in copies]))  # type: ignore[misc]
        session.compare(
            f"other quantized layers over ours, {features}x{features}",
            cases,
            [Relation(name, OURS, ">=1") for name in found]
            + [Relation(name, f"{OURS} p=2 n=256", ">=1") for name in found],
            size=f"batch {batch}",
            shape=(batch, features, features),
            dtype=x.dtype,
        )


def encode_rows(session: Session, features: int, grids: Sequence[tuple[int, int]]) -> None:
    x = randn(features, features)
    target = torch.empty_like(x)
    for p, n in grids:
        generator = torch.Generator().manual_seed(0)
        grid = torch.randn(n, p, generator=generator)
        session.compare(
            f"encode {features}x{features}",
            [
                Case("nothing", lambda: None, alloc=""),
                Case(OURS, lambda grid=grid: grid_encode(x, grid)),  # type: ignore[misc]
                Case("copy of x", lambda: target.copy_(x), alloc="out="),
            ],
            [
                Relation(
                    OURS, "nothing", "<=300000" if (p, n, features) == (2, 256, FULL) else "", kind="minus"
                ),
                Relation(OURS, "copy of x"),
            ],
            size=name_of(p, n),
            shape=x.shape,
            dtype=x.dtype,
            repeats=7,
        )


def call_rows(session: Session) -> None:
    x = randn(1, 16)
    grid, scales = randn(16, 1), torch.ones(8, 1)
    packed = torch.zeros(8, packed_bytes(16, 16), dtype=torch.uint8)
    raw = torch.ops.torchlin._grid_linear
    weight = torch.zeros(8, 16)
    session.compare(
        "one call, 16 -> 8, no grad",
        [
            Case("nothing", lambda: None, alloc=""),
            Case(OURS, lambda: grid_linear(x, packed, scales, grid)),
            Case("raw op", lambda: raw(x, packed, scales, grid, None, 16)),
            Case("F.linear", lambda: F.linear(x, weight)),
        ],
        [
            Relation("raw op", "nothing", "<=3", kind="minus"),
            Relation(OURS, "nothing", kind="minus"),
            Relation("F.linear", "nothing", kind="minus"),
        ],
        size="16",
        shape=x.shape,
        dtype=x.dtype,
    )


def sections(session: Session, args: argparse.Namespace) -> Sections:
    """What can be measured on the session's device."""
    quick = session.quick
    features = QUICK if quick else FULL
    total = MIB if quick else args.rotate_mib * MIB
    some = ((2, 88), (4, 256)) if quick else OTHERS
    smol = ((192, 576),) if quick else ((576, 576), (192, 576), (1536, 576), (576, 1536))
    every: dict[str, Callable[[], None]] = {
        "linear": lambda: linear_rows(session, features, (1, 16) if quick else (1, 4, 16, 64, 512), total),
        "others": lambda: other_rows(session, features, some, (1,) if quick else (1, 16), total),
        "shapes": lambda: shape_rows(session, smol, total),
        "peers": lambda: peer_rows(session, features, (1,) if quick else (1, 16), total),
        "encode": lambda: encode_rows(
            session, features, ((2, 256),) if quick else ((1, 16), (2, 16), (2, 256), (4, 4096))
        ),
        "call": lambda: call_rows(session),
    }
    return every


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rotate-mib", type=int, default=160, help="memory that the copies of a weight take (160)"
    )


main = Program(
    "grid", "grid quantization", __doc__, sections, options, unusual=lambda args: args.rotate_mib != 160
).main

if __name__ == "__main__":
    sys.exit(main())
