"""Prediction against measurement: how much a model's metric grows by what was done to its layers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchlin._console import progress
from torchlin.quant._measure import METRICS, Measure, check_batches
from torchlin.quant.alphas import Alphas, evaluation_mode, quantizable, replaced


def predicted_delta(alphas: Mapping[str, float], t2: Mapping[str, float]) -> float:
    r"""How much the alphas' metric grows by errors in layers, :math:`\sum_l \alpha_l t_l^2`.

    Args:
        alphas: {layer: α}, such as :class:`Alphas`.
        t2: {layer: relative squared error ‖Ŵ - W‖² / ‖W‖² of its weight}, of all layers that were changed;
            ``{layer.name: layer.t2 for layer in report.layers}`` of a :class:`QuantizationReport`.

    Returns:
        The growth, in the metric of the alphas ("ppl", "loss" or "kl").

    Raises:
        ValueError: a layer has no α.

    Source: theorem 1 of Malinovskii et al., "Pushing the limits of large language model quantization via the linearity
    theorem", 2024 (arXiv:2411.17525). It holds for small errors: about 3 bits and more.

    Example:
        >>> predicted_delta({"up": 2.0, "down": 10.0}, {"up": 0.01, "down": 0.001})
        0.03
    """
    if missing := [name for name in t2 if name not in alphas]:
        raise ValueError(f"alphas: no α for {missing[0]!r}, one of {len(missing)} changed layers without")
    return float(sum(alphas[name] * error for name, error in t2.items()))


@dataclass(frozen=True)
class Measured:
    """How much a metric grew by other weights: each layer alone, and all together."""

    t2: Mapping[str, float]
    delta: Mapping[str, float]
    together: float
    metric: str
    base: float


@torch.no_grad()
def measure_deltas(
    model: nn.Module,
    weights: Mapping[str, Tensor] | Callable[[str, Tensor], Tensor],
    batches: Sequence[Any] | Tensor,
    *,
    metric: str = "ppl",
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    modules_to_not_convert: Sequence[str] = ("lm_head",),
    alone: bool = True,
) -> Measured:
    """Measure how much a model's metric grows when layers get other weights, one at a time and all at once.

    Args:
        model: any nn.Module; it is left as it was.
        weights: {layer: another weight}, or a function of a layer's name and weight that makes it; called twice for each.
        batches: as for :func:`estimate_alphas`. Each measurement runs all of them.
        metric, loss_fn, modules_to_not_convert: as for :func:`estimate_alphas`.
        alone: measure each layer alone too.

    Returns:
        :class:`Measured`.

    Raises:
        ValueError: a layer of ``weights`` is none of the model's, or a weight has another shape.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        >>> measured = measure_deltas(model, lambda name, weight: 1.1 * weight, [torch.randn(32, 8)], metric="kl")
        >>> [round(error, 4) for error in measured.t2.values()], measured.together > 0
        ([0.01, 0.01], True)
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}, got {metric!r}")
    targets = quantizable(model, modules_to_not_convert)
    if not callable(weights) and (unknown := [name for name in weights if name not in targets]):
        raise ValueError(f"weights: {unknown[0]!r} is no linear layer of the model")
    names = list(targets) if callable(weights) else [name for name in targets if name in weights]

    def other(name: str) -> Tensor:
        old = targets[name].weight
        new = weights(name, old) if callable(weights) else weights[name]
        if new.shape != old.shape:
            raise ValueError(f"weights[{name!r}] must have shape {tuple(old.shape)}, got {tuple(new.shape)}")
        return new

    t2: dict[str, float] = {}
    delta: dict[str, float] = {}
    with evaluation_mode(model):
        measure = Measure(model, check_batches(batches), metric, loss_fn)
        everything = range(measure.count)
        for name in progress(names if alone else [], f"{metric} with one layer changed"):
            with replaced(targets[name].weight, other(name)):
                delta[name] = measure(targets[name].weight, everything)
        with ExitStack() as stack:
            for name in names:
                weight = targets[name].weight
                original = weight.detach().to(torch.float64, copy=True)
                stack.enter_context(replaced(weight, other(name)))
                size = float(original.square().sum())
                error = float((weight.double() - original).square().sum())
                t2[name] = error / size if size else 0.0
            together = measure(None, everything)
    return Measured(t2, delta, together, metric, measure.base)


def plot_prediction(
    alphas: Alphas | Mapping[str, float], measured: Measured, path: str | os.PathLike[str]
) -> None:
    """Draw prediction against measurement, a dot a layer and one for all together, and write the picture.

    Args:
        alphas: {layer: α}, in the metric of ``measured``.
        measured: of :func:`measure_deltas`.
        path: the file; its ending says which format.

    Raises:
        ImportError: matplotlib is not installed (the extra "plots").
        ValueError: the metrics differ.
    """
    if isinstance(alphas, Alphas) and alphas.metric != measured.metric:
        raise ValueError(f"alphas are of {alphas.metric!r}, but {measured.metric!r} was measured")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_prediction needs matplotlib: pip install torchlin[plots]") from error
    alone = [(alphas[name] * measured.t2[name], grown) for name, grown in measured.delta.items()]
    alone = [(x, y) for x, y in alone if x > 0 and y > 0]  # the axes are logarithmic
    together = (predicted_delta(alphas, measured.t2), measured.together)
    figure = Figure(figsize=(5.2, 5))
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log")
    axes.scatter([x for x, _ in alone], [y for _, y in alone], s=12, label="each layer alone")
    if min(together) > 0:
        axes.scatter(*together, s=60, marker="*", color="tab:red", label="all together")
    ends = [value for point in [*alone, together] for value in point if value > 0]
    diagonal = (min(ends, default=1e-3), max(ends, default=1.0))
    axes.plot(diagonal, diagonal, color="grey", linewidth=0.8)
    axes.set_xlabel(f"predicted growth of {measured.metric}, $\\alpha_l t_l^2$")
    axes.set_ylabel("measured")
    axes.legend()
    figure.savefig(Path(path), bbox_inches="tight")
