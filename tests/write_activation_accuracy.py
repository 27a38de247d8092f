"""Measures which names miss 4 ULP in float32, by how much and why, and writes tests/activation_accuracy.csv.

    python tests/write_activation_accuracy.py

The reason is told from where the largest error in ULP is: in a tail, where the value is the exponential of something
large that was itself rounded; at a zero, where terms larger than the value cancel; or nowhere in particular, where the
roundings of several functions add up.
"""

from __future__ import annotations

import csv
import math

import battery
import test_activation as names
import torch

STATED = {
    "siren": "the phase 30 x is rounded before the sine",
    "finer": "the phase 30 (|x| + 1) x is rounded before the sine",
    "hcaf": "a chaotic map: three steps multiply every rounding by up to 64",
    "sbaf": "the bound 1 - 1e-7 of x has no float32 next to it, and a power of 1 - x is taken",
}


def measure(row: names.Activation) -> tuple[float, float, str] | None:
    """The absolute error over max(1, |x|) where 4 ULP are missed, the largest error in ULP, and the reason."""
    worst, most, reason = 0.0, 0.0, ""
    for level in battery.cpu_isa_levels():
        with level:
            x, in_ulp, absolute = names.errors(row)
        missed = in_ulp > 4
        if not missed.any():
            continue
        worst = max(worst, absolute[missed].max().item())
        at = int(in_ulp.argmax())
        if in_ulp[at] > most:
            most = in_ulp[at].item()
            value = names.activation(x[at].double(), row.name).abs().item()
            largest = names.activation(x.double(), row.name).abs()
            top = largest[torch.isfinite(largest)].median().item()
            if most <= 6:
                reason = "roundings of several functions add up"
            elif value < 1e-6 * max(top, 1e-3) and most < 1000:
                reason = "the argument of an exponential is rounded, which its tail magnifies"
            else:
                reason = "terms larger than the value cancel"
    return (worst, most, STATED.get(row.name, reason)) if worst else None


def main() -> None:
    with names.TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("name", "absolute", "reason"))
        for row in names.OF_ONE:
            if found := measure(row):
                worst, _, reason = found
                digit = 10.0 ** math.floor(math.log10(worst))
                writer.writerow((row.name, f"{math.ceil(1.5 * worst / digit) * digit:.0e}", reason))


if __name__ == "__main__":
    main()
