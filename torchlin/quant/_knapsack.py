"""The multiple-choice knapsack, exactly: one item of each class, the least total cost, total size within a budget.

With a price λ of size, no choice costs less than Σ min(cost + λ size) - λ budget. At the λ where the linear relaxation fills
the budget, that bound is within one item of the best choice. So most items are out at once (their reduced cost alone exceeds
the gap between the bound and a greedy choice), and dynamic programming over the rest keeps only partial choices that no other
dominates and that still fit into the gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
_BEAM = 1 << 15  # states in the first pass, which has to find a good choice, not the best


def multiple_choice(costs: Sequence[Floats], sizes: Sequence[Ints], budget: int) -> list[int]:
    """The index of an item of each class: of all choices with Σ size <= budget one with the least Σ cost.

    Args:
        costs: of the items of each class, finite.
        sizes: of the items of each class, integers.
        budget: at least the sum over classes of the smallest size.
    """
    kept = [_undominated(c, s) for c, s in zip(costs, sizes, strict=True)]
    costs = [c[k] for c, k in zip(costs, kept, strict=True)]
    sizes = [s[k] for s, k in zip(sizes, kept, strict=True)]
    choice, price = _greedy(costs, sizes, budget)
    if price > 0:  # else the budget is enough for the best item of every class
        choice = _search(costs, sizes, budget, choice, price)
    return [int(k[i]) for k, i in zip(kept, choice, strict=True)]


def _undominated(cost: Floats, size: Ints) -> Ints:
    """Items that no other beats in cost and size at once, by growing size and falling cost."""
    order = np.lexsort((cost, size))
    best = np.minimum.accumulate(cost[order])
    return order[np.concatenate(([True], cost[order][1:] < best[:-1]))]


# ---- bounds


def _greedy(costs: Sequence[Floats], sizes: Sequence[Ints], budget: int) -> tuple[list[int], float]:
    """A choice along the convex hulls, best savings a unit of size first, and the price λ of size where the budget ends."""
    choice = [0] * len(costs)
    room = budget - int(sum(s[0] for s in sizes))
    steps = sorted(
        (
            (-ratio, k, a, b)
            for k, (c, s) in enumerate(zip(costs, sizes, strict=True))
            for ratio, a, b in _hull_steps(c, s)
        ),
    )
    price = 0.0
    for ratio, k, a, b in steps:
        step = int(sizes[k][b] - sizes[k][a])
        if choice[k] == a and step <= room:
            choice[k], room = b, room - step
        elif price == 0:
            price = -ratio
    for k in sorted(range(len(costs)), key=lambda k: choice[k]):  # what still fits, hull or not
        fitting = np.flatnonzero(sizes[k] - sizes[k][choice[k]] <= room)
        room -= int(sizes[k][fitting[-1]] - sizes[k][choice[k]])
        choice[k] = int(fitting[-1])
    return choice, price


def _hull_steps(cost: Floats, size: Ints) -> list[tuple[float, int, int]]:
    """(saving a unit of size, from, to) along the lower convex hull; the savings fall."""
    hull: list[int] = []
    for i in range(len(cost)):
        while len(hull) > 1 and _saving(cost, size, hull[-2], hull[-1]) <= _saving(cost, size, hull[-1], i):
            hull.pop()
        hull.append(i)
    return [(_saving(cost, size, a, b), a, b) for a, b in pairwise(hull)]


def _saving(cost: Floats, size: Ints, a: int, b: int) -> float:
    return float(cost[a] - cost[b]) / float(size[b] - size[a])


# ---- search


def _search(
    costs: Sequence[Floats], sizes: Sequence[Ints], budget: int, choice: list[int], price: float
) -> list[int]:
    reduced = [c + price * s for c, s in zip(costs, sizes, strict=True)]
    bound = sum(float(r.min()) for r in reduced) - price * budget
    reduced = [r - r.min() for r in reduced]
    slack = 1e-12 * (sum(float(np.abs(c).max()) for c in costs) + price * abs(budget))  # of rounding
    beam: int | None = _BEAM
    while True:
        best = sum(float(c[i]) for c, i in zip(costs, choice, strict=True))
        found, exact = _pass(reduced, sizes, budget, price, best - bound + slack, beam)
        if found is not None and sum(float(c[i]) for c, i in zip(costs, found, strict=True)) < best:
            choice = found
        if exact:
            return choice
        beam = None if beam is None or beam >= 1 << 21 else beam * 8


def _pass(
    reduced: Sequence[Floats], sizes: Sequence[Ints], budget: int, price: float, gap: float, beam: int | None
) -> tuple[list[int] | None, bool]:
    """The best choice whose cost exceeds the bound by no more than the gap, and whether nothing was left out on the way."""
    items = [np.flatnonzero(r <= gap) for r in reduced]
    # What has many items comes last: until then there are few states.
    order = sorted(range(len(items)), key=lambda k: len(items[k]))
    least = sum(int(sizes[k][items[k]].min()) for k in order)
    most = sum(int(sizes[k][items[k]].max()) for k in order)
    size, excess = np.zeros(1, np.int64), np.zeros(1)  # of every state; excess is the sum of reduced costs
    trail: list[tuple[Ints, Ints]] = []
    exact = True
    for k in order:
        s, r = sizes[k][items[k]], reduced[k][items[k]]
        least, most = least - int(s.min()), most - int(s.max())
        new_size = (size[:, None] + s).ravel()
        new_excess = (excess[:, None] + r).ravel()
        unused = np.maximum(budget - new_size - most, 0)
        alive = np.flatnonzero((new_size + least <= budget) & (new_excess + price * unused <= gap))
        alive = alive[_undominated(new_excess[alive] - price * new_size[alive], new_size[alive])]
        if beam is not None and len(alive) > beam:
            alive = np.sort(alive[np.argpartition(new_excess[alive], beam)[:beam]])
            exact = False
        if not len(alive):
            return None, exact
        trail.append((alive // len(s), items[k][alive % len(s)]))
        size, excess = new_size[alive], new_excess[alive]
    state = int(np.argmin(excess - price * size))
    choice = [0] * len(order)
    for k, (parent, item) in zip(reversed(order), reversed(trail), strict=True):
        choice[k], state = int(item[state]), int(parent[state])
    return choice, exact
