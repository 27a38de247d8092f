"""One run of the square attack in linf (Andriushchenko et al., arXiv:1912.00049, algorithms 1 and 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlin.robust._ball import Ball
from torchlin.robust._craft import Net, margin

# The share of places in a square is halved after so many of 10000 queries (section 5 of the paper).
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def share(query: int, n_queries: int, p_init: float) -> float:
    """The share of places in a square at a query."""
    return p_init / 2 ** sum(query / n_queries * 10000 > halving for halving in HALVINGS)


@torch.no_grad()
def square_once(
    net: Net, ball: Ball, y: Tensor, n_queries: int, p_init: float, generator: torch.Generator | None
) -> Tensor:
    """The point of the smallest margin that was found for each sample."""
    places = ball.x.shape[2:] or ball.x.shape[1:]
    channels = ball.x.shape[1:2] if ball.x.dim() > 2 else ()

    # Stripes at first: each column of a channel goes to one side or the other.
    stripes = _signs((len(ball.x), *channels, *[1] * (len(places) - 1), places[-1]), ball.x, generator)
    best = ball.project(ball.x + ball.eps * stripes)
    most = margin(net(best), y)
    for query in range(1, n_queries):
        left = (most <= 0).nonzero()[:, 0]
        if not len(left):
            break
        some, old = ball.select(left), best[left]
        inside = _squares(len(left), places, share(query, n_queries, p_init), ball.x.device, generator)
        inside = inside.view(len(left), *[1] * len(channels), *places)
        sides = some.eps * _signs((len(left), *channels, *[1] * len(places)), ball.x, generator)
        new = some.project(torch.where(inside, some.x + sides, old))
        value = margin(net(new), y[left])
        better = value > most[left]
        best[left[better]], most[left[better]] = new[better], value[better]
    return best


def _squares(
    count: int, places: torch.Size, share: float, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """A cube of so large a share of the places at a random place for each sample: bool (count, *places)."""
    side = round((share * places.numel()) ** (1 / len(places)))
    inside = torch.ones((count, *places), dtype=torch.bool, device=device)
    for i, size in enumerate(places):
        length = min(size, max(1, side))
        begin = torch.randint(size - length + 1, (count, 1), generator=generator, device=device)
        at = torch.arange(size, device=device)
        along = (at >= begin) & (at < begin + length)  # (count, size)
        inside &= along.view(count, *[1] * i, size, *[1] * (len(places) - 1 - i))
    return inside


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randint(2, shape, generator=generator, device=like.device).to(like.dtype).mul_(2).sub_(1)
