"""Curves of activations for pictures: the reference in float64, refined where it bends, cut where it jumps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from torchlin.catalogue import Activation, Noise, torch_code
from torchlin.catalogue.formula import evaluate

Points = list[tuple[float, float]]
Function = Callable[[Tensor], Tensor]  # of a float64 vector, element by element

LOW, HIGH = -4.0, 4.0
_FIRST = 192  # intervals at the start; none of their ends is a round number, where kinks and steps are
_HALVINGS = 22  # of an interval that bends: down to 1e-8 of the picture
_SHARP = 1 / 400  # of the picture's height: less does not show
_ASPECT = 3 / 4  # a picture's height over its width, in units of x: a slope of 1 rises at 45 degrees


@dataclass(frozen=True)
class Line:
    """One curve: its unbroken pieces inside the window."""

    role: str  # "f", "derivative", or "other": f with something else in its place
    label: str
    pieces: list[Points]


@dataclass(frozen=True)
class Picture:
    """The curves of one activation over one of its inputs, `axis`; what else there is to know in `caption`."""

    axis: str
    caption: str
    low: float
    high: float
    bottom: float
    top: float
    lines: tuple[Line, ...]

    def pieces(self, role: str) -> list[Points]:
        return [piece for line in self.lines if line.role == role for piece in line.pieces]


# ----------------------------------------------------------------------------------------------- what to draw


def picture(
    activation: Activation,
    parameters: Mapping[str, Any] | None = None,
    window: tuple[float, float] | None = None,
) -> Picture:
    """The picture of an activation of the catalogue: f and f′, in evaluation where it is stochastic.

    A gated unit is drawn over its gate for three values of the other input, noise at its 10 % and 90 %
    quantiles, a function of a whole vector by its first element with the others held.

    Args:
        window: from where to where; by default [-4, 4], or what shows more of a function that needs another.

    Raises:
        ValueError: a window without numbers between its ends.
    """
    if window and not (math.isfinite(window[0]) and math.isfinite(window[1]) and window[0] < window[1]):
        raise ValueError(
            f"range: must go up from one finite number to another, got {window[0]:g} {window[1]:g}"
        )
    values = activation.defaults() | dict(parameters or {})
    if activation.graph is None:
        from torchlin import _curves_composed

        axis, caption, main, others = _curves_composed.functions(activation, values)
    elif len(activation.inputs) > 1:
        axis, caption, main, others = _of_several_inputs(activation, values)
    else:
        axis, caption, main, others = activation.inputs[0], "", evaluated(activation, values), {}
        if activation.root.noises:
            others = {f"{q:.0%}": _noisy(activation, values, q) for q in (0.1, 0.9)}
            caption = "in evaluation; lighter: its noise at the 10 % and 90 % quantile"
    return _draw(axis, caption, main, others, *(window or _range(main)))


def evaluated(activation: Activation, values: Mapping[str, Any]) -> Function:
    """An activation of one input as a function of x, in evaluation."""
    graph, name = activation.eval_graph, activation.inputs[0]
    assert graph is not None
    return lambda x: torch_code.reference(graph, {name: x}, values)


def _of_several_inputs(activation: Activation, values: Mapping[str, Any]) -> tuple[str, str, Function, dict]:
    graph = activation.graph
    assert graph is not None
    # A gate is what the unit is not linear in; the catalogue may say which input that is.
    gate = activation.gate or _bent_input(activation, values)
    rest = [name for name in activation.inputs if name != gate]

    def at(value: float) -> Function:
        def function(x: Tensor) -> Tensor:
            held = {name: torch.full_like(x, value if name == rest[0] else 0.0) for name in rest}
            return torch_code.reference(graph, {gate: x, **held}, values)

        return function

    zero = "".join(f", {name} = 0" for name in rest[1:])
    caption = f"over {gate}, with {rest[0]} = 1{zero}; lighter: {rest[0]} = -1 and 2"
    return gate, caption, at(1.0), {f"{rest[0]} = {value:g}": at(value) for value in (-1.0, 2.0)}


def _bent_input(activation: Activation, values: Mapping[str, Any]) -> str:
    assert activation.graph is not None
    x = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    for name in activation.inputs:
        inputs = {other: torch.ones_like(x) for other in activation.inputs} | {name: x}
        low, middle, high = torch_code.reference(activation.graph, inputs, values).tolist()
        if abs(low + high - 2 * middle) > 1e-9:
            return name
    return activation.inputs[0]


def _noisy(activation: Activation, values: Mapping[str, Any], q: float) -> Function:
    graph, name = activation.graph, activation.inputs[0]
    assert graph is not None
    drawn: dict[str, Any] = {}
    for noise in activation.root.noises.values():
        value = _quantile(noise, [float(evaluate(node, values)) for node in noise.arguments], q)
        drawn[noise.name] = [value] * len(values[noise.like]) if noise.like else value

    def function(x: Tensor) -> Tensor:
        elements = {key: torch.full_like(x, v) for key, v in drawn.items() if not isinstance(v, list)}
        return torch_code.reference(graph, {name: x, **elements}, {**values, **drawn})

    return function


def _quantile(noise: Noise, arguments: Sequence[float], q: float) -> float:
    if noise.distribution == "uniform":
        return arguments[0] + q * (arguments[1] - arguments[0])
    if noise.distribution == "normal":
        return arguments[0] + arguments[1] * NormalDist().inv_cdf(q)
    if noise.distribution == "half_normal":
        return arguments[0] * NormalDist().inv_cdf((1 + q) / 2)
    return float(q > 1 - arguments[0])  # bernoulli


# -------------------------------------------------------------------------------------------------- how to do it


def _draw(
    axis: str, caption: str, main: Function, others: Mapping[str, Function], low: float, high: float
) -> Picture:
    x = low + (high - low) * (torch.arange(_FIRST, dtype=torch.float64) + math.sqrt(0.5)) / _FIRST
    bottom, top = _window(*value_and_slope(main, x), low, high)
    lines = [
        Line(role, label, _clip(pieces, bottom, top))
        for role, label, pieces in zip(
            ("f", "derivative"), ("f", "f′"), _trace(main, low, high, bottom, top), strict=True
        )
    ]
    for label, function in others.items():
        pieces = _trace(function, low, high, bottom, top)[0]
        lines.append(Line("other", label, _clip(pieces, bottom, top)))
    return Picture(axis, caption, low, high, bottom, top, tuple(lines))


def value_and_slope(function: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = function(x)
        if not y.requires_grad:  # a formula without its input
            return y, torch.zeros_like(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


def _range(function: Function) -> tuple[float, float]:
    """[-4, 4]; the double of it if there are kinks outside, a part of it where the waves are too close."""
    x = torch.linspace(2 * LOW, 2 * HIGH, 385, dtype=torch.float64) + 1e-3
    step = value_and_slope(function, x)[1].nan_to_num().diff().abs()
    kink = (step[1:-1] > 0.1) & (step[:-2] < 0.1 * step[1:-1]) & (step[2:] < 0.1 * step[1:-1])
    if (kink & (x[1:-2].abs() > HIGH)).any():
        return 2 * LOW, 2 * HIGH
    scale = 1.0
    while scale > 1e-3:
        x = torch.linspace(LOW * scale, HIGH * scale, 1001, dtype=torch.float64)
        rising = value_and_slope(function, x)[1] > 0
        if int((rising[1:] != rising[:-1]).sum()) <= 24:
            break
        scale /= 2
    return LOW * scale, HIGH * scale


def _window(y: Tensor, slope: Tensor, low: float, high: float) -> tuple[float, float]:
    """From where to where a picture goes up: round heights, so that pictures can be compared at a glance."""
    whole = (high - low) * _ASPECT
    # What all of f needs, and nearly all of f': that may have poles where f has none.
    content = torch.cat([_inside(y, 0.01), _inside(slope, 0.03), torch.zeros(1, dtype=y.dtype)])
    height = whole / 8
    while height < whole and not _fits(content, height):
        height *= 2
    while not _fits(content, height):
        near = y.nan_to_num(math.inf).abs() <= height / 2
        if near.double().mean() >= 0.3:
            break
        height *= 2
    step = height / 12
    least, most = (float(v) for v in (content.min(), content.max()))
    if most - least > height - step:  # more than the window: as much above as below, or all on one side
        middle = (
            0.0 if least < -height / 3 and most > height / 3 else (height / 3) * (1 if most > -least else -1)
        )
    else:
        middle = (least + most) / 2
    bottom = step * round((middle - height / 2) / step)
    return bottom, bottom + height


def _inside(values: Tensor, fraction: float) -> Tensor:
    values = values[values.isfinite()].sort().values
    cut = int(len(values) * fraction)
    return values[cut : len(values) - cut]


def _fits(content: Tensor, height: float) -> bool:
    return float(content.max() - content.min()) <= height * 11 / 12


def _trace(
    function: Function, low: float, high: float, bottom: float, top: float
) -> tuple[list[Points], list[Points]]:
    """The pieces of f and of f′. Intervals are halved where either bends, which ends at kinks, steps and poles."""
    height = top - bottom
    sharp = height * _SHARP

    def at(x: Tensor) -> Tensor:
        far = torch.stack(value_and_slope(function, x))  # (2, n)
        return far.clamp(bottom - height, top + height)

    inner = low + (high - low) * (torch.arange(_FIRST, dtype=torch.float64) + math.sqrt(0.5)) / _FIRST
    x = torch.cat(
        [torch.tensor([low], dtype=torch.float64), inner, torch.tensor([high], dtype=torch.float64)]
    )
    all_x, all_v = [x], [at(x)]
    left, right, vl, vr = x[:-1], x[1:], all_v[0][:, :-1], all_v[0][:, 1:]
    for _ in range(_HALVINGS):
        middle = (left + right) / 2
        v = at(middle)
        all_x.append(middle)
        all_v.append(v)
        off = (v - (vl + vr) / 2).abs()
        bent = ((off > sharp / 4) | off.isnan()).any(0)
        if not bent.any():
            break
        left, right = torch.cat([left[bent], middle[bent]]), torch.cat([middle[bent], right[bent]])
        vl, vr = torch.cat([vl[:, bent], v[:, bent]], 1), torch.cat([v[:, bent], vr[:, bent]], 1)
    x, order = torch.cat(all_x).sort()
    v = torch.cat(all_v, 1)[:, order]
    # Halved to the last: there nothing but a jump is left. What is steep but straight was halved no further.
    narrow = (x[1:] - x[:-1]) < (high - low) / _FIRST / 2 ** (_HALVINGS - 2)
    f, slope = (_cut(x, row, narrow, sharp) for row in v)
    return f, slope


def _cut(x: Tensor, y: Tensor, narrow: Tensor, sharp: float) -> list[Points]:
    """Pieces between jumps and between gaps in the domain."""
    gap = y.isnan()
    jump = narrow & ((y[1:] - y[:-1]).abs() > 2 * sharp)
    pieces: list[Points] = [[]]
    for i, (px, py) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        if gap[i]:
            pieces.append([])
            continue
        if i and jump[i - 1]:
            pieces.append([])
        pieces[-1].append((px, py))
    # A value at one point alone, such as sign(0), is no curve.
    return [piece for piece in pieces if len(piece) > 1]


def _clip(pieces: list[Points], bottom: float, top: float) -> list[Points]:
    """What of the pieces lies in the window, cut exactly at its edges."""
    inside: list[Points] = []
    for piece in pieces:
        run: Points = []
        for (x0, y0), (x1, y1) in pairwise(piece):
            start, end = 0.0, 1.0
            for edge, sign in ((bottom, 1.0), (top, -1.0)):
                d0, d1 = sign * (y0 - edge), sign * (y1 - edge)
                if d0 < 0 and d1 < 0:
                    end = -1.0
                elif d0 < 0:
                    start = max(start, d0 / (d0 - d1))
                elif d1 < 0:
                    end = min(end, d0 / (d0 - d1))
            if start > end:
                if run:
                    inside.append(run)
                    run = []
                continue
            if not run:
                run.append((x0 + start * (x1 - x0), y0 + start * (y1 - y0)))
            run.append((x0 + end * (x1 - x0), y0 + end * (y1 - y0)))
            if end < 1:
                inside.append(run)
                run = []
        if run:
            inside.append(run)
    return inside


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten.

    Example:
        >>> ticks(-4, 4)
        [-4.0, -2.0, 0.0, 2.0, 4.0]
    """
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step + 0.0 for i in range(first, last + 1)]
