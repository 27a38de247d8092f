"""The compiled libraries speak torch's stable ABI only: one file serves every torch from 2.11 on, and any CPython."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchlin
from torchlin import _library

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = sorted(Path(torchlin.__file__).parent.glob("_*.so"))


def _dynamic(library: Path, *flags: str) -> list[str]:
    text = subprocess.run(
        ["nm", "-D", *flags, str(library)], check=True, capture_output=True, text=True
    ).stdout
    return [line.split()[-1].split("@")[0] for line in text.splitlines() if line.strip()]


def _needed(library: Path) -> list[str]:
    text = subprocess.run(["readelf", "-d", str(library)], check=True, capture_output=True, text=True).stdout
    return [line.split("[")[1].rstrip("]") for line in text.splitlines() if "(NEEDED)" in line]


def test_cpu_library_is_built():
    assert any(path.name.startswith("_C.") for path in LIBRARIES), (
        "build first: pip install --no-build-isolation -e ."
    )


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="_cuda is only built where nvcc is found")
def test_cuda_library_is_built():
    assert any(path.name.startswith("_cuda.") for path in LIBRARIES)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="_cuda is only built where nvcc is found")
def test_cuda_library_serves_every_op_of_its_families():
    """A CPU torch cannot load _cuda, but the names that it registers stand in it. What loads code on the host has no device."""
    (cuda,) = (path for path in LIBRARIES if path.name.startswith("_cuda."))
    content = cuda.read_bytes()
    families = [source.parent.name for source in (ROOT / "csrc").glob("*/op.cu")]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    of_families = [name for name in _library.ops() if name.startswith(tuple(f"_{f}" for f in families))]
    ops = [name for name in of_families if has_kernel(f"torchlin::{name}", "CPU")]
    assert ops
    assert not [name for name in ops if name.encode() + b"\0" not in content]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
class TestLibrary:
    def test_audit(self, library):
        command = [sys.executable, "-m", "torch_abi_audit.cli", "--json", "--check", "torch", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        report = json.loads(done.stdout)
        (module,) = report["extensions"] + report["bundled_libs"]
        verdict = module["torch"]
        assert verdict["stable"]
        assert verdict["unstable_symbols"] == []
        assert verdict["unknown_shim_symbols"] == []
        oldest = tuple(map(int, verdict["min_torch_version"].split(".")))
        assert oldest <= (2, 11, 0), f"needs torch {oldest} because of {verdict['version_defining_symbols']}"

    def test_no_python_symbols(self, library):
        python = [name for name in _dynamic(library, "--undefined-only") if name.startswith(("Py", "_Py"))]
        assert not python
        assert not [
            name for name in _needed(library) if "torch_python" in name or name.startswith("libpython")
        ]

    def test_no_mangled_torch_symbols(self, library):
        torch_cpp = [
            name
            for name in _dynamic(library, "--undefined-only")
            if name.startswith(("_ZN2at", "_ZN3c10", "_ZNK2at", "_ZNK3c10", "_ZN5torch", "_ZNK5torch"))
        ]
        assert not torch_cpp

    def test_exports_nothing_of_its_own(self, library):
        """Hidden visibility: nothing of torchlin can clash with another extension's symbols."""
        ours = [name for name in _dynamic(library, "--defined-only") if "torchlin" in name]
        assert not ours

    def test_no_build_paths(self, library):
        """Error texts and debug information carry relative paths only."""
        assert str(ROOT).encode() not in library.read_bytes()

    def test_stripped(self, library):
        done = subprocess.run(["readelf", "-S", str(library)], check=True, capture_output=True, text=True)
        assert ".symtab" not in done.stdout
        assert ".debug_info" not in done.stdout
