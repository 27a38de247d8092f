"""Which Hadamard orders exist here, and the matrices themselves.

An order n = K·2^k is served as H_K ⊗ H_{2^k}, with the smallest K that one of the constructions gives.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from torchlin.ops.hadamard_constructions import (
    COSETS,
    TURYN_TYPE,
    WILLIAMSON,
    coset_rows,
    miyamoto,
    paley_1,
    paley_2,
    prime_power,
    sylvester,
    turyn_type,
    williamson,
)

# H_K is dense: beyond this order (256 MiB of int8) it is no factor of a fast transform.
LARGEST_CORE = 1 << 14

_F = TypeVar("_F", bound=Callable[..., Any])


def _constant(function: _F) -> _F:
    """As torch.compiler.assume_constant_result, without its import of the compiler: never traced into."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def hadamard_matrix(
    n: int, *, dtype: torch.dtype = torch.int8, device: torch.device | str | None = None
) -> Tensor:
    """The Hadamard matrix of order n that the transform multiplies by: ±1 entries, H @ H.T = n·I.

    Args:
        n: order: 1, 2, or a multiple of 4 that a construction here reaches.
        dtype: any signed dtype.
        device: where the result is put; torch's default device if None.

    Returns:
        A new (n, n) tensor, H_K ⊗ H_{2^k} with (K, 2^k) = ``hadamard_order(n)`` and H_{2^k} Sylvester's.

    Raises:
        TypeError: n is no integer, or dtype is unsigned.
        ValueError: there is no matrix of this order here; the message names the orders that there are.

    Source: see :func:`construction`.

    Example:
        >>> h = hadamard_matrix(12, dtype=torch.float32)
        >>> torch.equal(h @ h.T, 12 * torch.eye(12))
        True
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_signed:
        raise TypeError(f"dtype must be a signed torch.dtype, one that has -1, got {dtype}")
    core, fast = hadamard_order(n)
    h = torch.kron(core_matrix(core), sylvester(fast))
    return h.to(torch.get_default_device() if device is None else device, dtype)


def hadamard_order(n: int) -> tuple[int, int]:
    """The factors (K, 2^k) of an order n = K·2^k, with the smallest K whose H_K can be constructed here.

    K is 1 for a power of two, otherwise a multiple of 4.

    Raises:
        TypeError: n is no integer.
        ValueError: there is no such K; the message names the nearest orders and the largest divisor with one.

    Example:
        >>> hadamard_order(11008)
        (172, 64)
    """
    try:
        n = operator.index(n)
    except TypeError:
        raise TypeError(f"n must be an int, got {type(n).__name__}") from None
    return _order(n)


@_constant
def _order(n: int) -> tuple[int, int]:
    factors = _factors(n)
    if factors is None:
        raise ValueError(_unsupported(n))
    return factors


@_constant
def core_matrix(k: int) -> Tensor:
    """H_K as an int8 CPU tensor, made once and shared by all callers: clone it before you write to it.

    Equal to ``hadamard_matrix(k)``.

    Raises:
        ValueError: no matrix of order K can be constructed here.

    Example:
        >>> core_matrix(12).shape
        torch.Size([12, 12])
    """
    return _cached_core(*hadamard_order(k))


@functools.cache
def _cached_core(core: int, fast: int) -> Tensor:
    # The cache outlives the call: an ordinary tensor, even if the first caller traces or infers.
    with _disable_current_modes(), torch.inference_mode(False):
        return torch.kron(_rule(core).build(), sylvester(fast))


def construction(k: int) -> str:
    """How H_K comes about, in words; "Sylvester" for a power of two.

    The rules, first come first served:

    ===========  =========================================  =========================================
    name         orders                                     source
    ===========  =========================================  =========================================
    Sylvester    2^k                                        Sylvester 1867
    Paley II     2(q + 1), q = 1 mod 4; symmetric           Paley, "On orthogonal matrices", 1933
    Paley I      q + 1, q = 3 mod 4                         Paley 1933
    Williamson   92, 116, 156, 172                          Williamson 1944
    Turyn type   188, 236, 260, 428                         Turyn 1974; Kharaghani, Tayfeh-Rezaie 2005
    Cosets       268                                        Sawade 1985
    Kronecker    products of two of these                   Sylvester 1867
    Miyamoto     4q, q = 1 mod 4 with a matrix of q - 1     Miyamoto 1991
    ===========  =========================================  =========================================

    q stands for a prime power.

    Raises:
        ValueError: no matrix of order K can be constructed here.

    Example:
        >>> construction(20), construction(428)
        ('Paley II, q=9', 'Turyn type, n=36')
    """
    core, fast = hadamard_order(k)
    name = _rule(core).name
    return name if 1 in (core, fast) else f"{name}, times Sylvester of order {fast}"


class _Rule(NamedTuple):
    name: str
    build: Callable[[], Tensor]


@functools.cache
def _factors(n: int) -> tuple[int, int] | None:
    """(K, 2^k) of n, or None."""
    if n < 1:
        return None
    odd = n // (n & -n)
    k = 1 if odd == 1 else 4 * odd
    while n % k == 0 and k <= LARGEST_CORE:
        if _find_rule(k):
            return k, n // k
        k *= 2
    return None


def _rule(k: int) -> _Rule:
    rule = _find_rule(k)
    assert rule is not None
    return rule


@functools.cache
def _find_rule(k: int) -> _Rule | None:
    """The first construction that gives order K, other than doubling a smaller one."""
    if k == 1:
        return _Rule("Sylvester", partial(sylvester, 1))
    if k % 4:
        return None
    t, q = k // 4, k // 2 - 1
    if q % 4 == 1 and prime_power(q):
        return _Rule(f"Paley II, q={q}", partial(paley_2, q))
    if prime_power(k - 1):
        return _Rule(f"Paley I, q={k - 1}", partial(paley_1, k - 1))
    if t in WILLIAMSON:
        return _Rule(f"Williamson, t={t}", partial(williamson, t))
    if t % 3 == 2 and (t + 1) // 3 in TURYN_TYPE:
        return _Rule(f"Turyn type, n={(t + 1) // 3}", partial(turyn_type, (t + 1) // 3))
    if t in COSETS:
        return _Rule(f"Cosets, t={t}", partial(coset_rows, t))
    for a in range(12, math.isqrt(k) + 1, 4):
        if k % a == 0 and _find_rule(a) and _find_rule(k // a):
            return _Rule(f"Kronecker, {a} x {k // a}", partial(_product, a, k // a))
    if t % 4 == 1 and prime_power(t) and _factors(t - 1):
        return _Rule(f"Miyamoto, q={t}", lambda: miyamoto(t, core_matrix(t - 1)))
    return None


def _product(a: int, b: int) -> Tensor:
    return torch.kron(core_matrix(a), core_matrix(b))


def _unsupported(n: int) -> str:
    if n < 1:
        return f"n must be a positive order, got {n}"
    if n % 4:
        why = "a Hadamard matrix has order 1, 2 or a multiple of 4"
    else:
        k = 4 * (n // (n & -n))
        why = f"no construction here gives an H_K, K <= {LARGEST_CORE}, of {k} times a power of two"
    below = next(m for m in range(n - 1, 0, -1) if _factors(m))
    above = next(m for m in itertools.count(n + 1) if _factors(m))
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    block = next(d for d in [n // d for d in small] + small[::-1] if _factors(d))
    blocks = (
        f"block_size={block} is its largest supported divisor"
        if block > 1
        else "no divisor above 1 is supported"
    )
    return (
        f"order n={n} has no Hadamard matrix here: {why}. "
        f"Nearest supported orders: {below} and {above}; to keep {n}, transform in blocks: {blocks}"
    )
