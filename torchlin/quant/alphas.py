r"""How much a model suffers from an error in each of its layers: the coefficients of the linearity theorem.

If every layer's weight W_l gets an unbiased isotropic error of relative size t_l² = ‖Ŵ_l - W_l‖² / ‖W_l‖², then for small
errors

    E[loss(Ŵ)] = loss(W) + Σ_l α_l t_l²,        α_l = ‖W_l‖² tr(H_l) / (2 d_l),

with the Hessian H_l of the loss and the number d_l of weights. The α_l do not depend on where the error comes from.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchlin._console import progress
from torchlin.quant._measure import (
    METRICS,
    Measure,
    check_batches,
    fingerprint,
    random_batches,
    sampled_loss,
    split_rows,
)
from torchlin.quant.config import HiggsConfig
from torchlin.quant.quantize import Target, find_targets

_FORMAT, _VERSION = "torchlin.alphas", 1
LARGEST_T2 = 0.03  # of evenly spread levels: the error of a 3-bit grid


@dataclass(frozen=True)
class LayerAlpha:
    """What was found out about one layer."""

    alpha: float  # growth of the metric per t²
    error: float  # its standard error; nan where one measurement is all there is
    shape: tuple[int, ...]  # of the weight as it is multiplied: (experts,) out, in
    t2: tuple[float, ...] = field(default=(), repr=False)  # the noise levels ...
    delta: tuple[float, ...] = field(default=(), repr=False)  # ... and how much the metric grew at each

    @property
    def size(self) -> int:
        """Numbers in the weight."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Alphas(Mapping[str, float]):
    """The coefficient α of every layer, as :func:`estimate_alphas` found them: a mapping from a layer's name to its α.

    Example:
        >>> alphas = Alphas({"up": LayerAlpha(0.5, 0.1, (8, 8)), "down": LayerAlpha(2.0, 0.1, (8, 8))}, "kl", 0.0, {})
        >>> alphas["down"], alphas.sizes
        (2.0, {'up': 64, 'down': 64})
        >>> print(alphas)
        alphas of 2 layers (kl per t²), sum 2.5
          2        ± 0.1      down
          0.5      ± 0.1      up
    """

    layers: Mapping[str, LayerAlpha]
    metric: (
        str  # what grows: "ppl", "loss" (both of the batches' next tokens) or "kl" (from the original model)
    )
    base: float  # the metric of the original model
    settings: Mapping[str, Any] = field(repr=False)  # how they were measured

    def __getitem__(self, name: str) -> float:
        return self.layers[name].alpha

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers in each layer's weight."""
        return {name: layer.size for name, layer in self.layers.items()}

    @property
    def errors(self) -> dict[str, float]:
        """Standard error of each layer's α."""
        return {name: layer.error for name, layer in self.layers.items()}

    def __str__(self) -> str:
        worst = sorted(self.layers.items(), key=lambda item: -item[1].alpha)
        lines = [f"  {layer.alpha:<8.3g} ± {layer.error:<8.2g} {name}" for name, layer in worst[:10]]
        more = [f"  and {len(worst) - 10} smaller ones"] if len(worst) > 10 else []
        head = f"alphas of {len(worst)} layers ({self.metric} per t²), sum {sum(self.values()):.4g}"
        return "\n".join([head, *lines, *more])

    def to_dict(self) -> dict[str, Any]:
        """Nothing but dicts, lists, strings and numbers."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "metric": self.metric,
            "base": self.base,
            "settings": dict(self.settings),
            "layers": {name: _plain(asdict(layer)) for name, layer in self.layers.items()},
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Alphas:
        """The inverse of :meth:`to_dict`; ValueError where ``data`` is nothing of the kind."""
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT or data.get("version") != _VERSION:
            found = (
                {key: data.get(key) for key in ("format", "version")} if isinstance(data, Mapping) else data
            )
            raise ValueError(
                f"data must be alphas of format {_FORMAT!r}, version {_VERSION}, got {found!r:.200}"
            )
        try:
            layers = {
                str(name): LayerAlpha(
                    float(layer["alpha"]),
                    math.nan if layer["error"] is None else float(layer["error"]),
                    tuple(map(int, layer["shape"])),
                    tuple(map(float, layer["t2"])),
                    tuple(map(float, layer["delta"])),
                )
                for name, layer in data["layers"].items()
            }
            return Alphas(layers, str(data["metric"]), float(data["base"]), dict(data["settings"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"data: alphas are damaged, {type(error).__name__}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON; an old file is replaced as a whole or not at all."""
        _write(Path(path), self.to_dict())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Alphas:
        """Reads what :meth:`save` or a finished :func:`estimate_alphas` wrote; ValueError where it is not that."""
        alphas = Alphas.from_dict(_read(Path(path)))
        missing = [name for name in alphas.settings.get("layers", alphas) if name not in alphas]
        if missing:
            raise ValueError(
                f"{path}: only {len(alphas)} of {len(alphas) + len(missing)} layers are finished; go on with "
                "estimate_alphas(..., path=...)"
            )
        return alphas


def estimate_alphas(
    model: nn.Module,
    batches: Sequence[Any] | Tensor | None = None,
    *,
    levels: int | Sequence[float] = 15,
    metric: str | None = None,
    method: str = "noise",
    antithetic: bool | None = None,
    per_row: bool = False,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    modules_to_not_convert: Sequence[str] = ("lm_head",),
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
) -> Alphas:
    r"""Estimate for every linear layer how much the model's loss grows with the error in its weight.

    With ``method="noise"``, one layer at a time gets :math:`W + t \lVert W \rVert \, u` for a random u of length 1, at several
    levels t, while all others keep their weights. α is the least-squares slope, through zero, of the metric's growth against
    t². What comes before the layer is computed once (for the blocks of a deep model) and not again.

    With ``method="fisher"``, :math:`\alpha = \lVert W \rVert^2 \operatorname{tr} F / (2d)` with the Fisher information F of the
    model's own predictions: the limit of the noise's KL divergence for t → 0. One backward pass per row of a batch, with labels
    drawn from the model's predictions, serves all layers at once, so this is far cheaper. It takes the memory of a training
    step on one row, without the gradients.

    Args:
        model: any nn.Module on any device. Its weights, modes and gradients are what they were when this returns or raises.
        batches: what the model is run on: a list of batches, or a tensor (windows, tokens) whose rows become batches. A batch
            is a tensor of token ids (B, T), a dict of keyword arguments, or a tuple of arguments. Every level is measured on
            one batch, in turn (with more batches than levels: on its share of them), so that the slope averages over noise
            and text alike. ``None``: a window of 64 random tokens a level (for "fisher" 64 windows of 128); then no
            data is needed at all.
        levels: number of noise levels, spread evenly over t² up to 0.03; or the t² themselves.
        metric: "ppl", the perplexity exp(loss), for which the theorem is stated; "loss", the mean negative log-likelihood of
            the next token; or "kl", the mean divergence KL(original ‖ changed) of the predictions of each position. All α are
            in units of this metric; to first order α of "ppl" is the perplexity times α of "loss". The default is "kl" without
            batches or with "fisher", which knows no other, and else "ppl".
        method: "noise" or "fisher".
        antithetic: measure every level with +u and -u, whose mean has no term that is odd in the noise: on text, the first-
            order term is not zero. By default for "ppl" and "loss"; the first-order term of a KL divergence is zero anyway.
        per_row: errors of a row (of one output) are proportional to the row's norm, as a quantizer with a scale a row makes
            them, and α is that of such errors. False: they are alike in the whole weight, the theorem's form. The two
            differ where large rows are more, or less, sensitive than small ones.
        loss_fn: computes the loss, a scalar tensor, from the model and a batch. By default the model must return logits
            (..., classes), itself or as ``.logits``; for "ppl" and "loss" those of the next token of ``input_ids``.
        modules_to_not_convert: names (or ends of names, or patterns) of modules to leave out.
        filter_fn: takes a module and its name and says whether to take the module.
        seed: of the noise and the random tokens. A layer's noise depends on this, its name and the level alone.
        path: a file that every finished layer is written to at once ("noise" only). If it exists, what it holds is not measured
            again; a file of another model, other batches or settings is refused.

    Returns:
        :class:`Alphas`, with standard errors.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: arguments contradict each other, there is no layer, a result is not finite, or the file at ``path`` belongs
            to something else.

    Source: Malinovskii et al., "Pushing the limits of large language model quantization via the linearity theorem", 2024
    (arXiv:2411.17525), theorem 1 and section on α; the Fisher form is a second-order expansion, see docs/linearity-theorem.md.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        >>> alphas = estimate_alphas(model, [torch.randn(32, 8)], metric="kl", levels=[0.01, 0.02])
        >>> sorted(alphas), alphas.sizes["0"]
        (['0', '2'], 128)
    """
    if method not in ("noise", "fisher"):
        raise ValueError(f'method must be "noise" or "fisher", got {method!r}')
    if metric is None:
        metric = "kl" if batches is None or method == "fisher" else "ppl"
    _check(model, metric, method, loss_fn, path)
    t2 = check_levels(levels)
    targets = quantizable(model, modules_to_not_convert, filter_fn)
    if batches is None:
        if metric != "kl":
            raise ValueError(
                f'metric {metric!r} needs text: give batches, or take metric="kl" for random tokens'
            )
        batches = random_batches(model, *((len(t2), 64) if method == "noise" else (64, 128)), seed)
    batches = check_batches(batches)
    with evaluation_mode(model):
        if method == "fisher":
            return _fisher(model, targets, batches, per_row, seed)
        antithetic = metric != "kl" if antithetic is None else bool(antithetic)
        measure = Measure(model, batches, metric, loss_fn)
        return _noise(model, targets, measure, t2, antithetic, per_row, seed, path)


# ---- arguments


def _check(
    model: object, metric: object, method: str, loss_fn: object, path: str | os.PathLike[str] | None
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}, got {metric!r}")
    if loss_fn is not None and metric == "kl":
        raise ValueError(
            'loss_fn gives a loss; metric "kl" compares predictions. Take metric="loss" or no loss_fn'
        )
    if method == "fisher" and (metric != "kl" or path is not None):
        raise ValueError(
            'method "fisher" estimates the metric "kl" only, and has no layers to resume at: it takes no path'
        )


def quantizable(
    model: nn.Module,
    modules_to_not_convert: Sequence[str] = ("lm_head",),
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> dict[str, Target]:
    """What quantize_ would quantize, by name. A weight that several layers share is there once, under its first name."""
    # Which grid does not matter here; this one takes no time to make.
    config = HiggsConfig(p=1, n=2, modules_to_not_convert=modules_to_not_convert)  # type: ignore[arg-type]
    found: dict[int, tuple[str, Target]] = {}
    for target in find_targets(model, config, filter_fn)[0]:
        target.check()
        found.setdefault(target.weight.data_ptr(), (target.names[0], target))
    if not found:
        raise ValueError("model: there is no layer to quantize; see modules_to_not_convert and filter_fn")
    return dict(found.values())


def check_levels(levels: int | Sequence[float]) -> tuple[float, ...]:
    """The values of t², ascending."""
    if isinstance(levels, bool) or not isinstance(levels, (int, Sequence)) or isinstance(levels, str):
        raise TypeError(f"levels must be a number of levels or a sequence of t², got {levels!r}")
    if isinstance(levels, int):
        if levels < 1:
            raise ValueError(f"levels must be at least 1, got {levels}")
        return tuple(LARGEST_T2 * (i + 1) / levels for i in range(levels))
    values = tuple(sorted(float(v) for v in levels))
    if not values or not all(0 < v < math.inf for v in values):
        raise ValueError(f"levels must be positive finite t², got {list(levels)}")
    return values


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout, and nothing that a forward pass would update."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# ---- by noise


@torch.no_grad()
def _noise(
    model: nn.Module,
    targets: dict[str, Target],
    measure: Measure,
    t2: tuple[float, ...],
    antithetic: bool,
    per_row: bool,
    seed: int,
    path: str | os.PathLike[str] | None,
) -> Alphas:
    settings = {
        "method": "noise",
        "levels": list(t2),
        "antithetic": antithetic,
        "per_row": per_row,
        "seed": seed,
        "batches": measure.fingerprint,
        "weights": _fingerprint(model),
        "layers": list(targets),
    }
    base = measure.base
    layers: dict[str, LayerAlpha] = {}
    if path is not None and Path(path).exists():
        layers = _resume(Path(path), settings, measure.metric, base)
    shares = [_share(level, len(t2), measure.count) for level in range(len(t2))]
    with progress(len(targets), "alphas by noise") as bar:
        bar.advance(len(layers))
        for name, target in targets.items():
            if name in layers:
                continue
            delta = []
            for level, share in enumerate(shares):
                noise = _unit_noise(target, per_row, f"{seed}/{level}/{name}")
                delta.append(_grown(target.weight, noise, math.sqrt(t2[level]), antithetic, measure, share))
            if not all(map(math.isfinite, delta)):
                raise ValueError(
                    f"{name}: the model's {measure.metric} is not finite with noise in this layer"
                )
            layers[name] = LayerAlpha(*slope(t2, delta), target.shape, t2, tuple(delta))
            if path is not None:
                _write(Path(path), Alphas(layers, measure.metric, base, settings).to_dict())
            bar.advance()
    # The file has them in the order of measuring, which a resumed run need not have kept.
    return Alphas({name: layers[name] for name in targets}, measure.metric, base, settings)


def _share(level: int, levels: int, batches: int) -> list[int]:
    """Which batches a level is measured on: every level has at least one, every batch at least one level."""
    return list(range(level, batches, levels)) or [level % batches]


def _unit_noise(target: Target, per_row: bool, key: str) -> Tensor:
    """Random numbers in the shape of a weight, of length 1; the same for the same key."""
    weight = target.weight
    generator = torch.Generator(weight.device).manual_seed(zlib.crc32(key.encode()))
    wide = torch.float64 if weight.dtype is torch.float64 else torch.float32
    noise = torch.randn(weight.shape, dtype=wide, device=weight.device, generator=generator)
    if per_row:
        noise *= _row_norms(target, wide)
    # Of exactly this length: a source of variance less, and in all directions alike nevertheless.
    return noise / torch.linalg.vector_norm(noise).clamp_min(torch.finfo(wide).tiny)


def _row_norms(target: Target, dtype: torch.dtype) -> Tensor:
    """Norms of the weights that make one output each, in a shape that spreads over the weight."""
    dim = -2 if target.transposed else -1
    return torch.linalg.vector_norm(target.weight.detach(), dim=dim, keepdim=True, dtype=dtype)


def _grown(
    weight: Tensor, noise: Tensor, t: float, antithetic: bool, measure: Measure, share: list[int]
) -> float:
    """How much the metric grows with noise of relative size t in a weight; the mean over both signs if antithetic."""
    length = t * float(torch.linalg.vector_norm(weight, dtype=noise.dtype))
    grown = []
    for sign in (1, -1) if antithetic else (1,):
        with replaced(weight, weight.to(noise.dtype).add(noise, alpha=sign * length)):
            grown.append(measure(weight, share))
    return sum(grown) / len(grown)


@contextmanager
def replaced(weight: Tensor, other: Tensor) -> Iterator[None]:
    """Another weight, and then bit for bit the old one again, whatever happens."""
    original = weight.detach().clone()
    try:
        weight.data.copy_(other)
        yield
    finally:
        weight.data.copy_(original)


def slope(t2: Sequence[float], delta: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope of delta against t² through zero, and its standard error, whatever the residuals' variances are."""
    x, y = torch.tensor(t2, dtype=torch.float64), torch.tensor(delta, dtype=torch.float64)
    total = x.square().sum()
    alpha = (x * y).sum() / total
    if len(x) == 1:
        return float(alpha), math.nan
    residual = y - alpha * x
    variance = (x * residual).square().sum() / total.square() * len(x) / (len(x) - 1)
    return float(alpha), float(variance.sqrt())


# ---- by the Fisher information


def _fisher(
    model: nn.Module, targets: dict[str, Target], batches: list[Any], per_row: bool, seed: int
) -> Alphas:
    found: dict[str, list[float]] = {name: [] for name in targets}
    rows = [row for batch in batches for row in split_rows(batch)]
    device = next(iter(targets.values())).weight.device
    generator = torch.Generator(device).manual_seed(seed)
    with (
        progress(len(rows), "alphas by Fisher information") as bar,
        _alphas_of(targets, per_row, model) as one,
    ):
        for row in rows:
            one.clear()
            with torch.enable_grad():
                sampled_loss(model, row, generator).backward()
            for name, values in found.items():
                values.append(one.get(name, 0.0))  # an expert without tokens has no gradient
            bar.advance()
    layers = {}
    for name, target in targets.items():
        alphas = torch.tensor(found[name], dtype=torch.float64)
        if not bool(alphas.isfinite().all()):
            raise ValueError(f"{name}: the gradient of the model's predictions is not finite")
        error = float(alphas.std()) / math.sqrt(len(alphas)) if len(alphas) > 1 else math.nan
        layers[name] = LayerAlpha(float(alphas.mean()), error, target.shape)
    settings = {
        "method": "fisher",
        "per_row": per_row,
        "seed": seed,
        "batches": fingerprint(batches),
        "layers": list(targets),
    }
    return Alphas(layers, "kl", 0.0, settings)


@contextmanager
def _alphas_of(targets: dict[str, Target], per_row: bool, model: nn.Module) -> Iterator[dict[str, float]]:
    """Collects α from the gradients of a backward pass, which are let go at once; all gradients stay as they were."""
    found: dict[str, float] = {}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]

    def take(name: str, target: Target, weight: Tensor) -> None:
        assert weight.grad is not None
        # The gradient in units of the error's standard deviation at t = 1.
        if per_row:
            grad = weight.grad * _row_norms(target, weight.grad.dtype)
            numbers = target.shape[-1]
        else:
            grad = weight.grad * torch.linalg.vector_norm(weight.detach()).to(weight.grad.dtype)
            numbers = weight.numel()
        found[name] = float(torch.linalg.vector_norm(grad, dtype=torch.float64).square()) / (2 * numbers)
        weight.grad = None

    with ExitStack() as stack:
        try:
            for parameter, _, _ in before:
                parameter.grad = None
                parameter.requires_grad_(False)
            for name, target in targets.items():
                target.weight.requires_grad_(True)
                hook = target.weight.register_post_accumulate_grad_hook(
                    lambda weight, name=name, target=target: take(name, target, weight)
                )
                stack.callback(hook.remove)
            yield found
        finally:
            for parameter, required, grad in before:
                parameter.requires_grad_(required)
                parameter.grad = grad


# ---- files


def _resume(path: Path, settings: dict[str, Any], metric: str, base: float) -> dict[str, LayerAlpha]:
    """The layers that a file holds, if all else in it is what is being measured now."""
    there = Alphas.from_dict(_read(path))
    now = {**settings, "metric": metric}
    then = {**there.settings, "metric": there.metric}
    differing = [key for key in sorted(now.keys() | then.keys()) if now.get(key) != then.get(key)]
    if differing:
        what = "; ".join(
            f"{key} {_brief(then.get(key))} there, {_brief(now.get(key))} here" for key in differing
        )
        raise ValueError(
            f"path: {path} holds alphas of something else ({what}); take another file or remove it"
        )
    if not math.isclose(there.base, base, rel_tol=1e-3, abs_tol=1e-9):
        raise ValueError(f"path: {path} was begun with a base {metric} of {there.base:g}; now it is {base:g}")
    return dict(there.layers)


def _brief(value: Any) -> str:
    text = f"{len(value)} of them" if isinstance(value, list) and len(value) > 4 else repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def _fingerprint(model: nn.Module) -> int:
    """A checksum of all numbers of a model."""
    return fingerprint(
        [tensor for _, tensor in sorted(model.state_dict().items()) if isinstance(tensor, Tensor)]
    )


def _plain(layer: dict[str, Any]) -> dict[str, Any]:
    """JSON has no nan."""
    return {**layer, "error": None if math.isnan(layer["error"]) else layer["error"]}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is no file of alphas, it holds no JSON ({error})") from error


def _write(path: Path, data: Any) -> None:
    """Replaces a file as a whole: whoever reads it, and whenever this is cut off, it is the old or the new one."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
