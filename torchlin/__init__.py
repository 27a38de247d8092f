"""torchlin: linearity and non-linearity in neural networks, as fast PyTorch ops, modules and names."""

from torchlin import compat, functional, nn, quant, robust
from torchlin.ops.activation_formula import activation_from_formula
from torchlin.ops.hadamard_matrix import hadamard_matrix
from torchlin.registry import create, describe, names, register
from torchlin.swap import swap_

__version__ = "0.1.0"

__all__ = [
    "activation_from_formula",
    "compat",
    "create",
    "describe",
    "functional",
    "hadamard_matrix",
    "names",
    "nn",
    "quant",
    "register",
    "robust",
    "swap_",
]
