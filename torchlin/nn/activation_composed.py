"""Modules of the activations that no formula over elements says; those with weights own them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchlin import catalogue
from torchlin.functional import activation
from torchlin.nn.activation import Activation, Value
from torchlin.ops._composed import options, whole


def _default(name: str, parameter: str) -> float:
    value = catalogue.find(name).parameters[parameter].default
    assert isinstance(value, float)
    return value


def _size(name: str, parameter: str) -> int:
    return int(_default(name, parameter))


class ComposedActivation(Activation):
    """An activation without weights whose value at one place depends on others: softmax, maxout, GroupSort, ...

    Args:
        name: a name or alias; `MODULES` has all.
        learnable, num_parameters, channel_dim, generator, device, dtype: as in :class:`torchlin.nn.Activation`.
        parameters: initial values of its parameters by the catalogue's names, and its options: `dim` of the softmax
            family (-1) or of groups of features (None: channel_dim), `hard` of gumbel_softmax, `descending` of
            groupsort, `mean` of gp_softmax, `kernel` of lutu.

    Shape:
        As torchlin.functional.activation has it: of x, but k features become one in maxout, one two in CReLU.

    Raises:
        ValueError, TypeError: as :class:`torchlin.nn.Activation`; an option that the name does not have.

    Source: `torchlin show <name>` gives definition and source of each.

    Example:
        >>> import torch, torchlin
        >>> torchlin.create("activation", "maxout", k=2)(torch.tensor([[1.0, 3.0, 2.0, -1.0]]))
        tensor([[3., 2.]])
        >>> torchlin.create("activation", "entmax15", dim=1)
        ComposedActivation('entmax15', dim=1)
    """

    def __init__(
        self,
        name: str,
        *,
        learnable: bool | Collection[str] | None = None,
        num_parameters: int = 1,
        channel_dim: int = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **parameters: Any,
    ) -> None:
        own = options(name)
        chosen = {key: parameters.pop(key) for key in list(parameters) if key in own}
        super().__init__(
            name,
            learnable=learnable,
            num_parameters=num_parameters,
            channel_dim=channel_dim,
            generator=generator,
            device=device,
            dtype=dtype,
            **parameters,
        )
        self.options = chosen

    def _parameters_now(self) -> dict[str, Any]:
        return super()._parameters_now() | self.options

    def _more_repr(self) -> list[str]:
        return [f"{key}={value!r}" for key, value in self.options.items()]


class SoLU(nn.Module):
    """x·softmax(x), and with `normalized_shape` the layer norm that the paper puts after it.

    Args:
        dim: of the softmax.
        normalized_shape: of the torch.nn.LayerNorm that follows; None for none.
        eps: of the layer norm.

    Shape:
        Any, to the same; the output in the input's dtype.

    Source: Elhage et al., "Softmax linear units", 2022.

    Example:
        >>> import torch, torchlin
        >>> torchlin.create("activation", "solu", normalized_shape=64)(torch.randn(8, 64)).std() > 0.9
        tensor(True)
    """

    def __init__(
        self,
        *,
        dim: int = -1,
        normalized_shape: int | Sequence[int] | None = None,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.norm = None
        if normalized_shape is not None:
            shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
            self.norm = nn.LayerNorm(shape, eps=eps, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        y = activation(x, "solu", dim=self.dim)
        return y if self.norm is None else self.norm(y)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


# ------------------------------------------------------------------------------------------------------ funnels

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FunnelReLU(nn.Module):
    """max(x, T(x)) with T a window on each channel and a batch normalisation: FReLU.

    Args:
        channels: of the input.
        kernel: odd size of the window.
        dims: 1, 2 or 3 dimensions of places.
        norm: whether T is normalised; without it this is SCAA.
        bias: of the convolution.

    Shape:
        (N, channels, *places) to the same.

    Raises:
        ValueError: a kernel that is not odd, dims that are not 1, 2 or 3; on a call an x of other channels.

    Source: Ma, Zhang and Sun, "Funnel activation for visual recognition", arXiv:2007.11824. Weights as in the authors'
    networks: normal, of variance 2/kernel^dims.

    Example:
        >>> import torch, torchlin
        >>> relu = torchlin.create("activation", "funnel_relu", channels=16)
        >>> x = torch.randn(2, 16, 8, 8)
        >>> bool((relu(x) >= x).all())
        True
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel: int = _size("funnel_relu", "kernel"),
        dims: int = 2,
        norm: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if whole("kernel", kernel) % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        if dims not in (1, 2, 3):
            raise ValueError(f"dims must be 1, 2 or 3, got {dims!r}")
        self.channels = whole("channels", channels)
        where = {"device": device, "dtype": dtype}
        self.conv = _CONVOLUTIONS[dims - 1](
            channels, channels, int(kernel), padding=int(kernel) // 2, groups=channels, bias=bias, **where
        )
        self.norm = _NORMS[dims - 1](channels, **where) if norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.conv.reset_parameters()
        nn.init.normal_(self.conv.weight, std=math.sqrt(2 / self.conv.weight[0].numel()))
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        # By the submodules, so that what replaces or hooks them (SyncBatchNorm, quantisation) is seen.
        if x.dim() != self.conv.weight.dim() or x.shape[1] != self.channels:
            places = ", ".join("*" * (self.conv.weight.dim() - 2))
            raise ValueError(
                f"x must have shape (batch, channels = {self.channels}, {places}), got {tuple(x.shape)}"
            )
        context = self.conv(x)
        return torch.maximum(x, context if self.norm is None else self.norm(context))


class SCAA(FunnelReLU):
    """Spatial context-aware activation: max(x, a window on each channel of x).

    Args:
        channels: of the input.
        kernel: odd size of the window.
        dims: 1, 2 or 3 dimensions of places.
        bias: of the convolution.

    Shape:
        (N, channels, *places) to the same.

    Source: Yuan et al., 2022.

    Example:
        >>> import torch, torchlin
        >>> torchlin.create("activation", "scaa", channels=16)(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel: int = _size("scaa", "kernel"),
        dims: int = 2,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            channels, kernel=kernel, dims=dims, norm=False, bias=bias, device=device, dtype=dtype
        )


# ------------------------------------------------------------------------------------------------------ small networks


class DynamicReLU(nn.Module):
    """max_k(a_k x + b_k), with a and b of each sample and channel from a small network of the pooled input: DY-ReLU-B.

    Args:
        channels: of the input.
        k: linear pieces.
        reduction: of the hidden layer: channels // reduction features.
        shared: one set of pieces for all channels, DY-ReLU-A.
        lambda_a, lambda_b: the reach of slopes and offsets around (1, 0, ..., 0) and 0.

    Shape:
        (N, channels, *places) to the same.

    Source: Chen et al., "Dynamic ReLU", arXiv:2003.10027, equations 3 to 5; reduction as in DynamicReLU by Islanna.

    Example:
        >>> import torch, torchlin
        >>> torchlin.create("activation", "dy_relu", channels=16)(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        *,
        k: int = _size("dy_relu", "k"),
        reduction: int = 4,
        shared: bool = False,
        lambda_a: float = 1.0,
        lambda_b: float = 0.5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.k = whole("channels", channels), whole("k", k)
        self.shared, self.lambda_a, self.lambda_b = shared, lambda_a, lambda_b
        hidden = max(1, channels // whole("reduction", reduction))
        where = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(channels, hidden, **where)
        self.fc2 = nn.Linear(hidden, 2 * self.k * (1 if shared else channels), **where)

    def reset_parameters(self) -> None:
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return activation(
            x,
            "dy_relu",
            fc1_weight=self.fc1.weight,
            fc1_bias=self.fc1.bias,
            fc2_weight=self.fc2.weight,
            fc2_bias=self.fc2.bias,
            shared=self.shared,
            lambda_a=self.lambda_a,
            lambda_b=self.lambda_b,
        )

    def extra_repr(self) -> str:
        return f"{self.channels}, k={self.k}" + (", shared=True" if self.shared else "")


class MetaACON(nn.Module):
    """ACON-C, (p1 - p2)x·sigmoid(beta (p1 - p2)x) + p2 x, with beta of each sample and channel from a small network.

    Args:
        channels: of the input.
        r: ratio, and least width, of the hidden layer: max(r, channels // r).
        norm: batch normalisation after both layers, as in the paper; it needs batches of more than one in training.

    Shape:
        (N, channels, *places) to the same.

    Source: Ma et al., "Activate or not", arXiv:2009.04759. p1 and p2 start normal, as in the authors' code.

    Example:
        >>> import torch, torchlin
        >>> torchlin.create("activation", "meta_acon", channels=64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        *,
        r: int = _size("meta_acon", "r"),
        norm: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.r = whole("channels", channels), whole("r", r)
        hidden = max(self.r, channels // self.r)
        where = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(channels, hidden, **where)
        self.norm1 = nn.BatchNorm1d(hidden, **where) if norm else None
        self.fc2 = nn.Linear(hidden, channels, **where)
        self.norm2 = nn.BatchNorm1d(channels, **where) if norm else None
        self.p1 = nn.Parameter(torch.empty(channels, **where))
        self.p2 = nn.Parameter(torch.empty(channels, **where))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.fc1, self.norm1, self.fc2, self.norm2):
            if layer is not None:
                layer.reset_parameters()
        nn.init.normal_(self.p1)
        nn.init.normal_(self.p2)

    def forward(self, x: Tensor) -> Tensor:
        return activation(
            x,
            "meta_acon",
            training=self.training,
            p1=self.p1,
            p2=self.p2,
            fc1_weight=self.fc1.weight,
            fc1_bias=self.fc1.bias,
            fc2_weight=self.fc2.weight,
            fc2_bias=self.fc2.bias,
            norm1=_through(self.norm1),
            norm2=_through(self.norm2),
        )

    def extra_repr(self) -> str:
        return f"{self.channels}, r={self.r}"


def _through(layer: nn.BatchNorm1d | None) -> Callable[[Tensor, bool], Tensor] | None:
    """The layer itself, so that what replaces or hooks it (SyncBatchNorm) is seen."""
    if layer is None:
        return None
    return lambda h, training: layer(h.to(layer.weight.dtype)).to(h.dtype)


# ------------------------------------------------------------------------------------------------------ normalisation


class EvoNormS0(nn.Module):
    """x·sigmoid(v x)/std·weight + bias, with the standard deviation of a group of channels.

    Args:
        num_features: channels of the input.
        groups: of channels; must divide num_features.
        eps: added to the variance.

    Shape:
        (N, num_features, *places) to the same.

    Raises:
        ValueError: groups that do not divide num_features.

    Source: Liu et al., "Evolving normalization-activation layers", arXiv:2004.02967, table 2 and appendix.

    Example:
        >>> import torch, torchlin
        >>> torchlin.create("activation", "evonorm_s0", num_features=64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(
        self,
        num_features: int,
        *,
        groups: int = _size("evonorm_s0", "groups"),
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.groups = whole("num_features", num_features), whole("groups", groups)
        if self.num_features % self.groups:
            raise ValueError(f"groups must divide num_features = {num_features}, got {groups}")
        self.eps = eps
        where = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_features, **where))
        self.bias = nn.Parameter(torch.empty(num_features, **where))
        self.v = nn.Parameter(torch.empty(num_features, **where))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.ones_(self.v)

    def forward(self, x: Tensor) -> Tensor:
        return activation(
            x, "evonorm_s0", groups=self.groups, v=self.v, weight=self.weight, bias=self.bias, eps=self.eps
        )

    def extra_repr(self) -> str:
        return f"{self.num_features}, groups={self.groups}, eps={self.eps:g}"


class FilterResponseNorm(nn.Module):
    """Filter response normalisation and its thresholded linear unit: max(weight·x/sqrt(mean x² + eps) + bias, tau).

    Args:
        num_features: channels of the input.
        eps: added to the mean square of a channel's places.
        learnable_eps: learn a part of eps for each channel, as the paper advises where there is one place only.

    Shape:
        (N, num_features, *places) to the same.

    Source: Singh and Krishnan, "Filter response normalization layer", arXiv:1911.09737, sections 3.1 and 3.2; the learnt
    part starts at 1e-4.

    Example:
        >>> import torch, torchlin
        >>> torchlin.create("activation", "frn_tlu", num_features=64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    learnt_eps: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = _default("frn_tlu", "eps"),
        learnable_eps: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps = whole("num_features", num_features), eps
        where = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_features, **where))
        self.bias = nn.Parameter(torch.empty(num_features, **where))
        self.tau = nn.Parameter(torch.empty(num_features, **where))
        learnt = nn.Parameter(torch.empty(num_features, **where)) if learnable_eps else None
        self.register_parameter("learnt_eps", learnt)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.tau)
        if self.learnt_eps is not None:
            nn.init.constant_(self.learnt_eps, 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        eps: Value = self.eps if self.learnt_eps is None else self.eps + self.learnt_eps.abs()
        return activation(x, "frn_tlu", eps=eps, weight=self.weight, bias=self.bias, tau=self.tau)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps:g}" + (
            ", learnable_eps=True" * (self.learnt_eps is not None)
        )


# Those that are no ComposedActivation are made without the name.
MODULES: dict[str, type[nn.Module]] = {
    row.name: ComposedActivation for row in catalogue.catalogue().values() if row.implementation
} | {
    "solu": SoLU,
    "funnel_relu": FunnelReLU,
    "scaa": SCAA,
    "dy_relu": DynamicReLU,
    "meta_acon": MetaACON,
    "evonorm_s0": EvoNormS0,
    "frn_tlu": FilterResponseNorm,
}
