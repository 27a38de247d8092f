"""A vmap rule for raw ops whose calls cannot be joined: each has a whole batch of samples, or noise of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def one_by_one(op: Any) -> Callable[..., Any]:
    """As many calls as there are slices, and their results stacked."""

    def rule(info, in_dims, *args):
        dims = (*in_dims, *[None] * (len(args) - len(in_dims)))  # arguments left to their defaults have none
        calls = [
            op(*(x if d is None else x.select(d, i) for x, d in zip(args, dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        outputs = tuple(torch.stack(each) for each in zip(*calls, strict=True))
        return outputs, (0,) * len(outputs)

    return rule
