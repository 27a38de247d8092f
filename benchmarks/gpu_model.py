"""What nvcc says of each CUDA kernel, and the time it should take on an H100, to hold against the first run.

`python benchmarks/gpu_model.py` compiles `csrc/hadamard/op.cu` for one architecture (no GPU needed), writes
`results/gpu_model/ptxas_sm90.csv` (registers, shared memory, spills) and `results/gpu_model/hadamard.csv` (prediction).

The model counts, per element, bytes of global memory, instructions and bytes of shared memory, and divides by
what the chip can do. A block works in phases (load, transform, exchange, store); what is not the bottleneck
hides behind other tiles: with T tiles on a multiprocessor the predicted time is
max(parts) + (sum(parts) - max(parts)) / T, and half of that excess where the next tile is loaded early. The
floor, where everything overlaps, is given beside it.
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results" / "gpu_model"
ARCH = "sm_90"


@dataclass(frozen=True)
class Gpu:
    """Rates of a chip: datasheet figures, but for those marked as assumed, which a run has to replace."""

    name: str = "H100 SXM (model)"
    multiprocessors: int = 132
    dram_bytes_s: float = 3.35e12
    l2_bytes_s: float = 5.5e12  # assumed, read plus write
    clock_hz: float = 1.755e9  # assumed under load; the boost clock is 1.98e9
    issue_per_clock: int = 128  # lanes: 4 warp instructions
    shared_bytes_per_clock: int = 128
    registers: int = 65536
    shared_bytes: int = 228 * 1024
    max_threads: int = 2048
    max_blocks: int = 32
    copy_efficiency: float = 0.92  # of the DRAM rate that a plain copy reaches (assumed)

    def rate(self, per_clock: float) -> float:
        return per_clock * self.multiprocessors * self.clock_hz


@dataclass(frozen=True)
class Rows:
    """The plan of `RowsPlan` in csrc/hadamard/kernel_rows.cuh, for an order 2^bits."""

    bits: int
    vector_bits: int
    mma: bool

    @property
    def registers_log2(self) -> int:
        if self.mma:
            return 4 if self.bits <= 7 else 5 if self.bits <= 10 else 6
        return 4 if self.bits <= 9 else 5 if self.bits <= (13 if self.vector_bits == 2 else 12) else 6

    @property
    def values(self) -> int:
        return 1 << self.registers_log2

    @property
    def tile(self) -> int:
        return 1 << max(self.bits, self.registers_log2 + 5)

    @property
    def threads(self) -> int:
        return max(self.tile // self.values, 128)

    @property
    def exchanges(self) -> int:
        if self.mma:
            return 0 if self.bits <= 8 else 1 if self.bits <= 12 else 2
        return 0 if self.bits <= self.vector_bits else 2

    @property
    def shared_bytes(self) -> int:
        return 4 * self.values * self.threads if self.exchanges else 0

    @property
    def prefetches(self) -> bool:
        return self.bits >= 12 if self.vector_bits == 3 else self.bits in (12, 13)

    @property
    def instructions(self) -> float:
        """Per element, counted from the source, for whole and aligned tiles without signs."""
        vector = 1 << self.vector_bits
        adds = self.bits - min(4, max(self.bits - 2, 0)) if self.mma else self.bits
        load = 1 / vector + (0.5 + 0.25 if self.mma else 1)  # vectors; byte permutes and mma, or conversions
        store = 1 / vector + 1 + (0.5 if self.vector_bits == 3 else 0)
        # Vector layouts move four values an instruction; the middle layout one, and it xors addresses.
        exchange = {0: 0.0, 1: 0.6, 2: 3.0}[self.exchanges]
        return load + adds + exchange + store + 60 / self.values

    @property
    def shared_traffic(self) -> int:
        return 8 * self.exchanges


def sources() -> list[Path]:
    csrc = ROOT / "csrc"
    family = [csrc / "hadamard" / "op.cu", csrc / "hadamard" / "launch.h", *csrc.glob("hadamard/*.cuh")]
    return sorted([*csrc.glob("core/*.h"), *csrc.glob("gpu/*.*"), *family])


def find_nvcc() -> str | None:
    default = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(default) if default.exists() else None)


def compile_ptx(folder: Path) -> tuple[str, str]:
    """The PTX of the Hadamard kernels and what ptxas says of it; compiled anew when a source has changed."""
    import torch

    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc was not found: put it on PATH")
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources())).hexdigest()[:16]
    ptx, log = folder / f"hadamard-{ARCH}-{digest}.ptx", folder / f"hadamard-{ARCH}-{digest}.ptxas"
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
        source = str(ROOT / "csrc" / "hadamard" / "op.cu")
        subprocess.run([nvcc, *flags, *include, f"-arch={ARCH}", "-ptx", source, "-o", str(ptx)], check=True)
        command = [
            str(Path(nvcc).resolve().parent / "ptxas"),
            "-v",
            f"-arch={ARCH}",
            str(ptx),
            "-o",
            "/dev/null",
        ]
        log.write_text(subprocess.run(command, check=True, capture_output=True, text=True).stderr)
    return ptx.read_text(), log.read_text()


TYPES = {"f": "float32", "d": "float64", "4Half": "float16", "8BFloat16": "bfloat16"}


def describe(mangled: str) -> dict[str, object]:
    """Kernel, types and template arguments from a mangled name."""
    # The first mention of a class type is spelt out after c10; later ones are substitutions (S.._).
    if m := re.search(r"fwht_rowsINS0_8RowsPlanILi(\d+)ELi(\d+)ELb(\d)EEE(.*?)E+v", mangled):
        rest, head = (
            m[4],
            {"kernel": "fwht_rows", "bits": int(m[1]), "vector_bits": int(m[2]), "mma": m[3] == "1"},
        )
    elif m := re.search(r"fwht_tileI(.*?)Lb(\d)EE", mangled):
        rest = m[1]
        head = {"kernel": "fwht_tile", "bits": "", "vector_bits": "", "mma": m[2] == "1"}
    else:
        return {"kernel": mangled, "bits": "", "vector_bits": "", "mma": False, "from": "", "to": ""}
    tokens = re.findall(r"4Half|8BFloat16|S\w*_|[fd]", rest.replace("N3c10", ""))
    named: list[str] = []
    for token in tokens:
        named.append(TYPES.get(token) or named[-1])
    return head | {"from": named[0], "to": named[1] if len(named) > 1 else named[0]}


def parse_ptxas(log: str) -> list[dict[str, object]]:
    """One row a kernel: what it is, registers, static shared memory, stack and spills in bytes."""
    rows = []
    for entry in re.split(r"Compiling entry function '", log)[1:]:
        spills = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        )
        registers = re.search(r"Used (\d+) registers", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        assert spills, entry
        assert registers, entry
        rows.append(
            describe(entry[: entry.index("'")])
            | {
                "registers": int(registers[1]),
                "static_shared_bytes": int(shared[1]) if shared else 0,
                "stack_bytes": int(spills[1]),
                "spill_store_bytes": int(spills[2]),
                "spill_load_bytes": int(spills[3]),
            }
        )
    return sorted(rows, key=lambda r: tuple(str(v).zfill(3) for v in list(r.values())[:6]))


def predict(gpu: Gpu, plan: Rows, registers: int, element_bytes: int) -> dict[str, object]:
    per_thread = math.ceil(registers / 8) * 8
    shared = plan.shared_bytes + (element_bytes * plan.values * plan.threads if plan.prefetches else 0)
    blocks = min(
        gpu.registers // (per_thread * plan.threads),
        gpu.max_threads // plan.threads,
        gpu.max_blocks,
        gpu.shared_bytes // (shared + 1024),
    )
    tiles = blocks * max(1, plan.threads * plan.values // plan.tile)
    issue = plan.instructions / gpu.rate(gpu.issue_per_clock)
    exchange = plan.shared_traffic / gpu.rate(gpu.shared_bytes_per_clock)
    row: dict[str, object] = {
        "gpu": gpu.name,
        "order": 1 << plan.bits,
        "path": "tensor cores" if plan.mma else "registers",
        "values_per_thread": plan.values,
        "threads": plan.threads,
        "registers": registers,
        "shared_bytes": shared,
        "blocks_per_sm": blocks,
        "warps_per_sm": blocks * plan.threads // 32,
        "tiles_per_sm": tiles,
        "instructions_per_element": round(plan.instructions, 2),
        "shared_bytes_per_element": plan.shared_traffic,
        "issue_ps": round(issue * 1e12, 3),
        "shared_ps": round(exchange * 1e12, 3),
    }
    for where, rate in (("dram", gpu.dram_bytes_s * gpu.copy_efficiency), ("l2", gpu.l2_bytes_s)):
        memory = 2 * element_bytes / rate
        parts = (memory, issue, exchange)
        floor = max(parts)
        if plan.prefetches:
            # Loads and stores go on behind the computation, whose own phases alternate.
            parts = (memory, max(issue, exchange) + min(issue, exchange) / tiles)
        time = max(parts) + (sum(parts) - max(parts)) / (2 * tiles if plan.prefetches else tiles)
        row |= {
            f"{where}_clone_ps": round(memory * 1e12, 3),
            f"{where}_ps": round(time * 1e12, 3),
            f"{where}_over_clone": round(time / memory, 3),
            f"{where}_over_clone_if_all_overlaps": round(floor / memory, 3),
        }
    return row


def model(kernels: list[dict[str, object]], gpu: Gpu | None = None) -> list[dict[str, object]]:
    rows = []
    for kernel in kernels:
        if kernel["kernel"] != "fwht_rows" or kernel["from"] != kernel["to"]:
            continue
        plan = Rows(int(str(kernel["bits"])), int(str(kernel["vector_bits"])), bool(kernel["mma"]))
        element_bytes = 4 if kernel["from"] == "float32" else 2
        rows.append(
            {"dtype": kernel["from"]}
            | predict(gpu or Gpu(), plan, int(str(kernel["registers"])), element_bytes)
        )
    return rows


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    kernels = parse_ptxas(compile_ptx(ROOT / "build" / "tests" / "ptxas")[1])
    RESULTS.mkdir(exist_ok=True)
    write_csv(RESULTS / "ptxas_sm90.csv", kernels)
    write_csv(RESULTS / "hadamard.csv", model(kernels))
    print(
        f"{len(kernels)} kernels: {RESULTS / 'ptxas_sm90.csv'}, {RESULTS / 'hadamard.csv'}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
