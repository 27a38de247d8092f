"""GridLinear, GridEmbedding and GridBank: values, gradients, sharing of the transform, casts, copies, compilers."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchlin.nn import GridBank, GridEmbedding, GridLinear, HadamardTransform
from torchlin.nn.grid import check_sizes, largest_order
from torchlin.quant import grid
from torchlin.quant.encode import encode_weight, quantize_bank, quantize_embedding, quantize_linear


def linear(in_features: int, out_features: int, bias: bool = True, dtype: torch.dtype = torch.float32):
    torch.manual_seed(in_features + out_features)
    return nn.Linear(in_features, out_features, bias=bias).to(dtype)


def grid_linear(
    in_features: int = 96, out_features: int = 40, bias: bool = True, **options: Any
) -> GridLinear:
    return GridLinear.from_linear(linear(in_features, out_features, bias), grid(16, 2), **options)


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


# ---- values


SIZES = [
    (576, None, 576, 576),
    (1536, 128, 128, 128),
    (96, None, 96, 96),
    (90, None, 90, 2),  # 45 · 2: rows are scaled whole
    (33, None, 33, 1),  # no rotation at all
    (1, None, 1, 1),
    (192, 64, 64, 64),
]


@pytest.mark.parametrize(("size", "asked", "block", "order"), SIZES)
@pytest.mark.parametrize("points", [(16, 1), (16, 2), (88, 2)], ids=str)
def test_forward_is_the_dequantized_linear(
    size: int, asked: int | None, block: int, order: int, points
) -> None:
    old = linear(size, 24)
    layer = GridLinear.from_linear(old, grid(*points), block_size=asked)
    assert (layer.block_size, layer.hadamard_size) == (block, order)
    for shape in ((size,), (1, size), (3, size), (2, 1, size), (2, 20, size), (0, size)):
        x = torch.randn(shape)
        expected = F.linear(x, layer.weight, layer.bias)
        with torch.no_grad():
            got = layer(x)
        assert got.shape == expected.shape
        assert torch.allclose(got, expected, atol=2e-5 * (1 + float(layer.weight.abs().max())) * size**0.5)
    if size > 90:  # of few weights the error is chance
        assert 0.5 < relative(layer.weight, old.weight) ** 2 / layer.grid.mse < 1.2


def test_the_weight_is_the_rotated_one() -> None:
    old = linear(576, 8)
    encoded = encode_weight(old.weight, grid(256, 2), block_size=144, seed=3)
    rotate = HadamardTransform(576, block_size=144, randomized=True, seed=3)
    layer, error = quantize_linear(old, grid(256, 2), block_size=144, seed=3)
    assert torch.equal(layer.signs.float(), rotate.signs)
    assert error == pytest.approx(relative(layer.weight, old.weight) ** 2, rel=1e-4)
    assert error == encoded.error
    x = torch.randn(4, 576)
    assert torch.allclose(layer._transform()(x), rotate(x), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_of_x(dtype: torch.dtype) -> None:
    layer = grid_linear()
    x = torch.randn(5, 96)
    expected = layer(x)
    got = layer(x.to(dtype))
    assert got.dtype is dtype
    assert relative(got, expected) < (1e-6 if dtype is torch.float64 else 0.02)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match=r"in_features = 96, got shape \(3, 95\)"):
        grid_linear()(torch.randn(3, 95))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (96, 2, 7, None),
            ValueError,
            "block_size must divide in_features = 96, got 7; what fits: 12, 16, 24",
        ),
        ((90, 2, 45, None), ValueError, "45 is no order of a Hadamard matrix.*largest order.*is 1"),
        ((96, 5, 48, None), ValueError, "multiple of the grid's p = 5 .* several blocks, got 48"),
        ((96, 2, 48.0, None), TypeError, "block_size must be an int or None, got float"),
        ((96, 2, None, 5), ValueError, "hadamard_size must divide in_features = 96, got 5"),
        ((96, 2, 12, 8), ValueError, "hadamard_size 8 must divide block_size, got 12"),
    ],
)
def test_sizes_that_do_not_fit(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_sizes(*arguments)


def test_largest_order() -> None:
    assert [largest_order(n) for n in (1, 2, 3, 576, 11008, 90, 28672, 4096)] == [
        1, 2, 1, 576, 11008, 2, 28672, 4096,
    ]  # fmt: skip


# ---- weights that are hard to encode


def hard(kind: str) -> Tensor:
    w = torch.randn(6, 192)
    if kind == "zero row":
        w[2] = 0
    elif kind == "all zero":
        w.zero_()
    elif kind == "constant rows":
        w[:] = torch.arange(1, 7).unsqueeze(1)
    elif kind == "outlier":
        w[1, 5] = 1e5
    elif kind == "huge":
        w *= 1e30
        w[3, 7] = 1e37
    elif kind == "tiny":
        w *= 1e-25
    elif kind == "subnormal":
        w *= 1e-41
    elif kind == "one block zero":
        w[:, 64:128] = 0
    return w


@pytest.mark.parametrize("block", [None, 64])
@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize(
    "kind",
    ["zero row", "all zero", "constant rows", "outlier", "huge", "tiny", "subnormal", "one block zero"],
)
def test_hard_weights_stay_finite_and_near(kind: str, refit: bool, block: int | None) -> None:
    old = nn.Linear(192, 6, bias=False)
    old.weight.data = hard(kind)
    layer, error = quantize_linear(old, grid(256, 2), block_size=block, scale_refit=refit)
    weight = layer.weight
    assert weight.isfinite().all()
    assert layer(torch.randn(3, 192)).isfinite().all()
    wide, w = weight.detach().double(), old.weight.detach().double()
    measured = float(((wide - w).square().sum() / w.square().sum()).nan_to_num())
    assert error == pytest.approx(measured, rel=0.02, abs=1e-9)
    assert error < 0.1  # a row that is a spike or a constant would be at 1 without the signs
    assert (wide[w.abs().sum(1) == 0] == 0).all()
    wanted = torch.float32 if kind in ("huge", "tiny", "subnormal") else torch.float16
    assert layer.scales.dtype is wanted


def test_refit_helps() -> None:
    old = linear(512, 64)
    errors = [
        quantize_linear(old, grid(16, 1), block_size=64, scale_refit=refit)[1] for refit in (True, False)
    ]
    assert 0.95 < errors[0] / errors[1] < 0.98  # spec: 0.008856 / 0.009170


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_16_bit_and_64_bit_weights(dtype: torch.dtype) -> None:
    layer = GridLinear.from_linear(linear(96, 40, dtype=dtype), grid(256, 2))
    assert layer.weight.dtype is layer.bias.dtype is dtype
    assert relative(layer.weight, linear(96, 40).weight) ** 2 < 0.012


def test_pieces_do_not_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode_weight(linear(96, 41).weight, grid(88, 2))
    monkeypatch.setattr("torchlin.quant.encode._PIECE", 96 * 7)
    pieces = encode_weight(linear(96, 41).weight, grid(88, 2))
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.scales, pieces.scales)
    assert whole.error == pytest.approx(pieces.error)


# ---- gradients


def test_gradients_are_those_of_the_dequantized_linear() -> None:
    layer = grid_linear(96, 24, block_size=48)
    trained = layer.unfreeze_(signs=True)
    assert [p.dtype for p in trained] == [torch.float32] * 2
    assert dict(layer.named_parameters()).keys() == {"bias", "scales", "signs"}
    with torch.no_grad():
        layer.signs.mul_(1.1)  # any numbers from here on
    x = torch.randn(5, 96, requires_grad=True)
    g = torch.randn(5, 24)
    layer(x).backward(g)
    got = {name: p.grad.clone() for name, p in layer.named_parameters()} | {"x": x.grad.clone()}
    layer.zero_grad()
    x.grad = None
    weight = layer._dequantize(layer.codes, layer.scales)  # through the dequantization, by autograd alone
    F.linear(x, weight, layer.bias).backward(g)
    want = {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad}
    for name, grad in got.items():
        assert relative(grad, want[name]) < 1e-5, name


def test_training_lowers_the_error_and_freeze_keeps_it() -> None:
    torch.manual_seed(1)
    old, layer = linear(96, 24), grid_linear(96, 24)
    x = torch.randn(256, 96)
    want = old(x).detach()
    layer.scales.mul_(1.4)  # what a training can find back
    layer.unfreeze_(signs=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), want)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    after = layer(x).detach()
    layer.freeze_()
    assert (layer.scales.dtype, layer.signs.dtype) == (torch.float16, torch.float32)
    assert dict(layer.named_parameters()).keys() == {"bias"}
    assert relative(layer(x), after) < 1e-3
    other = grid_linear(96, 24)
    other.load_state_dict(layer.state_dict())  # learnt signs are wider than ±1, and come along
    assert torch.equal(other(x), layer(x))


def test_unfreeze_without_signs() -> None:
    with pytest.raises(ValueError, match="signs: this layer has none"):
        grid_linear(signs=False).unfreeze_(signs=True)


# ---- the shared transform


class Counted:
    def __init__(self, layer: GridLinear, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        transform = layer._transform()
        run = transform._raw

        def counted(*arguments: Any) -> Tensor:
            self.calls += 1
            return run(*arguments)

        monkeypatch.setattr(transform, "_raw", counted)


def three() -> list[GridLinear]:
    return [grid_linear(96, n) for n in (8, 16, 24)]


def test_layers_of_one_input_transform_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = three()
    count = Counted(layers[0], monkeypatch)
    x = torch.randn(3, 96)
    with torch.no_grad():
        expected = [F.linear(x, layer.weight, layer.bias) for layer in layers]
        got = [layer(x) for layer in layers]
    assert count.calls == 1
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_changed_or_another_input_is_transformed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = grid_linear()
    count = Counted(layer, monkeypatch)
    x = torch.randn(3, 96)
    with torch.no_grad():
        layer(x)
        x.mul_(2)
        assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5)
        layer(x.clone())
        x[0, 0] = 7  # through a view
        layer(x)
    assert count.calls == 4


def test_nothing_is_remembered_with_gradients_or_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = grid_linear()
    count = Counted(layer, monkeypatch)
    x = torch.randn(3, 96, requires_grad=True)
    layer(x).sum().backward()
    first = x.grad.clone()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, 2 * first)
    assert count.calls == 0
    with torch.inference_mode():
        y = torch.randn(3, 96)
        layer(y)
        y.mul_(2)  # leaves no trace
        assert torch.allclose(layer(y), F.linear(y, layer.weight, layer.bias), atol=1e-5)
    assert count.calls == 2


def test_memory_goes_with_the_input() -> None:
    layer = grid_linear()
    x = torch.randn(3, 96)
    with torch.no_grad():
        layer(x)
    last = layer._transform()._last
    assert last is not None
    kept = weakref.ref(last[2][0])
    del last
    assert kept() is not None
    del x
    gc.collect()
    assert kept() is None


def test_threads() -> None:
    layers = three()
    inputs = [torch.randn(3, 96) for _ in range(4)]
    expected = [[F.linear(x, layer.weight, layer.bias).detach() for layer in layers] for x in inputs]
    wrong = []

    def run(i: int) -> None:
        with torch.no_grad():
            for _ in range(200):
                for layer, want in zip(layers, expected[i], strict=True):
                    if not torch.allclose(layer(inputs[i]), want, atol=1e-5):
                        wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_who_shares() -> None:
    a, b, other_seed, other_size = grid_linear(), grid_linear(96, 8), grid_linear(seed=1), grid_linear(192)
    assert a._input is b._input is copy.deepcopy(a)._input
    assert a._input is not other_seed._input
    assert a._input is not other_size._input
    a.unfreeze_(scales=False, signs=True)
    assert a._input is not b._input


# ---- copies, casts, compilers


def test_copies_and_pickles() -> None:
    layer = grid_linear()
    x = torch.randn(2, 96)
    with torch.no_grad():
        expected = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), expected)
            assert other.codes.data_ptr() != layer.codes.data_ptr()
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        fresh = GridLinear(96, 40, grid=layer.grid, signs=torch.ones(96, dtype=torch.int8))
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(fresh(x), expected)


def test_casts_leave_codes_and_scales_alone() -> None:
    layer = grid_linear()
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    for change in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.type(torch.bfloat16),
    ):
        cast = change(copy.deepcopy(layer))
        for name in ("codes", "scales", "signs"):
            assert torch.equal(getattr(cast, name), state[name])
            assert getattr(cast, name).dtype is state[name].dtype
        assert cast.bias.dtype is cast.dtype is cast.weight.dtype is not torch.float32
    trained = copy.deepcopy(layer)
    trained.unfreeze_()
    assert trained.to(torch.bfloat16).scales.dtype is torch.float32


def test_scales_that_need_32_bits_survive_a_cast_and_a_load() -> None:
    old = nn.Linear(96, 8)
    old.weight.data *= 1e-9
    layer = GridLinear.from_linear(old, grid(16, 2))
    assert layer.scales.dtype is torch.float32
    assert copy.deepcopy(layer).half().scales.dtype is torch.float32
    fresh = GridLinear(96, 8, grid=layer.grid, signs=layer.signs.clone())
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.weight, layer.weight)


def test_meta_and_to_empty() -> None:
    layer = grid_linear()
    with torch.device("meta"):
        empty = GridLinear(96, 40, grid=layer.grid, signs=torch.ones(96, dtype=torch.int8))
    assert empty.codes.is_meta
    full = empty.to_empty(device="cpu")
    full.load_state_dict(layer.state_dict())
    x = torch.randn(2, 96)
    assert torch.equal(full(x), layer(x))


def compiled(module: nn.Module):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def test_compile_and_export() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = three()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((self.q(x), self.k(x), self.v(x)), -1)

    model = Attention()
    x = torch.randn(3, 96)
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(compiled(model)(x), expected, atol=1e-6)
        assert torch.allclose(torch.export.export(model, (x,)).module()(x), expected, atol=1e-6)
    x.requires_grad_()
    model(x).square().sum().backward()
    want, x.grad = x.grad, None
    compiled(model)(x).square().sum().backward()
    assert torch.allclose(x.grad, want, atol=1e-4)


def test_a_traced_training_step_transforms_once() -> None:
    from torch._dynamo.backends.common import aot_autograd

    layers = nn.ModuleList(three())
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def forward(x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in layers], -1)

    from functorch.compile import min_cut_rematerialization_partition

    backend = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    torch._dynamo.reset()
    torch.compile(forward, fullgraph=True, backend=backend)(torch.randn(3, 96, requires_grad=True))
    assert sum("_hadamard" in str(node.target) for node in graphs[0].graph.nodes) == 1


def test_sharded_by_fsdp() -> None:
    code = """
import os, torch, torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torchlin.quant import HiggsConfig, quantize_
store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
model = nn.Sequential(nn.Linear(96, 192), nn.ReLU(), nn.Linear(192, 96))
quantize_(model, HiggsConfig(n=16, p=1))
x = torch.randn(4, 96)
y = model(x).detach()
model[0].unfreeze_()
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
for module in (model[0], model[2], model):
    fully_shard(module, mesh=mesh)
model(x).sum().backward()
assert model[0].scales.grad is not None
state = get_model_state_dict(model, options=(options := StateDictOptions(full_state_dict=True)))
assert (state["0.codes"].dtype, state["2.scales"].dtype) == (torch.uint8, torch.float16)
set_model_state_dict(model, state, options=options)
assert torch.allclose(model(x), y, atol=1e-6)
print("the same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "the same\n", done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda() -> None:
    layers = [layer.cuda() for layer in three()]
    x = torch.randn(3, 96, device="cuda")
    with torch.no_grad():
        for layer in layers:
            want = F.linear(x, layer.weight, layer.bias)
            assert torch.allclose(layer(x), want, atol=1e-4)
        assert layers[0]._input is layers[1]._input
        assert layers[0]._points.device == x.device
        # A graph must transform what it is given, not what was remembered while it was captured.
        static = x.clone()
        for _ in range(2):
            layers[0](static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layers[0](static)
        static.copy_(2 * x)
        graph.replay()
        assert torch.allclose(y, F.linear(2 * x, layers[0].weight, layers[0].bias), atol=1e-4)
    back = copy.deepcopy(layers[0]).cpu()
    assert torch.allclose(back(x.cpu()), layers[0](x).cpu(), atol=1e-4)


# ---- embeddings and experts


def test_embedding() -> None:
    torch.manual_seed(0)
    old = nn.Embedding(50, 96, padding_idx=3)
    new, error = quantize_embedding(old, grid(256, 2))
    ids = torch.tensor([[1, 4, 1], [0, 49, 3]])
    assert torch.allclose(new(ids), new.weight[ids], atol=1e-6)
    assert error == pytest.approx(relative(new.weight, old.weight) ** 2, rel=1e-3)
    assert new.to(torch.bfloat16)(ids).dtype is torch.bfloat16
    with pytest.raises(IndexError):
        new(torch.tensor([50]))
    new.unfreeze_()
    new(ids).sum().backward()
    assert (new.scales.grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [0, 1, 3, 4, 49]


@pytest.mark.parametrize("transposed", [False, True])
def test_bank(transposed: bool) -> None:
    torch.manual_seed(0)
    weights = torch.randn(5, 24, 96)
    given = weights.mT if transposed else weights
    bank, error = quantize_bank(given, transposed, grid(256, 2))
    assert bank.shape == given.shape
    assert len(bank) == 5
    assert error == pytest.approx(relative(bank.weight, given) ** 2, rel=1e-3)
    x = torch.randn(7, 96)
    used = []
    run = GridBank.linear

    def counted(*arguments: Any) -> Tensor:
        used.append(1)
        return run(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridBank, "linear", counted)
        y = x @ bank[2] if transposed else F.linear(x, bank[2])
        z = x @ bank[torch.tensor(4)] if transposed else F.linear(x, bank[torch.tensor(4)])
    assert len(used) == 2
    dense = bank.weight
    for got, e in ((y, 2), (z, 4)):
        want = x @ dense[e] if transposed else x @ dense[e].mT
        assert torch.allclose(got, want, atol=1e-4)
    some = torch.tensor([3, 0, 3])
    assert torch.equal(bank[some], dense[some])
    assert torch.allclose(
        torch.bmm(torch.ones(5, 1, given.shape[1]), bank), dense.sum(1, keepdim=True), atol=1e-4
    )
    assert torch.equal(bank.transpose(-1, -2), dense.transpose(-1, -2))
    assert torch.equal(bank[1] * 2, dense[1] * 2)
    with pytest.raises(IndexError):
        bank[5]


def test_embedding_and_linear_are_named_in_full() -> None:
    assert repr(grid_linear(90, 8)) == (
        f"GridLinear(in_features=90, out_features=8, bias=True, grid={grid(16, 2).id}, hadamard_size=2, signs=True)"
    )
    assert "50, 96" in repr(GridEmbedding(50, 96, grid=grid(16, 2)))
