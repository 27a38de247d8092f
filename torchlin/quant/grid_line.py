"""Scalar grids for the normal distribution: optimal levels by Newton's method, and uniform ones. All in float64.

A cell's integrals are closed forms (erfc, from the nearer tail) where it is wide, and Gauss-Legendre sums where it is narrow:
there the closed forms would be differences of nearly equal numbers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)
_WIDE = 0.5  # from this width on the closed forms are exact enough, and the sums are not


def optimal_levels(n: int) -> Array:
    """The levels of the n-point scalar quantizer of least squared error for N(0, 1), ascending and symmetric.

    Newton's method on the stationarity equations, whose Jacobian is tridiagonal, from the companding quantizer
    (quantiles of N(0, 3), exact for n to infinity) and some of Lloyd's steps. The density is log-concave: the
    stationary point is the optimum.
    """
    shares = (np.arange(n) + 0.5) / n
    levels = math.sqrt(6) * torch.erfinv(torch.from_numpy(2 * shares - 1)).numpy()
    for _ in range(20):
        mass, pull, _ = cell_integrals(levels)
        levels = _symmetric(levels - pull / mass)
    error = _residual(levels)
    for _ in range(60):
        step = _newton_step(levels)
        for rate in (1, 0.5, 0.25, 0.125, 1 / 16, 1 / 64):
            trial = _symmetric(levels - rate * step)
            if np.all(np.diff(trial) > 0) and (trial_error := _residual(trial)) < error:
                break
        else:
            return levels  # as exact as float64 has it
        levels, error = trial, trial_error
    return levels


def uniform_levels(n: int) -> Array:
    """n equidistant levels, symmetric to zero (a level for odd n), with the step of least squared error for N(0, 1)."""
    places: Array = np.arange(n, dtype=np.float64) - (n - 1) / 2

    low, high = 0.0, 4 / math.sqrt(n)  # the error falls at one end and grows at the other
    for _ in range(50):
        step = (low + high) / 2
        if cell_integrals(places * step)[1] @ places > 0:
            high = step
        else:
            low = step
    return places * step


def cell_integrals(levels: Array) -> tuple[Array, Array, Array]:
    """Of each level's cell, for phi the normal density: integrals of phi, of (q - x) phi, of (q - x)^2 phi."""
    edges = np.concatenate(([-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]))
    low, high = edges[:-1], edges[1:]
    # Closed forms, from the tail on the cell's side.
    flip = low + high < 0
    near, far = np.where(flip, -high, low), np.where(flip, -low, high)
    mass = _tail(near) - _tail(far)
    at_near, at_far = _density(near), _density(far)
    q = np.where(flip, -levels, levels)
    first = at_near - at_far
    second = mass + _times(near, at_near) - _times(far, at_far)
    pull = np.where(flip, -1, 1) * (q * mass - first)
    energy = second - 2 * q * first + q * q * mass
    narrow = np.flatnonzero(high - low < _WIDE)
    if narrow.size:
        half = (high - low)[narrow, None] / 2
        x = (low[narrow, None] + half) + half * _NODES
        weight = _density(x) * half * _WEIGHTS
        away = levels[narrow, None] - x
        mass[narrow] = weight.sum(1)
        pull[narrow] = (weight * away).sum(1)
        energy[narrow] = (weight * away**2).sum(1)
    return mass, pull, energy


def line_mse(levels: Array) -> float:
    """The mean squared error of ascending levels for N(0, 1)."""
    return math.fsum(cell_integrals(levels)[2])


def _newton_step(levels: Array) -> Array:
    mass, pull, _ = cell_integrals(levels)
    edges = (levels[1:] + levels[:-1]) / 2
    # An edge moves half as far as either level; what it hands over is phi(edge) times the distance to the level.
    give = _density(edges) * (levels[1:] - levels[:-1]) / 4
    diagonal = mass.copy()
    diagonal[:-1] -= give
    diagonal[1:] -= give
    return _solve_tridiagonal(diagonal, -give, pull)


def _solve_tridiagonal(diagonal: Array, beside: Array, right: Array) -> Array:
    """x of the symmetric system with this diagonal and these neighbours of it."""
    d, b, x = diagonal.tolist(), beside.tolist(), right.tolist()
    for i in range(1, len(d)):
        ratio = b[i - 1] / d[i - 1]
        d[i] -= ratio * b[i - 1]
        x[i] -= ratio * x[i - 1]
    x[-1] /= d[-1]
    for i in range(len(d) - 2, -1, -1):
        x[i] = (x[i] - b[i] * x[i + 1]) / d[i]
    return np.array(x)


def _residual(levels: Array) -> float:
    mass, pull, _ = cell_integrals(levels)
    return float(np.abs(pull / mass).max())


def _symmetric(levels: Array) -> Array:
    return (levels - levels[::-1]) / 2


def _density(x: Array) -> Array:
    return np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _tail(x: Array) -> Array:
    return torch.erfc(torch.from_numpy(x / math.sqrt(2))).numpy() / 2


def _times(x: Array, density: Array) -> Array:
    return np.where(np.isfinite(x), x, 0) * density
