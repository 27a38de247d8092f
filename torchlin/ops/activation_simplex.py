"""Maps onto probabilities: the softmax family, sparse and dense, and what chooses one of many.

Functions that a shift or a scale of their input leaves as it is get it shifted or scaled by a constant of theirs
first, so that nothing overflows. Where a solution has a support, the support is found without history, and the
solution on it is written down again: autograd then has the exact derivatives, of every order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlin.ops._composed import implementation, largest, scalar


def _below_largest(x: Tensor, dim: int) -> Tensor:
    return x - x.detach().amax(dim, keepdim=True)


def _shares(weights: Tensor, dim: int) -> Tensor:
    return weights / weights.sum(dim, keepdim=True)


def _rounds_once(x: Tensor, dim: int) -> Tensor:
    """x, in float32 where torch's own softmax would sum in 16 bits: on a CPU, along another dimension than the last."""
    return x if dim == x.dim() - 1 or not x.is_cpu or x.dtype is torch.float64 else x.float()


@implementation(widen=False, along=True)
def softmax(x: Tensor, *, dim: int) -> Tensor:
    return torch.softmax(_rounds_once(x, dim), dim)


@implementation(widen=False, along=True)
def log_softmax(x: Tensor, *, dim: int) -> Tensor:
    return torch.log_softmax(x.float() if x.is_cpu and x.dtype.itemsize == 2 else x, dim)


@implementation(widen=False, along=True)
def softmin(x: Tensor, *, dim: int) -> Tensor:
    return torch.softmax(_rounds_once(-x, dim), dim)


@implementation(along=True)
def beta_softmax(x: Tensor, *, beta: Any, dim: int) -> Tensor:
    return _tempered(x, scalar("beta", beta, x), dim)


def _tempered(x: Tensor, beta: Any, dim: int) -> Tensor:
    """softmax(beta·x). A masked element, an infinite one, stays out of the gradient by beta."""
    best, worst = x.detach().amax(dim, keepdim=True), x.detach().amin(dim, keepdim=True)
    cool = beta >= 0
    u = x - (torch.where(cool, best, worst) if isinstance(cool, Tensor) else best if cool else worst)
    masked = u.isinf()
    return torch.softmax((beta * u.masked_fill(masked, 0)).masked_fill(masked, -torch.inf), dim)


@implementation(along=True)
def softermax(x: Tensor, *, dim: int) -> Tensor:
    return _shares(torch.exp2(_below_largest(x, dim)), dim)


@implementation(along=True)
def softmax_one(x: Tensor, *, dim: int) -> Tensor:
    top = x.detach().amax(dim, keepdim=True).clamp(min=0)
    e = torch.exp(x - top)
    return e / (torch.exp(-top) + e.sum(dim, keepdim=True))


@implementation(along=True)
def taylor_softmax(x: Tensor, *, dim: int) -> Tensor:
    u = x + 1  # 1 + x + x²/2 = ((x + 1)² + 1)/2, a sum of squares: nothing cancels
    scale = largest(u, dim, 1.0)
    return _shares((u / scale).square() + scale.reciprocal().square(), dim)


@implementation(along=True)
def spherical_softmax(x: Tensor, *, eps: Any, dim: int) -> Tensor:
    scale = largest(x, dim, torch.finfo(x.dtype).tiny ** 0.5)
    return _shares((x / scale).square() + eps / scale / scale, dim)


@implementation(along=True)
def sqmax(x: Tensor, *, c: Any, dim: int) -> Tensor:
    u = x + scalar("c", c, x)
    return _shares((u / largest(u, dim, torch.finfo(x.dtype).tiny)).square(), dim)


@implementation(along=True)
def solu(x: Tensor, *, dim: int) -> Tensor:
    return x * torch.softmax(x, dim)


@implementation(widen=False, along=True)
def hardmax(x: Tensor, *, dim: int) -> Tensor:
    y = _one_hot(x.detach(), dim).to(x.dtype) + torch.sign(x) * 0  # in the graph, with derivative 0
    return y.masked_fill(x.detach().amax(dim, keepdim=True).isnan(), torch.nan)


def _one_hot(x: Tensor, dim: int) -> Tensor:
    """True at the first of the largest elements."""
    return torch.zeros_like(x, dtype=torch.bool).scatter(dim, x.argmax(dim, keepdim=True), True)


@implementation(along=True)
def gumbel_softmax(
    x: Tensor, *, tau: Any, training: bool, generator: torch.Generator | None, dim: int, hard: bool = False
) -> Tensor:
    if training:
        noise = torch.empty_like(x, memory_format=torch.contiguous_format).exponential_(generator=generator)
        x = x - noise.clamp(min=torch.finfo(x.dtype).tiny).log()
    # In evaluation the noise is its mean, one number for all: softmax does not see it.
    y = _tempered(x, 1 / scalar("tau", tau, x), dim)
    return _one_hot(y.detach(), dim) + (y - y.detach()) if hard else y


# ------------------------------------------------------------------------------------------------------ entmax


@implementation(along=True)
def sparsemax(x: Tensor, *, dim: int) -> Tensor:
    return _entmax2(x, dim)


@implementation(along=True)
def entmax(x: Tensor, *, alpha: Any, dim: int) -> Tensor:
    alpha = scalar("alpha", alpha, x)
    if isinstance(alpha, Tensor):
        if alpha.dim() and (alpha.dim() != x.dim() or alpha.shape[dim] != 1):
            raise ValueError(
                f"alpha must be a number, or a tensor of x's {x.dim()} dimensions with size 1 at dim {dim}, "
                f"got shape {tuple(alpha.shape)}"
            )
        return _entmax_by_bisection(x, alpha, dim)
    return {2.0: _entmax2, 1.5: _entmax15}.get(alpha, lambda x, dim: _entmax_by_bisection(x, alpha, dim))(
        x, dim
    )


def _entmax2(x: Tensor, dim: int) -> Tensor:
    """max(0, z - tau): tau lies less than 1 below the largest element, so what is further down is as good as at -1."""
    z = _below_largest(x, dim).clamp(min=-1)
    top = z.detach().sort(dim, descending=True).values
    outside = z.detach() <= _last_above(top, (top.cumsum(dim) - 1) / _counts(top, dim), dim)
    tau = (z.masked_fill(outside, 0).sum(dim, keepdim=True) - 1) / (~outside).sum(dim, keepdim=True)
    return torch.relu(z - tau).masked_fill(outside, 0)


def _entmax15(x: Tensor, dim: int) -> Tensor:
    """max(0, z - tau)² with z = x/2; on a support of n, of mean m, n(m - tau)² + sum (z - m)² = 1."""
    z = (_below_largest(x, dim) / 2).clamp(min=-1)
    top, n = z.detach().sort(dim, descending=True).values, _counts(z, dim)
    mean = top.cumsum(dim) / n
    rest = (1 - top.square().cumsum(dim)) / n + mean.square()
    outside = z.detach() <= _last_above(top, mean - rest.clamp(min=0).sqrt(), dim)
    size = (~outside).sum(dim, keepdim=True)
    mean = z.masked_fill(outside, 0).sum(dim, keepdim=True) / size
    spread = (z - mean).masked_fill(outside, 0).square().sum(dim, keepdim=True)
    tau = mean - ((1 - spread) / size).sqrt()
    return torch.relu(z - tau).masked_fill(outside, 0).square()


def _counts(x: Tensor, dim: int) -> Tensor:
    shape = [-1 if d == dim else 1 for d in range(x.dim())]
    return torch.arange(1, x.shape[dim] + 1, device=x.device, dtype=x.dtype).view(shape)


def _last_above(top: Tensor, taus: Tensor, dim: int) -> Tensor:
    """The threshold of the support: of the elements in falling order, as many as lie above theirs."""
    size = (top > taus).sum(dim, keepdim=True).clamp(min=1)  # 0 in a row with a NaN
    return taus.gather(dim, size - 1)


def _entmax_by_bisection(x: Tensor, alpha: Any, dim: int) -> Tensor:
    """max(0, (alpha - 1)x - tau)^(1/(alpha - 1)), sum 1.

    Two steps of Newton's method, which alone are differentiated, follow the bisection: at a root the first makes
    the first derivatives exact, the second those up to the third order.
    """
    u = _below_largest(x, dim).clamp(
        min=torch.finfo(x.dtype).min
    )  # a masked -inf must not meet the derivative 0
    z, power = ((alpha - 1) * u).clamp(min=-1), 1 / (alpha - 1)
    fixed, p = z.detach(), power.detach() if isinstance(power, Tensor) else power
    low = torch.full_like(fixed.amax(dim, keepdim=True), -1)
    high = low * x.shape[dim] ** (-1 / p)  # all shares equal: the largest is never smaller
    for _ in range(54 if x.dtype is torch.float64 else 25):
        middle = (low + high) / 2
        enough = (fixed - middle).clamp(min=0).pow(p).sum(dim, keepdim=True) >= 1
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    outside = fixed <= low
    tau, tiny = low, torch.finfo(x.dtype).tiny
    for _ in range(2):
        gap = (z - tau).clamp(min=tiny).masked_fill(outside, 1)
        mass = gap.pow(power).masked_fill(outside, 0).sum(dim, keepdim=True)
        slope = power * gap.pow(power - 1).masked_fill(outside, 0).sum(dim, keepdim=True)
        tau = tau + (mass - 1) / slope
    return (z - tau).clamp(min=tiny).masked_fill(outside, 1).pow(power).masked_fill(outside, 0)


# ------------------------------------------------------------------------------------------------------ GP-, GL-softmax


@implementation(along=True)
def gp_softmax(x: Tensor, *, a: Any, b: Any, c: Any, d: Any, dim: int, mean: str = "power") -> Tensor:
    if mean not in ("power", "lehmer"):
        raise ValueError(f"mean must be 'power' or 'lehmer', got {mean!r}")
    (a, b), (c, d) = (
        [_as_tensor(n, v, x) for n, v in pair] for pair in ((("a", a), ("b", b)), (("c", c), ("d", d)))
    )
    centred = x - _generalized_mean(x, a, b, dim, mean)
    spread = _generalized_mean(centred, c, d, dim, mean)
    flat = spread == 0  # equal elements: equal shares
    return torch.softmax((centred / spread.masked_fill(flat, 1)).masked_fill(flat, 0), dim)


def _as_tensor(name: str, value: Any, x: Tensor) -> Tensor:
    value = scalar(name, value, x)
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=x.dtype, device=x.device)


def _generalized_mean(x: Tensor, base: Tensor, factor: Tensor, dim: int, kind: str) -> Tensor:
    """GPM = ln(mean base^(factor·x))/(factor ln base), or GLM = ln(sum base^((factor + 1)x)/sum base^(factor·x))/ln base."""
    rate = base.log()
    if kind == "power":
        return _exponential_mean(x, factor * rate, dim)
    upper, lower = _exponential_mean(x, (factor + 1) * rate, dim), _exponential_mean(x, factor * rate, dim)
    return (factor + 1) * upper - factor * lower


def _exponential_mean(x: Tensor, t: Tensor, dim: int) -> Tensor:
    """ln(mean exp(t·x))/t, which goes to the mean of x as t goes to 0."""
    mean = x.mean(dim, keepdim=True)
    u = x - mean
    scale = largest(u, dim, torch.finfo(x.dtype).tiny)
    r = t * scale
    near, far = r.detach().abs() < 1e-2, r.detach().abs() > 30
    v = (u / scale).masked_fill(~near, 0)
    m2, m3, m4 = (v.pow(k).mean(dim, keepdim=True) for k in (2, 3, 4))
    series = scale * (r * (m2 / 2 + r * (m3 / 6 + r * (m4 - 3 * m2.square()) / 24)))
    safe = torch.where(near, torch.ones_like(t), t)
    exponent = safe * u
    middle = torch.log1p(torch.expm1(exponent.masked_fill(near | far, 0)).mean(dim, keepdim=True)) / safe
    wide = (
        torch.logsumexp(exponent, dim, keepdim=True) - torch.log(_counts(x, dim).amax(dim, keepdim=True))
    ) / safe
    return mean + torch.where(near, series, torch.where(far, wide, middle))
