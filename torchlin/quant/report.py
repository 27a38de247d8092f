"""What a quantization did, layer by layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torchlin._console import table

# A rotated weight looks normal, so its error is the grid's, up to this; more says that the rotation did not do its work.
_TOLERANCE = 0.05


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer."""

    name: str
    kind: str  # Linear, Conv1D, Embedding or experts
    shape: tuple[int, ...]  # of the weight as it is multiplied: (experts,) out, in
    grid: str  # its id
    block_size: int
    hadamard_size: int
    bits: float  # a weight, scales and signs included
    t2: float  # |W - What|² / |W|²
    expected: float  # the grid's mean squared error on normal numbers
    bytes_before: int
    bytes_after: int

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def flagged(self) -> bool:
        """Whether t² is more than 5 % away from what the grid's error lets expect, and more than chance does to few weights."""
        chance = 4 / math.sqrt(self.weights)
        return self.t2 > 0 and not abs(self.t2 / self.expected - 1) <= _TOLERANCE + chance


@dataclass(frozen=True)
class QuantizationReport:
    """What :func:`torchlin.quant.quantize_` did: layers, what was left and why, sizes before and after, seconds."""

    layers: tuple[LayerReport, ...] = field(repr=False)
    skipped: dict[str, str] = field(repr=False)  # {name: why}, of what could have been quantized
    bytes_before: int  # of all parameters and buffers of the model
    bytes_after: int
    seconds: float

    @property
    def bits(self) -> float:
        """Average bits a quantized weight, scales and signs included."""
        weights = sum(layer.weights for layer in self.layers)
        return sum(layer.bits * layer.weights for layer in self.layers) / weights if weights else math.nan

    @property
    def t2(self) -> float:
        """Mean over layers of |W - What|² / |W|²."""
        return sum(layer.t2 for layer in self.layers) / len(self.layers) if self.layers else math.nan

    @property
    def flagged(self) -> tuple[LayerReport, ...]:
        """Layers whose error is not what their grid lets expect."""
        return tuple(layer for layer in self.layers if layer.flagged)

    def __str__(self) -> str:
        if not self.layers:
            return f"nothing quantized, {len(self.skipped)} layers left as they are"
        text = (
            f"{len(self.layers)} layers quantized to {self.bits:.2f} bits a weight in {self.seconds:.1f} s, "
            f"mean t² {self.t2:.3g}; model {megabytes(self.bytes_before)} -> {megabytes(self.bytes_after)}"
        )
        if self.skipped:
            text += f"; {len(self.skipped)} left as they are"
        if self.flagged:
            text += f"; {len(self.flagged)} flagged: t² more than 5 % off the grid's error"
        return text

    def table(self, layers: Iterable[LayerReport] | None = None) -> None:
        """Prints a line a layer: shape, grid, bits, measured t² beside the grid's own error."""
        rows = [
            (
                layer.name,
                layer.kind,
                "x".join(map(str, layer.shape)),
                layer.grid,
                layer.block_size,
                f"{layer.bits:.3f}",
                f"{layer.t2:.5g}",
                f"{layer.expected:.5g}",
                f"{layer.t2 / layer.expected - 1:+.1%}{' !' if layer.flagged else ''}",
            )
            for layer in (self.layers if layers is None else layers)
        ]
        columns = ("layer", "kind", "shape", "grid", "block", "bits", "t²", "grid's", "off by")
        table(str(self), columns, rows)

    def to_dict(self) -> dict[str, Any]:
        """Only str, numbers, lists and dicts, for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        layers = [{**dataclasses.asdict(layer), "shape": list(layer.shape)} for layer in self.layers]
        return {**values, "layers": layers, "skipped": dict(self.skipped), "bits": self.bits, "t2": self.t2}


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
