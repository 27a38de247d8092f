"""Builds torchlin's two libraries, `_C` (CPU, always) and `_cuda` (where nvcc is found), with one ninja file.

TORCHLIN_CUDA=0 leaves `_cuda` out, TORCHLIN_CUDA=1 makes a missing nvcc an error; TORCH_CUDA_ARCH_LIST chooses architectures
("9.0;10.0+PTX"). No GPU is needed to build, and any torch will do: nothing but its stable headers is compiled against.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
TORCH_TARGET = "0x020b000000000000"  # torch 2.11: the oldest release that one wheel serves
DEFAULT_CUDA_ARCHS = "8.0;9.0;10.0;12.0+PTX"


def find_nvcc() -> str | None:
    wanted = os.environ.get("TORCHLIN_CUDA", "")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    places += [Path(found)] if (found := shutil.which("nvcc")) else []
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    nvcc = next((str(p.resolve()) for p in places if p.exists()), None)
    if nvcc is None and wanted == "1":
        raise SystemExit("TORCHLIN_CUDA=1, but no nvcc was found: put it on PATH or set CUDA_HOME")
    return nvcc


def cuda_arch_flags() -> list[str]:
    flags = []
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS).replace(" ", ";").split(";"):
        if not arch:
            continue
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def sources(pattern: str) -> list[Path]:
    return sorted(CSRC.rglob(pattern))


class NinjaBuild(build_ext):
    """Compiles all extensions with one ninja run: incremental by dependency files, parallel over translation units."""

    def build_extensions(self) -> None:
        import torch  # only a build needs torch

        torch_dir = Path(torch.__file__).resolve().parent
        # Not setuptools' temporary folder: an editable install throws that away, and nothing would be incremental.
        build = ROOT / "build" / f"native-torch{torch.__version__}{'-debug' if self.debug else ''}"
        build.mkdir(parents=True, exist_ok=True)
        optimise = ["-O1", "-g"] if self.debug else ["-O3"]
        extra = os.environ.get("TORCHLIN_CXXFLAGS", "").split()
        define = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        include = [f"-I{CSRC}", f"-isystem {torch_dir / 'include'}"]
        # Paths of the build machine stay out of error texts and debug info.
        relocate = [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={torch_dir}/=torch/"]
        cxx = [*optimise, "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
               "-ffp-contract=fast", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi", *relocate, *define, *include, *extra]  # fmt: skip
        sanitize = [flag for flag in extra if flag.startswith("-fsanitize")]
        link = [*sanitize, *([] if sanitize else ["-Wl,-z,defs"]), *([] if self.debug else ["-s"]), "-Wl,--gc-sections"]

        ninja = [
            f"cxx = {os.environ.get('CXX', 'g++')}",
            f"cxxflags = {' '.join(cxx)}",
            "rule cxx\n  command = $cxx -MMD -MF $out.d $cxxflags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = $cxx -shared $in -o $out {' '.join(link)} -L{torch_dir / 'lib'} -ltorch_cpu",
        ]
        if any(ext.name.endswith("_cuda") for ext in self.extensions):
            nvcc = find_nvcc()
            assert nvcc is not None
            nvccflags = [*optimise, "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden," + ",".join(relocate), "-DUSE_CUDA",
                         "-Xptxas", "-v", "--threads", "0", *cuda_arch_flags(), *define, *include,
                         "-diag-suppress", "177"]  # fmt: skip
            # ptxas reports registers, shared memory and spills of each kernel: kept beside the object, read by the tests.
            ninja += [
                f"nvcc = {nvcc}",
                f"nvccflags = {' '.join(nvccflags)}",
                "rule nvcc\n  command = $nvcc -MD -MF $out.d $nvccflags -c $in -o $out > $out.ptxas 2>&1 "
                "|| (cat $out.ptxas; exit 1)\n  depfile = $out.d\n  deps = gcc",
                # In a CUDA torch libtorch.so depends on libtorch_cuda.so, and must be a direct dependency of ours: otherwise
                # the CUDA shims are not found at load time. A CPU torch does not have them, so they stay unresolved here.
                f"rule link_cuda\n  command = $nvcc -shared $in -o $out -L{torch_dir / 'lib'} -Xlinker --no-as-needed -ltorch "
                f"-Xlinker --unresolved-symbols=ignore-all,--gc-sections{'' if self.debug else ',-s'}",
            ]
        for ext in self.extensions:
            is_cuda = ext.name.endswith("_cuda")
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            objects = []
            for source in map(Path, ext.sources):
                obj = build / (str(source.resolve().relative_to(ROOT)).replace("/", ".") + ".o")
                ninja.append(f"build {obj}: {'nvcc' if is_cuda else 'cxx'} {source.resolve()}")
                objects.append(str(obj))
            ninja.append(f"build {target}: {'link_cuda' if is_cuda else 'link'} {' '.join(objects)}")
        (build / "build.ninja").write_text("\n".join(ninja) + "\n")
        jobs = os.environ.get("MAX_JOBS")
        command = [_ninja(), "-f", str(build / "build.ninja"), *(["-j", jobs] if jobs else [])]
        subprocess.run(command, check=True, cwd=build)
        for ext in self.extensions:
            path = Path(self.get_ext_fullpath(ext.name))
            print(f"torchlin: {path.name} {path.stat().st_size / 1024:.0f} KiB", file=sys.stderr)


def _ninja() -> str:
    if found := shutil.which("ninja"):
        return found
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


def extensions() -> list[Extension]:
    libraries = [Extension("torchlin._C", [str(p.relative_to(ROOT)) for p in sources("*.cpp")], py_limited_api=True)]
    if find_nvcc() and (cuda := sources("*.cu")):
        libraries.append(
            Extension("torchlin._cuda", [str(p.relative_to(ROOT)) for p in cuda], py_limited_api=True)
        )
    return libraries


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
