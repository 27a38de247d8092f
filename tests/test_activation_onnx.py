"""Every name of the catalogue through torch.onnx.export, computed by onnxruntime."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchlin.catalogue import Activation as Row
from torchlin.catalogue import catalogue
from torchlin.nn import Activation, GatedActivation
from torchlin.ops.activation import activation_reference, exportable

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings("ignore")

ALL = list(catalogue().values())
ELEMENTWISE = [row for row in ALL if not row.implementation and len(row.inputs) == 1]
PAIRS = [row for row in ALL if len(row.inputs) == 2]
COMPOSED = [row for row in ALL if row.implementation]
CHUNK = 48  # names in one model: the export of one has a cost of its own

# What cannot be exported, and what the exporter says of it. The gamma function of a learnt order of a derivative: there is
# no such operator in ONNX; with learnable=False it is a number.
MISSING = dict.fromkeys(
    (row.name for row in ELEMENTWISE if row.graph is not None and "gamma(" in (row.root.formula or "")),
    "prims.lgamma",
)
# ONNX has no complex numbers.
MISSING |= {
    "modrelu": "aten.where",
    "zrelu": "aten.masked_fill",
    "cardioid": "aten.where",
    "crelu_complex": "Numpy_type",
}


class Several(nn.Module):
    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(modules)

    def forward(self, *xs: Tensor) -> list[Tensor]:
        return [module(*xs) for module in self.each]


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    onnxruntime.set_default_logger_severity(3)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def run(model: nn.Module, xs: tuple[Tensor, ...], folder: Path, **options: Any) -> list[Tensor]:
    path = folder / "model.onnx"
    program = torch.onnx.export(model, xs, dynamo=True, verbose=False, optimize=False, **options)
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    fed = {key.name: x.numpy() for key, x in zip(session.get_inputs(), xs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, fed)]


def compare(
    names: list[str], modules: list[nn.Module], xs: tuple[Tensor, ...], folder: Path
) -> dict[str, str]:
    """Compares what can be exported, and returns what cannot: found by halving what fails."""
    model = Several(modules).eval()
    try:
        found = run(model, xs, folder)
    except Exception as error:
        if len(names) == 1:
            operator = re.search(r"op='([\w.]+)'", str(error))
            return {names[0]: operator[1] if operator else str(error)}
        half = len(names) // 2
        return compare(names[:half], modules[:half], xs, folder) | compare(
            names[half:], modules[half:], xs, folder
        )
    with exportable(), torch.no_grad():
        for name, got, want in zip(names, found, model(*xs), strict=True):
            torch.testing.assert_close(
                got, want, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
            )
    return {}


def expected(missing: dict[str, str], names: list[str]) -> bool:
    wanted = {name: MISSING[name] for name in names if name in MISSING}
    return missing.keys() == wanted.keys() and all(wanted[name] in missing[name] for name in wanted)


@pytest.mark.parametrize("start", range(0, len(ELEMENTWISE), CHUNK))
def test_every_name_of_one_tensor(start, tmp_path):
    names = [row.name for row in ELEMENTWISE[start : start + CHUNK]]
    x = torch.cat((torch.linspace(-8, 8, 801), torch.tensor([-60.0, -20, 20, 60])))
    missing = compare(names, [Activation(name) for name in names], (x,), tmp_path)
    assert expected(missing, names), missing


def test_what_is_missing_is_there_once_it_is_a_number(tmp_path):
    names = [name for name, why in MISSING.items() if why == "prims.lgamma"]
    assert names
    modules = [Activation(name, learnable=False) for name in names]
    assert compare(names, modules, (torch.linspace(-8, 8, 801),), tmp_path) == {}


@pytest.mark.parametrize("layout", ["halves", "interleaved", "split"])
def test_every_gated_name(layout, tmp_path):
    names = [row.name for row in PAIRS]
    generator = torch.Generator().manual_seed(0)
    xs = tuple(3 * torch.randn(4, 32, generator=generator) for _ in range(1 + (layout == "split")))
    modules = [GatedActivation(name, layout="halves" if layout == "split" else layout) for name in names]
    assert compare(names, modules, xs, tmp_path) == {}


def test_what_code_computes(tmp_path):
    from test_activation_modules import COMPLEX, make

    def modules(chosen: list[Row]) -> list[nn.Module]:
        torch.manual_seed(0)
        return [make(row) for row in chosen]

    generator = torch.Generator().manual_seed(0)
    real = [row for row in COMPOSED if row.name not in COMPLEX]
    x = torch.randn(2, 4, 6, 6, generator=generator)
    missing = compare([row.name for row in real], modules(real), (x,), tmp_path)
    others = [row for row in COMPOSED if row.name in COMPLEX]
    missing |= compare([row.name for row in others], modules(others), (torch.complex(x, -x),), tmp_path)
    assert expected(missing, [row.name for row in COMPOSED]), missing


def test_an_export_needs_no_context_and_keeps_shapes_free(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), Activation("tanhexp"), GatedActivation("swiglu")).eval()
    x = torch.randn(3, 8)
    path = str(tmp_path / "free.onnx")
    batch = torch.export.Dim("batch")
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, dynamic_shapes=({0: batch},))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    wide = torch.randn(11, 8)
    (got,) = session.run(None, {session.get_inputs()[0].name: wide.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(wide).detach(), rtol=1e-5, atol=1e-6)


def test_the_operators_are_those_of_aten():
    program = torch.export.export(Activation("gelu_tanh"), (torch.randn(3),))
    assert any("torchlin" in str(node.target) for node in program.graph.nodes) or not program.graph.nodes
    with exportable():
        program = torch.export.export(Activation("gelu_tanh"), (torch.randn(3),))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called
    assert all(name.startswith("aten.") for name in called)
    x = torch.randn(5)
    torch.testing.assert_close(program.module()(x[:3]), activation_reference(x[:3], "gelu_tanh"))
