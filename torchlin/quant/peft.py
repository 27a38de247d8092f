"""LoRA of peft on quantized layers. This module imports peft; torchlin does not."""

from __future__ import annotations

import os
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.lora import Linear

from torchlin.nn.grid import GridLinear


class LoraGridLinear(Linear):
    """peft's own LoRA on a :class:`torchlin.nn.GridLinear`: y = GridLinear(x) + scaling · B A x."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: a sum with A and B is no weight of grid points.

        Raises:
            ValueError: always, with what to do.
        """
        raise ValueError(
            "LoRA can not be merged into grid codes: torchlin.quant.dequantize_(model) first, then merge (and quantize again)"
        )


def lora_config(saved: str | os.PathLike[str] | None = None, **fields: Any) -> LoraConfig:
    """A ``peft.LoraConfig`` that knows quantized layers.

    Args:
        saved: a folder of ``save_pretrained``, for ``PeftModel.from_pretrained(model, folder, config=lora_config(folder))``.
        fields: of ``peft.LoraConfig``. "all-linear" does not find quantized layers: give target_modules by name.

    Example:
        >>> from torchlin.quant.peft import lora_config
        >>> lora_config(r=8, target_modules=["q_proj", "v_proj"]).r
        8
    """
    config: Any = (
        LoraConfig(**fields) if saved is None else PeftConfig.from_pretrained(os.fspath(saved), **fields)
    )
    config._register_custom_module({GridLinear: LoraGridLinear})
    return config
