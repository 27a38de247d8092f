"""Grids: tables of points that stand for vectors of neighbouring weights, of least squared error for normal ones.

Common grids come with the library (torchlin/quant/grid_data), scalar ones take milliseconds, all others are computed when
asked for and kept in the user's cache. docs/grids.md has the figures.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchlin.ops.grid import LARGEST_P
from torchlin.ops.grid_codes import LARGEST_N, code_layout
from torchlin.quant.grid_line import line_mse, optimal_levels, uniform_levels
from torchlin.quant.grid_solver import LATTICES, Made, canonical, certify, solve, solve_lattice, unit_of

KINDS = ("optimal", "uniform", "d4", "e8")
VERSION = 1  # of the points that this library gives for a kind, n and p

_SLOW = 1.0  # seconds from which on a grid is kept on disk
_log = logging.getLogger("torchlin")


@dataclass(frozen=True, eq=False)
class Grid:
    """A table of n points of p coordinates.

    Points are in lexicographic order (a code is a rank) and centred: their mean, weighted by how often each is used, is zero.
    """

    points: Tensor  # (n, p) float32 on the CPU
    kind: str  # "optimal", "uniform", "d4", "e8", or "custom"
    version: int
    mse: float  # per coordinate, of N(0, I_p)
    mse_error: float = 0.0  # what mse is uncertain by

    @property
    def n(self) -> int:
        """Number of points."""
        return self.points.shape[0]

    @property
    def p(self) -> int:
        """Coordinates of a point: neighbouring weights that share a code."""
        return self.points.shape[1]

    @functools.cached_property
    def id(self) -> str:
        """Such as "optimal-p2-n256-v1"; that of a grid of your own ends in a hash of its points."""
        last = f"v{self.version}" if self.kind in KINDS else _checksum(self.points)[:16]
        return f"{self.kind}-p{self.p}-n{self.n}-{last}"

    @property
    def bits(self) -> float:
        """Bits a weight of its packed codes, without scales."""
        digits, width = code_layout(self.n)
        return width / (digits * self.p)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and self.id == other.id and torch.equal(self.points, other.points)

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"Grid({self.id!r}, mse={self.mse:.6g}, bits={self.bits:g})"


def grid(n: int, p: int = 1, kind: str = "optimal") -> Grid:
    r"""The grid of n points of p coordinates with the least :math:`\frac1p E\min_i\lVert z - c_i\rVert^2` for normal z.

    Args:
        n: number of points, 2 to 65536.
        p: coordinates of a point, 1 to 8.
        kind: "optimal": the best found (p = 1: exact; else of many descents, in the plane on the exact error).
            "uniform" (p = 1): equidistant levels with the best step, so that integer kernels apply. "d4" (p = 4) and "e8"
            (p = 8): the shortest vectors of the lattice, or of a translate of it, each shell with its best length.

    Returns:
        A :class:`Grid`, the same object for the same arguments. What takes more than a second to compute is stored in
        ``$TORCHLIN_CACHE``, ``$XDG_CACHE_HOME/torchlin`` or ``~/.cache/torchlin``; the largest grids take minutes.

    Raises:
        TypeError: n or p is no int, or kind no string.
        ValueError: n, p or kind is out of range, or they do not fit together.

    Source: Max, "Quantizing for minimum distortion", 1960; Lloyd, "Least squares quantization in PCM", 1982; Pagès and
    Printems, "Optimal quadratic quantization for numerics: the Gaussian case", 2003; Conway and Sloane, "Sphere packings,
    lattices and groups", for D4 and E8; for weights: Malinovskii et al., "Pushing the limits of large language model
    quantization via the linearity theorem", 2024.

    Example:
        >>> g = grid(4)
        >>> g.points.flatten()
        tensor([-1.5104, -0.4528,  0.4528,  1.5104])
        >>> g.id, g.bits, round(g.mse, 6)
        ('optimal-p1-n4-v1', 2.0, 0.117482)
    """
    for name, value in (("n", n), ("p", p)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not isinstance(kind, str):
        raise TypeError(f"kind must be a string, got {type(kind).__name__}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    _check_size(n, p)
    if kind == "uniform" and p != 1:
        raise ValueError(
            f"a uniform grid has p = 1, got p = {p}; a product of uniform grids is what the codes of p = 1 "
            'are already, and kind="d4" (p = 4) or "e8" (p = 8) is a lattice that is no product'
        )
    if kind in LATTICES and p != LATTICES[kind]:
        raise ValueError(f"the lattice {kind} has p = {LATTICES[kind]}, got p = {p}")
    return _grid(n, p, kind)


def grid_from_points(points: Tensor) -> Grid:
    """A grid of your own.

    Args:
        points: (n, p), 2 to 65536 different points of 1 to 8 finite float32 coordinates. Their order is kept: it is the codes'.

    Returns:
        A :class:`Grid` of kind "custom". Its mse is exact for p <= 2, else measured on samples of N(0, I_p).

    Raises:
        TypeError: points is no floating tensor.
        ValueError: the shape, a coordinate that is not finite, or two equal points.

    Example:
        >>> import torch
        >>> g = grid_from_points(torch.tensor([[-1.0], [0.0], [1.0]]))
        >>> g.kind, g.n, round(g.mse, 4)
        ('custom', 3, 0.2088)
    """
    if not isinstance(points, Tensor):
        raise TypeError(f"points must be a torch.Tensor, got {type(points).__name__}")
    if not points.is_floating_point():
        raise TypeError(f"points must be a floating tensor, got {points.dtype}")
    if points.dim() != 2:
        raise ValueError(f"points must have shape (n, p), got {tuple(points.shape)}")
    _check_size(points.shape[0], points.shape[1], "points: ")
    table = points.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not bool(table.isfinite().all()):
        raise ValueError("points must be finite float32 numbers, got NaN or an infinity")
    if len(torch.unique(table, dim=0)) < len(table):
        raise ValueError("points must be different from each other, got two that are equal in float32")
    return Grid(table, "custom", VERSION, *_certified(table))


def _check_size(n: int, p: int, name: str = "") -> None:
    if not 2 <= n <= LARGEST_N:
        raise ValueError(f"{name}n must be in [2, {LARGEST_N}], got {n}")
    if not 1 <= p <= LARGEST_P:
        raise ValueError(f"{name}p must be in [1, {LARGEST_P}], got {p}")


@functools.cache
def _grid(n: int, p: int, kind: str) -> Grid:
    name = f"{kind}-p{p}-n{n}-v{VERSION}"
    shipped = resources.files("torchlin.quant.grid_data") / f"{name}.txt"
    if shipped.is_file():
        return read_grid(shipped.read_text("ascii"), name)
    stored = cache_folder() / f"{name}.txt"
    with contextlib.suppress(OSError, ValueError):  # missing or damaged: made again
        return read_grid(stored.read_text("ascii"), name)
    if p > 1 and n * p > 2048:
        _log.info("computing the grid %s; it is kept in %s", name, stored.parent)
    start = time.perf_counter()
    made = _MAKERS[kind](n, p)
    result = Grid(made.points.float(), kind, VERSION, made.mse, made.mse_error)
    if time.perf_counter() - start > _SLOW:
        with contextlib.suppress(OSError):  # a folder that cannot be written costs time, no result
            _write(stored, grid_text(result))
    return result


def _line(levels: np.ndarray) -> Made:
    points = torch.from_numpy(levels).unsqueeze(1)
    return Made(points, *_certified(points.float()))


def _optimal_line(n: int) -> Made:
    levels = optimal_levels(n)
    if 64 < n <= 256:  # fewer are looked up as they are, more are gathered: neither needs 16 bits
        levels = canonical(torch.from_numpy(levels).unsqueeze(1)).squeeze(1).numpy()
    return _line(levels)


_MAKERS: dict[str, Callable[[int, int], Made]] = {
    "optimal": lambda n, p: _optimal_line(n) if p == 1 else solve(n, p),
    "uniform": lambda n, p: _line(uniform_levels(n)),
    "d4": lambda n, p: solve_lattice("d4", n),
    "e8": lambda n, p: solve_lattice("e8", n),
}


def _certified(points: Tensor) -> tuple[float, float]:
    if points.shape[1] == 1:
        return line_mse(np.sort(points.flatten().double().numpy())), 0.0
    return certify(points)


# ---- as text


def grid_text(grid: Grid) -> str:
    """A grid as a text file: fields, an empty line, a point a line, in multiples of `unit`."""
    unit = unit_of(grid.points) if grid.p > 1 else 1.0
    fields = {
        "grid": grid.id,
        "mse": repr(grid.mse),
        "mse_error": f"{grid.mse_error:.2g}",
        "unit": repr(unit),
        "sha256": _checksum(grid.points),
    }
    head = "".join(f"{key} {value}\n" for key, value in fields.items())
    rows = grid.points.double().div(unit).tolist()
    return head + "\n" + "".join(" ".join(f"{x:.9g}" for x in row) + "\n" for row in rows)


def read_grid(text: str, name: str) -> Grid:
    """The grid `name` from a text that :func:`grid_text` wrote.

    Raises:
        ValueError: it is another grid, or damaged.
    """
    head, _, body = text.partition("\n\n")
    fields = dict(line.split(" ", 1) for line in head.splitlines() if " " in line)
    kind, p, n, version = name.split("-")
    try:
        if fields["grid"] != name:
            raise ValueError(f"it says that it is {fields['grid']}")
        values = np.array(body.split(), dtype=np.float64).reshape(int(n[1:]), int(p[1:]))
        points = torch.from_numpy((values * float(fields["unit"])).astype(np.float32))
        if _checksum(points) != fields["sha256"]:
            raise ValueError("its points were changed, the checksum is another")
        return Grid(points, kind, int(version[1:]), float(fields["mse"]), float(fields["mse_error"]))
    except (KeyError, ValueError) as error:
        raise ValueError(f"the file of grid {name} is damaged: {error}") from None


def cache_folder() -> Path:
    """Where grids that took long to compute are kept."""
    own = os.environ.get("TORCHLIN_CACHE")
    if own:
        return Path(own) / "grids"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "torchlin" / "grids"


def _write(path: Path, text: str) -> None:
    """All of the file or nothing, whatever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _checksum(points: Tensor) -> str:
    return hashlib.sha256(points.detach().cpu().contiguous().numpy().astype("<f4").tobytes()).hexdigest()
