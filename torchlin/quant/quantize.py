"""Quantize the layers of a model in place, and put them back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from torchlin._console import progress
from torchlin.nn.grid import GridBank, GridEmbedding, GridLinear, GridWeight, check_sizes
from torchlin.quant.config import HiggsConfig, LayerPlan
from torchlin.quant.encode import is_conv1d, quantize_bank, quantize_embedding, quantize_linear
from torchlin.quant.report import LayerReport, QuantizationReport
from torchlin.swap import _share_hooks

Filter = Callable[[nn.Module, str], bool]
Swap = tuple[nn.Module, str, nn.Module | nn.Parameter]  # parent, attribute, what is to be there


def quantize_(
    model: nn.Module,
    config: HiggsConfig | Mapping[str, Any] | None = None,
    filter_fn: Filter | None = None,
) -> QuantizationReport:
    r"""Quantize a model's linear layers in place, without data.

    Each weight is rotated by a randomized Hadamard transform, scaled, and stored as the nearest points of a grid that is
    optimal for normal numbers; the layer rotates its input instead of the weight. nn.Linear, the Conv1D of GPT-2, banks of
    experts' weights and, if asked, nn.Embedding. Every layer is checked before the first is touched, and all are made before
    the first is put in its place: whatever fails or interrupts, the model is as it was. Beside the model, memory is taken for
    the codes and for a few rows of one layer.

    Args:
        model: any module that has such layers inside. It can not be one itself: it has no place to be replaced in.
        config: a :class:`HiggsConfig`, or a plan {name: fields} as of :func:`torchlin.quant.allocate_bits`; 4 bits by default.
        filter_fn: takes (module, full name) and says whether the layer is to be quantized, beside what config says.

    Returns:
        A :class:`QuantizationReport`: what was done, and the measured error of each layer.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a layer does not fit the config, a weight is not loaded or has NaN or infinite numbers, or an exact name in
            the config's overrides names nothing that can be quantized. The model is unchanged.

    Source: HIGGS, Malinovskii et al., "Pushing the limits of large language model quantization via the linearity theorem",
    2024 (arXiv:2411.17525).

    Example:
        >>> import torch, torchlin
        >>> model = torch.nn.Sequential(torch.nn.Linear(96, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
        >>> report = torchlin.quant.quantize_(model, torchlin.quant.HiggsConfig(bits=4, overrides={"2": None}))
        >>> len(report.layers), type(model[0]).__name__, type(model[2]).__name__
        (1, 'GridLinear', 'Linear')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if config is None:
        config = HiggsConfig()
    elif isinstance(config, Mapping):
        config = HiggsConfig.from_plan(config)
    elif not isinstance(config, HiggsConfig):
        raise TypeError(f"config must be a HiggsConfig or a plan (a dict), got {type(config).__name__}")
    start = time.perf_counter()
    before = model_bytes(model)
    targets, skipped = find_targets(model, config, filter_fn)
    for target in targets:
        target.check()
    made: dict[Any, tuple[GridWeight, float]] = {}
    layers: list[LayerReport] = []
    swaps: list[Swap] = []
    with progress(len(targets), "quantizing") as bar:
        for target in targets:
            new, error = target.make(made)
            layers.append(_report(target, new, error))
            swaps += [(parent, name, new) for parent, name in target.places]
            bar.advance(description=f"quantizing {target.names[0]}")
    _swap(swaps)
    _untie(model, targets)
    if targets:
        _mark(model, config)
    return QuantizationReport(tuple(layers), skipped, before, model_bytes(model), time.perf_counter() - start)


@torch.no_grad()
def dequantize_(model: nn.Module) -> tuple[str, ...]:
    """Put ordinary layers with the dequantized weights back in the place of quantized ones, in place.

    Linear, Conv1D, Embedding and 3-D parameters come back with the dtype that they had (or that the model was cast to) and
    the biases that are there. What quantization took away stays away.

    Returns:
        The names of the layers that were put back.

    Example:
        >>> import torch, torchlin
        >>> model = torch.nn.Sequential(torch.nn.Linear(96, 128))
        >>> _ = torchlin.quant.quantize_(model)
        >>> torchlin.quant.dequantize_(model), type(model[0]).__name__
        (('0',), 'Linear')
    """
    names: dict[GridWeight, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, GridWeight) and name:
            names.setdefault(module, []).append(name)
    made = {module: _ordinary(module) for module in names}
    shared: dict[tuple[int, bool], Any] = {}
    for layer, new in made.items():  # layers of one weight are layers of one weight again
        if not isinstance(new, nn.Parameter):
            key = (layer.codes.data_ptr(), getattr(layer, "transposed", False))
            new.weight = shared.setdefault(key, new.weight)
    _swap([(*_place(model, name), made[module]) for module, all_names in names.items() for name in all_names])
    _unmark(model)
    return tuple(all_names[0] for all_names in names.values())


# ---- which layers


@dataclass(eq=False)
class Target:
    """A layer that will be quantized."""

    names: list[str]  # all of one module
    places: list[tuple[nn.Module, str]]
    module: nn.Module  # what has the weight
    weight: Tensor
    kind: str  # Linear, Conv1D, Embedding or experts
    plan: LayerPlan

    @property
    def transposed(self) -> bool:
        return self.kind == "Conv1D" or (self.kind == "experts" and bool(self.module.is_transposed))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.mT.shape if self.transposed else self.weight.shape)

    def check(self) -> None:
        """Raises what would stop the quantization of this layer."""
        name = self.names[0]
        if is_lazy(self.weight) or self.weight.is_meta:
            raise ValueError(
                f"{name}: the weight is not there yet (a lazy, meta or offloaded module); load it first"
            )
        try:
            check_sizes(self.shape[-1], self.plan.grid.p, self.plan.block_size, None)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name} ({' x '.join(map(str, self.shape))}): {error}. The config's overrides can say so for this layer "
                "alone, or skip it with None"
            ) from error
        weight = self.weight.detach()
        if weight.numel() and not all(
            bool(v.isfinite()) for v in weight.aminmax()
        ):  # both are NaN if anything is
            bad = int((~weight.isfinite()).sum())
            raise ValueError(f"{name}: the weight has {bad} NaN or infinite numbers; nothing was quantized")

    def make(self, made: dict[Any, tuple[GridWeight, float]]) -> tuple[GridWeight, float]:
        """The quantized layer and its error; layers that share a weight share its codes."""
        key = (id(self.weight), self.transposed, self.plan.grid.id, self.plan.block_size)
        grid, options = self.plan.grid, self.plan.options()
        twin = made.get(key)
        new: GridWeight
        if self.kind == "experts":
            new, error = quantize_bank(self.weight, self.transposed, grid, **options)
        elif self.kind == "Embedding":
            new, error = quantize_embedding(self.module, grid, twin and twin[0], **options)  # type: ignore[arg-type]
        else:
            new, error = quantize_linear(self.module, grid, twin and twin[0], **options)
        if twin is not None:
            error = twin[1]
        made[key] = new, error
        if self.kind != "experts":
            _share_hooks(self.module, new)
            if (
                hook := getattr(self.module, "_hf_hook", None)
            ) is not None:  # accelerate moves inputs between devices
                from accelerate.hooks import add_hook_to_module

                add_hook_to_module(new, hook)
        return new, error


def find_targets(
    model: nn.Module, config: HiggsConfig, filter_fn: Filter | None = None
) -> tuple[list[Target], dict[str, str]]:
    """What the config quantizes, and {name: why not} of what could have been."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    targets, skipped, known = [], {}, set()
    for module, names in places.items():
        for names_, places_, weight, kind in _candidates(model, module, names):
            known.update(names_)
            reason = _unfit(module, kind, config, names_)
            plan = None if reason else next((p for name in names_ if (p := config.layer(name))), None)
            if reason is None and plan is None:
                reason = "the config leaves it"
            if reason is None and filter_fn is not None and not filter_fn(module, names_[0]):
                reason = "filter_fn leaves it"
            if plan is None or reason is not None:
                skipped[names_[0]] = reason or "the config leaves it"
            else:
                targets.append(Target(names_, places_, module, weight, kind, plan))
    wanted = [
        key for key, value in config.overrides.items() if value is not None and not set(key) & set("*?[:")
    ]
    if missing := [key for key in wanted if key not in known]:
        raise ValueError(
            f"overrides: {missing[0]!r} names nothing in this {type(model).__name__} that can be quantized"
        )
    return targets, skipped


def _candidates(model: nn.Module, module: nn.Module, names: list[str]):
    """(names, places, weight, kind) of each weight of a module that is of a kind that can be quantized."""
    if isinstance(module, nn.Linear) or is_conv1d(module) or isinstance(module, nn.Embedding):
        kind = "Conv1D" if is_conv1d(module) else "Linear" if isinstance(module, nn.Linear) else "Embedding"
        inside = [name for name in names if name]
        if inside:
            yield inside, [_place(model, name) for name in inside], module.weight, kind
        return
    for attribute, parameter in module._parameters.items():
        if parameter is not None and parameter.dim() == 3 and _holds_experts(module):
            full = [f"{name}.{attribute}" if name else attribute for name in names]
            yield full, [(module, attribute)], parameter, "experts"


def _holds_experts(module: nn.Module) -> bool:
    return hasattr(module, "is_transposed") or "expert" in type(module).__name__.lower()


def _unfit(module: nn.Module, kind: str, config: HiggsConfig, names: list[str]) -> str | None:
    """Why a layer can not be quantized, or None."""
    if kind == "experts":
        if not config.experts:
            return "experts=False"
        if not isinstance(getattr(module, "is_transposed", None), bool):
            return f"{type(module).__name__} does not say by is_transposed how its 3-D weights lie"
        return None
    if kind == "Embedding":
        if not config.embeddings and not any(name in config.overrides for name in names):
            return "embeddings=False"
        if module.max_norm is not None:
            return "its max_norm changes the weight in every forward"
    if parametrize.is_parametrized(module):
        return "its weight is computed by a parametrization"
    base = nn.Embedding if kind == "Embedding" else nn.Linear
    if kind != "Conv1D" and type(module).forward is not base.forward:
        return f"{type(module).__name__} has a forward of its own"
    if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "nn.MultiheadAttention reads its weight directly"
    weight: Any = module.weight
    if not is_lazy(weight):
        if not weight.is_floating_point():
            return f"its weight is {weight.dtype}"
        if weight.numel() == 0:
            return "it has no weights"
    return None


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, last = name.rpartition(".")
    return model.get_submodule(parent), last


# ---- in the place of what


def _swap(swaps: list[Swap]) -> None:
    """Puts all in their places, or none."""
    old = [(parent, name, _take(parent, name)) for parent, name, _ in swaps]
    try:
        for parent, name, new in swaps:
            _put(parent, name, new)
    except BaseException:
        for parent, name, was in old:
            _put(parent, name, was)
        raise


def put_in_place(model: nn.Module, made: Mapping[str, nn.Module | nn.Parameter]) -> None:
    """Puts modules or parameters at their full names, all or none."""
    _swap([(*_place(model, name), new) for name, new in made.items()])


def _take(parent: nn.Module, name: str) -> Any:
    return parent._parameters[name] if name in parent._parameters else parent._modules[name]


def _put(parent: nn.Module, name: str, new: Any) -> None:
    into: dict[str, Any] = parent._modules
    out_of: dict[str, Any] = parent._parameters
    if isinstance(new, nn.Parameter):
        into, out_of = out_of, into
    into[name] = new
    out_of.pop(name, None)


def _ordinary(module: GridWeight) -> nn.Module | nn.Parameter:
    weight = nn.Parameter(module.weight.contiguous())
    if isinstance(module, GridBank):
        return weight
    new: Any
    if isinstance(module, GridEmbedding):
        new = nn.Embedding(1, 1, padding_idx=None, device="meta")
        new.num_embeddings, new.embedding_dim = module.num_embeddings, module.embedding_dim
        new.padding_idx = module.padding_idx
    elif isinstance(module, GridLinear) and module.transposed:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            new = Conv1D(1, 1)
        new.nf, new.nx = module.out_features, module.in_features
        new.bias = module.bias
    else:
        assert isinstance(module, GridLinear)
        new = nn.Linear(1, 1, bias=False, device="meta")
        new.in_features, new.out_features = module.in_features, module.out_features
        new.bias = module.bias
    new.weight = weight
    _share_hooks(module, new)
    return new.train(module.training)


# ---- what transformers has to know


def _untie(model: nn.Module, targets: list[Target]) -> None:
    """transformers ties again, on load and on resize, what its config says is tied: not where one side has codes now."""
    keys = getattr(model, "all_tied_weights_keys", None)
    config: Any = getattr(model, "config", None)
    if not isinstance(keys, dict) or not keys:
        return
    names = {f"{name}.weight" for target in targets for name in target.names}
    for head, source in list(keys.items()):
        if head in names or source in names:
            del keys[head]
            text = config.get_text_config() if hasattr(config, "get_text_config") else config
            for c in (config, text):
                if hasattr(c, "tie_word_embeddings"):
                    c.tie_word_embeddings = False


def _mark(model: nn.Module, config: HiggsConfig) -> None:
    """Lets transformers know that its model is quantized, so that save_pretrained writes it and from_pretrained reads it."""
    from torchlin.quant.storage import is_transformers_model

    run_experts_on_codes(model)
    if is_transformers_model(model):
        from torchlin.quant.transformers import HiggsQuantConfig, mark

        model.config.quantization_config = HiggsQuantConfig(config)  # type: ignore[union-attr]
        mark(model)


def _unmark(model: nn.Module) -> None:
    from torchlin.quant.storage import is_transformers_model

    if is_transformers_model(model):
        from torchlin.quant.transformers import unmark

        unmark(model)
        if before := model.__dict__.pop("_torchlin_experts", None):
            model.set_experts_implementation(before)  # type: ignore[operator]


def run_experts_on_codes(model: Any) -> None:
    """Lets transformers call experts one by one: its grouped kernels want the whole bank as one dense tensor."""
    if hasattr(model, "set_experts_implementation") and any(isinstance(m, GridBank) for m in model.modules()):
        before = model.get_experts_implementation()
        if before != "eager":
            model._torchlin_experts = before
            model.set_experts_implementation("eager")


# ---- reports


def _report(target: Target, new: GridWeight, error: float) -> LayerReport:
    stored = sum(t.numel() * t.element_size() for t in (new.codes, new.scales, new.signs) if t is not None)
    return LayerReport(
        name=target.names[0],
        kind=target.kind,
        shape=target.shape,
        grid=new.grid.id,
        block_size=new.block_size,
        hadamard_size=new.hadamard_size,
        bits=8 * stored / target.weight.numel(),
        t2=error,
        expected=new.grid.mse,
        bytes_before=target.weight.numel() * target.weight.element_size(),
        bytes_after=stored,
    )


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_lazy(tensor):
            storages[tensor.data_ptr() or id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(storages.values())
