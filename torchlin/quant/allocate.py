"""Which grid each layer gets, so that the model suffers least within a budget of bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from torchlin.nn.grid import check_sizes
from torchlin.ops.grid_codes import packed_bytes
from torchlin.quant._knapsack import multiple_choice
from torchlin.quant.alphas import Alphas
from torchlin.quant.config import HiggsConfig, points_within

_SCALE_BITS, _SIGN_BITS = 16, 8
Fields = Mapping[str, Any]


def default_options() -> list[dict[str, Any]]:
    """Planar grids from 2 to 6 bits, in steps of a quarter up to 4 and of a half above; p = 3 and 4 where they are better."""
    bits = [*(2 + i / 4 for i in range(9)), 4.5, 5.0, 5.5, 6.0]
    planar = [{"p": 2, "n": points_within(b, 2)} for b in bits]
    solid = [{"p": 3, "n": 512}, {"p": 3, "n": 830}, {"p": 3, "n": 4096}, {"p": 4, "n": 4096}]
    return [*planar, *solid, {"p": 1, "n": 256}]


@dataclass(frozen=True)
class BitPlan(Mapping[str, Fields]):
    """How each layer is to be quantized: a mapping from its name to fields of :class:`torchlin.quant.HiggsConfig`."""

    layers: Mapping[str, Fields]
    bits: float  # average a weight, scales and signs included
    budget: float  # what was allowed
    predicted_delta: float  # Σ α_l D_l: how much the alphas' metric is going to grow
    metric: str | None = None  # "ppl", "loss" or "kl"
    storage: Mapping[str, int] = field(default_factory=dict, repr=False)  # bits of each layer
    distortion: Mapping[str, float] = field(
        default_factory=dict, repr=False
    )  # D of each layer: its expected t²

    def __getitem__(self, name: str) -> Fields:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for fields in self.layers.values():
            what = " ".join(f"{key}={value}" for key, value in fields.items())
            counts[what] = counts.get(what, 0) + 1
        lines = [
            f"  {count:4d} x {what}" for what, count in sorted(counts.items(), key=lambda item: -item[1])
        ]
        metric = self.metric or "metric"
        head = f"{len(self)} layers at {self.bits:.4f} bits a weight, predicted {metric} +{self.predicted_delta:.4g}"
        return "\n".join([head, *lines])

    def to_dict(self) -> dict[str, Any]:
        """Nothing but dicts, strings and numbers: {"layers": {name: fields}, ...}."""
        return {
            "layers": {name: dict(fields) for name, fields in self.layers.items()},
            "bits": self.bits,
            "budget": self.budget,
            "predicted_delta": self.predicted_delta,
            "metric": self.metric,
            "storage": dict(self.storage),
            "distortion": dict(self.distortion),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> BitPlan:
        """The inverse of :meth:`to_dict`."""
        try:
            return BitPlan(**{**data, "layers": {str(k): dict(v) for k, v in data["layers"].items()}})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"data: is no plan, {type(error).__name__}: {error}") from error


def allocate_bits(
    alphas: Alphas | Mapping[str, float],
    sizes: Mapping[str, int | Sequence[int]] | None = None,
    budget: float = 4.0,
    options: Sequence[Fields] | None = None,
    *,
    storage: Mapping[str, Sequence[int | None]] | None = None,
    distortion: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
) -> BitPlan:
    r"""Choose an option for every layer: the least :math:`\sum_l \alpha_l D_l` with the storage within a budget, exactly.

    Args:
        alphas: {layer: α}, or :class:`Alphas`. An α that is no larger than its standard error is taken to be that error, and a
            negative one without a known error to be 0: noise must not make a layer look as if errors did it good. Of
            options that cost nothing the smallest is taken.
        sizes: {layer: shape of its weight, (..., out, in), or its number of weights}; from Alphas by default. Numbers alone do
            only with ``storage``.
        budget: bits a weight, on average over these layers, everything that is stored for them included.
        options: what a layer may get, each the fields of :class:`HiggsConfig` that make it ({"p": 2, "n": 256}); by default
            :func:`default_options`.
        storage: {layer: bits of each option}, whole numbers; ``None`` where a layer cannot have an option. By default codes,
            scales and signs as :func:`quantize_` stores them, without options whose block does not fit.
        distortion: the t² that each option leads to, for all layers or {layer: for that layer}; by default the mean squared
            error of the option's grid, which is what a rotated weight has.

    Returns:
        A :class:`BitPlan`; ``HiggsConfig.from_plan(plan)`` quantizes by it.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: the budget is too small (the message says what is possible), tables do not fit layers and options, or a
            number is not finite.

    Source: the plan of dynamic HIGGS, Malinovskii et al., "Pushing the limits of large language model quantization via the
    linearity theorem", 2024 (arXiv:2411.17525), solved as a multiple-choice knapsack (Pisinger, 1995).

    Example:
        >>> plan = allocate_bits({"a": 1.0, "b": 9.0}, {"a": 100, "b": 100}, 3.0, [{"bits": 2}, {"bits": 3}, {"bits": 4}],
        ...                      storage={"a": [200, 300, 400], "b": [200, 300, 400]}, distortion=[0.1, 0.03, 0.008])
        >>> dict(plan), plan.bits, round(plan.predicted_delta, 3)
        ({'a': {'bits': 2}, 'b': {'bits': 4}}, 3.0, 0.172)
    """
    values = _values(alphas)
    shapes = _shapes(alphas, sizes, values)
    choices = [dict(option) for option in (default_options() if options is None else options)]
    if not choices:
        raise ValueError("options must hold at least one, got none")
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"budget must be a number of bits a weight, got {type(budget).__name__}")
    if not math.isfinite(budget):
        raise ValueError(f"budget must be finite, got {budget}")
    bits = {name: _storage(name, shapes[name], choices, storage) for name in values}
    errors = _distortions(values, choices, distortion)

    possible = {name: [j for j, b in enumerate(row) if b is not None] for name, row in bits.items()}
    sizes_ = [np.array([bits[name][j] for j in possible[name]], np.int64) for name in values]
    costs = [values[name] * np.array([errors[name][j] for j in possible[name]]) for name in values]
    total = sum(math.prod(shape) for shape in shapes.values())
    allowed = math.floor(Fraction(budget) * total)
    least = sum(int(s.min()) for s in sizes_)
    if least > allowed:
        raise ValueError(
            f"budget: {budget:g} bits a weight are too few; the smallest options take {least / total:.4f}"
        )
    chosen = dict(zip(values, multiple_choice(costs, sizes_, allowed), strict=True))
    option = {name: possible[name][i] for name, i in chosen.items()}
    return BitPlan(
        layers={name: choices[j] for name, j in option.items()},
        bits=sum(int(s[i]) for s, i in zip(sizes_, chosen.values(), strict=True)) / total,
        budget=float(budget),
        predicted_delta=math.fsum(alphas[name] * errors[name][j] for name, j in option.items()),
        metric=alphas.metric if isinstance(alphas, Alphas) else None,
        storage={name: int(bits[name][j]) for name, j in option.items()},  # type: ignore[arg-type]
        distortion={name: errors[name][j] for name, j in option.items()},
    )


def storage_bits(shape: Sequence[int], fields: Fields) -> int:
    """Bits that :func:`quantize_` stores for a weight (..., out, in): codes in whole bytes a row, float16 scales, int8 signs.

    Raises:
        ValueError: the option's block size does not fit the weight.

    Example:
        >>> storage_bits((576, 1536), {"p": 2, "n": 256}) / (576 * 1536)  # 4 bits, a scale a row, a sign a column
        4.024305555555555
    """
    *rows, columns = shape
    config = HiggsConfig()._with(fields)
    block, _ = check_sizes(columns, config.p, config.block_size, None)
    row = 8 * packed_bytes(config.points, -(-columns // config.p)) + _SCALE_BITS * -(-columns // block)
    return math.prod(rows) * row + (_SIGN_BITS * columns if config.signs else 0)


# ---- arguments


def _values(alphas: Any) -> dict[str, float]:
    """The α that counts for each layer."""
    if not isinstance(alphas, Mapping):
        raise TypeError(f"alphas must be Alphas or a dict {{layer: alpha}}, got {type(alphas).__name__}")
    if not alphas:
        raise ValueError("alphas must hold at least one layer, got none")
    errors = alphas.errors if isinstance(alphas, Alphas) else {}
    values = {}
    for name, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise TypeError(f"alphas[{name!r}] must be a number, got {type(alpha).__name__}")
        if not math.isfinite(alpha):
            raise ValueError(f"alphas[{name!r}] must be finite, got {alpha}")
        error = errors.get(name, 0.0)
        values[name] = max(float(alpha), error if math.isfinite(error) else 0.0, 0.0)
    return values


def _shapes(
    alphas: Any, sizes: Mapping[str, int | Sequence[int]] | None, values: Mapping[str, float]
) -> dict[str, tuple[int, ...]]:
    if sizes is None:
        if not isinstance(alphas, Alphas):
            raise ValueError("sizes: shapes of the layers' weights are needed unless alphas are Alphas")
        return {name: layer.shape for name, layer in alphas.layers.items()}
    if missing := [name for name in values if name not in sizes]:
        raise ValueError(f"sizes: no size for {missing[0]!r}, one of {len(missing)} layers without")
    shapes = {
        name: (size,) if isinstance(size := sizes[name], int) else tuple(int(n) for n in size)
        for name in values
    }
    if bad := [name for name, shape in shapes.items() if not shape or min(shape) < 1]:
        raise ValueError(f"sizes[{bad[0]!r}] must be positive, got {sizes[bad[0]]}")
    return shapes


def _storage(
    name: str,
    shape: tuple[int, ...],
    options: Sequence[Fields],
    table: Mapping[str, Sequence[int | None]] | None,
) -> list[int | None]:
    """Bits of each option, None where the layer cannot have it; at least one is there."""
    row: list[int | None] = []
    if table is not None:
        row = list(table[name]) if name in table else []
        if len(row) != len(options):
            raise ValueError(
                f"storage[{name!r}] must have {len(options)} numbers, one an option, got {len(row)}"
            )
        if any(b is not None and (int(b) != b or b < 0) for b in row):
            raise ValueError(f"storage[{name!r}] must be whole numbers of bits, got {row}")
    elif len(shape) < 2:
        raise ValueError(
            f"sizes[{name!r}] must be the weight's shape (..., out, in), or give storage; got {shape}"
        )
    else:
        why = ""
        for fields in options:
            try:
                row.append(storage_bits(shape, fields))
            except ValueError as error:
                row.append(None)
                why = str(error)
        if all(b is None for b in row):
            raise ValueError(f"options: none fits {name!r} of shape {shape}: {why}")
    if all(b is None for b in row):
        raise ValueError(f"storage[{name!r}] leaves no option")
    return row


def _distortions(
    names: Mapping[str, float],
    options: Sequence[Fields],
    table: Sequence[float] | Mapping[str, Sequence[float]] | None,
) -> dict[str, list[float]]:
    if table is None:
        table = [HiggsConfig()._with(fields).grid().mse for fields in options]
    rows = {name: list(table[name]) if isinstance(table, Mapping) else list(table) for name in names}
    for name, row in rows.items():
        if len(row) != len(options):
            raise ValueError(
                f"distortion for {name!r} must have {len(options)} numbers, one an option, got {len(row)}"
            )
        if not all(math.isfinite(d) and d >= 0 for d in row):
            raise ValueError(f"distortion for {name!r} must be finite and not negative, got {row}")
    return rows
