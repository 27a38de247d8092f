"""Quantized models for transformers' own `from_pretrained` and `save_pretrained`, by its extension point for quantizers.

`import torchlin` suffices for a folder of :func:`torchlin.quant.save`, or of `save_pretrained`, to be read by
`AutoModelForCausalLM.from_pretrained(folder)`. With `quantization_config=HiggsQuantConfig(bits=4)` it quantizes what it reads.
This module imports transformers; torchlin does not, before something needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from torchlin.nn.grid import GridBank, GridWeight
from torchlin.quant.config import HiggsConfig
from torchlin.quant.quantize import dequantize_, put_in_place, quantize_, run_experts_on_codes
from torchlin.quant.storage import (
    MANIFEST,
    VERSION,
    StorageError,
    check_folder,
    describe,
    empty_layers,
    read_grids,
)

METHOD = "torchlin_higgs"  # transformers has a "higgs" of its own
_CONVERSIONS = "_torchlin_weight_conversions"  # where those that transformers had stay meanwhile


class HiggsQuantConfig(QuantizationConfigMixin):
    """A :class:`torchlin.quant.HiggsConfig` for transformers' `quantization_config`.

    Args:
        higgs: the config, or its dict; or give its fields as arguments.
        layers, grids, version: what a quantized model has in its config.json; not for you to give.

    Example:
        >>> from torchlin.quant.transformers import HiggsQuantConfig
        >>> HiggsQuantConfig(bits=3).higgs.points
        64
    """

    def __init__(
        self,
        higgs: HiggsConfig | Mapping[str, Any] | None = None,
        *,
        layers: Mapping[str, Any] | None = None,
        grids: Mapping[str, Any] | None = None,
        version: int = VERSION,
        quant_method: str = METHOD,
        **fields: Any,
    ) -> None:
        if quant_method != METHOD:
            raise ValueError(f"quant_method must be {METHOD!r}, got {quant_method!r}")
        if higgs is not None and fields:
            raise TypeError(f"{next(iter(fields))}: give a HiggsConfig or its fields, not both")
        if isinstance(higgs, Mapping):
            higgs = HiggsConfig.from_dict(higgs)
        self.quant_method: Any = METHOD
        self.higgs = HiggsConfig(**fields) if higgs is None else higgs
        self.layers, self.grids, self.version = layers, grids, version

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {"quant_method": METHOD, "version": self.version}
        values["higgs"] = self.higgs.to_dict()
        if self.layers is not None:
            values |= {"layers": dict(self.layers), "grids": dict(self.grids or {})}
        return values

    def __iter__(self):
        yield from self.to_dict().items()


class HiggsQuantizer(HfQuantizer):
    """What transformers asks while it loads or saves a model of the quant_method "torchlin_higgs"."""

    requires_calibration = False
    quantization_config: HiggsQuantConfig

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if not self.pre_quantized:
            return
        config = self.quantization_config
        if config.version != VERSION:
            raise StorageError(
                f"the model is of version {config.version!r}; this torchlin reads version {VERSION}"
            )
        if config.layers is None:
            raise StorageError(f"config.json says {METHOD}, but not which layers are quantized")
        if checkpoint_files and (Path(checkpoint_files[0]).parent / MANIFEST).is_file():
            check_folder(Path(checkpoint_files[0]).parent)
        made = empty_layers(model, config.layers, read_grids(config.grids or {}))
        put_in_place(model, made)
        run_experts_on_codes(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        if not self.pre_quantized:
            quantize_(model, self.quantization_config.higgs)
            mark(model, self)
            return
        for name, layer in model.named_modules():
            if isinstance(layer, GridWeight):
                for part in ("codes", "scales", "signs"):
                    tensor = getattr(layer, part)
                    if tensor is not None and not getattr(tensor, "_is_hf_initialized", False):
                        raise StorageError(f"the checkpoint has no {name}.{part}")
                layer._refresh()

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any] | None, dict[str, str]]:
        mark(model, self)  # layers may have been put back or trained since
        layers = {name: m for name, m in model.named_modules() if isinstance(m, GridWeight)}
        if len({layer.codes.data_ptr() for layer in layers.values()}) == len(layers):
            return None, {}
        # An embedding and its head on the same codes: transformers refuses tensors of one storage that it did not tie.
        state, seen = model.state_dict(), set()
        for name, layer in layers.items():
            if layer.codes.data_ptr() in seen:
                state |= {f"{name}.{key}": t.clone() for key, t in layer.state_dict().items()}
            seen.add(layer.codes.data_ptr())
        return state, {}

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> nn.Module:
        dequantize_(model)
        if isinstance(dtype, str):  # as configs have it
            dtype = getattr(torch, dtype)
        return model if dtype is None else model.to(dtype)


def mark(model: Any, quantizer: HiggsQuantizer | None = None) -> None:
    """Says in a model of transformers which of its layers are quantized, so that save_pretrained writes it."""
    layers, grids = describe(model)
    if not layers:
        unmark(model)
        return
    config = getattr(model.config, "quantization_config", None)
    higgs = config.higgs if isinstance(config, HiggsQuantConfig) else None
    model.config.quantization_config = HiggsQuantConfig(higgs, layers=layers, grids=grids)
    if quantizer is None:
        quantizer = HiggsQuantizer(model.config.quantization_config, pre_quantized=True)
    quantizer.quantization_config = model.config.quantization_config
    model.hf_quantizer = quantizer
    if any(isinstance(module, GridBank) for module in model.modules()):
        # save_pretrained would cut banks into experts as if they were the 3-D parameters whose names they have.
        vars(model).setdefault(_CONVERSIONS, vars(model).get("_weight_conversions"))
        model._weight_conversions = []


def unmark(model: Any) -> None:
    """The model is not quantized any more."""
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if name in vars(owner):
            delattr(owner, name)
    for name in ("is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    if _CONVERSIONS in vars(model):
        vars(model).pop("_weight_conversions", None)
        if (before := vars(model).pop(_CONVERSIONS)) is not None:
            model._weight_conversions = before


def register_with_transformers() -> None:
    """Lets `from_pretrained` know the quant_method "torchlin_higgs"; `import torchlin` does it by itself.

    Raises:
        ImportError: transformers is not installed, or is older than its extension point for quantizers.
    """
    # Not its decorators: these refuse a second call.
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = HiggsQuantConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = HiggsQuantizer


register_with_transformers()

__all__ = ["METHOD", "GridBank", "HiggsQuantConfig", "HiggsQuantizer", "register_with_transformers"]
