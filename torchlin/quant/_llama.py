"""The modules of a Llama-type language model that touch its residual stream, found and checked.

Recognition goes by the names that Llama's descendants share and by behaviour, never by class: a fork is as
good as the original. Whatever is not recognised is refused, because a part that reads or writes the stream
unseen would make a wrong model without any error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Block(NamedTuple):
    norm: str
    readers: tuple[str, ...]  # linear layers that take the normed stream
    writer: str  # the linear layer whose output is added to the stream
    between: tuple[str, ...]  # never sees the stream, so it may be anything


class Norm(NamedTuple):
    module: nn.Module
    weight: Tensor
    plus: int  # the gain is weight + plus
    readers: list[nn.Linear]


_BLOCKS = {
    "self_attn": _Block(
        norm="input_layernorm",
        readers=("q_proj", "k_proj", "v_proj", "qkv_proj"),
        writer="o_proj",
        between=(
            "q_norm",
            "k_norm",
            "query_layernorm",
            "key_layernorm",
            "attn_sub_norm",
            "rotary_emb",
            "sinks",
        ),
    ),
    "mlp": _Block(
        norm="post_attention_layernorm",
        readers=("gate_proj", "up_proj", "gate_up_proj"),
        writer="down_proj",
        between=("act_fn", "activation_fn", "ffn_sub_norm"),
    ),
}
_HARMLESS = (nn.Identity, nn.Dropout)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class LlamaParts:
    """Embedding, norms with the linear layers that read them, writers and head; raises on anything else."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self._names = {module: name for name, module in model.named_modules()}
        self.norms: list[Norm] = []
        self.writers: list[nn.Linear] = []
        self.embedding = self._embedding()
        self.hidden_size = self.embedding.embedding_dim
        self.head = self._head()

        trunk, layers = self._trunk()
        for layer in layers:
            self._layer(layer)
        self._norm(self._child(trunk, "norm"), [self.head])
        self._only(trunk, ("layers", "norm", "rotary_emb", "rotary_emb_local"), (self.embedding,))
        outer = self.model
        for name in filter(None, self._names[trunk].split(".")):  # what wraps the trunk adds only a head
            self._only(outer, (name,), (self.head,))
            outer = self._child(outer, name)
        self._own_values()

    def untie(self) -> bool:
        """Gives the head a weight of its own where it shares the embedding's, and says whether it did."""
        weight = self.head.weight
        if weight.data_ptr() != self.embedding.weight.data_ptr():
            return False
        self.head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        # transformers ties again, on load and on resize, what these say is tied.
        config: Any = getattr(self.model, "config", None)
        for c in [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]:
            if hasattr(c, "tie_word_embeddings"):
                c.tie_word_embeddings = False
        keys = getattr(self.model, "all_tied_weights_keys", None)
        if isinstance(keys, dict):
            keys.pop(f"{self._names[self.head]}.weight", None)
        return True

    def name(self, module: nn.Module) -> str:
        return self._names.get(module) or "the model"

    # -- structure

    def _embedding(self) -> nn.Embedding:
        get = getattr(self.model, "get_input_embeddings", None)
        embedding = get() if get is not None else None
        if not isinstance(embedding, nn.Embedding):
            raise self._refuse(self.model, "has no nn.Embedding as its input embedding")
        if embedding.max_norm is not None:
            raise self._refuse(embedding, "has max_norm set, which changes its rows in every forward")
        self._only_weights(embedding)
        return embedding

    def _head(self) -> nn.Linear:
        get = getattr(self.model, "get_output_embeddings", None)
        head = get() if get is not None else None
        if head is None:
            raise self._refuse(self.model, "has no language-model head, so its output would come out rotated")
        return self._linear(head, fan_in=self.hidden_size)

    def _trunk(self) -> tuple[nn.Module, nn.ModuleList]:
        """The module that holds the embedding and the stack of layers, and the stack."""
        for module in self.model.modules():
            layers = getattr(module, "layers", None)
            if isinstance(layers, nn.ModuleList) and self.embedding in module.children():
                return module, layers
        raise self._refuse(self.model, "has no part that holds the embedding and a ModuleList named layers")

    def _layer(self, layer: nn.Module) -> None:
        known: list[str] = []
        for name, of in _BLOCKS.items():
            block, norm = self._child(layer, name), self._child(layer, of.norm)
            if any(hasattr(block, part) for part in ("experts", "gate", "router")):
                raise self._refuse(block, "is a mixture of experts")
            readers = [
                self._linear(child, fan_in=self.hidden_size)
                for child_name, child in block.named_children()
                if child_name in of.readers
            ]
            if not readers:
                raise self._refuse(block, f"has none of the linear layers {', '.join(of.readers)}")
            self.writers.append(self._linear(self._child(block, of.writer), fan_out=self.hidden_size))
            self._only(block, (*of.readers, of.writer, *of.between))
            self._norm(norm, readers)
            known += [name, of.norm]
        for name, child in layer.named_children():
            if "norm" in name and name not in known:  # Gemma 2 and 3, OLMo 2, GLM-4
                raise self._refuse(child, "norms what a block writes; that does not commute with a rotation")
        self._only(layer, known)

    def _norm(self, norm: nn.Module, readers: list[nn.Linear]) -> None:
        """Records a norm, and how its gain comes from its weight: by trying it, so any RMSNorm will do."""
        weight = norm._parameters.get("weight")
        if weight is None or len(list(norm.parameters())) != 1 or weight.shape != (self.hidden_size,):
            raise self._refuse(norm, f"is no RMSNorm with one weight of the hidden size {self.hidden_size}")
        self._check_values(norm, weight)
        probe = torch.randn(8, self.hidden_size, generator=torch.Generator().manual_seed(0), device="cpu")
        probe = (probe + 2).to(weight.device, weight.dtype)  # a LayerNorm would take the mean of 2 away
        answer = norm.forward(probe).to("cpu", torch.float64)
        x = probe.to("cpu", torch.float64)
        x = x * x.square().mean(-1, keepdim=True).rsqrt()
        errors = [float((answer - x * (weight.to("cpu", torch.float64) + plus)).norm()) for plus in (0, 1)]
        tolerance = 4 * torch.finfo(weight.dtype).eps + 1e-4
        if not min(errors) <= tolerance * float(answer.norm()):
            raise self._refuse(norm, "is no RMSNorm: it does not return x / rms(x) * weight")
        self.norms.append(Norm(norm, weight, errors.index(min(errors)), readers))

    def _linear(self, linear: nn.Module, fan_in: int | None = None, fan_out: int | None = None) -> nn.Linear:
        if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
            raise self._refuse(linear, "is no plain nn.Linear; quantized or adapted layers cannot be rotated")
        self._only_weights(linear)
        shape = tuple(linear.weight.shape)
        if fan_in not in (None, shape[1]) or fan_out not in (None, shape[0]):
            raise self._refuse(linear, f"has a weight {shape}, unfit for the hidden size {self.hidden_size}")
        return linear

    def _child(self, module: nn.Module, name: str) -> nn.Module:
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            raise self._refuse(module, f"has no part named {name}")
        return child

    def _only(self, module: nn.Module, known: Collection[str], also: Collection[nn.Module] = ()) -> None:
        """Refuses parameters and parts of `module` whose place in the stream is not known."""
        for name, _ in module.named_parameters(recurse=False):
            if name not in known:
                raise self._refuse(module, f"has a parameter {name} of its own")
        for name, child in module.named_children():
            if name not in known and child not in also and not isinstance(child, _HARMLESS):
                raise self._refuse(child, "has no known role")

    def _only_weights(self, module: nn.Module) -> None:
        """Refuses parametrized weights and adapters: what is written to `weight` must be all that counts."""
        if not {"weight"} <= set(module._parameters) <= {"weight", "bias"} or len(list(module.children())):
            raise self._refuse(module, "has other parameters than weight and bias")

    def _refuse(self, module: nn.Module, why: str) -> TypeError:
        return TypeError(
            f"model: {self.name(module)} ({type(module).__name__}) {why}. Only causal language models built "
            "as Llama is can be rotated: RMSNorm before attention and before a plain MLP, and a linear head. "
            "Nothing was changed"
        )

    # -- values

    def _own_values(self) -> None:
        """Every weight holds floating-point numbers of its own; the head may share the embedding's."""
        seen: dict[int, nn.Module] = {}
        for module, weight in self._weights():
            self._check_values(module, weight)
            other = seen.setdefault(weight.data_ptr(), module)
            if other is not module and not (module is self.head and other is self.embedding):
                raise ValueError(
                    f"model: {self.name(other)} and {self.name(module)} share one weight, which cannot be "
                    "rotated for both; give each its own first. Nothing was changed"
                )

    def _weights(self) -> Iterator[tuple[nn.Module, Tensor]]:
        linears = [linear for norm in self.norms for linear in norm.readers] + self.writers
        for module in (self.embedding, *(norm.module for norm in self.norms), *linears):
            for weight in module.parameters(recurse=False):
                yield module, weight

    def _check_values(self, module: nn.Module, weight: Tensor) -> None:
        if type(weight.data) is not Tensor or weight.dtype not in _DTYPES:
            held = f"{type(weight.data).__name__} of {weight.dtype}"
            raise self._refuse(module, f"has a {held} as weight, not plain floating-point numbers")
        if weight.is_meta:
            raise ValueError(f"model: {self.name(module)} is on the meta device: load the weights first")
