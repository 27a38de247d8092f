"""Activations as modules: every name, what is learnt, state_dict, compile and export, the registry, other libraries' words."""

from __future__ import annotations

import copy
import doctest
import importlib
import importlib.util
import inspect
import io
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlin
from torchlin import registry
from torchlin.catalogue import Activation as Row
from torchlin.catalogue import catalogue, find
from torchlin.functional import activation, gated_activation
from torchlin.nn import Activation, GatedActivation, from_torch

ALL = list(catalogue().values())
COMPLEX = {"modrelu", "zrelu", "cardioid", "crelu_complex"}
ELEMENTWISE = [row for row in ALL if not row.implementation and len(row.inputs) == 1]
LEARNING = [
    row for row in ALL if any(p.learnable for p in row.parameters.values()) and not row.implementation
]
SIZES = {"channels": 4, "num_features": 4, "groups": 2}

rows = pytest.mark.parametrize


def make(row: Row, **kwargs: Any) -> nn.Module:
    wanted = inspect.signature(registry.describe("activation", row.name).target).parameters
    sizes = {key: size for key, size in SIZES.items() if key in wanted}
    return torchlin.create("activation", row.name, **{**sizes, **kwargs})


def inputs(row: Row, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    if row.name in COMPLEX:
        options["dtype"] = torch.complex64
    return [torch.randn(2, 4, 6, 6, generator=generator, **options) for _ in row.inputs]


def name_of(row: Any) -> str | None:
    return row.name if isinstance(row, Row) else None


# ------------------------------------------------------------------------------------------------ every name


@rows("row", ALL, ids=name_of)
def test_every_name_is_made_and_runs_forward_and_backward(row):
    module = make(row)
    xs = [x.requires_grad_() for x in inputs(row)]
    y = module(*xs)
    assert y.dtype == xs[0].dtype
    assert torch.isfinite(torch.view_as_real(y) if y.is_complex() else y).all()
    if y.requires_grad:
        y.abs().sum().backward()
        grads = [t.grad for t in (*xs, *module.parameters()) if t.grad is not None]
        assert all(torch.isfinite(g.abs()).all() for g in grads)
        learnt = dict(module.named_parameters())
        assert all(p.grad is not None for p in learnt.values()), "a parameter without a gradient"
    if not row.implementation and row.kind != "stochastic":
        torch.testing.assert_close(y, functional(row, xs), rtol=1e-5, atol=1e-6)


def functional(row: Row, xs: list[Tensor], **parameters: Any) -> Tensor:
    if len(xs) == 1:
        return activation(xs[0], row.name, **parameters)
    return gated_activation(*xs[:2], row.name, **dict(zip(row.inputs[2:], xs[2:], strict=True)), **parameters)


@rows("row", ALL, ids=name_of)
def test_copies_pickles_and_states_are_the_same_function(row):
    module = make(row).eval()
    xs = inputs(row)
    y = module(*xs)
    stored = io.BytesIO()
    torch.save(module.state_dict(), stored)
    stored.seek(0)
    other = make(row).eval()
    other.load_state_dict(torch.load(stored))
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        assert torch.equal(again(*xs), y)
        assert repr(again) == repr(module)


@rows("row", [row for row in ALL if row.name not in COMPLEX], ids=name_of)
def test_half_precision_and_other_devices(row):
    module = make(row).eval()
    xs = inputs(row)
    y = module(*xs)
    low = copy.deepcopy(module).bfloat16()(*(x.bfloat16() for x in xs))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), module(*(x.bfloat16().float() for x in xs)), rtol=0.05, atol=0.05)
    if row.kind != "stochastic":
        shape = copy.deepcopy(module).to("meta")(*(x.to("meta") for x in xs)).shape
        assert shape == y.shape


class All(nn.Module):
    """The activations of some names on one input."""

    def __init__(self, chosen: list[Row]) -> None:
        super().__init__()
        self.acts = nn.ModuleList(make(row) for row in chosen)

    def forward(self, *xs: Tensor) -> list[Tensor]:
        return [act(*xs) for act in self.acts]


@rows("kind", ["elementwise", "parametric", "stochastic", "gated"])
def test_every_name_is_compiled_in_one_graph(kind):
    chosen = [row for row in ALL if row.kind == kind and not row.implementation and len(row.inputs) < 3]
    for count in range(0, len(chosen), 100):
        model = All(chosen[count : count + 100]).eval()
        xs = [x.requires_grad_() for x in inputs(chosen[0])]
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        want, got = model(*xs), compiled(*xs)
        for row, a, b in zip(chosen[count:], got, want, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, row=row: f"{row.name}: {m}")
        sums = [sum(y.sum() for y in ys if y.requires_grad) for ys in (got, want)]
        grads = [torch.autograd.grad(s, xs, retain_graph=True) for s in sums]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@rows("name", ["mish", "prelu", "rrelu", "pau", "swiglu", "relu"])
def test_inductor(name):
    row = find(name)
    module = make(row).eval()
    xs = [x.requires_grad_() for x in inputs(row)]
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(compiled(*xs), module(*xs))
    grads = [
        torch.autograd.grad(m(*xs).square().sum(), [*xs, *module.parameters()]) for m in (module, compiled)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_every_name_of_one_tensor_is_exported():
    model = All(ELEMENTWISE).eval()
    (x,) = inputs(ELEMENTWISE[0])
    program = torch.export.export(model, (x,), dynamic_shapes={"xs": ({0: torch.export.Dim.AUTO},)})
    wider = torch.cat((x, 2 * x, -x))
    for row, a, b in zip(ELEMENTWISE, program.module()(wider), model(wider), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, row=row: f"{row.name}: {m}")


# ------------------------------------------------------------------------------------------------ what is learnt


@rows("row", LEARNING, ids=name_of)
def test_learnt_parameters_start_at_their_defaults_and_stay_in_their_domains(row):
    module = make(row)
    marked = [p for p in row.parameters.values() if p.learnable]
    assert len(list(module.parameters())) == len(marked)
    for p in marked:
        start = torch.tensor(p.default).reshape(module.value(p.name).shape)
        torch.testing.assert_close(module.value(p.name), start, rtol=1e-5, atol=1e-12)
    for far in (50.0, -50.0):
        for parameter in module.parameters():
            nn.init.constant_(parameter, far)
        for p in marked:
            low, high = module.value(p.name).min().item(), module.value(p.name).max().item()
            bounds = torch.tensor((p.low, p.high)).tolist()  # in single precision
            assert bounds[0] <= low <= high <= bounds[1]


@rows("row", LEARNING, ids=name_of)
def test_nothing_all_or_channels_are_learnt(row):
    assert not list(make(row, learnable=False).parameters())
    everything = make(row, learnable=True)
    assert len(list(everything.parameters())) == len(row.parameters)
    module = make(row, num_parameters=4)
    (x, *more) = inputs(row)
    y = module(x, *more)
    y.sum().backward()
    marked = [p for p in row.parameters.values() if p.learnable and p.channel] or [
        p for p in row.parameters.values() if p.learnable
    ]
    for p in marked:
        assert module.value(p.name).shape[-1] == 4
    torch.testing.assert_close(y, make(row)(x, *more), rtol=1e-5, atol=1e-6) if not row.noises else None


def test_the_effective_value_is_the_given_one():
    for name, given in {"pelu": 0.3, "pssilu": -2.0, "blu": 0.25, "mmelu": 0.9}.items():
        key = "b" if name == "pssilu" else "a"
        module = Activation(name, **{key: given})
        assert module.value(key).item() == pytest.approx(given, rel=1e-6)
    channels = torch.tensor([0.1, 0.2, 0.7])
    assert torch.allclose(Activation("pelu", a=channels, num_parameters=3).value("a"), channels)
    fixed = Activation("leaky_relu", a=channels)
    assert list(fixed.state_dict()) == ["negative_slope"]
    x = torch.randn(2, 3, 5)
    assert torch.equal(fixed(x), F.prelu(x, channels))


def test_a_clamped_parameter_is_clamped_as_a_function_only():
    module = Activation("arelu")
    with torch.no_grad():
        module.alpha.fill_(7.0)
    assert module.value("a").item() == pytest.approx(0.99)
    module(torch.randn(3)).sum().backward()
    assert module.alpha.item() == 7.0


def test_prelu_is_drop_in():
    theirs = nn.PReLU(3, init=0.1)
    ours = Activation("prelu", num_parameters=3, init=0.1)
    assert torch.equal(ours.weight, theirs.weight)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor([0.1, -0.2, 0.3]))
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x, g = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for y, module in ((m(x), m) for m in (ours, theirs)):
        y.backward(g)
        assert y.grad_fn is not None
        assert module.weight.grad is not None
    assert torch.equal(ours(x), theirs(x))
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_coefficient_vectors():
    shared = Activation("pau")
    assert shared.a.shape == (6,)
    each = Activation("pau", num_parameters=4)
    assert each.a.shape == (6, 4)
    x = torch.randn(2, 4, 5)
    torch.testing.assert_close(each(x), shared(x))
    other = Activation("pau", a=(0.0, 1.0), b=[0.0], learnable=False)
    torch.testing.assert_close(other(x), x)


def test_channels_of_another_dimension():
    x = torch.randn(2, 5, 3)
    module = Activation("prelu", num_parameters=3, channel_dim=-1, init=torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(module(x), F.prelu(x.movedim(-1, 1), module.weight).movedim(1, -1))


def test_training_moves_a_learnt_parameter():
    torch.manual_seed(0)
    x = torch.randn(256, 1)
    module = Activation("elu", learnable=["alpha"])
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    for _ in range(200):
        optimizer.zero_grad()
        F.mse_loss(module(x), F.elu(x, 0.3)).backward()
        optimizer.step()
    assert module.value("alpha").item() == pytest.approx(0.3, abs=1e-3)


# ------------------------------------------------------------------------------------------------------ noise


@rows("row", [row for row in ALL if row.noises], ids=name_of)
def test_noise_is_drawn_in_training_and_can_be_repeated(row):
    x = torch.randn(64)
    module = Activation(row.name, generator=torch.Generator().manual_seed(3))
    first, second = module(x), module(x)
    assert not torch.equal(first, second)
    module.generator.manual_seed(3)
    assert torch.equal(module(x), first)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


# ------------------------------------------------------------------------------------------------------ gated


def test_layouts_and_gates():
    a, b = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    want = F.silu(a) * b
    halves, pairs = torch.cat((a, b), -1), torch.stack((a, b), -1).flatten(-2)
    assert torch.allclose(GatedActivation("swiglu")(a, b), want)
    assert torch.allclose(GatedActivation("swiglu")(halves), want)
    assert torch.allclose(GatedActivation("swiglu", layout="interleaved")(pairs), want)
    assert torch.allclose(GatedActivation("swiglu", gate="second")(halves), a * F.silu(b))
    assert torch.allclose(GatedActivation("swiglu", gate="second")(b, a), want)
    x = torch.randn(2, 6, 5)
    assert torch.allclose(GatedActivation("glu", dim=1)(x), F.glu(x, 1))
    h = GatedActivation("highway_gate")(a, b, want)
    assert torch.allclose(h, torch.lerp(want, a, torch.sigmoid(b)))
    learnt = GatedActivation("swiglu_beta", num_parameters=3)
    learnt(halves).sum().backward()
    assert learnt.beta.grad.shape == (3,)


# ---------------------------------------------------------------------------------------------------- errors


@rows(
    ("kwargs", "error", "words"),
    [
        ({"name": "leaky_rely"}, ValueError, "'leaky_relu'"),
        ({"name": "elu", "slope": 1}, TypeError, "elu has no parameter 'slope'; it has a/alpha"),
        ({"name": "celu", "a": -1.0}, ValueError, r"a of celu must be in \(0, inf\), got -1"),
        ({"name": "pelu", "a": 0.0}, ValueError, r"a of pelu must be in \(0, inf\)"),
        ({"name": "ptelu", "a": 0.0}, ValueError, "only nears 0"),
        ({"name": "pelu", "a": torch.tensor([0.5, -1])}, ValueError, "must be in"),
        ({"name": "prelu", "num_parameters": 0}, ValueError, "num_parameters must be a positive int"),
        ({"name": "prelu", "num_parameters": 3, "a": torch.ones(2)}, ValueError, "num_parameters = 3, got 2"),
        ({"name": "mish", "num_parameters": 3}, ValueError, "has nothing to learn"),
        ({"name": "prelu", "learnable": "a"}, TypeError, "learnable must be"),
        ({"name": "prelu", "learnable": ["c"]}, TypeError, "no parameter 'c'"),
        ({"name": "pau", "a": 1.0}, TypeError, "sequence of numbers"),
        ({"name": "swiglu"}, ValueError, "use GatedActivation"),
        ({"name": "elu", "a": "one"}, TypeError, "a of elu must be a number or a Tensor"),
        ({"name": "prelu", "a": torch.ones(2, 2)}, ValueError, r"shape \(2, 2\)"),
    ],
)
def test_bad_arguments(kwargs, error, words):
    with pytest.raises(error, match=words):
        Activation(**kwargs)


def test_bad_arguments_of_gated_units():
    with pytest.raises(ValueError, match="use Activation"):
        GatedActivation("mish")
    with pytest.raises(ValueError, match="layout must be"):
        GatedActivation("swiglu", layout="split")
    with pytest.raises(ValueError, match="gate must be"):
        GatedActivation("swiglu", gate="a")
    with pytest.raises(TypeError, match="needs the tensors a, b, x, got 2"):
        GatedActivation("highway_gate")(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="even"):
        GatedActivation("swiglu")(torch.ones(2, 3))
    with pytest.raises(ValueError, match="channels"):
        Activation("prelu", num_parameters=3)(torch.randn(2, 4))


# --------------------------------------------------------------------------------------------------- registry


def test_the_registry_has_every_name_and_alias():
    assert set(torchlin.names("activation")) >= {row.name for row in ALL}
    for row in ALL:
        for key in (row.name, *row.aliases):
            entry = torchlin.describe("activation", key)
            assert entry.name == row.name
            assert row.source in entry.summary
            assert (row.graph is None) or row.display in entry.summary
            assert entry.signature.startswith("(*")
    assert repr(torchlin.create("activation", "Leaky-ReLU", a=0.2)) == "Activation('leaky_relu', a=0.2)"
    assert torchlin.create("activation", {"type": "swiglu", "dim": 1}).dim == 1
    with pytest.raises(registry.UnknownNameError, match="'tanhexp'"):
        torchlin.create("activation", "tanhxp")
    assert "x*tanh(exp(x))" in torchlin.describe("activation", "telu").summary
    assert "a=0.01" in torchlin.describe("activation", "leaky_relu").signature
    assert "inplace" in torchlin.describe("activation", "relu").signature
    assert "inplace" not in torchlin.describe("activation", "mish").signature


def test_the_import_reads_no_catalogue():
    code = "import torchlin\nfrom torchlin.catalogue import catalogue\nprint(catalogue.cache_info().currsize)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "0"


# --------------------------------------------------------------------------------------- torch's own modules

THEIRS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.2), nn.LeakyReLU(0.2, inplace=True), nn.PReLU(),
    nn.PReLU(4, init=0.3), nn.RReLU(0.1, 0.4).eval(), nn.ELU(0.7), nn.ELU(inplace=True), nn.CELU(0.7), nn.SELU(),
    nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.SiLU(inplace=True), nn.Mish(), nn.Softplus(2, 30), nn.Softplus(),
    nn.Hardtanh(-2, 3), nn.Hardshrink(0.3), nn.Softshrink(0.3), nn.Tanhshrink(), nn.Softsign(), nn.LogSigmoid(),
    nn.Sigmoid(), nn.Tanh(), nn.Hardsigmoid(), nn.Hardswish(), nn.Threshold(0.1, 0.5), nn.GLU(1),
]  # fmt: skip


@rows("theirs", THEIRS, ids=repr)
def test_the_equal_of_a_module_of_torch(theirs):
    ours = from_torch(theirs)
    x, y = (3 * torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    x.requires_grad_()
    y = x.detach().clone().requires_grad_()
    a, b = ours(x * 1), theirs(y * 1)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    a.square().sum().backward()
    b.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    assert ours.training == theirs.training
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert p is q


def test_what_has_no_equal():
    class Mine(nn.ReLU):
        pass

    for module in (nn.Softplus(1, 5), Mine(), nn.Linear(2, 2), nn.CELU(-1.0)):
        with pytest.raises(ValueError, match="no equal of"):
            from_torch(module)
    assert (
        from_torch(nn.Threshold(0.5, 1.0, inplace=True)).inplace is False
    )  # a gradient from the output is wrong
    assert from_torch(nn.LeakyReLU(-0.1, inplace=True)).inplace is False


def test_swap_without_replacements_takes_what_has_an_equal():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(4, 4, 3), nn.PReLU(4),
        nn.Sequential(nn.Softplus(1, 5), nn.GELU("tanh")), nn.GLU(1), nn.Dropout(0.1),
    ).eval()  # fmt: skip
    seen = []
    model[1].register_forward_hook(lambda module, *_: seen.append(type(module)))
    x = torch.randn(2, 3, 8, 8)
    want, weight = model(x), model[3].weight
    old = torchlin.swap_(model)
    assert sorted(old) == ["1", "3", "4.1", "5"]
    assert [type(model[i]) for i in (1, 3, 5)] == [Activation, Activation, GatedActivation]
    assert type(model[4][0]) is nn.Softplus
    assert model[1].inplace
    assert model[3].weight is weight
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)
    assert seen[-1] is Activation
    assert torchlin.swap_(model) == {}
    torchlin.swap_(model, old)
    assert torch.equal(model(x), want)
    torchlin.swap_(model, {nn.LeakyReLU: from_torch, nn.GELU: "gelu_tanh"})
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------- transformers and timm


def tiny(name: str, **kwargs: Any) -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 64, **kwargs}
    sizes = {
        "Llama": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "Bert": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "Apertus": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    }[name]
    head = {"Bert": "BertForMaskedLM", "GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    config = getattr(transformers, f"{name}Config")(**common, **sizes)
    torch.manual_seed(0)
    return getattr(transformers, head)(config).eval(), config


@pytest.mark.filterwarnings("ignore")
@rows(("name", "count"), [("Llama", 2), ("Bert", 3), ("GPT2", 2), ("Apertus", 2)])
def test_swapped_language_models_have_the_same_logits(name, count):
    model, _ = tiny(name)
    model.float()
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        want = model(tokens).logits
        old = torchlin.swap_(model)
        assert len(old) == count
        torch.testing.assert_close(model(tokens).logits, want, rtol=1e-4, atol=1e-5)
        torchlin.swap_(model, old)
        assert torch.equal(model(tokens).logits, want)


@pytest.mark.filterwarnings("ignore")
def test_the_table_of_transformers():
    theirs = pytest.importorskip("transformers.activations")
    from torchlin.compat.transformers import ACT2FN, get_activation

    x = 4 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for name in theirs.ACT2CLS:
        assert name in ACT2FN
        arguments = {"dtype": torch.float32} if name == "xielu" else {}
        made = theirs.ACT2CLS[name](**arguments) if arguments else theirs.ACT2FN[name]
        torch.testing.assert_close(ACT2FN[name](x), made(x), rtol=2e-6, atol=2e-6)
    assert ACT2FN["silu"] is not ACT2FN["silu"]
    assert len(list(ACT2FN)) == len(ACT2FN) >= 480
    assert "no such" not in ACT2FN
    with pytest.raises(KeyError, match="closest"):
        get_activation("tanhxp")


@pytest.mark.filterwarnings("ignore")
def test_transformers_builds_models_with_them():
    pytest.importorskip("transformers")
    from transformers.activations import ACT2FN

    from torchlin.compat.transformers import install

    tokens = torch.arange(24).view(2, 12)
    plain, _ = tiny("Llama")
    with install():
        ours, _ = tiny("Llama")
        new, _ = tiny("Llama", hidden_act="tanhexp")
        assert isinstance(ours.model.layers[0].mlp.act_fn, Activation)
        assert new.model.layers[0].mlp.act_fn.name == "tanhexp"
        ours.load_state_dict(plain.state_dict())
        torch.testing.assert_close(ours(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-5)
    assert "tanhexp" not in ACT2FN
    assert not isinstance(ACT2FN["silu"], Activation)
    handle = install()
    handle.undo()
    handle.undo()
    assert not isinstance(ACT2FN["silu"], Activation)


@pytest.fixture
def real_timm(monkeypatch):
    """timm.layers.create_act without the rest of timm, which needs torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        pytest.skip("timm is not installed")
    root = Path(spec.origin).parent
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    for name, path in (("timm", root), ("timm.layers", root / "layers")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        monkeypatch.setitem(sys.modules, name, package)
    yield importlib.import_module("timm.layers.create_act")
    for name in [name for name in sys.modules if name.startswith("timm.")]:
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_the_words_of_timm(real_timm):
    from torchlin.compat import timm as ours

    x = 4 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for name in real_timm._ACT_LAYER_DEFAULT:
        for inplace in (None, False, True):
            theirs = real_timm.create_act_layer(name, inplace=inplace)
            made = ours.create_act_layer(name, inplace=inplace)
            torch.testing.assert_close(made(x.clone()), theirs(x.clone()), rtol=2e-6, atol=2e-6)
        if name != "identity":
            torch.testing.assert_close(from_torch(theirs)(x.clone()), made(x.clone()))
    for name in real_timm._ACT_FN_DEFAULT:
        y = ours.get_act_fn(name)(x.clone(), inplace=True)
        torch.testing.assert_close(y, real_timm.get_act_fn(name)(x.clone()), rtol=2e-6, atol=2e-6)
    assert ours.get_act_layer("tanhexp")().name == "tanhexp"
    assert "tanhexp" in ours.list_activations("*exp*")


@rows(
    "where", ["nn.activation", "nn.activation_from", "compat.timm", "compat.transformers", "swap", "registry"]
)
def test_examples_of_docstrings(where, own_registry):
    if where == "compat.transformers":
        pytest.importorskip("transformers")
    module = importlib.import_module(f"torchlin.{where}")
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


def test_overwriting_modules_train():
    for name in ("relu", "leaky_relu", "hardtanh"):
        weight = torch.randn(3, 3, requires_grad=True)
        fresh = Activation(name)(weight * 1)
        over = Activation(name, inplace=True)
        x = weight * 1
        y = over(x)
        assert y is x
        assert torch.equal(y, fresh)
        grads = [torch.autograd.grad(t.square().sum(), weight)[0] for t in (y, fresh)]
        assert torch.equal(*grads)
    with pytest.raises(ValueError, match="inplace"):
        Activation("mish", inplace=True)(weight * 1)
