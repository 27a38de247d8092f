"""Builds torchlin's two libraries, `_C` (CPU, always) and `_cuda` (where nvcc is found), with one ninja file.

TORCHLIN_CUDA=0 leaves `_cuda` out, TORCHLIN_CUDA=1 makes a missing nvcc an error; TORCH_CUDA_ARCH_LIST chooses architectures
("9.0;10.0+PTX"). No GPU is needed to build, and any torch will do: nothing but its stable headers is compiled against.
The functors of activations are written from torchlin/catalogue, in groups: csrc/activation/shard.cpp (and .cu) is compiled
once for each.
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
GENERATED = ROOT / "build" / "generated"
SHARDS = 20


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


def sources(pattern: str) -> list[str]:
    found = (str(path.relative_to(ROOT)) for path in CSRC.rglob(pattern))
    return sorted(path for path in found if not is_template(path))


def is_template(source: str) -> bool:
    return Path(source).stem == "shard"


def write_functors() -> list[str]:
    """Writes what is compiled of the catalogue; the names of the shards. What has not changed is left alone."""
    if not (
        CSRC / "activation"
    ).exists():  # an op that is built on its own, as docs/add-an-op.md is by its test
        return []
    sys.path.insert(0, str(ROOT / "torchlin"))  # not `import torchlin`, which would load what is to be built
    try:
        from catalogue.cpp_code import write
    finally:
        sys.path.pop(0)
    return [path.stem for path in write(GENERATED / "activation", SHARDS) if path.stem.startswith("shard")]


def compile_lines(ext: Extension, folder: Path, shards: list[str]) -> tuple[list[str], list[str]]:
    """Ninja's lines for the objects of a library, and the objects."""
    compiler, suffix = ("nvcc", ".cu") if is_cuda(ext) else ("cxx", ".cpp")
    objects = {source: folder / f"{source.replace('/', '.')}.o" for source in ext.sources}
    lines = [f"build {obj}: {compiler} {ROOT / source}" for source, obj in objects.items()]
    template = CSRC / "activation" / f"shard{suffix}"
    made = {shard: folder / f"activation.{shard}{suffix}.o" for shard in shards if template.exists()}
    once = (
        "" if is_cuda(ext) else " -fno-unswitch-loops"
    )  # a loop for each way to store would double the code
    for shard, obj in made.items():
        lines += [f"build {obj}: {compiler} {template}"]
        lines += [
            f'  defines = -DTORCHLIN_SHARD_FILE=\\"activation/{shard}.inc\\" -DTORCHLIN_SHARD_NAME={shard}{once}'
        ]
    return lines, [str(obj) for obj in (*objects.values(), *made.values())]


class NinjaBuild(build_ext):
    """Compiles all extensions with one ninja run: incremental by dependency files, parallel over translation units."""

    def build_extensions(self) -> None:
        import torch  # only a build needs torch

        torch_dir = Path(torch.__file__).resolve().parent
        # Not setuptools' temporary folder: an editable install throws that away, and nothing would be incremental.
        folder = ROOT / "build" / f"native-torch{torch.__version__}{'-debug' if self.debug else ''}"
        folder.mkdir(parents=True, exist_ok=True)
        shards = write_functors()
        lines = cpu_rules(torch_dir, self.debug)
        if any(is_cuda(ext) for ext in self.extensions):
            lines += cuda_rules(torch_dir, self.debug)
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            compiled, objects = compile_lines(ext, folder, shards)
            lines += [
                *compiled,
                f"build {target}: {'link_cuda' if is_cuda(ext) else 'link'} {' '.join(objects)}",
            ]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([ninja(), *jobs], check=True, cwd=folder)
        for ext in self.extensions:
            path = Path(self.get_ext_fullpath(ext.name))
            print(f"torchlin: {path.name} {path.stat().st_size / 1024:.0f} KiB", file=sys.stderr)


def is_cuda(ext: Extension) -> bool:
    return ext.name.endswith("_cuda")


def common_flags(torch_dir: Path, debug: bool) -> tuple[list[str], list[str]]:
    """Flags of both compilers, and those that keep the build machine's paths out of error texts."""
    common = ["-O1 -g" if debug else "-O3", "-std=c++17", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    common += [f"-I{CSRC}", f"-I{GENERATED}", f"-isystem {torch_dir / 'include'}"]
    return common, [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={torch_dir}/=torch/"]


def cpu_rules(torch_dir: Path, debug: bool) -> list[str]:
    common, relocate = common_flags(torch_dir, debug)
    extra = os.environ.get("TORCHLIN_CXXFLAGS", "").split()
    flags = [
        *common,
        *relocate,
        "-fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast",
    ]
    flags += ["-Wall -Wno-unknown-pragmas -Wno-psabi -Wno-maybe-uninitialized", *extra]
    link = [flag for flag in extra if flag.startswith("-fsanitize")] or ["-Wl,-z,defs"]
    link += ["-Wl,--gc-sections", f"-L{torch_dir / 'lib'}", "-ltorch_cpu", *([] if debug else ["-s"])]
    return [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        "rule cxx",
        f"  command = $cxx -MMD -MF $out.d {' '.join(flags)} $defines -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $in -o $out {' '.join(link)}",
    ]


def cuda_rules(torch_dir: Path, debug: bool) -> list[str]:
    common, relocate = common_flags(torch_dir, debug)
    flags = [
        *common,
        "-DUSE_CUDA",
        "-Xptxas -v",
        "-Xfatbin=-compress-all",
        "--threads 0",
        "-diag-suppress 177",
        *cuda_arch_flags(),
    ]
    flags += [f"-Xcompiler {','.join(['-fPIC', '-fvisibility=hidden', *relocate])}"]
    return [
        f"nvcc = {find_nvcc()}",
        "rule nvcc",
        # ptxas reports registers, shared memory and spills of each kernel: kept beside the object, read by the tests.
        f"  command = $nvcc -MD -MF $out.d {' '.join(flags)} $defines -c $in -o $out > $out.ptxas 2>&1 || "
        "(cat $out.ptxas; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link_cuda",
        # In a CUDA torch libtorch.so depends on libtorch_cuda.so, and must be a direct dependency of ours: otherwise
        # the CUDA shims are not found at load time. A CPU torch does not have them, so here they stay unresolved.
        f"  command = $nvcc -shared $in -o $out -L{torch_dir / 'lib'} -Xlinker --no-as-needed -ltorch "
        f"-Xlinker --unresolved-symbols=ignore-all,--gc-sections{'' if debug else ',-s'}",
    ]


def ninja() -> str:
    """The environment's own before the machine's: another version cannot read the log, and would build everything anew."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja") or "ninja"
    return str(Path(BIN_DIR) / "ninja")


def extensions() -> list[Extension]:
    libraries = [Extension("torchlin._C", sources("*.cpp"), py_limited_api=True)]
    if find_nvcc():
        libraries.append(Extension("torchlin._cuda", sources("*.cu"), py_limited_api=True))
    return libraries


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
