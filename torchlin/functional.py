"""Every family's functions in one flat namespace, as `torch.nn.functional`."""

from torchlin.ops.activation import activation, gated_activation
from torchlin.ops.hadamard import hadamard_transform

__all__ = ["activation", "gated_activation", "hadamard_transform"]
