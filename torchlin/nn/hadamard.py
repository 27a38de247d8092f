"""The Hadamard transform as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchlin import registry
from torchlin.functional import hadamard_transform
from torchlin.ops.hadamard import check_order


class HadamardTransform(nn.Module):
    r"""Orthogonal Hadamard rotation of the last dimension: :math:`y = H (s \circ x) / \sqrt{n}`.

    Args:
        n: size of the last dimension.
        block_size: rotate blocks of this many neighbours instead, H = I ⊗ H_g; must divide n.
        randomized: draw s from {-1, +1} (the randomized Hadamard transform); otherwise s is all ones.
        seed: of the random signs; the same seed gives the same signs on every machine and device.
        learnable_signs: make s a parameter, initialised as above; any real values are allowed from there on.
        inverse: apply the inverse map, :math:`x = H^T y / \sqrt{n} \oslash s`.

    Shape:
        (..., n) to (..., n); float32, float64, float16 or bfloat16, the output in the input's dtype.

    Raises:
        ValueError: n (or block_size) has no known Hadamard matrix, or the input's last dimension is not n.

    Source: randomized Hadamard rotations as in QuIP# (arXiv:2402.04396) and QuaRot (arXiv:2404.00456).

    Example:
        >>> import torch, torchlin
        >>> rotate = torchlin.nn.HadamardTransform(576, randomized=True, seed=1)
        >>> back = torchlin.nn.HadamardTransform(576, randomized=True, seed=1, inverse=True)
        >>> x = torch.randn(8, 576)
        >>> torch.allclose(back(rotate(x)), x, atol=1e-5)
        True
    """

    signs: Tensor | None

    def __init__(
        self,
        n: int,
        *,
        block_size: int | None = None,
        randomized: bool = False,
        seed: int = 0,
        learnable_signs: bool = False,
        inverse: bool = False,
    ) -> None:
        super().__init__()
        check_order(n, block_size)
        self.n, self.block_size = n, block_size
        self.randomized, self.seed, self.inverse = randomized, seed, inverse
        signs = None
        if randomized:
            generator = torch.Generator().manual_seed(seed)
            signs = torch.randint(0, 2, (n,), generator=generator, device="cpu").mul_(2).sub_(1).float()
        if learnable_signs:
            self.signs = nn.Parameter(torch.ones(n) if signs is None else signs)
        else:
            self.register_buffer("signs", signs)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.n:
            raise ValueError(f"x must have last dimension n = {self.n}, got shape {tuple(x.shape)}")
        signs = self.signs
        if self.inverse and isinstance(signs, nn.Parameter):
            signs = signs.reciprocal()  # learnt signs need not be their own inverses
        return hadamard_transform(x, block_size=self.block_size, signs=signs, transpose=self.inverse)

    def extra_repr(self) -> str:
        words = [f"n={self.n}"]
        if self.block_size is not None:
            words.append(f"block_size={self.block_size}")
        if self.randomized:
            words.append(f"randomized=True, seed={self.seed}")
        if isinstance(self.signs, nn.Parameter):
            words.append("learnable_signs=True")
        if self.inverse:
            words.append("inverse=True")
        return ", ".join(words)


def register() -> None:
    """Plug-in entry point of this family."""
    registry.register("transform", "hadamard", HadamardTransform, aliases=("walsh_hadamard",))
