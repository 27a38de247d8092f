"""Layers whose weights are grid codes: GridLinear, GridEmbedding, and GridBank for the experts of a mixture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchlin import _library
from torchlin.functional import grid_dequantize, grid_linear
from torchlin.nn.grid_input import InputTransform, input_transform, is_plain, points_on
from torchlin.ops._checks import FLOAT_DTYPES, needs_grad
from torchlin.ops.grid import for_matrix_unit, run_linear
from torchlin.ops.grid_codes import packed_bytes
from torchlin.ops.hadamard_matrix import hadamard_order

if TYPE_CHECKING:
    from torchlin.quant.grids import Grid

_STORED = ("codes", "scales", "signs")


class GridWeight(nn.Module):
    r"""What grid layers share: packed codes of a rotated weight, a scale a block, and signs.

    The weight that is meant is :math:`W = W' H \mathrm{diag}(s) / \sqrt h`, where W' is what codes and scales stand for
    (:func:`torchlin.functional.grid_dequantize`). ``codes``, ``scales`` and ``signs`` are plain buffers, so that state_dict,
    safetensors, deepcopy and pickle work as for any module; casts of the model to another dtype leave them alone.
    """

    codes: Tensor
    scales: Tensor
    signs: Tensor | None

    def __init__(
        self,
        rows: tuple[int, ...],
        in_features: int,
        grid: Grid,
        block_size: int | None,
        hadamard_size: int | None,
        signs: Tensor | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.rows, self.in_features, self.grid = rows, in_features, grid
        self.block_size, self.hadamard_size = check_sizes(in_features, grid.p, block_size, hadamard_size)
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        if self.dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype must be float32, float64, float16 or bfloat16, got {self.dtype}")
        if signs is not None and signs.shape != (in_features,):
            raise ValueError(f"signs must have shape ({in_features},), got {tuple(signs.shape)}")
        blocks = -(-in_features // self.block_size) if in_features else 0
        count = -(-in_features // grid.p)
        codes = torch.zeros(*rows, packed_bytes(grid.n, count), dtype=torch.uint8, device=device)
        self._points = points_on(grid.points, codes.device)
        self._input: InputTransform | None = None
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.zeros(*rows, blocks, dtype=torch.float16, device=device))
        self.register_buffer("signs", None if signs is None else signs.to(codes.device))

    # ---- the weight

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, not rotated any more: (..., in_features) of dtype ``self.dtype``."""
        return self._dequantize(self.codes, self.scales).to(self.dtype)

    def _dequantize(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Some rows of the weight, (..., in_features) in float32."""
        codes, lead = codes.flatten(0, -2), codes.shape[:-1]
        scales = scales.reshape(codes.shape[0], -1)
        rotated = grid_dequantize(codes, scales, self._table(), self.in_features, block_size=self.block_size)
        return self._transform().adjoint(rotated).view(*lead, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, made anew at each access: for code that wants to look at it. Writing to it has no effect."""
        return self.dequantize()

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def _table(self) -> Tensor:
        """The grid's points on the codes' device, wherever those were moved to and by whom."""
        if self._points.device != self.codes.device:
            self._refresh()
        return self._points

    def _transform(self) -> InputTransform:
        codes: Any = self._buffers["codes"]
        if self._input is None or self._points.device != codes.device:
            self._refresh()
        assert self._input is not None, "the layer is on the meta device: it has no signs to transform with"
        return self._input

    def _refresh(self) -> None:
        device = self.codes.device
        self._points = points_on(self.grid.points, device)
        self._input = input_transform(self.in_features, self.hadamard_size, self.signs, device)

    # ---- training

    def unfreeze_(self, *, scales: bool = True, signs: bool = False) -> list[nn.Parameter]:
        """Makes scales (and signs) float32 parameters that an optimizer can train, and returns them.

        Codes stay what they are. ``freeze_`` undoes it.
        """
        return [self._as_parameter(name) for name, on in (("scales", scales), ("signs", signs)) if on]

    def _as_parameter(self, name: str) -> nn.Parameter:
        old = getattr(self, name)
        if old is None:
            raise ValueError(f"{name}: this layer has none; quantize with signs=True")
        if isinstance(old, nn.Parameter):
            return old
        del self._buffers[name]
        self.register_parameter(name, nn.Parameter(old.detach().float()))
        self._refresh()
        return getattr(self, name)

    def freeze_(self) -> None:
        """Makes trained scales and signs buffers again: scales float16 where they fit, signs int8 where they are ±1."""
        for name in ("scales", "signs"):
            if (trained := self._parameters.pop(name, None)) is not None:
                value = trained.detach()
                small = as_float16(value) if name == "scales" else _as_int8(value)
                self.register_buffer(name, small)
        self._refresh()

    # ---- moved, cast, copied, loaded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GridWeight:
        before = {name: t.detach() for name in _STORED if (t := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype is old.dtype:
                continue  # moved, not cast
            if isinstance(new, nn.Parameter):
                new.data = old.to(new.device)
                new.grad = None if new.grad is None else new.grad.to(old.dtype)
            else:
                self._buffers[name] = old.to(new.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self._refresh()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "signs" and "_input" in self.__dict__:
            self._refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_input", "_points")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._refresh()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name in ("scales", "signs"):  # what was trained or did not fit into 16 bits is stored wider
            new, old = state_dict.get(prefix + name), self._buffers.get(name)
            if new is not None and old is not None and new.dtype is not old.dtype and old.shape == new.shape:
                self._buffers[name] = torch.empty_like(old, dtype=new.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._refresh()

    def extra_repr(self) -> str:
        words = [", ".join(map(str, (*self.rows, self.in_features))), f"grid={self.grid.id}"]
        if self.block_size < self.in_features:
            words.append(f"block_size={self.block_size}")
        if self.hadamard_size != self.block_size:
            words.append(f"hadamard_size={self.hadamard_size}")
        words.append(f"signs={self.signs is not None}")
        return ", ".join(words)


class GridLinear(GridWeight):
    r"""A linear layer on a weight of grid codes, :math:`y = W' H (s \circ x) / \sqrt h + b`.

    Args:
        in_features, out_features, bias: as of ``nn.Linear``.
        grid: what codes point to, see :func:`torchlin.quant.grid`.
        block_size: g, neighbours that share a scale; divides in_features. ``None``: hadamard_size where that is 64 or more,
            else the whole row.
        hadamard_size: h, order of the transform of x, block by block; divides block_size. ``None``: the largest order that
            divides in_features (576 = 36·16 and 1536 = 12·128 are orders), so nothing is padded.
        signs: s, (in_features,) of ±1 or any numbers; ``None`` for ones.
        device, dtype: of the bias; dtype is also what ``weight`` and :meth:`dequantize` give.

    The weight is zero until codes and scales are loaded; :meth:`from_linear` quantizes an existing layer, and
    :func:`torchlin.quant.quantize_` a model.

    Shape:
        (..., in_features) to (..., out_features); float32, float64, float16 or bfloat16, out in the dtype of x.

    Raises:
        ValueError: a size does not fit the others.

    Source: HIGGS, Malinovskii et al., "Pushing the limits of large language model quantization via the linearity theorem",
    2024 (arXiv:2411.17525).

    Example:
        >>> import torch, torchlin
        >>> linear = torch.nn.Linear(96, 32)
        >>> layer = torchlin.nn.GridLinear.from_linear(linear, torchlin.quant.grid(256, p=2))
        >>> x = torch.randn(4, 96)
        >>> bool((layer(x) - linear(x)).norm() < 0.15 * linear(x).norm())
        True
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        grid: Grid,
        block_size: int | None = None,
        hadamard_size: int | None = None,
        signs: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((out_features,), in_features, grid, block_size, hadamard_size, signs, device, dtype)
        self.out_features = out_features
        self.transposed = False  # whether it stands for a layer that stores W transposed (Conv1D of GPT-2)
        zeros = torch.zeros(out_features, device=device, dtype=self.dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))
        self._raw = _raw_linear()
        self._refresh()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        grid: Grid,
        *,
        block_size: int | None = None,
        signs: bool = True,
        seed: int = 0,
        scale_refit: bool = True,
    ) -> GridLinear:
        """Quantizes an ``nn.Linear`` or a Conv1D of transformers; the bias is kept, the very same parameter."""
        from torchlin.quant.encode import quantize_linear

        return quantize_linear(
            linear, grid, block_size=block_size, signs=signs, seed=seed, scale_refit=scale_refit
        )[0]

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, made anew at each access: for code that wants to look at it. Writing to it has no effect."""
        weight = self.dequantize()
        return weight.mT if self.transposed else weight

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"x must have last dimension in_features = {self.in_features}, got shape {tuple(x.shape)}"
            )
        raw = self._raw
        if raw is None or not is_plain(x):
            return self._differentiable(x)
        # A layer of a small model takes microseconds: attributes are read where Module keeps them, once.
        buffers, bias = self._buffers, self._parameters["bias"]
        codes, scales, factors = buffers["codes"], buffers.get("scales"), self._transform().factors
        if scales is None or needs_grad(x, bias, factors):
            return self._differentiable(x)
        rows = self._input.rows(x)  # type: ignore[union-attr]
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)  # type: ignore[assignment]
        run: Any = run_linear if for_matrix_unit(rows) else raw
        y = run(rows, codes, scales, self._points, bias, self.block_size)
        return y if x.dim() == 2 else y.view((*x.shape[:-1], self.out_features))

    def _differentiable(self, x: Tensor) -> Tensor:
        x = self._transform()(x)
        return grid_linear(x, self.codes, self.scales, self._points, self.bias, block_size=self.block_size)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_raw"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._raw = _raw_linear()

    def extra_repr(self) -> str:
        words = super().extra_repr().split(", ", 2)[2]
        transposed = ", transposed=True" if self.transposed else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {words}{transposed}"
        )


class GridEmbedding(GridWeight):
    """An embedding of grid codes: only the rows that are asked for are decoded and rotated back.

    Args:
        num_embeddings, embedding_dim, padding_idx: as of ``nn.Embedding``; padding_idx is only kept.
        grid, block_size, hadamard_size, signs, device: as of :class:`GridLinear`.
        dtype: of the result.

    Shape:
        integers (...) to (..., embedding_dim).

    Example:
        >>> import torch, torchlin
        >>> embedding = torchlin.nn.GridEmbedding(1000, 64, grid=torchlin.quant.grid(256, p=2))
        >>> embedding(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 64])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        grid: Grid,
        block_size: int | None = None,
        hadamard_size: int | None = None,
        signs: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            (num_embeddings,), embedding_dim, grid, block_size, hadamard_size, signs, device, dtype
        )
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self._refresh()

    def forward(self, ids: Tensor) -> Tensor:
        # F.embedding checks the indices, on every device; scales may be trained, codes have no gradient.
        codes = F.embedding(ids, self.codes)
        return self._dequantize(codes, F.embedding(ids, self.scales)).to(self.dtype)


class GridBank(GridWeight):
    """The weights of all experts of a mixture, in the place of the 3-D parameter that held them.

    ``bank[e]`` is expert e's weight. ``F.linear(x, bank[e])``, or ``x @ bank[e]`` for a bank of transposed weights, runs on
    the codes; whatever else is done with an expert or with the bank is done with the dequantized weights.

    Args:
        experts, out_features, in_features: E, and the sizes of an expert's weight.
        transposed: whether the parameter was (E, in_features, out_features), not (E, out_features, in_features).
        grid, block_size, hadamard_size, signs, device: as of :class:`GridLinear`.
        dtype: of the dequantized weights.
    """

    def __init__(
        self,
        experts: int,
        out_features: int,
        in_features: int,
        *,
        transposed: bool = False,
        grid: Grid,
        block_size: int | None = None,
        hadamard_size: int | None = None,
        signs: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            (experts, out_features), in_features, grid, block_size, hadamard_size, signs, device, dtype
        )
        self.experts, self.out_features, self.transposed = experts, out_features, transposed
        self._is_hf_initialized = True  # transformers initialises parameters of experts that say nothing
        self._refresh()

    @property
    def weight(self) -> Tensor:
        """All experts' weights, dequantized, in the parameter's layout; made anew at each access."""
        weight = self.dequantize()
        return weight.mT if self.transposed else weight

    @property
    def shape(self) -> torch.Size:
        sizes = (
            (self.in_features, self.out_features)
            if self.transposed
            else (self.out_features, self.in_features)
        )
        return torch.Size((self.experts, *sizes))

    def __len__(self) -> int:
        return self.experts

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0):
            return ExpertWeight(self, int(index))
        if isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64):
            kept, where = index.unique(return_inverse=True)  # each expert is decoded once
            weights = self._dequantize(self.codes[kept], self.scales[kept]).to(self.dtype)
            return (weights.mT if self.transposed else weights)[where]
        return self.weight[index]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or not hasattr(Tensor, name):
                raise
            return getattr(self.weight, name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func(*_dense(args), **_dense(kwargs or {}))

    def linear(self, expert: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``F.linear(x, W_expert, bias)`` on the codes."""
        x = self._transform()(x)
        return grid_linear(
            x, self.codes[expert], self.scales[expert], self._points, bias, block_size=self.block_size
        )


class ExpertWeight:
    """One expert's weight in a :class:`GridBank`: multiplied from its codes, a dequantized tensor for anything else."""

    def __init__(self, bank: GridBank, expert: int) -> None:
        if not -bank.experts <= expert < bank.experts:
            raise IndexError(f"index {expert} is out of range for a bank of {bank.experts} experts")
        self.bank, self.expert = bank, expert

    def dequantize(self) -> Tensor:
        bank = self.bank
        weight = bank._dequantize(bank.codes[self.expert], bank.scales[self.expert]).to(bank.dtype)
        return weight.mT if bank.transposed else weight

    @property
    def shape(self) -> torch.Size:
        return self.bank.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self.bank.dtype

    @property
    def device(self) -> torch.device:
        return self.bank.device

    def __getitem__(self, index: Any) -> Tensor:
        return self.dequantize()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dequantize(), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if len(args) >= 2 and isinstance(args[1], ExpertWeight) and isinstance(args[0], Tensor):
            x, weight = args[:2]
            if func is F.linear and not weight.bank.transposed:
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                return weight.bank.linear(weight.expert, x, bias)
            if func in _MATMULS and weight.bank.transposed and x.dim() > 1 and not kwargs:
                return weight.bank.linear(weight.expert, x)
        return func(*_dense(args), **_dense(kwargs))


def _operator(name: str) -> Callable[..., Any]:
    def run(self: GridBank | ExpertWeight, *arguments: Any) -> Any:
        return getattr(_dense(self), name)(*_dense(arguments))

    return run


# Python looks operators up in the class, where __getattr__ is not asked.
for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "rmatmul", "neg"):
    for _class in (GridBank, ExpertWeight):
        setattr(_class, f"__{_name}__", _operator(f"__{_name}__"))

_MATMULS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


def _dense(x: Any) -> Any:
    """Arguments with dequantized weights in the places of banks and experts."""
    if isinstance(x, GridBank):
        return x.weight
    if isinstance(x, ExpertWeight):
        return x.dequantize()
    if isinstance(x, dict):
        return {key: _dense(value) for key, value in x.items()}
    return type(x)(map(_dense, x)) if type(x) in (tuple, list) else x


# ---- sizes


def largest_order(size: int) -> int:
    """The largest order of a Hadamard matrix that divides size."""
    for order in sorted((d for d in _divisors(size) if d <= 2 or d % 4 == 0), reverse=True):
        try:
            hadamard_order(order)
        except ValueError:
            continue
        return order
    return 1


def _divisors(size: int) -> set[int]:
    small = [d for d in range(1, int(size**0.5) + 1) if size % d == 0]
    return {*small, *(size // d for d in small)}


# Shorter blocks cost more in scales than they are worth: 16 bits on 64 weights are a quarter of a bit a weight.
_SHORTEST_BLOCK = 64


def check_sizes(
    in_features: int, p: int, block_size: int | None, hadamard_size: int | None
) -> tuple[int, int]:
    """(block_size, hadamard_size) with what was None filled in.

    Raises:
        TypeError: a size is no int.
        ValueError: sizes do not fit; the message says which would.
    """
    for name, size in (("block_size", block_size), ("hadamard_size", hadamard_size)):
        if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
            raise TypeError(f"{name} must be an int or None, got {type(size).__name__}")
        if size is not None and (size < 1 or in_features % size):
            fitting = sorted(d for d in _divisors(in_features) if _is_order(d) and d > 8)
            raise ValueError(
                f"{name} must divide in_features = {in_features}, got {size}; what fits: "
                f"{', '.join(map(str, fitting)) or 'nothing above 8'}, or None for the largest"
            )
    if hadamard_size is None:
        hadamard_size = largest_order(in_features if block_size is None else block_size)
        if block_size is not None and hadamard_size != block_size:
            raise ValueError(
                f"block_size {block_size} is no order of a Hadamard matrix that is known here; the largest order that divides "
                f"it is {hadamard_size}. Give that, or None to rotate and scale whole rows of in_features = {in_features}"
            )
    elif not _is_order(hadamard_size):
        raise ValueError(f"hadamard_size {hadamard_size} is no order of a Hadamard matrix that is known here")
    if block_size is None:
        fits = hadamard_size >= _SHORTEST_BLOCK and hadamard_size % p == 0
        block_size = hadamard_size if fits else max(in_features, 1)
    if block_size % hadamard_size:
        raise ValueError(f"hadamard_size {hadamard_size} must divide block_size, got {block_size}")
    if block_size < in_features and block_size % p:
        raise ValueError(
            f"block_size must be a multiple of the grid's p = {p} where a row has several blocks, got {block_size} for "
            f"in_features = {in_features}: take another p, or block_size=None for one block a row"
        )
    return block_size, hadamard_size


def _is_order(size: int) -> bool:
    try:
        hadamard_order(size)
    except ValueError:
        return False
    return True


def as_float16(scales: Tensor) -> Tensor:
    """The scales in float16, or in float32 where one is too large or would lose digits there."""
    magnitude = scales.abs()
    small = (magnitude < torch.finfo(torch.float16).tiny) & (magnitude > 0)
    if bool((small | (magnitude > torch.finfo(torch.float16).max)).any()):
        return scales.float()
    return scales.to(torch.float16)


def _as_int8(signs: Tensor) -> Tensor:
    return signs.to(torch.int8) if bool((signs.abs() == 1).all()) else signs


def _raw_linear() -> Any:
    """The kernel of the linear layer, or None where there is none."""
    found = _library.status()["cpu"].loaded and hasattr(torch.ops.torchlin, "_grid_linear")
    return torch.ops.torchlin._grid_linear.default if found else None
