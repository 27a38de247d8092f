"""quantize_, dequantize_ and HiggsConfig: which layers, how, and a model that is as it was when anything fails."""

from __future__ import annotations

import copy
import doctest
import importlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchlin
from torchlin.nn import GridBank, GridEmbedding, GridLinear
from torchlin.quant import HiggsConfig, dequantize_, grid, grid_from_points, quantize_
from torchlin.quant.config import points_within
from torchlin.quant.quantize import model_bytes

FAST = HiggsConfig(n=16, p=1)  # a grid that is exact and takes no time to make


class Block(nn.Module):
    def __init__(self, size: int = 96) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(size, size), nn.Linear(size, size // 2, bias=False)
        self.norm = nn.LayerNorm(size)
        self.down = nn.Linear(size // 2, size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.q(y)[..., : y.shape[-1] // 2]) * self.k(y))


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 96)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(96, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def make(tied: bool = False, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model(tied).to(dtype).eval()


def ids() -> Tensor:
    return torch.arange(14).view(2, 7)


@torch.no_grad()
def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())


def same(model: nn.Module, before: dict[str, Tensor], kinds: list[str]) -> bool:
    state = model.state_dict()
    return kinds == [type(m).__name__ for m in model.modules()] and all(
        torch.equal(state[name], tensor) for name, tensor in before.items()
    )


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    state = {name: t.clone() for name, t in model.state_dict().items() if not t.is_meta}
    return state, [type(m).__name__ for m in model.modules()]


LINEARS = [f"layers.{i}.{name}" for i in (0, 1) for name in ("q", "k", "down")]


# ---- a model


def test_model_report_and_back() -> None:
    model, old = make(), make()
    handles = [model.layers[0].q.register_forward_hook(lambda *a: calls.append(1))]
    calls: list[int] = []
    bias = model.layers[0].q.bias
    report = quantize_(model, HiggsConfig(bits=4, p=1))
    assert [layer.name for layer in report.layers] == LINEARS
    assert report.skipped == {"embed": "embeddings=False", "lm_head": "the config leaves it"}
    assert all(type(model.get_submodule(name)) is GridLinear for name in LINEARS)
    assert model.layers[0].q.bias is bias
    for layer in report.layers:
        new, was = model.get_submodule(layer.name), old.get_submodule(layer.name)
        assert layer.t2 == pytest.approx(relative(new.weight, was.weight) ** 2, rel=1e-3)
        assert layer.expected == pytest.approx(0.009501008, rel=1e-6)
        assert not layer.flagged
        assert layer.bits == pytest.approx(4 + 16 / new.in_features + 8 / new.out_features)
        assert layer.shape == tuple(was.weight.shape)
        assert not new.training
    assert report.bytes_before == model_bytes(old)
    assert report.bytes_after == model_bytes(model) < 0.5 * report.bytes_before
    with torch.no_grad():
        got, want = model(ids()), old(ids())
        assert calls == [1]
        assert 0.001 < relative(got, want) < 0.1
        assert dequantize_(model) == tuple(LINEARS)
        assert relative(model(ids()), got) < 1e-6
        assert calls == [1, 1]
    handles[0].remove()
    assert type(model.layers[0].q) is nn.Linear
    assert model.layers[0].q.bias is bias
    model(ids())
    assert calls == [1, 1]


def test_report_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    with torch.no_grad():
        model.layers[1].down.weight[:] = 0
        model.layers[0].k.weight[:, 1:] = 0  # one column, which signs can not spread over grid points evenly
    report = quantize_(model, FAST)
    assert report.layers[-1].t2 == 0
    text = str(report)
    assert text.startswith("6 layers quantized to 4.")
    assert "2 left as they are; 1 flagged" in text
    assert [layer.name for layer in report.flagged] == ["layers.0.k"]
    report.table()
    printed = capsys.readouterr().out
    assert "layers.0.k" in printed
    assert " !" in printed
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["name"] == "layers.0.q"


def test_seeds_and_determinism() -> None:
    state = torch.get_rng_state()
    first, again, other = make(), make(), make()
    state = torch.get_rng_state()
    quantize_(first, FAST)
    quantize_(again, FAST)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers move
    quantize_(other, HiggsConfig(n=16, p=1, seed=1))
    a, b, c = (m.layers[0].q for m in (first, again, other))
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scales, b.scales)
    assert not torch.equal(a.signs, c.signs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_come_back(dtype: torch.dtype) -> None:
    model, old = make(dtype=dtype), make(dtype=dtype)
    quantize_(model, FAST)
    got = model(ids())
    assert got.dtype is dtype
    assert relative(got, old(ids())) < 0.1
    dequantize_(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert relative(model(ids()), got) < (1e-6 if dtype is torch.float64 else 0.02)


def test_a_quantized_model_is_left_alone_the_second_time() -> None:
    model = make()
    quantize_(model, FAST)
    codes = model.layers[0].q.codes
    assert str(quantize_(model, FAST)) == "nothing quantized, 2 layers left as they are"
    assert model.layers[0].q.codes is codes


def test_hooks_of_accelerate_stay() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, old = make(), make()
    hooks.add_hook_to_module(
        model.layers[0].q, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    )
    quantize_(model, FAST)
    assert model.layers[0].q._hf_hook.execution_device == "cpu"
    assert relative(model(ids()), old(ids())) < 0.1


# ---- which layers, and how


def test_filters_names_and_patterns() -> None:
    model = make()
    report = quantize_(
        model,
        HiggsConfig(
            bits=4,
            p=1,
            modules_to_not_convert=("layers.0",),
            overrides={
                "layers.0.q": {"bits": 2},  # a full name goes before modules_to_not_convert
                "*.down": {"n": 8, "block_size": 24},
                "re:layers\\.[01]\\.k": None,
                "*": {"signs": False},
            },
        ),
        filter_fn=lambda module, name: module.out_features != 50,
    )
    found = {layer.name: (layer.grid, layer.block_size) for layer in report.layers}
    assert found == {
        "layers.0.q": (grid(4, 1).id, 96),
        "layers.1.q": (grid(16, 1).id, 96),
        "layers.1.down": (grid(8, 1).id, 24),
    }
    assert model.layers[0].q.signs is not None
    assert model.layers[1].q.signs is None
    assert report.skipped["lm_head"] == "filter_fn leaves it"
    assert report.skipped["layers.1.k"] == "the config leaves it"


def test_a_plan() -> None:
    model = make()
    plan = {"layers.0.q": {"n": 4, "p": 1}, "layers.1.down": {"n": 256, "p": 1}}
    report = quantize_(model, plan)
    assert [(layer.name, layer.grid) for layer in report.layers] == [
        ("layers.0.q", grid(4, 1).id),
        ("layers.1.down", grid(256, 1).id),
    ]


def test_grids_of_your_own() -> None:
    own = grid_from_points(torch.linspace(-2.5, 2.5, 16).unsqueeze(1))
    config = HiggsConfig(n=16, p=1, grids=(own,))
    model = make()
    report = quantize_(model, config)
    assert {layer.grid for layer in report.layers} == {own.id}
    again = HiggsConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert torch.equal(again.grids[0].points, own.points)


def test_embeddings_alone() -> None:
    model, old = make(), make()
    report = quantize_(model, HiggsConfig(n=16, p=1, embeddings=True))
    assert report.layers[0].kind == "Embedding"
    assert type(model.embed) is GridEmbedding
    assert 0 < relative(model.embed(ids()), old.embed(ids())) < 0.11
    dequantize_(model)
    assert type(model.embed) is nn.Embedding
    assert (model.embed.num_embeddings, model.embed.embedding_dim) == (50, 96)


def test_tied_weights() -> None:
    model = make(tied=True)
    quantize_(model, FAST)
    assert model.lm_head.weight is model.embed.weight  # by default both stay
    both = make(tied=True)
    quantize_(both, HiggsConfig(n=16, p=1, embeddings=True, modules_to_not_convert=()))
    assert both.lm_head.codes is both.embed.codes
    assert both.lm_head.scales is both.embed.scales
    assert torch.equal(both.lm_head.weight, both.embed.weight)
    got = both(ids())
    dequantize_(both)
    assert both.lm_head.weight is both.embed.weight
    assert relative(both(ids()), got) < 1e-6
    head = make(tied=True)
    quantize_(head, HiggsConfig(n=16, p=1, modules_to_not_convert=()))
    assert type(head.lm_head) is GridLinear
    assert type(head.embed) is nn.Embedding


def test_a_module_in_two_places_stays_one() -> None:
    model = make()
    model.layers[1].q = model.layers[0].q
    report = quantize_(model, FAST)
    assert model.layers[1].q is model.layers[0].q
    assert len(report.layers) == 5
    dequantize_(model)
    assert model.layers[1].q is model.layers[0].q


class Experts(nn.Module):
    """As transformers' mixtures hold and call them."""

    def __init__(self, transposed: bool | None) -> None:
        super().__init__()
        if transposed is not None:
            self.is_transposed = transposed
        shapes = ((4, 64, 96), (4, 96, 32))
        self.up, self.down = (
            nn.Parameter(0.1 * torch.randn(s if not transposed else (s[0], s[2], s[1]))) for s in shapes
        )

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in expert.unique():
            rows = expert == e
            if getattr(self, "is_transposed", False):
                gate, up = (x[rows] @ self.up[e]).chunk(2, -1)
                out[rows] = (F.silu(gate) * up) @ self.down[e]
            else:
                gate, up = F.linear(x[rows], self.up[e]).chunk(2, -1)
                out[rows] = F.linear(F.silu(gate) * up, self.down[e])
        return out


@pytest.mark.parametrize("transposed", [False, True])
def test_experts(transposed: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Experts(transposed))
    old = copy.deepcopy(model)
    x, expert = torch.randn(9, 96), torch.arange(9) % 4
    report = quantize_(model, FAST)
    assert [(layer.name, layer.kind, layer.shape) for layer in report.layers] == [
        ("0.up", "experts", (4, 64, 96)),
        ("0.down", "experts", (4, 96, 32)),
    ]
    assert type(model[0].up) is GridBank
    got = model[0](x, expert)
    assert 0.01 < relative(got, old[0](x, expert)) < 0.25
    assert dequantize_(model) == ("0.up", "0.down")
    assert isinstance(model[0].up, nn.Parameter)
    assert model[0].up.shape == old[0].up.shape
    assert relative(model[0](x, expert), got) < 1e-5


def test_experts_of_unknown_layout_are_left() -> None:
    report = quantize_(nn.Sequential(Experts(None)), FAST)
    assert not report.layers
    assert "does not say by is_transposed" in report.skipped["0.up"]
    assert quantize_(nn.Sequential(Experts(False)), HiggsConfig(n=16, p=1, experts=False)).skipped == {
        "0.up": "experts=False",
        "0.down": "experts=False",
    }


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_what_would_break_is_left_with_a_reason() -> None:
    model = nn.ModuleDict(
        {
            "own": Own(8, 8),
            "attention": nn.MultiheadAttention(16, 2),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "empty": nn.Linear(0, 8),
            "clipped": nn.Embedding(4, 8, max_norm=1.0),
            "fine": nn.Linear(8, 8),
        }
    )
    report = quantize_(model, HiggsConfig(n=16, p=1, embeddings=True))
    assert [layer.name for layer in report.layers] == ["fine"]
    assert report.skipped == {
        "own": "Own has a forward of its own",
        "attention.out_proj": "nn.MultiheadAttention reads its weight directly",
        "normed": "its weight is computed by a parametrization",
        "empty": "it has no weights",
        "clipped": "its max_norm changes the weight in every forward",
    }


# ---- nothing changes when something is wrong


def last(change: Callable[[nn.Linear], object]) -> Callable[[], Model]:
    def build() -> Model:
        model = make()
        with torch.no_grad():
            change(model.layers[1].down)
        return model

    return build


def nan(linear: nn.Linear) -> None:
    linear.weight[0, 3] = torch.nan


def inf(linear: nn.Linear) -> None:
    linear.weight[0, 3:5] = torch.inf


def meta(linear: nn.Linear) -> None:
    linear.to("meta")


REFUSED: dict[str, tuple[Callable[[], Model], HiggsConfig, str]] = {
    "NaN": (last(nan), FAST, r"layers\.1\.down: the weight has 1 NaN"),
    "infinite": (last(inf), FAST, r"layers\.1\.down: the weight has 2 NaN or infinite"),
    "meta": (last(meta), FAST, r"layers\.1\.down: the weight is not there yet"),
    "block": (
        make,
        HiggsConfig(n=16, p=1, overrides={"layers.1.down": {"block_size": 20}}),
        r"layers\.1\.down \(96 x 48\): block_size must divide in_features = 48, got 20; what fits: 12, 16, 24, 48",
    ),
    "name": (
        make,
        HiggsConfig(overrides={"layers.7.down": {"bits": 3}}),
        r"overrides: 'layers\.7\.down' names nothing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_unchanged(name: str) -> None:
    build, config, message = REFUSED[name]
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        quantize_(model, config)
    assert [type(m).__name__ for m in model.modules()] == before[1]
    assert all(t.equal(model.state_dict()[key]) or t.isnan().any() for key, t in before[0].items())


def test_an_interrupted_quantization_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchlin.quant.quantize as module

    model = make()
    before = snapshot(model)
    run, count = module.quantize_linear, []

    def stop(*arguments: Any, **options: Any) -> Any:
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return run(*arguments, **options)

    monkeypatch.setattr(module, "quantize_linear", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, FAST)
    assert same(model, *before)
    monkeypatch.undo()
    puts = []
    put = module._put

    def stop_swapping(*arguments: Any) -> None:
        puts.append(1)
        if len(puts) == 3:
            raise KeyboardInterrupt
        put(*arguments)

    monkeypatch.setattr(module, "_put", stop_swapping)
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, FAST)
    assert len(puts) > 3
    assert same(model, *before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", FAST), "model must be a torch.nn.Module, got str"),
        ((nn.Linear(2, 2), "4 bits"), r"config must be a HiggsConfig or a plan \(a dict\), got str"),
    ],
)
def test_wrong_types(arguments: tuple, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        quantize_(*arguments)


# ---- the config


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"bits": 4, "n": 16}, ValueError, "give bits or n, not both"),
        ({"bits": "4"}, TypeError, "bits must be a number or None, got str"),
        ({"bits": 9, "p": 2}, ValueError, r"bits must be in \[0.5, 8\] for p = 2.*got 9"),
        ({"p": 9}, ValueError, "p must be at least 1 and at most 8, got 9"),
        ({"n": 1}, ValueError, "n must be at least 2"),
        ({"n": 16.0}, TypeError, "n must be an int, got float"),
        ({"signs": 1}, TypeError, "signs must be a bool, got int"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"modules_to_not_convert": "lm_head"}, TypeError, "sequence of names, got 'lm_head'"),
        (
            {"overrides": {"a": {"bit": 3}}},
            ValueError,
            r"overrides\['a'\] has no field 'bit'; fields are bits, n",
        ),
        ({"overrides": {"a": {"p": 0}}}, ValueError, r"overrides\['a'\]: p must be at least 1"),
        ({"overrides": {"a": 3}}, TypeError, r"overrides\['a'\] must be a dict of fields or None, got 3"),
        ({"overrides": {"re:(": None}}, ValueError, r"'re:\(' is no regular expression"),
    ],
)
def test_wrong_configs(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HiggsConfig(**fields)


def test_config_is_json_and_registered() -> None:
    config = torchlin.create("quantizer", "higgs", bits=3, overrides={"*.v": {"bits": 5}, "x": None})
    assert isinstance(config, HiggsConfig)
    assert HiggsConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="HiggsConfig has no field 'bit'"):
        HiggsConfig.from_dict({"bit": 4})
    with pytest.raises(AttributeError):
        config.bits = 4  # type: ignore[misc]


def test_points_within() -> None:
    from torchlin.ops.grid_codes import code_layout

    for p in range(1, 9):
        for bits in (0.5, 1, 2, 2.33, 3.25, 4, 7.9):
            if not 1 <= bits * p <= 16:
                continue
            n = points_within(bits, p)
            digits, width = code_layout(n)
            assert width / digits / p <= bits + 1e-9
            if n < 65536:
                more = [code_layout(k) for k in range(n + 1, min(4 * n, 65537))]
                assert all(w / d / p > bits for d, w in more)


# ---- examples in docstrings


@pytest.mark.parametrize(
    "name", ["torchlin.nn.grid", "torchlin.quant.config", "torchlin.quant.quantize", "torchlin.quant.storage"]
)
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch, "torchlin": torchlin})
    assert result.attempted > 2
    assert result.failed == 0
