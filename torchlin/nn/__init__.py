"""Modules, one file a family."""

from torchlin.nn.hadamard import HadamardTransform

__all__ = ["HadamardTransform"]
