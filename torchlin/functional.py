"""Every family's functions in one flat namespace, as `torch.nn.functional`."""

from torchlin.ops.hadamard import hadamard_transform

__all__ = ["hadamard_transform"]
