"""estimate_alphas: the theorem's coefficients, found in several ways; models left as they were; files that resume."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchlin.functional import hadamard_transform
from torchlin.quant._measure import Measure, fingerprint, logits_of, next_token_loss
from torchlin.quant._replay import Replay
from torchlin.quant.alphas import Alphas, LayerAlpha, check_levels, estimate_alphas, slope
from torchlin.quant.predict import measure_deltas, plot_prediction, predicted_delta

transformers = pytest.importorskip("transformers")

VOCAB = 24


def language_model(family: str = "Llama", dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 3}
    if family == "GPT2":
        sizes = {"n_embd": 32, "n_head": 2, "n_layer": 3}
    if family != "GPT2":
        sizes["intermediate_size"] = 48
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None,
        attn_implementation="eager", initializer_range=0.15, **{**sizes, **options},
    )  # fmt: skip
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    return getattr(transformers, f"{family}{head}")(config).to(dtype).eval()


def text(windows: int, tokens: int, seed: int) -> Tensor:
    """A Markov chain with a few likely successors of each token."""
    generator = torch.Generator().manual_seed(7)
    likely = 0.02 + torch.rand(VOCAB, VOCAB, generator=generator) ** 8
    generator.manual_seed(seed)
    ids = [torch.randint(VOCAB, (windows,), generator=generator)]
    for _ in range(tokens - 1):
        ids.append(torch.multinomial(likely[ids[-1]], 1, generator=generator)[:, 0])
    return torch.stack(ids, 1)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A small Llama that has learnt the chain: its loss is near a minimum, and its predictions are right."""
    model = language_model(dtype=torch.float32).train()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 200)
        optimizer.zero_grad()
        next_token_loss(model, text(16, 20, 1000 + step)).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.double().eval()


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "numbers": fingerprint(list(model.state_dict().values())),
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "required": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()
        ],
    }


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


# ---- the coefficients


def error_shape(weight: Tensor, per_row: bool) -> Tensor:
    """The standard deviation of the error of each number of a weight (out, in) at t = 1."""
    if per_row:
        return weight.detach().norm(dim=1, keepdim=True) / math.sqrt(weight.shape[1])
    return weight.detach().norm() / math.sqrt(weight.numel())


def hutchinson(loss: Tensor, weight: Tensor, per_row: bool, probes: int) -> tuple[float, float]:
    """Half the trace of the Hessian in units of the error, from products with random signs, and its standard error."""
    generator = torch.Generator().manual_seed(3)
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    halves = []
    for _ in range(probes):
        v = torch.randint(0, 2, weight.shape, generator=generator).to(weight.dtype) * 2 - 1
        v = v * error_shape(weight, per_row)
        (product,) = torch.autograd.grad(gradient, weight, v, retain_graph=True)
        halves.append(float((v * product).sum()) / 2)
    found = torch.tensor(halves, dtype=torch.float64)
    return float(found.mean()), float(found.std()) / math.sqrt(probes)


@pytest.mark.parametrize("per_row", [True, False])
def test_noise_finds_the_trace_of_the_hessian(trained: nn.Module, per_row: bool) -> None:
    """Of the loss, on text, where the Hessian is not the Fisher information and the gradient is not zero."""
    batch = text(12, 20, seed=1)
    names = ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj", "model.layers.2.mlp.up_proj")
    found = estimate_alphas(
        trained,
        [batch],
        metric="loss",
        levels=[1e-5] * 40,
        per_row=per_row,
        filter_fn=lambda module, name: name in names,
    )
    assert sorted(found) == sorted(names)
    for name in names:
        weight = trained.get_submodule(name).weight
        expected, error = hutchinson(next_token_loss(trained, batch), weight, per_row, probes=40)
        uncertain = math.hypot(error, found.errors[name])
        assert uncertain < 0.15 * expected, "the comparison has to say something"
        assert abs(found[name] - expected) < 4 * uncertain


@pytest.mark.parametrize("per_row", [True, False])
def test_fisher_is_the_exact_trace(per_row: bool) -> None:
    """All gradients of all classes of all rows, summed with their probabilities."""
    model, x = mlp(5, 7, 6, 4), torch.randn(16, 5, dtype=torch.float64)
    found = estimate_alphas(model, [x] * 40, method="fisher", per_row=per_row, seed=1)
    for name in found:
        weight = model.get_submodule(name).weight
        trace = 0.0
        for row in x:
            log_p = model(row[None]).log_softmax(-1)[0]
            for c, p in enumerate(log_p.exp().tolist()):
                (gradient,) = torch.autograd.grad(log_p[c], weight, retain_graph=True)
                trace += p * float((gradient * error_shape(weight, per_row)).square().sum()) / len(x)
        expected = trace / 2
        assert found[name] == pytest.approx(expected, abs=4 * found.errors[name])
        assert found.errors[name] < 0.1 * expected


def test_noise_and_fisher_agree_on_a_language_model(trained: nn.Module) -> None:
    batches = text(64, 24, seed=2)
    fisher = estimate_alphas(trained, batches, method="fisher")
    noise = estimate_alphas(trained, list(batches.split(16)), metric="kl", levels=[1e-4] * 16)
    assert list(fisher) == list(noise)
    assert len(noise) == 21
    scores = [(noise[n] - fisher[n]) / math.hypot(noise.errors[n], fisher.errors[n]) for n in noise]
    assert max(map(abs, scores)) < 4.5
    assert sum(noise.values()) == pytest.approx(sum(fisher.values()), rel=0.08)


def test_errors_of_layers_add_up(trained: nn.Module) -> None:
    batches = [text(16, 20, seed=3)]
    found = estimate_alphas(trained, batches, metric="loss", levels=[1e-3] * 12, per_row=True)
    together = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        weights = {name: trained.get_submodule(name).weight.detach() for name in found}
        noise = {
            name: torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            * error_shape(weight, per_row=True)
            for name, weight in weights.items()
        }
        for sign in (1, -1):
            changed = {
                name: weight + sign * math.sqrt(1e-3) * noise[name] for name, weight in weights.items()
            }
            measured = measure_deltas(trained, changed, batches, metric="loss", alone=False)
            together.append(measured.together)
    assert measured.t2 == pytest.approx(dict.fromkeys(found, 1e-3), rel=0.2)
    assert sum(together) / len(together) == pytest.approx(predicted_delta(found, measured.t2), rel=0.15)


def test_the_shape_of_the_error_does_not_matter(trained: nn.Module) -> None:
    """Rounding of a rotated weight to a coarse uniform grid costs what Gaussian noise of the same size does."""
    batches = [text(16, 20, seed=4)]
    gaussian = estimate_alphas(trained, batches, metric="kl", levels=[2e-3] * 16, per_row=True)

    def rounded(weight: Tensor, seed: int) -> Tensor:
        signs = (
            torch.randint(0, 2, (weight.shape[1],), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        )
        z = hadamard_transform(weight, signs=signs.double())
        step = 0.16 * z.square().mean(1, keepdim=True).sqrt()
        return hadamard_transform((z / step).round() * step, signs=signs.double(), transpose=True)

    ratios: dict[str, list[float]] = {name: [] for name in gaussian}
    for seed in range(16):
        measured = measure_deltas(
            trained, lambda name, w, s=seed: rounded(w.detach(), s), batches, metric="kl"
        )
        for name, values in ratios.items():
            values.append(measured.delta[name] / measured.t2[name])
    for name, values in ratios.items():
        found = torch.tensor(values)
        error = math.hypot(float(found.std()) / math.sqrt(len(found)), gaussian.errors[name])
        assert abs(float(found.mean()) - gaussian[name]) < 4.5 * error
    assert sum(sum(v) / len(v) for v in ratios.values()) == pytest.approx(sum(gaussian.values()), rel=0.1)


def test_ppl_is_ppl_times_loss(trained: nn.Module) -> None:
    batches = [text(16, 24, seed=5)]
    by_loss = estimate_alphas(trained, batches, metric="loss", levels=[1e-4])
    by_ppl = estimate_alphas(trained, batches, metric="ppl", levels=[1e-4])
    assert by_ppl.base == pytest.approx(math.exp(by_loss.base))
    for name in by_ppl:
        assert by_ppl[name] == pytest.approx(by_ppl.base * by_loss[name], rel=1e-2, abs=1e-6)
    assert math.isnan(by_loss.errors[name])


def test_antithetic_noise_has_no_first_order_term() -> None:
    """The loss x·w, whose second derivative is 0: all that one sign alone would show is the first order."""
    model = nn.Sequential(nn.Linear(6, 1, bias=False)).double()
    batches = [torch.randn(3, 6, dtype=torch.float64)]
    options: dict[str, Any] = {"metric": "loss", "loss_fn": lambda m, x: m(x).sum(), "levels": 3}
    both = estimate_alphas(model, batches, **options)
    one = estimate_alphas(model, batches, antithetic=False, **options)
    assert abs(both["0"]) < 1e-10 < 1e-3 < abs(one["0"])


def test_slope() -> None:
    alpha, error = slope([1.0, 2.0], [3.0, 5.0])
    assert alpha == pytest.approx(13 / 5)
    assert error == pytest.approx(math.sqrt(((0.4 * 1) ** 2 + (0.2 * 2) ** 2) / 25 * 2))
    assert slope([0.5, 1.0, 2.0], [2.0, 4.0, 8.0]) == pytest.approx((4.0, 0.0))


# ---- the prefix is computed once, and nothing changes


class Sneaky(nn.Module):
    """Blocks that hand something on past their outputs."""

    def __init__(self, remember: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.remember = remember
        self.memory = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block(x)
            if self.remember:
                self.memory = self.memory * 0.5 + y.sum()
                y = y + self.memory
            x = x + y
        return x


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x += x.tanh()
        return x


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma2", "Qwen3"])
def test_replayed_results_are_the_full_ones_bit_for_bit(family: str) -> None:
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"transformers has no {family}")
    model = language_model(
        family, torch.float32, **({"head_dim": 16} if family in ("Gemma2", "Qwen3") else {})
    )
    batches = list(text(6, 20, seed=6).split(2))
    with torch.no_grad():
        replay = Replay(model, logits_of, batches)
        assert replay.blocks in ("model.layers", "transformer.h")
        chain = model.get_submodule(replay.blocks)
        calls = [0] * len(chain)
        for i, block in enumerate(chain):
            block.self_attn_calls = block.register_forward_hook(lambda *_, i=i: None)
            inner = next(m for m in block.modules() if m is not block)
            inner.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        for name, weight in model.named_parameters():
            if weight.dim() != 2:
                continue
            old = weight.clone()
            weight += 0.1 * torch.randn_like(weight)
            calls[:] = [0] * len(chain)
            quick = [replay(weight, index) for index in (1, 0, 2)]
            first = int(name.split(".")[2]) if name.startswith(replay.blocks) else 0
            assert calls == [3 * (i >= first) for i in range(len(chain))], name
            full = [logits_of(model, batches[index]) for index in (1, 0, 2)]
            assert all(torch.equal(a, b) for a, b in zip(quick, full, strict=True)), name
            assert not torch.equal(quick[1], replay.base[0]), name
            weight.copy_(old)


def test_models_whose_blocks_cannot_be_skipped_run_in_full() -> None:
    batches = [torch.randn(5, 6) for _ in range(3)]
    with torch.no_grad():
        assert Replay(Sneaky(remember=False), lambda m, x: m(x), batches).blocks == "blocks"
        assert Replay(Sneaky(remember=True), lambda m, x: m(x), batches).blocks is None
        assert Replay(nn.Linear(6, 6), lambda m, x: m(x), batches).blocks is None
        twice = Replay(Sneaky(remember=False), lambda m, x: m(m(x)), batches)
        assert twice.blocks is None
        assert torch.equal(twice(next(twice._model.parameters()), 1), twice.base[1])


def test_outputs_that_are_written_into() -> None:
    model, batches = InPlace(), [torch.randn(5, 6) for _ in range(2)]
    with torch.no_grad():
        replay = Replay(model, lambda m, x: m(x), batches)
        assert replay.blocks == "blocks"
        model.blocks[2].weight.mul_(1.5)
        for _ in range(2):
            assert torch.equal(replay(model.blocks[2].weight, 1), model(batches[1]))


def test_weights_that_others_use_too() -> None:
    model = Sneaky(remember=False)
    model.blocks[2].weight = model.blocks[1].weight
    batches = [torch.randn(5, 6) for _ in range(2)]
    with torch.no_grad():
        replay = Replay(model, lambda m, x: m(x), batches)
        model.blocks[1].weight.mul_(1.5)
        assert torch.equal(replay(model.blocks[2].weight, 0), model(batches[0]))
    assert list(estimate_alphas(model, batches, metric="kl", levels=1)) == ["blocks.0", "blocks.1"]


# ---- the model stays what it was


@pytest.mark.parametrize("method", ["noise", "fisher"])
def test_model_is_left_as_it_was(method: str) -> None:
    model = language_model(dtype=torch.bfloat16).train()
    model.model.layers[1].eval()
    model.lm_head.requires_grad_(False)
    next_token_loss(model, text(2, 8, seed=1)).backward()
    before = state(model)
    estimate_alphas(model, text(4, 8, seed=1), method=method, levels=2, metric="kl")
    after = state(model)
    for a, b in zip(before.pop("grads"), after.pop("grads"), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert after == before


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [1, 4, 9])
def test_model_is_left_as_it_was_when_something_stops_it(stop: type[BaseException], after: int) -> None:
    model = language_model(dtype=torch.float32).train()
    before = state(model)
    calls = iter(range(10**6))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if next(calls) == after:
            raise stop
        return next_token_loss(model, batch)

    with pytest.raises(stop):
        estimate_alphas(model, [text(2, 8, seed=1)], metric="loss", loss_fn=loss, levels=2)
    assert state(model) == before


# ---- files


def stop_after(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """Interrupts the measuring of the layer after so many."""
    measured: set[int] = set()
    call = Measure.__call__

    def interrupted(self: Measure, weight: Tensor, share: Any) -> float:
        measured.add(weight.data_ptr())
        if len(measured) > layers:
            raise KeyboardInterrupt
        return call(self, weight, share)

    monkeypatch.setattr(Measure, "__call__", interrupted)


def test_an_interrupted_estimate_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, path = mlp(5, 6, 6, 4), [torch.randn(9, 5).double()], tmp_path / "alphas.json"
    options: dict[str, Any] = {"metric": "kl", "levels": 3}
    whole = estimate_alphas(model, batches, **options)
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(KeyboardInterrupt):
            estimate_alphas(model, batches, path=path, **options)
    assert list(json.loads(path.read_text())["layers"]) == ["0", "2"]
    assert [file.name for file in tmp_path.iterdir()] == ["alphas.json"]
    with pytest.raises(ValueError, match="only 2 of 3 layers are finished"):
        Alphas.load(path)
    with monkeypatch.context() as patched:
        stop_after(patched, 1)  # only one is left to do
        assert estimate_alphas(model, batches, path=path, **options) == whole
    with monkeypatch.context() as patched:
        stop_after(patched, 0)
        assert estimate_alphas(model, batches, path=path, **options) == whole
    assert Alphas.load(path) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": 4}, "levels"),
        ({"metric": "loss", "loss_fn": lambda m, x: m(x).sum()}, "metric 'kl' there, 'loss' here"),
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"antithetic": True}, "antithetic False there, True here"),
        ({"per_row": True}, "per_row False there, True here"),
        ({"batches": [torch.ones(9, 5).double()]}, "batches"),
        ({"model": mlp(5, 6, 6, 4, seed=1)}, "weights"),
        ({"modules_to_not_convert": ["2"]}, r"layers \['0', '2', '4'\] there, \['0', '4'\] here"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "alphas.json"
    options: dict[str, Any] = {
        "model": mlp(5, 6, 6, 4), "batches": [torch.zeros(9, 5).double()], "metric": "kl", "levels": 3
    }  # fmt: skip
    estimate_alphas(**options, path=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        estimate_alphas(**{**options, **change}, path=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": "torchlin.alphas", "version": 99}', "\xff\xfe"]
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "alphas.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="alphas"):
        Alphas.load(path)
    with pytest.raises(ValueError, match="alphas"):
        estimate_alphas(mlp(5, 6), [torch.zeros(9, 5).double()], metric="kl", path=path)
    assert path.read_bytes() == content.encode("latin-1")


def test_damaged_layers_are_refused() -> None:
    data = Alphas({"a": LayerAlpha(1.0, 0.1, (4, 4))}, "kl", 0.0, {}).to_dict()
    del data["layers"]["a"]["alpha"]
    with pytest.raises(ValueError, match=r"damaged.*alpha"):
        Alphas.from_dict(data)


def test_save_and_load(tmp_path: Path) -> None:
    found = estimate_alphas(mlp(5, 6, 4), [torch.randn(9, 5).double()], metric="kl", levels=[0.01])
    found.save(tmp_path / "a.json")
    assert "NaN" not in (tmp_path / "a.json").read_text()
    again = Alphas.load(tmp_path / "a.json")
    assert dict(again) == dict(found)
    assert again.settings == found.settings
    assert all(math.isnan(error) for error in again.errors.values())


# ---- data, layers, arguments


def test_no_data_is_needed() -> None:
    model = language_model(dtype=torch.float32)
    first, second = (estimate_alphas(model, levels=2, seed=0) for _ in range(2))
    other = estimate_alphas(model, levels=2, seed=1)
    assert (first.metric, first.base) == ("kl", 0.0)
    assert first == second
    assert dict(first) != dict(other)
    assert all(alpha > 0 for alpha in first.values())
    assert "lm_head" not in first


def test_batches_of_every_kind_are_the_same() -> None:
    model, ids = language_model(), text(2, 12, seed=1)
    kinds = [
        [ids],
        [{"input_ids": ids}],
        [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}],
        [(ids,)],
    ]
    found = [dict(estimate_alphas(model, batches, metric="kl", levels=1)) for batches in kinds]
    assert all(one == pytest.approx(found[0]) for one in found)
    rows = estimate_alphas(model, ids, metric="loss", levels=1)  # its one level is measured on both rows
    assert dict(rows) == pytest.approx(
        dict(estimate_alphas(model, [{"input_ids": ids, "labels": ids}], metric="loss", levels=1))
    )


@pytest.mark.parametrize("metric", ["kl", "loss"])
@pytest.mark.parametrize("method", ["noise", "fisher"])
def test_padding_does_not_count(metric: str, method: str) -> None:
    if (metric, method) == ("loss", "fisher"):
        pytest.skip("fisher has no loss")
    model, ids = language_model(), text(3, 12, seed=1)
    padded = {"input_ids": F.pad(ids, (0, 5)), "attention_mask": F.pad(torch.ones_like(ids), (0, 5))}
    plain, with_padding = (
        estimate_alphas(model, [batch], metric=metric, method=method, levels=1)
        for batch in ({"input_ids": ids}, padded)
    )
    assert dict(with_padding) == pytest.approx(dict(plain), rel=1e-4, abs=1e-5)


def test_conv1d_is_a_transposed_linear() -> None:
    from transformers.pytorch_utils import Conv1D

    linear, batches = mlp(5, 7, 4), [torch.randn(9, 5).double()]
    twin = mlp(5, 7, 4)
    for i in (0, 2):
        twin[i] = Conv1D(*linear[i].weight.shape).double()
        with torch.no_grad():
            twin[i].weight.copy_(linear[i].weight.T)
            twin[i].bias.copy_(linear[i].bias)
    for per_row in (True, False):
        expected = estimate_alphas(linear, batches * 5, method="fisher", per_row=per_row)
        found = estimate_alphas(twin, batches * 5, method="fisher", per_row=per_row)
        assert dict(found) == pytest.approx(dict(expected))
        assert found.layers["0"].shape == (7, 5)
    noise = estimate_alphas(twin, batches, metric="kl", levels=[1e-4] * 40)
    assert noise["0"] == pytest.approx(estimate_alphas(linear, batches * 40, method="fisher")["0"], rel=0.3)


def test_gpt2_and_banks_of_experts() -> None:
    found = estimate_alphas(language_model("GPT2"), text(2, 8, seed=1), metric="kl", levels=1)
    assert len(found) == 12
    assert found.layers["transformer.h.0.attn.c_attn"].shape == (96, 32)
    mixture = language_model("Mixtral", torch.float32, num_local_experts=4, num_experts_per_tok=2)
    for method in ("noise", "fisher"):
        found = estimate_alphas(mixture, text(8, 16, seed=1), metric="kl", method=method, levels=4)
        banks = {name: layer.shape for name, layer in found.layers.items() if "experts" in name}
        assert banks
        assert all(shape[0] == 4 for shape in banks.values())
        assert all(found[name] > 0 for name in banks)


def test_layers_can_be_chosen() -> None:
    model, batches = mlp(5, 6, 6, 4), [torch.randn(9, 5).double()]
    assert list(estimate_alphas(model, batches, metric="kl", levels=1, modules_to_not_convert=["2"])) == [
        "0",
        "4",
    ]
    chosen = estimate_alphas(
        model, batches, metric="kl", levels=1, filter_fn=lambda m, name: m.out_features == 4
    )
    assert list(chosen) == ["4"]


def test_a_layer_of_zeros_and_one_that_is_not_used() -> None:
    model = mlp(5, 6, 4)
    model.add_module("unused", nn.Identity())
    model.unused.lost = nn.Linear(3, 3).double()
    with torch.no_grad():
        model[2].weight.zero_()
    batches = [torch.randn(9, 5).double()]
    for method in ("noise", "fisher"):
        found = estimate_alphas(model, batches, metric="kl", method=method, levels=2)
        assert (found["2"], found["unused.lost"]) == (0.0, 0.0)


def test_levels() -> None:
    assert check_levels(3) == pytest.approx((0.01, 0.02, 0.03))
    assert check_levels([0.02, 0.01]) == (0.01, 0.02)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "m"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"model": nn.Tanh()}, ValueError, "no layer to quantize"),
        ({"batches": None}, ValueError, "random tokens need a model with get_input_embeddings"),
        ({"batches": None, "metric": "ppl"}, ValueError, "needs text"),
        ({"batches": []}, ValueError, "at least one batch"),
        ({"batches": {"x": torch.ones(3)}}, TypeError, "got dict"),
        ({"batches": torch.ones(3)}, ValueError, "windows, tokens"),
        ({"levels": 0}, ValueError, "at least 1, got 0"),
        ({"levels": [0.1, -1]}, ValueError, "positive finite"),
        ({"levels": "3"}, TypeError, "levels must be"),
        ({"metric": "bits"}, ValueError, "metric must be one of"),
        ({"metric": "ppl"}, TypeError, "token ids"),
        ({"loss_fn": F.mse_loss}, ValueError, "loss_fn gives a loss"),
        (
            {"metric": "loss", "loss_fn": lambda m, x: m(x)},
            TypeError,
            "loss_fn must return a tensor of one number",
        ),
        ({"method": "magic"}, ValueError, '"noise" or "fisher"'),
        ({"method": "fisher", "metric": "ppl"}, ValueError, '"kl" only'),
        ({"method": "fisher", "path": "x"}, ValueError, "takes no path"),
        ({"batches": [torch.full((2, 5), math.nan).double()]}, ValueError, "not finite"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"model": mlp(5, 6, 4), "batches": [torch.ones(2, 5).double()], "metric": "kl", "levels": 1}
    with pytest.raises(error, match=message):
        estimate_alphas(**{**arguments, **change})


# ---- prediction and measurement


def test_predicted_and_measured() -> None:
    model, batches = mlp(5, 6, 4), [torch.randn(200, 5).double()]
    found = estimate_alphas(model, batches, metric="kl", levels=[1e-4] * 20)
    changed = {"0": model[0].weight.detach() * 1.01}
    measured = measure_deltas(model, changed, batches, metric="kl")
    assert measured.t2 == pytest.approx({"0": 1e-4})
    with torch.no_grad():
        original = model(batches[0]).log_softmax(-1)
        model[0].weight.mul_(1.01)
        expected = F.kl_div(
            model(batches[0]).log_softmax(-1), original, reduction="batchmean", log_target=True
        )
        model[0].weight.copy_(changed["0"] / 1.01)
    assert measured.delta["0"] == measured.together == pytest.approx(float(expected), rel=1e-9)
    assert predicted_delta(found, measured.t2) == found["0"] * measured.t2["0"]
    with pytest.raises(ValueError, match="no α for 'x'"):
        predicted_delta(found, {"x": 1.0})
    with pytest.raises(ValueError, match="'x' is no linear layer"):
        measure_deltas(model, {"x": torch.ones(1)}, batches, metric="kl")
    with pytest.raises(ValueError, match="must have shape"):
        measure_deltas(model, {"0": torch.ones(1)}, batches, metric="kl")


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, batches = mlp(5, 6, 4), [torch.randn(20, 5).double()]
    found = estimate_alphas(model, batches, metric="kl", levels=2)
    measured = measure_deltas(model, lambda name, w: w * 1.1, batches, metric="kl")
    plot_prediction(found, measured, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="'kl', but 'loss' was measured"):
        plot_prediction(
            found, measure_deltas(model, {}, batches, metric="loss", loss_fn=lambda m, x: m(x).sum()), "x"
        )
