"""Quantized models as folders: safetensors, JSON, checksums. Nothing is ever unpickled.

A folder holds ``model.safetensors`` (transformers may cut it into shards), ``torchlin.json``, which says what each layer is
and what each file's checksum is, and, for a model of transformers, the ``config.json`` that its own loader reads.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchlin.nn.grid import GridBank, GridEmbedding, GridLinear, GridWeight
from torchlin.quant.quantize import is_conv1d, put_in_place

if TYPE_CHECKING:
    from torchlin.quant.grids import Grid

FORMAT, VERSION = "torchlin-quantized", 1
MANIFEST, WEIGHTS = "torchlin.json", "model.safetensors"


class StorageError(ValueError):
    """A folder that can not be read as what it should be; the message says what is wrong with it."""


def save(model: nn.Module, folder: str | os.PathLike[str], *, tokenizer: Any = None) -> Path:
    """Write a quantized model to a folder, whole or not at all.

    All is written to a new folder beside it, which then takes the place of the old one: whatever interrupts that, the old
    files are whole. An existing folder has to be empty or one that this function wrote; what others have put there since is
    taken along.

    Args:
        model: any module; its layers may be quantized or not.
        folder: where to; parents are made.
        tokenizer: something with ``save_pretrained``, to be kept with a model of transformers.

    Returns:
        The folder.

    Raises:
        ValueError: the folder has files in it that are no saved model, or a weight is on the meta device.
        ImportError: safetensors is not installed.

    Example:
        >>> import tempfile, torch, torchlin
        >>> model = torch.nn.Sequential(torch.nn.Linear(96, 32))
        >>> _ = torchlin.quant.quantize_(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = torchlin.quant.save(model, folder + "/small")
        ...     again = torchlin.quant.load(path, torch.nn.Sequential(torch.nn.Linear(96, 32)))
        >>> bool((again[0].codes == model[0].codes).all())
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: it has no values to save")
    folder = Path(folder).absolute()
    with _replacing(folder) as new:
        aliases: dict[str, str] = {}
        if is_transformers_model(model):
            from torchlin.quant.transformers import mark

            mark(model)
            model.save_pretrained(new)  # type: ignore[operator]
        else:
            aliases = _save_tensors(model.state_dict(), new / WEIGHTS)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        files = {path.name: _checksum(path) for path in sorted(new.glob("*.safetensors*"))}
        layers, grids = describe(model)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "files": files,
            "aliases": aliases,
            "layers": layers,
            "grids": grids,
        }
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return folder


def load(
    folder: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    **options: Any,
) -> nn.Module:
    """Read what :func:`save` wrote.

    Args:
        folder: the folder.
        model: a model built as the saved one was before its quantization; its layers are replaced and its weights
            overwritten, in place. ``None`` for a model of transformers, which is built by its ``config.json``.
        device: where the model is put.
        options: for ``from_pretrained`` of transformers, where model is None (``dtype``, ``device_map``...).

    Returns:
        The model; one of transformers in eval mode.

    Raises:
        StorageError: the folder is of another format or version, a file is missing or was changed, a grid is not what its
            name says, or layers and weights do not fit the model. A model that was given is unchanged then.

    Example:
        see :func:`save`.
    """
    folder = Path(folder)
    manifest = check_folder(folder)
    if model is None:
        if not (folder / "config.json").is_file():
            raise StorageError(
                f"{folder} has no config.json to build a model by: pass model=, built as it was"
            )
        return _load_transformers(folder, device, options)
    if options:
        raise TypeError(f"{next(iter(options))}: options are for models of transformers, without model=")
    state = _read_tensors(folder, manifest)
    layers, grids = manifest["layers"], read_grids(manifest["grids"])
    made = empty_layers(model, layers, grids)
    _check_state(model, made, state)
    put_in_place(model, made)
    model.load_state_dict(state)
    return model if device is None else model.to(device)


def _load_transformers(folder: Path, device: Any, options: dict[str, Any]) -> nn.Module:
    import transformers

    from torchlin.quant.transformers import register_with_transformers

    register_with_transformers()
    config = transformers.AutoConfig.from_pretrained(folder)
    names = [n for n in config.architectures or () if hasattr(transformers, n)]
    if not names:
        raise StorageError(f"{folder}: transformers {transformers.__version__} has no {config.architectures}")
    if device is not None:
        options.setdefault("device_map", {"": device})
    return getattr(transformers, names[0]).from_pretrained(folder, **options).eval()


def is_transformers_model(model: nn.Module) -> bool:
    """Whether it is a model of transformers, which is then imported already."""
    known = sys.modules.get("transformers.modeling_utils")
    return known is not None and isinstance(model, known.PreTrainedModel)


# ---- what layers are


def describe(model: nn.Module) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """({name: what the layer is}, {grid id: the grid}), JSON-safe, of all quantized layers of a model."""
    layers: dict[str, dict[str, Any]] = {}
    grids: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, GridWeight):
            layers[name] = _describe_layer(module)
            grid = module.grid
            value = grid_to_dict(grid)
            if grids.setdefault(grid.id, value) != value:
                raise ValueError(f"{name}: two different grids have one id, {grid.id}")
    return layers, grids


def _describe_layer(layer: GridWeight) -> dict[str, Any]:
    values: dict[str, Any] = {
        "kind": _KINDS[type(layer)],
        "shape": [*layer.rows, layer.in_features],
        "grid": layer.grid.id,
        "block_size": layer.block_size,
        "hadamard_size": layer.hadamard_size,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "scales": str(layer.scales.dtype).removeprefix("torch."),
        "signs": None if layer.signs is None else str(layer.signs.dtype).removeprefix("torch."),
    }
    if getattr(layer, "transposed", False):
        values["transposed"] = True
    return values


_KINDS = {GridLinear: "linear", GridEmbedding: "embedding", GridBank: "experts"}


def empty_layers(
    model: nn.Module, layers: Mapping[str, Mapping[str, Any]], grids: Mapping[str, Grid]
) -> dict[str, GridWeight]:
    """{name: a quantized layer without values} for the places of a model that is not quantized; the model is unchanged.

    Raises:
        StorageError: a layer is missing in the model, or has another kind or size there.
    """
    return {name: _empty_layer(model, name, spec, grids) for name, spec in layers.items()}


def _empty_layer(
    model: nn.Module, name: str, spec: Mapping[str, Any], grids: Mapping[str, Grid]
) -> GridWeight:
    where = f"layer {name!r}"
    parent_name, _, attribute = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        old: Any = getattr(parent, attribute)
    except AttributeError:
        raise StorageError(f"{where} is not in this {type(model).__name__}") from None
    try:
        kind, shape, grid = spec["kind"], tuple(spec["shape"]), grids[spec["grid"]]
        dtype, scales = _dtype(spec["dtype"]), _dtype(spec["scales"])
        signs = None if spec["signs"] is None else _dtype(spec["signs"])
        transposed = bool(spec.get("transposed", False))
    except (KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{where}: the description lacks or garbles {error}") from None
    if isinstance(old, GridWeight):
        raise StorageError(f"{where} is quantized already: pass a model built as it was before")
    weight = old if isinstance(old, nn.Parameter) else getattr(old, "weight", None)
    fits = {
        "linear": isinstance(old, nn.Linear) or is_conv1d(old),
        "embedding": isinstance(old, nn.Embedding),
        "experts": isinstance(old, nn.Parameter) and old.dim() == 3,
    }
    if kind not in fits:
        raise StorageError(f"{where} is of the unknown kind {kind!r}")
    if not fits[kind] or weight is None:
        raise StorageError(
            f"{where} was a quantized {kind} layer, this model has a {type(old).__name__} there"
        )
    there = tuple(weight.mT.shape if transposed else weight.shape)
    if there != shape:
        raise StorageError(f"{where} has a weight of shape {shape} in the file, and {there} in the model")
    options: dict[str, Any] = {
        "grid": grid,
        "block_size": spec["block_size"],
        "hadamard_size": spec["hadamard_size"],
        "signs": None if signs is None else torch.ones(shape[-1], dtype=signs, device=weight.device),
        "device": weight.device,
        "dtype": dtype,
    }
    new: GridWeight
    try:
        if kind == "linear":
            new = GridLinear(shape[1], shape[0], bias=False, **options)
            new.transposed = transposed
            new.bias = old.bias
        elif kind == "embedding":
            new = GridEmbedding(shape[0], shape[1], old.padding_idx, **options)
        else:
            new = GridBank(*shape, transposed=transposed, **options)
    except (TypeError, ValueError) as error:
        raise StorageError(f"{where}: {error}") from None
    new._buffers["scales"] = torch.empty_like(new.scales, dtype=scales)
    return new.train(parent.training)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(name)
    return dtype


# ---- grids


def grid_to_dict(grid: Grid) -> dict[str, Any]:
    """A grid as JSON: its points too, so that what is read later is what was used, whatever the library ships then."""
    points = grid.points.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4").tobytes()
    return {
        "id": grid.id,
        "kind": grid.kind,
        "n": grid.n,
        "p": grid.p,
        "version": grid.version,
        "mse": grid.mse,
        "mse_error": grid.mse_error,
        "points": base64.b64encode(points).decode("ascii"),
        "sha256": hashlib.sha256(points).hexdigest(),
    }


def grid_from_dict(values: Mapping[str, Any]) -> Grid:
    """The grid that :func:`grid_to_dict` wrote.

    Raises:
        StorageError: points are missing or changed, or do not have the shape or the id that they should.
    """
    from torchlin.quant.grids import Grid

    try:
        name, n, p = values["id"], values["n"], values["p"]
        raw = base64.b64decode(values["points"], validate=True)
        mse, mse_error, kind = values["mse"], values["mse_error"], values["kind"]
        version, checksum = values["version"], values["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"a grid is not described as it has to be: {error!r}") from None
    if hashlib.sha256(raw).hexdigest() != checksum:
        raise StorageError(f"grid {name!r}: its points were changed, the checksum is another")
    if len(raw) != 4 * n * p:
        raise StorageError(f"grid {name!r}: {len(raw)} bytes are not {n} points of {p} float32 numbers")
    points = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(n, p)
    if not bool(points.isfinite().all()):
        raise StorageError(f"grid {name!r}: a point is NaN or infinite")
    grid = Grid(points, kind, version, mse, mse_error)
    if grid.id != name:
        raise StorageError(f"grid {name!r} says that it is {grid.id!r}")
    return grid


def read_grids(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Grid]:
    grids = {name: grid_from_dict(value) for name, value in values.items()}
    for name, grid in grids.items():
        if grid.id != name:
            raise StorageError(f"grid {name!r} says that it is {grid.id!r}")
    return grids


# ---- files


def check_folder(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are what it says.

    Raises:
        StorageError: they are not.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise StorageError(
            f"{folder} has no {MANIFEST}: torchlin.quant.save did not write it, or not to its end"
        )
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise StorageError(f"{manifest} is of the format {values.get('format')!r}, not {FORMAT!r}")
        if values.get("version") != VERSION:
            raise StorageError(
                f"{manifest} is of version {values.get('version')!r}; this torchlin reads version {VERSION}"
            )
        for key in ("files", "layers", "grids", "aliases"):
            if not isinstance(values.get(key), dict):
                raise StorageError(f"{manifest} has no {key!r}")
    except (ValueError, AttributeError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{manifest} is no valid JSON: {error}") from None
    for name, checksum in values["files"].items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise StorageError(f"{folder} lacks the file {name}")
        if _checksum(path) != checksum:
            raise StorageError(f"{path} was changed or is damaged: its checksum is not the one in {MANIFEST}")
    return values


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _save_tensors(state: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Writes a state_dict, and returns {name: name of the tensor that it is too} for those that are stored once."""
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} in the model's state_dict is a {type(tensor).__name__}, not a tensor")
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        stored[name] = tensor.detach().to("cpu").contiguous()
    # Views of one storage would be refused: each tensor is written by itself.
    storages: set[int] = set()
    for name, tensor in stored.items():
        if tensor.untyped_storage().nbytes() != tensor.nbytes or tensor.data_ptr() in storages:
            stored[name] = tensor.clone()
        storages.add(stored[name].data_ptr())
    save_file(stored, path, metadata={"format": "pt"})
    return aliases


def _read_tensors(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            state.update(load_file(folder / name))
    for name, same in manifest["aliases"].items():
        if same not in state:
            raise StorageError(f"{folder}: {name} is said to be {same}, which is not there")
        state[name] = state[same]
    return state


def _check_state(model: nn.Module, made: Mapping[str, GridWeight], state: Mapping[str, Tensor]) -> None:
    """Names and shapes of what is stored are those that the model will have."""
    expected: dict[str, Any] = {}
    inside = tuple(f"{name}." for name in made)
    for name, tensor in model.state_dict().items():
        if not name.startswith(inside) and name not in made:
            expected[name] = tensor
    for name, layer in made.items():
        expected |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    for name, tensor in expected.items():
        if name not in state:
            raise StorageError(f"the file has no {name}")
        if state[name].shape != tensor.shape:
            raise StorageError(
                f"{name} has shape {tuple(state[name].shape)} in the file, and {tuple(tensor.shape)} in the model"
            )
    if extra := sorted(set(state) - set(expected)):
        raise StorageError(f"the file has {extra[0]}, which the model has not")


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder to fill; it takes the place of `folder` when that went well, and is removed otherwise."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} has files in it that are no saved model: give a new or empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        yield new
        if folder.is_dir():
            _keep_foreign(folder, new)
            new.chmod(folder.stat().st_mode)
        else:
            mask = os.umask(0)
            os.umask(mask)
            new.chmod(0o777 & ~mask)  # mkdtemp's is for its owner alone
        for path in new.rglob("*"):
            if path.is_file():
                _to_disk(path)
        _exchange(folder, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _keep_foreign(folder: Path, new: Path) -> None:
    """Copies what others have put into the old folder since."""
    try:
        ours = set(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    for path in folder.iterdir():
        if path.name not in ours and path.suffix != ".safetensors" and not (new / path.name).exists():
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, new / path.name)


def _exchange(folder: Path, new: Path) -> None:
    """new in the place of folder; if that fails, folder is where it was."""
    if not folder.exists():
        new.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    folder.rename(old / folder.name)
    try:
        new.rename(folder)
    except BaseException:
        (old / folder.name).rename(folder)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
