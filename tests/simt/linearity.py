"""The raw ops of the three-point loss, run by their CUDA kernels on the emulator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simt.build import load

SEED = 1


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _step(t: Tensor | None) -> int:
    return 1 if t is not None and t.dim() else 0


class _Call:
    """A job of these arguments, and the tensors that it points to."""

    def __init__(
        self,
        a: Tensor,
        target: Tensor,
        mix: Tensor,
        b: Tensor | None = None,
        c: Tensor | None = None,
        others: Tensor | None = None,
        lam: Tensor | None = None,
        weight: Tensor | None = None,
        smoothing: float = 0.0,
        ignore_index: int = -100,
        penalty: int = 0,
        beta: float = 1.0,
        reduction: int = 1,
    ) -> None:
        if a.dtype is not torch.float32:
            raise RuntimeError(f"linearity: expected float32, got {a.dtype}")
        z = a.chunk(3) if b is None or c is None else (a, b, c)
        # As op.cu: rows keep their step where their elements are neighbours.
        z = [row.detach() if row.stride(1) == 1 else row.detach().contiguous() for row in z]
        dense = lambda t: None if t is None else t.detach().contiguous()  # noqa: E731
        target, mix, others, lam, weight = map(dense, (target, mix, others, lam, weight))
        self.kept, self.reduction, self.like = (z, target, mix, others, lam, weight), reduction, a
        self.samples, self.classes = target.shape[0], a.shape[1]
        soft = target.is_floating_point()
        self.module = load("linearity")
        self.job: Any = self.module.Job(
            self.samples,
            self.classes,
            [row.data_ptr() for row in z],
            [row.stride(0) for row in z],
            [0 if soft else target.data_ptr(), _address(others)],
            _address(lam),
            _step(lam),
            target.data_ptr() if soft else 0,
            mix.data_ptr(),
            _step(mix),
            _address(weight),
            smoothing,
            ignore_index,
            penalty,
            beta,
        )

    def new(self, *shape: int) -> Tensor:
        return torch.full(shape, torch.nan)

    def value(self) -> Tensor:
        return self.new(*(() if self.reduction else (self.samples,)))

    def run(self, value: Tensor | None) -> None:
        self.module.run(self.job, self.reduction, _address(value), SEED)


def fwd(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    value, losses = call.value(), call.new(3, call.samples)
    call.job.outputs(losses.data_ptr(), 0, 0)
    call.run(value)
    return value, losses


def fwd_grad(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(*arguments)
    value, dlogits, dmix = call.value(), call.new(3 * call.samples, call.classes), call.new(call.samples)
    call.job.outputs(0, dlogits.data_ptr(), dmix.data_ptr())
    call.run(value)
    return value, dlogits, dmix


def bwd(grad_value: Tensor | None, grad_losses: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    grads = [None if g is None else g.contiguous() for g in (grad_value, grad_losses)]
    dlogits, dmix = call.new(3 * call.samples, call.classes), call.new(call.samples)
    call.job.outputs(0, dlogits.data_ptr(), dmix.data_ptr())
    call.job.gradients(_address(grads[0]), _step(grads[0]), _address(grads[1]))
    call.run(None)
    return dlogits, dmix


def scale(rows: Tensor, by: Tensor) -> None:
    step = by.stride(0) if by.dim() else 0
    load("linearity").scale(rows.data_ptr(), rows.shape[1], by.data_ptr(), step, rows.shape[0] // 3, SEED)
