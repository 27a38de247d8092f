"""Whole-model quantization, and the exact transformations that prepare a model for it."""

from torchlin.quant.rotate import RotationReport, rotate_

__all__ = ["RotationReport", "rotate_"]
