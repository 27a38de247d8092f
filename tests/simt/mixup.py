"""The raw ops of mixup and cutmix on CPU tensors, run by the emulated CUDA kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchlin.ops._checks import compute_dtype

from .build import load


def _run(kernel: str, dtype: torch.dtype, *args: Any) -> None:
    getattr(load("mixup"), f"{kernel}_{str(dtype).removeprefix('torch.')}")(*args)


def _like(t: Tensor, out: Tensor) -> Tensor:
    """t in the layout of `out`, which torch.empty_like made."""
    t = t.detach().resolve_neg()
    return t if t.stride() == out.stride() else torch.empty_like(out).copy_(t)


def _geometry(out: Tensor) -> tuple[int, int, int]:
    """(outer, batch, inner), as csrc/mixup/job.h has them."""
    batch = out.shape[0]
    inner = out.stride(0) if batch > 1 else out.numel()
    return out.numel() // (batch * inner), batch, inner


def _mixup(x: Tensor, lam: float, lams: Tensor | None, perm: Tensor, backward: bool) -> Tensor:
    out = torch.empty_like(x.detach()).fill_(torch.nan)
    if x.numel():
        dense = _like(x, out)
        weights = 0 if lams is None else lams.data_ptr()
        _run(
            "mixup",
            x.dtype,
            _geometry(out),
            dense.data_ptr(),
            out.data_ptr(),
            perm.data_ptr(),
            lam,
            weights,
            backward,
        )
    return out


def forward(x, lam, lams, perm) -> Tensor:
    return _mixup(x, lam, lams, perm, False)


def backward(grad, lam, lams, perm) -> Tensor:
    return _mixup(grad, lam, lams, perm, True)


def lam_backward(grad: Tensor, x: Tensor, perm: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], dtype=compute_dtype(x.dtype))
    if x.numel():
        own = _like(x, torch.empty_like(x.detach()))
        slopes = _like(grad, own)
        _run(
            "lam_backward",
            x.dtype,
            _geometry(own),
            slopes.data_ptr(),
            own.data_ptr(),
            out.data_ptr(),
            perm.data_ptr(),
        )
    return out


def _image(out: Tensor) -> tuple[int, int, int, int, int] | None:
    """(planes, height, between, width, depth); None where the batch is not outermost or memory runs along columns."""
    height, width = out.shape[-2:]
    depth = out.stride(-1) if width > 1 else 1
    line = depth * width
    between, rest = divmod(out.stride(-2), line) if height > 1 else (1, 0)
    sample = out[0].numel()
    if rest or not between or (out.shape[0] > 1 and out.stride(0) != sample):
        return None
    planes, rest = divmod(sample, line * between * height)
    return None if rest else (planes, height, between, width, depth)


def _cutmix(x: Tensor, perm: Tensor, boxes: Tensor, backward: bool) -> Tensor:
    result = torch.empty_like(x.detach())
    if not x.numel():
        return result
    out = result.fill_(torch.nan)
    if (image := _image(out)) is None:
        out = torch.full(x.shape, torch.nan, dtype=x.dtype)
        image = _image(out)
    dense = _like(x, out)
    step = 0 if boxes.numel() == 4 else 4
    addresses = dense.data_ptr(), out.data_ptr(), perm.data_ptr(), boxes.data_ptr()
    _run("cutmix", x.dtype, x.shape[0], image, *addresses, step, backward)
    assert math.prod(image) == x[0].numel()
    return result if out is result else result.copy_(out)


def cut_forward(x, perm, boxes) -> Tensor:
    return _cutmix(x, perm, boxes, False)


def cut_backward(grad, perm, boxes) -> Tensor:
    return _cutmix(grad, perm, boxes, True)
