"""Every family's functions in one flat namespace, as `torch.nn.functional`."""

from torchlin.ops.activation import activation, gated_activation
from torchlin.ops.grid import grid_decode, grid_dequantize, grid_encode, grid_linear
from torchlin.ops.grid_codes import grid_pack, grid_unpack
from torchlin.ops.hadamard import hadamard_transform
from torchlin.ops.linearity import cross_entropy_linearity, local_linearity
from torchlin.ops.mixup import cutmix, mixup
from torchlin.ops.triplet import sample_triplet

__all__ = [
    "activation",
    "cross_entropy_linearity",
    "cutmix",
    "gated_activation",
    "grid_decode",
    "grid_dequantize",
    "grid_encode",
    "grid_linear",
    "grid_pack",
    "grid_unpack",
    "hadamard_transform",
    "local_linearity",
    "mixup",
    "sample_triplet",
]
