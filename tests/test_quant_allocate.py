"""allocate_bits: exact against brute force and plain dynamic programming, never worse than greedy on the hull."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from torch import nn

from torchlin.quant import HiggsConfig, quantize_
from torchlin.quant._knapsack import multiple_choice
from torchlin.quant.allocate import BitPlan, allocate_bits, default_options, storage_bits
from torchlin.quant.alphas import Alphas, LayerAlpha


def greedy(costs: list[np.ndarray], sizes: list[np.ndarray], budget: int) -> tuple[float, float]:
    """Cost of a greedy choice along the convex hulls, and the cost of its linear relaxation: written apart from the library."""
    steps = []
    room, cost = budget, 0.0
    for c, s in zip(costs, sizes, strict=True):
        points = sorted(zip(s.tolist(), c.tolist(), strict=True))
        hull: list[tuple[int, float]] = []
        for x, y in points:
            if hull and (y >= hull[-1][1] or x == hull[-1][0]):
                continue
            while len(hull) > 1:
                (x0, y0), (x1, y1) = hull[-2:]
                if (y0 - y1) * (x - x1) > (y1 - y) * (x1 - x0):
                    break
                hull.pop()
            hull.append((x, y))
        room -= hull[0][0]
        cost += hull[0][1]
        steps += [(b[0] - a[0], a[1] - b[1]) for a, b in itertools.pairwise(hull)]
    relaxed = None
    for size, saved in sorted(steps, key=lambda step: -step[1] / step[0]):
        if relaxed is None and size > room:
            relaxed = cost - saved * room / size
            break  # a later step of the same layer must not be taken without this one
        room -= size
        cost -= saved
    return cost, cost if relaxed is None else relaxed


def random_instance(rng: np.random.Generator, layers: int, options: int, unit: int) -> tuple:
    sizes = [unit * rng.integers(1, 60, options) for _ in range(layers)]
    costs = [
        rng.gamma(0.5, size=1) * np.exp2(-0.2 * s / unit) * rng.uniform(0.7, 1.4, options) for s in sizes
    ]
    least, most = (sum(int(f(s)) for s in sizes) for f in (np.min, np.max))
    return costs, sizes, int(rng.integers(least, most + 1))


@pytest.mark.parametrize("seed", range(40))
def test_as_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs, sizes, budget = random_instance(rng, layers=5, options=5, unit=int(rng.choice([1, 7, 64])))
    every = itertools.product(range(5), repeat=5)
    fitting = [c for c in every if sum(s[i] for s, i in zip(sizes, c, strict=True)) <= budget]
    best = min(sum(c[i] for c, i in zip(costs, choice, strict=True)) for choice in fitting)
    chosen = multiple_choice(costs, sizes, budget)
    assert sum(s[i] for s, i in zip(sizes, chosen, strict=True)) <= budget
    assert sum(c[i] for c, i in zip(costs, chosen, strict=True)) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_as_a_table_over_every_budget(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    costs, sizes, budget = random_instance(rng, layers=60, options=9, unit=1)
    best = np.zeros(budget + 1)
    for c, s in zip(costs, sizes, strict=True):
        shifted = [
            np.concatenate((np.full(min(k, budget + 1), np.inf), best[: max(budget + 1 - k, 0)])) for k in s
        ]
        best = np.min([row + cost for row, cost in zip(shifted, c, strict=True)], 0)
    chosen = multiple_choice(costs, sizes, budget)
    cost = sum(float(c[i]) for c, i in zip(costs, chosen, strict=True))
    assert sum(int(s[i]) for s, i in zip(sizes, chosen, strict=True)) <= budget
    assert cost == pytest.approx(best[-1], rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_never_worse_than_greedy_and_never_better_than_the_relaxation(seed: int) -> None:
    rng = np.random.default_rng(200 + seed)
    # Numbers of bits without a common divisor: a table over every budget would have 10^9 entries.
    costs, sizes, budget = random_instance(rng, layers=120, options=12, unit=999_983)
    sizes = [s + rng.integers(0, 1000, len(s)) for s in sizes]
    budget += 120_000
    chosen = multiple_choice(costs, sizes, budget)
    cost = sum(float(c[i]) for c, i in zip(costs, chosen, strict=True))
    greedily, relaxed = greedy(costs, sizes, budget)
    assert relaxed - 1e-9 <= cost <= greedily + 1e-12
    # The relaxation splits one step of one layer, so the best choice is at most that step away.
    assert cost - relaxed <= max(float(np.ptp(c)) for c in costs)


def test_budget_that_is_enough_for_everything() -> None:
    plan = allocate_bits(
        {"a": 1.0}, {"a": 10}, 8, [{"n": 4}, {"n": 8}], storage={"a": [20, 30]}, distortion=[0.1, 0.03]
    )
    assert plan["a"] == {"n": 8}
    assert plan.bits == 3.0


def test_budget_that_is_too_small_says_the_least_possible() -> None:
    with pytest.raises(ValueError, match=r"2.5 bits a weight are too few; the smallest options take 3.0000"):
        allocate_bits({"a": 1.0}, {"a": 10}, 2.5, [{"n": 8}], storage={"a": [30]}, distortion=[0.03])


def test_exactly_the_least_possible_is_enough() -> None:
    arguments = {"storage": {"a": [30, 40], "b": [3, 4]}, "distortion": [0.03, 0.01]}
    plan = allocate_bits({"a": 1.0, "b": 1.0}, {"a": 10, "b": 1}, 3.0, [{"n": 8}, {"n": 16}], **arguments)
    assert plan.bits == 3.0
    assert {fields["n"] for fields in plan.values()} == {8}


def test_noisy_and_negative_alphas() -> None:
    layers = {
        "negative": LayerAlpha(-5.0, 0.01, (4, 8)),
        "uncertain": LayerAlpha(-0.5, 3.0, (4, 8)),
        "sure": LayerAlpha(1.0, 0.1, (4, 8)),
        "once": LayerAlpha(-1.0, math.nan, (4, 8)),
    }
    options = [{"n": 4, "p": 1}, {"n": 16, "p": 1}]
    storage = {name: [64, 128] for name in layers}
    plan = allocate_bits(
        Alphas(layers, "loss", 2.0, {}), None, 2.5, options, storage=storage, distortion=[0.1, 0.01]
    )
    assert [plan[name]["n"] for name in layers] == [4, 16, 4, 4]
    # The prediction is of the alphas as they are.
    assert plan.predicted_delta == pytest.approx(-0.5 - 0.005 + 0.1 - 0.1)
    assert plan.metric == "loss"


def test_layers_that_cannot_have_an_option() -> None:
    plan = allocate_bits(
        {"a": 1.0, "b": 2.0}, {"a": 10, "b": 10}, 4, [{"n": 16}, {"n": 8}],
        storage={"a": [None, 30], "b": [40, None]}, distortion=[0.01, 0.03],
    )  # fmt: skip
    assert {name: fields["n"] for name, fields in plan.items()} == {"a": 8, "b": 16}


def test_distortion_of_each_layer() -> None:
    plan = allocate_bits(
        {"a": 1.0, "b": 1.0}, {"a": 10, "b": 10}, 3.5, [{"n": 8}, {"n": 16}],
        storage={"a": [30, 40], "b": [30, 40]}, distortion={"a": [0.03, 0.01], "b": [0.3, 0.01]},
    )  # fmt: skip
    assert {name: fields["n"] for name, fields in plan.items()} == {"a": 8, "b": 16}
    assert plan.predicted_delta == pytest.approx(0.04)
    assert plan.distortion == {"a": 0.03, "b": 0.01}


def test_plan_is_json_and_quantize_follows_it() -> None:
    model = nn.Sequential(nn.Linear(96, 40), nn.ReLU(), nn.Linear(40, 24), nn.Linear(24, 96))
    shapes = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    options = [{"p": 1, "n": n} for n in (4, 8, 11, 16)]
    plan = allocate_bits({"0": 1.0, "2": 3.0, "3": 0.02}, shapes, 4.5, options)
    again = BitPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    report = quantize_(model, HiggsConfig.from_plan(again))
    assert {layer.name: layer.bits * layer.weights for layer in report.layers} == plan.storage
    assert report.bits == pytest.approx(plan.bits)
    assert report.bits <= 4.5
    assert len({fields["n"] for fields in plan.values()}) > 1
    assert "3 layers at" in str(plan)


@pytest.mark.parametrize(
    "fields", [{"p": 1, "n": 16}, {"p": 1, "n": 11, "signs": False}, {"p": 1, "n": 8, "block_size": 32}]
)
@pytest.mark.parametrize("shape", [(5, 96), (3, 160), (7, 32)])
def test_storage_is_what_quantize_stores(shape: tuple[int, int], fields: dict) -> None:
    layer = nn.Linear(shape[1], shape[0])
    report = quantize_(nn.Sequential(layer), HiggsConfig(**fields))
    assert report.layers[0].bits * layer.weight.numel() == storage_bits(shape, fields)


def test_default_options() -> None:
    found = {}
    for fields in default_options():
        bits = (storage_bits((512, 768), fields) - 16 * 512 - 8 * 768) / (512 * 768)
        found.setdefault(round(bits, 2), []).append(fields["p"])
    planar = [2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4, 4.5, 5, 5.5, 6]
    assert sorted(found) == [*planar, 8]
    assert all(2 in found[bits] for bits in planar)
    assert (found[3], found[3.25], found[4], found[8]) == ([2, 3, 4], [2, 3], [2, 3], [1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alphas": [1.0]}, TypeError, "alphas must be Alphas or a dict"),
        ({"alphas": {}}, ValueError, "at least one layer"),
        ({"alphas": {"a": math.nan}}, ValueError, "must be finite, got nan"),
        ({"alphas": {"a": "1"}}, TypeError, r"alphas\['a'\] must be a number, got str"),
        ({"sizes": None}, ValueError, "shapes of the layers' weights are needed"),
        ({"sizes": {"b": 4}}, ValueError, "no size for 'a'"),
        ({"sizes": {"a": 0}}, ValueError, "must be positive, got 0"),
        ({"budget": "4"}, TypeError, "budget must be a number"),
        ({"budget": math.inf}, ValueError, "budget must be finite"),
        ({"options": []}, ValueError, "at least one, got none"),
        ({"storage": {"a": [1]}}, ValueError, "must have 2 numbers, one an option, got 1"),
        ({"storage": {"a": [1.5, 2]}}, ValueError, "whole numbers"),
        ({"storage": {"a": [None, None]}}, ValueError, "leaves no option"),
        ({"storage": None}, ValueError, "must be the weight's shape"),
        ({"distortion": [0.1]}, ValueError, "must have 2 numbers"),
        ({"distortion": [0.1, -1]}, ValueError, "not negative"),
    ],
)  # fmt: skip
def test_bad_arguments(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "alphas": {"a": 1.0}, "sizes": {"a": 10}, "budget": 4.0, "options": [{"n": 8}, {"n": 16}],
        "storage": {"a": [30, 40]}, "distortion": [0.03, 0.01], **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        allocate_bits(**arguments)


def test_block_size_that_fits_no_layer() -> None:
    with pytest.raises(
        ValueError, match=r"none fits 'a' of shape .*block_size must divide in_features = 96, got 64"
    ):
        allocate_bits({"a": 1.0}, {"a": (8, 96)}, 4, [{"p": 1, "n": 16, "block_size": 64}])


def test_model_of_a_real_size_is_quick() -> None:
    rng = np.random.default_rng(0)
    shapes = {}
    for layer in range(30):
        for name, shape in {"q": (576, 576), "k": (192, 576), "up": (1536, 576), "down": (576, 1536)}.items():
            shapes[f"{layer}.{name}"] = shape
    alphas = {name: float(rng.lognormal(-2, 1.5)) for name in shapes}
    options = default_options()
    mse = [2.0 * 2.0 ** (-2 * storage_bits((512, 512), fields) / 512**2) for fields in options]
    bits = []
    for budget in (3.25, 4.0):
        plan = allocate_bits(alphas, shapes, budget, options, distortion=mse)
        bits.append(plan.bits)
        assert 0 <= budget - plan.bits < 1e-3  # less than the smallest step of one layer
    assert bits[0] < bits[1]
