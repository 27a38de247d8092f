"""Forward passes that differ in one weight, without computing again what comes before that weight.

A deep model is a sequence of blocks. If only a weight of block k differs, the blocks before k return what they returned
for the same batch with the original weights. So their outputs are recorded once, and from then on they return the
records; everything else of the model runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Replay:
    """Runs ``run(model, batch)`` again and again while one weight of the model is another one.

    The blocks are the members of the nn.ModuleList or nn.Sequential with the most parameters whose members are each called
    exactly once, one after the other, in every batch. Whether the records lead to the same result is tried out bit for bit;
    if there are no such blocks, or if it does not, every run is a full one.

    Args:
        model: any module. It must be deterministic: in evaluation mode.
        run: what is computed, from the model and a batch; a tensor.
        batches: the batches. What ``run`` returned for each is :attr:`base`, and the block outputs are kept in memory.
    """

    def __init__(
        self, model: nn.Module, run: Callable[[nn.Module, Any], Tensor], batches: Sequence[Any]
    ) -> None:
        self._model, self._run, self._batches = model, run, batches
        self.blocks: str | None = None  # the name of what holds the blocks; None: every run is a full one
        self.base: list[Tensor] = []
        self._chain: list[nn.Module] = []
        self._outputs: list[list[Any]] = []  # of each block, for each batch
        self._record()
        self._chain = self._chain if self._is_exact() else []
        if not self._chain:
            self.blocks, self._outputs = None, []
        self._first = self._first_blocks()

    def __call__(self, weight: Tensor | None, index: int) -> Tensor:
        """The result for a batch, if nothing but ``weight`` differs from the model as it was recorded (None: all may)."""
        return self._from(0 if weight is None else self._first.get(weight.data_ptr(), 0), index)

    def _from(self, first: int, index: int) -> Tensor:
        with _returning(self._chain[:first], self._outputs[index][:first] if first else []):
            return self._run(self._model, self._batches[index])

    # ---- records

    def _record(self) -> None:
        """Runs every batch once, with all candidates for the blocks watched in the first."""
        candidates = {
            name: list(module)
            for name, module in self._model.named_modules()
            if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
        }
        for i, batch in enumerate(self._batches):
            watched = {id(m): m for chain in candidates.values() for m in chain}
            with _watching(list(watched.values())) as (events, outputs):
                self.base.append(self._run(self._model, batch))
            candidates = {name: chain for name, chain in candidates.items() if _in_turn(chain, events)}
            if i == 0:  # one is enough, and the outputs of one are all that is to be kept
                sizes = {name: _parameters(chain) for name, chain in candidates.items()}
                best = max(sizes, key=lambda name: sizes[name], default=None)
                candidates = {} if best is None else {best: candidates[best]}
            for chain in candidates.values():
                self._outputs.append([outputs[id(m)] for m in chain])
        for name, chain in candidates.items():
            self.blocks, self._chain = name, chain

    def _is_exact(self) -> bool:
        """Whether runs that begin at a block end as the full ones did: tried for the first batch, after the last was run."""
        starts = {1, len(self._chain) // 2, len(self._chain) - 1} if self._chain else set()
        return all(torch.equal(self._from(first, 0), self.base[0]) for first in sorted(starts))

    def _first_blocks(self) -> dict[int, int]:
        """The first block that uses a weight, for weights that only blocks use; by the weight's address."""
        inside: dict[int, int] = {}
        of_blocks: set[int] = set()
        for i, block in enumerate(self._chain):
            of_blocks.update(id(module) for module in block.modules())
            for weight in block.parameters():
                inside.setdefault(weight.data_ptr(), i)
        for module in self._model.modules():
            if id(module) not in of_blocks:
                for weight in module.parameters(recurse=False):
                    inside.pop(weight.data_ptr(), None)
        return inside


def _parameters(chain: list[nn.Module]) -> int:
    return sum(weight.numel() for weight in {w for block in chain for w in block.parameters()})


def _copy(output: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, output)


def _in_turn(chain: list[nn.Module], events: list[tuple[int, str]]) -> bool:
    """Whether each of the chain was called once, after the one before had ended."""
    members = {id(module) for module in chain}
    seen = [event for event in events if event[0] in members]
    return seen == [(id(module), what) for module in chain for what in ("begin", "end")]


@contextmanager
def _watching(modules: list[nn.Module]) -> Iterator[tuple[list[tuple[int, str]], dict[int, Any]]]:
    """Records when modules begin and end, and what they return."""
    events: list[tuple[int, str]] = []
    outputs: dict[int, Any] = {}

    def begin(module: nn.Module, inputs: Any) -> None:
        events.append((id(module), "begin"))

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        events.append((id(module), "end"))
        outputs[id(module)] = _copy(output)  # what follows may write into it

    handles = [m.register_forward_pre_hook(begin) for m in modules]
    handles += [m.register_forward_hook(end) for m in modules]
    try:
        yield events, outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _returning(modules: list[nn.Module], outputs: list[Any]) -> Iterator[None]:
    """Lets modules return recorded outputs instead of computing any."""
    own = [module.__dict__.get("forward") for module in modules]
    try:
        for module, output in zip(modules, outputs, strict=True):
            module.__dict__["forward"] = lambda *_, _output=output, **__: _copy(_output)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward
