"""What nvcc says of the CUDA kernels of activations, and the share of a copy's speed that they should reach on an H100.

`python benchmarks/gpu_model_activation.py` compiles every functor for one architecture (a few minutes, no GPU needed) and
writes `results/gpu_model/activation_ptxas_sm90.csv` and `results/gpu_model/activation.csv`, to hold against the first run.

The PTX of a kernel tells what its loop over elements does: instructions, and those among them for the special function unit,
which takes 16 lanes a clock where the others take 128. Loads, stores and addresses come on top, counted from the same text.
Everything but the longest of memory, issue and special functions hides behind other blocks, as in gpu_model.py.
"""

from __future__ import annotations

import heapq
import math
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import gpu_model  # noqa: E402

from torchlin.catalogue.cpp_code import shard, shards  # noqa: E402
from torchlin.catalogue.kernels import Kernel  # noqa: E402

THREADS, PER_THREAD, STEP = 128, 8, 4  # as in csrc/activation/kernel.cuh
SPECIAL_PER_CLOCK = 16
_SPECIAL = re.compile(r"(ex2|lg2|rcp|rsqrt|sin|cos|sqrt|tanh)\.approx")
# An IEEE division is a reciprocal and its refinement.
_WEIGHT = {"div.rn.f32": 10}


@dataclass(frozen=True)
class Compiled:
    """One kernel: of a functor in a direction, "forward", "backward" or "backward_slots"."""

    functor: str
    direction: str
    ptx: str
    registers: int
    stack_bytes: int
    spill_bytes: int


def compile_functors(group: Iterable[Kernel], folder: Path, name: str) -> list[Compiled]:
    """PTX and ptxas' report of the kernels of some functors."""
    nvcc = gpu_model.find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc was not found: put it on PATH")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.inc").write_text(shard(list(group)), encoding="utf-8")
    ptx = folder / f"{name}.ptx"
    flags = [
        "-O3",
        "-std=c++17",
        "-diag-suppress",
        "177",
        f"-arch={gpu_model.ARCH}",
        f"-I{ROOT / 'csrc'}",
        f"-I{folder}",
    ]
    defines = [f'-DTORCHLIN_SHARD_FILE="{name}.inc"', f"-DTORCHLIN_SHARD_NAME={name}"]
    source = str(ROOT / "csrc" / "activation" / "shard.cu")
    subprocess.run([nvcc, *flags, *defines, "-ptx", source, "-o", str(ptx)], check=True)
    ptxas = str(Path(nvcc).resolve().parent / "ptxas")
    command = [ptxas, "-v", f"-arch={gpu_model.ARCH}", str(ptx), "-o", "/dev/null"]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    bodies = {e[: e.index("(")].strip(): e for e in re.split(r"\.entry ", ptx.read_text())[1:]}
    return [
        Compiled(*_named(k["kernel"]), bodies[k["kernel"]], *_report(k)) for k in gpu_model.parse_ptxas(log)
    ]


def _named(mangled: object) -> tuple[str, str]:
    # torchlin::activation::backward<K_elu>: names with their lengths before them.
    found = re.search(r"activation\d+(forward|backward_slots|backward)INS0_(\d+)(K_\w+)", str(mangled))
    assert found, mangled
    return found[3][2 : int(found[2])], found[1]


def _report(row: dict[str, object]) -> tuple[int, int, int]:
    numbers = {
        key: int(str(row[key]))
        for key in ("registers", "stack_bytes", "spill_store_bytes", "spill_load_bytes")
    }
    return (
        numbers["registers"],
        numbers["stack_bytes"],
        numbers["spill_store_bytes"] + numbers["spill_load_bytes"],
    )


# Constants, casts of bits and signs are part of the instruction that uses them.
_FREE = re.compile(r"^(mov\.\w+\s+\S+, (0[fx]|-?\d)|mov\.b32|neg\.f32|[.{}/$]|ret)")
_ARITHMETIC = re.compile(r"^(fma|mul|add|sub|setp|selp|max|min|ex2)\.\S*f32")


def _cost(line: str) -> tuple[float, float, int]:
    """Instructions, special functions, arithmetic on floats."""
    if not line.endswith(";") or _FREE.match(line):
        return 0.0, 0.0, 0
    weight = next((w for name, w in _WEIGHT.items() if name in line), 1)
    return weight, bool(_SPECIAL.search(line)) or "div.rn.f32" in line, bool(_ARITHMETIC.match(line))


def _ways(lines: list[str]) -> list[list[int]]:
    """Where control can go from each line."""
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.match(r"^\$L\w+:$", line)}
    ways = []
    for i, line in enumerate(lines):
        target = re.search(r"bra(?:\.uni)?\s+(\$L\w+);", line)
        on = [] if (target and not line.startswith("@")) or line.startswith("ret") else [i + 1]
        ways.append([w for w in (*on, *([labels[target[1]]] if target else [])) if w < len(lines)])
    return ways


def _shortest(lines: list[str], ways: list[list[int]], head: int) -> tuple[float, float, int] | None:
    """The cost of the shortest way from a line back to it: what branches leave out is rare (channels, far arguments of sin)."""
    done: set[int] = set()
    queue: list[tuple[float, float, int, int]] = [(0.0, 0.0, 0, head)]
    while queue:
        count, special, arithmetic, at = heapq.heappop(queue)
        if at in done:
            continue
        done.add(at)
        cost = _cost(lines[at])
        now = count + cost[0], special + cost[1], arithmetic + cost[2]
        for to in ways[at]:
            if to == head:
                return now
            heapq.heappush(queue, (*now, to))
    return None


def work(ptx: str) -> tuple[float, float]:
    """Instructions and special functions for an element, in a thread that has eight whole ones side by side."""
    lines = [line.strip() for line in ptx.splitlines()]
    ways = _ways(lines)
    heads = {to for at, every in enumerate(ways) for to in every if to < at}
    found = {head: way for head in heads if (way := _shortest(lines, ways, head))}
    count, special, _ = max(found.values(), key=lambda way: (way[2], way[0]))
    inside = set()
    for at, every in enumerate(ways):
        inside.update(i for to in every if to < at for i in range(to, at + 1))
    outside = sum(_cost(line)[0] for i, line in enumerate(lines) if i not in inside)
    # Of what is outside, a third is for the other types and for single elements.
    return count / STEP + outside * 2 / 3 / PER_THREAD, special / STEP


def predict(gpu: gpu_model.Gpu, kernel: Compiled, inputs: int, element_bytes: int) -> dict[str, object]:
    instructions, special = work(kernel.ptx)
    streams = inputs + 1 if kernel.direction == "forward" else 2 * inputs + 1
    memory = streams * element_bytes / (gpu.dram_bytes_s * gpu.copy_efficiency)
    issue = instructions / gpu.rate(gpu.issue_per_clock)
    unit = special / gpu.rate(SPECIAL_PER_CLOCK)
    per_thread = math.ceil(kernel.registers / 8) * 8
    blocks = min(gpu.registers // (per_thread * THREADS), gpu.max_threads // THREADS, gpu.max_blocks)
    time = max(memory, issue, unit) + (memory + issue + unit - max(memory, issue, unit)) / blocks
    return {
        "functor": kernel.functor,
        "direction": kernel.direction,
        "bytes_per_element": streams * element_bytes,
        "registers": kernel.registers,
        "warps_per_sm": blocks * THREADS // 32,
        "instructions_per_element": round(instructions, 1),
        "special_per_element": round(special, 2),
        "memory_ps": round(memory * 1e12, 3),
        "issue_ps": round(issue * 1e12, 3),
        "special_ps": round(unit * 1e12, 3),
        "of_copy_speed": round(memory / time, 3),
    }


def main() -> None:
    folder = ROOT / "build" / "tests" / "ptxas_activation"
    report, model = [], []
    for number, group in enumerate(shards(20)):
        inputs = {k.name: len(k.inputs) for k in group}
        vectors = {k.name for k in group if any(k.vector_slots)}
        for kernel in compile_functors(group, folder, f"shard_{number:02}"):
            report.append(
                {
                    "functor": kernel.functor,
                    "direction": kernel.direction,
                    "registers": kernel.registers,
                    "stack_bytes": kernel.stack_bytes,
                    "spill_bytes": kernel.spill_bytes,
                }
            )
            # Coefficient vectors make loops of unknown length; sums have other bounds.
            if kernel.direction != "backward_slots" and kernel.functor not in vectors:
                for element_bytes in (4, 2):
                    model.append(predict(gpu_model.Gpu(), kernel, inputs[kernel.functor], element_bytes))
        print(f"{len(report)} kernels", file=sys.stderr)
    order = lambda row: (row["functor"], row["direction"])  # noqa: E731
    gpu_model.RESULTS.mkdir(exist_ok=True)
    gpu_model.write_csv(gpu_model.RESULTS / "activation_ptxas_sm90.csv", sorted(report, key=order))
    gpu_model.write_csv(gpu_model.RESULTS / "activation.csv", sorted(model, key=order))


if __name__ == "__main__":
    main()
