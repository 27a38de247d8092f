"""`torchlin show`: what is known of a name, as text, as a plot in the terminal or as a PNG file."""

from __future__ import annotations

import functools
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from torchlin import _curves, _plot
from torchlin.catalogue import Activation, Parameter, catalogue, find, torch_code
from torchlin.catalogue.kernels import plan
from torchlin.nn.activation import Named
from torchlin.registry import Entry

_BLUE, _ORANGE = "\033[94m", "\033[33m"


def show(
    entry: Entry,
    *,
    parameters: Mapping[str, Any] | None = None,
    window: tuple[float, float] | None = None,
    out: TextIO | None = None,
) -> None:
    """Prints what is known of a registered name: of an activation of the catalogue all of that and a plot.

    Raises:
        ValueError: a parameter outside its domain, or a range that is none.
        TypeError: a parameter that it does not have.
    """
    out = out or sys.stdout
    activation = defined(entry)
    text = describe(entry) if activation is None else _activation(activation, parameters or {}, window, out)
    print("\n".join(text), file=out)


def defined(entry: Entry) -> Activation | None:
    """The row of the catalogue that a registered name stands for; None if it stands for something else."""
    return find(entry.name) if isinstance(entry.target, Named) else None


def describe(entry: Entry) -> list[str]:
    """What is registered: arguments, aliases, where it is defined, how to make one, its documentation."""
    lines = [f"{entry.name}{entry.signature}  [{entry.kind}]"]
    if entry.aliases:
        lines.append(f"also: {', '.join(entry.aliases)}")
    lines.append(f"from: {entry.source}" + (f" ({entry.plugin})" if entry.plugin else ""))
    lines.append(f"make: torchlin.create({entry.kind!r}, {entry.name!r}, ...)")
    if text := inspect.getdoc(entry.target):
        lines += ["", *text.splitlines()]
    return lines


# -------------------------------------------------------------------------------------------------- activations


def _activation(
    activation: Activation, given: Mapping[str, Any], window: tuple[float, float] | None, out: TextIO
) -> list[str]:
    unicode = _can_show(out)
    width = max(20, min(100, shutil.get_terminal_size((80, 24)).columns))
    values = with_parameters(activation, given)
    picture = _curves.picture(activation, values, window)
    colour = out.isatty() and unicode
    lines = [f"{activation.name}: {activation.display}  [activation, {activation.kind}]"]
    lines += _wrapped("also: ", ", ".join(activation.aliases), width)
    lines += ["", *_indented(formula(activation)), ""]
    code = source(activation)
    if code:
        lines += [*_indented(code.splitlines()), ""]
    lines += [*_plots(picture, values, given, width, unicode, colour), ""]
    for name, parameter in activation.parameters.items():
        lines += _wrapped(f"{name} = ", _default(parameter, given.get(name)), width)
    lines += [""] * bool(activation.parameters)
    for title, text in facts(activation):
        lines += _wrapped(f"{title}: ", text, width)
    lines.append(f"make: torchlin.create('activation', {activation.name!r}{_arguments(given)})")
    return lines if unicode else [line.encode("ascii", "replace").decode() for line in map(_ascii, lines)]


def facts(activation: Activation) -> Iterator[tuple[str, str]]:
    """Title and text of what the catalogue and the table of kernels tell of a name, apart from its formula."""
    if activation.gate:
        yield "gate", activation.gate
    if activation.noises:
        noises = (
            f"{n.name} from {n.distribution}({', '.join(map(str, n.arguments))})"
            + (f" for each element of {n.like}" if n.like else "")
            + f", {n.mean} in evaluation"
            for n in activation.noises.values()
        )
        yield "noise", "; ".join(noises)
    year = (
        "" if activation.year is None or str(activation.year) in activation.source else f", {activation.year}"
    )
    yield "source", f"{activation.source}{year}"
    yield "verified", activation.verified or "no"
    if activation.note:
        yield "note", activation.note
    same = relatives(activation)
    if same:
        yield "same function", ", ".join(map(as_another, same))
    known = {a.name for a in same}
    if equal := [name for name in equal_by_default(activation.name) if name not in known]:
        yield "equal at the default parameters", ", ".join(equal)
    if shared := [name for name in kernel_mates(activation) if name not in known.union(equal)]:
        yield "shares its kernel with", ", ".join(shared)


def formula(activation: Activation) -> list[str]:
    """The formula as written, a line for each definition; of a name that is another's function, that name."""
    if activation.same_as:
        return [_binding(activation), f"= {activation.graph}"]
    if activation.formula is None:
        return [activation.note or f"computed by {activation.implementation}"]
    return [re.sub(r"\s+", " ", part.strip()) for part in re.split(r"(?<=;)\s*", activation.formula)]


def source(activation: Activation) -> str:
    """The function as pure torch code for people to read; empty where no formula can say it."""
    if activation.graph is None:
        return ""
    inputs = (*activation.inputs, *(n.name for n in activation.root.noises.values()))
    return torch_code.source(activation.name, activation.graph, inputs, activation.defaults())


def interval(parameter: Parameter) -> str:
    """The domain of a parameter as text, empty for all numbers."""
    return "" if parameter.domain == "(-inf, inf)" else f"in {parameter.domain}"


def traits(parameter: Parameter) -> list[str]:
    """What there is to say of a parameter after its default."""
    learnable = "learnable" * parameter.learnable + ", one for each channel" * parameter.channel
    kept = f"kept there by {parameter.constraint}" if parameter.constraint else ""
    words = f"also called {', '.join(parameter.words)}" if parameter.words else ""
    return list(filter(None, (learnable, interval(parameter), kept, words)))


def _default(parameter: Parameter, given: Any) -> str:
    default = "" if given is None else " (not the default)"
    return ", ".join([number_text(parameter, given) + default, *traits(parameter)])


def number_text(parameter: Parameter, given: Any = None) -> str:
    """The default of a parameter, or another value, in short; of a long vector its ends."""
    value = parameter.default if given is None else given
    if not isinstance(value, Sequence):
        return f"{value:g}"
    if len(value) <= 6:
        return f"[{', '.join(f'{v:g}' for v in value)}]"
    return f"[{value[0]:g}, {value[1]:g}, ..., {value[-1]:g}] ({len(value)} numbers)"


# ---- names and names


def relatives(activation: Activation) -> list[Activation]:
    """Those of the catalogue that share this one's formula, be it with parameters of their own."""
    return [a for a in catalogue().values() if a.root is activation.root and a is not activation]


def as_another(activation: Activation) -> str:
    """A name, with what makes it another case of the function: the parameters it binds, or its defaults."""
    if activation.bindings:
        return f"{activation.name} = {_binding(activation)}"
    defaults = ", ".join(f"{p.name}={number_text(p)}" for p in activation.parameters.values())
    return f"{activation.name}({defaults})" if defaults else activation.name


def _binding(activation: Activation) -> str:
    bound = ", ".join(f"{name}={node}" for name, node in activation.bindings.items())
    return f"{activation.same_as}({bound})" if bound else str(activation.same_as)


def kernel_mates(activation: Activation) -> list[str]:
    """Other names whose function the same kernel computes, with other numbers."""
    own = plan(activation.name)
    if own is None:
        return []
    plans = {name: plan(name) for name in catalogue() if name != activation.name}
    return [name for name, other in plans.items() if other is not None and other.kernel is own.kernel]


def equal_by_default(name: str) -> list[str]:
    """Other names that, with the parameters both have by default, have the same values and derivatives."""
    return next((sorted(group - {name}) for group in _equal_groups() if name in group), [])


@functools.cache
def _equal_groups() -> list[set[str]]:
    # Far out too: what is clamped at 10 is another function.
    x = torch.linspace(-2.2, 2.3, 301, dtype=torch.float64)
    x = torch.cat([x, x**3, torch.tensor([-1e3, 1e3], dtype=torch.float64)])
    groups: list[tuple[torch.Tensor, set[str]]] = []
    for a in catalogue().values():
        if len(a.inputs) != 1 or a.graph is None or a.root.noises:
            continue
        curve = torch.stack(_curves.value_and_slope(_curves.evaluated(a, a.defaults()), x))
        for other, names in groups:
            if torch.allclose(curve, other, rtol=1e-9, atol=1e-12, equal_nan=True):
                names.add(a.name)
                break
        else:
            groups.append((curve, {a.name}))
    return [names for _, names in groups if len(names) > 1]


# ---- parameters from outside


def with_parameters(activation: Activation, given: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of an activation, some of them given.

    Raises:
        ValueError: a value outside the parameter's domain, or a vector of another length.
        TypeError: a name that is no parameter, a vector for a number or a number for a vector.
    """
    for name, value in given.items():
        if name not in activation.parameters:
            known = ", ".join(activation.parameters) or "none"
            raise TypeError(f"{name}: {activation.name} has no such parameter; it has {known}")
        parameter = activation.parameters[name]
        values = value if isinstance(value, Sequence) else (value,)
        if isinstance(parameter.default, tuple) != isinstance(value, Sequence):
            kind = (
                f"{len(parameter.default)} numbers" if isinstance(parameter.default, tuple) else "one number"
            )
            raise TypeError(f"{name}: {activation.name} takes {kind} here, got {len(values)}")
        for one in values:
            if one not in parameter:
                raise ValueError(f"{name} must be in {parameter.domain}, got {one:g}")
    return {**activation.defaults(), **given}


def _arguments(given: Mapping[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in given.items())


# ---- pictures


def _plots(
    picture: _curves.Picture,
    values: Mapping[str, Any],
    given: Mapping[str, Any],
    width: int,
    unicode: bool,
    colour: bool,
) -> list[str]:
    """f and f' next to each other where there is room, else below each other."""
    wide = width >= 72
    columns = min(48, (width - 3) // 2 - 7) if wide else max(12, min(60, width - 8))
    rows = max(6, columns * 3 // 8)
    blocks = []
    for role, paint in (("f", _BLUE), ("derivative", _ORANGE)):
        plot = _plot.Plot(
            columns, rows, (picture.low, picture.high, picture.bottom, picture.top), unicode=unicode
        )
        if role == "f":
            plot.draw(picture.pieces("other"), faint=True)
        plot.draw(picture.pieces(role))
        prime = "" if role == "f" else "′"
        blocks.append([f"f{prime}({picture.axis})", *plot.lines(paint if colour else "")])
    caption = _wrapped("", picture.caption, width)
    if wide:
        return [*_plot.beside(blocks[0], blocks[1], columns + 7), *caption]
    return [*blocks[0], "", *blocks[1], *caption]


def save_png(
    entry: Entry,
    path: str | Path,
    *,
    parameters: Mapping[str, Any] | None = None,
    window: tuple[float, float] | None = None,
) -> None:
    """Writes a plot of an activation and its derivative as a PNG file, with matplotlib.

    Raises:
        ValueError: the name is no activation of the catalogue.
        ModuleNotFoundError: matplotlib is not installed.
    """
    activation = defined(entry)
    if activation is None:
        raise ValueError(f"{entry.name} is no activation of the catalogue: there is nothing to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window system, no global state
    from matplotlib.figure import Figure

    values = with_parameters(activation, parameters or {})
    picture = _curves.picture(activation, values, window)
    figure = Figure(figsize=(6.4, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlim=(picture.low, picture.high), ylim=(picture.bottom, picture.top), xlabel=picture.axis)
    axes.grid(color="#eceff2")
    axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(0, color="#b4bcc5", linewidth=0.8)
    axes.axvline(0, color="#b4bcc5", linewidth=0.8)
    styles: dict[str, dict[str, Any]] = {
        "f": {"color": "#1f6feb", "linewidth": 2.2, "zorder": 3},
        "derivative": {"color": "#e8590c", "linewidth": 1.4, "zorder": 2},
        "other": {"color": "#1f6feb", "linewidth": 1.2, "alpha": 0.4},
    }
    for line in picture.lines:
        for i, piece in enumerate(line.pieces):
            xs, ys = zip(*piece, strict=True)
            label = line.label if i == 0 and line.role != "other" else None
            axes.plot(xs, ys, label=label, **styles[line.role])
    axes.legend(frameon=False)
    chosen = ", ".join(f"{name} = {value}" for name, value in (parameters or {}).items())
    axes.set_title(activation.display + (f", {chosen}" if chosen else ""), fontweight="bold")
    below = textwrap.wrap(" ".join(formula(activation)), 90)[:3]
    figure.supxlabel("\n".join([*below, picture.caption]).strip(), fontsize=8, family="monospace")
    figure.savefig(path, format="png")


# ---- text


def _can_show(out: TextIO) -> bool:
    try:
        "⣿─┼′".encode(getattr(out, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


_PLAIN = str.maketrans({"′": "'", "…": "...", "–": "-", "—": "-", "×": "x", "·": "*"})


def _ascii(line: str) -> str:
    import unicodedata

    return unicodedata.normalize("NFKD", line.translate(_PLAIN))


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _wrapped(title: str, text: str, width: int) -> list[str]:
    if not text:
        return []
    return textwrap.wrap(
        title + text,
        width,
        subsequent_indent=" " * min(len(title), 12),
        break_long_words=False,
        break_on_hyphens=False,
    )
