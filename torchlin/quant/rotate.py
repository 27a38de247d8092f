"""Rotate the residual stream of a Llama-type language model by a randomized Hadamard transform, exactly.

A block adds o(f(g ∘ h / rms(h))) to the stream h: g is the gain of its RMSNorm, f begins and o ends with a
linear layer. For orthogonal Q, rms(Qh) = rms(h). So once g is folded into the weights that read the stream,
the stream may be Qh everywhere: what writes to it is multiplied by Q, what reads it by Qᵀ, and the logits
stay what they were.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torchlin.functional import hadamard_transform
from torchlin.nn import HadamardTransform
from torchlin.ops.hadamard_matrix import construction, hadamard_order
from torchlin.quant._llama import LlamaParts

# Weights pass through float64 in pieces of this many elements: a large head needs no second copy of itself.
_PIECE = 1 << 22


@dataclass(frozen=True, eq=False)
class RotationReport:
    """What :func:`rotate_` did.

    ``HadamardTransform(order, randomized=True, seed=seed)`` maps the old residual stream to the new one.
    """

    order: int
    construction: str
    seed: int
    folded: tuple[str, ...] = field(repr=False)  # norms whose gains moved into the linear layers after them
    rotated: tuple[str, ...] = field(repr=False)  # modules whose weights were multiplied by the rotation
    untied: bool  # whether embedding and head had one weight before

    def __str__(self) -> str:
        ties = ", head untied from the embedding" if self.untied else ""
        return (
            f"residual stream rotated by a randomized Hadamard matrix of order {self.order} "
            f"({self.construction}), seed {self.seed}: {len(self.folded)} norms folded, "
            f"{len(self.rotated)} modules rotated{ties}"
        )


@torch.no_grad()
def rotate_(model: nn.Module, seed: int = 0) -> RotationReport:
    r"""Rotate the residual stream of a Llama-type model in place by :math:`Q = H \mathrm{diag}(s)/\sqrt n`.

    The logits stay the same up to the rounding of the weights, which are computed in float64 and rounded
    once. The gains of the RMSNorms are folded into the linear layers that follow and become 1; every weight
    that writes to the residual stream (embedding, ``o_proj``, ``down_proj`` and their biases) is multiplied
    by Q, every weight that reads it (``q/k/v_proj``, ``gate/up_proj``, ``lm_head``) by Qᵀ. That spreads the
    outlier channels of the stream over all channels, which is what quantization of weights or activations
    wants. A head that shares its weight with the embedding gets its own, because the two now differ;
    ``config.tie_word_embeddings`` follows.

    Args:
        model: a causal language model of transformers with RMSNorm before attention and before a plain MLP:
            Llama, Mistral, Qwen 2 and 3, Gemma 1, Phi-3, Granite, SmolLM 2 and 3 and others of that shape.
            Its parts are recognised by their names and behaviour, not by its class. Any device; float32,
            float64, float16, bfloat16.
        seed: of the random signs s; the same seed gives the same rotation on every machine and device.

    Returns:
        A :class:`RotationReport`.

    Raises:
        TypeError: a part of the model is none that a rotation can pass through (LayerNorm, a norm on a
            block's output, a mixture of experts, quantized or adapted layers, no head...). The model is
            unchanged.
        ValueError: no Hadamard matrix is known for the hidden size, a weight is not loaded or is shared by
            two layers. The model is unchanged.

    Source: Ashkboos et al., "QuaRot", 2024 (arXiv:2404.00456); the invariance of RMSNorm networks under
    rotation is from Ashkboos et al., "SliceGPT", 2024 (arXiv:2401.15024).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import torchlin.quant
        >>> config = LlamaConfig(vocab_size=64, hidden_size=96, intermediate_size=128, num_hidden_layers=2,
        ...                      num_attention_heads=4, num_key_value_heads=4)
        >>> report = torchlin.quant.rotate_(LlamaForCausalLM(config), seed=1)
        >>> report.order, len(report.folded), report.untied
        (96, 5, False)
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    parts = LlamaParts(model)
    n = parts.hidden_size
    try:
        k, _ = hadamard_order(n)
    except ValueError as error:
        raise ValueError(
            f"model: no Hadamard matrix is known for its hidden size {n}, so its residual stream cannot "
            f"be rotated; what its layers read can, by torchlin.nn.HadamardTransform({n}, block_size=...). "
            f"Nothing was changed. In detail: {error}"
        ) from error
    signs = HadamardTransform(n, randomized=True, seed=seed).signs
    assert signs is not None
    signs = signs.double()
    untied = parts.untie()  # before the weights differ; and the one large allocation, so that it fails first

    for norm in parts.norms:
        gain = _float64(norm.weight) + norm.plus
        for linear in norm.readers:
            _rotate_rows(linear.weight, signs, gain)
        norm.weight.fill_(1 - norm.plus)
    _rotate_rows(parts.embedding.weight, signs)
    for linear in parts.writers:
        _rotate_columns(linear.weight, signs)
        if linear.bias is not None:
            _rotate_columns(linear.bias.unsqueeze(1), signs)

    touched = {parts.embedding, *parts.writers}.union(*(norm.readers for norm in parts.norms))
    return RotationReport(
        order=n,
        construction=construction(k),
        seed=seed,
        folded=tuple(parts.name(norm.module) for norm in parts.norms),
        rotated=tuple(name for name, module in model.named_modules() if module in touched),
        untied=untied,
    )


def _rotate_rows(weight: Tensor, signs: Tensor, gain: Tensor | None = None) -> None:
    """weight ← weight · diag(gain) · Qᵀ: each row w becomes Q (gain ∘ w)."""
    for rows in weight.split(max(1, _PIECE // weight.shape[1])):
        wide = _float64(rows)
        if gain is not None:
            wide = wide * gain.to(wide.device)
        rows.copy_(hadamard_transform(wide, signs=signs.to(wide.device)))


def _rotate_columns(weight: Tensor, signs: Tensor) -> None:
    """weight ← Q · weight."""
    for columns in weight.split(max(1, _PIECE // weight.shape[0]), dim=1):
        wide = _float64(columns)
        columns.copy_(hadamard_transform(wide, dim=0, signs=signs.to(wide.device)))


def _float64(x: Tensor) -> Tensor:
    """x in float64, on the CPU where x's device may have no float64."""
    return x.to("cpu" if x.device.type in ("mps", "xpu") else x.device, torch.float64)
