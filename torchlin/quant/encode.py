"""A weight to codes and scales, and one layer to its quantized twin."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from torchlin.functional import grid_decode, grid_encode, grid_pack, hadamard_transform
from torchlin.nn.grid import GridBank, GridEmbedding, GridLinear, GridWeight, as_float16, check_sizes
from torchlin.nn.hadamard import HadamardTransform

if TYPE_CHECKING:
    from torchlin.quant.grids import Grid

# Rows are taken in pieces of about this many weights: what is needed beside a weight and its codes stays small.
_PIECE = 1 << 20


@dataclass(frozen=True, eq=False)
class Encoded:
    """A weight as codes, scales and signs."""

    codes: Tensor  # uint8 (rows, bytes)
    scales: Tensor  # float16, or float32 where they do not fit; (rows, blocks)
    signs: Tensor | None  # int8 (columns,)
    block_size: int
    hadamard_size: int
    error: float  # ||W - What||² / ||W||², 0 for a weight of zeros


def random_signs(size: int, seed: int) -> Tensor:
    """±1 (size,), int8: those of ``HadamardTransform(size, randomized=True, seed=seed)``."""
    return HadamardTransform(size, block_size=1, randomized=True, seed=seed).signs.to(torch.int8)  # type: ignore[union-attr]


@torch.no_grad()
def encode_weight(
    weight: Tensor,
    grid: Grid,
    *,
    block_size: int | None = None,
    signs: bool = True,
    seed: int = 0,
    scale_refit: bool = True,
) -> Encoded:
    r"""Rotate a weight's rows, scale them to unit variance block by block, and take the nearest grid points.

    .. math:: w' = H (s \circ w) / \sqrt h, \quad c = \mathrm{nearest}(w' / \sigma), \quad
              \sigma \leftarrow \langle w', c \rangle / \langle c, c \rangle

    with the first :math:`\sigma` the root mean square of w' in the block. Blocks of zeros get scale 0. Arithmetic is float32.

    Args:
        weight: (rows, columns), floating, finite.
        grid: made for coordinates of a standard normal distribution.
        block_size: neighbours in a row that share a scale, and the order of the transform; see
            :class:`torchlin.nn.GridLinear`.
        signs: flip signs at random, by `seed`, before the transform.
        scale_refit: the last step above, least squares.

    Raises:
        ValueError: sizes do not fit, or the weight has NaN or infinite numbers.
    """
    columns = weight.shape[1]
    block_size, hadamard_size = check_sizes(columns, grid.p, block_size, None)
    factors = random_signs(columns, seed).to(weight.device) if signs and hadamard_size > 1 else None
    points = grid.points.to(weight.device)
    pieces = [
        _encode_rows(piece, points, block_size, hadamard_size, factors, scale_refit)
        for piece in weight.detach().split(max(1, _PIECE // max(columns, 1)))
    ]
    codes, exact, error, cross, norm, total = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    if not bool(exact.isfinite().all()):
        raise ValueError("weight has numbers that are too large for float32 scales")
    scales = as_float16(exact.float())
    # What rounding a scale adds: |w - (σ + d) c|² = |w - σ c|² - 2 d <w - σ c, c> + d² |c|².
    rounding = scales.double() - exact
    error = (error - 2 * rounding * cross + rounding.square() * norm).sum() / total.sum()
    return Encoded(codes, scales, factors, block_size, hadamard_size, float(error.nan_to_num()))


def _encode_rows(
    weight: Tensor,
    points: Tensor,
    block_size: int,
    hadamard_size: int,
    signs: Tensor | None,
    scale_refit: bool,
) -> tuple[Tensor, ...]:
    """Packed codes, and a block: scale σ, |w - σ c|², <w - σ c, c>, |c|² and |w|², in float64."""
    for wide in (torch.float32, torch.float64):  # squares of very large or small numbers need the range
        w = weight.to(wide)
        if hadamard_size > 1:
            factors = None if signs is None else signs.to(wide)
            w = hadamard_transform(w, block_size=hadamard_size, signs=factors)
        blocks = w.unflatten(-1, (-1, block_size))  # (rows, blocks, g)
        total = blocks.square().sum(-1)
        if wide is torch.float64 or bool(((total > _TINY) & (total < _HUGE)).all()):
            break
        if not bool(total.isfinite().all()) or bool((blocks[total <= _TINY] != 0).any()):
            continue
        break
    scale = (total / block_size).sqrt()
    z = blocks / torch.where(total > 0, scale, 1).unsqueeze(-1)
    codes = grid_encode(z.flatten(-2).float(), points)
    c = grid_decode(codes, points, weight.shape[1]).view_as(blocks).to(wide)
    norm, inner = c.square().sum(-1), (blocks * c).sum(-1)
    if scale_refit:
        scale = torch.where((norm > 0) & (inner > 0), inner / norm, scale)
    scale = torch.where(total > 0, scale, 0)
    error = (blocks - scale.unsqueeze(-1) * c).square_().sum(-1)
    cross = inner.double() - scale.double() * norm.double()
    packed = grid_pack(codes, len(points))
    return packed, scale.double(), error.double(), cross, norm.double(), total.double()


_TINY, _HUGE = 1e-30, 1e30


# ---- layers


def quantize_linear(
    linear: nn.Module, grid: Grid, twin: GridWeight | None = None, **options: Any
) -> tuple[GridLinear, float]:
    """A GridLinear in the place of an nn.Linear or a Conv1D of transformers, and its relative squared error.

    With a twin, a layer that was quantized from the same weight, its codes are taken (and the error is 0).
    """
    transposed = is_conv1d(linear)
    weight: Any = linear.weight.mT if transposed else linear.weight
    encoded = encode_weight(weight, grid, **options) if twin is None else _codes_of(twin)
    sizes = _sizes(encoded, grid, weight)
    new = GridLinear(weight.shape[1], weight.shape[0], bias=False, **sizes)
    new.transposed = transposed
    new.bias = linear.bias  # type: ignore[assignment]
    return _filled(new, encoded, linear), encoded.error


def quantize_embedding(
    embedding: nn.Embedding, grid: Grid, twin: GridWeight | None = None, **options: Any
) -> tuple[GridEmbedding, float]:
    """A GridEmbedding in the place of an nn.Embedding, and its relative squared error; twin as of quantize_linear."""
    weight = embedding.weight
    encoded = encode_weight(weight, grid, **options) if twin is None else _codes_of(twin)
    sizes = _sizes(encoded, grid, weight)
    new = GridEmbedding(weight.shape[0], weight.shape[1], embedding.padding_idx, **sizes)
    return _filled(new, encoded, embedding), encoded.error


def _codes_of(layer: GridWeight) -> Encoded:
    return Encoded(layer.codes, layer.scales, layer.signs, layer.block_size, layer.hadamard_size, 0.0)


def quantize_bank(weights: Tensor, transposed: bool, grid: Grid, **options: Any) -> tuple[GridBank, float]:
    """A GridBank in the place of a 3-D parameter of experts' weights, and its relative squared error."""
    experts = [weight.mT if transposed else weight for weight in weights.detach()]
    encoded = [encode_weight(weight, grid, **options) for weight in experts]
    scales = [e.scales for e in encoded]
    if any(s.dtype is torch.float32 for s in scales):
        scales = [s.float() for s in scales]
    whole = replace(encoded[0], codes=torch.stack([e.codes for e in encoded]), scales=torch.stack(scales))
    new = GridBank(len(experts), *experts[0].shape, transposed=transposed, **_sizes(whole, grid, weights))
    norms = torch.stack([weight.double().square().sum() for weight in experts])
    errors = torch.tensor([e.error for e in encoded], dtype=torch.float64, device=norms.device)
    error = float(((errors * norms).sum() / norms.sum()).nan_to_num())
    return _filled(new, whole, None), error


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the Conv1D of transformers' GPT-2: a linear layer that stores its weight transposed."""
    known = sys.modules.get("transformers.pytorch_utils")  # a model that has one has imported it
    return known is not None and type(module) is known.Conv1D


def _sizes(encoded: Encoded, grid: Grid, weight: Tensor) -> dict[str, Any]:
    return {
        "grid": grid,
        "block_size": encoded.block_size,
        "hadamard_size": encoded.hadamard_size,
        "signs": encoded.signs,
        "device": "meta",  # codes and scales come in a moment
        "dtype": weight.dtype,
    }


_Layer = TypeVar("_Layer", bound=GridWeight)


def _filled(new: _Layer, encoded: Encoded, old: nn.Module | None) -> _Layer:
    new.codes, new.scales = encoded.codes, encoded.scales
    new.signs = encoded.signs
    return new if old is None else new.train(old.training)
