"""Things chosen by name: kinds, names, aliases, and plug-ins that bring their own.

Every family, torchlin's own included, is a plug-in: an entry point of the group `torchlin.plugins` that
points to a function without arguments, which calls :func:`register`. Nothing is scanned before the first
look-up.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import inspect
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, overload

from torch import nn

Target = TypeVar("Target", bound=Callable[..., Any])

KINDS = ("activation", "attention", "norm", "transform", "quantizer", "loss")
GROUP = "torchlin.plugins"


class UnknownNameError(ValueError, KeyError):
    """No such kind or name; a `ValueError`, and a `KeyError` too, which code for look-up tables expects."""

    __str__ = Exception.__str__  # KeyError would print the message's repr


@dataclass(frozen=True)
class Entry:
    """One registered name: what :func:`describe` returns."""

    kind: str
    name: str
    aliases: tuple[str, ...]
    target: Callable[..., Any]
    plugin: str | None  # the distribution whose plug-in registered it; None: a call of register() did

    @property
    def signature(self) -> str:
        """The arguments that :func:`create` passes on."""
        try:
            text = str(inspect.signature(self.target)).split(" -> ")[0]
            return re.sub(r": '([^']*)'", r": \1", text)  # annotations that were never evaluated
        except (TypeError, ValueError):  # a builtin without one
            return "(...)"

    @property
    def summary(self) -> str:
        """The first paragraph of the target's docstring."""
        return (inspect.getdoc(self._defined) or "").split("\n\n")[0].replace("\n", " ")

    @property
    def source(self) -> str:
        """Where the target is defined, as `module.name`."""
        defined = self._defined
        return f"{defined.__module__}.{getattr(defined, '__qualname__', type(defined).__qualname__)}"

    @property
    def _defined(self) -> Any:
        return self.target.func if isinstance(self.target, functools.partial) else self.target


# {kind: {name or alias: entry}}. The lock is held for table work only, never while a plug-in is imported: a
# thread in the middle of importing that very plug-in may be waiting for it in register().
_entries: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
_lock = threading.RLock()


# -------------------------------------------------------------------------------------------------- register


@overload
def register(
    kind: str, name: str, target: None = None, *, aliases: Iterable[str] = (), override: bool = False
) -> Callable[[Target], Target]: ...
@overload
def register(
    kind: str, name: str, target: Target, *, aliases: Iterable[str] = (), override: bool = False
) -> Target: ...
def register(
    kind: str,
    name: str,
    target: Target | None = None,
    *,
    aliases: Iterable[str] = (),
    override: bool = False,
) -> Target | Callable[[Target], Target]:
    """Registers a class, or a function that makes the object, under a name; also as a decorator.

    Names are case-insensitive, "-" and "_" are one character. Registering the same object again is harmless.

    Args:
        kind: activation, attention, norm, transform, quantizer or loss.
        name: letters, digits, "_" and "."; `aliases` are further names of the same thing.
        override: replace the entry of that name, its aliases included, instead of raising.

    Raises:
        ValueError: the name or an alias is taken by something else (say so with `override=True`), or is no
            valid name.
        TypeError: `target` is not callable.

    Example:
        >>> import torch, torchlin
        >>> @torchlin.register("activation", "cube", aliases=("x3",))
        ... class Cube(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x**3
        >>> torchlin.create("activation", "X3")(torch.tensor(2.0))
        tensor(8.)
    """
    _own_plugins.load()  # so that a name of ours is refused here, not missed later
    kind = _kind(kind)
    if isinstance(aliases, str):
        raise TypeError(f"aliases must be a sequence of names, got the str {aliases!r}")
    keys = list(dict.fromkeys([_valid(name, "name"), *(_valid(alias, "aliases") for alias in aliases)]))

    def enter(target: Target) -> Target:
        if not callable(target):
            raise TypeError(f"target must be a class or a function that makes the object, got {target!r}")
        entry = Entry(kind, keys[0], tuple(keys[1:]), target, _plugin.get())
        with _lock:
            table = _entries[kind]
            old = table.get(entry.name)
            if old is not None and (old.name != entry.name or not (override or old.target is target)):
                old = None  # nothing that this call may replace
            for key in keys:
                if (owner := table.get(key)) is not old and owner is not None:
                    raise ValueError(_taken_message(key, entry, owner))
            for key in (old.name, *old.aliases) if old else ():
                del table[key]
            table.update(dict.fromkeys(keys, entry))
        return target

    return enter if target is None else enter(target)


def _taken_message(key: str, new: Entry, owner: Entry) -> str:
    by = f"{owner.source}, registered by {owner.plugin or 'a call of register()'}"
    if key == new.name == owner.name:
        return f"name: {new.kind} {key!r} is taken by {by}; override=True replaces it"
    argument = "name" if key == new.name else "aliases"
    return f"{argument}: {key!r} already means the {owner.kind} {owner.name!r} ({by})"


def _fold(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _valid(name: str, argument: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{argument}: a name must be a str, got {name!r}")
    folded = _fold(name)
    if not re.fullmatch(r"\w[\w.]*", folded, re.ASCII):
        raise ValueError(f'{argument}: {name!r} is no name; a name has letters, digits, "_", "-" and "."')
    return folded


# --------------------------------------------------------------------------------------------------- look up


def create(kind: str, key: Any, /, **kwargs: Any) -> Any:
    """Makes what `key` stands for, handing `kwargs` to its constructor.

    Args:
        kind: activation, attention, norm, transform, quantizer or loss.
        key: a registered name; a dict `{"type": name or class, ...}` whose other items are arguments; a class
            or any other callable, which is called with the arguments; a Module, returned as it is; or None,
            which gives None.

    Raises:
        UnknownNameError: no such kind or name; the closest names are given.
        ValueError: a dict without "type".
        TypeError: a key of another type, an argument that comes both in the dict and in `kwargs`, or
            arguments for a Module that exists already.

    Example:
        >>> import torchlin
        >>> torchlin.create("transform", {"type": "hadamard", "n": 64}, randomized=True)
        HadamardTransform(n=64, randomized=True, seed=0)
    """
    kind = _kind(kind)
    if key is None:
        return None
    if isinstance(key, Mapping):
        arguments = dict(key)
        if "type" not in arguments:
            raise ValueError(
                f'key: a dict needs "type", the name of the {kind}; got {sorted(map(str, arguments))}'
            )
        key = arguments.pop("type")
        if twice := sorted(arguments.keys() & kwargs.keys()):
            raise TypeError(f"key: {', '.join(twice)} given twice, in the dict and as an argument")
        kwargs = arguments | kwargs
    if isinstance(key, str):
        return describe(kind, key).target(**kwargs)
    if isinstance(key, nn.Module):
        if kwargs:
            given = ", ".join(kwargs)
            raise TypeError(
                f"key: a {type(key).__name__} that exists already takes no arguments, got {given}"
            )
        return key
    if callable(key):
        return key(**kwargs)
    raise TypeError(f"key must be a name, a dict, a class, a callable, a Module or None, got {key!r}")


def names(kind: str, pattern: str = "*") -> list[str]:
    """Names of one kind that match a pattern themselves or by an alias, in natural order ("x2" before "x10").

    The pattern has the wildcards of `fnmatch`.

    Raises:
        UnknownNameError: no such kind.

    Example:
        >>> import torchlin
        >>> torchlin.names("transform", "*hada*")
        ['hadamard']
    """
    table = _table(kind)
    # "-" is a range inside [...] and "_" elsewhere.
    pattern = re.sub(
        r"\[[^]]*\]|-", lambda part: part[0] if len(part[0]) > 1 else "_", pattern.strip().lower()
    )
    return sorted(
        {entry.name for key, entry in table.items() if fnmatch.fnmatchcase(key, pattern)}, key=_natural
    )


def describe(kind: str, name: str) -> Entry:
    """What is registered under a name or alias: name, aliases, target, signature, summary, source, plugin.

    Raises:
        UnknownNameError: no such kind or name; the closest names are given.

    Example:
        >>> import torchlin
        >>> torchlin.describe("transform", "Walsh-Hadamard").name
        'hadamard'
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {name!r}")
    table = _table(kind)
    entry = table.get(_fold(name))
    if entry is None:
        raise UnknownNameError(_unknown_message(_kind(kind), name, table))
    return entry


def find(name: str) -> list[Entry]:
    """What is registered under a name or alias, in every kind.

    Raises:
        UnknownNameError: no kind has it; the closest names are given.

    Example:
        >>> from torchlin import registry
        >>> [entry.kind for entry in registry.find("hadamard")]
        ['transform']
    """
    tables = [_table(kind) for kind in KINDS]
    found = [table[_fold(name)] for table in tables if _fold(name) in table]
    if not found:
        close = _closest(name, {key for table in tables for key in table})
        raise UnknownNameError(f"name: {name!r} is registered in no kind{_suggest(close)}")
    return found


def _unknown_message(kind: str, name: str, table: Mapping[str, Entry]) -> str:
    message = f"name: {name!r} is no registered {kind}"
    if others := [other for other in KINDS if _fold(name) in _entries[other]]:
        message += f"; it is a registered {' and '.join(others)}"
    else:
        message += _suggest(_closest(name, table))
    count = len({id(entry) for entry in table.values()})
    return f"{message}. torchlin.names({kind!r}) lists all {count}"


def _suggest(close: list[str]) -> str:
    return f"; the closest: {', '.join(map(repr, close))}" if close else ""


def _closest(name: str, known: Iterable[str]) -> list[str]:
    known, folded = sorted(known), _fold(name)
    inside = [key for key in known if folded and (folded in key or (len(key) > 2 and key in folded))]
    return list(dict.fromkeys([*difflib.get_close_matches(folded, known, n=3), *inside]))[:5]


def _kind(kind: str) -> str:
    if not isinstance(kind, str):
        raise TypeError(f"kind must be a str, got {kind!r}")
    if _fold(kind) not in KINDS:
        raise UnknownNameError(f"kind: {kind!r} is none of {', '.join(KINDS)}")
    return _fold(kind)


def _table(kind: str) -> dict[str, Entry]:
    kind = _kind(kind)
    _own_plugins.load()
    _other_plugins.load()
    with _lock:
        return dict(_entries[kind])


def _natural(name: str) -> list[Any]:
    # Digits and letters alternate, so that int is compared with int and str with str.
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


# -------------------------------------------------------------------------------------------------- plug-ins

_plugin: ContextVar[str | None] = ContextVar("torchlin_plugin", default=None)


class _Plugins:
    """A set of entry points that is loaded once, by the first thread that needs it; the others wait."""

    def __init__(self, find: Callable[[], Iterable[metadata.EntryPoint]]) -> None:
        self._find = find
        self._lock = threading.RLock()
        self._loading = False
        self._loaded = False

    def load(self) -> None:
        if self._loaded:
            return
        with self._lock:
            if self._loaded or self._loading:  # loading: a plug-in looks something up or registers
                return
            self._loading = True
            try:
                for point in self._find():
                    _load(point)
                self._loaded = True
            finally:
                self._loading = False


def _load(point: metadata.EntryPoint) -> None:
    owner = f"{point.dist.name} {point.dist.version}" if point.dist else "torchlin"
    token = _plugin.set(owner)
    try:
        point.load()()
    except Exception as error:  # whatever a stranger's plug-in raises, the rest works
        warnings.warn(
            f"the plug-in {point.name!r} ({point.value}) of {owner} does not load, its names are "
            f"missing: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
    finally:
        _plugin.reset(token)


def _find_own() -> Iterable[metadata.EntryPoint]:
    try:
        return metadata.distribution("torchlin").entry_points.select(group=GROUP)
    except metadata.PackageNotFoundError:
        # A source tree that was never installed has no metadata, but it has the file that the metadata is
        # made from. Read by hand: Python 3.10 has no TOML parser.
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
        text = project.read_text(encoding="utf-8") if project.is_file() else ""
        section = re.search(rf'^\[project\.entry-points\."{re.escape(GROUP)}"\]$([^\[]*)', text, re.MULTILINE)
        lines = re.findall(r'^([\w.-]+) *= *"([\w.:]+)"', section[1], re.MULTILINE) if section else []
        return [metadata.EntryPoint(name, value, GROUP) for name, value in lines]


def _find_others() -> Iterable[metadata.EntryPoint]:
    points = metadata.entry_points(group=GROUP)
    return [point for point in points if point.dist is None or _fold(point.dist.name) != "torchlin"]


_own_plugins = _Plugins(_find_own)
_other_plugins = _Plugins(_find_others)
