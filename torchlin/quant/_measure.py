"""How far a changed model is from the original one on given batches: perplexity, loss, or divergence of predictions."""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchlin.quant._replay import Replay

METRICS = ("ppl", "loss", "kl")


class Measure:
    """The metric of a model on batches, as growth over that of the model as it is now."""

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        metric: str,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        self.metric, self._batches = metric, batches
        run = (
            (lambda model, batch: _scalar(loss_fn(model, batch)))
            if loss_fn is not None
            else _logits_or_loss(metric)
        )
        self._replay = Replay(model, run, batches)
        self.blocks = self._replay.blocks
        self.fingerprint = fingerprint(batches)
        if not all(bool(value.isfinite().all()) for value in self._replay.base):
            raise ValueError("model: what it returns for the batches is not finite")
        losses = [0.0 if metric == "kl" else float(value) for value in self._replay.base]
        self._losses, loss = losses, sum(losses) / len(losses)
        self.base = math.exp(loss) if metric == "ppl" else loss

    @property
    def count(self) -> int:
        return len(self._batches)

    @torch.no_grad()
    def __call__(self, weight: Tensor | None, share: Sequence[int]) -> float:
        """How much the metric has grown on some batches; nothing but ``weight`` may have changed (None: whatever did)."""
        grown = [self._grown(self._replay(weight, index), index) for index in share]
        loss = sum(grown) / len(grown)
        return self.base * math.expm1(min(loss, 700.0)) if self.metric == "ppl" else loss

    def _grown(self, value: Tensor, index: int) -> float:
        if self.metric != "kl":
            return float(value) - self._losses[index]
        return _divergence(self._replay.base[index], value)


def _divergence(original: Tensor, changed: Tensor) -> float:
    """Mean KL(original ‖ changed) in nats over positions, from logits (positions, classes)."""
    wide = torch.float64 if original.dtype is torch.float64 else torch.float32
    total = 0.0
    for p, q in zip(original.split(256), changed.split(256), strict=True):  # no second copy of all logits
        log_p, log_q = F.log_softmax(p, -1, dtype=wide), F.log_softmax(q, -1, dtype=wide)
        total += float(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().sum())
    return total / len(original)


# ---- runs


def _logits_or_loss(metric: str) -> Callable[[nn.Module, Any], Tensor]:
    return logits_of if metric == "kl" else next_token_loss


def call(model: nn.Module, batch: Any) -> Any:
    """What the model returns for a batch: a tensor, a tuple of arguments, or a dict of keyword arguments."""
    parameters = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {}
    if "use_cache" in parameters:
        arguments["use_cache"] = False
    if isinstance(batch, Mapping):
        return model(**arguments, **{key: value for key, value in batch.items() if key != "labels"})
    if isinstance(batch, tuple):
        return model(*batch, **arguments)
    return model(input_ids=batch, **arguments) if "input_ids" in parameters else model(batch, **arguments)


def logits_of(model: nn.Module, batch: Any) -> Tensor:
    """The logits of every position that is no padding: (positions, classes)."""
    logits = _logits(call(model, batch))
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and mask.shape == logits.shape[:-1]:
        return logits[mask.to(logits.device, torch.bool)]
    return logits.flatten(0, -2)


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, (tuple, list)) and logits else logits
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 2:
        raise TypeError(
            f"model must return logits (..., classes), itself or as .logits, got {type(output).__name__}; "
            "with other models give loss_fn"
        )
    return logits


def next_token_loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean negative log-likelihood of each next token, of the labels where a batch has some."""
    ids: Any = batch
    if isinstance(batch, Mapping):
        ids = batch.get("labels", batch.get("input_ids"))
        mask = batch.get("attention_mask")
        if "labels" not in batch and ids is not None and mask is not None and mask.shape == ids.shape:
            ids = ids.masked_fill(mask == 0, -100)
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2:
        raise TypeError(
            "batches: for a loss on text each must be or hold token ids (B, T); else give loss_fn"
        )
    logits = _logits(call(model, batch))
    wide = torch.float64 if logits.dtype is torch.float64 else torch.float32
    labels = ids[:, 1:].flatten().to(logits.device)
    return F.cross_entropy(logits[:, :-1].flatten(0, -2).to(wide), labels)


def sampled_loss(model: nn.Module, row: Any, generator: torch.Generator) -> Tensor:
    """A loss whose gradient's square is on average the mean Fisher information: labels are drawn from the model's predictions.

    The scores of different positions are uncorrelated, so the square of their sum is on average the sum of their squares.
    """
    logits = logits_of(model, row)
    wide = logits.double() if logits.dtype is torch.float64 else logits.float()
    labels = torch.multinomial(wide.detach().softmax(-1), 1, generator=generator)[:, 0]
    return F.cross_entropy(wide, labels, reduction="sum") / math.sqrt(len(wide))


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(f"loss_fn must return a tensor of one number, got {loss!r:.100}")
    return loss.detach().reshape(())


# ---- batches


def check_batches(batches: Any) -> list[Any]:
    """A list of batches; the rows of a tensor become batches of one row."""
    if isinstance(batches, Tensor):
        if batches.dim() < 2 or not len(batches):
            raise ValueError(f"batches: a tensor must be (windows, tokens), got shape {tuple(batches.shape)}")
        return list(batches.split(1))
    if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Sequence):
        raise TypeError(f"batches must be a list of batches, a tensor or None, got {type(batches).__name__}")
    if not batches:
        raise ValueError("batches must hold at least one batch, got none")
    return list(batches)


def random_batches(model: nn.Module, count: int, window: int, seed: int) -> list[Tensor]:
    """Windows of random tokens (1, window), for models with an embedding of tokens."""
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(getattr(embedding, "weight", None), Tensor):
        raise ValueError("batches: random tokens need a model with get_input_embeddings(); give batches")
    config: Any = getattr(model, "config", None)
    longest = (
        getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or window
    )
    vocabulary = min(len(embedding.weight), getattr(config, "vocab_size", None) or len(embedding.weight))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (count, 1, min(window, longest)), generator=generator)
    return list(ids.to(embedding.weight.device))


def split_rows(batch: Any) -> list[Any]:
    """A batch as batches of one row each."""
    if isinstance(batch, Tensor):
        return list(batch.split(1))
    values = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    rows = {len(value) for value in values if isinstance(value, Tensor) and value.dim()}
    if len(rows) != 1:
        return [batch]
    parts = [
        value.split(1) if isinstance(value, Tensor) and value.dim() else [value] * next(iter(rows))
        for value in values
    ]
    split = list(zip(*parts, strict=True))
    return [dict(zip(batch, row, strict=True)) for row in split] if isinstance(batch, Mapping) else split


def fingerprint(value: Any) -> int:
    """A checksum of tensors in lists, tuples and dicts, whatever device they are on."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return zlib.crc32(plain.data, zlib.crc32(f"{value.dtype}{tuple(value.shape)}".encode()))
    parts: Any = [repr(value)]
    if isinstance(value, Mapping):
        parts = [part for item in value.items() for part in item]
    elif isinstance(value, (list, tuple)):
        parts = value
    if parts and isinstance(parts[0], str) and len(parts) == 1:
        return zlib.crc32(parts[0].encode())
    return zlib.crc32(",".join(str(fingerprint(part)) for part in parts).encode())
