"""transformers' table of activations, `ACT2FN`, filled by torchlin; and torchlin's names inside of transformers itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from torch import nn

from torchlin import registry


class _Table(Mapping[str, nn.Module]):
    """Names to new modules, as transformers.activations.ACT2FN."""

    def __getitem__(self, name: str) -> nn.Module:
        return registry.create("activation", name)

    def __iter__(self) -> Iterator[str]:
        return iter(registry.names("activation"))

    def __len__(self) -> int:
        return len(registry.names("activation"))

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and bool(registry.describe("activation", name))
        except KeyError:
            return False


ACT2FN = _Table()
"""{name: a new module}, for each registered activation; aliases work too.

Source: transformers.activations.ACT2FN.

Example:
    >>> from torchlin.compat.transformers import ACT2FN
    >>> ACT2FN["gelu_new"]
    Activation('gelu_tanh')
"""


def get_activation(activation_string: str) -> nn.Module:
    """The activation of a name, as a new module.

    Raises:
        torchlin.registry.UnknownNameError: a ValueError and KeyError with the closest names.

    Source: transformers.activations.get_activation.

    Example:
        >>> from torchlin.compat.transformers import get_activation
        >>> get_activation("silu")
        Activation('silu')
    """
    return ACT2FN[activation_string]


class Installed:
    """What :func:`install` changed: `undo()`, or the end of a with block, puts it back."""

    def __init__(self, table: dict[str, Any], entries: Mapping[str, Any]) -> None:
        # dict's own methods: transformers' table makes a module of each entry that is looked up.
        self._table = table
        self._before = {key: dict.__getitem__(table, key) for key in entries if key in table}
        self._entries = entries
        table.update(entries)

    def undo(self) -> None:
        """Gives each name its entry of before. Models that exist keep the modules that they have."""
        for key in self._entries:
            self._table.pop(key, None)
        self._table.update(self._before)
        self._entries, self._before = {}, {}

    def __enter__(self) -> Installed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def install() -> Installed:
    """Makes transformers use torchlin's activations in the models that it builds from now on.

    Every registered name and alias becomes a value for `hidden_act` and the like, and the names that transformers
    has already mean the same functions, computed by torchlin.

    Returns:
        A handle: `undo()` it, or use it in a with statement.

    Raises:
        ImportError: transformers is not installed.

    Source: transformers.activations.ACT2FN.

    Example:
        >>> from torchlin.compat.transformers import install
        >>> with install():
        ...     from transformers.activations import ACT2FN
        ...     ACT2FN["tanhexp"]
        Activation('tanhexp')
    """
    from transformers.activations import ACT2FN as theirs

    entries: dict[str, Any] = {}
    for name in registry.names("activation"):
        entry = registry.describe("activation", name)
        entries |= dict.fromkeys((entry.name, *entry.aliases), entry.target)
    return Installed(theirs, entries)
