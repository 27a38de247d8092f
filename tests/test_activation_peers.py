"""Names against other packages that have them; activation_peers.csv says which class, and which argument is which parameter.

Without the packages there is nothing to compare with: pip install torch_activation==1.0.0 nonlinear==0.0.17
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchlin.catalogue import catalogue, find
from torchlin.catalogue.torch_code import reference

with (Path(__file__).parent / "activation_peers.csv").open(newline="") as file:
    PEERS = [(r["name"], r["package"], r["class"], r["arguments"]) for r in csv.DictReader(file)]
X = torch.linspace(-8, 8, 1601, dtype=torch.float64) + 0.00123  # beside the kinks


def peer(package: str, name: str, arguments: dict[str, float]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(package)
    registered = getattr(module, "_ACTIVATIONS", {})
    if name not in registered and not hasattr(module, name):
        pytest.skip(f"{package} came without its {name}: it needs plotly")
    kind = registered[name]["class"] if name in registered else getattr(module, name)
    needed = {"channels": 1, "input_shape": 1}
    accepted = inspect.signature(kind).parameters
    made = kind(**{key: value for key, value in needed.items() if key in accepted}, **arguments)
    made = made.double().eval()
    for x in (X.clone(), X.view(-1, 1, 1, 1).clone()):  # some are of images only
        try:
            y = made(x)
        except (RuntimeError, IndexError, ValueError):
            continue
        if y.numel() == X.numel():
            return y.detach().reshape(-1)
    raise AssertionError(f"{package}.{name} takes neither a vector nor images")


def others(name: str) -> dict[str, Any]:
    """Parameters beside the defaults, inside their domains."""
    values = {}
    for i, p in enumerate(find(name).parameters.values(), 1):
        near = (1.1 * p.default + 0.013 * i, 0.9 * p.default - 0.007 * i, p.default)
        values[p.name] = next(v for v in near if v in p)
    return values


@pytest.mark.parametrize(("name", "package", "kind", "arguments"), PEERS)
def test_equal_to_a_peer(name, package, kind, arguments, default_float64):
    pytest.importorskip(package)
    row = find(name)
    words = dict(pair.split("=") for pair in arguments.split())
    marked = f"{package}'s {kind} " in f"{row.verified} "
    sets = [row.defaults()]
    if words and marked and row.verified.endswith("at several parameters"):
        sets.append(others(name))
    for values in sets:
        want = peer(package, kind, {word: values[own] for word, own in words.items()})
        ours = reference(row.eval_graph, {"x": X}, values)
        assert ((ours - want).abs() / (1 + ours.abs())).max() < 1e-9


# Classes of torch_activation with coefficient vectors, and which attribute is which parameter.
VECTORS = {
    "slaf": ("SLAF", {"a": "a"}),
    "chpaf": ("ChPAF", {"a": "coefficients"}),
    "lpaf": ("LPAF", {"a": "coefficients"}),
    "hpaf": ("HPAF", {"a": "coefficients"}),
    "fsa": ("FSA", {"a": "a", "b": "b", "c": "c", "d": "d"}),
    "mogu": ("MoGU", {"a": "a", "m": "mu", "s": "sigma_raw"}),
    "splash": ("SPLASH", {"p": "a", "q": "a", "b": "c"}),
    "melu": ("MeLU", {"s": "prelu_weight", "a": "a", "b": "b", "c": "c"}),
    "galu": ("GaLU", {"s": "prelu_weight", "a": "a", "b": "b", "c": "c"}),
    "kaf": ("KAF", {"a": "a", "d": "d", "g": "gamma"}),
}


@pytest.mark.parametrize("name", VECTORS)
def test_equal_to_a_peer_at_random_coefficients(name):
    package = pytest.importorskip("torch_activation")
    kind, attributes = VECTORS[name]
    module = package._ACTIVATIONS[kind]["class"]().double().eval()
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    row = find(name)
    values: dict[str, Any] = row.defaults()
    for key, attribute in attributes.items():
        value = torch.as_tensor(getattr(module, attribute)).detach().double().flatten()
        if attribute == "sigma_raw":
            value = torch.nn.functional.softplus(value)
        values[key] = list(value.unbind()) if row.parameters[key].is_vector else value.item()
    ours, want = reference(row.eval_graph, {"x": X}, values), module(X).detach()
    assert ((ours - want).abs() / (1 + ours.abs())).max() < 1e-9


def test_hard_sigmoid_of_onnx():
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    ends = [onnx.helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, [None]) for end in "xy"]
    node = onnx.helper.make_node("HardSigmoid", ["x"], ["y"])  # with ONNX's default slope
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (want,) = session.run(None, {"x": X.float().numpy()})
    torch.testing.assert_close(
        reference(find("hardsigmoid_02").graph, {"x": X.float()}, {}), torch.from_numpy(want)
    )


def test_the_marks_are_those_of_the_lists():
    for package, listed in {
        "torch_activation": {name for name, where, _, _ in PEERS if where == "torch_activation"}
        | VECTORS.keys(),
        "nonlinear": {name for name, where, _, _ in PEERS if where == "nonlinear"},
        "transformers": TRANSFORMERS.keys() | {"swiglu_oai"},
        "timm": {"hardmish"},
    }.items():
        marked = {a.name for a in catalogue().values() if a.verified and f"{package}'" in a.verified}
        assert marked <= listed


# Classes of transformers, with the arguments that they need.
TRANSFORMERS = {
    "quick_gelu": ("activations.QuickGELUActivation", ()),
    "gelu_10": ("activations.ClippedGELUActivation", (-10, 10)),
    "laplace_cdf": ("activations.LaplaceActivation", ()),
    "relu_squared": ("activations.ReLUSquaredActivation", ()),
    "sqrtsoftplus": ("activations.SqrtSoftplusActivation", ()),
    "xielu": ("activations.XIELUActivation", (0.8, 0.8, 0.5, -1e-6, torch.float64)),
    "snake": ("models.dac.modeling_dac.Snake1d", (1,)),
    "snake_beta": ("models.qwen2_5_omni.modeling_qwen2_5_omni.Qwen2_5OmniSnakeBeta", (1,)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_equal_to_transformers(name):
    pytest.importorskip("transformers")
    where, arguments = TRANSFORMERS[name]
    module, _, kind = where.rpartition(".")
    made = getattr(importlib.import_module(f"transformers.{module}"), kind)(*arguments).double()
    row = find(name)
    x = X.clone().requires_grad_()
    ours = reference(row.eval_graph, {"x": x}, row.defaults())
    want = made(x.view(1, 1, -1)).view(-1)
    # Snake divides by alpha + 1e-9 there, and their beta is a logarithm.
    torch.testing.assert_close(ours, want, rtol=3e-9, atol=1e-13)
    slopes = [torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (ours, want)]
    torch.testing.assert_close(*slopes, rtol=3e-9, atol=3e-9)


def test_equal_to_the_gate_of_gpt_oss():
    pytest.importorskip("transformers")
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=1)
    pairs = 6 * torch.randn(16, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    row = find("swiglu_oai")
    a, b = pairs[:, ::2], pairs[:, 1::2]
    ours = reference(row.graph, {"a": a, "b": b}, row.defaults())
    torch.testing.assert_close(ours, GptOssExperts(config)._apply_gate(pairs))


def test_equal_to_hard_mish_of_timm():
    kind = timm_module("activations").HardMish
    torch.testing.assert_close(reference(find("hardmish").graph, {"x": X}, {}), kind()(X))


def timm_module(name: str) -> Any:
    """A file of timm.layers without timm itself, which needs torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        pytest.skip("timm is not installed")
    path = Path(spec.origin).parent / "layers" / f"{name}.py"
    found = importlib.util.spec_from_file_location(f"timm_layers_{name}", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture
def default_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
