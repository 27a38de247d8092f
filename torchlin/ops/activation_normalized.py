"""Activations with weights of their own: convolutions, small networks, normalisation. The modules own the weights."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlin.ops._checks import check_dim
from torchlin.ops._composed import (
    channel_shape,
    check_parameter,
    implementation,
    largest,
    per_channel,
    scalar,
    whole,
)


class BatchNorm(NamedTuple):
    """The tensors [channels] and numbers of a batch normalisation, as torch.nn.functional.batch_norm takes them."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    momentum: float = 0.1
    eps: float = 1e-5

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        own = training or self.running_mean is None
        weight, bias = _cast(x, self.weight), _cast(x, self.bias)
        return F.batch_norm(
            x, self.running_mean, self.running_var, weight, bias, own, self.momentum, self.eps
        )


Norm = Callable[[Tensor, bool], Tensor]  # BatchNorm, or what else normalises x in training or evaluation


def _cast(x: Tensor, value: Tensor | None) -> Tensor | None:
    return None if value is None else value.to(x.dtype)


# ------------------------------------------------------------------------------------------------------ convolutions


@implementation(sizes=("kernel",))
def funnel(
    x: Tensor, *, training: bool, weight: Tensor, bias: Tensor | None = None, norm: Norm | None = None
) -> Tensor:
    context = _depthwise(x, weight, bias)
    return torch.maximum(x, context if norm is None else norm(context, training))


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_parameter("weight", weight, x)
    dims = weight.dim() - 2
    if dims not in (1, 2, 3) or x.dim() != weight.dim():
        raise ValueError(
            f"weight must be [channels, 1, *window] for an x [batch, channels, *places] with 1 to 3 dimensions of "
            f"places, got {tuple(weight.shape)} and {tuple(x.shape)}"
        )
    if weight.shape[:2] != (x.shape[1], 1):
        raise ValueError(
            f"weight must be [{x.shape[1]}, 1, *window], a window for each channel, got {tuple(weight.shape)}"
        )
    if any(size % 2 == 0 for size in weight.shape[2:]):
        raise ValueError(f"weight: the window must be odd, got {tuple(weight.shape[2:])}")
    convolution = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    padding = [size // 2 for size in weight.shape[2:]]
    return convolution(x, weight.to(x.dtype), _cast(x, bias), padding=padding, groups=x.shape[1])


# ------------------------------------------------------------------------------------------------------ small networks


@implementation(sizes=("k",))
def dynamic_relu(
    x: Tensor,
    *,
    channel_dim: int,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    shared: bool = False,
    lambda_a: float = 1.0,
    lambda_b: float = 0.5,
) -> Tensor:
    channel_dim, channels = _feature_dim(x, channel_dim)
    rows, each = fc2_weight.shape[0], 2 if shared else 2 * channels
    pieces = operator.index(rows // each)  # a traced graph is specialised on it
    if rows != pieces * each or not pieces:
        raise ValueError(
            f"fc2_weight must have 2·k{'' if shared else '·channels'} rows, {channels} channels, got {rows}"
        )
    pooled = _pooled(x, channel_dim)
    hidden = torch.relu(_linear("fc1", pooled, fc1_weight, fc1_bias))
    # The paper's 2 sigmoid(h) - 1, in one function.
    theta = torch.tanh(_linear("fc2", hidden, fc2_weight, fc2_bias) / 2).unflatten(1, (-1, 2 * pieces))
    shape = [1] * x.dim()
    shape[0], shape[channel_dim] = x.shape[0], theta.shape[1]
    lines = []
    for k in range(pieces):
        slope = lambda_a * theta[..., k] + (1 if k == 0 else 0)
        offset = lambda_b * theta[..., pieces + k]
        lines.append(slope.reshape(shape) * x + offset.reshape(shape))
    y = lines[0]
    for line in lines[1:]:
        y = torch.maximum(y, line)
    return y


@implementation(sizes=("r",))
def meta_acon(
    x: Tensor,
    *,
    training: bool,
    channel_dim: int,
    p1: Tensor,
    p2: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    norm1: Norm | None = None,
    norm2: Norm | None = None,
) -> Tensor:
    channel_dim, channels = _feature_dim(x, channel_dim)
    h = _linear("fc1", _pooled(x, channel_dim), fc1_weight, fc1_bias)
    h = _linear("fc2", h if norm1 is None else norm1(h, training), fc2_weight, fc2_bias)
    shape = [1] * x.dim()
    shape[0], shape[channel_dim] = x.shape[0], channels
    beta = torch.sigmoid(h if norm2 is None else norm2(h, training)).reshape(shape)
    first, second = per_channel("p1", p1, x, channel_dim), per_channel("p2", p2, x, channel_dim)
    u = (first - second) * x
    return u * torch.sigmoid(beta * u) + second * x


def _feature_dim(x: Tensor, channel_dim: int) -> tuple[int, int]:
    channel_dim = check_dim("channel_dim", channel_dim, x.dim())
    if channel_dim == 0:
        raise ValueError("channel_dim must not be 0, the dimension of the batch")
    return channel_dim, x.shape[channel_dim]


def _pooled(x: Tensor, channel_dim: int) -> Tensor:
    """The mean of each channel of each sample, [batch, channels]."""
    places = [d for d in range(1, x.dim()) if d != channel_dim]
    return x.mean(places) if places else x


def _linear(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_parameter(f"{name}_weight", weight, x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"{name}_weight must be [outputs, {x.shape[1]}], got {tuple(weight.shape)}")
    return F.linear(x, weight.to(x.dtype), _cast(x, bias))


# ------------------------------------------------------------------------------------------------------ normalisation


@implementation()
def evonorm_s0(
    x: Tensor,
    *,
    groups: Any,
    channel_dim: int,
    v: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    channel_dim, channels = _feature_dim(x, channel_dim)
    groups = whole("groups", groups)
    if channels % groups:
        raise ValueError(
            f"groups must divide the {channels} channels (dimension {channel_dim}), got {groups}"
        )
    grouped = x.movedim(channel_dim, 1).unflatten(1, (groups, channels // groups))  # (N, G, C/G, ...)
    inner = tuple(range(2, grouped.dim()))
    var = (grouped - grouped.mean(inner, keepdim=True)).square().mean(inner, keepdim=True)
    inverse = (var + eps).rsqrt().expand_as(grouped).flatten(1, 2).movedim(1, channel_dim)
    gate = torch.sigmoid(x if v is None else per_channel("v", v, x, channel_dim) * x)
    return _affine(x * gate * inverse, weight, bias, channel_dim)


@implementation()
def frn_tlu(
    x: Tensor,
    *,
    eps: Any,
    channel_dim: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    tau: Tensor | None = None,
) -> Tensor:
    channel_dim, _ = _feature_dim(x, channel_dim)
    eps = per_channel("eps", eps, x, channel_dim)
    square = x.square()
    if places := [d for d in range(1, x.dim()) if d != channel_dim]:
        square = square.mean(places, keepdim=True)
    y = _affine(x * (square + abs(eps)).rsqrt(), weight, bias, channel_dim)
    return torch.relu(y) if tau is None else torch.maximum(y, per_channel("tau", tau, x, channel_dim))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, channel_dim: int) -> Tensor:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_parameter(name, value, x)
            shaped = value.to(x.dtype).view(channel_shape(name, value, x, channel_dim))
            x = x * shaped if name == "weight" else x + shaped
    return x


@implementation(along=True)
def polynorm(x: Tensor, *, a: Any, b: Any, eps: Any, dim: int) -> Tensor:
    if isinstance(a, Tensor):
        check_parameter("a", a, x)
        if a.dim() != 1:
            raise ValueError(f"a must be a coefficient vector [length], got shape {tuple(a.shape)}")
    coefficients = a.to(x.dtype).unbind() if isinstance(a, Tensor) else a
    scale = largest(x, dim, 1.0)  # powers of x / scale do not overflow; only eps knows of the scale
    t, y, power, room = x / scale, None, torch.ones_like(x), eps
    for coefficient in coefficients:
        power, room = power * t, room / scale / scale
        term = coefficient * power * (power.square().mean(dim, keepdim=True) + room).rsqrt()
        y = term if y is None else y + term
    assert y is not None
    return y + scalar("b", b, x)
