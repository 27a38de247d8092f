"""What a linear layer on grid codes is measured against: torch's own quantized products, and packages from PyPI."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[Tensor], Tensor]
GROUP = 128  # numbers that share a scale, where a rival has such


def _affine(weight: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest between each group's minimum and maximum: codes, scales, minima, (out, groups, group)."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / (levels - 1)).clamp_min(1e-9)
    return ((groups - low) / scale).round().clamp(0, levels - 1), scale, low


def torch_int4(weight: Tensor) -> Run:
    """aten's 4-bit product, bfloat16: w = (code - 8) · scale + zero."""
    codes, scale, low = _affine(weight, 16)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).to(torch.int32), 1)
    both = torch.stack((scale.squeeze(-1), (low + 8 * scale).squeeze(-1)), -1)  # (out, groups, 2)
    both = both.transpose(0, 1).contiguous().bfloat16()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x: product(x, packed, GROUP, both)


def torch_int8(weight: Tensor) -> Run:
    """aten's 8-bit product, bfloat16, one scale a row."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(1e-9)
    codes, scales = (weight / scale).round().to(torch.int8), scale.squeeze(1).bfloat16()
    product = torch.ops.aten._weight_int8pack_mm
    return lambda x: product(x, codes, scales)


def bitsandbytes_nf4(weight: Tensor) -> Run:
    bnb: Any = importlib.import_module("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", module=layer)
    layer = layer.to("cpu")
    layer(torch.zeros(1, weight.shape[1], dtype=torch.bfloat16))
    return layer


def _torchao(weight: Tensor, config: Any) -> Run:
    quantize_: Any = importlib.import_module("torchao.quantization").quantize_
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(weight)
    holder = nn.Sequential(layer)
    quantize_(holder, config)
    return holder


def torchao_int4(weight: Tensor) -> Run:
    module: Any = importlib.import_module("torchao.prototype.quantization.int4")
    return _torchao(weight, module.PrototypeInt4WeightOnlyConfig(group_size=GROUP))


def torchao_int8(weight: Tensor) -> Run:
    return _torchao(weight, importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())


# (name, bits, how to make a layer of a weight); all take bfloat16.
RIVALS: list[tuple[str, int, Callable[[Tensor], Run]]] = [
    ("torch int4", 4, torch_int4),
    ("torch int8", 8, torch_int8),
    ("bitsandbytes NF4", 4, bitsandbytes_nf4),
    ("torchao int4", 4, torchao_int4),
    ("torchao int8", 8, torchao_int8),
]


def rivals(weight: Tensor) -> tuple[dict[str, tuple[int, Run]], dict[str, str]]:
    """Layers of the weight by those that work here, and why the others do not."""
    found, missing = {}, {}
    x = torch.randn(2, weight.shape[1]).bfloat16()
    exact = x.float() @ weight.T
    for name, bits, make in RIVALS:
        try:
            with torch.no_grad():
                run = make(weight)
                error = float((run(x).float() - exact).norm() / exact.norm())
            if not error < 0.2:
                raise RuntimeError(f"its result is off by {error:.2g}")
            found[name] = (bits, run)
        except Exception as error:  # somebody else's compiled package may fail in any way
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found, missing
