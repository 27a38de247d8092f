"""What activations are measured against: torch's own operators, compositions as papers print them, and
packages from PyPI."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Tensor]

_nn: Any = torch._C._nn  # where torch keeps the forms with out= of what torch.nn.functional has

# Names of the catalogue that torch has an operator for: the call, and the call into a tensor that exists.
OWN: dict[str, tuple[Function, Callable[[Tensor, Tensor], object]]] = {
    "relu": (torch.relu, lambda x, out: torch.clamp_min(x, 0, out=out)),
    "leaky_relu": (F.leaky_relu, lambda x, out: _nn.leaky_relu(x, 0.01, out=out)),
    "hardswish": (F.hardswish, lambda x, out: _nn.hardswish(x, out=out)),
    "sigmoid": (torch.sigmoid, lambda x, out: torch.sigmoid(x, out=out)),
    "silu": (F.silu, lambda x, out: _nn.silu(x, out=out)),
    "gelu": (F.gelu, lambda x, out: _nn.gelu(x, out=out)),
    "gelu_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x, out: _nn.gelu(x, approximate="tanh", out=out),
    ),
    "tanh": (torch.tanh, lambda x, out: torch.tanh(x, out=out)),
    "elu": (F.elu, lambda x, out: _nn.elu(x, out=out)),
    "softplus": (F.softplus, lambda x, out: _nn.softplus(x, out=out)),
    "mish": (F.mish, lambda x, out: _nn.mish(x, out=out)),
}

# Names without one, as their papers print them: what people type, not our reference with its guards.
COMPOSITES: dict[str, Function] = {
    "gcu": lambda x: x * torch.cos(x),
    "lisht": lambda x: x * torch.tanh(x),
    "tanhexp": lambda x: x * torch.tanh(torch.exp(x)),
    "logish": lambda x: x * torch.log1p(torch.sigmoid(x)),
    "smish": lambda x: x * torch.tanh(torch.log1p(torch.sigmoid(x))),
    "serf": lambda x: x * torch.erf(F.softplus(x)),
    "eanaf": lambda x: x * torch.exp(x) / (torch.exp(x) + 2),
}


def _per_channel(parameter: Tensor) -> Tensor:
    return parameter.view(-1, 1, 1)


def pelu(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Trottier et al. 2016, equation 3, a value of a and b for each channel of (N, C, H, W)."""
    a, b = _per_channel(a), _per_channel(b)
    return torch.where(x >= 0, a / b * x, a * (torch.exp(x / b) - 1))


def swish(x: Tensor, b: Tensor) -> Tensor:
    """x·σ(b·x), b learned."""
    return x * torch.sigmoid(b * x)


def elliott(x: Tensor) -> Tensor:
    return 0.5 * x / (1 + x.abs()) + 0.5


def abrelu(x: Tensor) -> Tensor:
    """relu of x less its mean over everything, the batch too."""
    return torch.relu(x - x.mean())


def srs(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x / (x / a + torch.exp(-x / b))


def pau(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Numerator of len(a), denominator 1 + Σ |b_j x^j|, both by Horner's rule."""
    numerator = a[-1]
    for coefficient in a[:-1].flip(0):
        numerator = numerator * x + coefficient
    magnitude, size = x.abs(), b.abs()
    denominator = size[-1]
    for coefficient in size[:-1].flip(0):
        denominator = denominator * magnitude + coefficient
    return numerator / (1 + magnitude * denominator)


def pdelu(x: Tensor, a: Tensor, t: float = 0.9) -> Tensor:
    """Per channel; the base is cut off at 0, where the printed power would turn."""
    power = torch.clamp_min(1 + (1 - t) * x, 0) ** (1 / (1 - t))
    return torch.where(x > 0, x, _per_channel(a) * (power - 1))


# ------------------------------------------------------------------------------------------------- packages


def _timm(function: str) -> Function:
    """timm's memory-efficient forms, by their file: the package itself needs torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'timm'")
    path = Path(spec.submodule_search_locations[0], "layers", "activations_me.py")
    file = importlib.util.spec_from_file_location("_timm_activations_me", path)
    assert file is not None
    assert file.loader is not None
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    return getattr(module, function)


def _torch_activation(name: str) -> Function:
    with warnings.catch_warnings():  # it warns of each of its own modules that lacks something
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module("torch_activation"), name)()


PEERS: dict[str, dict[str, Callable[[], Function]]] = {
    "timm": {
        "silu": lambda: _timm("swish_me"),
        "mish": lambda: _timm("mish_me"),
        "hardswish": lambda: _timm("hard_swish_me"),
        "hardmish": lambda: _timm("hard_mish_me"),
    },
    "torch_activation": {
        "tanhexp": lambda: _torch_activation("TeLU"),
        "gcu": lambda: _torch_activation("GCU"),
        "squareplus": lambda: _torch_activation("SquarePlus"),
    },
}


def peers() -> tuple[dict[tuple[str, str], Function], dict[str, str]]:
    """(package, name) to function for what imports here, and why the other packages do not."""
    found: dict[tuple[str, str], Function] = {}
    missing: dict[str, str] = {}
    for package, functions in PEERS.items():
        for name, load in functions.items():
            try:
                found[package, name] = load()
            except Exception as error:  # somebody else's package may fail in any way
                missing[package] = f"{type(error).__name__}: {error}"
    return found, missing
