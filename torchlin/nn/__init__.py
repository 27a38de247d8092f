"""Modules, one file a family."""

from torchlin.nn.activation import Activation, GatedActivation
from torchlin.nn.activation_from import from_torch
from torchlin.nn.grid import GridBank, GridEmbedding, GridLinear
from torchlin.nn.hadamard import HadamardTransform
from torchlin.nn.linearity import LocalLinearityLoss
from torchlin.nn.mixup import (
    AdaMixUp,
    IntrusionDiscriminator,
    Mixup,
    MixupSchedule,
    intrusion_loss,
    mixup_cross_entropy,
)
from torchlin.nn.projection import (
    IdentityHead,
    ProjectionHead,
    ReweightingHead,
    SymmetricReLU,
    spectral_contrastive_loss,
    strip_heads_,
)

__all__ = [
    "Activation",
    "AdaMixUp",
    "GatedActivation",
    "GridBank",
    "GridEmbedding",
    "GridLinear",
    "HadamardTransform",
    "IdentityHead",
    "IntrusionDiscriminator",
    "LocalLinearityLoss",
    "Mixup",
    "MixupSchedule",
    "ProjectionHead",
    "ReweightingHead",
    "SymmetricReLU",
    "from_torch",
    "intrusion_loss",
    "mixup_cross_entropy",
    "spectral_contrastive_loss",
    "strip_heads_",
]
