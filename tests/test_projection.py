"""Projection heads and the spectral contrastive loss: definitions, closed forms, what trains and what is taken off."""

from __future__ import annotations

import copy
import doctest
import itertools
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchlin
from torchlin.nn import (
    IdentityHead,
    ProjectionHead,
    ReweightingHead,
    SymmetricReLU,
    projection,
    spectral_contrastive_loss,
    strip_heads_,
)

HEADS = {
    "mlp": lambda: ProjectionHead(6, 8, 6, 3),
    "reweighting": lambda: ReweightingHead(6, 1.25),
    "identity": lambda: IdentityHead(6, bias=True),
}


def test_page_runs() -> None:
    """The code on docs/projection-head.md, block after block in one namespace."""
    page = (Path(__file__).parents[1] / "docs" / "projection-head.md").read_text()
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, namespace)
    assert namespace["features"].shape == (16, 512)
    assert "κ = 1.05 has none, κ = 1.1 has 957" in page
    assert (torch.tensor([1.05, 1.1]).log() * torch.tensor([2047.0, 1091.0])).tolist() == pytest.approx(
        [99.9, 103.98], abs=0.05
    )


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_examples() -> None:
    found = doctest.testmod(projection, extraglobs={"torch": torch, "torchlin": torchlin})
    assert found.failed == 0
    assert found.attempted > 10


# ------------------------------------------------------------------------------------------- projection head


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", None])
@pytest.mark.parametrize("last_norm", [False, True])
def test_mlp_is_written_out(layers: int, norm: str | None, last_norm: bool) -> None:
    head = ProjectionHead(5, 7, 3, layers, norm, "gelu", last_norm=last_norm, dtype=torch.float64)
    x = double(9, 5)
    y, modules = x, list(head.layers)
    for i in range(layers):
        is_last = i == layers - 1
        linear = modules.pop(0)
        assert linear.in_features == (7 if i else 5)
        assert linear.out_features == (3 if is_last else 7)
        normed = norm is not None and (last_norm or not is_last)
        assert (linear.bias is None) == normed
        y = y @ linear.weight.T + (0 if normed else linear.bias)
        if normed:
            modules.pop(0)
            over = 0 if norm == "batch_norm" else 1
            y = (y - y.mean(over, keepdim=True)) / (y.var(over, correction=0, keepdim=True) + 1e-5).sqrt()
        if not is_last:
            modules.pop(0)
            y = nn.functional.gelu(y)
    assert not modules
    torch.testing.assert_close(head(x), y)


def test_leading_dimensions_are_one_batch() -> None:
    head, x = ProjectionHead(5, 7, 3), torch.randn(4, 6, 5)
    torch.testing.assert_close(head(x).reshape(24, 3), head(x.reshape(24, 5)))
    assert ProjectionHead(5, 7, 3, norm=None)(torch.randn(5)).shape == (3,)
    assert ProjectionHead(5, 7, 3, norm=None)(torch.randn(0, 5)).shape == (0, 3)


def test_norm_and_act_may_be_anything() -> None:
    head = ProjectionHead(4, 6, 2, norm=lambda n: nn.GroupNorm(2, n), act=None, bias=False)
    assert [type(m) for m in head.layers] == [nn.Linear, nn.GroupNorm, nn.Linear]
    assert head.layers[2].bias is None
    assert isinstance(ProjectionHead(4, 6, 2, act={"type": "leaky_relu"}).layers[2], nn.Module)


# --------------------------------------------------------------------------------------------- reweighting


def test_reweighting_is_its_diagonal_matrix() -> None:
    head, x = ReweightingHead(7, 1.5, dtype=torch.float64), double(4, 7)
    matrix = torch.diag(torch.tensor([1.5**-i for i in range(7)], dtype=torch.float64))
    torch.testing.assert_close(head(x), x @ matrix)
    gradient = torch.autograd.functional.jacobian(head, x[0])
    torch.testing.assert_close(gradient, matrix)
    assert list(head.parameters()) == []
    assert list(head.state_dict()) == ["weight"]
    x = torch.randn(3, 7)
    assert torch.equal(ReweightingHead(7, 1.0)(x), x)


def test_reweighting_underflows_where_it_says() -> None:
    dim, kappa = 2048, 1.1
    with pytest.warns(RuntimeWarning, match=r"features from 1091 to 2047 have weight 0 in torch.float32"):
        weight = ReweightingHead(dim, kappa).weight
    exact = torch.exp(-math.log(kappa) * torch.arange(dim, dtype=torch.float64))
    assert int((weight == 0).sum()) == int((exact.float() == 0).sum()) == dim - 1091
    assert 1090 < 103.97 / math.log(kappa) < 1091
    normal = torch.arange(dim) < 87.33 / math.log(kappa)
    assert (weight[normal] >= torch.finfo(torch.float32).tiny).all()
    assert (weight[~normal] < 1.01 * torch.finfo(torch.float32).tiny).all()
    torch.testing.assert_close(weight[normal].double(), exact[normal], rtol=6e-8, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ReweightingHead(2048, 1.05)
        ReweightingHead(2048, 1.1, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reweighting_of_half_is_rounded_once(dtype: torch.dtype) -> None:
    head, x = ReweightingHead(50, 1.3), torch.randn(3, 50).to(dtype)
    assert torch.equal(head(x), (x.float() * head.weight).to(dtype))


# ------------------------------------------------------------------------- the soft threshold, the identity head


@pytest.mark.parametrize("b", [0.7, 0.0, -0.7])
def test_symmetric_relu(b: float) -> None:
    f, x = SymmetricReLU(b, dtype=torch.float64), torch.linspace(-2, 2, 401, dtype=torch.float64)
    x.requires_grad_()
    expected = torch.relu(x - f.b) - torch.relu(-x - f.b)
    torch.testing.assert_close(f(x), expected, rtol=0, atol=1e-15)
    inside = (x.abs() - abs(b)).abs() > 1e-3  # kinks have a derivative from each side
    if b == 0:
        inside = x.abs() > 1e-3
    weight = torch.where(inside, torch.randn_like(x), 0)
    got = torch.autograd.grad(f(x), (x, f.b), weight)
    torch.testing.assert_close(got, torch.autograd.grad(expected, (x, f.b), weight))
    if b >= 0:
        torch.testing.assert_close(f(x), nn.functional.softshrink(x, b))


def test_threshold_leaves_zero_to_either_side() -> None:
    for sign in (1.0, -1.0):
        f = SymmetricReLU()
        sgd = torch.optim.SGD(f.parameters(), lr=0.1)
        (sign * f(torch.ones(3)).sum()).backward()
        sgd.step()
        assert f.b.item() == pytest.approx(0.3 * sign)


@pytest.mark.parametrize("bias", [False, True])
def test_identity_head_starts_as_the_identity(bias: bool) -> None:
    head, x = IdentityHead(5, bias=bias), torch.randn(4, 5)
    assert torch.equal(head(x), x)
    head(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


# ------------------------------------------------------------------------------------------- what all heads share


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_left_out_saved_copied_and_compiled(name: str) -> None:
    head, x = HEADS[name]().eval(), torch.randn(8, 6)
    assert head(x, use_head=False) is x
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    other = HEADS[name]().eval()
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(x), head(x))
    assert torch.equal(copy.deepcopy(head)(x), head(x))
    torch.testing.assert_close(torch.compile(head, fullgraph=True, backend="aot_eager")(x), head(x))
    with pytest.raises(ValueError, match=r"x must have last dimension 6, got shape \(2, 5\)"):
        head(torch.randn(2, 5))
    with pytest.raises(TypeError, match="x must be float32"):
        head(torch.ones(2, 6, dtype=torch.int64))


def test_heads_are_stripped_and_put_back() -> None:
    body = nn.Linear(4, 6)
    model = nn.ModuleDict({"body": body, "top": nn.Sequential(HEADS["mlp"](), HEADS["reweighting"]())})
    heads = strip_heads_(model)
    assert sorted(heads) == ["top.0", "top.1"]
    x = torch.randn(3, 6)
    assert model["top"](x) is x
    assert model["body"] is body
    torchlin.swap_(model, heads)
    assert model["top"][0] is heads["top.0"]
    with pytest.raises(ValueError, match="model has none of ProjectionHead, ReweightingHead, IdentityHead"):
        strip_heads_(body)
    with pytest.raises(ValueError, match="model is a ReweightingHead itself"):
        strip_heads_(heads["top.1"])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ProjectionHead(0, 4, 4), "input_dim must be a positive int, got 0"),
        (lambda: ProjectionHead(4, True, 4), "hidden_dim must be a positive int, got True"),
        (lambda: ProjectionHead(4, 4, 2.0), "output_dim must be a positive int, got 2.0"),
        (lambda: ProjectionHead(4, 4, 4, 0), "num_layers must be a positive int, got 0"),
        (lambda: ProjectionHead(4, 4, 4, norm="bn"), "norm must be 'batch_norm', 'layer_norm', a function or None"),
        (lambda: ReweightingHead(4, 0.9), "kappa must be a finite number of at least 1, got 0.9"),
        (lambda: ReweightingHead(4, math.inf), "kappa must be a finite number"),
        (lambda: SymmetricReLU(math.nan), "b must be a finite number, got nan"),
        (lambda: IdentityHead(-1), "dim must be a positive int, got -1"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


# ------------------------------------------------------------------------------------------ spectral contrastive


def pairs(z1: Tensor, z2: Tensor) -> Tensor:
    """The loss, pair by pair."""
    n = len(z1)
    negatives = [(z1[i] @ z2[j]) ** 2 for i, j in itertools.permutations(range(n), 2)]
    return (
        -2 * torch.stack([a @ b for a, b in zip(z1, z2, strict=True)]).mean() + torch.stack(negatives).mean()
    )


@pytest.mark.parametrize("shape", [(2, 1), (2, 5), (6, 3), (5, 5), (4, 9)])
def test_loss_is_its_sum_over_pairs(shape: tuple[int, int]) -> None:
    z1, z2 = double(*shape).requires_grad_(), double(*shape).requires_grad_()
    torch.testing.assert_close(spectral_contrastive_loss(z1, z2), pairs(z1, z2))
    assert torch.autograd.gradcheck(spectral_contrastive_loss, (z1, z2))
    assert torch.autograd.gradgradcheck(spectral_contrastive_loss, (z1, z2))


def population(n: int) -> Tensor:
    """p(x, y) of positive pairs: symmetric, of sum 1."""
    p = torch.rand(n, n, dtype=torch.float64).square()
    p = p + p.T
    return p / p.sum()


def test_expectation_is_the_low_rank_factorisation() -> None:
    """All batches of two pairs of a population of four, each with its probability."""
    p, z = population(4), double(4, 2)
    couples = list(itertools.product(range(4), repeat=2))
    expected = sum(
        p[a] * p[b] * spectral_contrastive_loss(z[[a[0], b[0]]], z[[a[1], b[1]]])
        for a, b in itertools.product(couples, repeat=2)
    )
    marginal = p.sum(1)
    similarity = p / (marginal.outer(marginal)).sqrt()
    rows = marginal.sqrt().unsqueeze(1) * z
    factorised = (similarity - rows @ rows.T).square().sum() - similarity.square().sum()
    torch.testing.assert_close(expected, factorised)


def test_its_minimum_is_made_of_eigenvectors() -> None:
    """Eckart, Young and Mirsky: the smallest loss of rank k is minus the sum of the k largest squared eigenvalues."""
    p = population(6)
    p = p + torch.diag(p.sum(1))  # augmentations of one sample are alike: no negative eigenvalue
    p = p / p.sum()
    marginal = p.sum(1)
    similarity = p / (marginal.outer(marginal)).sqrt()
    values, vectors = torch.linalg.eigh(similarity)

    def loss(z: Tensor) -> Tensor:
        return -2 * (p * (z @ z.T)).sum() + (marginal.outer(marginal) * (z @ z.T).square()).sum()

    for rank in (1, 3):
        best = vectors[:, -rank:] * values[-rank:].sqrt() / marginal.sqrt().unsqueeze(1)
        torch.testing.assert_close(loss(best), -values[-rank:].square().sum())
        assert all(loss(best + 0.1 * double(6, rank)) > loss(best) for _ in range(20))
    assert values[-1].item() == pytest.approx(1)  # whose eigenvector is a constant function


def test_loss_rotates_and_half_is_computed_in_float() -> None:
    z1, z2 = double(7, 4), double(7, 4)
    q, _ = torch.linalg.qr(double(4, 4))
    torch.testing.assert_close(spectral_contrastive_loss(z1 @ q, z2 @ q), spectral_contrastive_loss(z1, z2))
    half = z1.bfloat16()
    got = spectral_contrastive_loss(half, half)
    assert got.dtype is torch.float32
    assert torch.equal(got, spectral_contrastive_loss(half.float(), half.float()))
    x1, x2 = torch.randn(7, 4), torch.randn(7, 4)
    fast = torch.compile(spectral_contrastive_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(x1, x2), spectral_contrastive_loss(x1, x2))


def test_linear_map_of_least_loss() -> None:
    """Independent features of noise s_i: |W e_i| = 1 / (1 + s_i^2), and gradient descent on two balanced layers of
    little weight shares it equally: sqrt of it before the head. The population's loss, so that this is exact."""
    noise = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    sigma, expected = 1 + noise.square(), 1 / (1 + noise.square())
    first, _ = torch.linalg.qr(double(4, 4))
    second, _ = torch.linalg.qr(double(4, 4))
    layers = [(0.1 * first).requires_grad_(), (0.1 * second).requires_grad_()]
    for _ in range(3000):
        w = layers[1] @ layers[0]
        gram = w.T @ w
        loss = -2 * gram.trace() + ((gram * sigma) @ (gram * sigma)).trace()
        for layer, g in zip(layers, torch.autograd.grad(loss, layers), strict=True):
            layer.data -= 0.02 * g
    torch.testing.assert_close((layers[1] @ layers[0]).norm(dim=0).detach(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(layers[0].norm(dim=0).detach(), expected.sqrt(), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("z1", "z2", "error", "says"),
    [
        (torch.ones(3), torch.ones(3), ValueError, r"z1 must have shape \(B, D\), got \(3,\)"),
        (torch.ones(3, 2), torch.ones(3, 4), ValueError, r"z2 must have z1's shape \(3, 2\), got \(3, 4\)"),
        (torch.ones(1, 2), torch.ones(1, 2), ValueError, "z1 must have at least two samples"),
        (torch.ones(3, 2), torch.ones(3, 2).double(), TypeError, "z2 must have z1's dtype"),
        (torch.ones(3, 2).long(), torch.ones(3, 2), TypeError, "z1 must be float32"),
        ([1.0], torch.ones(3, 2), TypeError, "z1 must be a torch.Tensor, got list"),
    ],
)
def test_loss_names_bad_arguments(z1, z2, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        spectral_contrastive_loss(z1, z2)
