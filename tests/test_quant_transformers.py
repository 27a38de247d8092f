"""Quantized models of transformers: every architecture's logits, from_pretrained, save_pretrained, and LoRA by peft on top."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchlin.nn import GridBank, GridEmbedding, GridLinear
from torchlin.quant import HiggsConfig, StorageError, dequantize_, load, quantize_, save

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "GPT2": {"vocab_size": 61, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
CONFIG = HiggsConfig(n=16, p=1)
IDS = torch.arange(18).view(2, 9)


def make(family: str = "Llama", dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    name = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    fields = FAMILIES[family] if family == "GPT2" else SMALL | FAMILIES[family]
    torch.manual_seed(0)
    return (
        getattr(transformers, name)(getattr(transformers, f"{family}Config")(**fields | options))
        .to(dtype)
        .eval()
    )


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_quantize_save_load_and_back(family: str, tmp_path: Path) -> None:
    model, old = make(family), make(family)
    report = quantize_(model, CONFIG)
    kinds = {layer.kind for layer in report.layers}
    wanted = {"Llama": {"Linear"}, "GPT2": {"Conv1D"}}.get(family, {"Linear", "experts"})
    assert kinds == wanted
    assert "lm_head" in report.skipped
    expected = logits(model)
    assert 0.01 < relative(expected, logits(old)) < 0.3
    saved = {
        "save": save(model, tmp_path / "a"),
        "save_pretrained": (model.save_pretrained(tmp_path / "b"), tmp_path / "b")[1],
    }
    for path in saved.values():
        again = type(model).from_pretrained(path)
        assert torch.equal(logits(again), expected)
        assert sorted(repr(again).splitlines()) == sorted(repr(model).splitlines())
        again.save_pretrained(tmp_path / "c")
        third = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c")
        assert torch.equal(logits(third), expected)
    assert torch.equal(logits(load(saved["save"])), expected)
    dequantize_(model)
    assert relative(logits(model), expected) < 1e-5
    assert not any(type(m) in (GridLinear, GridBank) for m in model.modules())
    model.save_pretrained(tmp_path / "d")  # an ordinary model again, also for transformers
    assert "quantization_config" not in json.loads((tmp_path / "d" / "config.json").read_text())
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "d")), logits(model))


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_quantized_while_it_is_loaded(family: str, tmp_path: Path) -> None:
    from torchlin.quant.transformers import HiggsQuantConfig

    old = make(family)
    old.save_pretrained(tmp_path / "old")
    quantize_(old, CONFIG)
    model = type(old).from_pretrained(tmp_path / "old", quantization_config=HiggsQuantConfig(n=16, p=1))
    assert torch.equal(logits(model), logits(old))
    model.save_pretrained(tmp_path / "new")
    assert torch.equal(logits(type(old).from_pretrained(tmp_path / "new")), logits(old))
    plain = model.dequantize()
    assert relative(logits(plain), logits(old)) < 1e-5


def test_16_bit_models_keep_float16_scales(tmp_path: Path) -> None:
    model = make(dtype=torch.bfloat16)
    quantize_(model, CONFIG)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for name, layer in again.named_modules():
        if isinstance(layer, GridLinear):
            assert layer.scales.dtype is torch.float16
            assert layer.weight.dtype is torch.bfloat16
            assert torch.equal(layer.weight, model.get_submodule(name).weight)
    assert (
        relative(logits(again), logits(model)) < 0.02
    )  # transformers keeps its rotary table in float32 this way


def test_a_fresh_process_needs_import_torchlin_alone(tmp_path: Path) -> None:
    model = make()
    quantize_(model, CONFIG)
    save(model, tmp_path / "m")
    torch.save(logits(model), tmp_path / "expected.pt")
    code = f"""
import sys, torch, torchlin
assert "transformers" not in sys.modules
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "m")!r})
with torch.no_grad():
    got = model(input_ids=torch.arange(18).view(2, 9), use_cache=False).logits
assert torch.equal(got, torch.load({str(tmp_path / "expected.pt")!r}))
assert not model.is_quantized or model.hf_quantizer.is_trainable
print("the same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "the same\n", done.stderr


@pytest.mark.parametrize("first", ["torchlin.quant.transformers", "transformers.quantizers.auto"])
def test_registered_whatever_is_imported_first(first: str) -> None:
    code = f"""
import {first}, torchlin
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from torchlin.quant.transformers import HiggsQuantConfig, HiggsQuantizer
assert AUTO_QUANTIZER_MAPPING["torchlin_higgs"] is HiggsQuantizer
assert AUTO_QUANTIZATION_CONFIG_MAPPING["torchlin_higgs"] is HiggsQuantConfig
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" not in done.stderr


def test_tied_head_and_embedding(tmp_path: Path) -> None:
    model = make(tie_word_embeddings=True)
    quantize_(model, HiggsConfig(n=16, p=1, embeddings=True, modules_to_not_convert=()))
    assert type(model.model.embed_tokens) is GridEmbedding
    assert model.lm_head.codes is model.model.embed_tokens.codes
    expected = logits(model)
    again = load(save(model, tmp_path / "m"))
    assert torch.equal(logits(again), expected)
    head = make(tie_word_embeddings=True)
    quantize_(head, HiggsConfig(n=16, p=1, modules_to_not_convert=()))
    assert not head.config.tie_word_embeddings
    head.tie_weights()
    assert type(head.lm_head) is GridLinear
    assert torch.equal(logits(load(save(head, tmp_path / "h"))), logits(head))


def test_damage_is_refused_by_from_pretrained_too(tmp_path: Path) -> None:
    model = make()
    quantize_(model, CONFIG)
    path = save(model, tmp_path / "m")
    config = json.loads((path / "config.json").read_text())

    def refused(message: str) -> None:
        with pytest.raises(StorageError, match=message):
            type(model).from_pretrained(path)

    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("was changed or is damaged")
    weights.write_bytes(whole)
    changed = copy.deepcopy(config)
    changed["quantization_config"]["version"] = 99
    (path / "config.json").write_text(json.dumps(changed))
    refused("of version 99; this torchlin reads version 1")
    (path / "torchlin.json").unlink()
    changed = copy.deepcopy(config)
    layers = changed["quantization_config"]["layers"]
    layers["lm_head"] = layers["model.layers.0.self_attn.q_proj"] | {"shape": [61, 64]}
    (path / "config.json").write_text(json.dumps(changed))
    refused(r"the checkpoint has no lm_head\.codes")


def test_generate_and_a_training_step() -> None:
    model = make()
    quantize_(model, CONFIG)
    out = model.generate(IDS[:1, :4], min_new_tokens=4, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 8)
    for layer in model.modules():
        if isinstance(layer, GridLinear):
            layer.unfreeze_(signs=True)
    model.train()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert {"scales", "signs", "weight"} <= trained  # norms and embeddings are the weights
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from torchlin.quant.peft import lora_config

    model = make()
    quantize_(model, CONFIG)
    base = logits(model)
    adapted = peft.get_peft_model(model, lora_config(r=4, target_modules=["q_proj", "down_proj"]))
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * 2
    assert all("lora_" in name for name in trainable)
    assert torch.allclose(logits(adapted), base, atol=1e-6)  # B is zero
    optimizer = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=3e-2)
    losses = []
    for _ in range(12):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = logits(adapted)
    adapted.save_pretrained(tmp_path)
    fresh = make()
    quantize_(fresh, CONFIG)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path, config=lora_config(tmp_path))
    assert torch.allclose(logits(again), after, atol=1e-6)
    with pytest.raises(ValueError, match="dequantize_"):
        adapted.merge_and_unload()
    dequantize_(adapted)
    assert relative(logits(adapted), after) < 1e-5
