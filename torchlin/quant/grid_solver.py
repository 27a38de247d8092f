"""How grids of more than one coordinate are made, and how their error is certified.

In the plane the error and its gradient are exact integrals over the cells (csrc/grid/solver_plane.h), descended from many
starts. In more dimensions Lloyd's steps are taken on fresh quasi-random samples whose window grows, and the error is
measured on other samples. Lattices are cut by a ball and their shells stretched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchlin import _library

_raw: Any = torch.ops.torchlin

_UNIT = 2.0**-16  # coordinates of many points are multiples of it: the error grows by less than 1e-11
_FEW = 256  # points have 16-bit coordinates, two bytes that csrc/grid/bytes_cpu.h looks up: the error grows by less than 1e-8
_FAR = 1e3  # a point beyond it spoils the exact integrals of its cell: |z - c|^2 of no mass
_TRAINING, _SCALING, _CERTIFYING = 1, 2, 3  # streams of samples that share nothing


@dataclass(frozen=True)
class Made:
    """Points as float64, and their mean squared error per coordinate, known to within `mse_error`."""

    points: Tensor
    mse: float
    mse_error: float


# ---- samples and cells


def normal_samples(count: int, p: int, stream: int, index: int) -> Tensor:
    """(count, p) float32 from N(0, I_p): a Sobol sequence, scrambled anew for each (stream, index)."""
    seed = stream * 1_000_003 + index
    uniform = torch.quasirandom.SobolEngine(p, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return (torch.erfinv(2 * uniform - 1 + 2.0**-32) * math.sqrt(2)).float()


def sample_cells(samples: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the cell of each of (n, p) points: number, sum and squared distances of the (m, p) samples in it, float64."""
    samples, points = samples.float().contiguous(), points.float().contiguous()
    if _built("_sample_cells"):
        return _raw._sample_cells(samples, points)
    n, p = points.shape
    mass, moment, energy = (torch.zeros(shape, dtype=torch.float64) for shape in ((n,), (n, p), (n,)))
    for piece in samples.split(max(1, (1 << 24) // n)):
        distance, code = torch.cdist(piece, points, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        mass.index_add_(0, code, torch.ones(len(code), dtype=torch.float64))
        moment.index_add_(0, code, piece.double())
        energy.index_add_(0, code, distance.double().square())
    return mass, moment, energy


def certify(points: Tensor, replications: int = 16, samples: int = 1 << 18) -> tuple[float, float]:
    """The mean squared error per coordinate of (n, p) points for N(0, I_p), and what it is uncertain by.

    In the plane by exact integrals. Otherwise the mean over independently scrambled sequences that no solver has
    seen, and three of its standard errors.
    """
    p = points.shape[1]
    if p == 2 and _built("_plane_cells") and float(points.abs().max()) < _FAR:
        return float(_raw._plane_cells(points.double().contiguous())[2].sum()) / 2, 1e-12
    each = [
        float(sample_cells(normal_samples(samples, p, _CERTIFYING, k), points)[2].sum()) / samples / p
        for k in range(replications)
    ]
    return float(np.mean(each)), 3 * float(np.std(each, ddof=1)) / math.sqrt(replications)


# ---- optimal grids


def solve(n: int, p: int, effort: float = 1.0, seed: int = 0) -> Made:
    """The best grid that is found; `effort` multiplies the time that is taken. The same arguments give the same grid."""
    points = (
        _solve_plane(n, effort, seed)
        if p == 2 and _built("_plane_search")
        else _solve_space(n, p, effort, seed)
    )
    points = canonical(points)
    return Made(points, *certify(points))


def unit_of(points: Tensor) -> float:
    """The power of two that coordinates of (n, p) points are rounded to multiples of."""
    if len(points) > _FEW:
        return _UNIT
    return 2.0 ** (math.frexp(float(points.abs().max()))[1] - 15)


def canonical(points: Tensor) -> Tensor:
    """Coordinates rounded to multiples of a unit, points in lexicographic order."""
    unit = unit_of(points)
    rounded = (points.double() / unit).round()
    order = np.lexsort(rounded.numpy().T[::-1])
    return rounded[torch.from_numpy(order.copy())] * unit


def _solve_plane(n: int, effort: float, seed: int) -> Tensor:
    if n > 1024:  # every descent is long, and the best are close together
        return _raw._plane_search(next(_plane_starts(n, 1, seed)), 1e-8, 0, 0)
    best = best_descent(n, max(1, round(effort * min(40, 4000 / n))), seed)
    return hop(best, round(effort * min(200, 20000 / n)), seed)


def best_descent(n: int, starts: int, seed: int) -> Tensor:
    """The best of this many descents in the plane."""
    found = (_raw._plane_search(start, 1e-11, 0, 0) for start in _plane_starts(n, starts, seed))
    return min(found, key=_plane_error)


def hop(points: Tensor, hops: int, seed: int) -> Tensor:
    """What basin hopping makes of a grid in the plane: a better one, or the stationary one nearby."""
    return _raw._plane_search(points.double().contiguous(), 1e-11, hops, seed)


def _plane_error(points: Tensor) -> float:
    return float(_raw._plane_cells(points)[2].sum())


def _plane_starts(n: int, count: int, seed: int) -> Iterator[Tensor]:
    """A sunflower first, then random points: both of the density of the best grids for many points, N(0, 2 I)."""
    generator = torch.Generator().manual_seed(seed)
    share = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    radius = torch.sqrt(-4 * torch.log1p(-share))
    angle = torch.arange(n, dtype=torch.float64) * math.pi * (3 - math.sqrt(5))
    yield torch.stack((radius * angle.cos(), radius * angle.sin()), 1)
    for _ in range(count - 1):
        yield torch.randn(n, 2, dtype=torch.float64, generator=generator) * math.sqrt(2)


def _solve_space(n: int, p: int, effort: float, seed: int) -> Tensor:
    batch = min(max(64 * n, 1 << 16), 1 << 21)
    starts = 4 if n <= 512 else 1
    steps = max(12, round(60 * effort))
    found = [
        _lloyd(_space_start(n, p, k), steps, batch, k) for k in range(starts * seed, starts * (seed + 1))
    ]
    error = lambda points: float(sample_cells(normal_samples(batch, p, _SCALING, 0), points)[2].sum())  # noqa: E731
    return min(found, key=error)


def _space_start(n: int, p: int, k: int) -> Tensor:
    return normal_samples(n, p, _TRAINING, 1000 + k).double() * math.sqrt(1 + 2 / p)


def _lloyd(points: Tensor, steps: int, batch: int, stream: int) -> Tensor:
    """Lloyd's steps on fresh samples; in the second half on all samples of a window that grows, so that noise averages out."""
    n, p = points.shape
    window_mass, window_moment = torch.zeros(n, dtype=torch.float64), torch.zeros(n, p, dtype=torch.float64)
    for step in range(steps):
        samples = normal_samples(batch, p, _TRAINING, 10_000 * (stream + 1) + step)
        mass, moment, energy = sample_cells(samples, points)
        settled = step - steps // 2
        keep = settled / (settled + 1.5) if settled > 0 else 0.0
        window_mass = keep * window_mass + mass
        window_moment = keep * window_moment + moment
        held = (window_mass > 0).unsqueeze(1)
        points = torch.where(held, window_moment / window_mass.clamp_min(1e-300).unsqueeze(1), points)
        if settled < -steps // 8:
            points = _move_idle(points, mass, energy)
    return points - (window_mass / window_mass.sum()) @ points


def _move_idle(points: Tensor, mass: Tensor, energy: Tensor) -> Tensor:
    """Points of cells that cost much less than the mean go beside those of the costliest: in the best grids all cost alike."""
    idle = torch.nonzero(energy < 0.3 * energy.mean()).flatten()[: max(1, len(points) // 8)]
    if not len(idle):
        return points
    dear = torch.argsort(energy, descending=True)[: len(idle)]
    spread = torch.sqrt(energy[dear] / mass[dear].clamp_min(1) / points.shape[1]) * 0.5
    generator = torch.Generator().manual_seed(len(idle))
    shift = torch.randn(points[dear].shape, dtype=torch.float64, generator=generator) * spread.unsqueeze(1)
    moved = points.clone()
    moved[idle] = points[dear] + shift
    moved[dear] = points[dear] - shift
    return moved


# ---- lattices


LATTICES = {"d4": 4, "e8": 8}
# What the lattice is moved by, in quarters: nothing, deep holes, the middle between neighbours. Twice of each is in the
# lattice: with a point its negative is there too.
_SHIFTS = {
    "d4": ((0, 0, 0, 0), (4, 0, 0, 0), (2, 2, 2, 2), (2, 2, 0, 0)),
    "e8": ((0,) * 8, (4,) + (0,) * 7, (1,) * 8, (2, 2) + (0,) * 6),
}


def solve_lattice(kind: str, n: int) -> Made:
    """The n shortest vectors of the lattice, or of one of its translates, each shell with the length that serves best."""
    candidates = [_Shells(shortest(kind, n, shift)) for shift in _SHIFTS[kind]]
    for candidate in candidates:
        candidate.fit(8)
    best = min(candidates, key=lambda candidate: candidate.error)
    best.fit(24)
    points = canonical(best.points())
    return Made(points, *certify(points, replications=8))


def shortest(kind: str, n: int, shift: tuple[int, ...]) -> Tensor:
    """The n shortest vectors of the lattice moved by `shift`, in quarters: (n, p) integers.

    Of those of equal length that are too many, first whole families (all signs and orders of the same coordinates)
    that fit, then pairs of a vector and its negative, spread evenly over the family.
    """
    p = LATTICES[kind]
    norm = 16 * 2
    while len(vectors := _ball(kind, shift, norm)) < n:
        norm += 16
    norms = (vectors**2).sum(1)
    order = np.argsort(norms, kind="stable")
    vectors, norms = vectors[order], norms[order]
    last = norms[n - 1]
    chosen = [vectors[norms < last]]
    room = n - len(chosen[0])
    shell = vectors[norms == last]
    families: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(np.sort(np.abs(shell), axis=1).tolist()):
        families.setdefault(tuple(row), []).append(i)
    rest = []
    for _, members in sorted(families.items(), key=lambda item: (len(item[1]), item[0])):
        if len(members) <= room:
            chosen.append(shell[members])
            room -= len(members)
        else:
            rest.append(members)
    if room:
        family = shell[rest[0]]
        family = family[np.lexsort(family.T[::-1])]  # the negative of row i is row -1 - i
        half = len(family) // 2
        pairs = np.arange(room // 2) * half // max(room // 2, 1)
        chosen += [family[pairs], family[len(family) - 1 - pairs]]
        if room % 2:
            chosen.append(family[[next(i for i in range(half) if i not in set(pairs.tolist()))]])
    return torch.from_numpy(np.concatenate(chosen)).reshape(n, p)


def _ball(kind: str, shift: tuple[int, ...], norm: int) -> np.ndarray:
    """Vectors of the translate with squared length of at most `norm`, all in quarters (of which norms are sixteenths)."""
    reach = math.isqrt(norm) + 4
    found = []
    for half in (0, 2) if kind == "e8" else (0,):
        rows, sums = np.zeros((1, 0), dtype=np.int64), np.zeros(1, dtype=np.int64)
        for move in shift:
            whole = np.arange(-(reach // 4), reach // 4 + 1)
            steps = 4 * whole + half + move
            ahead = np.repeat(rows, len(steps), 0), np.tile(steps, len(rows))
            sums = np.repeat(sums, len(steps)) + np.tile(4 * whole + half, len(sums))
            rows = np.column_stack(ahead)
            inside = (rows**2).sum(1) <= norm
            rows, sums = rows[inside], sums[inside]
        found.append(rows[sums % 8 == 0])  # coordinates that add up to an even number
    return np.concatenate(found)


class _Shells:
    """Vectors times a factor for all of the same length. A lattice is evenly dense, but the best grids thin out: outer shells
    want to be longer than they are. One factor for all costs 4 % of the error at n = 65,536 in E8.
    """

    def __init__(self, vectors: Tensor) -> None:
        self._vectors = vectors.double()
        n, self._p = vectors.shape
        _, self._shell = (vectors**2).sum(1).unique(return_inverse=True)
        # For many points the best grids have the variance 1 + 2 / p, less what the cut takes.
        factor = math.sqrt((1 + 1 / self._p) / float(self._vectors.square().mean()))
        self._factors = torch.full((int(self._shell.max()) + 1,), factor, dtype=torch.float64)
        self._samples = normal_samples(1 << (18 if n <= 4096 else 17), self._p, _SCALING, 1)
        self.error = math.inf

    def points(self) -> Tensor:
        """With factors that are multiples of a unit, so that every point is the integer vector times a float32 number."""
        unit = unit_of(self._vectors * self._factors[self._shell].unsqueeze(1))
        factors = (self._factors / unit).round() * unit
        return self._vectors * factors[self._shell].unsqueeze(1)

    def fit(self, steps: int) -> None:
        """Least squares of each factor in turn with the cells."""
        for _ in range(steps):
            mass, moment, energy = sample_cells(
                self._samples, self._vectors * self._factors[self._shell].unsqueeze(1)
            )
            self.error = float(energy.sum()) / len(self._samples) / self._p
            along = self._sum((moment * self._vectors).sum(1))
            square = self._sum(mass * self._vectors.square().sum(1))
            best = torch.where(square > 0, along / square, self._factors)
            self._factors += 1.5 * (best - self._factors)  # cells move along: a whole step falls short

    def _sum(self, values: Tensor) -> Tensor:
        return torch.zeros_like(self._factors).index_add_(0, self._shell, values)


def _built(op: str) -> bool:
    return _library.status()["cpu"].loaded and hasattr(_raw, op)
