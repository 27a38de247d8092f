"""Builds the emulated CUDA kernels of a `.cpp` in this folder and imports them; incremental."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHARDS = 4  # of the functors: one compiler would be slower than two, and needs more memory


def functors(build: Path) -> list[Path]:
    """Sources for all functors of the catalogue, each as `csrc/activation/shard.cu` is compiled for a device."""
    from torchlin.catalogue.cpp_code import write

    shards = [path.stem for path in write(build / "activation", SHARDS) if path.stem.startswith("shard")]
    sources = []
    for shard in shards:
        source = build / f"{shard}.cpp"
        text = (
            f'#define TORCHLIN_SHARD_FILE "activation/{shard}.inc"\n#define TORCHLIN_SHARD_NAME {shard}\n'
            f'#include "activation/shard.cu"\n'
        )
        if not source.exists() or source.read_text() != text:
            source.write_text(text)
        sources.append(source)
    return sources


@cache
def load(name: str) -> ModuleType:
    """Returns the module made of `<name>.cpp`: kernels of `csrc/` compiled by g++ on the emulator."""
    import pybind11
    from torch.utils import cpp_extension

    build = ROOT / "build" / "tests" / f"simt_{name}"
    build.mkdir(parents=True, exist_ok=True)
    sources = [HERE / f"{name}.cpp", *(functors(build) if name == "activation" else ())]
    return cpp_extension.load(
        name=f"torchlin_simt_{name}",
        sources=[str(source) for source in sources],
        extra_include_paths=[str(ROOT / "csrc"), str(HERE), str(build), pybind11.get_include()],
        # -O1: the kernels are unrolled templates, and a test runs them once on little data.
        extra_cflags=["-O1", "-std=c++17", "-fno-math-errno"],
        build_directory=str(build),
    )
