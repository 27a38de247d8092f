"""The raw ops of activations on CPU tensors, run by the emulated CUDA kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .build import load

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SLOTS = 8  # the bit of `needs`


def _described(t: Tensor | None) -> tuple[int, list[int]]:
    return (0, []) if t is None else (t.data_ptr(), list(t.stride()))


@dataclass
class Device:
    """An emulated device; `launches` is what the last call launched."""

    seed: int = 0
    shared_per_block: int = 227 * 1024
    limit: int = 1 << 30  # elements of a launch
    launches: list[dict[str, Any]] = field(default_factory=list)

    def run(
        self,
        inputs,
        kernel,
        slots,
        lengths,
        channel_dim,
        split,
        split_dim,
        outputs,
        grad=None,
        slot_grads=None,
    ) -> None:
        sizes = list(inputs[0].shape)
        if split:
            sizes[split_dim] //= 2
        assert slots is None or (slots.dtype == torch.float32 and slots.is_contiguous())
        self.launches = load("activation").run(
            kernel, TYPES[inputs[0].dtype], sizes, grad is not None, [_described(t) for t in inputs], _described(grad),
            [_described(t) for t in outputs], split, split_dim, _described(slots)[0],
            1 if slots is None else slots.shape[1], channel_dim, list(lengths), _described(slot_grads)[0],
            self.seed, self.shared_per_block, self.limit,
        )  # fmt: skip

    def fwd(self, inputs, kernel, slots, lengths, channel_dim, split, split_dim) -> Tensor:
        if split:
            sizes = list(inputs[0].shape)
            sizes[split_dim] //= 2
            out = torch.full(sizes, torch.nan, dtype=inputs[0].dtype)
        else:
            out = torch.full_like(inputs[0], torch.nan)
        self.run(inputs, kernel, slots, lengths, channel_dim, split, split_dim, [out])
        return out

    def out(self, inputs, kernel, slots, lengths, channel_dim, split, split_dim, out) -> None:
        self.run(inputs, kernel, slots, lengths, channel_dim, split, split_dim, [out])

    def plain(self, x, kernel, slots=None) -> Tensor:
        return self.fwd([x], kernel, slots, [1] * (0 if slots is None else slots.shape[0]), 0, 0, 0)

    def bwd(self, grad, inputs, kernel, slots, lengths, channel_dim, split, split_dim, needs) -> list[Tensor]:
        outputs = [torch.full_like(t, torch.nan) if needs >> i & 1 else None for i, t in enumerate(inputs)]
        slot_grads = None
        if needs & SLOTS:
            fill = torch.nan if inputs[0].numel() else 0.0
            slot_grads = torch.full_like(slots, fill)
        arguments = (inputs, kernel, slots, lengths, channel_dim, split, split_dim)
        self.run(*arguments, outputs, grad=grad, slot_grads=slot_grads)
        return [t for t in (*outputs, slot_grads) if t is not None]


def raw_ops() -> dict[str, Callable[..., Any]]:
    """By name, for a mode that puts them in the place of the compiled ones. float64 has no CUDA kernel: those are the CPU's."""
    device = Device()
    raw: Any = torch.ops.torchlin

    def either(name: str, emulated: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            first = next(
                t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)
            )
            return (emulated if first.dtype in TYPES else getattr(raw, name).default)(*args, **kwargs)

        return call

    ops = {"_activation": device.plain, "_activation_fwd": device.fwd, "_activation_out": device.out}
    return {name: either(name, op) for name, op in {**ops, "_activation_bwd": device.bwd}.items()}
