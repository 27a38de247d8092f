"""What runs where on this machine, and why not: `torchlin info`."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from torchlin import _console, _library, functional, registry

DEVICES = ("cpu", "cuda")


def collect() -> dict[str, Any]:
    """Versions, machine, threads, libraries, ops by device and registered names, as data that JSON can hold.

    An op's `cpu` and `cuda` are the instruction set that its kernel runs on, or None; then `why_not` has the
    reason.

    Example:
        >>> import torchlin.info
        >>> facts = torchlin.info.collect()
        >>> facts["ops"][0]["op"], facts["ops"][0]["reference"]
        ('activation', True)
    """
    return {
        "versions": _versions(),
        "machine": _machine(),
        "threads": {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()},
        "libraries": {device: _library_facts(device) for device in DEVICES},
        "ops": _ops(),
        "names": {kind: len(registry.names(kind)) for kind in registry.KINDS},
        "plugins": _plugins(),
    }


def _versions() -> dict[str, str | None]:
    import numpy

    import torchlin

    return {
        "torchlin": torchlin.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "cuda of torch": torch.version.cuda,
    }


def _machine() -> dict[str, Any]:
    try:
        from torchlin.benchmarks import machine

        cpu = machine.name()
    except ImportError:  # a source tree that was never installed has its benchmarks elsewhere
        cpu = platform.processor() or platform.machine()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "system": platform.platform(),
        "cpu": cpu,
        "cpus to use": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
    }


def _library_facts(device: str) -> dict[str, Any]:
    library = _library.status()[device]
    file = library.path if library.path is not None and library.path.is_file() else None
    return {
        "loaded": library.loaded,
        "path": str(library.path) if library.path is not None else None,
        "bytes": file.stat().st_size if file else None,
        "compiler": _compiler(file) if file else None,
        "reason": library.reason,
    }


def _compiler(library: Path) -> str | None:
    """The compiler's own note in the library's .comment section, which stripping leaves there."""
    note = re.search(rb"GCC: \([^)\0]*\) [\d.]+|clang version [\d.]+", library.read_bytes())
    return note[0].decode(errors="replace") if note else None


# ------------------------------------------------------------------------------------------------------- ops


def _ops() -> list[dict[str, Any]]:
    """One row for each function of torchlin.functional."""
    rows = []
    for op in functional.__all__:
        module = sys.modules[getattr(functional, op).__module__]
        family = module.__name__.rpartition(".")[2].partition("_")[0]
        reference = hasattr(module, f"{op}_reference")
        row: dict[str, Any] = {"op": op, "family": family, "reference": reference, "why_not": {}}
        for device in DEVICES:
            row[device], reason = _kernel(family, device)
            if reason:
                row["why_not"][device] = reason
        rows.append(row)
    return rows


def _kernel(family: str, device: str) -> tuple[str | None, str]:
    """The instruction set that a family's kernels run on, or None and the reason."""
    library = _library.status()[device]
    if not library.loaded:
        return None, library.reason
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    raw = [
        op
        for op in _library.ops()
        if f"{op}_".startswith(f"_{family}_")
        and not has_kernel(f"torchlin::{op}", "CompositeExplicitAutograd")  # a loader, which computes nothing
    ]
    lacking = [op for op in raw if not has_kernel(f"torchlin::{op}", device.upper())]
    if not raw or lacking:
        return None, f"this build has no kernel for {', '.join(lacking) or family}"
    if device == "cpu":
        return str(torch.ops.torchlin._cpu_isa()), ""
    if not torch.cuda.is_available():
        return None, "the kernels are loaded, but torch sees no GPU"
    return "sm_{}{}".format(*torch.cuda.get_device_capability()), ""


def _plugins() -> list[str]:
    entries = (registry.describe(kind, name) for kind in registry.KINDS for name in registry.names(kind))
    return sorted({entry.plugin for entry in entries if entry.plugin})


# ----------------------------------------------------------------------------------------------------- print


def show(facts: dict[str, Any]) -> None:
    """Prints what :func:`collect` found."""
    rows = [(op["op"], "yes", op["cpu"] or "no", op["cuda"] or "no") for op in facts["ops"]]
    _console.table("ops", ("op", "reference", "CPU", "CUDA"), rows)
    for device in DEVICES:
        for reason in dict.fromkeys(op["why_not"].get(device) for op in facts["ops"]):
            if reason:
                lacking = [op["op"] for op in facts["ops"] if op["why_not"].get(device) == reason]
                which = "" if len(lacking) == len(facts["ops"]) else f" of {', '.join(lacking)}"
                print(f"no {device.upper()} kernels{which}: {reason}")
    print()
    threads, libraries, names = facts["threads"], facts["libraries"], facts["names"]
    told: list[tuple[str, Any]] = [
        *facts["versions"].items(),
        *facts["machine"].items(),
        ("threads", f"{threads['intra_op']} in an op, {threads['inter_op']} between ops"),
        *((f"{device.upper()} library", _sentence(libraries[device])) for device in DEVICES),
        ("names", [f"{count} {kind}" for kind, count in names.items() if count]),
        ("plug-ins", facts["plugins"]),
    ]
    facts_told = ((what, ", ".join(here) if isinstance(here, list) else here) for what, here in told)
    _console.table("", ("what", "here"), [(what, here or "none") for what, here in facts_told])


def _sentence(library: dict[str, Any]) -> str:
    words = [library["path"] or "", f"{library['bytes'] / 1024:.0f} KiB" if library["bytes"] else ""]
    return ", ".join(filter(None, [*words, library["compiler"], library["reason"]]))
