"""The `torchlin` command. What a subcommand needs is imported when it runs."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchlin.registry import Entry

FORWARDED = {
    "bench": "measure a family's kernels on this machine (all families without a name)",
    "demo": "the tour on real inputs, or the stops that are named",
}


class Refused(Exception):
    """What the user asked for can not be done; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 (found nothing), 2 (refused), or the command's."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an author's name is no reason to fail
    try:
        # Their options are their own: argparse has no way of passing "--help" on.
        if argv[:1] == ["bench"]:
            return _bench(argv[1:])
        if argv[:1] == ["demo"]:
            return _demo(argv[1:])
        args = _parser(argv).parse_args(argv)
        status = args.run(args)
        sys.stdout.flush()
        return status
    except Refused as error:
        print(f"torchlin: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `torchlin list | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchlin", description="Linearity and non-linearity in neural networks: ops, modules, names."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what runs where on this machine, and why not")
    info.add_argument("--json", action="store_true", help="as JSON, for bug reports and scripts")
    info.set_defaults(run=_info)

    names = commands.add_parser("list", help="the registered names")
    names.add_argument("kind", nargs="?", help="activation, attention, norm, transform, quantizer or loss")
    names.add_argument("pattern", nargs="?", default="*", help="wildcards: '*gelu*'")
    names.set_defaults(run=_list)

    show = commands.add_parser("show", help="what is behind a name; of an activation with a plot")
    show.add_argument("kind", nargs="?", help="where a name has several kinds")
    show.add_argument("name", help="a name or an alias")
    plot = show.add_argument_group("activations")
    plot.add_argument("--param", action="append", default=[], metavar="NAME=VALUE", help="a=0.3, or b=1,2,3")
    plot.add_argument("--range", nargs=2, type=float, metavar=("FROM", "TO"), help="of the plot: -4 4")
    plot.add_argument("--png", metavar="FILE", help="write the plot to a file (needs matplotlib)")
    show.set_defaults(run=_show)

    quantize = commands.add_parser(
        "quantize", help="quantize a language model's checkpoint, measure and save it"
    )
    if argv[:1] == ["quantize"]:  # its options are with it; the import takes torch
        from torchlin.quant import command

        command.add_arguments(quantize)
    quantize.set_defaults(run=_quantize)

    for name, what in FORWARDED.items():
        commands.add_parser(name, help=what, add_help=False)
    return parser


def _info(args: argparse.Namespace) -> int:
    from torchlin import info

    facts = info.collect()
    if args.json:
        import json

        print(json.dumps(facts, indent=2))
    else:
        info.show(facts)
    return 0


def _list(args: argparse.Namespace) -> int:
    from torchlin import _console, registry

    kind, pattern = args.kind, args.pattern
    if kind is not None and pattern == "*" and any(wildcard in kind for wildcard in "*?["):
        kind, pattern = None, kind  # torchlin list '*gelu*'
    with _known_names():
        kinds = registry.KINDS if kind is None else (kind,)
        found = [registry.describe(k, name) for k in kinds for name in registry.names(k, pattern)]
    if not found:
        print(f"torchlin: no {kind or 'name'} matches {pattern!r}", file=sys.stderr)
        return 1
    if all(entry.kind == "activation" for entry in found):
        _console.table("", ("name", "kind", "formula", "aliases"), map(_activation_row, found))
    else:
        rows = [(entry.kind, entry.name, ", ".join(entry.aliases), entry.summary) for entry in found]
        _console.table("", ("kind", "name", "aliases", "what"), rows)
    return 0


def _activation_row(entry: Entry) -> tuple[str, str, str, str]:
    from torchlin import show

    activation = show.defined(entry)
    kind = "" if activation is None else activation.kind.replace("_", " ")
    what = entry.summary if activation is None else " ".join(show.formula(activation))
    short = what if len(what) <= 60 else what[:57].rstrip() + "..."
    return entry.name, kind, short, ", ".join(entry.aliases)


def _show(args: argparse.Namespace) -> int:
    from torchlin import registry, show

    with _known_names():
        found = [registry.describe(args.kind, args.name)] if args.kind else registry.find(args.name)
    parameters = dict(map(_parameter, args.param))
    window = tuple(args.range) if args.range else None
    drawn = [entry for entry in found if show.defined(entry)]
    if not drawn and (args.param or args.range or args.png):
        raise Refused(f"{args.name} is no activation of the catalogue: there is nothing to plot")
    try:
        if args.png:
            with _needs("plots"):
                show.save_png(drawn[0], args.png, parameters=parameters, window=window)
            return 0
        for i, entry in enumerate(found):
            print("\n" * (i > 0), end="")
            show.show(entry, parameters=parameters, window=window)
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError) as error:
        raise Refused(str(error)) from error
    return 0


def _parameter(text: str) -> tuple[str, float | tuple[float, ...]]:
    """a=0.3 as a number, b=1,2,3 as a coefficient vector."""
    name, _, value = text.partition("=")
    try:
        numbers = tuple(float(part) for part in value.rstrip(",").split(","))
    except ValueError:
        raise Refused(
            f"--param: must be of the form name=number or name=number,number, got {text!r}"
        ) from None
    return name.strip(), numbers if "," in value else numbers[0]


def _bench(argv: list[str]) -> int:
    try:
        from torchlin import benchmarks
    except ImportError as error:
        raise Refused("bench: install torchlin first, for example with pip install -e .") from error
    modules = [found.name for found in pkgutil.iter_modules(benchmarks.__path__)]
    families = [name.removeprefix("bench_") for name in modules if name.startswith("bench_")]
    if argv[:1] in (["-h"], ["--help"]):
        print(f"usage: torchlin bench [FAMILY] [options]\n\nfamilies: {', '.join(families)}\n")
        print("torchlin bench FAMILY --help tells a family's options; without a family, all are run.")
        return 0
    if argv and not argv[0].startswith("-"):
        family = argv.pop(0)
        if family not in families:
            close = difflib.get_close_matches(family, families)
            raise Refused(
                f"bench: {family!r} is no family; {'did you mean' if close else 'there are'} "
                f"{', '.join(close or families)}"
            )
        families = [family]
    with _needs("bench"):
        mains = [importlib.import_module(f"torchlin.benchmarks.bench_{family}").main for family in families]
        return max([main(argv) or 0 for main in mains], default=0)


def _quantize(args: argparse.Namespace) -> int:
    from torchlin.quant import command

    with _needs("quant"):
        try:
            return command.run(args)
        except (ValueError, TypeError, OSError) as error:
            raise Refused(str(error)) from error


def _demo(argv: list[str]) -> int:
    with _needs("demo"):
        return importlib.import_module("torchlin.demo").main(argv) or 0


@contextlib.contextmanager
def _needs(extra: str) -> Iterator[None]:
    """Turns a missing package into a sentence that says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("torchlin"):
            raise
        raise Refused(f"{extra} needs {error.name}: pip install 'torchlin[{extra}]'") from error


@contextlib.contextmanager
def _known_names() -> Iterator[None]:
    from torchlin import registry

    try:
        yield
    except registry.UnknownNameError as error:
        raise Refused(str(error)) from error
