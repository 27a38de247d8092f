"""`torchlin quantize MODEL --bits 4 --out DIR`: a checkpoint quantized, measured and saved."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchlin._console import progress, table
from torchlin.quant import HiggsConfig, quantize_, save
from torchlin.quant.allocate import BitPlan, allocate_bits
from torchlin.quant.alphas import Alphas, estimate_alphas
from torchlin.quant.evaluate import load_language_model, perplexity, text_windows, tokens_per_second
from torchlin.quant.report import megabytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a checkpoint folder of transformers, or a GGUF file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the quantized model is saved")
    parser.add_argument("--bits", type=float, default=4.0, help="bits a weight, fractions too (4)")
    parser.add_argument("--p", type=int, default=2, help="weights that share a code (2)")
    parser.add_argument("--block-size", type=int, help="weights that share a scale (the longest that fits)")
    parser.add_argument("--seed", type=int, default=0, help="of the random signs (0)")
    parser.add_argument("--skip", action="append", default=["lm_head"], metavar="PATTERN", help="leave out")
    plan = parser.add_argument_group("bits layer by layer")
    plan.add_argument(
        "--dynamic", action="store_true", help="more bits where errors matter, --bits on average"
    )
    plan.add_argument(
        "--alphas", type=Path, metavar="FILE", help="how much errors matter: read, or made and written"
    )
    plan.add_argument("--plan", type=Path, metavar="FILE", help="a plan of allocate_bits, instead of --bits")
    measure = parser.add_argument_group("measuring")
    measure.add_argument(
        "--text", type=Path, metavar="FILE", help="for the perplexity; by default scikit-learn's"
    )
    measure.add_argument("--no-eval", action="store_true", help="only quantize and save")
    measure.add_argument("--layers", action="store_true", help="a line for each layer")


@dataclass
class Figures:
    """A model at one moment."""

    name: str
    size: int
    perplexity: float
    speed: float

    @classmethod
    def of(cls, name: str, model: nn.Module, windows: Tensor, *, perplexity_too: bool = True) -> Figures:
        value = perplexity(model, windows, f"perplexity, {name}") if perplexity_too else float("nan")
        size = sum(t.numel() * t.element_size() for t in _tensors(model))
        return cls(name, size, value, tokens_per_second(model, windows[0, :32]))

    def row(self) -> tuple[str, ...]:
        shown = "" if self.perplexity != self.perplexity else f"{self.perplexity:.3f}"
        return self.name, megabytes(self.size), shown, f"{self.speed:.1f}"


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers that are saved, a tied one once."""
    return list({t.data_ptr(): t for t in model.state_dict(keep_vars=True).values()}.values())


def run(args: argparse.Namespace) -> int:
    """The command; raises ValueError and the like where it cannot be done, with nothing written."""
    windows = before = None
    with progress(1, f"loading {args.model}") as bar:
        model, tokenizer = load_language_model(args.model)
        bar.advance()
    if not args.no_eval:
        text = None if args.text is None else args.text.read_text(encoding="utf-8")
        windows = text_windows(lambda t: tokenizer(t, return_tensors="pt").input_ids[0], text)
        before = compare(model, windows)
    config = _config(args, model)
    report = quantize_(model, config)
    if args.layers:
        report.table()
    else:
        print(report)
    if args.out is not None:
        print(f"saved to {save(model, args.out, tokenizer=tokenizer)}")
    if windows is not None and before is not None:
        show([*before, Figures.of(f"{report.bits:.2f} bits", model, windows)])
    return 0


def compare(model: nn.Module, windows: Tensor) -> list[Figures]:
    """The model as it is, and in bfloat16, which is what decoding is compared with."""
    figures = [Figures.of(str(_dtype(model)).removeprefix("torch."), model, windows)]
    if _dtype(model) is torch.float32:
        half = copy.deepcopy(model).bfloat16()
        figures.append(Figures.of("bfloat16", half, windows, perplexity_too=False))
    return figures


def show(figures: list[Figures], title: str = "") -> None:
    table(title, ("", "size", "perplexity", "tokens/s"), [figure.row() for figure in figures])


def _dtype(model: nn.Module) -> torch.dtype:
    return next(t.dtype for t in model.parameters() if t.is_floating_point())


def _config(args: argparse.Namespace, model: nn.Module) -> HiggsConfig:
    fields: dict[str, Any] = {
        "p": args.p, "block_size": args.block_size, "seed": args.seed, "modules_to_not_convert": tuple(args.skip),
    }  # fmt: skip
    if args.plan is not None:
        return HiggsConfig.from_plan(
            BitPlan.from_dict(json.loads(args.plan.read_text(encoding="utf-8"))), **fields
        )
    if not args.dynamic:
        return HiggsConfig(bits=args.bits, **fields)
    plan = allocate_bits(
        _alphas(args, lambda: estimate_alphas(model, method="fisher", seed=args.seed)), None, args.bits
    )
    print(plan)
    return HiggsConfig.from_plan(plan, **fields)


def _alphas(args: argparse.Namespace, estimate: Callable[[], Alphas]) -> Alphas:
    if args.alphas is not None and args.alphas.exists():
        return Alphas.load(args.alphas)
    alphas = estimate()
    if args.alphas is not None:
        alphas.save(args.alphas)
    return alphas
