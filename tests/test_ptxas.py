"""What the CUDA compiler says of every kernel, with no GPU: no spills, and 16-byte accesses where meant."""

from __future__ import annotations

import csv
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from torchlin.catalogue.kernels import kernels as functors

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("kernel", "bits", "mma", "from", "to")


def benchmark(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_model = benchmark("gpu_model")
activation_model = benchmark("gpu_model_activation")
grid_model = benchmark("gpu_model_grid")

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


# -------------------------------------------------------------------------------------------------- activations

FEW = ("relu", "gelu", "leaky_relu", "swiglu", "highway_gate", "kaf")


@pytest.fixture(scope="module")
def activations(build_folder) -> list:
    return activation_model.compile_functors(
        [functors()[name] for name in FEW], build_folder / "ptxas", "few"
    )


def test_activations_move_in_16_byte_vectors(activations):
    for kernel in activations:
        inputs = len(functors()[kernel.functor].inputs) + (kernel.direction != "forward")
        outputs = 1 if kernel.direction == "forward" else inputs - 1
        # float is two vectors, 16-bit types are one.
        assert len(re.findall(r"ld\.global\.v4\.[buf]32", kernel.ptx)) >= 2 * inputs, kernel.functor
        assert len(re.findall(r"st\.global\.v4\.[buf]32", kernel.ptx)) >= 2 * outputs, kernel.functor


def test_activations_do_not_spill(activations):
    assert {(k.functor, k.direction) for k in activations} >= {(name, "backward") for name in FEW}
    for kernel in activations:
        assert kernel.spill_bytes == kernel.stack_bytes == 0, (kernel.functor, kernel.direction)
        assert kernel.registers <= 64


def test_no_functor_of_the_built_library_spills():
    """The build keeps what ptxas says beside each object, for every architecture it compiles for."""
    logs = sorted((ROOT / "build").glob("native-*/activation.shard_*.cu.o.ptxas"))
    if not logs:
        pytest.skip("_cuda was not built here")
    for log in logs:
        spilling = re.findall(r"(?:[1-9]\d* bytes (?:stack frame|spill \w+))", log.read_text())
        assert not spilling, log.name


def test_the_kept_tables_are_of_these_functors():
    """A change of the functors has to bring its figures along: `python benchmarks/gpu_model_activation.py`."""
    with (gpu_model.RESULTS / "activation_ptxas_sm90.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["functor"] for row in rows} == set(functors())
    assert all(row["spill_bytes"] == row["stack_bytes"] == "0" for row in rows)
    with (gpu_model.RESULTS / "activation.csv").open() as file:
        modelled = {row["functor"] for row in csv.DictReader(file)}
    assert modelled == {name for name, k in functors().items() if not any(k.vector_slots)}


# -------------------------------------------------------------------------------------------------- grids


@pytest.fixture(scope="module")
def grid_compiled(build_folder) -> tuple[str, str]:
    return grid_model.compile_ptx(build_folder / "ptxas")


@pytest.fixture(scope="module")
def grid_kernels(grid_compiled) -> list[dict]:
    return grid_model.parse_ptxas(grid_compiled[1])


def test_every_grid_kernel_is_there_and_none_spills(grid_kernels):
    names = {k["kernel"] for k in grid_kernels}
    assert names == {
        f"grid_{name}"
        for name in ("encode", "decode", "pack", "unpack", "dequantize", "pad", "gemv", "mma", "add")
    }
    mma = {(k["coordinates"], k["tiling"], k["source"]) for k in grid_kernels if k["kernel"] == "grid_mma"}
    assert mma == {(p, t, s) for p in (1, 2, 4) for t in grid_model.TILINGS for s in ("wide", "shared")}
    for k in grid_kernels:
        assert k["stack_bytes"] == k["spill_store_bytes"] == k["spill_load_bytes"] == 0, k
        threads = grid_model.THREADS.get(k["kernel"], 256)
        # kGemvBlocksOf in kernel_gemv.cuh
        alone = k["source"] == "wide" and (k["coordinates"] == 4 or k["coordinates"] * k["columns"] >= 16)
        blocks = 2 if k["kernel"] == "grid_gemv" and not alone else 1
        assert k["registers"] * threads * blocks <= 65536, k


def test_codes_are_read_in_16_byte_vectors(grid_compiled):
    seen = 0
    for entry in re.split(r"\.entry ", grid_compiled[0])[1:]:
        kernel = grid_model.describe(entry[: entry.index("(")].strip())
        if kernel["source"] != "wide":
            continue
        seen += 1
        rows = 4 if kernel["kernel"] == "grid_gemv" else 4 if kernel["tiling"] == "tall" else 2
        wide = re.findall(r"ld\.global(?:\.nc)?\.(?:v4\.[buf]32|v2\.[bu]64)", entry)
        assert len(wide) >= rows, kernel
        assert ("mma.sync.aligned.m16n8k16" in entry) == (kernel["kernel"] == "grid_mma")
        # A point of several coordinates is one access.
        words = kernel["coordinates"] // (1 if kernel["kernel"] == "grid_gemv" else 2)
        if words > 1:
            assert re.search(rf"ld\.shared\.v{words}\.[buf]32", entry), kernel
    assert seen == 9 + 3 * len(grid_model.TILINGS)


def test_the_kept_tables_are_of_these_grid_kernels(grid_kernels):
    """A change of the kernels has to bring its figures along: `python benchmarks/gpu_model_grid.py`."""
    names = ("kernel", "coordinates", "columns", "tiling", "source")
    with (gpu_model.RESULTS / "grid_ptxas_sm90.csv").open() as file:
        kept = [{name: row[name] for name in names} for row in csv.DictReader(file)]
    assert kept == [{name: str(k[name]) for name in names} for k in grid_kernels]
    with (gpu_model.RESULTS / "grid.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(grid_model.LAYERS) * len(grid_model.GRIDS) * len(grid_model.BATCHES)


# ---- families whose kernels are read as they were built


@pytest.mark.parametrize(("family", "kernels_of_it"), [("linearity", 24), ("mixup", 35), ("triplet", 34)])
def test_no_built_kernel_spills(family: str, kernels_of_it: int) -> None:
    """The build keeps what ptxas says beside each object, for every architecture that it compiles for."""
    logs = sorted((ROOT / "build").glob(f"native-*/csrc.{family}.op.cu.o.ptxas"))
    if not logs:
        pytest.skip("_cuda was not built here")
    for log in logs:
        text = log.read_text()
        assert text.count("Compiling entry function") >= kernels_of_it
        assert not re.findall(r"[1-9]\d* bytes (?:stack frame|spill \w+)", text)
