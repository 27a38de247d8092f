"""Rotates a real language model and shows what changes, what does not, and what the transform costs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchlin import _library
from torchlin._console import progress, table
from torchlin.benchmarks.harness import Case, HostTimer, interleave, over
from torchlin.demo import _smollm2
from torchlin.functional import hadamard_transform
from torchlin.ops.hadamard_matrix import hadamard_matrix, hadamard_order
from torchlin.quant import rotate_
from torchlin.quant.evaluate import perplexity

DIGITS = 5e-5  # relative change of the perplexity that four digits do not show
EXACT = 1e-9  # relative change of float64 logits that rounding stays far below, even in 30 layers


def run() -> None:
    """The stop: measure, rotate, measure again."""
    model, encode = _smollm2.load()
    windows = _smollm2.text_windows(encode)

    in_float64 = logits_change_float64(model, windows[:1])
    before = measure(model, windows, "measuring the model")
    logits = logits_of(model, windows[:1])
    with progress(1, "rotating the model") as bar:
        report = rotate_(model)
        bar.advance()
    after = measure(model, windows, "measuring the rotated model")
    in_float32 = change(logits_of(model, windows[:1]), logits)

    print(report, end=".\n\n")
    print(f"SmolLM2-135M on {windows.numel()} tokens of scikit-learn's data-set descriptions")
    print(f"({_smollm2.NOTE})")
    table(
        "", ["", "before", "after"], [["perplexity", f"{before.perplexity:.4f}", f"{after.perplexity:.4f}"]]
    )
    print(
        f"\nlargest change of a logit, over the largest logit: {in_float32:.1e} in float32, "
        f"{in_float64:.1e} in float64\n"
    )
    show_streams(before.streams, after.streams)
    print()
    timings(before.rows)

    if not abs(after.perplexity / before.perplexity - 1) <= DIGITS:
        raise RuntimeError(f"the rotation changed the perplexity: {before.perplexity} to {after.perplexity}")
    if not in_float64 <= EXACT:
        raise RuntimeError(f"the rotation changed float64 logits by {in_float64:.1e}: more than rounding")


# ---- what stays the same


@torch.inference_mode()
def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def change(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def logits_change_float64(model: nn.Module, tokens: Tensor) -> float:
    """How far the rotation moves the logits of a float64 copy: rounding apart, not at all."""
    with progress(4, "rotating a float64 copy") as bar:
        wide: Any = copy.deepcopy(model).double()
        bar.advance()
        for module in list(wide.modules()):  # transformers' RMSNorm computes in float32 whatever it is given
            for name, norm in module.named_children():
                if type(norm).__name__.endswith("RMSNorm"):
                    exact = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                    exact.weight = norm.weight
                    setattr(module, name, exact)
        logits = logits_of(wide, tokens)
        bar.advance()
        rotate_(wide)
        bar.advance()
        changed = change(logits_of(wide, tokens), logits)
        bar.advance()
    return changed


# ---- what changes


@dataclass
class Stream:
    """Running figures of the residual stream at one place, each taken over the channels of a token."""

    peak: float = 0.0  # max |x| / RMS of the worst token
    largest: float = 0.0
    kurtosis_sum: float = 0.0
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        rows = x.flatten(0, -2).double()  # (tokens, channels)
        power = rows.square().mean(-1)
        tops = rows.abs().amax(-1)
        self.peak = max(self.peak, float((tops / power.sqrt()).max()))
        self.largest = max(self.largest, float(tops.max()))
        self.kurtosis_sum += float((rows.pow(4).mean(-1) / power.square()).sum())
        self.tokens += len(rows)

    @property
    def kurtosis(self) -> float:
        return self.kurtosis_sum / self.tokens


@dataclass
class Measured:
    perplexity: float
    streams: dict[str, Stream]
    rows: Tensor  # the stream in mid-model, (tokens, channels)


@dataclass
class Watch:
    """Sees the residual stream where each layer and the last norm take it."""

    streams: dict[str, Stream] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)

    @contextmanager
    def on(self, model: Any) -> Iterator[Watch]:
        norms = [layer.input_layernorm for layer in model.model.layers]
        places = {f"layer {i}": norm for i, norm in enumerate(norms)} | {"head": model.model.norm}
        middle = f"layer {len(norms) // 2}"

        def see(name: str, x: Tensor) -> None:
            self.streams.setdefault(name, Stream()).add(x)
            if name == middle:
                self.kept.append(x.clone())

        handles = [
            norm.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
            for name, norm in places.items()
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def measure(model: nn.Module, windows: Tensor, what: str) -> Measured:
    """Perplexity, and what the residual stream was in the same forwards."""
    with Watch().on(model) as watch:
        value = perplexity(model, windows, what)
    return Measured(value, watch.streams, torch.cat(watch.kept).flatten(0, -2))


def show_streams(before: dict[str, Stream], after: dict[str, Stream]) -> None:
    def cells(was: Stream, now: Stream) -> list[str]:
        pairs = (was.peak, now.peak), (was.kurtosis, now.kurtosis), (was.largest, now.largest)
        return [f"{value:.1f}" for pair in pairs for value in pair]

    table(
        "residual stream over the channels of a token: max |x| / RMS and max |x| of the worst token; "
        "mean kurtosis (a Gaussian has 3)",
        ["input of", "max/RMS before", "after", "kurtosis before", "after", "max |x| before", "after"],
        [[name, *cells(before[name], after[name])] for name in before],
    )


# ---- what it costs


def timings(rows: Tensor) -> None:
    """Times the transform of these rows against x @ H, pure torch and a copy: in turn, one thread."""
    n = rows.shape[-1]
    k, p = hadamard_order(n)
    x = rows.clone()  # no inference tensor any more
    threads = torch.get_num_threads()
    h = hadamard_matrix(n, dtype=x.dtype)
    out = torch.empty_like(x)
    name = "torchlin" if _library.has_kernel("cpu") else "torchlin without its kernels"
    ours = Case(name, lambda: hadamard_transform(x, 1.0, out=out))
    dense = Case("x @ H", lambda: torch.mm(x, h.mT, out=out))
    copied = Case("copy", lambda: out.copy_(x))
    in_torch = [_batched_gemms(x, out, k, p), _transposed_gemms(x, out, k, p)]
    wanted = torch.mm(x, h.mT)
    for case in (ours, dense, *in_torch):
        case.calls[0]()
        if not change(out, wanted) <= 1e-5:
            raise RuntimeError(f"{case.name} is off the transform of order {n} by {change(out, wanted):.1e}")
    torch.set_num_threads(1)
    try:
        with progress(1, "timing") as bar:
            samples = interleave([ours, dense, *in_torch, copied], HostTimer())
            bar.advance()
    finally:
        torch.set_num_threads(threads)

    best = min(in_torch, key=lambda case: samples[case.name].median)
    lines = []
    for case in (ours, best, dense, copied):
        took = samples[case.name]
        rate = 2 * x.numel() * x.element_size() / took.median  # one read and one write
        ratio = over(took, samples[ours.name]).median
        title = f"best pure torch: {case.name}" if case is best else case.name
        lines.append([title, f"{took.median / 1e6:.2f}", f"{rate:.1f}", f"{ratio:.2f}"])
    table(
        f"order {n} = {k} * {p}, {len(x)} x {n} float32 rows from mid-model, 1 thread, medians of one run",
        ["", "ms", "GB/s", "time over torchlin's"],
        lines,
    )


def _batched_gemms(x: Tensor, out: Tensor, k: int, p: int) -> Case:
    """H_K ⊗ H_P as two GEMMs, the second one a small one for every row."""
    slow, fast = (hadamard_matrix(size, dtype=x.dtype) for size in (k, p))
    slow, between = slow.expand(len(x), k, k), torch.empty_like(x)

    def call() -> None:
        torch.mm(x.view(-1, p), fast.mT, out=between.view(-1, p))
        torch.bmm(slow, between.view(-1, k, p), out=out.view(-1, k, p))

    return Case(f"a GEMM of {p}, then a batch of {k}", call)


def _transposed_gemms(x: Tensor, out: Tensor, k: int, p: int) -> Case:
    """H_K ⊗ H_P as two large GEMMs, with a transposition before and after the second."""
    slow, fast = (hadamard_matrix(size, dtype=x.dtype) for size in (k, p))
    between, turned, product = (torch.empty_like(x) for _ in range(3))

    def call() -> None:
        torch.mm(x.view(-1, p), fast.mT, out=between.view(-1, p))
        turned.view(-1, p, k).copy_(between.view(-1, k, p).mT)
        torch.mm(turned.view(-1, k), slow.mT, out=product.view(-1, k))
        out.view(-1, k, p).copy_(product.view(-1, p, k).mT)

    return Case(f"GEMMs of {p} and {k}, transposed between", call)
