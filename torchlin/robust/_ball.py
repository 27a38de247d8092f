"""Where an attack may go: a ball around each sample, and the range of the inputs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchlin.functional import sample_triplet
from torchlin.ops._checks import check_float_tensor

NORMS = ("linf", "l2")
Eps = float | Tensor
Clip = tuple[float | Tensor, float | Tensor] | None


def normalized_ball(eps: float, mean: Any, std: Any) -> dict[str, Any]:
    """`eps` and `clip` of inputs that were normalised, (pixel - mean) / std with pixels in [0, 1].

    Args:
        eps: radius in pixels, as 8 / 255.
        mean, std: sequences of C numbers, or tensors (C,).

    Returns:
        {"eps": (C,), "clip": ((C, 1, 1), (C, 1, 1))}: keyword arguments of the attacks, of ``evaluate`` and of ``train``.

    Example:
        >>> from torchlin.robust import normalized_ball
        >>> normalized_ball(0.1, [0.5, 0.0], [0.5, 1.0])["eps"]
        tensor([0.2000, 0.1000])
    """
    mean, std = torch.as_tensor(mean, dtype=torch.float32), torch.as_tensor(std, dtype=torch.float32)
    if mean.shape != std.shape or mean.dim() != 1:
        raise ValueError(
            f"mean and std must be of one number a channel, got shapes {tuple(mean.shape)} and {tuple(std.shape)}"
        )
    low, high = ((edge - mean) / std for edge in (0.0, 1.0))
    return {"eps": eps / std, "clip": (low[:, None, None], high[:, None, None])}


def check_norm(norm: object) -> str:
    """The norm's name in lower case ("Linf" as in other libraries is fine)."""
    if not isinstance(norm, str) or norm.lower() not in NORMS:
        raise ValueError(f'norm must be "linf" or "l2", got {norm!r}')
    return norm.lower()


def check_eps(eps: object, name: str = "eps") -> Eps:
    """A radius: a number, or a tensor of numbers, none of them negative or NaN."""
    if isinstance(eps, Tensor):
        if not eps.is_floating_point():
            raise TypeError(f"{name} must be a float or a tensor of floats, got {eps.dtype}")
        if not bool((eps >= 0).all()):
            raise ValueError(f"{name} must not be negative or NaN, got {eps.tolist()}")
        return eps.item() if eps.dim() == 0 and eps.device.type == "cpu" else eps
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{name} must be a float or a tensor of floats, got {type(eps).__name__}")
    if not eps >= 0 or math.isinf(eps):
        raise ValueError(f"{name} must be a finite number >= 0, got {eps}")
    return float(eps)


def like(value: Eps, x: Tensor, name: str) -> Eps:
    """A number or tensor in a form that broadcasts against x (B, C, ...); (C,) counts along dim 1."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(device=x.device, dtype=x.dtype)
    if value.dim() == 1 and x.dim() > 1 and len(value) == x.shape[1]:
        return value.view(1, -1, *[1] * (x.dim() - 2))
    try:
        fits = torch.broadcast_shapes(value.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        channels = f", one a channel ({x.shape[1]},)" if x.dim() > 1 else ""
        raise ValueError(
            f"{name} must be a number{channels}, or broadcast to x {tuple(x.shape)}, got {tuple(value.shape)}"
        )
    return value.view(*[1] * (x.dim() - value.dim()), *value.shape)


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """(B,) in a form that broadcasts against x (B, ...)."""
    return values.view(-1, *[1] * (x.dim() - 1))


def norms(x: Tensor) -> Tensor:
    """The l2 norm of each sample, in the shape (B, 1, ..., 1).

    Of what is divided by its largest element first: a squared gradient of 1e-30 would underflow.
    """
    flat = x.flatten(1)
    largest = flat.abs().amax(1, keepdim=True) if flat.shape[1] else flat.new_zeros(len(flat), 1)
    scaled = flat / largest.where(largest > 0, torch.ones_like(largest))
    return per_sample(scaled.norm(dim=1) * largest[:, 0], x)


def direction(gradient: Tensor, norm: str) -> Tensor:
    """The step of length 1 that gains most: the sign of the gradient, or the gradient over its l2 norm. 0 where that is 0."""
    if norm == "linf":
        return gradient.sign()
    length = norms(gradient)
    return gradient / length.where(length > 0, torch.ones_like(length))


@dataclass(frozen=True)
class Ball:
    """The points within eps of x that are inside of clip. A row of x is a sample: (B, ...)."""

    x: Tensor
    eps: Eps
    norm: str
    clip: Clip
    alpha: Eps  # the length of a step

    @staticmethod
    def around(
        x: Tensor, eps: Eps, norm: str, clip: Clip, alpha: Eps | None = None, share: float = 0.25
    ) -> Ball:
        """Checks the arguments of an attack; without alpha, a step is that share of eps."""
        check_float_tensor("x", x)
        if x.dim() < 2:
            raise ValueError(f"x must have a dimension of samples and others, got shape {tuple(x.shape)}")
        norm, eps = check_norm(norm), like(check_eps(eps), x, "eps")
        if norm == "l2" and isinstance(eps, Tensor) and any(size > 1 for size in eps.shape[1:]):
            raise ValueError(f'eps must be one number a sample with norm="l2", got {tuple(eps.shape)}')
        alpha = share * eps if alpha is None else like(check_eps(alpha, "alpha"), x, "alpha")
        return Ball(x.detach(), eps, norm, check_clip(clip, x), alpha)

    @property
    def low(self) -> Tensor:
        """The smallest coordinates inside of the cube."""
        low = self.x - self.eps
        return low if self.clip is None else torch.maximum(low, torch.as_tensor(self.clip[0]).to(low))

    @property
    def high(self) -> Tensor:
        high = self.x + self.eps
        return high if self.clip is None else torch.minimum(high, torch.as_tensor(self.clip[1]).to(high))

    def inside_clip(self, z: Tensor) -> Tensor:
        return z if self.clip is None else z.clamp(*(torch.as_tensor(edge).to(z) for edge in self.clip))

    def project(self, z: Tensor) -> Tensor:
        """The nearest point of the ball; for l2 of the ball, and then of the clip range, which leads no way out of it."""
        if self.norm == "linf":
            return z.clamp(self.low, self.high)
        offset = z - self.x
        length = norms(offset)
        shrink = (self.eps / length.where(length > 0, torch.ones_like(length))).clamp(max=1.0)
        return self.inside_clip(self.x + offset * shrink)

    def step(self, z: Tensor, gradient: Tensor) -> Tensor:
        """From z one step along a gradient, and back into the ball."""
        return self.project(z + self.alpha * direction(gradient, self.norm))

    def random(self, generator: torch.Generator | None) -> Tensor:
        """A point of the ball, uniformly; then the nearest one inside of clip."""
        x = self.x
        if self.norm == "linf":
            return self.project(x + self.eps * uniform(x, generator))
        offset = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        radius = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)
        radius = per_sample(radius ** (1 / max(1, x[:1].numel())), x)
        return self.project(x + self.eps * radius * direction(offset, "l2"))

    def select(self, index: Tensor) -> Ball:
        """The balls of some of the samples."""

        def rows(value: Any) -> Any:
            of_samples = isinstance(value, Tensor) and value.dim() == self.x.dim() and len(value) > 1
            return value[index] if of_samples else value

        clip = None if self.clip is None else (rows(self.clip[0]), rows(self.clip[1]))
        return dataclasses.replace(
            self, x=self.x[index], eps=rows(self.eps), clip=clip, alpha=rows(self.alpha)
        )


def uniform(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers uniform in [-1, 1) in the shape of x."""
    return torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype).mul_(2).sub_(1)


def check_clip(clip: object, x: Tensor) -> Clip:
    if clip is None:
        return None
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise TypeError(f"clip must be (lowest, highest) or None, got {clip!r:.100}")
    low, high = (like(edge, x, "clip") if isinstance(edge, Tensor) else float(edge) for edge in clip)
    if not isinstance(low, Tensor) and not isinstance(high, Tensor) and not low < high:
        raise ValueError(f"clip must be (lowest, highest) with lowest < highest, got ({low}, {high})")
    return low, high


def triplet(
    x: Tensor, eps: Eps, norm: Any, clip: Any, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """:func:`torchlin.functional.sample_triplet`, whose clip are numbers, with clip tensors too."""
    if clip is None or not any(isinstance(edge, Tensor) for edge in clip):
        return sample_triplet(x, eps, norm=norm, clip=clip, generator=generator)
    points, mix = sample_triplet(x, eps, norm=norm, generator=generator)
    low, high = (torch.as_tensor(edge).to(x) for edge in clip)
    a, b, _ = points.chunk(3)
    a, b = a.clamp(low, high), b.clamp(low, high)
    return torch.cat((a, b, torch.lerp(a, b, per_sample(mix, a).to(a.dtype)))), mix
