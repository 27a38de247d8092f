"""quant.rotate_: the rotated model is the same function; one that cannot be rotated stays as it was."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torchlin.functional import hadamard_transform
from torchlin.nn import HadamardTransform
from torchlin.ops.hadamard_matrix import core_matrix
from torchlin.quant import rotate, rotate_

transformers = pytest.importorskip("transformers")

VOCAB = 61
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "attn_implementation": "sdpa",  # the eager softmax is float32 even in a float64 model
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def make(family: str, dtype: torch.dtype = torch.float64, head: str = "ForCausalLM", **options) -> nn.Module:
    """A small model of a transformers family whose every weight is random, the gains of its norms too."""
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **options})
    torch.manual_seed(5)
    model = getattr(transformers, f"{family}{head}")(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape) + ("norm" in name))
    return model


def all_float64(model: nn.Module) -> nn.Module:
    """Makes the RMSNorms compute in the model's float64, where transformers' go through float32."""
    for norm in model.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            plus = 1 if type(norm).__name__.startswith("Gemma") else 0
            eps = getattr(norm, "variance_epsilon", None) or norm.eps

            def forward(self: nn.Module, x: Tensor, plus: int = plus, eps: float = eps) -> Tensor:
                return nn.functional.rms_norm(x, x.shape[-1:], self.weight + plus, eps)

            norm.forward = types.MethodType(forward, norm)
    return model


def ids() -> Tensor:
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: nn.Module, device: str = "cpu") -> Tensor:
    return model(input_ids=ids().to(device), use_cache=False).logits


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# ---- the same function

MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama with all biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 96 = 12 * 8": ("Llama", {"hidden_size": 96, "tie_word_embeddings": True}),
    "llama 88 = 44 * 2, asymmetric": ("Llama", {"hidden_size": 88, "mlp_bias": True, "attention_bias": True}),
    "llama 576 = 36 * 16": ("Llama", {"hidden_size": 576, "num_hidden_layers": 2}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2, biases of q, k, v": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3, norms of the heads": ("Qwen3", {"tie_word_embeddings": True}),
    "gemma, gain 1 + weight": ("Gemma", {"tie_word_embeddings": True}),
    "phi3, fused projections": ("Phi3", {}),
    "granite, multipliers": ("Granite", {"residual_multiplier": 0.3, "embedding_multiplier": 7.0}),
    "hunyuan, norms of the heads by other names": ("HunYuanDenseV1", {"tie_word_embeddings": True}),
    "bitnet, norms inside the blocks": ("BitNet", {"tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", MODELS)
def test_float64_logits_do_not_change(name: str) -> None:
    family, options = MODELS[name]
    model = all_float64(make(family, **options))
    before = logits(model)
    report = rotate_(model, seed=2)
    assert relative(logits(model), before) <= 1e-12
    assert report.order == model.config.hidden_size
    assert report.untied == options.get("tie_word_embeddings", False)
    assert report.folded == (
        *(f"model.layers.{i}.{norm}" for i in range(len(model.model.layers)) for norm in NORMS),
        "model.norm",
    )
    gains = 0 if family == "Gemma" else 1
    assert all((model.get_submodule(norm).weight == gains).all() for norm in report.folded)


NORMS = ("input_layernorm", "post_attention_layernorm")


def test_the_asymmetric_case_is_asymmetric() -> None:
    h = core_matrix(44)
    assert not torch.equal(h, h.mT)


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_stay_as_near_to_float64_as_they_were(dtype: torch.dtype, device: str) -> None:
    exact = make("Qwen2", hidden_size=96, tie_word_embeddings=True).to(device)
    model = make("Qwen2", dtype, hidden_size=96, tie_word_embeddings=True).to(device)
    wanted = logits(exact, device)
    before = relative(logits(model, device), wanted)
    rotate_(model)
    after = logits(model, device)
    assert after.dtype == dtype
    assert after.isfinite().all()
    assert relative(after, wanted) <= 3 * before  # rounded weights are rounded once more


def test_weights_are_rotated_in_float64_and_rounded_once() -> None:
    model = make("Llama", torch.bfloat16, hidden_size=88, mlp_bias=True, tie_word_embeddings=False)
    old = snapshot(model)
    rotate_(model, seed=7)
    signs = HadamardTransform(88, randomized=True, seed=7).signs.double()

    def expected(weight: Tensor, gain: Tensor | None = None, dim: int = -1) -> Tensor:
        wide = weight.double() if gain is None else weight.double() * gain.double()
        return hadamard_transform(wide, dim=dim, signs=signs).bfloat16()

    new, layer = model.state_dict(), "model.layers.1."
    for name, gain, dim in [
        ("model.embed_tokens.weight", None, -1),
        (layer + "self_attn.v_proj.weight", layer + "input_layernorm.weight", -1),
        (layer + "mlp.gate_proj.weight", layer + "post_attention_layernorm.weight", -1),
        ("lm_head.weight", "model.norm.weight", -1),
        (layer + "self_attn.o_proj.weight", None, 0),
        (layer + "mlp.down_proj.weight", None, 0),
        (layer + "mlp.down_proj.bias", None, 0),
    ]:
        assert torch.equal(new[name], expected(old[name], gain and old[gain], dim)), name
    for name in ("mlp.up_proj.bias", "mlp.gate_proj.bias"):
        assert torch.equal(new[layer + name], old[layer + name]), name


def test_the_stream_is_the_transform_of_what_it_was() -> None:
    model = all_float64(make("Llama", hidden_size=88, mlp_bias=True))
    transform = HadamardTransform(88, randomized=True, seed=4).double()

    def streams() -> tuple[Tensor, ...]:  # the last one is behind the norm, whose gain is folded
        return model(input_ids=ids(), output_hidden_states=True).hidden_states[:-1]

    with torch.no_grad():
        before = streams()
        rotate_(model, seed=4)
        assert len(before) == 3
        for old, new in zip(before, streams(), strict=True):
            assert relative(new, transform(old)) <= 1e-13


def test_a_rotated_model_can_be_rotated_again() -> None:
    model = all_float64(make("Gemma", tie_word_embeddings=True))
    before = logits(model)
    assert rotate_(model, seed=0).untied
    assert not rotate_(model, seed=1).untied
    assert relative(logits(model), before) <= 1e-12


def test_seeds() -> None:
    first, same, other = (make("Llama") for _ in range(3))
    state = torch.get_rng_state()
    rotate_(first, seed=11)
    rotate_(same, seed=11)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers move
    rotate_(other, seed=12)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
    head = first.lm_head.weight.detach()
    assert relative(other.lm_head.weight.detach(), head) > 0.5


def test_large_weights_go_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = make("Llama", torch.float32), make("Llama", torch.float32)
    rotate_(whole)
    monkeypatch.setattr(rotate, "_PIECE", 192)  # three rows or columns at a time, and a rest
    rotate_(pieces)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, pieces.state_dict()[name]), name


def test_parameters_stay_the_objects_they_were() -> None:
    model = make("Llama", torch.float32, tie_word_embeddings=False).train()
    model.lm_head.weight.requires_grad_(False)
    before = dict(model.named_parameters())
    rotate_(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert not after["lm_head.weight"].requires_grad
    assert after["model.embed_tokens.weight"].requires_grad
    assert model.training


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_it_is_the_same_model(tied: bool, tmp_path) -> None:
    model = make("Llama", torch.float32, hidden_size=96, tie_word_embeddings=tied)
    before = logits(model)
    assert rotate_(model).untied == tied
    assert not model.config.tie_word_embeddings
    model.tie_weights()  # what from_pretrained and a resize call
    rotated = logits(model)
    assert relative(rotated, before) <= 1e-5
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.lm_head.weight.data_ptr() != loaded.model.embed_tokens.weight.data_ptr()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    assert torch.equal(logits(loaded), rotated)


def test_outliers_collapse() -> None:
    model = make("Llama", torch.float32, hidden_size=576, num_hidden_layers=2)
    with torch.no_grad():  # heavy tails: a few channels of the stream a hundred times as large as the rest
        model.model.embed_tokens.weight[:, [3, 200, 411]] *= 100
        model.model.layers[0].mlp.down_proj.weight[77] *= 100

    def peak_and_kurtosis() -> tuple[float, float]:
        with torch.no_grad():
            x = model(input_ids=ids(), output_hidden_states=True).hidden_states[1].double()
        rms = x.square().mean(-1).sqrt()
        return float((x.abs().amax(-1) / rms).mean()), float((x.pow(4).mean(-1) / rms**4).mean())

    peak, kurtosis = peak_and_kurtosis()
    assert peak > 12
    assert kurtosis > 100
    rotate_(model)
    peak, kurtosis = peak_and_kurtosis()
    assert peak < 5
    assert kurtosis < 4


@pytest.mark.parametrize("plus", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gains_are_told_from_gains_less_one(plus: int, dtype: torch.dtype) -> None:
    family = "Gemma" if plus else "Llama"
    model = make(family, dtype)
    with torch.no_grad():
        model.model.norm.weight.add_(20)  # where 1 is little against the rounding of a 16-bit weight
        model.model.layers[0].input_layernorm.weight.fill_(1 - plus)  # a gain of 1
    rotate_(model)
    assert (model.model.norm.weight == 1 - plus).all()
    assert (model.model.layers[0].input_layernorm.weight == 1 - plus).all()


def test_report_in_words() -> None:
    report = rotate_(make("Llama", torch.float32, hidden_size=576, tie_word_embeddings=True), seed=3)
    assert len(report.rotated) == 2 + 3 * 7
    assert str(report) == (
        "residual stream rotated by a randomized Hadamard matrix of order 576 (Paley II, q=17), seed 3: "
        "7 norms folded, 23 modules rotated, head untied from the embedding"
    )


# ---- what cannot be rotated


def with_(change: Callable[[nn.Module], object], family: str = "Llama", **options) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = make(family, torch.float32, **options)
        change(model)
        return model

    return build


def last(model: nn.Module) -> nn.Module:
    """Everything before the last layer is in order: a rotation that began would show."""
    return model.model.layers[-1]


class Adapter(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def gpt2() -> nn.Module:
    options = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**options))


def replace_norm(model: nn.Module, norm: nn.Module) -> None:
    last(model).post_attention_layernorm = norm


def share(model: nn.Module) -> None:
    last(model).mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def adapt(model: nn.Module) -> None:
    last(model).self_attn.k_proj = Adapter(64, 32, bias=False)


def integers(model: nn.Module) -> None:
    weight = torch.zeros(64, 64, dtype=torch.int8)
    last(model).self_attn.o_proj.weight = nn.Parameter(weight, requires_grad=False)


def parametrize(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(last(model).mlp.down_proj)


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "GPT-2": (gpt2, TypeError, "ModuleList named layers"),
    "LayerNorm": (lambda: make("StableLm", torch.float32), TypeError, r"layernorm \(LayerNorm\)"),
    "norms after blocks": (
        lambda: make("Gemma2", attn_implementation="eager"),
        TypeError,
        "does not commute",
    ),
    "norms after blocks only": (lambda: make("Olmo2"), TypeError, "no part named input_layernorm"),
    "experts": (lambda: make("Mixtral", torch.float32, **EXPERTS), TypeError, "mixture of experts"),
    "no head": (lambda: make("Llama", head="Model"), TypeError, "no language-model head"),
    "a classifier": (lambda: make("Llama", head="ForSequenceClassification"), TypeError, "head"),
    "no language model": (lambda: nn.Sequential(nn.Linear(64, 64)), TypeError, "nn.Embedding"),
    "no order": (
        lambda: make("Llama", hidden_size=90, num_attention_heads=2),
        ValueError,
        "hidden size 90.*block_size.*88 and 92",
    ),
    "a LayerNorm without bias": (
        with_(lambda m: replace_norm(m, nn.LayerNorm(64, bias=False)), tie_word_embeddings=True),
        TypeError,
        "does not return x / rms",
    ),
    "a norm with a bias": (with_(lambda m: replace_norm(m, nn.LayerNorm(64))), TypeError, "one weight"),
    "a norm without gain": (
        with_(lambda m: replace_norm(m, nn.RMSNorm(64, elementwise_affine=False))),
        TypeError,
        "one weight",
    ),
    "NaN in a norm": (
        with_(lambda m: last(m).input_layernorm.weight.data.fill_(float("nan"))),
        TypeError,
        "does not return x / rms",
    ),
    "an unknown part": (
        with_(lambda m: last(m).add_module("side", nn.Linear(64, 64))),
        TypeError,
        r"layers\.2\.side \(Linear\) has no known role",
    ),
    "an unknown part of a block": (
        with_(lambda m: last(m).self_attn.add_module("g_proj", nn.Linear(64, 64))),
        TypeError,
        "g_proj",
    ),
    "an unknown parameter": (
        with_(lambda m: last(m).register_parameter("layer_scale", nn.Parameter(torch.ones(64)))),
        TypeError,
        "parameter layer_scale",
    ),
    "positions that are learnt": (
        with_(lambda m: m.model.add_module("wpe", nn.Embedding(64, 64))),
        TypeError,
        r"model\.wpe",
    ),
    "a second head": (with_(lambda m: m.add_module("value", nn.Linear(64, 1))), TypeError, "value"),
    "an adapter": (with_(adapt), TypeError, "no plain nn.Linear"),
    "a parametrized weight": (with_(parametrize), TypeError, "other parameters than weight"),
    "quantized weights": (with_(integers), TypeError, "int8"),
    "the meta device": (with_(lambda m: last(m).mlp.to("meta")), ValueError, "meta device"),
    "one weight in two layers": (with_(share, tie_word_embeddings=True), ValueError, "share one weight"),
    "max_norm": (with_(lambda m: setattr(m.model.embed_tokens, "max_norm", 1.0)), TypeError, "max_norm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rotated_is_refused_and_untouched(name: str) -> None:
    build, error, message = REFUSED[name]
    model = build()
    before, parameters = snapshot(model), dict(model.named_parameters(remove_duplicate=False))
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
    with pytest.raises(error, match=message) as caught:
        rotate_(model)
    assert str(caught.value).startswith("model: ")
    after = model.state_dict()
    assert list(after) == list(before)
    for key, weight in before.items():
        if not weight.is_meta:
            assert torch.equal(weight.view(torch.uint8), after[key].view(torch.uint8)), key
    assert all(new is parameters[key] for key, new in model.named_parameters(remove_duplicate=False))
    assert getattr(getattr(model, "config", None), "tie_word_embeddings", None) == tied


@pytest.mark.parametrize(
    ("model", "seed", "message"),
    [
        ("gpt2", 0, "model must be a torch.nn.Module, got str"),
        (nn.Linear(2, 2), True, "seed must be an int, got bool"),
        (nn.Linear(2, 2), 1.0, "seed must be an int, got float"),
    ],
)
def test_wrong_arguments(model, seed, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        rotate_(model, seed)
