"""swap_: what is replaced, what stays, what comes back, and what is refused."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchlin
from torchlin import registry
from torchlin.registry import UnknownNameError


@pytest.fixture(autouse=True)
def _cube(own_registry: None) -> None:
    registry.register("activation", "test_cube", Cube)
    registry.register("norm", "test_layer_norm", nn.LayerNorm)


class Cube(nn.Module):
    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return x**3 * self.gain


class Scaled(nn.Linear):
    """A Linear with one more parameter and buffer, which swap_ has nothing for."""

    def __init__(self, n: int, m: int, bias: bool = True) -> None:
        super().__init__(n, m, bias)
        self.scale = nn.Parameter(torch.ones(m))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def scaled(linear: nn.Linear) -> Scaled:
    return Scaled(linear.in_features, linear.out_features, linear.bias is not None)


class Block(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 8), act, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(nn.SiLU()), Block(nn.SiLU()), Block(nn.GELU())])
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def snapshot(model: nn.Module) -> list[tuple[str, int]]:
    """Names and identities of all modules, parameters and buffers."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    modules = list(model.named_modules(remove_duplicate=False))
    return [(name, id(thing)) for name, thing in [*modules, *tensors]]


def kinds(model: Net) -> list[str]:
    return [type(layer.act).__name__ for layer in model.layers]


# -------------------------------------------------------------------------------------------------- matching


def test_a_class_is_replaced_everywhere_and_undone() -> None:
    model, x = Net(), torch.randn(5, 4)
    before, was, output = snapshot(model), [layer.act for layer in model.layers], model(x)
    old = torchlin.swap_(model, {nn.SiLU: "Test-Cube"})
    assert kinds(model) == ["Cube", "Cube", "GELU"]
    assert old == {"layers.0.act": was[0], "layers.1.act": was[1]}
    block = model.layers[0]
    torch.testing.assert_close(block(x), x + block.down(block.up(x) ** 3))
    cubes = torchlin.swap_(model, old)
    assert snapshot(model) == before
    assert torch.equal(model(x), output)
    torchlin.swap_(model, cubes)  # and that can be undone too
    assert kinds(model) == ["Cube", "Cube", "GELU"]


@pytest.mark.parametrize(
    ("value", "gain"),
    [
        ({"type": "test_cube", "gain": 2.0}, 2.0),
        (Cube, 1.0),
        (functools.partial(Cube, gain=3.0), 3.0),
        (lambda module: Cube(gain=float(len(type(module).__name__))), 4.0),
        (Cube(5.0), 5.0),
    ],
    ids=["dict", "class", "partial", "function", "module"],
)
def test_every_sort_of_replacement(value: object, gain: float) -> None:
    model = Net()
    torchlin.swap_(model, {nn.SiLU: value})
    assert kinds(model) == ["Cube", "Cube", "GELU"]
    assert [model.layers[i].act.gain for i in (0, 1)] == [gain, gain]
    assert model.layers[0].act is not model.layers[1].act


def test_a_module_is_used_itself_under_a_name_and_copied_otherwise() -> None:
    model, cube = Net(), Cube()
    torchlin.swap_(model, {"layers.0.act": cube, "layers.[12].act": cube})
    acts = [layer.act for layer in model.layers]
    assert acts[0] is cube
    assert cube not in acts[1:]
    assert acts[1] is not acts[2]


def test_patterns_and_their_precedence() -> None:
    model = Net()
    chosen = {nn.SiLU: Cube, "layers.*.act": nn.Tanh, "layers.0*": nn.Hardtanh, "layers.0.act": nn.Sigmoid}
    # Block 0 itself matches "layers.0*", hence is replaced whole: a pattern takes the outermost module.
    with pytest.raises(ValueError, match=r"nothing in this Net matches 'layers.0.act'"):
        torchlin.swap_(model, chosen)
    assert kinds(model) == ["SiLU", "SiLU", "GELU"]
    chosen = {nn.SiLU: Cube, "layers.*.act": nn.Tanh, "layers.1.*t": nn.Hardtanh, "layers.0.act": nn.Sigmoid}
    torchlin.swap_(model, chosen)
    assert kinds(model) == ["Sigmoid", "Tanh", "Tanh"]


def test_a_subclass_is_not_the_class() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Scaled(2, 2))
    torchlin.swap_(model, {nn.Linear: nn.Identity()})
    assert [type(module) for module in model] == [nn.Identity, Scaled]
    with pytest.raises(
        ValueError, match=r"nothing in this Sequential matches Linear \(subclasses there: Scaled\)"
    ):
        torchlin.swap_(model, {nn.Linear: nn.Identity()})


def test_a_name_with_pattern_characters_is_a_name() -> None:
    model = nn.Sequential(nn.ModuleDict({"act[0]": nn.SiLU(), "act0": nn.SiLU()}))
    torchlin.swap_(model, {"0.act[0]": "test_cube"})
    assert [type(module) for module in model[0].values()] == [Cube, nn.SiLU]


def test_a_function_may_leave_a_module_alone() -> None:
    model = Net()
    was = model.layers[0].up
    old = torchlin.swap_(
        model, {nn.Linear: lambda linear: linear if linear.out_features == 8 else scaled(linear)}
    )
    assert list(old) == ["layers.0.down", "layers.1.down", "layers.2.down", "head"]
    assert model.layers[0].up is was


def test_a_real_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.tensor([[1, 5, 3]])
    before = model(tokens).logits
    activation = type(model.model.layers[0].mlp.act_fn)
    old = torchlin.swap_(model, {activation: "test_cube"})
    assert sorted(old) == ["model.layers.0.mlp.act_fn", "model.layers.1.mlp.act_fn"]
    assert not torch.allclose(model(tokens).logits, before)
    torchlin.swap_(model, old)
    assert torch.equal(model(tokens).logits, before)


# ----------------------------------------------------------------------------------------------- what stays


def test_weights_stay_the_very_same_tensors() -> None:
    model, x = Net(), torch.randn(5, 4)
    model.head.bias.requires_grad_(False)
    weight, bias, output = model.head.weight, model.head.bias, model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    old = torchlin.swap_(model, {"head": scaled})
    assert model.head.weight is weight
    assert model.head.bias is bias
    assert [p.requires_grad for p in (weight, bias, model.head.scale)] == [True, False, True]
    assert torch.equal(model(x), output)
    model(x).square().sum().backward()
    optimizer.step()
    trained = weight.detach().clone()
    torchlin.swap_(model, old)
    assert torch.equal(model.head.weight, trained)
    assert not torch.equal(model(x), output)


def test_a_given_module_brings_its_own_weights() -> None:
    model, head = Net(), nn.Linear(4, 4)
    weight = head.weight.detach().clone()
    torchlin.swap_(model, {"head": head})
    assert torch.equal(model.head.weight, weight)
    model = Net()
    torchlin.swap_(model, {"layers.?.down": nn.Linear(8, 4, bias=False)})
    downs = [layer.down.weight for layer in model.layers]
    assert torch.equal(downs[0], downs[1])
    assert downs[0] is not downs[1]


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    torchlin.swap_(model, {"2": scaled})
    assert model[2].weight is model[0].weight


def test_buffers_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model(torch.randn(16, 4) + 3)
    mean = model[1].running_mean.clone()
    x = torch.randn(8, 4)
    expected = copy.deepcopy(model).eval()(x)
    torchlin.swap_(model, {nn.BatchNorm1d: lambda norm: nn.SyncBatchNorm(norm.num_features)})
    assert torch.equal(model[1].running_mean, mean)
    assert mean.abs().max() > 0
    assert torch.equal(model.eval()(x), expected)


def test_a_parameter_does_not_turn_a_buffer_into_a_parameter() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.zeros(1))

    model = nn.Sequential(nn.PReLU(init=0.5))
    torchlin.swap_(model, {nn.PReLU: Frozen})
    assert list(model[0]._parameters) == []
    assert model[0].weight.item() == 0.5


def test_dtype_and_device_come_from_the_place() -> None:
    model = Net().to(torch.bfloat16)
    torchlin.swap_(model, {nn.SiLU: nn.PReLU, "head": scaled})  # a SiLU has no dtype: the block around it has
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.head.calls.dtype == torch.int64
    assert model(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    model = Net().to("meta")
    torchlin.swap_(model, {nn.SiLU: nn.PReLU(), "head": scaled})
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_the_nearest_dtype_counts() -> None:
    model = nn.Sequential(Block(nn.SiLU()).bfloat16(), Block(nn.SiLU()).double())
    torchlin.swap_(model, {nn.SiLU: nn.PReLU})
    assert [block.act.weight.dtype for block in model] == [torch.bfloat16, torch.float64]


def test_undo_gives_back_the_dtype_that_was_there() -> None:
    model = Block(nn.PReLU()).bfloat16()
    model.act.float()
    old = torchlin.swap_(model, {nn.PReLU: "test_cube"})
    torchlin.swap_(model, old)
    assert model.act.weight.dtype == torch.float32


def test_the_training_flag_stays() -> None:
    model = Net().eval()
    model.layers[1].act.train()
    torchlin.swap_(model, {nn.SiLU: lambda _: nn.Sequential(nn.Dropout(), Cube())})
    assert [[m.training for m in model.layers[i].act.modules()] for i in (0, 1)] == [[False] * 3, [True] * 3]


def test_hooks_stay_and_their_handles_still_remove() -> None:
    model, x, calls = Net(), torch.randn(3, 4), []

    def hook(name: str) -> Callable[..., None]:
        return lambda *args: calls.append((name, type(args[0]).__name__, len(args)))

    act = model.layers[0].act
    handles = [
        act.register_forward_hook(hook("after")),
        act.register_forward_hook(hook("after with kwargs"), with_kwargs=True, always_call=True),
        act.register_forward_pre_hook(hook("before")),
        act.register_forward_pre_hook(hook("before with kwargs"), with_kwargs=True),
        act.register_full_backward_hook(hook("backward")),
        act.register_full_backward_pre_hook(hook("before backward")),
    ]
    model(x).sum().backward()
    expected = [(name, "Cube", count) for name, _, count in calls]
    assert len(expected) == 6
    old = torchlin.swap_(model, {nn.SiLU: "test_cube"})
    calls.clear()
    model(x).sum().backward()
    assert calls == expected
    for handle in handles:
        handle.remove()
    calls.clear()
    model(x).sum().backward()
    torchlin.swap_(model, old)
    model(x).sum().backward()
    assert calls == []


def test_the_replacements_own_hooks_stay_too() -> None:
    model, calls = Net(), []
    model.layers[0].act.register_forward_hook(lambda *_: calls.append("old"))

    def make(_: nn.Module) -> nn.Module:
        cube = Cube()
        cube.register_forward_hook(lambda *_: calls.append("own"))
        return cube

    torchlin.swap_(model, {"layers.0.act": make})
    model(torch.randn(2, 4))
    assert sorted(calls) == ["old", "own"]


def test_a_wrapper_around_the_old_module_runs_its_hooks_once() -> None:
    model, calls, x = Net(), [], torch.randn(2, 4)
    model.head.register_forward_hook(lambda *_: calls.append(1))
    # Not of the dtype that the wrapper's own tensors would get: what is shared is left alone.
    model.head.register_parameter("a_scale", nn.Parameter(torch.ones(4, dtype=torch.float64)))
    model.head._parameters = dict(sorted(model.head._parameters.items()))
    output = model(x)
    weight = model.head.weight
    old = torchlin.swap_(model, {"head": lambda head: nn.Sequential(head, nn.Identity())})
    assert torch.equal(model(x), output)
    assert calls == [1, 1]
    assert model.head[0].weight is weight
    assert weight.dtype == torch.float32
    assert torchlin.swap_(model, old)["head"][0] is model.head


def test_a_shared_module_gets_one_replacement() -> None:
    act = nn.SiLU()
    model = nn.Sequential(Block(act), Block(act), nn.SiLU())
    before = snapshot(model)
    old = torchlin.swap_(model, {"1.act": nn.PReLU})  # its second name
    assert old == {"0.act": act}
    assert model[0].act is model[1].act
    assert isinstance(model[0].act, nn.PReLU)
    assert isinstance(model[2], nn.SiLU)
    torchlin.swap_(model, old)
    assert snapshot(model) == before


def test_a_module_that_is_also_inside_a_replaced_one() -> None:
    act = nn.SiLU()
    model = nn.Sequential(act, Block(act))
    block, before = model[1], snapshot(model)
    old = torchlin.swap_(model, {nn.SiLU: "test_cube", Block: nn.Identity()})
    assert [type(module) for module in model] == [Cube, nn.Identity]
    assert block.act is act  # what was taken out is whole
    torchlin.swap_(model, old)
    assert snapshot(model) == before


# ------------------------------------------------------------------------------------------------- refusals


def broken(module: nn.Module) -> nn.Module:
    raise RuntimeError("out of stock")


@pytest.mark.parametrize(
    ("replacements", "error", "message"),
    [
        ({nn.SiLU: Cube, nn.Tanh: Cube}, ValueError, "nothing in this Net matches Tanh$"),
        ({"layer.0.act": Cube}, ValueError, r"matches 'layer.0.act' \(closest names: 'layers.0.act'"),
        ({"layers.*.activation": Cube}, ValueError, r"matches 'layers.\*.activation'"),
        ({"": Cube}, ValueError, "'' is the model itself, which has no place to be replaced in"),
        ({Net: Cube}, ValueError, "Net is the model itself"),
        ({3: Cube}, TypeError, "a key must be a module's name, a pattern or a Module class, got 3"),
        ({Tensor: Cube}, TypeError, "a key must be a module's name, a pattern or a Module class, got <class"),
        ({nn.SiLU: "test_cubes"}, UnknownNameError, "the closest: 'test_cube'"),
        ({nn.SiLU: None}, TypeError, r"replacements\[SiLU\] is None; torch.nn.Identity\(\)"),
        ({nn.SiLU: 3}, ValueError, r"replacements\[SiLU\]: no replacement for 'layers.0.act': key must be"),
        ({nn.SiLU: nn.Linear}, ValueError, r"no replacement for 'layers.0.act': .*in_features"),
        ({nn.SiLU: broken}, ValueError, "no replacement for 'layers.0.act': out of stock"),
        ({nn.SiLU: lambda _: torch.tanh}, TypeError, r"must give a Module for 'layers.0.act', got <built-in"),
        ({"head": lambda _: nn.Linear(4, 5)}, ValueError, r"weight of shape \(4, 4\), .* \(5, 4\)"),
    ],
)  # fmt: skip
def test_a_refusal_leaves_the_model_as_it_was(
    replacements: dict, error: type[Exception], message: str
) -> None:
    model = Net()
    model.head.bias.requires_grad_(False)
    before = snapshot(model)
    # Whatever comes first would have worked: all or nothing.
    good = {"layers.2.act": Cube} if "head" not in replacements else {nn.Linear: scaled}
    with pytest.raises(error, match=message):
        torchlin.swap_(model, {**good, **replacements})
    assert snapshot(model) == before
    assert not model.head.bias.requires_grad
    assert all(not module._forward_hooks for module in model.modules())


def test_two_replacements_for_one_module() -> None:
    act = nn.SiLU()
    model = nn.Sequential(Block(act), Block(act))
    with pytest.raises(ValueError, match=r"'0.act' and '1.act' are one module"):
        torchlin.swap_(model, {"0.act": Cube, "1.act": nn.Tanh})
    torchlin.swap_(model, {"0.act": Cube, "1.act": Cube})
    assert model[0].act is model[1].act


def test_weights_that_find_no_place_are_told() -> None:
    model = Net()
    with pytest.warns(UserWarning, match="'head' has bias, for which its replacement Linear has no place"):
        torchlin.swap_(model, {"head": lambda head: nn.Linear(4, 4, bias=False)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing in common: the replacement is another thing
        torchlin.swap_(model, {"head": nn.Identity})


def test_the_kind_of_a_name() -> None:
    model = Net()
    with pytest.raises(UnknownNameError, match="it is a registered norm"):
        torchlin.swap_(model, {nn.SiLU: {"type": "test_layer_norm", "normalized_shape": 8}})
    torchlin.swap_(model, {nn.SiLU: {"type": "test_layer_norm", "normalized_shape": 8}}, kind="norm")
    assert kinds(model) == ["LayerNorm", "LayerNorm", "GELU"]
    with pytest.raises(UnknownNameError, match="kind: 'nrom' is none of"):
        torchlin.swap_(model, {nn.GELU: "test_cube"}, kind="nrom")
