"""Stand-ins for other packages: the same names and arguments, computed by torchlin."""

from torchlin.compat import fast_hadamard_transform, timm, transformers

__all__ = ["fast_hadamard_transform", "timm", "transformers"]
