"""Activation modules of torch, transformers and timm as modules of the catalogue: the same function, the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from torchlin.nn.activation import Activation, GatedActivation

# By module and class, so that no library is imported for it: our name, and which attributes are its parameters.
_TORCH: dict[str, tuple[str, ...]] = {
    "ReLU": ("relu",),
    "ReLU6": ("relu6",),
    "LeakyReLU": ("leaky_relu", "negative_slope"),
    "RReLU": ("rrelu", "lower", "upper"),
    "Threshold": ("threshold", "threshold", "value"),
    "Hardtanh": ("hardtanh", "min_val", "max_val"),
    "Hardsigmoid": ("hardsigmoid",),
    "Hardswish": ("hardswish",),
    "Hardshrink": ("hardshrink", "lambd"),
    "Softshrink": ("softshrink", "lambd"),
    "Tanhshrink": ("tanhshrink",),
    "ELU": ("elu", "alpha"),
    "CELU": ("celu", "alpha"),
    "SELU": ("selu",),
    "SiLU": ("silu",),
    "Mish": ("mish",),
    "Sigmoid": ("sigmoid",),
    "LogSigmoid": ("logsigmoid",),
    "Softsign": ("softsign",),
    "Tanh": ("tanh",),
}
_TRANSFORMERS: dict[str, tuple[str, ...]] = {
    "GELUActivation": ("gelu",),
    "NewGELUActivation": ("gelu_tanh",),
    "FastGELUActivation": ("gelu_tanh",),
    "AccurateGELUActivation": ("gelu_tanh",),
    "GELUTanh": ("gelu_tanh",),
    "PytorchGELUTanh": ("gelu_tanh",),
    "QuickGELUActivation": ("quick_gelu",),
    "SiLUActivation": ("silu",),
    "MishActivation": ("mish",),
    "LaplaceActivation": ("laplace_cdf",),
    "ReLUSquaredActivation": ("relu_squared",),
    "SqrtSoftplusActivation": ("sqrtsoftplus",),
}
_TIMM: dict[str, tuple[str, ...]] = {
    "Swish": ("silu",),
    "Mish": ("mish",),
    "Sigmoid": ("sigmoid",),
    "Tanh": ("tanh",),
    "HardSwish": ("hardswish",),
    "HardSigmoid": ("hardsigmoid",),
    "HardMish": ("hardmish",),
    "GELU": ("gelu",),
    "GELUTanh": ("gelu_tanh",),
    "QuickGELU": ("quick_gelu",),
}
_TIMM_ME = {f"{name}Me": _TIMM[name] for name in ("Swish", "Mish", "HardSigmoid", "HardSwish", "HardMish")}


def _gelu(module: Any) -> nn.Module:
    return Activation("gelu_tanh" if module.approximate == "tanh" else "gelu")


def _softplus(module: Any) -> nn.Module | None:
    # torch gives x itself where beta*x > threshold. From 20 on that is within rounding of float32.
    return Activation("softplus", beta=module.beta) if module.threshold >= 20 else None


def _prelu(module: Any) -> nn.Module:
    new = Activation("prelu", num_parameters=module.weight.numel(), device="meta")
    new.weight = module.weight
    return new


def _clipped_gelu(module: Any) -> nn.Module | None:
    return Activation("gelu_10") if (module.min, module.max) == (-10, 10) else None


def _xielu(module: Any) -> nn.Module:
    new = Activation("xielu", beta=float(module.beta), device="meta")
    new.alpha_p, new.alpha_n = module.alpha_p, module.alpha_n
    return new


_SPECIAL: dict[str, Callable[..., nn.Module | None]] = {
    "torch.nn.modules.activation.GELU": _gelu,
    "torch.nn.modules.activation.Softplus": _softplus,
    "torch.nn.modules.activation.PReLU": _prelu,
    "torch.nn.modules.activation.GLU": lambda module: GatedActivation("glu", dim=module.dim),
    "transformers.activations.ClippedGELUActivation": _clipped_gelu,
    "transformers.activations.XIELUActivation": _xielu,
    "timm.layers.activations.PReLU": _prelu,
}
_PLAIN: dict[str, tuple[str, ...]] = {
    f"{package}.{name}": row
    for package, table in {
        "torch.nn.modules.activation": _TORCH,
        "transformers.activations": _TRANSFORMERS,
        "timm.layers.activations": _TIMM,
        "timm.layers.activations_me": _TIMM_ME,
    }.items()
    for name, row in table.items()
}


def equal_of(module: nn.Module) -> nn.Module | None:
    """As :func:`from_torch`; None where the catalogue has no equal."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    new: nn.Module | None = None
    values: dict[str, Any]
    if kind in _SPECIAL:
        new = _SPECIAL[kind](module)
    elif kind in _PLAIN:
        name, *words = _PLAIN[kind]
        values = {word: float(getattr(module, word)) for word in words}
        try:
            found = Activation(name, **values)
        except ValueError:  # torch takes parameters for which the function is not what its name says
            return None
        found.inplace = bool(getattr(module, "inplace", False)) and found.allows_inplace
        new = found
    return new.train(module.training) if new is not None else None


def from_torch(module: nn.Module) -> nn.Module:
    """The module of the catalogue that computes what an activation of torch, transformers or timm computes.

    Weights are shared with the old module. `inplace` is kept where the gradient allows it.

    Args:
        module: of exactly such a class, as `torch.nn.LeakyReLU(0.2)`; a subclass may compute something else.

    Raises:
        ValueError: the catalogue has no equal.

    Source: torch.nn, transformers.activations, timm.layers.

    Example:
        >>> import torch, torchlin
        >>> torchlin.nn.from_torch(torch.nn.GELU(approximate="tanh"))
        Activation('gelu_tanh')
    """
    new = equal_of(module)
    if new is None:
        raise ValueError(f"module: the catalogue has no equal of {module!r} ({type(module).__module__})")
    return new
