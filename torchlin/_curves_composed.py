"""Curves of activations whose value at one place depends on other places: what is held while one input moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torchlin.catalogue import Activation

Function = Callable[[Tensor], Tensor]
Drawn: TypeAlias = tuple[str, str, Function, dict[str, Function]]  # axis, caption, what to draw, and lighter

HELD = (1.0, -0.5, 0.5)
_VECTOR = "the first of f([x, 1, -0.5, 0.5])"
_IMAGE = "the middle of a 3 x 3 image that is 0.5 elsewhere"


def functions(activation: Activation, values: Mapping[str, Any]) -> Drawn:
    """What to draw of an activation that no formula defines."""
    draw = _WAYS.get(str(activation.implementation), _vector)
    return draw(activation, {name: value for name, value in values.items() if name not in _SIZES})


_SIZES = ("kernel", "r", "groups")  # of weights that are chosen here


def _call(activation: Activation, x: Tensor, **arguments: Any) -> Tensor:
    from torchlin.functional import activation as compute

    return compute(x, activation.name, **arguments)


def _row(x: Tensor) -> Tensor:
    return torch.cat([x[:, None], x.new_tensor(HELD).expand(len(x), -1)], 1)  # (n, 4)


def _vector(activation: Activation, values: dict[str, Any], **more: Any) -> Drawn:
    def element(i: int) -> Function:
        return lambda x: _call(activation, _row(x), **values, **more)[:, i]

    some = _call(
        activation, _row(torch.tensor([-3.0, -1.0, 0.3, 3.0], dtype=torch.float64)), **values, **more
    )
    if some.shape[1] == 1:
        return "x", _VECTOR.removeprefix("the first of "), element(0), {}
    if bool((some[:, 1] == some[0, 1]).all()):
        return "x", _VECTOR, element(0), {}
    return "x", f"{_VECTOR}; lighter: the second", element(0), {"second": element(1)}


def _over_the_row(activation: Activation, values: dict[str, Any]) -> Drawn:
    # The statistics are of everything: here, of the row.
    return _vector(activation, values, dim=1)


def _over_the_batch(activation: Activation, values: dict[str, Any]) -> Drawn:
    return "x", _VECTOR, lambda x: _call(activation, _row(x).T, **values, channel_dim=1)[0], {}


def _elementwise(activation: Activation, values: dict[str, Any]) -> Drawn:
    return "x", "", lambda x: _call(activation, x[:, None], **values)[:, 0], {}


def _complex(activation: Activation, values: dict[str, Any]) -> Drawn:
    def function(x: Tensor) -> Tensor:
        return _call(activation, torch.complex(x, torch.full_like(x, 0.5)), **values)

    caption = "the real part of f(x + 0.5i); lighter: the imaginary part"
    return "x", caption, lambda x: function(x).real, {"imaginary": lambda x: function(x).imag}


def _image(x: Tensor) -> Tensor:
    return torch.cat([x.new_full((len(x), 4), 0.5), x[:, None], x.new_full((len(x), 4), 0.5)], 1).view(
        -1, 1, 3, 3
    )


def _funnel(activation: Activation, values: dict[str, Any]) -> Drawn:
    def function(x: Tensor) -> Tensor:
        return _call(activation, _image(x), weight=x.new_full((1, 1, 3, 3), 1 / 9), **values)[:, 0, 1, 1]

    return "x", f"{_IMAGE}, its window the mean, without normalisation", function, {}


def _dynamic_relu(activation: Activation, values: dict[str, Any]) -> Drawn:
    pieces = int(values.pop("k"))

    def function(x: Tensor) -> Tensor:
        network = {
            "fc1_weight": x.new_zeros(1, 1),
            "fc1_bias": x.new_zeros(1),
            "fc2_weight": x.new_zeros(2 * pieces, 1),
            "fc2_bias": x.new_zeros(2 * pieces),
        }
        return _call(activation, x[:, None], **network, **values)[:, 0]

    return "x", "with the weights of its small network at 0", function, {}


def _meta_acon(activation: Activation, values: dict[str, Any]) -> Drawn:
    def function(x: Tensor) -> Tensor:
        zero, one = x.new_zeros(1), x.new_ones(1)
        network = dict.fromkeys(("fc1_weight", "fc2_weight"), zero[:, None]) | {
            "fc1_bias": zero,
            "fc2_bias": zero,
        }
        return _call(activation, x[:, None], p1=one, p2=zero, **network, **values)[:, 0]

    return "x", "with p1 = 1, p2 = 0 and the weights of its small network at 0", function, {}


def _normalized(activation: Activation, values: dict[str, Any], **more: Any) -> Drawn:
    def function(x: Tensor) -> Tensor:
        return _call(activation, _row(x)[:, None], **values, **more)[:, 0, 0]  # one channel of four places

    return "x", _VECTOR, function, {}


_WAYS: dict[str, Callable[[Activation, dict[str, Any]], Drawn]] = {
    "bin_table": _elementwise,
    "lookup_table": _elementwise,
    "mean_shifted": _over_the_row,
    "offset": _over_the_row,
    "dynamic_threshold": _over_the_row,
    "channel_offset": _over_the_batch,
    "modrelu": _complex,
    "zrelu": _complex,
    "cardioid": _complex,
    "split_complex": _complex,
    "funnel": _funnel,
    "dynamic_relu": _dynamic_relu,
    "meta_acon": _meta_acon,
    "evonorm_s0": lambda activation, values: _normalized(activation, values, groups=1),
    "frn_tlu": _normalized,
}
