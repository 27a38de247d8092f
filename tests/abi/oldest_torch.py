"""Loads the built libraries on the oldest supported torch, a CUDA build, on a machine without a GPU or NVIDIA software.

Not part of the test suite: it needs the wheel of that torch, more than 500 MB.

    pip download --no-deps torch==2.11.0 -d DIR
    python tests/abi/oldest_torch.py DIR/torch-2.11.0-*.whl

The wheel is unpacked into a scratch folder. The NVIDIA libraries that it links to are replaced by stubs: shared objects with
the right names, symbols and symbol versions, in which every function answers 100, CUDA's "no device". torch then imports and
finds no GPU; our `_C` and `_cuda` must load, register their kernels, and the CPU ops must compute.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NVIDIA = re.compile(r"lib(cu|nccl|nvshmem|nvrtc|nvJit|nvToolsExt|nvperf)")

PROBE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import torchlin, torchlin._library as library
print("torch", torch.__version__, "CUDA", torch.version.cuda, "python", sys.version.split()[0])
for device, state in library.status().items():
    print(device, "loaded" if state.loaded else "MISSING: " + state.reason)
    assert state.loaded
for name in library.ops():
    for key in ("CPU", "CUDA"):
        if name.startswith("_hadamard_"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key("torchlin::" + name, key), (name, key)
x = torch.randn(5, 576, dtype=torch.float64, requires_grad=True)
y = torchlin.functional.hadamard_transform(x)
h = torchlin.hadamard_matrix(576).double() / 24
torch.testing.assert_close(y, x @ h.T)
(gradient,) = torch.autograd.grad(y.square().sum(), x)
torch.testing.assert_close(gradient, 2 * x)
torch.library.opcheck(torch.ops.torchlin._hadamard_fwd.default, (torch.randn(3, 8), 1.0, 1, 8, None, None, False))
f = torch.compile(lambda x: torchlin.functional.hadamard_transform(x.sin()).cos(), fullgraph=True, backend="aot_eager")
torch.testing.assert_close(f(x), torchlin.functional.hadamard_transform(x.sin()).cos())
print("ok")
"""


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-dW", str(library)))


def make_stubs(torch_lib: Path, stubs: Path) -> list[str]:
    """Writes a stub for every NVIDIA library that torch's libraries need; returns their names."""
    libraries = sorted(torch_lib.glob("*.so*"))
    names = sorted({name for library in libraries for name in needed(library) if NVIDIA.match(name)})
    defined: set[str] = set()
    undefined: set[str] = set()
    versions_of: dict[str, set[str]] = collections.defaultdict(set)
    for library in libraries:
        defined |= {
            line.split()[-1].split("@")[0]
            for line in run("nm", "-D", "--defined-only", str(library)).splitlines()
        }
        undefined |= {
            line.split()[-1] for line in run("nm", "-D", "--undefined-only", str(library)).splitlines()
        }
        owner = ""
        for line in run("readelf", "-VW", str(library)).splitlines():
            if found := re.search(r"File: (\S+)", line):
                owner = found.group(1)
            if owner in names and (found := re.search(r"Name: (\S+)\s+Flags", line)):
                versions_of[owner].add(found.group(1))
    owner_of = {version: name for name, versions in versions_of.items() for version in versions}
    symbols: dict[str, dict[str, set[str]]] = {name: collections.defaultdict(set) for name in names}
    for symbol in undefined:
        name, _, version = symbol.partition("@")
        version = version.strip("@")
        if version in owner_of:
            symbols[owner_of[version]][version].add(name)
        elif (
            not version
            and name not in defined
            and not name.startswith(("Py", "_Py", "_Z", "__", "_ITM", "_Unwind"))
        ):
            symbols[names[0]][""].add(name)  # unversioned: any of the stubs may offer it
    stubs.mkdir()
    for library in names:
        by_version = symbols[library]
        source = stubs / "stub.c"
        functions = sorted({name for group in by_version.values() for name in group})
        source.write_text(
            "".join(f"int {name}(void) {{ return 100; }}\n" for name in functions)
            or "int unused(void) { return 0; }\n"
        )
        script = "".join(
            f"{version} {{ global: {''.join(f'{name}; ' for name in sorted(by_version.get(version, ())))}}};\n"
            for version in sorted(versions_of[library])
        )
        command = [
            "gcc",
            "-w",
            "-fno-builtin",
            "-shared",
            "-fPIC",
            f"-Wl,-soname,{library}",
            "-o",
            str(stubs / library),
            str(source),
        ]
        if script:
            (stubs / "stub.map").write_text(script)
            command.append(f"-Wl,--version-script={stubs / 'stub.map'}")
        subprocess.run(command, check=True)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Load the built libraries on an old CUDA torch with stubbed NVIDIA libraries."
    )
    parser.add_argument("wheel", type=Path, help="torch wheel for this Python, e.g. torch-2.11.0-cp311-*.whl")
    parser.add_argument("--python", default=sys.executable, help="interpreter that fits the wheel")
    parser.add_argument(
        "--package", type=Path, default=ROOT, help="folder that holds the built torchlin package"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch) / "site"
        with zipfile.ZipFile(arguments.wheel) as archive:
            archive.extractall(site)
        stubbed = make_stubs(site / "torch" / "lib", Path(scratch) / "stubs")
        print(f"stubbed {len(stubbed)} NVIDIA libraries")
        environment = {**os.environ, "PYTHONPATH": str(site), "LD_LIBRARY_PATH": str(Path(scratch) / "stubs")}
        probe = Path(scratch) / "probe.py"
        probe.write_text(PROBE)
        sys.exit(
            subprocess.run([arguments.python, str(probe), str(arguments.package)], env=environment).returncode
        )


if __name__ == "__main__":
    main()
