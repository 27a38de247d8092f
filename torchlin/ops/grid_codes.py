"""Codes of grid points as a bit stream: the storage that every device reads, and its exact size.

A row of codes, integers below n, becomes a little-endian stream of words: bit i of the stream is bit i % 8 of byte i // 8.
Where n is a power of two a word is one code. Elsewhere a few codes share a word as the digits of a number to the base n
(first code least significant), which costs less than rounding each code up to whole bits: two codes below 88 take 13 bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchlin import _library
from torchlin.ops._checks import can_look_at

_raw: Any = torch.ops.torchlin
_CPU_KERNEL = _library.status()["cpu"].loaded

LARGEST_N = 1 << 16
_MOST_DIGITS = 4


def code_layout(n: int) -> tuple[int, int]:
    """(codes in a word, bits of a word) for codes below n.

    Raises:
        TypeError: n is no int.
        ValueError: n is not in [2, 65536].

    Example:
        >>> code_layout(256), code_layout(88), code_layout(830)
        ((1, 8), (2, 13), (4, 39))
    """
    _check_n(n)
    if n & (n - 1) == 0:
        return 1, n.bit_length() - 1
    best, best_width = 1, _width(n, 1)
    for digits in range(2, _MOST_DIGITS + 1):
        width = _width(n, digits)
        if width * best < best_width * digits:  # fewer bits a code
            best, best_width = digits, width
    return best, best_width


def _width(n: int, digits: int) -> int:
    return (n**digits - 1).bit_length()


def packed_bytes(n: int, count: int) -> int:
    """Bytes of a row of `count` packed codes below n."""
    digits, width = code_layout(n)
    return (-(-count // digits) * width + 7) // 8


def code_dtype(n: int) -> torch.dtype:
    """The dtype of unpacked codes below n."""
    return torch.uint8 if n <= 256 else torch.uint16


def grid_pack(codes: Tensor, n: int) -> Tensor:
    """Pack codes, integers below n, as tightly as whole words allow.

    Args:
        codes: integer tensor (..., count), each 0 <= code < n.
        n: number of grid points, 2 to 65536.

    Returns:
        uint8 tensor (..., packed_bytes(n, count)): a bit stream a row, see :mod:`torchlin.ops.grid_codes`.

    Raises:
        TypeError: codes are no integers.
        ValueError: n is not in [2, 65536], or a code is not below n.

    Example:
        >>> import torch
        >>> grid_pack(torch.tensor([[1, 2, 3]]), 16)
        tensor([[33,  3]], dtype=torch.uint8)
    """
    codes = check_codes(codes, n)
    if not _library.has_kernel(codes.device.type):
        return _pack(codes, n)
    rows = as_rows(codes).contiguous()
    return _raw._grid_pack(rows, n).view(*codes.shape[:-1], packed_bytes(n, rows.shape[1]))


def grid_unpack(packed: Tensor, n: int, count: int) -> Tensor:
    """The codes that :func:`grid_pack` packed.

    Args:
        packed: uint8 tensor (..., packed_bytes(n, count)).
        n: number of grid points, 2 to 65536.
        count: codes in a row.

    Returns:
        Codes (..., count), uint8 for n <= 256, else uint16. What can not be a code below n reads as n - 1.

    Raises:
        TypeError: packed is not uint8.
        ValueError: n is not in [2, 65536], or the rows have another length.

    Example:
        >>> import torch
        >>> grid_unpack(torch.tensor([33, 3], dtype=torch.uint8), 16, 3)
        tensor([1, 2, 3], dtype=torch.uint8)
    """
    check_packed(packed, n, count)
    if not _library.has_kernel(packed.device.type):
        return _unpack(packed, n, count)
    rows = as_rows(packed).contiguous()
    return _raw._grid_unpack(rows, n, count).view(*packed.shape[:-1], count)


def grid_pack_reference(codes: Tensor, n: int) -> Tensor:
    """:func:`grid_pack` in plain torch."""
    return _pack(check_codes(codes, n), n)


def grid_unpack_reference(packed: Tensor, n: int, count: int) -> Tensor:
    """:func:`grid_unpack` in plain torch."""
    check_packed(packed, n, count)
    return _unpack(packed, n, count)


def _pack(codes: Tensor, n: int) -> Tensor:
    digits, width = code_layout(n)
    count = codes.shape[-1]
    codes = torch.nn.functional.pad(codes.to(torch.int64), (0, -count % digits)).unflatten(-1, (-1, digits))
    powers = torch.tensor([n**i for i in range(digits)], dtype=torch.int64, device=codes.device)
    words = (codes * powers).sum(-1, keepdim=True)  # (..., words, 1)
    bits = (words >> torch.arange(width, device=codes.device) & 1).flatten(-2)  # (..., words · width)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def _unpack(packed: Tensor, n: int, count: int) -> Tensor:
    digits, width = code_layout(n)
    words = -(-count // digits)
    bits = packed.to(torch.int64).unsqueeze(-1) >> torch.arange(8, device=packed.device) & 1
    bits = bits.flatten(-2)[..., : words * width].unflatten(-1, (words, width))
    values = (bits << torch.arange(width, device=packed.device)).sum(-1, keepdim=True)  # (..., words, 1)
    powers = torch.tensor([n**i for i in range(digits)], dtype=torch.int64, device=packed.device)
    codes = torch.div(values, powers, rounding_mode="floor")
    codes = torch.cat(
        (codes[..., :-1] % n, codes[..., -1:].clamp_max(n - 1)), -1
    )  # the last digit may be too large
    return codes.flatten(-2)[..., :count].to(code_dtype(n))


def check_codes(codes: object, n: int, name: str = "codes") -> Tensor:
    """The codes as uint8 or uint16, whatever integers they came as."""
    _check_n(n)
    if not isinstance(codes, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(codes).__name__}")
    if codes.is_floating_point() or codes.is_complex() or codes.dtype is torch.bool:
        raise TypeError(f"{name} must be integers, got {codes.dtype}")
    if codes.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, got a 0-dimensional tensor")
    dtype = code_dtype(n)
    if codes.dtype is dtype and n in (256, LARGEST_N):
        return codes
    if can_look_at(codes) and codes.numel():  # kernels read what is too large as the last point
        low, high = (int(v) for v in torch.aminmax(codes.to(torch.int64)))
        if low < 0 or high >= n:
            raise ValueError(
                f"{name} must be in [0, {n - 1}] for a grid of {n} points, got {low if low < 0 else high}"
            )
    return codes.to(dtype)


def check_packed(packed: object, n: int, count: int, name: str = "packed") -> None:
    _check_n(n)
    if not isinstance(packed, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(packed).__name__}")
    if packed.dtype is not torch.uint8:
        raise TypeError(f"{name} must be uint8, got {packed.dtype}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    if packed.dim() == 0 or packed.shape[-1] != packed_bytes(n, count):
        raise ValueError(
            f"{name} must hold {packed_bytes(n, count)} bytes a row for {count} codes below {n}, "
            f"got shape {tuple(packed.shape)}"
        )


def _check_n(n: object) -> None:
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"n must be an int, got {type(n).__name__}")
    if not 2 <= n <= LARGEST_N:
        raise ValueError(f"n must be in [2, {LARGEST_N}], got {n}")


def as_rows(x: Tensor) -> Tensor:
    """(rows, size of the last dimension); of a size 0 too, where reshape(-1, 0) could not tell the rows."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _fake_pack(codes, n):
    return codes.new_empty((codes.shape[0], packed_bytes(n, codes.shape[1])), dtype=torch.uint8)


def _fake_unpack(packed, n, count):
    return packed.new_empty((packed.shape[0], count), dtype=code_dtype(n))


def _vmap_pack(info, in_dims, codes, n):
    codes = codes.movedim(in_dims[0], 0)
    return _raw._grid_pack(codes.flatten(0, 1).contiguous(), n).unflatten(0, codes.shape[:2]), 0


def _vmap_unpack(info, in_dims, packed, n, count):
    packed = packed.movedim(in_dims[0], 0)
    return _raw._grid_unpack(packed.flatten(0, 1).contiguous(), n, count).unflatten(0, packed.shape[:2]), 0


if _CPU_KERNEL:
    torch.library.register_fake("torchlin::_grid_pack", _fake_pack)
    torch.library.register_fake("torchlin::_grid_unpack", _fake_unpack)
    torch.library.register_vmap("torchlin::_grid_pack", _vmap_pack)
    torch.library.register_vmap("torchlin::_grid_unpack", _vmap_unpack)
