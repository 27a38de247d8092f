"""Builds the emulated CUDA kernels of a `.cpp` in this folder and imports them; incremental."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@cache
def load(name: str) -> ModuleType:
    """Returns the module made of `<name>.cpp`: kernels of `csrc/` compiled by g++ on the emulator."""
    import pybind11
    from torch.utils import cpp_extension

    build = ROOT / "build" / "tests" / f"simt_{name}"
    build.mkdir(parents=True, exist_ok=True)
    return cpp_extension.load(
        name=f"torchlin_simt_{name}",
        sources=[str(HERE / f"{name}.cpp")],
        extra_include_paths=[str(ROOT / "csrc"), str(HERE), pybind11.get_include()],
        # -O1: the kernels are unrolled templates, and a test runs them once on little data.
        extra_cflags=["-O1", "-std=c++17", "-fno-math-errno"],
        build_directory=str(build),
    )
