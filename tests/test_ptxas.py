"""What the CUDA compiler says of every kernel, with no GPU: no spills, and 16-byte accesses where meant."""

from __future__ import annotations

import csv
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("kernel", "bits", "mma", "from", "to")

spec = importlib.util.spec_from_file_location("gpu_model", ROOT / "benchmarks" / "gpu_model.py")
gpu_model = importlib.util.module_from_spec(spec)
sys.modules["gpu_model"] = gpu_model
spec.loader.exec_module(gpu_model)

pytestmark = pytest.mark.skipif(gpu_model.find_nvcc() is None, reason="no nvcc here")


@pytest.fixture(scope="module")
def compiled(build_folder) -> tuple[str, str]:
    return gpu_model.compile_ptx(build_folder / "ptxas")


@pytest.fixture(scope="module")
def kernels(compiled) -> list[dict]:
    return gpu_model.parse_ptxas(compiled[1])


def test_every_kernel_is_there(kernels):
    rows = [k for k in kernels if k["kernel"] == "fwht_rows" and k["from"] == k["to"]]
    for dtype, mma in (("float32", False), ("float16", False), ("bfloat16", False)):
        assert [k["bits"] for k in rows if k["from"] == dtype and k["mma"] == mma] == list(range(16))
    for dtype in ("float16", "bfloat16"):
        assert [k["bits"] for k in rows if k["from"] == dtype and k["mma"]] == list(range(6, 16))
    tiles = {(k["from"], k["to"], k["mma"]) for k in kernels if k["kernel"] == "fwht_tile"}
    same = {(d, d, mma) for d in ("float32", "float16", "bfloat16") for mma in (False, True)}
    passes = {
        pair for d in ("float16", "bfloat16") for pair in ((d, "float32", False), ("float32", d, False))
    }
    assert tiles == same | passes | {("float64", "float64", False)}


def test_nothing_spills(kernels):
    spilling = [k for k in kernels if k["stack_bytes"] or k["spill_store_bytes"] or k["spill_load_bytes"]]
    assert not spilling


def test_blocks_fit_their_registers(kernels):
    for k in kernels:
        threads = 256
        if k["kernel"] == "fwht_rows":
            threads = gpu_model.Rows(k["bits"], k["vector_bits"], k["mma"]).threads
        assert k["registers"] * threads <= 65536


def test_rows_are_read_and_written_in_16_byte_vectors(compiled):
    seen = 0
    for entry in re.split(r"\.entry ", compiled[0])[1:]:
        kernel = gpu_model.describe(entry[: entry.index("(")].strip())
        if kernel["kernel"] != "fwht_rows":
            continue
        seen += 1
        loads = len(re.findall(r"ld\.global(?:\.nc)?\.(?:v4\.[bu]32|v2\.[bu]64|v4\.f32)", entry))
        stores = len(re.findall(r"st\.global\.(?:v4\.[bu]32|v2\.[bu]64|v4\.f32)", entry))
        plan = gpu_model.Rows(kernel["bits"], kernel["vector_bits"], kernel["mma"])
        vectors = plan.values >> plan.vector_bits
        assert loads >= vectors, kernel
        if kernel["from"] == kernel["to"]:
            assert stores == vectors, kernel
        else:  # four floats become four 16-bit elements
            assert len(re.findall(r"st\.global\.v2\.[bu]32", entry)) == vectors, kernel
        assert ("cp.async.cg.shared.global" in entry) == plan.prefetches
        assert ("mma.sync.aligned.m16n8k16" in entry) == kernel["mma"]
    assert seen == 16 * 3 + 10 * 2 + 2


def test_the_kept_tables_are_of_these_kernels(kernels):
    """A change of the kernels has to bring its figures along: `python benchmarks/gpu_model.py`."""
    with (gpu_model.RESULTS / "ptxas_sm90.csv").open() as file:
        kept = [
            {name: row[name] for name in ("kernel", "bits", "mma", "from", "to")}
            for row in csv.DictReader(file)
        ]
    assert kept == [{name: str(k[name]) for name in ("kernel", "bits", "mma", "from", "to")} for k in kernels]
    with (gpu_model.RESULTS / "hadamard.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(gpu_model.model(kernels))
