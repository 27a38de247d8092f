"""Whole-model quantization, and the exact transformations that prepare a model for it."""

import importlib

from torchlin._when_imported import when_imported
from torchlin.quant.allocate import BitPlan, allocate_bits
from torchlin.quant.alphas import Alphas, LayerAlpha, estimate_alphas
from torchlin.quant.config import HiggsConfig
from torchlin.quant.grids import Grid, grid, grid_from_points
from torchlin.quant.predict import Measured, measure_deltas, plot_prediction, predicted_delta
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


# The module registers itself at its end: where its own import is what imports transformers, it is not there yet.
when_imported("transformers.quantizers.auto", lambda: importlib.import_module("torchlin.quant.transformers"))

__all__ = [
    "Alphas",
    "BitPlan",
    "Grid",
    "HiggsConfig",
    "LayerAlpha",
    "LayerReport",
    "Measured",
    "QuantizationReport",
    "RotationReport",
    "StorageError",
    "allocate_bits",
    "dequantize_",
    "estimate_alphas",
    "grid",
    "grid_from_points",
    "load",
    "measure_deltas",
    "plot_prediction",
    "predicted_delta",
    "quantize_",
    "register_with_transformers",
    "rotate_",
    "save",
]
