"""Names of what a run was measured on."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.lower().startswith(("model name", "cpu model")):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()


def caches() -> dict[str, int]:
    """Bytes of the first core's data caches by name (L1, L2, L3), as far as the system tells."""
    found = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((cache / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
            found[f"L{level}"] = int(size.rstrip("KM")) * unit
    return found


def name(device: str = "cpu") -> str:
    """GPU name, or CPU model with its caches: what streams on one machine may stay in another's L3."""

    def text(size: int) -> str:
        return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"

    if device == "cuda":
        return torch.cuda.get_device_name()
    sizes = ", ".join(f"{level} {text(size)}" for level, size in caches().items())
    return f"{_cpu_name()} ({sizes})" if sizes else _cpu_name()


def isa(device: str = "cpu") -> str:
    """The instruction set that the kernels use: avx2, sm_90, ...; none where there are no kernels."""
    if device == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    try:
        return torch.ops.torchlin._cpu_isa()
    except AttributeError:
        return "none"


def commit() -> str:
    """The checkout's commit (with + where files differ from it), or the version of an installed torchlin."""
    here = Path(__file__).resolve().parent
    if (here.parent / "pyproject.toml").exists():
        # Results are appended while a run goes on: they are no difference in what was measured.
        changed = ["status", "--porcelain", "--untracked-files=no", "--", "..", ":!results"]
        try:
            head, dirty = (
                subprocess.run(
                    ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
                ).stdout.strip()
                for words in (["rev-parse", "--short", "HEAD"], changed)
            )
            return head + ("+" if dirty else "")
        except (OSError, subprocess.CalledProcessError):
            pass
    import torchlin

    return f"v{torchlin.__version__}"


def describe(device: str = "cpu") -> dict[str, str]:
    """The columns of a row that say where it comes from."""
    return {
        "commit": commit(),
        "machine": name(device),
        "isa": isa(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
