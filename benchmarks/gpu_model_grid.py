"""What nvcc says of the CUDA kernels of the grid family, and the time that the linear layer should take on an H100.

`python benchmarks/gpu_model_grid.py` compiles `csrc/grid/op.cu` for one architecture (no GPU needed) and writes
`results/gpu_model/grid_ptxas_sm90.csv` (registers, shared memory, spills) and `results/gpu_model/grid.csv` (prediction), to
hold against the first run. Layers are planned by the code that plans them for a device.

Four things take time: bytes of device memory, instructions, accesses to shared memory (lookups above all: one takes a cycle
for every 128 bytes, and more where lanes meet in a bank) and tensor cores. With W warps on each of a multiprocessor's four
schedulers the predicted time is max(parts) + (sum(parts) - max(parts)) / W, as in gpu_model.py, and a launch. Beside it stands
the least that F.linear on a bfloat16 weight can take: its bytes or its multiplications, and a launch.
"""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import gpu_model  # noqa: E402

SOURCES = ("wide", "shared", "global")
TILINGS = ("narrow", "tall", "broad", "blocks")
THREADS = {"grid_gemv": 256, "grid_mma": 512, "grid_add": 512}  # else 256
LAYERS = ((4096, 14336), (14336, 4096))
GRIDS = ((16, 1), (16, 2), (256, 2), (64, 2), (88, 2), (1024, 2), (65536, 4))
BATCHES = (1, 4, 16, 64)
LAUNCH_US = 2.0  # assumed, of the first kernel; half of it for one that follows
TENSOR_SHARE = 0.62  # of the peak, by mma.sync (assumed)
LINEAR_SHARE = 0.7  # of the peak, by a library's matrix product (assumed)
PEAK_PER_CLOCK = 2048 * 2  # of a multiprocessor: operations on 16-bit numbers


def sources() -> list[Path]:
    csrc = ROOT / "csrc"
    family = [csrc / "grid" / name for name in ("op.cu", "launch.h", "layout.h")]
    return sorted([*csrc.glob("core/*.h"), *csrc.glob("gpu/*.*"), *csrc.glob("grid/*.cuh"), *family])


def compile_ptx(folder: Path) -> tuple[str, str]:
    """The PTX of the family's kernels and what ptxas says of it; compiled anew when a source has changed."""
    import torch

    nvcc = gpu_model.find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc was not found: put it on PATH")
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources())).hexdigest()[:16]
    ptx, log = (folder / f"grid-{gpu_model.ARCH}-{digest}.{kind}" for kind in ("ptx", "ptxas"))
    if not log.exists():
        folder.mkdir(parents=True, exist_ok=True)
        include = [f"-I{ROOT / 'csrc'}", "-isystem", str(Path(torch.__file__).parent / "include")]
        flags = [
            "-O3",
            "-std=c++17",
            "-DUSE_CUDA",
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
            "-diag-suppress",
            "177",
        ]
        source = str(ROOT / "csrc" / "grid" / "op.cu")
        arch = f"-arch={gpu_model.ARCH}"
        subprocess.run([nvcc, *flags, *include, arch, "-ptx", source, "-o", str(ptx)], check=True)
        ptxas = [str(Path(nvcc).resolve().parent / "ptxas"), "-v", arch, str(ptx), "-o", "/dev/null"]
        log.write_text(subprocess.run(ptxas, check=True, capture_output=True, text=True).stderr)
    return ptx.read_text(), log.read_text()


def describe(mangled: str) -> dict[str, object]:
    """Kernel and template arguments from a mangled name."""
    row: dict[str, object] = {"kernel": "", "coordinates": "", "columns": "", "tiling": "", "source": ""}
    if m := re.search(r"grid_gemvILi(\d+)ELi(\d+)ELNS0_6SourceE(\d)E", mangled):
        return row | {
            "kernel": "grid_gemv",
            "coordinates": int(m[1]),
            "columns": int(m[2]),
            "source": SOURCES[int(m[3])],
        }
    if m := re.search(r"grid_mmaILi(\d+)ELNS0_6TilingE(\d)ELb(\d)E", mangled):
        tiling, source = TILINGS[int(m[2])], SOURCES[1 - int(m[3])]
        columns = {"narrow": 8, "broad": 64}.get(tiling, 32)
        return row | {
            "kernel": "grid_mma",
            "coordinates": int(m[1]),
            "columns": columns,
            "tiling": tiling,
            "source": source,
        }
    if m := re.search(r"(grid_[a-z]+)ILi(\d+)E", mangled):
        return row | {"kernel": m[1], "coordinates": int(m[2])}
    m = re.search(r"\d(grid_[a-z]+)E", mangled)
    assert m, mangled
    return row | {"kernel": m[1]}


def parse_ptxas(log: str) -> list[dict[str, object]]:
    rows = []
    for row in gpu_model.parse_ptxas(log):
        head = describe(str(row["kernel"]))
        numbers = {
            key: row[key]
            for key in (
                "registers",
                "static_shared_bytes",
                "stack_bytes",
                "spill_store_bytes",
                "spill_load_bytes",
            )
        }
        rows.append(head | numbers)
    return sorted(rows, key=lambda r: tuple(str(v).zfill(3) for v in list(r.values())[:5]))


@cache
def accesses(entries: int, stride: int, words: int) -> float:
    """Cycles of a warp's lookup of `words` words at random entries, each of which is `stride` words, full of copies."""
    import random

    if entries * words <= 32:  # every entry has its banks, and what is read twice is sent twice for nothing
        return float(words)
    draw, copies = random.Random(0), stride // words
    group = max(1, 32 // words)  # lanes that one cycle serves
    total, trials = 0, 500
    for _ in range(trials):
        for first in range(0, 32, group):
            banks: dict[int, set[int]] = {}
            for lane in range(first, first + group):
                at = draw.randrange(entries) * stride + lane % copies * words
                for word in range(at, at + words):
                    banks.setdefault(word % 32, set()).add(word)
            total += max(len(b) for b in banks.values())
    return total / trials


@dataclass(frozen=True)
class Work:
    """What a layer asks of all multiprocessors together, and of the busiest one beside the mean."""

    warp_instructions: float
    shared_cycles: float
    tensor_operations: float
    dram_bytes: float
    l2_bytes: float
    imbalance: float


def work(
    plan: dict[str, Any], gpu: gpu_model.Gpu, layer: tuple[int, int], n: int, p: int, batch: int
) -> Work:
    """Counted from the source, for 16-bit x and aligned tensors."""
    in_features, out_features = layer
    P, columns, wide = plan["coordinates"], plan["columns"], plan["source"] == "wide"
    lookups = 16 if wide else plan["words"] * plan["digits"]
    weights = lookups * plan["codes"] * p  # of a segment
    passes, blocks = math.ceil(batch / columns), plan["grid"][0] * plan["parts"]
    codes_bytes = out_features * in_features * plan["width"] / (8 * plan["digits"] * plan["codes"] * p)
    digits = 0 if plan["digits"] == 1 else 8 if plan["width"] <= 32 else 20  # instructions of a division
    extract = 2.5 if wide else 4 + digits  # a code from its word
    load = 1 if wide else 12  # the words of a segment
    load_cycles = 4 if wide else 3
    if plan["path"] == "gemv":
        rows, slots, per_step = 4, 8 / plan["splits"], 32
        multiply = P + 1 if columns == 1 else P * (columns + 1)
        instructions = lookups * (rows * (extract + 1 + multiply) + columns + 2) + rows * load + 12
        table = accesses(plan["entries"], plan["stride"], P) if plan["stride"] else 32 * max(1, P / 4)
        cycles = lookups * (rows * table + columns * P) + rows * load_cycles
        tensor = 0.0
        staging_lanes, staging_cycles = in_features * columns / 4 * 24, in_features * columns / 32 * 2
        fill_cycles = plan["entries"] * plan["stride"] / 32
    else:
        rows, slots, per_step = (
            (32, 16 / plan["splits"], 4) if plan["tiling"] == "tall" else (16, 16 / plan["splits"], 4)
        )
        halves = rows // 8
        staged_columns = min(batch, 8) if columns == 8 else columns
        of_entry = 2 if P == 4 else 1
        pieces = lookups * P / 4
        instructions = (
            lookups * halves * (extract + 2) + pieces * (columns / 8) * (1 + rows / 16) + halves * load + 16
        )
        table = accesses(plan["entries"], plan["stride"], of_entry)
        x_cycles = math.ceil(min(batch, 8) / 4) if columns == 8 else columns / 4
        cycles = lookups * halves * table + pieces * x_cycles + halves * load_cycles
        tensor = pieces * columns / 8 * rows / 16 * 2048 * 2
        staging_lanes, staging_cycles = (
            in_features * staged_columns / 4 * 22,
            in_features * staged_columns * 2 / 128,
        )
        fill_cycles = plan["entries"] * plan["stride"] / 32
    groups = math.ceil(out_features / rows)
    steps = groups * math.ceil(in_features / (weights * per_step)) * passes
    staged = blocks * passes / plan["parts"]  # of all x; each block its part
    if plan["steps"] > plan["chunk"] * plan["parts"]:  # again for every round of groups
        staged *= math.ceil(groups / (plan["grid"][0] * slots))
    per_block = math.ceil(groups / plan["grid"][0])
    # Blocks of all parts and passes are dealt to multiprocessors alike.
    total_blocks = blocks * passes
    resident = math.ceil(total_blocks / gpu.multiprocessors)
    imbalance = resident * per_block * gpu.multiprocessors / (groups * plan["parts"] * passes)
    partial = plan["parts"] * batch * out_features * 8 if plan["parts"] > 1 else 0
    return Work(
        steps * instructions + staged * staging_lanes / 32,
        steps * cycles + staged * staging_cycles + total_blocks * fill_cycles,
        steps * tensor,
        codes_bytes + 2 * batch * (in_features + out_features),
        codes_bytes * (passes - 1) + staged * in_features * min(columns, batch) * 2 + partial,
        max(1.0, imbalance),
    )


def blocks_per_multiprocessor(kernel: dict[str, object], shared_bytes: int, gpu: gpu_model.Gpu) -> int:
    threads = THREADS.get(str(kernel["kernel"]), 256)
    per_thread = math.ceil(int(str(kernel["registers"])) / 8) * 8
    return min(
        gpu.registers // (per_thread * threads),
        gpu.max_threads // threads,
        gpu.shared_bytes // (shared_bytes + 1024),
    )


def model(kernels: list[dict[str, object]], gpu: gpu_model.Gpu | None = None) -> list[dict[str, object]]:
    """One row a layer, grid and batch: bfloat16 x, one scale a row."""
    from simt.build import load

    gpu = gpu or gpu_model.Gpu()
    planner, rows = load("grid"), []
    for layer in LAYERS:
        for n, p in GRIDS:
            for batch in BATCHES:
                in_features, out_features = layer
                plan = planner.plan(
                    n, p, out_features, in_features, in_features, 2, batch, gpu.multiprocessors, 227 * 1024
                )
                flops = 2 * in_features * out_features * batch
                dense = 2 * (in_features * out_features + batch * (in_features + out_features))
                linear = LAUNCH_US + 1e6 * max(
                    dense / (gpu.dram_bytes_s * gpu.copy_efficiency),
                    flops / (gpu.rate(PEAK_PER_CLOCK) * LINEAR_SHARE),
                )
                head = {
                    "gpu": gpu.name,
                    "in_features": in_features,
                    "out_features": out_features,
                    "n": n,
                    "p": p,
                    "batch": batch,
                    "path": plan["path"],
                }
                if plan["path"] == "dense":
                    weight = 2 * in_features * out_features
                    time = (
                        linear
                        + 1e6 * 2 * weight / gpu.l2_bytes_s
                        + LAUNCH_US * (1 + weight // (16 << 20)) / 2
                    )
                    rows.append(head | _times(dict.fromkeys(PARTS, ""), time, linear))
                    continue
                key = {k: plan[k] for k in ("coordinates", "columns", "tiling", "source")} | {
                    "kernel": f"grid_{plan['path']}"
                }
                kernel = next(k for k in kernels if all(k[name] == value for name, value in key.items()))
                blocks = blocks_per_multiprocessor(kernel, plan["shared_bytes"], gpu)
                blocks = min(blocks, max(1, math.ceil(math.prod(plan["grid"]) / gpu.multiprocessors)))
                warps = blocks * THREADS[f"grid_{plan['path']}"] // 32
                w = work(plan, gpu, layer, n, p, batch)
                clocks = gpu.multiprocessors * gpu.clock_hz / w.imbalance
                parts = {
                    "memory_us": w.dram_bytes / (gpu.dram_bytes_s * gpu.copy_efficiency)
                    + w.l2_bytes / gpu.l2_bytes_s,
                    "issue_us": w.warp_instructions / 4 / clocks,
                    "shared_us": w.shared_cycles / clocks,
                    "tensor_us": w.tensor_operations / (PEAK_PER_CLOCK * TENSOR_SHARE) / clocks,
                }
                if plan["source"] == "global":  # each lookup is a sector of the second cache
                    lookups = in_features * out_features / p * math.ceil(batch / plan["columns"])
                    parts["memory_us"] += lookups * 32 / gpu.l2_bytes_s
                parts = {name: 1e6 * seconds for name, seconds in parts.items()}
                longest, total = max(parts.values()), sum(parts.values())
                time = (
                    longest + (total - longest) / (warps / 4) + LAUNCH_US * (1.5 if plan["parts"] > 1 else 1)
                )
                rows.append(
                    head
                    | {
                        "source": plan["source"],
                        "tiling": plan["tiling"],
                        "splits": plan["splits"],
                        "parts": plan["parts"],
                        "registers": kernel["registers"],
                        "shared_bytes": plan["shared_bytes"],
                        "warps_per_sm": warps,
                        **{name: round(us, 2) for name, us in parts.items()},
                    }
                    | _times({}, time, linear)
                )
    return rows


PARTS = (
    "source", "tiling", "splits", "parts", "registers", "shared_bytes", "warps_per_sm",
    "memory_us", "issue_us", "shared_us", "tensor_us",
)  # fmt: skip


def _times(head: dict[str, object], time: float, linear: float) -> dict[str, object]:
    return head | {
        "predicted_us": round(time, 1),
        "bf16_linear_floor_us": round(linear, 1),
        "floor_over_predicted": round(linear / time, 2),
    }


def main() -> None:
    kernels = parse_ptxas(compile_ptx(ROOT / "build" / "tests" / "ptxas")[1])
    gpu_model.RESULTS.mkdir(exist_ok=True)
    gpu_model.write_csv(gpu_model.RESULTS / "grid_ptxas_sm90.csv", kernels)
    gpu_model.write_csv(gpu_model.RESULTS / "grid.csv", model(kernels))
    print(
        f"{len(kernels)} kernels: {gpu_model.RESULTS / 'grid_ptxas_sm90.csv'}, {gpu_model.RESULTS / 'grid.csv'}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
