"""Whole-model quantization, and the exact transformations that prepare a model for it."""

from torchlin._when_imported import when_imported
from torchlin.quant.config import HiggsConfig
from torchlin.quant.grids import Grid, grid, grid_from_points
from torchlin.quant.quantize import dequantize_, quantize_
from torchlin.quant.report import LayerReport, QuantizationReport
from torchlin.quant.rotate import RotationReport, rotate_
from torchlin.quant.storage import StorageError, load, save


def register_with_transformers() -> None:
    """Lets `from_pretrained` of transformers read quantized models; happens by itself once both are imported.

    Raises:
        ImportError: transformers is not installed.
    """
    from torchlin.quant import transformers

    transformers.register_with_transformers()


when_imported("transformers.quantizers.auto", register_with_transformers)

__all__ = [
    "Grid",
    "HiggsConfig",
    "LayerReport",
    "QuantizationReport",
    "RotationReport",
    "StorageError",
    "dequantize_",
    "grid",
    "grid_from_points",
    "load",
    "quantize_",
    "register_with_transformers",
    "rotate_",
    "save",
]
