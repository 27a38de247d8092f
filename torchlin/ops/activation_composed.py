"""Activations that no formula over elements says: of a mean, of a group of features, of complex numbers, and more.

IMPLEMENTATIONS has all that the catalogue's `implementation` lines name: those of this file, and of
activation_simplex.py, activation_normalized.py and activation_tables.py. Compositions of torch's operators, without
state; weights come as arguments, as in torch.nn.functional.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchlin.ops import activation_normalized, activation_simplex, activation_tables  # noqa: F401
from torchlin.ops._checks import check_dim
from torchlin.ops._composed import IMPLEMENTATIONS, implementation, largest, per_channel, scalar, whole
from torchlin.ops.activation_normalized import BatchNorm

__all__ = ["IMPLEMENTATIONS", "BatchNorm"]


# ------------------------------------------------------------------------------------------------------ of statistics


def _dims(name: str, dims: Any, x: Tensor) -> list[int]:
    """Dimensions to reduce; None is all."""
    if dims is None:
        return list(range(x.dim()))
    return sorted(
        {check_dim(name, d, x.dim()) for d in (dims if isinstance(dims, (tuple, list)) else (dims,))}
    )


def _offset_relu(x: Tensor, mean: Tensor, b: Any, c: Any) -> Tensor:
    return torch.relu(x - b * mean) + c * mean


@implementation()
def mean_shifted(x: Tensor, *, dim: int | Sequence[int] | None = None) -> Tensor:
    return torch.relu(x - _mean(x, _dims("dim", dim, x)))


@implementation()
def offset(x: Tensor, *, b: Any, c: Any, dim: int | Sequence[int] | None = None) -> Tensor:
    return _offset_relu(x, _mean(x, _dims("dim", dim, x)), scalar("b", b, x), scalar("c", c, x))


@implementation()
def channel_offset(x: Tensor, *, b: Any, c: Any, channel_dim: int) -> Tensor:
    channel_dim = check_dim("channel_dim", channel_dim, x.dim())
    mean = _mean(x, [d for d in range(x.dim()) if d != channel_dim])
    return _offset_relu(x, mean, per_channel("b", b, x, channel_dim), per_channel("c", c, x, channel_dim))


def _mean(x: Tensor, dims: list[int]) -> Tensor:
    return x.mean(dims, keepdim=True) if dims else x


@implementation()
def dynamic_threshold(x: Tensor, *, dim: int | Sequence[int] | None = None) -> Tensor:
    dims = _dims("dim", dim, x)
    if not x.numel() or not dims:
        return x.clone()
    return torch.maximum(x, x.amax(dims, keepdim=True) / 2 + x.amin(dims, keepdim=True) / 2)


@implementation(along=True)
def volatility(x: Tensor, *, dim: int) -> Tensor:
    if not x.numel():
        return x.narrow(dim, 0, 1)
    scale = largest(x, dim, torch.finfo(x.dtype).tiny)
    return torch.std(x / scale, dim, correction=0, keepdim=True) * scale


@implementation(along=True)
def squash(x: Tensor, *, dim: int) -> Tensor:
    scale = largest(x, dim, torch.finfo(x.dtype).tiny)
    norm = torch.linalg.vector_norm(x / scale, dim=dim, keepdim=True) * scale
    long = norm > 1
    short = norm.masked_fill(long, 0)
    outer = norm.masked_fill(~long, 1)
    return x * torch.where(long, 1 / (outer + 1 / outer), short / (1 + short.square()))


# ------------------------------------------------------------------------------------------------------ of groups of features


def _groups(x: Tensor, dim: int | None, channel_dim: int, name: str, size: Any) -> tuple[int, Tensor]:
    """x with the features, along dim or else along channel_dim, in groups of neighbours: (..., groups, size, ...)."""
    dim = check_dim("channel_dim", channel_dim, x.dim()) if dim is None else check_dim("dim", dim, x.dim())
    size = whole(name, size)
    if x.shape[dim] % size:
        raise ValueError(f"{name} must divide the {x.shape[dim]} features (dimension {dim} of x), got {size}")
    return dim, x.unflatten(dim, (x.shape[dim] // size, size))


@implementation(widen=False)
def maxout(x: Tensor, *, k: Any, channel_dim: int, dim: int | None = None) -> Tensor:
    dim, groups = _groups(x, dim, channel_dim, "k", k)
    return groups.max(dim + 1).values  # a gradient to one of equal elements, as in max pooling


@implementation(widen=False)
def groupsort(
    x: Tensor, *, g: Any, channel_dim: int, dim: int | None = None, descending: bool = False
) -> Tensor:
    return _sorted_in_groups(*_groups(x, dim, channel_dim, "g", g), descending)


@implementation(widen=False)
def oplu(x: Tensor, *, channel_dim: int, dim: int | None = None) -> Tensor:
    return _sorted_in_groups(*_groups(x, dim, channel_dim, "2, the size of a pair,", 2), True)


def _sorted_in_groups(dim: int, groups: Tensor, descending: bool) -> Tensor:
    if groups.shape[dim + 1] != 2:
        return groups.sort(dim + 1, descending=descending).values.flatten(dim, dim + 1)
    # A pair needs no sort. Not minimum and maximum: at a tie they share the gradient, and the map would not keep norms.
    first, second = groups.unbind(dim + 1)
    swap = second > first if descending else first > second
    pair = (torch.where(swap, second, first), torch.where(swap, first, second))
    return torch.stack(pair, dim + 1).flatten(dim, dim + 1)


@implementation(widen=False)
def lwta(x: Tensor, *, group: Any, channel_dim: int, dim: int | None = None) -> Tensor:
    dim, groups = _groups(x, dim, channel_dim, "group", group)
    best = groups.detach().amax(dim + 1, keepdim=True)
    return groups.masked_fill(groups.detach() < best, 0).flatten(dim, dim + 1)


@implementation(widen=False)
def kwta(x: Tensor, *, k: Any, dim: int | None = None) -> Tensor:
    if dim is None:  # the features of a sample are all that is not the batch
        rows = x.flatten(1) if x.dim() > 1 else x
        return _keep_largest(rows, k, rows.dim() - 1).view(x.shape)
    return _keep_largest(x, k, check_dim("dim", dim, x.dim()))


def _keep_largest(x: Tensor, share: float, dim: int) -> Tensor:
    if not x.numel():
        return x.clone()
    count = max(1, int(share * x.shape[dim] * (1 + 1e-12)))  # 0.2 of 5 is one, in floating point too
    least = x.detach().topk(count, dim).values.narrow(dim, count - 1, 1)
    return x.masked_fill(x.detach() < least, 0)


# ------------------------------------------------------------------------------------------------------ two for one


def _feature_dim(x: Tensor, dim: int | None, channel_dim: int) -> int:
    return check_dim("channel_dim", channel_dim, x.dim()) if dim is None else check_dim("dim", dim, x.dim())


@implementation(widen=False)
def crelu(x: Tensor, *, channel_dim: int, dim: int | None = None) -> Tensor:
    return torch.cat((torch.relu(x), torch.relu(-x)), _feature_dim(x, dim, channel_dim))


@implementation(widen=False)
def ncrelu(x: Tensor, *, channel_dim: int, dim: int | None = None) -> Tensor:
    return torch.cat((torch.relu(x), -torch.relu(-x)), _feature_dim(x, dim, channel_dim))


@implementation()
def paired_relu(
    x: Tensor, *, a: Any, b: Any, c: Any, d: Any, channel_dim: int, dim: int | None = None
) -> Tensor:
    at = _feature_dim(x, dim, channel_dim)
    a, b, c, d = (per_channel(n, v, x, at) for n, v in (("a", a), ("b", b), ("c", c), ("d", d)))
    return torch.cat((torch.relu(a * x - b), torch.relu(c * x - d)), at)


@implementation(widen=False)
def bipolar(x: Tensor, *, channel_dim: int, dim: int | None = None) -> Tensor:
    at = _feature_dim(x, dim, channel_dim)
    shape = [-1 if d == at else 1 for d in range(x.dim())]
    odd = (torch.arange(x.shape[at], device=x.device) % 2 == 1).view(shape)
    return torch.where(odd, -torch.relu(-x), torch.relu(x))


# ------------------------------------------------------------------------------------------------------ of complex numbers


@implementation(complex_=True)
def modrelu(z: Tensor, *, b: Any, channel_dim: int) -> Tensor:
    return torch.relu(z.abs() + per_channel("b", b, z, channel_dim)) * torch.sgn(z)


@implementation(widen=False, complex_=True)
def zrelu(z: Tensor) -> Tensor:
    return z.masked_fill((z.real < 0) | (z.imag < 0), 0)


@implementation(complex_=True)
def cardioid(z: Tensor) -> Tensor:
    return (z + z.real * torch.sgn(z)) / 2  # cos(arg z) = Re z/|z|


@implementation(widen=False, complex_=True)
def split_complex(z: Tensor) -> Tensor:
    return torch.view_as_complex(torch.relu(torch.view_as_real(z)))
