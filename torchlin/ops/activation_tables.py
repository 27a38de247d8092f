"""Activations read from a table: a row of numbers for each bin of the input, or between two anchors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlin.ops._checks import check_dim
from torchlin.ops._composed import check_parameter, implementation, scalar


@implementation()
def bin_table(x: Tensor, *, a: Any, b: Any, width: Any, channel_dim: int) -> Tensor:
    slopes, offsets = _table("a", a, x), _table("b", b, x)
    bins = slopes.shape[0]
    if offsets.shape[0] != bins:
        raise ValueError(f"a and b must be of one length, got {bins} and {offsets.shape[0]} bins")
    width, half = scalar("width", width, x), bins // 2
    inner = x.detach().clamp((0.5 - half) * width, (bins - 0.5 - half) * width)  # to the outer bins' middles
    k = inner.div_(width).floor_().add_(half).nan_to_num_(0)
    return torch.addcmul(_look_up(offsets, k, channel_dim), _look_up(slopes, k, channel_dim), x)


@implementation()
def lookup_table(
    x: Tensor, *, y: Any, lo: Any, width: Any, channel_dim: int, kernel: str = "cosine"
) -> Tensor:
    if kernel not in ("cosine", "linear"):
        raise ValueError(f"kernel must be 'cosine' or 'linear', got {kernel!r}")
    table = _table("y", y, x)
    last = table.shape[0] - 1
    if last < 1:
        raise ValueError("y must have at least 2 anchors, got 1")
    place = ((x - scalar("lo", lo, x)) / scalar("width", width, x)).clamp(0, last)
    k = place.detach().clamp(max=last - 0.5).floor_().nan_to_num_(0)
    t = place - k
    if kernel == "cosine":
        t = torch.sin(t * (math.pi / 2)).square()
    steps = table[1:] - table[:-1]
    return torch.addcmul(_look_up(table[:-1], k, channel_dim), t, _look_up(steps, k, channel_dim))


def _table(name: str, value: Any, x: Tensor) -> Tensor:
    """[bins] or [bins, channels]."""
    if not isinstance(value, Tensor):
        values: Sequence[float] = value
        return torch.tensor(values, dtype=x.dtype, device=x.device)
    check_parameter(name, value, x)
    if value.dim() not in (1, 2) or value.shape[0] == 0:
        raise ValueError(
            f"{name} is a table: it must be a tensor [length] or [length, channels], got shape {tuple(value.shape)}"
        )
    return value.to(x.dtype)


def _look_up(table: Tensor, k: Tensor, channel_dim: int) -> Tensor:
    """table[k], or table[k, channel].

    The gradient of a table sums over all that read one entry. index_select adds them in order on a CPU, and is ten
    times faster there than embedding; on a GPU it is embedding whose sums do not depend on the order of threads.
    """
    index = k.to(torch.int32)
    if table.dim() == 2 and table.shape[1] > 1:
        channel_dim = check_dim("channel_dim", channel_dim, k.dim())
        channels = table.shape[1]
        if k.shape[channel_dim] != channels:
            raise ValueError(
                f"a table has values for {channels} channels, which does not fit the {k.shape[channel_dim]} channels "
                f"(dimension {channel_dim}) of shape {tuple(k.shape)}"
            )
        shape = [channels if d == channel_dim else 1 for d in range(k.dim())]
        index.mul_(channels).add_(torch.arange(channels, device=k.device, dtype=torch.int32).view(shape))
    if table.is_cuda:
        return F.embedding(index, table.reshape(-1, 1)).squeeze(-1)
    return table.reshape(-1).index_select(0, index.reshape(-1)).view(index.shape)
