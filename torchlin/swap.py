"""Replaces modules inside a model that exists."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import functools
import itertools
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchlin import registry
from torchlin.nn.activation_from import equal_of, from_torch

Key = str | type[nn.Module]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def swap_(
    model: nn.Module, replacements: Mapping[Key, Any] | None = None, *, kind: str = "activation"
) -> dict[str, nn.Module]:
    """Replaces modules inside `model`, in place, and returns what was there; call again with that to undo it.

    What stays: parameters and saved buffers whose names the replacement has too (the very same tensors, so
    that tied weights, optimizers and `requires_grad` hold), dtype and device, the training flag, forward and
    backward hooks. A module that is used in several places gets one replacement. If anything fails, the model
    is as it was.

    Args:
        model: what to change; it can not be replaced itself.
        replacements: {which: by what}.

            Which is a class, for modules of exactly that class (a subclass may do something else); a name as
            in `model.named_modules()`; or such a name with the wildcards of `fnmatch` ("layers.*.act", where
            "*" crosses dots). A name goes before a pattern, a pattern before a class, and earlier keys before
            later ones. What is inside a replaced module is left alone.

            By what is a name, a dict, a class or a `functools.partial` of one, as in :func:`torchlin.create`;
            a function, which gets the old module and returns the new one (or the old one, to leave it); or a
            Module, which keeps its own weights: under a name it is used itself, under a pattern or a class
            each place gets a copy.

            A name brings its own defaults; :func:`torchlin.nn.from_torch` is a function that keeps the arguments of
            the old module, as the slope of a LeakyReLU.

            None: every activation of torch, transformers and timm by its equal of the catalogue, with the same
            arguments (:func:`torchlin.nn.from_torch`); what has none is left.
        kind: of the registered names among the replacements.

    Returns:
        {name: module that was there}; a module with several names is under its first.

    Raises:
        ValueError: a key matches nothing or the model itself, a replacement can not be made, a weight of the
            same name has another shape, or two names of one module ask for two replacements.
        TypeError: a key or a replacement of another type.

    Example:
        >>> import torch, torchlin
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        >>> old = torchlin.swap_(model, {torch.nn.ReLU: torch.nn.PReLU})
        >>> model[1], old
        (PReLU(num_parameters=1), {'1': ReLU()})
        >>> torchlin.swap_(model, old)
        {'1': PReLU(num_parameters=1)}
        >>> torchlin.swap_(model)
        {'1': ReLU()}
    """
    if replacements is None:
        replacements = _equals(model)
    places: dict[nn.Module, list[str]] = {}  # all names of each module, in the model's order
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    keys = _choose(model, replacements, places)
    replaced = {name for module in keys for name in places[module]}
    names = {module: [name for name in places[module] if not _inside(name, replaced)] for module in keys}
    made = {
        old: _make(model, names[old][0], old, key, replacements[key], kind)
        for old, key in keys.items()
        if names[old]
    }
    made = {old: new for old, new in made.items() if new is not old}
    # Nothing below can fail half-way.
    parents = {name: model.get_submodule(name.rpartition(".")[0]) for old in made for name in names[old]}
    for old, new in made.items():
        _share_hooks(old, new)
        for name in names[old]:
            parents[name]._modules[name.rpartition(".")[2]] = new
    return {names[old][0]: old for old in made}


# ---------------------------------------------------------------------------------------------- which modules


def _equals(model: nn.Module) -> dict[Key, Any]:
    modules = model.named_modules(remove_duplicate=False)
    return {name: from_torch for name, module in modules if name and equal_of(module) is not None}


def _choose(
    model: nn.Module, replacements: Mapping[Key, Any], places: Mapping[nn.Module, list[str]]
) -> dict[nn.Module, Key]:
    """The key that replaces each module that any key matches, parents before children."""
    known = {name for names in places.values() for name in names}
    for key in replacements:
        if not isinstance(key, str) and not (isinstance(key, type) and issubclass(key, nn.Module)):
            raise TypeError(
                f"replacements: a key must be a module's name, a pattern or a Module class, got {key!r}"
            )
        if key == "" or key is type(model):
            raise ValueError(
                f"replacements: {_show(key)} is the model itself, which has no place to be replaced in; "
                "give the module that holds it, or use torchlin.create"
            )
    ranked = sorted(replacements, key=lambda key: 2 if isinstance(key, type) else key not in known)
    keys: dict[nn.Module, Key] = {}
    replaced: set[str] = set()
    unmatched = dict.fromkeys(replacements)
    for module, all_names in places.items():
        names = [name for name in all_names if not _inside(name, replaced)]
        if module is model or not names:
            continue
        matching = [key for key in ranked if _matches(key, module, names, known)]
        for key in matching:
            unmatched.pop(key, None)
        if matching:
            _refuse_two(matching, names, replacements)
            keys[module] = matching[0]
            replaced.update(all_names)
    if unmatched:
        hints = "; ".join(_show(key) + _hint(key, places) for key in unmatched)
        raise ValueError(f"replacements: nothing in this {type(model).__name__} matches {hints}")
    return keys


def _inside(name: str, replaced: set[str]) -> bool:
    """Whether the way to `name` leads through a module that is replaced."""
    return any(name[: dot.start()] in replaced for dot in re.finditer(r"\.", name))


def _matches(key: Key, module: nn.Module, names: list[str], known: set[str]) -> bool:
    if isinstance(key, type):
        return type(module) is key
    # A name is a name even where it has characters of a pattern: the keys of a ModuleDict are free.
    return key in names or (key not in known and any(fnmatch.fnmatchcase(name, key) for name in names))


def _refuse_two(matching: list[Key], names: list[str], replacements: Mapping[Key, Any]) -> None:
    named = [key for key in matching if key in names]
    if any(replacements[key] is not replacements[named[0]] for key in named):
        raise ValueError(
            f"replacements: {' and '.join(map(repr, named))} are one module, which can have one replacement"
        )


def _hint(key: Key, places: Mapping[nn.Module, list[str]]) -> str:
    if isinstance(key, type):
        subclasses = {type(module).__name__ for module in places if isinstance(module, key)}
        found = f"subclasses there: {', '.join(sorted(subclasses))}" if subclasses else ""
    else:
        close = difflib.get_close_matches(key, [name for names in places.values() for name in names], n=3)
        found = f"closest names: {', '.join(map(repr, close))}" if close else ""
    return f" ({found})" if found else ""


def _show(key: Key) -> str:
    return key.__qualname__ if isinstance(key, type) else repr(key)


# -------------------------------------------------------------------------------------------- by what modules


def _make(model: nn.Module, name: str, old: nn.Module, key: Key, value: Any, kind: str) -> nn.Module:
    """The replacement of one module, ready to be put in its place."""
    given = isinstance(value, nn.Module)
    itself = given and key == name
    if itself:
        new = value
    elif given:
        new = copy.deepcopy(value)
    elif value is None:
        raise TypeError(f"replacements[{_show(key)}] is None; torch.nn.Identity() takes a module out")
    else:
        try:
            new = value(old) if _takes_module(value) else registry.create(kind, value)
        except registry.UnknownNameError:
            raise
        except Exception as error:
            raise ValueError(f"replacements[{_show(key)}]: no replacement for {name!r}: {error}") from error
    if not isinstance(new, nn.Module):
        raise TypeError(f"replacements[{_show(key)}] must give a Module for {name!r}, got {new!r}")
    if new is old:
        return new
    home = _home(model, name)
    if home is not None:
        # The dtype of a Module that comes by name is its own: undoing must give back what was there.
        _settle(new, home.device, None if itself else home.dtype, old)
    if not given:
        _keep_weights(old, new, f"replacements[{_show(key)}]: {name!r}")
    return new.train(old.training)


def _takes_module(value: Any) -> bool:
    # partial(nn.GELU, approximate="tanh") is how people write a class with arguments.
    made_by = value.func if isinstance(value, functools.partial) else value
    return callable(made_by) and not isinstance(made_by, type)


def _home(model: nn.Module, name: str) -> Tensor | None:
    """The floating-point tensor that is nearest to a place, going up from it: it tells dtype and device."""
    while True:
        module = model.get_submodule(name)
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            if tensor.is_floating_point():
                return tensor
        if not name:
            return None
        name = name.rpartition(".")[0]


def _settle(new: nn.Module, device: torch.device, dtype: torch.dtype | None, old: nn.Module) -> None:
    # The old module's own tensors stay as they are: a wrapper around it shares them.
    ours = {id(tensor) for tensor in itertools.chain(old.parameters(), old.buffers())}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) in ours:
            return tensor
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    new._apply(move)


def _keep_weights(old: nn.Module, new: nn.Module, where: str) -> None:
    have, want = old.state_dict(keep_vars=True), new.state_dict(keep_vars=True)
    kept = [key for key in have if key in want]
    for key in kept:
        theirs, ours = have[key], want[key]
        if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor):
            continue  # extra state is for the module's own loader to check
        if theirs.shape != ours.shape:
            raise ValueError(
                f"{where} has {key} of shape {tuple(theirs.shape)}, its replacement {type(new).__name__} of "
                f"shape {tuple(ours.shape)}; a Module under the full name keeps its own weights"
            )
        if isinstance(theirs, nn.Parameter) and isinstance(ours, nn.Parameter):
            # load_state_dict(assign=True) would keep the new module's flag.
            ours.requires_grad_(theirs.requires_grad)
        elif isinstance(theirs, nn.Parameter):
            have[key] = theirs.detach()  # a buffer stays a buffer
    if kept and len(kept) < len(have):
        left = ", ".join(key for key in have if key not in want)
        warnings.warn(
            f"{where} has {left}, for which its replacement {type(new).__name__} has no place", stacklevel=3
        )
    new.load_state_dict({key: have[key] for key in kept}, strict=False, assign=True)


def _share_hooks(old: nn.Module, new: nn.Module) -> None:
    if any(module is old for module in new.modules()):
        return  # a wrapper: the old module runs its own hooks
    for table in _HOOKS:
        theirs, own = getattr(old, table), getattr(new, table)
        if not own:
            setattr(new, table, theirs)  # one table for both: the handles that people hold still remove
        elif own is not theirs:
            own.update(theirs)
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook
