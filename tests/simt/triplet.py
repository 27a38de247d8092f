"""The raw ops of sample_triplet on CPU tensors, run by the emulated CUDA kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchlin.ops.triplet import _empty_batch

from .build import load


def _laid_out(t: Tensor, like: Tensor, dense: bool = False) -> Tensor:
    """t with samples that lie as those of `like`."""
    same = all(
        s < 2 or a == b for s, a, b in zip(t.shape[1:], t.stride()[1:], like.stride()[1:], strict=True)
    )
    if same and (not dense or t.shape[0] < 2 or t.stride(0) == t.numel() // t.shape[0]):
        return t
    return torch.empty_strided(t.shape, (like.stride(0), *like.stride()[1:]), dtype=t.dtype).copy_(t)


def _dims(out: Tensor) -> list[tuple[int, int]]:
    """(size, row-major step) of a sample's dimensions in memory's order; none if that is the row-major one."""
    shape, strides = out.shape[1:], out.stride()[1:]
    steps = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    found = sorted(
        ((stride, size, step) for stride, size, step in zip(strides, shape, steps, strict=True) if size > 1),
        reverse=True,
    )
    dims = [(size, step) for _, size, step in found]
    return [] if all(step == stride for stride, _, step in found) else dims


def _call(
    x: Tensor,
    out: Tensor,
    grad: Tensor | None,
    eps: float,
    eps_at: Tensor | None,
    seed: Tensor,
    ball: bool,
    low: float | None,
    high: float | None,
) -> Any:
    batch, size = x.shape[0], math.prod(x.shape[1:])
    eps_step, run = 0, max(size, 1)
    if eps_at is not None:  # one for each element: those that are shared are the CPU tests' business
        shape = (eps_at.shape[0], *x.shape[1:])
        eps_at = torch.empty_strided(shape, out.stride(), dtype=eps_at.dtype).copy_(eps_at)
        eps_step, run = (0 if shape[0] == 1 else size), 1
    call = load("triplet").make(
        batch,
        size,
        x.data_ptr(),
        x.stride(0),
        out.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        eps,
        0 if eps_at is None else eps_at.data_ptr(),
        eps_step,
        run,
        _dims(out),
        int(seed),
        ball,
        low,
        high,
    )
    return call, (x, out, grad, eps_at)  # the tensors have to live as long as the call


def forward(x, eps, eps_at, seed, ball, low, high) -> tuple[Tensor, Tensor]:
    x = x.detach().resolve_neg()
    out = _empty_batch(x, 3 * x.shape[0]).fill_(torch.nan)
    mix = torch.full(
        x.shape[:1], torch.nan, dtype=torch.float64 if x.dtype is torch.float64 else torch.float32
    )
    call, _alive = _call(_laid_out(x, out), out, None, eps, eps_at, seed, ball, low, high)
    getattr(load("triplet"), f"forward_{str(x.dtype).removeprefix('torch.')}")(call, mix.data_ptr())
    return out, mix


def backward(grad, x, eps, eps_at, seed, ball, low, high) -> Tensor:
    x, grad = x.detach().resolve_neg(), grad.detach().resolve_neg()
    dx = _empty_batch(x, x.shape[0]).fill_(torch.nan)
    call, _alive = _call(
        _laid_out(x, dx), dx, _laid_out(grad, dx, dense=True), eps, eps_at, seed, ball, low, high
    )
    getattr(load("triplet"), f"backward_{str(x.dtype).removeprefix('torch.')}")(call)
    return dx
