"""Hadamard matrices by rule: Sylvester, Paley, Williamson, Goethals-Seidel, Miyamoto.

Each function returns a new int8 CPU matrix of ±1. Only a few sign sequences, found by searches, are stored.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Four sign sequences a, b, c, d in one string: a hexadecimal digit holds the signs of a, b, c, d at one
# position, a in the highest bit, 1 for minus.

# First rows of symmetric circulants of order t, positions 0 ... (t-1)/2.
WILLIAMSON = {
    5: "0de",
    7: "0bde",
    23: "048be28de1b1",  # M. Hall, "Combinatorial Theory"; order 92 is first in Baumert, Golomb, Hall 1962
    29: "0b742b7178b2844",  # our own search; order 116 is first in Baumert 1966
    39: "011be4d2debbd7de24be",  # this and 43: N. J. A. Sloane, "A library of Hadamard matrices"
    43: "08db12882747d2d144b17b",
}
# Turyn-type sequences X, Y, Z of length n and W of length n - 1 (the last digit's lowest bit means nothing).
TURYN_TYPE = {
    16: "0000778e52de5562",  # this, 20 and 22: Best, Đoković, Kharaghani, Ramp 2013
    20: "000038e2739c7a0b6952",
    22: "00000f702c71a9ad565962",
    36: "060989975b685d8fc80750b21c0212eceb2c",  # Kharaghani, Tayfeh-Rezaie 2005
}
# First rows of circulants of prime order t that do not change when positions are multiplied by a subgroup of
# (Z/t)*: the signs at 0 and on the cosets g^i · subgroup, i = 0, 1, ... {t: (g, number of cosets, signs)}
COSETS = {
    67: (2, 22, "76bad9f14062e867d574931"),  # our own search; order 268 is first in Sawade 1985
}


def sylvester(n: int) -> Tensor:
    """J. J. Sylvester, "Thoughts on inverse orthogonal matrices", 1867: H_2n = [[H, H], [H, -H]]."""
    h = _ones(1, 1)
    while len(h) < n:
        h = _block([[h, h], [h, -h]])
    return h


def paley_1(q: int) -> Tensor:
    """Order q + 1, prime power q = 3 mod 4: I + S, S skew.

    R. E. A. C. Paley, "On orthogonal matrices", 1933.
    """
    return _eye(q + 1) + _conference(q)


def paley_2(q: int) -> Tensor:
    """Order 2(q + 1), prime power q = 1 mod 4: S ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]], symmetric.

    R. E. A. C. Paley, "On orthogonal matrices", 1933.
    """
    two, other = _tensor([[1, 1], [1, -1]]), _tensor([[1, -1], [-1, -1]])
    return torch.kron(_conference(q), two) + torch.kron(_eye(q + 1), other)


def williamson(t: int) -> Tensor:
    """Order 4t from four symmetric circulants with A² + B² + C² + D² = 4t·I.

    J. Williamson, "Hadamard's determinant theorem and the sum of four squares", 1944.
    """
    half = _signs(WILLIAMSON[t])
    a, b, c, d = map(_circulant, torch.cat([half, half[:, 1:].flip(1)], 1))
    return _block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def turyn_type(n: int) -> Tensor:
    """Order 4(3n - 1) from Turyn-type sequences of length n.

    The non-periodic autocorrelations of X, Y and twice those of Z, W cancel; so do those of the base
    sequences (Z,W), (Z,-W), X, Y, and the rows below are signed sums of the T-sequences that these give.
    R. J. Turyn, "Hadamard matrices, Baumert-Hall units, four-symbol sequences, ...", 1974;
    H. Kharaghani, B. Tayfeh-Rezaie, "A Hadamard matrix of order 428", 2005.
    """
    x, y, z, w = _signs(TURYN_TYPE[n])
    w = w[:-1]
    return _goethals_seidel([torch.cat(row) for row in ((z, w, x), (z, w, -x), (z, -w, y), (z, -w, -y))])


def coset_rows(t: int) -> Tensor:
    """Order 4t, t prime, from four circulants that the multiplication by a subgroup of (Z/t)* leaves alone.

    K. Sawade, "A Hadamard matrix of order 268", 1985.
    """
    generator, cosets, digits = COSETS[t]
    at = [0] * t  # which sign stands at each position
    element = 1
    for power in range(t - 1):
        at[element] = 1 + power % cosets
        element = element * generator % t
    return _goethals_seidel(_signs(digits)[:, at])


def miyamoto(q: int, h: Tensor) -> Tensor:
    """Order 4q, prime power q = 1 mod 4, from a Hadamard matrix h of order q - 1.

    M. Miyamoto, "A construction of Hadamard matrices", 1991, arranged anew:
    U = diag(Q', Q'), where Q' holds χ(a - b) for the squares, then the non-squares of GF(q), and
    V = [[I, h], [-hᵀ, I]] fill each other's zeros. V Vᵀ = q·I. U Uᵀ = q·I - 2·J on each set of (q - 1)/2
    rows, 0 between them; the border, made of two 4×4 matrices s, w whose rows all have inner products ±2,
    makes up for J.
    """
    residues = _residues(q)
    squares_first = residues[1:, 0].argsort(descending=True, stable=True) + 1
    core = residues[squares_first][:, squares_first]
    zero, one = torch.zeros_like(core), _eye(q - 1)
    u, v = _block([[core, zero], [zero, core]]), _block([[one, h], [-h.T, one]])
    s, w = sylvester(4), _ones(4, 4) - 2 * _eye(4)
    # A row of Q' sums to -1 (squares) or 1 (non-squares) over its own set, to 0 over the other.
    x = s @ w.T // 2 * _tensor([1, -1, 1, -1])
    half = (q - 1) // 2
    top, left = torch.kron(x, _ones(1, half)), torch.kron(w, _ones(half, 1))
    return _block([[s, top, top], [left, u + v, u - v], [left, u - v, u + v]])


@functools.cache
def prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    e = round(math.log(q, p))
    return (p, e) if p**e == q else None


def _goethals_seidel(rows: Sequence[Tensor] | Tensor) -> Tensor:
    """Any four circulants, given by their first rows, with A Aᵀ + B Bᵀ + C Cᵀ + D Dᵀ = 4t·I.

    J. M. Goethals, J. J. Seidel, "A skew Hadamard matrix of order 36", 1970.
    """
    a, b, c, d = map(_circulant, rows)
    br, cr, dr = b.flip(1), c.flip(1), d.flip(1)  # times the exchange matrix R
    btr, ctr, dtr = b.T.flip(1), c.T.flip(1), d.T.flip(1)
    return _block([[a, br, cr, dr], [-br, a, dtr, -ctr], [-cr, -dtr, a, btr], [-dr, ctr, -btr, a]])


def _conference(q: int) -> Tensor:
    """S of order q + 1 with zero diagonal and S Sᵀ = q·I; symmetric for q = 1 mod 4, else skew."""
    sign = 1 if q % 4 == 1 else -1
    return _block([[_tensor([[0]]), sign * _ones(1, q)], [_ones(q, 1), _residues(q)]])


def _residues(q: int) -> Tensor:
    """χ(a - b) over GF(q), (q, q): Q Qᵀ = q·I - J, rows sum to 0."""
    p, e = prime_power(q) or (0, 0)
    chi = _tensor(_characters(p, e)).reshape([p] * e)
    digits = torch.arange(p, device="cpu")
    difference = (digits[:, None] - digits) % p
    # One subtraction table a digit, broadcast over the axes (a's digits, b's digits).
    tables = [difference.reshape([p if axis % e == i else 1 for axis in range(2 * e)]) for i in range(e)]
    return chi[tuple(tables)].reshape(q, q)


def _characters(p: int, e: int) -> list[int]:
    """χ(a) for each a of GF(p^e): 0 at 0, 1 at the other squares, -1 elsewhere.

    An element is a polynomial over GF(p), numbered Σ coefficient_i · p^i. The search is for a rule
    x^e = Σ rule_i · x^i under which the powers of x run through all non-zero elements (for e = 1, x is then a
    primitive root); the even powers are the squares.
    """
    q = p**e
    for rule in itertools.product(range(p), repeat=e):
        chi = [0] * q
        element, sign = [1] + [0] * (e - 1), 1
        for _ in range(q - 1):
            number = sum(c * p**i for i, c in enumerate(element))
            if number == 0 or chi[number]:
                break
            chi[number], sign = sign, -sign
            top = element[-1]
            element = [(c + top * r) % p for c, r in zip([0, *element[:-1]], rule, strict=True)]
        else:
            return chi
    raise AssertionError(f"every finite field has a primitive element, GF({q}) too")


def _circulant(row: Tensor) -> Tensor:
    """Row i is the first row shifted i places to the right."""
    return torch.cat([row, row]).unfold(0, len(row), 1)[1:].flip(0)


def _signs(digits: str) -> Tensor:
    """The four sequences of a string, (4, len(digits))."""
    return 1 - 2 * _tensor([[int(digit, 16) >> bit & 1 for digit in digits] for bit in (3, 2, 1, 0)])


# The device is named everywhere: torch.set_default_device must not move what is cached.
def _tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int8, device="cpu")


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int8, device="cpu")


def _eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.int8, device="cpu")


def _block(rows: list[list[Tensor]]) -> Tensor:
    return torch.cat([torch.cat(row, 1) for row in rows])
