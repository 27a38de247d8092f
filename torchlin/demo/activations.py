"""Swaps the activation of a real language model by name: the same logits, and what its activations cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

import torchlin
from torchlin import _library
from torchlin._console import progress, table
from torchlin.benchmarks.harness import Case, HostTimer, interleave, over
from torchlin.demo import _smollm2
from torchlin.functional import activation, gated_activation

ACT, MLP = "*.act_fn", "*.mlp"  # what transformers calls them in models of Llama's kind
LOGITS = 1e-4  # of the largest logit: more than rounding changes in 30 layers, less than any word notices
PERPLEXITY = 5e-5  # relative change that four digits do not show
OTHERS = ("quick_gelu", "mish", "tanhexp", "gelu_tanh", "hardswish", "relu")
ROUNDS = 3


def run() -> None:
    """The stop: measure, swap by name, measure again."""
    model, encode = _smollm2.load()
    windows = _smollm2.text_windows(encode)

    before = measure(model, windows, "measuring the model")
    after: dict[str, Measured] = {}
    was: dict[str, dict[str, nn.Module]] = {}
    swaps: dict[str, dict[Any, Any]] = {"silu": {ACT: "silu"}, "swiglu": {MLP: gated_mlp}}
    for name, swap in swaps.items():
        with swapped(model, swap) as was[name]:
            after[name] = measure(model, windows, f"measuring it with torchlin's {name}")

    print(f"SmolLM2-135M on {windows.numel()} tokens of scikit-learn's data-set descriptions")
    print(f"({_smollm2.NOTE})\n")
    kinds = ", ".join(sorted({type(module).__name__ for module in was["silu"].values()}))
    print(f'torchlin.swap_(model, {{"{ACT}": "silu"}})    # {len(was["silu"])} modules that were {kinds}')
    print(f'torchlin.swap_(model, {{"{MLP}": gated_mlp}})  # silu(gate) * up in one pass: "swiglu"\n')
    show_same(before, after)
    print()
    with one_thread():
        time_in_model(model, windows[:1])
        print()
        time_alone(model, windows[:1])
    print()
    show_others(model, windows[:2], before.first(2))

    for name, now in after.items():
        if not abs(now.perplexity / before.perplexity - 1) <= PERPLEXITY:
            raise RuntimeError(f"{name} changed the perplexity: {before.perplexity} to {now.perplexity}")
        if not now.change(before) <= LOGITS:
            raise RuntimeError(f"{name} changed a logit by {now.change(before):.1e} of the largest one")


class GatedMLP(nn.Module):
    """down(act(gate(x), up(x))), with the projections of an MLP of Llama's kind."""

    def __init__(self, mlp: Any, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x), self.up_proj(x)))


def gated_mlp(mlp: nn.Module) -> nn.Module:
    """An MLP of Llama's kind with activation and product in one pass."""
    return GatedMLP(mlp, torchlin.create("activation", "swiglu"))


@contextmanager
def swapped(model: Any, replacements: dict[Any, Any]) -> Iterator[dict[str, nn.Module]]:
    """With other modules inside the block; gives those that they replace."""
    old: Any = torchlin.swap_(model, replacements)
    try:
        yield old
    finally:
        torchlin.swap_(model, old)


# ---- what stays the same


@dataclass
class Measured:
    losses: list[float]  # a window each
    best: Tensor  # the most likely next token, (windows, tokens)
    logits: Tensor  # of the first window, (tokens, vocabulary)

    @property
    def perplexity(self) -> float:
        return math.exp(sum(self.losses) / len(self.losses))

    def first(self, windows: int) -> Measured:
        return Measured(self.losses[:windows], self.best[:windows], self.logits)

    def change(self, before: Measured) -> float:
        """The largest change of a logit, over the largest logit."""
        return float((self.logits - before.logits).abs().max() / before.logits.abs().max())

    def agreement(self, before: Measured) -> float:
        """For how many tokens the same next one is the most likely."""
        return float((self.best == before.best).double().mean())


@torch.inference_mode()
def measure(model: Any, windows: Tensor, what: str) -> Measured:
    losses: list[float] = []
    best: list[Tensor] = []
    logits: list[Tensor] = []
    for window in progress(list(windows), what):
        out = model(input_ids=window[None], labels=window[None], use_cache=False)
        losses.append(float(out.loss))
        best.append(out.logits[0].argmax(-1))
        logits = logits or [out.logits[0]]
    return Measured(losses, torch.stack(best), logits[0])


def show_same(before: Measured, after: dict[str, Measured]) -> None:
    rows = [["transformers", f"{before.perplexity:.4f}", "", ""]]
    rows += [
        [f"torchlin {name}", f"{m.perplexity:.4f}", f"{m.change(before):.1e}", f"{m.agreement(before):.2%}"]
        for name, m in after.items()
    ]
    table("", ["", "perplexity", "largest change of a logit / largest logit", "same next token"], rows)


# ---- what it costs


class InTwoSteps(nn.Module):
    """act(gate) * up, as transformers computes it."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act(gate) * up


@contextmanager
def one_thread() -> Iterator[None]:
    """CPU time of one thread is the same whatever else the machine does; the wall time of several is not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class Clock:
    """CPU time of this thread inside modules, in milliseconds: one list of calls for each forward."""

    forwards: list[list[float]] = field(default_factory=list)
    _started: float = 0.0

    @contextmanager
    def on(self, modules: list[nn.Module]) -> Iterator[None]:
        calls: list[float] = []

        def start(*_: object) -> None:
            self._started = time.thread_time()

        def stop(*_: object) -> None:
            calls.append((time.thread_time() - self._started) * 1e3)

        handles = [module.register_forward_pre_hook(start) for module in modules]
        handles += [module.register_forward_hook(stop) for module in modules]
        try:
            yield
        finally:
            self.forwards.append(calls)
            for handle in handles:
                handle.remove()

    @property
    def each(self) -> float:
        return median(ms for calls in self.forwards for ms in calls)

    @property
    def whole(self) -> float:
        return median(sum(calls) for calls in self.forwards)


@torch.inference_mode()
def time_in_model(model: Any, tokens: Tensor) -> None:
    """What the activations take inside of a forward over real text, before and after, in turn."""
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {
        "transformers": InTwoSteps,
        "torchlin silu": lambda act: InTwoSteps(torchlin.create("activation", "silu")),
        "torchlin swiglu": lambda act: torchlin.create("activation", "swiglu"),
    }
    silus, products, wholes = ({way: Clock() for way in ways} for _ in range(3))
    with progress(ROUNDS * len(ways), "timing the forward") as bar:
        for turn in range(ROUNDS + 1):
            for way, make in ways.items():
                # The first round warms up.
                alone, product, whole = (c[way] if turn else Clock() for c in (silus, products, wholes))
                with swapped(model, {MLP: lambda mlp, make=make: GatedMLP(mlp, make(mlp.act_fn))}):
                    acts = [layer.mlp.act for layer in model.model.layers]
                    inner = [act.act for act in acts if isinstance(act, InTwoSteps)]
                    with alone.on(inner), product.on(acts), whole.on([model]):
                        model(input_ids=tokens, use_cache=False)
                if turn:
                    bar.advance()
    rows = []
    for part, clocks in (("silu(gate)", silus), ("silu(gate) * up", products)):
        for way, clock in clocks.items():
            if clock.whole:
                share = f"{clock.whole / wholes[way].whole:.1%}"
                rows.append([part, way, len(acts), f"{clock.each:.3f}", f"{clock.whole:.1f}", share])
    rows += [
        ["forward", way, 1, f"{clock.each:.0f}", f"{clock.whole:.0f}", ""] for way, clock in wholes.items()
    ]
    table(
        f"inside the forward of {tokens.numel()} tokens, float32, 1 thread, CPU time, medians of {ROUNDS} forwards in turn",
        ["", "by", "calls", "ms a call", "ms in all", "of the forward"],
        rows,
    )


@torch.inference_mode()
def time_alone(model: Any, tokens: Tensor) -> None:
    """Times the activation of one layer's real inputs against torch's and a copy, in turn."""
    gate, up = _inputs_of(model.model.layers[len(model.model.layers) // 2].mlp, model, tokens)
    ours = "torchlin" if _library.has_kernel("cpu") else "torchlin without its kernels"
    out = torch.empty_like(gate)
    copied = Case("copy", lambda: out.copy_(gate), alloc="out=")
    groups = {
        "silu(gate)": [
            Case(ours, lambda: activation(gate, "silu")),
            Case("torch", lambda: silu(gate)),
            copied,
        ],
        "silu(gate) * up": [
            Case(ours, lambda: gated_activation(gate, up, "swiglu")),
            Case("torch", lambda: silu(gate) * up),
            copied,
        ],
    }
    rows = []
    timer = HostTimer()
    with progress(len(groups), "timing") as bar:
        for what, cases in groups.items():
            samples = interleave(cases, timer)
            for case in cases:
                ratio = over(samples[case.name], samples[ours]).median
                rows.append([what, case.name, f"{samples[case.name].median / 1e6:.3f}", f"{ratio:.2f}"])
            bar.advance()
    table(
        f"alone: {' x '.join(map(str, gate.shape))} float32 from mid-model, 1 thread, {timer.label}, medians of one run",
        ["", "by", "ms", "time over torchlin's"],
        rows,
    )


def _inputs_of(mlp: Any, model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What the activation of an MLP gets in a forward: the gate, and what is multiplied by it."""
    seen: list[Tensor] = []
    handles = [
        p.register_forward_hook(lambda *a: seen.append(a[2].clone())) for p in (mlp.gate_proj, mlp.up_proj)
    ]
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    gate, up = (x.flatten(0, -2) for x in seen)
    return gate, up


# ---- what another name does


def show_others(model: Any, windows: Tensor, before: Measured) -> None:
    """How far the perplexity moves where the model gets another activation than the one it was trained with."""
    rows = [["silu, its own", f"{before.perplexity:.2f}", ""]]
    for name in OTHERS:
        with swapped(model, {ACT: name}):
            now = measure(model, windows, f"measuring it with {name}")
        rows.append([name, f"{now.perplexity:.2f}", f"{now.agreement(before):.1%}"])
    table(
        f"another activation, nothing retrained, {windows.numel()} tokens",
        ["", "perplexity", "same next token"],
        rows,
    )
    print(
        "The weights were trained with silu: what moves tells how far a function is from it where this model"
    )
    print("uses it, and nothing about models that are trained with that function.")
