"""`torchlin info`: every op, every library, and a reason for whatever is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import torchlin
from torchlin import _library, info
from torchlin._library import LibraryStatus


def row(facts: dict, op: str = "hadamard_transform") -> dict:
    return next(row for row in facts["ops"] if row["op"] == op)


def test_every_public_op_has_a_row() -> None:
    assert [row["op"] for row in info.collect()["ops"]] == torchlin.functional.__all__
    assert all(row["reference"] for row in info.collect()["ops"])


def test_the_facts_are_those_of_this_process() -> None:
    facts = info.collect()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["torchlin"] == torchlin.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["threads"]["intra_op"] == torch.get_num_threads()
    assert facts["names"]["transform"] >= 1
    assert f"torchlin {torchlin.__version__}" in facts["plugins"]
    for device, library in _library.status().items():
        told = facts["libraries"][device]
        assert told["loaded"] == library.loaded
        assert told["reason"] == library.reason
        assert bool(told["reason"]) != told["loaded"]
        if library.loaded:
            assert told["path"] == str(library.path)
            assert told["bytes"] == library.path.stat().st_size


def test_a_kernel_or_a_reason() -> None:
    for op in info.collect()["ops"]:
        for device in ("cpu", "cuda"):
            assert (op[device] is None) == bool(op["why_not"].get(device))


@pytest.mark.skipif(not _library.status()["cpu"].loaded, reason="the CPU library is not built")
def test_the_cpu_kernels_say_their_instruction_set() -> None:
    facts = info.collect()
    assert {op["cpu"] for op in facts["ops"]} == {torch.ops.torchlin._cpu_isa()}
    assert facts["libraries"]["cpu"]["compiler"]


def test_a_missing_library_is_told_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = {
        "cpu": LibraryStatus(False, Path("/somewhere/_C.abi3.so"), "_C.abi3.so does not load: no symbol x"),
        "cuda": LibraryStatus(False, None, "this torch is built without CUDA"),
    }
    monkeypatch.setattr(_library, "status", lambda: missing)
    facts = info.collect()
    assert row(facts)["cpu"] is row(facts)["cuda"] is None
    assert row(facts)["why_not"] == {device: library.reason for device, library in missing.items()}
    assert facts["libraries"]["cpu"]["bytes"] is None
    info.show(facts)
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["op", "reference", "CPU", "CUDA"] in lines
    assert ["hadamard_transform", "yes", "no", "no"] in lines
    assert "no CPU kernels: _C.abi3.so does not load: no symbol x" in printed
    assert "no CUDA kernels: this torch is built without CUDA" in printed


def test_an_op_that_lacks_a_kernel_in_a_loaded_library(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = {device: LibraryStatus(True, Path("_C.abi3.so")) for device in ("cpu", "cuda")}
    monkeypatch.setattr(_library, "status", lambda: loaded)
    monkeypatch.setattr(_library, "ops", lambda: ["_other_fwd", "_mine_fwd", "_mine_out"])
    monkeypatch.setattr(
        torch._C,
        "_dispatch_has_kernel_for_dispatch_key",
        lambda op, key: op == "torchlin::_mine_fwd" and key in ("CPU", "CUDA"),
    )
    assert info._kernel("mine", "cpu") == (None, "this build has no kernel for _mine_out")
    assert info._kernel("none", "cpu") == (None, "this build has no kernel for none")
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: key in ("CPU", "CUDA")
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert info._kernel("mine", "cuda") == (None, "the kernels are loaded, but torch sees no GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert info._kernel("mine", "cuda") == ("sm_90", "")


def test_reasons_of_single_ops_name_them(capsys: pytest.CaptureFixture[str]) -> None:
    facts = info.collect()
    op = row(facts)
    facts["ops"] = [
        op | {"op": "a", "cpu": "avx2", "cuda": None, "why_not": {"cuda": "too new"}},
        op | {"op": "b", "cpu": "avx2", "cuda": "sm_90", "why_not": {}},
    ]
    info.show(facts)
    printed = capsys.readouterr().out
    assert ["a", "yes", "avx2", "no"] in [line.split() for line in printed.splitlines()]
    assert "no CUDA kernels of a: too new\n" in printed
    assert "no CPU kernels" not in printed


def test_the_compiler_is_read_from_the_library(tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    library.write_bytes(b"\x7fELF\0GCC: (Debian 12.2.0-14) 12.2.0\0.shstrtab")
    assert info._compiler(library) == "GCC: (Debian 12.2.0-14) 12.2.0"
    library.write_bytes(b"\x7fELF\0")
    assert info._compiler(library) is None
