"""Quantizes a real language model to 4, 3 and 2 bits without data, and shows what that costs and what it saves."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchlin._console import table
from torchlin.demo import _smollm2
from torchlin.quant import (
    Alphas,
    HiggsConfig,
    Measured,
    QuantizationReport,
    allocate_bits,
    estimate_alphas,
    measure_deltas,
    plot_prediction,
    predicted_delta,
    quantize_,
)
from torchlin.quant.command import Figures, compare, show
from torchlin.quant.evaluate import continuation

BITS = (4, 3, 2)
DYNAMIC = 4.0  # bits on average, scales and signs included
WINDOWS = 16  # of random tokens, that alphas are taken from
TOKENS = 128  # of text, on which every layer is measured alone
PICTURE = Path("demo-output") / "predicted-vs-measured.png"
PROMPT = "The capital of France is"
TOLERANCE = 0.02  # relative, of the mean measured t² and the grid's own error


def run() -> None:
    """The stop: measure, quantize at several rates, measure again."""
    model, encode = _smollm2.load()
    windows = _smollm2.text_windows(encode)
    prompt = encode(PROMPT)
    figures = compare(model, windows)
    said = {figures[0].name: continuation(model, prompt)}

    configs: dict[str, HiggsConfig] = {f"{bits} bits": HiggsConfig(bits=bits) for bits in BITS}
    vocabulary: Any = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    tokens = torch.randint(vocabulary, (WINDOWS, 128), generator=torch.Generator().manual_seed(0))
    alphas = estimate_alphas(model, tokens, method="fisher")
    plan = allocate_bits(alphas, None, DYNAMIC)
    configs[f"{DYNAMIC:g} bits, dynamic"] = HiggsConfig.from_plan(plan)

    reports: dict[str, QuantizationReport] = {}
    measured: dict[str, Measured] = {}
    for name, config in configs.items():
        small = copy.deepcopy(model)
        reports[name] = quantize_(small, config)
        figures.append(Figures.of(name, small, windows))
        said[name] = continuation(small, prompt)
        measured[name] = deltas(model, small, windows[:1, :TOKENS], alone=name == f"{BITS[0]} bits")

    show_layers(reports[f"{BITS[0]} bits"])
    print(f"\nSmolLM2-135M on {windows.numel()} tokens of scikit-learn's data-set descriptions")
    print(f"({_smollm2.NOTE})\n")
    show(figures)
    print()
    for name, report in reports.items():
        print(f"{name}: {report}")
    print(f"\n{plan}")
    show_prediction(alphas, measured)
    print()
    rows = [(name, encode.decode(ids).replace("\n", " ")) for name, ids in said.items()]
    table("", ("", f"{PROMPT!r} goes on"), rows)
    check(reports, figures)


def deltas(model: Any, small: Any, tokens: Tensor, *, alone: bool) -> Measured:
    """How far the predictions on a text move with the weights of a quantized model, layer by layer and all together."""

    def weight(name: str, _: Tensor) -> Tensor:
        return small.get_submodule(name).weight

    return measure_deltas(model, weight, tokens, metric="kl", alone=alone)


def show_prediction(alphas: Alphas, measured: dict[str, Measured]) -> None:
    """The theorem's prediction beside what was measured; a picture of every layer where matplotlib is."""
    rows = []
    for name, m in measured.items():
        predicted = predicted_delta(alphas, m.t2)
        rows.append((name, f"{predicted:.3f}", f"{m.together:.3f}", f"{predicted / m.together:.2f}"))
    title = f"growth of KL divergence by all layers: predicted from random tokens, measured on {TOKENS} tokens of text"
    table(title, ("", "predicted", "measured", "ratio"), rows)
    each = next(m for m in measured.values() if m.delta)
    logs = torch.tensor(
        [(alphas[layer] * each.t2[layer], grown) for layer, grown in each.delta.items() if grown > 0]
    ).log()
    print(
        f"{len(logs)} layers alone at {BITS[0]} bits: correlation of the logarithms {float(torch.corrcoef(logs.T)[0, 1]):.2f}, "
        f"sum {sum(each.delta.values()):.3f}, all together {each.together:.3f}"
    )
    if find_spec("matplotlib"):
        PICTURE.parent.mkdir(exist_ok=True)
        plot_prediction(alphas, each, PICTURE)
        print(f"every layer: {PICTURE}")


def show_layers(report: QuantizationReport) -> None:
    """The layers whose error is furthest from what their grid lets expect, and the mean."""
    off = sorted(report.layers, key=lambda layer: -abs(layer.t2 / layer.expected - 1))
    report.table(off[:5])
    print(f"(the 5 of {len(off)} layers that are furthest from their grid's error)")


def check(reports: dict[str, QuantizationReport], figures: list[Figures]) -> None:
    """Raises where a claim of this stop does not hold."""
    for name, report in reports.items():
        expected = sum(layer.expected for layer in report.layers) / len(report.layers)
        if not abs(report.t2 / expected - 1) <= TOLERANCE:
            raise RuntimeError(f"{name}: mean t² {report.t2:.4g}, the grids let expect {expected:.4g}")
    by_name = {figure.name: figure for figure in figures}
    four, dynamic = by_name[f"{BITS[0]} bits"], by_name[f"{DYNAMIC:g} bits, dynamic"]
    if not dynamic.perplexity < four.perplexity:
        raise RuntimeError(f"bits layer by layer do not help: {dynamic.perplexity} against {four.perplexity}")
    slow = max(figure.speed for figure in figures[: -len(reports)])
    if not four.speed > slow:
        raise RuntimeError(f"decoding at 4 bits is no faster: {four.speed:.1f} against {slow:.1f} tokens/s")
