"""All that a plug-in is: a module that registers what it brings. See docs/plugins.md."""

from __future__ import annotations

import torch
from torch import Tensor

import torchlin


class Reverse(torch.nn.Module):
    """Reverses the last dimension."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1) * self.scale


def register() -> None:
    torchlin.register("transform", "reverse", Reverse, aliases=("flip",))
