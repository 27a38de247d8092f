"""The table of kernels: which functions the compiled library has, and what each name of the catalogue hands
to which.

Two names share a kernel when their formulas, rewritten, differ only in numbers that the host computes: celu
is mpelu with slots (1/a, a) instead of (b, a). So the table has fewer rows than the catalogue.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from . import Activation, catalogue, find
from .formula import Call, Node, Number, Param, input_, param, substitute
from .rewrite import Prepared, Slot, prepare


@dataclass(frozen=True)
class Kernel:
    """A function of the compiled library: of inputs, element by element, and of slots."""

    name: str  # that of the first activation that has it
    inputs: tuple[str, ...]
    body: Node
    vector_slots: tuple[bool, ...]  # for each slot: a coefficient vector, or one number

    @functools.cached_property
    def id(self) -> int:
        """A number that depends on name and function alone: adding activations moves nothing, and a library or an
        exported graph with another function of that name finds none instead of a wrong one."""
        place: dict[Node, int] = {}
        steps = [self.name, *self.inputs]
        for part in self.body.walk():  # each part once: written out, what is shared could be endless
            place[part] = len(place)
            if isinstance(part, Call):
                steps.append(f"{part.op} {[place[arg] for arg in part.args]}")
            elif isinstance(part, Slot):
                steps.append(f"slot {part.index} {part.vector}")
            else:
                steps.append(repr(part))
        return zlib.crc32("\n".join(steps).encode()) & 0x7FFFFFFF


@dataclass(frozen=True)
class Plan:
    """How an activation is computed: a kernel, and the expressions in the parameters that fill its slots."""

    kernel: Kernel
    slots: tuple[Node, ...]


def nonnegative(activation: Activation) -> frozenset[str]:
    """Parameters whose domain excludes negative numbers; the rewrites rely on it."""
    return frozenset(p.name for p in activation.parameters.values() if p.low >= 0)


@functools.cache
def _prepared(name: str, training: bool) -> Prepared:
    return _prepare(find(name), training)


def _prepare(activation: Activation, training: bool) -> Prepared:
    graph = activation.graph if training else activation.eval_graph
    assert graph is not None
    return prepare(graph, nonnegative(activation))


def _inputs(activation: Activation, training: bool) -> tuple[str, ...]:
    noise = tuple(n.name for n in activation.noises.values() if not n.like) if training else ()
    return (*activation.inputs, *noise)


@functools.cache
def kernels() -> Mapping[str, Kernel]:
    """Every kernel by name, in the order of the catalogue; those for evaluating what is random come last."""
    found: dict[tuple[Node, tuple[str, ...]], Kernel] = {}
    roots = [a for a in catalogue().values() if a.root is a and a.graph is not None]
    for training in (True, False):
        for a in roots:
            if not training and not a.noises:
                continue
            prepared = _prepared(a.name, training)
            key = prepared.body, _inputs(a, training)
            if key not in found:
                name = a.name if training else f"{a.name}_eval"
                found[key] = Kernel(name, key[1], prepared.body, tuple(s.is_vector for s in prepared.slots))
    table = {k.name: k for k in found.values()}
    assert len(table) == len(found) == len({k.id for k in table.values()}), "two kernels with one name or id"
    return MappingProxyType(table)


@functools.cache
def _by_body() -> Mapping[tuple[Node, tuple[str, ...]], Kernel]:
    return {(k.body, k.inputs): k for k in kernels().values()}


@functools.cache
def plan(name: str, training: bool = True) -> Plan | None:
    """The plan of a name of the catalogue; None where code takes the place of a formula.

    Args:
        training: with noise as inputs; otherwise with what takes its place in evaluation.
    """
    activation = find(name)
    root = activation.root
    if root.graph is None:
        return None
    training = training or not root.noises
    prepared = _prepared(root.name, training)
    own = {param(p.name, p.is_vector): activation.root_bindings[p.name] for p in root.parameters.values()}
    inputs = _inputs(root, training)
    kernel = _by_body().get((prepared.body, inputs)) or _of_no_file(prepared, inputs)
    return Plan(kernel, tuple(substitute(s, own) for s in prepared.slots))


_loaded: dict[int, tuple[Kernel, set[str]]] = {}


def loaded(kernel: Kernel, device: str | None = None) -> None:
    """Says that a kernel that is not in the table was compiled since for a type of devices; for None, that it may be."""
    devices = _loaded.setdefault(kernel.id, (kernel, set()))[1]
    if device is not None:
        devices.add(device)


def devices(kernel: Kernel) -> tuple[str, ...]:
    """The types of devices that have a kernel where torchlin's library for them is loaded."""
    if kernel.name in kernels():
        return ("cpu", "cuda")
    return tuple(sorted(_loaded[kernel.id][1])) if kernel.id in _loaded else ()


def with_id(id: int) -> Kernel:
    """The kernel of an id, in the table or compiled since.

    Raises:
        KeyError: there is none.
    """
    return _loaded[id][0] if id in _loaded else _by_id()[id]


@functools.cache
def _by_id() -> Mapping[int, Kernel]:
    return {kernel.id: kernel for kernel in kernels().values()}


def forget() -> None:
    """Drops what was derived from activations that :func:`catalogue.add` has replaced since."""
    _prepared.cache_clear()
    plan.cache_clear()


def kernel_of(activation: Activation) -> Kernel:
    """The kernel of an activation that was not added yet."""
    return _of_no_file(_prepare(activation, True), _inputs(activation, True))


def _of_no_file(prepared: Prepared, inputs: tuple[str, ...]) -> Kernel:
    """The kernel of an activation that was added: one of the table where that computes the same, else one that is named
    by its content, so that it is the same in every process."""
    usual = ("x",) if len(inputs) == 1 else ("a", "b", "c")[: len(inputs)]
    body = substitute(prepared.body, {input_(a): input_(b) for a, b in zip(inputs, usual, strict=True)})
    if found := _by_body().get((body, usual)):
        return found
    place: dict[Node, int] = {}
    digest = hashlib.sha256()
    for part in body.walk():  # not its text, in which what is shared is written out
        place[part] = len(place)
        own = (
            part.op
            if isinstance(part, Call)
            else part.value.hex()
            if isinstance(part, Number)
            else repr(part)
        )
        digest.update(f"{own} {[place[arg] for arg in part.args]}\n".encode())
    kernel = Kernel(
        f"formula_{digest.hexdigest()[:16]}", usual, body, tuple(s.is_vector for s in prepared.slots)
    )
    assert kernel.id not in {k.id for k in kernels().values()}, "two kernels with one id"
    return kernel


def with_named_slots(body: Node) -> Node:
    """The body as a formula that can be printed and evaluated: slot i becomes the parameter p{i}."""
    named: dict[Node, Node] = {s: param(f"p{s.index}", s.vector) for s in body.walk() if isinstance(s, Slot)}
    return substitute(body, named)


def parameters_of(node: Node) -> set[str]:
    return {p.name for p in node.walk() if isinstance(p, Param)}
