"""save and load: the same model in a fresh process, whole files or none, and refusals that say what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchlin.nn import GridLinear
from torchlin.quant import HiggsConfig, StorageError, grid_from_points, load, quantize_, save, storage

safetensors = pytest.importorskip("safetensors.torch")

OWN = grid_from_points(torch.linspace(-2.5, 2.5, 16).unsqueeze(1))


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 96)
        self.a, self.b = nn.Linear(96, 192), nn.Linear(192, 96, bias=False)
        self.register_buffer("count", torch.tensor(3))
        self.head = nn.Linear(96, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.embed(ids)).relu()))


def make(seed: int = 0, tied: bool = False) -> Net:
    torch.manual_seed(seed)
    return Net(tied).eval()


def quantized(**fields: Any) -> Net:
    model = make(tied=fields.pop("tied", False))
    quantize_(model, HiggsConfig(**{"n": 16, "p": 1, "modules_to_not_convert": (), **fields}))
    return model


IDS = torch.arange(12).view(3, 4)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"embeddings": True},
        {"embeddings": True, "tied": True},
        {"grids": (OWN,)},
        {"block_size": 48, "overrides": {"b": {"n": 88}, "head": None}, "signs": False},
    ],
    ids=["plain", "embeddings", "tied", "own grid", "overrides"],
)
def test_round_trip(fields: dict[str, Any], tmp_path: Path) -> None:
    model = quantized(**fields)
    with torch.no_grad():
        expected = model(IDS)
    path = save(model, tmp_path / "new" / "model")
    assert path.is_dir()
    again = load(path, make(seed=1, tied=fields.get("tied", False)))
    assert list(again.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
        assert tensor.dtype is again.state_dict()[name].dtype
    with torch.no_grad():
        assert torch.equal(again(IDS), expected)
    assert repr(again) == repr(model)


def test_trained_scales_and_signs_and_wide_scales(tmp_path: Path) -> None:
    model = make()
    model.b.weight.data *= 1e-12
    quantize_(model, HiggsConfig(n=16, p=1))
    model.a.unfreeze_(signs=True)
    with torch.no_grad():
        model.a.signs.mul_(1.5)
        expected = model(IDS)
    assert model.b.scales.dtype is torch.float32
    again = load(save(model, tmp_path / "m"), make(seed=1))
    with torch.no_grad():
        assert torch.equal(again(IDS), expected)
    assert dict(again.a.named_parameters()).keys() == {"bias"}  # a buffer, to be trained again when asked


def test_a_model_without_quantized_layers(tmp_path: Path) -> None:
    model = make()
    again = load(save(model, tmp_path / "m"), make(seed=1))
    assert torch.equal(again(IDS), model(IDS))


def test_a_fresh_process(tmp_path: Path) -> None:
    model = quantized(embeddings=True)
    save(model, tmp_path / "m")
    with torch.no_grad():
        torch.save(model(IDS), tmp_path / "expected.pt")
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_quant_storage import IDS, make
from torchlin.quant import load
model = load({str(tmp_path / "m")!r}, make(seed=1), device="cpu")
with torch.no_grad():
    assert torch.equal(model(IDS), torch.load({str(tmp_path / "expected.pt")!r}))
print("the same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "the same\n", done.stderr


def test_files_are_plain(tmp_path: Path) -> None:
    path = save(quantized(), tmp_path / "m")
    assert sorted(p.name for p in path.iterdir()) == ["model.safetensors", "torchlin.json"]
    tensors = safetensors.load_file(path / "model.safetensors")
    assert tensors["a.codes"].dtype is torch.uint8
    assert tensors["a.codes"].shape == (192, 48)
    assert tensors["a.scales"].dtype is torch.float16
    manifest = json.loads((path / "torchlin.json").read_text())
    assert manifest["layers"]["a"] == {
        "kind": "linear",
        "shape": [192, 96],
        "grid": "optimal-p1-n16-v1",
        "block_size": 96,
        "hadamard_size": 96,
        "dtype": "float32",
        "scales": "float16",
        "signs": "int8",
    }


# ---- refusals


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / "torchlin.json"
        manifest = json.loads(file.read_text())
        change(manifest)
        file.write_text(json.dumps(manifest))

    return apply


def set_in(*keys: Any) -> Callable[[Path], None]:
    *way, last, value = keys

    def change(manifest: dict[str, Any]) -> None:
        for key in way:
            manifest = manifest[key]
        manifest[last] = value

    return edit(change)


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "model.safetensors").write_bytes(data)


def cut(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


GRID = "optimal-p1-n16-v1"

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (flip_a_bit, "model.safetensors was changed or is damaged"),
    "half a file": (cut, "model.safetensors was changed or is damaged"),
    "no tensors": (lambda p: (p / "model.safetensors").unlink(), "lacks the file model.safetensors"),
    "no manifest": (lambda p: (p / "torchlin.json").unlink(), r"has no torchlin\.json"),
    "half a manifest": (
        lambda p: (p / "torchlin.json").write_text((p / "torchlin.json").read_text()[:99]),
        "is no valid JSON",
    ),
    "a version to come": (set_in("version", 99), "of version 99; this torchlin reads version 1"),
    "another format": (set_in("format", "gguf"), "of the format 'gguf', not 'torchlin-quantized'"),
    "no layers": (edit(lambda m: m.pop("layers")), "has no 'layers'"),
    "another grid": (set_in("grids", GRID, "points", "AAAA"), "grid .* points were changed"),
    "a grid by another name": (set_in("grids", GRID, "version", 2), "says that it is 'optimal-p1-n16-v2'"),
    "a grid that is missing": (
        edit(lambda m: m["grids"].clear()),
        "layer 'a': the description lacks or garbles",
    ),
    "another shape": (
        set_in("layers", "a", "shape", [96, 96]),
        r"layer 'a' has a weight of shape \(96, 96\)",
    ),
    "another block": (set_in("layers", "a", "block_size", 36), "layer 'a': block_size must divide"),
    "another kind": (set_in("layers", "a", "kind", "conv"), "layer 'a' is of the unknown kind 'conv'"),
    "a layer that is not there": (
        edit(lambda m: m["layers"].update(z=m["layers"]["a"])),
        "layer 'z' is not in this Net",
    ),
    "scales of another size": (
        edit(lambda m: m["layers"]["a"].update(block_size=48, hadamard_size=48)),
        r"a\.scales has shape \(192, 1\) in the file",
    ),
    "a file elsewhere": (set_in("files", "../model.safetensors", "0"), "lacks the file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_model_unchanged(name: str, tmp_path: Path) -> None:
    path = save(quantized(), tmp_path / "m")
    damage, message = DAMAGE[name]
    damage(path)
    model = make(seed=1)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(StorageError, match=message):
        load(path, model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = save(quantized(), tmp_path / "m")
    for name in ("model.safetensors", "torchlin.json"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(StorageError):
            load(path, make())
        (path / name).write_bytes(whole)
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    load(path, make())
    assert not (tmp_path / "exploded").exists()


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = save(quantized(), tmp_path / "m")
    model = quantized()
    with pytest.raises(StorageError, match="layer 'a' is quantized already"):
        load(path, model)
    other = make()
    other.extra = nn.Linear(2, 2)
    with pytest.raises(StorageError, match=r"the file has no extra\.weight"):
        load(path, other)
    less = make()
    del less.count
    with pytest.raises(StorageError, match="the file has count, which the model has not"):
        load(path, less)
    with pytest.raises(StorageError, match=r"no config\.json to build a model by: pass model="):
        load(path)


# ---- whole or not at all


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("where", ["save_file", "_checksum", "_to_disk", "_keep_foreign"])
def test_an_interrupted_save_leaves_the_old_files(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(quantized(), tmp_path / "m")
    before = files(tmp_path)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    if where == "save_file":
        monkeypatch.setattr(safetensors, "save_file", stop)
    else:
        monkeypatch.setattr(storage, where, stop)
    with pytest.raises(KeyboardInterrupt):
        save(quantized(n=4), path)
    assert files(tmp_path) == before  # and nothing half-done beside them
    monkeypatch.undo()
    load(path, make())


def test_an_interrupted_rename_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(quantized(), tmp_path / "m")
    before = files(tmp_path)
    rename, count = Path.rename, []

    def stop(self: Path, target: Path) -> Path:
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        save(quantized(n=4), path)
    assert len(count) == 3  # away, not in place, back
    assert files(tmp_path) == before


def test_saving_over_an_old_model(tmp_path: Path) -> None:
    path = save(quantized(), tmp_path / "m")
    (path / "notes.txt").write_text("mine")
    (path / "more").mkdir()
    (path / "more" / "a.txt").write_text("mine too")
    save(quantized(n=4), path)
    assert load(path, make()).a.grid.n == 4
    assert (path / "notes.txt").read_text() == "mine"
    assert (path / "more" / "a.txt").read_text() == "mine too"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_other_peoples_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="has files in it that are no saved model"):
        save(quantized(), tmp_path)
    with pytest.raises(ValueError, match="is a file; give a folder"):
        save(quantized(), tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_meta_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"embed\.weight is on the meta device"):
        save(Net().to("meta"), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_device_of_the_model(tmp_path: Path) -> None:
    path = save(quantized(), tmp_path / "m")
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        model = load(path, make(), device=device)
        assert {t.device.type for t in model.state_dict().values()} == {device}
        assert type(model.a) is GridLinear
        model(IDS.to(device))
