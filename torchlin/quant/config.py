"""What to quantize and how: a frozen, JSON-safe configuration."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torchlin.ops.grid import LARGEST_P
from torchlin.ops.grid_codes import LARGEST_N, code_layout

if TYPE_CHECKING:
    from torchlin.quant.grids import Grid

_DEFAULT_BITS = 4.0
_LAYER_FIELDS = ("bits", "n", "p", "kind", "block_size", "signs", "seed", "scale_refit")


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is quantized."""

    grid: Grid
    block_size: int | None
    signs: bool
    seed: int
    scale_refit: bool

    def options(self) -> dict[str, Any]:
        """The arguments of :func:`torchlin.quant.encode.encode_weight` beside weight and grid."""
        return {
            "block_size": self.block_size,
            "signs": self.signs,
            "seed": self.seed,
            "scale_refit": self.scale_refit,
        }


@dataclass(frozen=True)
class HiggsConfig:
    """How :func:`torchlin.quant.quantize_` quantizes a model.

    Args:
        bits: bits a weight for codes, at most; scales come on top (16 bits a block: 0.03 for rows of 576). ``None`` is 4, or
            what n says.
        p: coordinates of a grid point, 1 to 8: neighbouring weights that share a code. 2 is a good default.
        n: number of grid points, 2 to 65536, instead of bits.
        kind: of the grid, see :func:`torchlin.quant.grid`.
        block_size: neighbours in a row that share a scale and are rotated together; must divide in_features and be a Hadamard
            order. ``None``: the largest there is, whole rows of nearly every model (576 = 36·16, 11008 = 172·64).
        signs: flip signs at random before the rotation, the same for all layers of equal in_features.
        seed: of the signs.
        scale_refit: fit each scale by least squares once the codes are known.
        modules_to_not_convert: names or patterns of what stays as it is. A name stands for the module of that full name, for
            every module whose last part it is, and for all that is inside.
        embeddings: quantize nn.Embedding too.
        experts: quantize banks of experts' weights (3-D parameters of transformers' mixtures).
        grids: grids of your own, taken before the library's for the same n and p.
        overrides: {name or pattern: fields for that layer, or None to skip it}. A full name goes before patterns, and patterns
            in their order. A pattern has the wildcards of ``fnmatch``, or is a regular expression after "re:". A full name
            here also goes before modules_to_not_convert. The plan of :func:`torchlin.quant.allocate_bits` is such a dict.

    Raises:
        TypeError, ValueError: a field is not what it has to be; the message says what that is.

    Source: HIGGS, Malinovskii et al., "Pushing the limits of large language model quantization via the linearity theorem",
    2024 (arXiv:2411.17525).

    Example:
        >>> config = HiggsConfig(bits=3, overrides={"*.down_proj": {"bits": 4}, "model.layers.0.*": None})
        >>> config.points, HiggsConfig.from_dict(config.to_dict()) == config
        (64, True)
    """

    bits: float | None = None
    p: int = 2
    n: int | None = None
    kind: str = "optimal"
    block_size: int | None = None
    signs: bool = True
    seed: int = 0
    scale_refit: bool = True
    modules_to_not_convert: tuple[str, ...] = ("lm_head",)
    embeddings: bool = False
    experts: bool = True
    grids: tuple[Grid, ...] = ()
    overrides: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _int("p", self.p, 1, LARGEST_P)
        if self.bits is not None and self.n is not None:
            raise ValueError(f"give bits or n, not both: got bits={self.bits} and n={self.n}")
        if self.bits is not None:
            if isinstance(self.bits, bool) or not isinstance(self.bits, (int, float)):
                raise TypeError(f"bits must be a number or None, got {type(self.bits).__name__}")
            points_within(self.bits, self.p)
        if self.n is not None:
            _int("n", self.n, 2, LARGEST_N)
        if self.block_size is not None:
            _int("block_size", self.block_size, 1, None)
        _int("seed", self.seed, 0, (1 << 63) - 1)
        for name in ("signs", "scale_refit", "embeddings", "experts"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {type(getattr(self, name)).__name__}")
        if not isinstance(self.kind, str):
            raise TypeError(f"kind must be a str, got {type(self.kind).__name__}")
        names = self.modules_to_not_convert
        if names is None:
            names = ()
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(f"modules_to_not_convert must be a sequence of names, got {names!r}")
        self._set("modules_to_not_convert", tuple(map(_pattern, names)))
        self._set("grids", () if self.grids is None else tuple(self.grids))
        self._set("overrides", self._checked(self.overrides))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _checked(self, overrides: Any) -> dict[str, dict[str, Any] | None]:
        if overrides is None:
            return {}
        if not isinstance(overrides, Mapping):
            raise TypeError(f"overrides must be a dict of names or patterns, got {type(overrides).__name__}")
        checked: dict[str, dict[str, Any] | None] = {}
        for key, value in overrides.items():
            _pattern(key)
            if value is None:
                checked[key] = None
                continue
            if not isinstance(value, Mapping):
                raise TypeError(f"overrides[{key!r}] must be a dict of fields or None, got {value!r}")
            fields = {name: item for name, item in value.items() if name in _LAYER_FIELDS}
            unknown = [name for name in value if name not in _LAYER_FIELDS]
            if unknown:
                raise ValueError(
                    f"overrides[{key!r}] has no field {unknown[0]!r}; fields are {', '.join(_LAYER_FIELDS)}"
                )
            try:
                self._with(fields)
            except (TypeError, ValueError) as error:
                raise type(error)(f"overrides[{key!r}]: {error}") from None
            checked[key] = fields
        return checked

    def _with(self, fields: Mapping[str, Any]) -> HiggsConfig:
        """This config with some fields of a layer changed: bits and n stand for each other."""
        change = dict(fields)
        if "bits" in change or "n" in change:
            change = {"bits": None, "n": None, **change}
        return dataclasses.replace(self, overrides={}, **change)

    # ---- what it says about a layer

    @property
    def points(self) -> int:
        """Number of grid points: n, or the most whose codes fit into bits."""
        if self.n is not None:
            return self.n
        return points_within(_DEFAULT_BITS if self.bits is None else self.bits, self.p)

    def layer(self, name: str) -> LayerPlan | None:
        """How the layer of this full name is quantized; None: not at all."""
        if name in self.overrides:
            fields = self.overrides[name]
        elif any(_excludes(pattern, name) for pattern in self.modules_to_not_convert):
            return None
        else:
            fields = next((v for key, v in self.overrides.items() if matches(key, name)), {})
        if fields is None:
            return None
        own = self._with(fields) if fields else self
        return LayerPlan(own.grid(), own.block_size, own.signs, own.seed, own.scale_refit)

    def grid(self) -> Grid:
        """The grid of a layer without overrides."""
        from torchlin.quant.grids import grid

        for own in self.grids:
            if (own.n, own.p) == (self.points, self.p):
                return own
        return grid(self.points, self.p, self.kind)

    # ---- JSON

    def to_dict(self) -> dict[str, Any]:
        """Only str, numbers, bool, None, lists and dicts."""
        from torchlin.quant.storage import grid_to_dict

        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **values,
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "grids": [grid_to_dict(grid) for grid in self.grids],
            "overrides": {k: None if v is None else dict(v) for k, v in self.overrides.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HiggsConfig:
        """The config that :meth:`to_dict` wrote.

        Raises:
            ValueError: there is a field that this version does not know.
        """
        from torchlin.quant.storage import grid_from_dict

        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"HiggsConfig has no field {unknown[0]!r}; fields are {', '.join(sorted(known))}"
            )
        grids = tuple(grid_from_dict(item) for item in values.get("grids") or ())
        return cls(**{**values, "grids": grids})

    @classmethod
    def from_plan(cls, plan: Mapping[str, Mapping[str, Any] | None], **fields: Any) -> HiggsConfig:
        """Quantizes what the plan names, as it says, and nothing else.

        Args:
            plan: {full name of a layer: its fields}, as of :func:`torchlin.quant.allocate_bits`.
            fields: of the config itself.
        """
        return cls(overrides={**plan, "*": None}, **fields)


def points_within(bits: float, p: int) -> int:
    """The largest grid of p coordinates whose packed codes take at most this many bits a weight.

    Raises:
        ValueError: that would be fewer than 2 points, or more than 65536.

    Example:
        >>> points_within(4, 2), points_within(3.25, 2), points_within(2, 3)
        (256, 90, 64)
    """
    width = bits * p  # of a code
    if not 1 <= width <= 16:
        raise ValueError(
            f"bits must be in [{1 / p:g}, {16 / p:g}] for p = {p}: a grid has 2 to 65536 points, got {bits}"
        )
    n = 2
    for digits in range(1, 5):
        word = int(width * digits + 1e-9)
        root = min(int(2 ** (word / digits)) + 1, LARGEST_N)
        while root**digits > 1 << word:
            root -= 1
        n = max(n, root)
    assert code_layout(n)[1] <= width * code_layout(n)[0] + 1e-9
    return n


def matches(pattern: str, name: str) -> bool:
    """Whether a name, a pattern of fnmatch or a regular expression after "re:" stands for the full name."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return pattern == name or fnmatch.fnmatchcase(name, pattern)


def _excludes(pattern: str, name: str) -> bool:
    return matches(pattern, name) or f".{pattern}." in f".{name}."


def _pattern(pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise TypeError(f"names and patterns must be str, got {pattern!r}")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


def _int(name: str, value: Any, low: int, high: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        raise ValueError(
            f"{name} must be at least {low}{'' if high is None else f' and at most {high}'}, got {value}"
        )


def register() -> None:
    """Plug-in entry point of the quantizers."""
    from torchlin import registry

    registry.register("quantizer", "higgs", HiggsConfig)
