"""Whole-model quantization, and the exact transformations that prepare a model for it."""

from torchlin.quant.config import HiggsConfig
from torchlin.quant.quantize import dequantize_, quantize_
from torchlin.quant.report import LayerReport, QuantizationReport
from torchlin.quant.rotate import RotationReport, rotate_

__all__ = [
    "HiggsConfig",
    "LayerReport",
    "QuantizationReport",
    "RotationReport",
    "dequantize_",
    "quantize_",
    "rotate_",
]
