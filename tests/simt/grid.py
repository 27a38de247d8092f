"""The raw ops of the grid family on CPU tensors, run by the emulated CUDA kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchlin.ops.grid_codes import code_dtype, packed_bytes

from .build import load

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _address(t: Tensor | None) -> int:
    assert t is None or t.is_contiguous()
    return 0 if t is None else t.data_ptr()


def _unwritten(*shape: int, dtype: torch.dtype) -> Tensor:
    """A result as a kernel finds it: what it leaves out shows."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else 0xA5, dtype=dtype)


@dataclass
class Device:
    """An emulated device; `plan` is that of the last linear layer."""

    seed: int = 0
    multiprocessors: int = 132
    shared_per_block: int = 227 * 1024
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def module(self) -> Any:
        return load("grid")

    def encode(self, x: Tensor, grid: Tensor) -> Tensor:
        (m, k), (n, p) = x.shape, grid.shape
        codes = _unwritten(m, -(-k // p), dtype=code_dtype(n))
        self.module.encode(_address(x), _address(grid), _address(codes), m, k, n, p, self.seed)
        return codes

    def decode(self, codes: Tensor, grid: Tensor) -> Tensor:
        n, p = grid.shape
        out = _unwritten(codes.shape[0], p, dtype=torch.float32)
        self.module.decode(_address(codes), _address(grid), _address(out), codes.shape[0], n, p, self.seed)
        return out

    def pack(self, codes: Tensor, n: int) -> Tensor:
        rows, count = codes.shape
        packed = _unwritten(rows, packed_bytes(n, count), dtype=torch.uint8)
        self.module.pack(_address(codes), _address(packed), rows, count, n, self.seed)
        return packed

    def unpack(self, packed: Tensor, n: int, count: int) -> Tensor:
        codes = _unwritten(packed.shape[0], count, dtype=code_dtype(n))
        self.module.unpack(_address(packed), _address(codes), packed.shape[0], count, n, self.seed)
        return codes

    def _weight(self, packed: Tensor, scales: Tensor, grid: Tensor, in_features: int, block_size: int) -> Any:
        assert scales.dtype in (torch.float16, torch.float32)
        half = scales.dtype is torch.float16
        addresses = _address(packed), _address(scales), half, _address(grid)
        return self.module.weight(*addresses, *grid.shape, packed.shape[0], in_features, block_size)

    def dequantize(
        self,
        packed: Tensor,
        scales: Tensor,
        grid: Tensor,
        in_features: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        rows = packed.shape[0]
        out = _unwritten(rows, in_features, dtype=dtype)
        weight = self._weight(packed, scales, grid, in_features, block_size)
        for first in range(0, rows, 64):  # as op.cu makes it: some rows at a time
            part = out[first : first + 64]
            self.module.dequantize(weight, first, len(part), TYPES[dtype], _address(part), self.seed)
        return out

    def linear(
        self, x: Tensor, packed: Tensor, scales: Tensor, grid: Tensor, bias: Tensor | None, block_size: int
    ) -> Tensor:
        y = _unwritten(x.shape[0], packed.shape[0], dtype=x.dtype)
        self.plan = {}
        if y.numel() == 0:
            return y
        weight = self._weight(packed, scales, grid, x.shape[1], block_size)
        self.plan = self.module.linear(
            weight, _address(x), _address(bias), _address(y), TYPES[x.dtype], x.shape[0],
            self.multiprocessors, self.shared_per_block, self.seed,
        )  # fmt: skip
        if self.plan["path"] == "dense":
            dense = self.dequantize(packed, scales, grid, x.shape[1], block_size, x.dtype)
            return torch.nn.functional.linear(x, dense, bias)
        return y


def emulated_kernels() -> dict[str, Callable[..., Any]]:
    """By name, for a mode that puts them in the place of the compiled ones."""
    device = Device()
    return {
        "_grid_encode": device.encode,
        "_grid_decode": device.decode,
        "_grid_pack": device.pack,
        "_grid_unpack": device.unpack,
        "_grid_dequantize": device.dequantize,
        "_grid_linear": device.linear,
    }
