"""Projection heads, which are trained with an encoder and then taken off, and the loss that explains them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchlin import registry
from torchlin.functional import activation
from torchlin.ops._checks import check_float_tensor, compute_dtype

NORMS: dict[str, Callable[[int], nn.Module]] = {"batch_norm": nn.BatchNorm1d, "layer_norm": nn.LayerNorm}


def _check_size(name: str, size: object) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name} must be a positive int, got {size!r}")
    return size


def _check_features(x: object, dim: int) -> None:
    check_float_tensor("x", x)
    assert isinstance(x, Tensor)
    if x.dim() == 0 or x.shape[-1] != dim:
        raise ValueError(f"x must have last dimension {dim}, got shape {tuple(x.shape)}")


class ProjectionHead(nn.Module):
    """The MLP between an encoder and a contrastive loss: Linear, norm, activation, ..., Linear.

    Args:
        input_dim, hidden_dim, output_dim: widths, in the order of lightly's heads.
        num_layers: how many Linears; 1 is a linear head without norm and activation.
        norm: after each Linear but the last: "batch_norm", "layer_norm", a function from a width to a module, or None.
        act: what follows the norm, as in `torchlin.create("activation", act)`; None: a linear head of several layers.
        last_norm: the norm after the last Linear too, as in SimCLR's.
        bias: of the Linears that no norm follows (a norm would subtract it again).
        device, dtype: of the parameters.

    Shape:
        (..., input_dim) to (..., output_dim). Batch normalization takes all leading dimensions for one batch.
        With `use_head=False` the input is returned: what is before the head is what one keeps.

    Raises:
        ValueError: a width or num_layers is no positive int, norm is no known name, or the input has another width.

    Source: Chen et al., arXiv:2002.05709, section 4.2; why it helps: Xue et al., arXiv:2403.11391.

    Example:
        >>> import torch, torchlin
        >>> head = torchlin.nn.ProjectionHead(512, 512, 128)
        >>> h = torch.randn(32, 512)
        >>> head(h).shape, head(h, use_head=False) is h
        (torch.Size([32, 128]), True)
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        output_dim: int,
        num_layers: int = 2,
        norm: str | Callable[[int], nn.Module] | None = "batch_norm",
        act: Any = "relu",
        *,
        last_norm: bool = False,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_dim = _check_size("input_dim", input_dim)
        self.output_dim = _check_size("output_dim", output_dim)
        inner = [_check_size("hidden_dim", hidden_dim)] * (_check_size("num_layers", num_layers) - 1)
        if isinstance(norm, str) and norm not in NORMS:
            raise ValueError(f"norm must be {', '.join(map(repr, NORMS))}, a function or None, got {norm!r}")
        make_norm = NORMS[norm] if isinstance(norm, str) else norm
        widths = [input_dim, *inner, output_dim]
        layers: list[nn.Module] = []
        for i in range(num_layers):
            is_last = i == num_layers - 1
            normed = make_norm is not None and (last_norm or not is_last)
            layers.append(nn.Linear(widths[i], widths[i + 1], bias=bias and not normed))
            if normed:
                assert make_norm is not None
                layers.append(make_norm(widths[i + 1]))
            if not is_last and (function := registry.create("activation", act)) is not None:
                layers.append(function)
        self.layers = nn.Sequential(*layers).to(device=device, dtype=dtype)

    def forward(self, x: Tensor, use_head: bool = True) -> Tensor:
        if not use_head:
            return x
        _check_features(x, self.input_dim)
        return self.layers(x.reshape(-1, self.input_dim)).reshape(*x.shape[:-1], self.output_dim)


class ReweightingHead(nn.Module):
    r"""A head that learns nothing: feature i is multiplied by :math:`\kappa^{-i}`, i = 0, 1, ..., dim - 1.

    It asks of the encoder what a trained head would: features that the loss wants strong can be so with little weight
    before it. What a trained head makes of layers and training, it makes of one number.

    Args:
        dim: width of the encoder's output.
        kappa: at least 1; 1 changes nothing. A little above 1 for thousands of features: of 2048, kappa = 1.1 leaves
            the last ones next to nothing.
        device, dtype: of the buffer `weight`.

    The weights are computed as exp(-i ln κ) in float64 and rounded once. In float32 they are subnormal from
    i > 87.3 / ln κ, and zero from i > 104 / ln κ: those features get no gradient. If there are any, a warning says
    from where on.

    Shape:
        (..., dim) to the same, in the input's dtype (products are float32 at least). `use_head=False` returns the input.

    Raises:
        ValueError: dim is no positive int, kappa is less than 1 or not finite, or the input has another width.

    Source: Xue et al., "Investigating the Benefits of Projection Head for Representation Learning",
    arXiv:2403.11391, the fixed reweighting head.

    Example:
        >>> import torch, torchlin
        >>> torchlin.nn.ReweightingHead(4, kappa=2.0)(torch.ones(4))
        tensor([1.0000, 0.5000, 0.2500, 0.1250])
    """

    weight: Tensor

    def __init__(
        self,
        dim: int,
        kappa: float,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = _check_size("dim", dim)
        if isinstance(kappa, bool) or not isinstance(kappa, (int, float)) or not 1 <= kappa < math.inf:
            raise ValueError(f"kappa must be a finite number of at least 1, got {kappa!r}")
        self.kappa = float(kappa)
        exponents = torch.arange(dim, dtype=torch.float64, device="cpu") * -math.log(self.kappa)
        weight = exponents.exp().to(dtype=dtype or torch.get_default_dtype())
        if zeros := int((weight == 0).sum()):
            warnings.warn(
                f"kappa = {self.kappa:g} is so large that features from {dim - zeros} to {dim - 1} have weight 0 in "
                f"{weight.dtype}: they get no gradient through this head",
                RuntimeWarning,
                stacklevel=2,
            )
        self.register_buffer("weight", weight.to(device=device))

    def forward(self, x: Tensor, use_head: bool = True) -> Tensor:
        if not use_head:
            return x
        _check_features(x, self.dim)
        return (x.to(compute_dtype(x.dtype)) * self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, kappa={self.kappa:g}"


class SymmetricReLU(nn.Module):
    """Soft threshold with a learnt threshold: relu(x - b) - relu(-x - b), b a number.

    For b >= 0 it is the catalogue's `softshrink`, whose kernel computes it; from b = 0, where it is the identity, a
    step of the optimizer may lead to b < 0, where it stays continuous: x + |b| sign(x) outside of [-|b|, |b|], 2x inside.

    Args:
        b: the initial threshold.
        device, dtype: of the parameter.

    Shape:
        Any, to the same; float32, float64, float16 or bfloat16, the output in the input's dtype.

    Source: Xue et al., arXiv:2403.11391 (the non-linearity of its identity-initialised head).

    Example:
        >>> import torch, torchlin
        >>> torchlin.nn.SymmetricReLU(b=1.0)(torch.tensor([-3.0, 0.5, 2.0]))
        tensor([-2.,  0.,  1.], grad_fn=<WhereBackward0>)
    """

    def __init__(
        self,
        b: float = 0.0,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(b, bool) or not isinstance(b, (int, float)) or not math.isfinite(b):
            raise ValueError(f"b must be a finite number, got {b!r}")
        self.b = nn.Parameter(torch.tensor(float(b), device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        is_threshold = (
            self.b >= 0
        )  # its derivative at 0 is that from the right: with |b|, 0 would never be left
        shrunk = activation(x, "softshrink", l=torch.where(is_threshold, self.b, -self.b))
        return torch.where(is_threshold, shrunk, 2 * x - shrunk)

    def extra_repr(self) -> str:
        return f"b={float(self.b.detach()):g}"


class IdentityHead(nn.Module):
    """A head that starts as the identity: Linear(I), a soft threshold of 0, Linear(I).

    Args:
        dim: width of input and output.
        bias: of both Linears, from 0.
        device, dtype: of the parameters.

    Shape:
        (..., dim) to the same. `use_head=False` returns the input.

    Raises:
        ValueError: dim is no positive int, or the input has another width.

    Source: Xue et al., arXiv:2403.11391.

    Example:
        >>> import torch, torchlin
        >>> h = torch.randn(8, 64)
        >>> torch.equal(torchlin.nn.IdentityHead(64)(h), h)
        True
    """

    def __init__(
        self,
        dim: int,
        *,
        bias: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = _check_size("dim", dim)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.first = nn.Linear(dim, dim, bias=bias, **where)
        self.act = SymmetricReLU(**where)
        self.last = nn.Linear(dim, dim, bias=bias, **where)
        for layer in (self.first, self.last):
            nn.init.eye_(layer.weight)
            if bias:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, use_head: bool = True) -> Tensor:
        if not use_head:
            return x
        _check_features(x, self.dim)
        return self.last(self.act(self.first(x)))


HEADS = (ProjectionHead, ReweightingHead, IdentityHead)


def strip_heads_(model: nn.Module) -> dict[str, nn.Module]:
    """Takes the projection heads out of a model, in place: each becomes an `nn.Identity`.

    Returns:
        {name: head}, by which `torchlin.swap_(model, heads)` puts them back.

    Raises:
        ValueError: the model has no head, or is one itself.

    Example:
        >>> import torch, torchlin
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torchlin.nn.ReweightingHead(8, kappa=1.5))
        >>> heads = torchlin.nn.strip_heads_(model)
        >>> model[1], heads
        (Identity(), {'1': ReweightingHead(dim=8, kappa=1.5)})
    """
    from torchlin.swap import swap_

    if isinstance(model, HEADS):
        raise ValueError(f"model is a {type(model).__name__} itself; there is nothing to take it out of")
    found = {type(module) for module in model.modules() if isinstance(module, HEADS)}
    if not found:
        raise ValueError(f"model has none of {', '.join(head.__name__ for head in HEADS)}")
    return swap_(model, dict.fromkeys(found, nn.Identity))


def spectral_contrastive_loss(z1: Tensor, z2: Tensor) -> Tensor:
    r"""Spectral contrastive loss of two views: :math:`-2 E[z^T z^+] + E[(z^T z^-)^2]`.

    The second mean is over the B (B - 1) pairs (z1_i, z2_j) with i ≠ j, so that the expectation over batches is the
    population's loss. Up to a constant that is the squared error of a low-rank factorisation,
    :math:`\|\bar A - F F^T\|_F^2`, with the normalised similarities
    :math:`\bar A_{xy} = p(x, y) / \sqrt{p(x) p(y)}` and the rows :math:`F_x = \sqrt{p(x)}\, z(x)`.

    Args:
        z1, z2: (B, D), B >= 2; row i of both are views of the same sample. Not normalised: the scale is part of the
            solution. float16 and bfloat16 are computed in float32.

    Returns:
        A scalar in float32 (float64 for float64). For D < B no (B, B) matrix is made.

    Raises:
        TypeError: an argument is no floating tensor, or the two dtypes differ.
        ValueError: a shape that is not (B, D), two different shapes, or fewer than two samples.

    Source: HaoChen, Wei, Gaidon and Ma, arXiv:2106.04156.

    Example:
        >>> z = torch.eye(2)
        >>> spectral_contrastive_loss(z, z)
        tensor(-2.)
    """
    for name, z in (("z1", z1), ("z2", z2)):
        check_float_tensor(name, z)
        if z.dim() != 2:
            raise ValueError(f"{name} must have shape (B, D), got {tuple(z.shape)}")
    if z1.dtype is not z2.dtype:
        raise TypeError(f"z2 must have z1's dtype {z1.dtype}, got {z2.dtype}")
    if z1.shape != z2.shape:
        raise ValueError(f"z2 must have z1's shape {tuple(z1.shape)}, got {tuple(z2.shape)}")
    samples, width = z1.shape
    if samples < 2:
        raise ValueError(f"z1 must have at least two samples: the others are the negatives, got {samples}")
    z1, z2 = z1.to(compute_dtype(z1.dtype)), z2.to(compute_dtype(z2.dtype))
    positive = (z1 * z2).sum(1)  # (B,)
    # The sum of (z1_i . z2_j)^2 over all i and j, of (D, D) matrices where these are the smaller ones.
    is_narrow = width < samples
    squares = ((z1.T @ z1) * (z2.T @ z2)).sum() if is_narrow else (z1 @ z2.T).square().sum()
    negative = (squares - positive.square().sum()) / (samples * (samples - 1))
    return negative - 2 * positive.mean()
