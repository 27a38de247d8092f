"""Modules, one file a family."""

from torchlin.nn.activation import Activation, GatedActivation
from torchlin.nn.activation_from import from_torch
from torchlin.nn.grid import GridBank, GridEmbedding, GridLinear
from torchlin.nn.hadamard import HadamardTransform

__all__ = [
    "Activation",
    "GatedActivation",
    "GridBank",
    "GridEmbedding",
    "GridLinear",
    "HadamardTransform",
    "from_torch",
]
