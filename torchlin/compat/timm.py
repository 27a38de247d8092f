"""timm's words for activations by name, on torchlin's registry: any registered name, and an error that helps.

A callable passes through, None and "" give None, names are compared without case; `inplace` is dropped where
the activation does not have it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torchlin import registry

LayerType = str | Callable[..., Any]


def get_act_layer(name: LayerType | None = "relu") -> Callable[..., Any] | None:
    """The class, or function, that makes the activation `name`.

    Raises:
        torchlin.registry.UnknownNameError: a ValueError and KeyError with the closest names.

    Source: timm.layers.get_act_layer.

    Example:
        >>> import torch
        >>> from torchlin.compat.timm import get_act_layer
        >>> get_act_layer(torch.nn.GELU)
        <class 'torch.nn.modules.activation.GELU'>
    """
    if name is None or name == "":
        return None
    return registry.describe("activation", name).target if isinstance(name, str) else name


def create_act_layer(name: LayerType | None, inplace: bool | None = None, **kwargs: Any) -> nn.Module | None:
    """The activation `name` as a Module; `kwargs` go to its constructor.

    Raises:
        torchlin.registry.UnknownNameError: a ValueError and KeyError with the closest names.

    Source: timm.layers.create_act_layer.

    Example:
        >>> import torch
        >>> from torchlin.compat.timm import create_act_layer
        >>> create_act_layer(torch.nn.ReLU, inplace=True)
        ReLU(inplace=True)
    """
    layer = get_act_layer(name)
    if layer is None:
        return None
    # timm tries and takes any TypeError for "no inplace here", which hides the others.
    if inplace is not None and "inplace" in inspect.signature(layer).parameters:
        kwargs["inplace"] = inplace
    return layer(**kwargs)


def get_act_fn(name: LayerType | None = "relu") -> Callable[..., Any] | None:
    """The activation `name` as a function `f(x, inplace=False)`.

    Raises:
        torchlin.registry.UnknownNameError: a ValueError and KeyError with the closest names.
        ValueError: the activation has parameters to learn, which a function has no place for.

    Source: timm.layers.get_act_fn.

    Example:
        >>> import torch
        >>> from torchlin.compat.timm import get_act_fn
        >>> get_act_fn(torch.tanh)(torch.zeros(2))
        tensor([0., 0.])
    """
    if name is None or name == "":
        return None
    if not isinstance(name, str):
        return name
    fresh, overwriting = create_act_layer(name, inplace=False), create_act_layer(name, inplace=True)
    assert fresh is not None
    assert overwriting is not None
    if any(True for _ in fresh.parameters()):
        raise ValueError(
            f"name: {name!r} has parameters to learn; create_act_layer({name!r}) gives a Module with them"
        )

    def act(x: Tensor, inplace: bool = False) -> Tensor:
        return overwriting(x) if inplace else fresh(x)

    act.__name__ = registry.describe("activation", name).name
    return act


def list_activations(filter: str = "*") -> list[str]:
    """Names of the registered activations that match a wildcard pattern, themselves or by an alias.

    Source: timm.list_models, for activations.

    Example:
        >>> from torchlin.compat.timm import list_activations
        >>> list_activations("no_such_*")
        []
    """
    return registry.names("activation", filter)
