"""Grid quantization: encode, decode, and the linear layer on packed codes. References, fakes, autograd, public functions.

A grid is a table of n points of p coordinates. A row of numbers is cut into vectors of p, each stored as the index of a point
and, for a weight, one scale a block:

    W[o, i] = scales[o, i // block_size] · grid[code[o, i // p], i % p]

The last vector of a row may be ragged: coordinates that do not exist count as nothing.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlin import _library
from torchlin.ops._checks import can_look_at, check_float_tensor, compute_dtype, in_forward_mode, needs_grad
from torchlin.ops.grid_codes import (
    LARGEST_N,
    as_rows,
    check_codes,
    check_packed,
    code_dtype,
    grid_unpack_reference,
)

_raw: Any = torch.ops.torchlin
_CPU_KERNEL = _library.status()["cpu"].loaded

LARGEST_P = 8
_MATRIX_UNIT: bool = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
_MANY_ROWS, _STRIP = 256, 512
_LARGEST = 1e18  # its square, and the sum of eight, are float32 numbers
_PIECE = 1 << 22  # distances that the reference holds at a time


# ---- encode


def grid_encode(x: Tensor, grid: Tensor) -> Tensor:
    r"""The nearest grid point of every vector of p neighbours: :math:`\arg\min_i \sum_q (x_q - g_{iq})^2`.

    Args:
        x: (..., k), float32, float64, float16 or bfloat16, any strides. Distances are float32 (float64 for float64 x).
        grid: (n, p) float32 or float64, 2 <= n <= 65536, 1 <= p <= 8.

    Returns:
        Codes (..., ceil(k / p)), uint8 for n <= 256, else uint16. Of equally near points the first is
        taken. Not differentiable.

    Raises:
        TypeError: x or grid is no floating tensor of these dtypes.
        ValueError: a number of x is NaN, infinite or beyond 1e18 (distances would overflow), or the grid has another shape.

    Source: the encoder of any vector quantizer; its use on rotated weights is HIGGS, Malinovskii et al., "Pushing the limits
    of large language model quantization via the linearity theorem", 2024.

    Example:
        >>> import torch
        >>> grid = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> grid_encode(torch.tensor([0.6, -3.0, 0.5]), grid)  # 0.5 is as near to 0 as to 1
        tensor([2, 0, 1], dtype=torch.uint8)
    """
    x, grid = _check_encode(x, grid)
    if x.dtype is torch.float64 or not _library.has_kernel(x.device.type):
        return _encode(x, grid)
    rows = as_rows(x).contiguous()
    return _raw._grid_encode(rows, grid.contiguous()).view(*x.shape[:-1], -(-x.shape[-1] // grid.shape[1]))


def grid_encode_reference(x: Tensor, grid: Tensor) -> Tensor:
    """:func:`grid_encode` in plain torch."""
    return _encode(*_check_encode(x, grid))


def _check_encode(x: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """x and grid, both in what distances are computed in."""
    check_float_tensor("x", x)
    check_grid(grid)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a 0-dimensional tensor")
    if grid.device != x.device:
        raise ValueError(f"grid must be on x's device {x.device}, got {grid.device}")
    if can_look_at(x) and x.numel():
        low, high = (float(v) for v in torch.aminmax(x.detach()))
        if not (low >= -_LARGEST and high <= _LARGEST):  # NaN is not either
            raise ValueError(f"x must be finite, of at most {_LARGEST:g}, got values from {low} to {high}")
    compute = compute_dtype(x.dtype)
    return x.detach().to(compute), grid.detach().to(compute)


def _encode(x: Tensor, grid: Tensor) -> Tensor:
    (n, p), k = grid.shape, x.shape[-1]
    rows = as_rows(x)
    whole = rows[:, : k // p * p].reshape(rows.shape[0] * (k // p), p)
    codes = _nearest(whole, grid).view(rows.shape[0], k // p)
    if k % p:
        last = _nearest(rows[:, k // p * p :], grid[:, : k % p])
        codes = torch.cat((codes, last.unsqueeze(1)), 1)
    return codes.to(code_dtype(n)).view(*x.shape[:-1], codes.shape[1])


def _nearest(vectors: Tensor, grid: Tensor) -> Tensor:
    if vectors.is_meta or vectors.numel() == 0:
        return vectors.new_empty(vectors.shape[0], dtype=torch.int64)
    pieces = vectors.split(max(1, _PIECE // grid.shape[0]))
    return torch.cat([_distances(piece, grid).argmin(1) for piece in pieces])  # the first of equals


def _distances(vectors: Tensor, grid: Tensor) -> Tensor:
    """Squared distances (vectors, n), a coordinate after the other: no (vectors, n, p) in memory."""
    total = (vectors[:, :1] - grid[:, 0]).square()
    for q in range(1, grid.shape[1]):
        total += (vectors[:, q : q + 1] - grid[:, q]).square()
    return total


# ---- decode


def grid_decode(codes: Tensor, grid: Tensor, size: int | None = None) -> Tensor:
    """The grid points that codes stand for, side by side.

    Args:
        codes: integer tensor (..., c), each below n.
        grid: (n, p) float32 or float64.
        size: numbers in a row of the result, in ((c - 1)·p, c·p]; by default c·p.

    Returns:
        (..., size) of grid's dtype, differentiable in grid.

    Raises:
        TypeError: codes are no integers, or grid is no floating tensor of these dtypes.
        ValueError: a code is not below n, or size does not fit.

    Example:
        >>> import torch
        >>> grid_decode(torch.tensor([1, 0]), torch.tensor([[-1.0, 2.0], [0.5, 3.0]]), size=3)
        tensor([ 0.5000,  3.0000, -1.0000])
    """
    codes, size = _check_decode(codes, grid, size)
    if _by_reference(grid) or grid.dtype is not torch.float32:
        return _decode(codes, grid, size)
    points = _raw._grid_decode(codes.reshape(-1).contiguous(), grid.contiguous())
    return points.view(*codes.shape[:-1], -1 if points.numel() else codes.shape[-1] * grid.shape[1])[
        ..., :size
    ]


def grid_decode_reference(codes: Tensor, grid: Tensor, size: int | None = None) -> Tensor:
    """:func:`grid_decode` in plain torch."""
    codes, size = _check_decode(codes, grid, size)
    return _decode(codes, grid, size)


def _check_decode(codes: Tensor, grid: Tensor, size: int | None) -> tuple[Tensor, int]:
    n, p = check_grid(grid)
    codes = check_codes(codes, n)
    if grid.device != codes.device:
        raise ValueError(f"grid must be on codes' device {codes.device}, got {grid.device}")
    whole = codes.shape[-1] * p
    if size is None:
        return codes, whole
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"size must be an int or None, got {type(size).__name__}")
    if not max(whole - p, -1) < size <= whole:
        raise ValueError(
            f"size must be in ({max(whole - p, -1)}, {whole}] for {codes.shape[-1]} codes a row of {p} coordinates, "
            f"got {size}"
        )
    return codes, size


def _decode(codes: Tensor, grid: Tensor, size: int) -> Tensor:
    # Not grid[codes]: the gradient of that is not reproducible on CUDA.
    points = F.embedding(codes.to(torch.int64).clamp_max(grid.shape[0] - 1), grid)  # (..., c, p)
    return points.reshape(*codes.shape[:-1], codes.shape[-1] * grid.shape[1])[..., :size]


# ---- weights


def grid_dequantize(
    packed: Tensor, scales: Tensor, grid: Tensor, in_features: int, *, block_size: int | None = None
) -> Tensor:
    r"""The weight that packed codes and scales stand for: :math:`W_{oi} = s_{o, \lfloor i/g \rfloor} \, c_{oi}`.

    Args:
        packed: uint8 (out_features, bytes), codes as :func:`grid_pack` stores them.
        scales: (out_features, ceil(in_features / block_size)), float16, bfloat16, float32 or float64.
        grid: (n, p) float32 or float64.
        in_features: numbers in a row.
        block_size: neighbours g that share a scale; a multiple of p where there are several blocks. ``None``: the whole row.

    Returns:
        (out_features, in_features) float32 (float64 where scales or grid are), differentiable in scales and grid.

    Raises:
        TypeError: a dtype is none of these.
        ValueError: shapes do not fit each other.

    Example:
        >>> import torch
        >>> packed = grid_pack(torch.tensor([[1, 0, 2]]), 3)
        >>> grid_dequantize(packed, torch.tensor([[2.0]]), torch.tensor([[-1.0], [0.0], [1.0]]), 3)
        tensor([[ 0., -2.,  2.]])
    """
    block_size = _check_weight(packed, scales, grid, in_features, block_size)
    return _weight(packed, scales, grid, in_features, block_size)


def grid_dequantize_reference(
    packed: Tensor, scales: Tensor, grid: Tensor, in_features: int, *, block_size: int | None = None
) -> Tensor:
    """:func:`grid_dequantize` in plain torch."""
    block_size = _check_weight(packed, scales, grid, in_features, block_size)
    return _dequantize(packed, scales, grid, in_features, block_size)


def _check_weight(
    packed: Tensor, scales: Tensor, grid: Tensor, in_features: int, block_size: int | None
) -> int:
    """The block size; packed, scales and grid fit each other and a weight of in_features columns."""
    n, p = check_grid(grid)
    check_packed(packed, n, -(-in_features // p))
    check_float_tensor("scales", scales)
    if packed.dim() != 2:
        raise ValueError(f"packed must be (out_features, bytes), got shape {tuple(packed.shape)}")
    if block_size is None:
        block_size = max(in_features, 1)
    elif not isinstance(block_size, int) or isinstance(block_size, bool):
        raise TypeError(f"block_size must be an int or None, got {type(block_size).__name__}")
    elif block_size < 1 or (block_size < in_features and block_size % p):
        raise ValueError(
            f"block_size must be positive and, below in_features = {in_features}, a multiple of the grid's p = {p}, "
            f"got {block_size}"
        )
    shape = (packed.shape[0], -(-in_features // block_size))
    if scales.shape != shape:
        raise ValueError(
            f"scales must have shape {shape}, one for each block of {block_size}, got {tuple(scales.shape)}"
        )
    for name, tensor in (("scales", scales), ("grid", grid)):
        if tensor.device != packed.device:
            raise ValueError(f"{name} must be on packed's device {packed.device}, got {tensor.device}")
    return block_size


def _dequantize(packed: Tensor, scales: Tensor, grid: Tensor, in_features: int, block_size: int) -> Tensor:
    n, p = check_grid(grid)
    wide = torch.promote_types(compute_dtype(scales.dtype), grid.dtype)
    points = _decode(grid_unpack_reference(packed, n, -(-in_features // p)), grid.to(wide), in_features)
    return points * _a_scale_a_number(scales.to(wide), in_features, block_size)


def _a_scale_a_number(scales: Tensor, in_features: int, block_size: int) -> Tensor:
    if block_size >= in_features:
        return scales
    return scales.repeat_interleave(block_size, -1)[..., :in_features]


# ---- the linear layer


def grid_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    grid: Tensor,
    bias: Tensor | None = None,
    *,
    block_size: int | None = None,
) -> Tensor:
    r"""A linear layer on a weight of packed grid codes, :math:`y = x W^T + b`, without ever making W where x has few rows.

    Args:
        x: (..., in_features), float32, float16 or bfloat16 (float64 runs the reference), any strides.
        packed: uint8 (out_features, bytes), codes as :func:`grid_pack` stores them.
        scales: (out_features, ceil(in_features / block_size)), float16, bfloat16 or float32.
        grid: (n, p) float32, 2 <= n <= 65536, 1 <= p <= 8.
        bias: (out_features,), taken in x's dtype.
        block_size: neighbours g that share a scale; a multiple of p where there are several blocks. ``None``: the whole row.

    Returns:
        (..., out_features) of x's dtype, summed in float32 and rounded once; differentiable in x, scales, bias and grid. From
        256 rows of bfloat16 on, a CPU with a matrix unit (AMX) multiplies by the weight in bfloat16, with bits that depend on
        the number of threads, as those of torch's products do; all else has the same bits on any number.

    Raises:
        TypeError: a dtype is none of these.
        ValueError: shapes do not fit each other.

    Source: Malinovskii et al., "Pushing the limits of large language model quantization via the linearity theorem", 2024;
    the weight is the rotated one, and x is to be rotated alike (:class:`torchlin.nn.GridLinear` does).

    Example:
        >>> import torch
        >>> packed = grid_pack(torch.tensor([[1, 0, 2]]), 3)
        >>> grid = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> grid_linear(torch.tensor([[1.0, 2.0, 4.0]]), packed, torch.tensor([[2.0]]), grid)
        tensor([[4.]])
    """
    block_size = _check_linear(x, packed, scales, grid, bias, block_size)
    if torch.float64 in (x.dtype, scales.dtype, grid.dtype) or in_forward_mode() or needs_grad(grid):
        return _linear(x, packed, scales, grid, bias, block_size)
    if not _library.has_kernel(x.device.type):
        return _linear(x, packed, scales, grid, bias, block_size)
    rows = as_rows(x)
    if needs_grad(x, scales, bias):
        y = _GridLinear.apply(rows, packed, scales, grid, bias, block_size)
    else:
        y = run_linear(rows, packed, scales, grid, bias, block_size)
    return y.view(*x.shape[:-1], packed.shape[0])


def grid_linear_reference(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    grid: Tensor,
    bias: Tensor | None = None,
    *,
    block_size: int | None = None,
) -> Tensor:
    """:func:`grid_linear` in plain torch: the weight is made, then multiplied."""
    block_size = _check_linear(x, packed, scales, grid, bias, block_size)
    return _linear(x, packed, scales, grid, bias, block_size)


def _check_linear(
    x: Tensor, packed: Tensor, scales: Tensor, grid: Tensor, bias: Tensor | None, block_size: int | None
) -> int:
    check_float_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a 0-dimensional tensor")
    block_size = _check_weight(packed, scales, grid, x.shape[-1], block_size)
    if bias is not None:
        check_float_tensor("bias", bias)
        if bias.shape != (packed.shape[0],):
            raise ValueError(f"bias must have shape ({packed.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in (("packed", packed), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    return block_size


def _linear(
    x: Tensor, packed: Tensor, scales: Tensor, grid: Tensor, bias: Tensor | None, block_size: int
) -> Tensor:
    weight = _dequantize(packed, scales, grid, x.shape[-1], block_size)
    wide = torch.promote_types(compute_dtype(x.dtype), weight.dtype)
    bias = None if bias is None else bias.to(x.dtype).to(wide)
    with _without_autocast(x.device.type):
        return F.linear(x.to(wide), weight.to(wide), bias).to(x.dtype)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    if not torch.amp.is_autocast_available(device_type):  # meta
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def run_linear(
    rows: Tensor, packed: Tensor, scales: Tensor, grid: Tensor, bias: Tensor | None, block_size: int
) -> Tensor:
    """The raw op on arguments that are valid already: rows (b, in_features) -> (b, out_features)."""
    bias = None if bias is None else bias.to(rows.dtype).contiguous()
    weight = packed.contiguous(), kernel_scales(scales), grid.contiguous()
    if for_matrix_unit(rows):
        return _on_matrix_unit(rows, *weight, bias, block_size)
    return _raw._grid_linear(rows.contiguous(), *weight, bias, block_size)


def for_matrix_unit(rows: Tensor) -> bool:
    """Whether so many bfloat16 rows come that the CPU's matrix unit, which only torch drives, pays for making the weight.

    A layer of 4096 x 4096 on one thread with AMX: 128 rows take about the same either way, 512 a third.
    """
    return (
        _MATRIX_UNIT
        and rows.dtype is torch.bfloat16
        and rows.is_cpu
        and not torch.compiler.is_compiling()  # a graph is for any number of rows
        and rows.shape[0] >= _MANY_ROWS
    )


def _on_matrix_unit(
    rows: Tensor, packed: Tensor, scales: Tensor, grid: Tensor, bias: Tensor | None, block_size: int
) -> Tensor:
    """The weight is made a strip at a time, in bfloat16; sums are float32."""
    strips = []  # joined at the end: a write into one result is nothing that vmap could batch
    for at in range(0, packed.shape[0], _STRIP):
        strip = slice(at, at + _STRIP)
        weight = _raw._grid_dequantize(packed[strip], scales[strip], grid, rows.shape[1], block_size)
        strips.append(F.linear(rows, weight.to(rows.dtype), None if bias is None else bias[strip]))
    return torch.cat(strips, -1) if strips else rows.new_empty(rows.shape[0], 0)


def kernel_scales(scales: Tensor) -> Tensor:
    """Scales in a dtype that kernels read: float16 or float32."""
    return (scales if scales.dtype is torch.float16 else scales.float()).contiguous()


class _GridLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, packed, scales, grid, bias, block_size):
        return run_linear(x, packed, scales, grid, bias, block_size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, packed, scales, grid, bias, ctx.block_size = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.in_features, ctx.dtype = x.shape[-1], x.dtype
        # x is what takes memory: keep it only where the gradient of the scales asks for it.
        ctx.save_for_backward(x if scales.requires_grad else None, packed, scales, grid)

    @staticmethod
    def backward(ctx, grad):
        x, packed, scales, grid = ctx.saved_tensors
        block_size, wide = ctx.block_size, grad.to(compute_dtype(grad.dtype))
        grad_x = grad_scales = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = _weight(packed, scales, grid, ctx.in_features, block_size)
            grad_x = (wide @ weight.to(wide.dtype)).to(ctx.dtype)
        if x is not None and ctx.needs_input_grad[2]:
            ones = torch.ones_like(scales, dtype=torch.float32)
            points = _weight(packed, ones, grid, ctx.in_features, block_size)
            grad_scales = _sum_blocks(wide.mT @ x.to(wide.dtype) * points, block_size).to(scales.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
            grad_bias = wide.sum(0).to(ctx.bias_dtype)
        return grad_x, None, grad_scales, None, grad_bias, None


def _weight(packed: Tensor, scales: Tensor, grid: Tensor, in_features: int, block_size: int) -> Tensor:
    """grid_dequantize on arguments that are valid already: a traced backward can not look at a tensor's layout."""
    if _by_reference(scales, grid) or torch.float64 in (scales.dtype, grid.dtype):
        return _dequantize(packed, scales, grid, in_features, block_size)
    return _raw._grid_dequantize(
        packed.contiguous(), kernel_scales(scales), grid.contiguous(), in_features, block_size
    )


def _sum_blocks(x: Tensor, block_size: int) -> Tensor:
    """Sums over blocks of the last dimension, of which the last may be ragged."""
    x = F.pad(x, (0, -x.shape[-1] % min(block_size, max(x.shape[-1], 1))))
    return x.unflatten(-1, (-1, min(block_size, max(x.shape[-1], 1)))).sum(-1)


# ---- what the grid has to be


def check_grid(grid: object) -> tuple[int, int]:
    """(n, p) of a valid grid; a traced graph is specialised on them."""
    if not isinstance(grid, Tensor):
        raise TypeError(f"grid must be a torch.Tensor, got {type(grid).__name__}")
    if grid.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"grid must be float32 or float64, got {grid.dtype}")
    if grid.dim() != 2 or not 2 <= grid.shape[0] <= LARGEST_N or not 1 <= grid.shape[1] <= LARGEST_P:
        raise ValueError(
            f"grid must have shape (n, p) with 2 <= n <= {LARGEST_N} and 1 <= p <= {LARGEST_P}, "
            f"got {tuple(grid.shape)}"
        )
    return operator.index(grid.shape[0]), operator.index(grid.shape[1])


def _by_reference(*differentiable: Tensor) -> bool:
    """Whether plain torch runs: for a derivative, which it knows by itself, or where no kernel is."""
    return (
        needs_grad(*differentiable)
        or in_forward_mode()
        or not _library.has_kernel(differentiable[0].device.type)
    )


# ---- what torch has to know of the raw ops


def _fake_encode(x, grid):
    return x.new_empty((x.shape[0], -(-x.shape[1] // grid.shape[1])), dtype=code_dtype(grid.shape[0]))


def _fake_decode(codes, grid):
    return grid.new_empty((codes.shape[0], grid.shape[1]))


def _fake_dequantize(packed, scales, grid, in_features, block_size):
    return grid.new_empty((packed.shape[0], in_features))


def _fake_linear(x, packed, scales, grid, bias, block_size):
    return x.new_empty((x.shape[0], packed.shape[0]))


def _vmap_encode(info, in_dims, x, grid):
    if in_dims[1] is None:  # one call for the whole batch
        rows = x.movedim(in_dims[0], 0)
        codes = _raw._grid_encode(rows.flatten(0, 1).contiguous(), grid)
        return codes.unflatten(0, rows.shape[:2]), 0
    each = [_raw._grid_encode(*_each(i, in_dims, x, grid)) for i in range(info.batch_size)]
    return torch.stack(each), 0


def _vmap_decode(info, in_dims, codes, grid):
    if in_dims[1] is None:
        codes = codes.movedim(in_dims[0], 0)
        return _raw._grid_decode(codes.flatten(), grid).unflatten(0, codes.shape), 0
    each = [_raw._grid_decode(*_each(i, in_dims, codes, grid)) for i in range(info.batch_size)]
    return torch.stack(each), 0


def _vmap_dequantize(info, in_dims, packed, scales, grid, in_features, block_size):
    packed_dim, scales_dim, grid_dim, *_ = in_dims
    if packed_dim is grid_dim is None:  # scales multiply outside: the points are made once
        scales = scales.movedim(scales_dim, 0).float()
        points = _raw._grid_dequantize(packed, torch.ones_like(scales[0]), grid, in_features, block_size)
        return points * _a_scale_a_number(scales, in_features, block_size), 0
    dims = (packed_dim, scales_dim, grid_dim)
    weights = [
        _raw._grid_dequantize(*_each(i, dims, packed, scales, grid), in_features, block_size)
        for i in range(info.batch_size)
    ]
    return torch.stack(weights), 0


def _vmap_linear(info, in_dims, x, packed, scales, grid, bias, block_size):
    x_dim, packed_dim, scales_dim, grid_dim, bias_dim, _ = in_dims
    x = x.expand(info.batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
    if packed_dim is scales_dim is grid_dim is bias_dim is None:  # one call for the whole batch
        y = _raw._grid_linear(x.flatten(0, 1).contiguous(), packed, scales, grid, bias, block_size)
        return y.unflatten(0, x.shape[:2]), 0
    dims = (0, packed_dim, scales_dim, grid_dim, bias_dim)
    each = [_each(i, dims, x, packed, scales, grid, bias) for i in range(info.batch_size)]
    return torch.stack([_raw._grid_linear(*arguments, block_size) for arguments in each]), 0


def _each(i: int, dims: tuple[int | None, ...], *tensors: Tensor | None) -> list[Tensor | None]:
    """What the i-th call of a batch takes."""
    return [
        tensor if tensor is None or dim is None else tensor.select(dim, i).contiguous()
        for tensor, dim in zip(tensors, dims, strict=True)
    ]


def _register() -> None:
    torch.library.register_fake("torchlin::_grid_encode", _fake_encode)
    torch.library.register_fake("torchlin::_grid_decode", _fake_decode)
    torch.library.register_fake("torchlin::_grid_dequantize", _fake_dequantize)
    torch.library.register_fake("torchlin::_grid_linear", _fake_linear)
    torch.library.register_vmap("torchlin::_grid_encode", _vmap_encode)
    torch.library.register_vmap("torchlin::_grid_decode", _vmap_decode)
    torch.library.register_vmap("torchlin::_grid_dequantize", _vmap_dequantize)
    torch.library.register_vmap("torchlin::_grid_linear", _vmap_linear)


if _CPU_KERNEL:
    _register()
