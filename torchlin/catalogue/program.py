"""Formulas as straight lists of steps: what a loop over plain tuples computes, a compiler can trace.

A graph is walked with the help of caches, locks and generators, none of which torch.compile follows. So a graph is
flattened once, and everything that runs inside a model runs the result.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .formula import REDUCTIONS, Call, Input, Node, Number, Param, reduce_vector
from .torch_code import _FUNCTIONS, _where

# A step is ("number", value), ("value", name), ("vector", name), (operator, *places), or one of the last with "map" in
# front: for each element of a coefficient vector.
Step = tuple[Any, ...]
Program = tuple[tuple[Step, ...], tuple[int, ...]]  # steps, and where the results are


@functools.lru_cache(maxsize=4096)
def program(*nodes: Node) -> Program:
    """The steps that compute these nodes, what they share once."""
    place: dict[Node, int] = {}
    steps: list[Step] = []
    for node in nodes:
        for part in node.walk():
            if part in place:
                continue
            place[part] = len(steps)
            if isinstance(part, Number):
                steps.append(("number", part.value))
            elif isinstance(part, (Input, Param)):
                steps.append(("vector" if part.is_vector else "value", part.name))
            else:
                assert isinstance(part, Call)
                args = tuple(place[arg] for arg in part.args)
                steps.append(("map", part.op, *args) if part.is_vector else (part.op, *args))
    return tuple(steps), tuple(place[node] for node in nodes)


def run(program: Program, values: Mapping[str, Any], dtype: torch.dtype) -> list[Any]:
    """What a program computes, with torch operators where tensors are involved.

    Args:
        values: inputs and parameters by name: tensors or floats; a sequence of such for a coefficient vector.
        dtype: of results that no tensor decides.

    Returns:
        For each node a tensor or float; a list of them for one that is a coefficient vector.
    """
    steps, results = program
    done: list[Any] = []
    for step in steps:
        op = step[0]
        if op == "number":
            done.append(step[1])
        elif op == "value":
            done.append(values[step[1]])
        elif op == "vector":
            done.append(list(values[step[1]]))
        elif op == "map":
            args = [done[place] for place in step[2:]]
            length = 0
            for arg in args:
                if isinstance(arg, list):
                    if length and len(arg) != length:
                        raise ValueError(
                            f"coefficient vectors must have one length, got {length} and {len(arg)}"
                        )
                    length = len(arg)
            rows = [[arg[j] if isinstance(arg, list) else arg for arg in args] for j in range(length)]
            done.append([_compute(step[1], row, dtype) for row in rows])
        elif op in REDUCTIONS:
            done.append(reduce_vector(op, [done[place] for place in step[1:]], _FUNCTIONS))
        else:
            done.append(_compute(op, [done[place] for place in step[1:]], dtype))
    return [done[place] for place in results]


def _compute(op: str, args: list[Any], dtype: torch.dtype) -> Any:
    return _where(dtype, *args) if op == "where" else _FUNCTIONS[op](*args)


def value_of(program: Program, values: Mapping[str, Any], like: Tensor) -> Tensor:
    """The one result of a program, as a tensor even where no input takes part in it, and differentiable by `like` even
    where its derivative is 0 everywhere."""
    value = run(program, values, like.dtype)[0]
    if not isinstance(value, Tensor):
        value = torch.full_like(like, value)
    if like.requires_grad and not value.requires_grad:
        value = torch.where(torch.zeros_like(like, dtype=torch.bool), like, value)
    return value
