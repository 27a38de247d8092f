"""mixup and cutmix: the battery, and what is particular to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import battery
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchlin.functional import cutmix, mixup
from torchlin.ops.mixup import cutmix_boxes, cutmix_reference, mixup_reference

ROOT = Path(__file__).resolve().parents[1]


def partners(*indices: int, device: Any = "cpu") -> Tensor:
    return torch.tensor(indices, device=device, dtype=torch.int64)


def mixup_samples(device: torch.device, dtype: torch.dtype) -> Iterator[battery.Sample]:
    def x(*shape: int, grad: bool = True) -> Tensor:
        return battery.randn(*shape, device=device, dtype=dtype, requires_grad=grad)

    def lam(*shape: int) -> Tensor:
        values = battery.randn(*shape, device=device, dtype=torch.float64, requires_grad=False).sigmoid()
        return values.to(dtype).requires_grad_()

    yield battery.Sample("rows", x(4, 6), 0.3, partners(1, 2, 3, 0, device=device))
    yield battery.Sample("one", x(1), lam(1), partners(0, device=device))
    yield battery.Sample("empty", x(0, 5), 0.5, partners(device=device))
    yield battery.Sample("each", x(3, 13), lam(3), partners(2, 2, 2, device=device))
    yield battery.Sample("same for all", x(3, 2, 3, 5), lam(), partners(2, 0, 0, device=device))
    yield battery.Sample("images", x(4, 3, 2, 8), lam(4), partners(3, 3, 0, 2, device=device))
    yield battery.Sample("large", x(9, 2, 63, 64), lam(9), partners(8, 7, 6, 5, 4, 3, 2, 1, 1, device=device))


def cutmix_samples(device: torch.device, dtype: torch.dtype) -> Iterator[battery.Sample]:
    def x(*shape: int) -> Tensor:
        return battery.randn(*shape, device=device, dtype=dtype)

    def boxes(*rows: list[int]) -> Tensor:
        return torch.tensor(rows[0] if len(rows) == 1 else rows, device=device)

    yield battery.Sample(
        "images", x(3, 2, 5, 7), None, partners(1, 2, 0, device=device), boxes=boxes([1, 4, 2, 7])
    )
    yield battery.Sample(
        "each",
        x(3, 2, 4, 8),
        None,
        partners(2, 0, 0, device=device),
        boxes=boxes([0, 4, 0, 8], [1, 3, 2, 5], [2, 2, 1, 6]),
    )
    yield battery.Sample("one", x(1, 1, 1), None, partners(0, device=device), boxes=boxes([0, 1, 0, 1]))
    yield battery.Sample("empty", x(0, 3, 2, 2), None, partners(device=device), boxes=boxes([0, 1, 0, 1]))
    yield battery.Sample(
        "video",
        x(2, 2, 2, 3, 3),
        None,
        partners(1, 1, device=device),
        boxes=boxes([0, 2, 1, 3], [1, 3, 0, 3]),
    )
    swap = partners(1, 0, device=device)
    yield battery.Sample("large", x(2, 3, 104, 107), None, swap, boxes=boxes([3, 90, 11, 107]))


def emulated() -> dict[str, Callable[..., Any]]:
    from simt import mixup as device

    return {
        "_mixup_fwd": device.forward,
        "_mixup_bwd": device.backward,
        "_mixup_lam_bwd": device.lam_backward,
        "_mixup_cut_fwd": device.cut_forward,
        "_mixup_cut_bwd": device.cut_backward,
    }


MIXUP = battery.Op(
    name="mixup",
    public=mixup,
    reference=mixup_reference,
    samples=mixup_samples,
    raw=("_mixup_fwd", "_mixup_bwd", "_mixup_lam_bwd"),
    ulps=2.0,  # λ's gradient is one number, a sum in which much cancels
    preserves_format=True,
    forward_ad=True,
    emulated=emulated,
)
CUTMIX = battery.Op(
    name="cutmix",
    public=lambda *args, **kwargs: cutmix(*args, **kwargs)[0],
    reference=lambda *args, **kwargs: cutmix_reference(*args, **kwargs)[0],
    samples=cutmix_samples,
    raw=("_mixup_cut_fwd", "_mixup_cut_bwd"),
    preserves_format=True,
    forward_ad=True,
    emulated=emulated,
)

test_battery = battery.tests(MIXUP, CUTMIX)


def layouts(x: Tensor) -> Iterator[Tensor]:
    for name, (fits, make) in battery.LAYOUTS.items():
        if name != "expanded" and fits(x):
            yield make(x)
    if x.dim() == 4:
        yield x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)  # channels between height and width
        yield x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)  # along columns
        yield x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)  # the batch inside


@pytest.mark.parametrize("dtype", battery.FLOATS)
def test_values_are_the_reference_to_the_last_bit(dtype) -> None:
    """On every CPU level, for every layout, and by the CUDA kernels on the emulator."""
    from simt import mixup as device

    x = torch.randn(5, 3, 6, 8, dtype=torch.float64).to(dtype)
    perm = partners(1, 1, 0, 4, 2)
    boxes = cutmix_boxes(torch.rand(5), 6, 8)
    for lam in (0.3, torch.tensor(0.7), torch.rand(5)):
        expected = battery.bits(mixup_reference(x, lam, perm))
        for level in battery.cpu_isa_levels():
            with level:
                assert all(battery.bits(mixup(laid, lam, perm)) == expected for laid in layouts(x))
    lams = torch.rand(5, dtype=torch.float64).to(torch.float64 if dtype is torch.float64 else torch.float32)
    raw, grad = torch.ops.torchlin, torch.randn(5, 3, 6, 8, dtype=torch.float64).to(dtype)
    for laid in layouts(x):
        assert battery.bits(cutmix(laid, None, perm, boxes=boxes)[0]) == battery.bits(
            cutmix_reference(x, None, perm, boxes=boxes)[0]
        )
        g = torch.empty_like(laid).copy_(grad)
        for weights in (None, lams):
            assert battery.bits(device.forward(laid, 0.3, weights, perm)) == battery.bits(
                raw._mixup_fwd(laid, 0.3, weights, perm)
            )
            assert battery.bits(device.backward(g, 0.3, weights, perm)) == battery.bits(
                raw._mixup_bwd(g, 0.3, weights, perm)
            )
        assert battery.bits(device.cut_backward(g, perm, boxes)) == battery.bits(
            raw._mixup_cut_bwd(g, perm, boxes)
        )


def test_mixup_known_values() -> None:
    x = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    perm = partners(1, 2, 2)
    assert torch.equal(mixup(x, 0.5, perm), torch.tensor([[1.5, 15.0], [3.0, 30.0], [4.0, 40.0]]))
    assert torch.equal(mixup(x, torch.tensor([1.0, 0.0, 0.5]), perm), x[[0, 2, 2]])
    lam = torch.tensor([0.25, 0.5, 1.0], requires_grad=True)
    x.requires_grad_()
    dx, dlam = torch.autograd.grad(mixup(x, lam, perm).sum(), (x, lam))
    assert torch.equal(dlam, torch.tensor([-11.0, -22.0, 0.0]))
    assert torch.equal(dx[:, 0], torch.tensor([0.25, 0.5 + 0.75, 1.0 + 0.5 + 0.0]))


def test_mixup_of_labels_is_the_loss_of_pairs() -> None:
    """Dense labels and features may have weights of their own; the cross-entropy of mixed labels is the mix of two."""
    logits, y, perm = torch.randn(6, 5), torch.randint(5, (6,)), torch.randperm(6)
    lam = torch.rand(6)
    dense = F.cross_entropy(logits, mixup(F.one_hot(y, 5).float(), lam, perm), reduction="none")
    pair = lam * F.cross_entropy(logits, y, reduction="none") + (1 - lam) * F.cross_entropy(
        logits, y[perm], reduction="none"
    )
    assert torch.allclose(dense, pair, atol=1e-6)


def test_cutmix_known_values() -> None:
    x = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    mixed, lam = cutmix(x, None, partners(1, 0), boxes=torch.tensor([[0, 2, 1, 4], [3, 3, 0, 4]]))
    expected = torch.zeros(4, 4)
    expected[:2, 1:] = 1
    assert torch.equal(mixed[0, 0], expected)
    assert torch.equal(mixed[1, 0], torch.ones(4, 4))
    assert torch.equal(lam, torch.tensor([1 - 6 / 16, 1.0]))


def test_boxes_are_those_of_the_paper() -> None:
    """Sides √(1 - λ) of the image's, uniform centres, clipped at the border."""
    generator = torch.Generator().manual_seed(0)
    lam = torch.full((4000,), 0.75)
    top, bottom, left, right = cutmix_boxes(lam, 32, 48, generator=generator).unbind(-1)
    assert top.min() == left.min() == 0
    assert bottom.max() == 32
    assert right.max() == 48
    assert (bottom - top).max() == 16
    assert (right - left).max() == 24
    whole = (top > 0) & (bottom < 32)
    assert ((bottom - top)[whole] == 16).all()
    # A centre is in the inner half of the height, where nothing is clipped, half of the time.
    assert abs(((bottom - top) == 16).float().mean().item() - 17 / 32) < 0.04
    assert abs((top[whole] - 8.0).mean().item()) < 0.5
    assert abs((left + right).float().mean().item() - 48) < 1.5
    x = torch.rand(3, 1, 32, 48)
    mixed, effective = cutmix(x, 0.75, partners(1, 2, 0), generator=generator)
    assert effective.shape == ()
    assert (mixed == x).float().mean().item() == pytest.approx(effective.item(), abs=1e-6)
    assert effective >= 0.75
    _, each = cutmix(x, torch.tensor([0.0, 1.0, 0.5]), partners(1, 2, 0), generator=generator)
    assert each.shape == (3,)
    assert each[1] == 1
    assert each[0] < each[1]


def test_cutmix_is_reproducible_and_compiles_whole() -> None:
    x, lam, perm = torch.rand(4, 3, 8, 8), torch.rand(4), partners(3, 2, 1, 0)
    make = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    first = cutmix(x, lam, perm, generator=make())
    assert battery.bits(cutmix(x, lam, perm, generator=make())) == battery.bits(first)
    torch._dynamo.reset()
    compiled = torch.compile(cutmix, backend="aot_eager", fullgraph=True)
    torch.manual_seed(2)
    one = compiled(x, lam, perm)
    torch.manual_seed(2)
    assert battery.bits(compiled(x, lam, perm)) == battery.bits(one)
    torch.manual_seed(2)
    assert battery.bits(cutmix(x, lam, perm)) == battery.bits(one)
    torch._dynamo.reset()


X = torch.ones(2, 3, 4, 5)
P = partners(1, 0)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x must be float32.*int64", lambda: mixup(torch.ones(2, dtype=torch.int64), 0.5, P)),
        (ValueError, "x must be .B, ....*0-dimensional", lambda: mixup(torch.tensor(1.0), 0.5, P)),
        (ValueError, r"lam must be in \[0, 1\], got 1.5", lambda: mixup(X, 1.5, P)),
        (ValueError, r"lam must be in \[0, 1\], got nan", lambda: mixup(X, math.nan, P)),
        (TypeError, "lam must be a float", lambda: mixup(X, "0.5", P)),
        (ValueError, r"lam must be 0-dimensional or \(2,\).*\(3,\)", lambda: mixup(X, torch.ones(3), P)),
        (TypeError, "lam must be float32.*int64", lambda: mixup(X, torch.ones(2, dtype=torch.int64), P)),
        (TypeError, "perm must be int64, got torch.int32", lambda: mixup(X, 0.5, P.int())),
        (TypeError, "perm must be a torch.Tensor, got list", lambda: mixup(X, 0.5, [1, 0])),
        (ValueError, r"perm must have shape \(2,\).*\(3,\)", lambda: mixup(X, 0.5, partners(0, 1, 0))),
        (IndexError, "perm must hold indices into the batch of 2, got 2 at 1", lambda: mixup(X, 0.5, partners(0, 2))),
        (IndexError, "perm must hold .* got -1 at 0", lambda: mixup(X, torch.rand(2), partners(-1, 0))),
        (IndexError, "perm must hold .* got 2 at 1", lambda: cutmix(X, 0.5, partners(0, 2))),
        (ValueError, r"x must be \(B, ..., H, W\)", lambda: cutmix(torch.ones(2, 3), 0.5, P)),
        (ValueError, "give either lam, or boxes", lambda: cutmix(X, None, P)),
        (ValueError, "give either lam, or boxes", lambda: cutmix(X, 0.5, P, boxes=torch.tensor([0, 1, 0, 1]))),
        (ValueError, "boxes must be .*inside of 4 x 5", lambda: cutmix(X, None, P, boxes=torch.tensor([0, 5, 0, 1]))),
        (ValueError, "boxes must be .*inside of 4 x 5", lambda: cutmix(X, None, P, boxes=torch.tensor([2, 1, 0, 1]))),
        (ValueError, r"boxes must have shape \(4,\) or \(2, 4\)", lambda: cutmix(X, None, P, boxes=P)),
        (TypeError, "boxes must be int64", lambda: cutmix(X, None, P, boxes=torch.ones(4))),
    ],
)  # fmt: skip
def test_bad_input(error, message, call) -> None:
    with pytest.raises(error, match=message):
        call()


def test_cutmix_refuses_a_lam_out_of_range_and_draws_where_the_generator_is() -> None:
    x, perm = torch.randn(3, 2, 8, 8), torch.tensor([1, 2, 0])
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\], got \[0.5, 1.5, 0.0\]"):
        cutmix(x, torch.tensor([0.5, 1.5, 0.0]), perm)
    one, two = (
        cutmix(x, torch.full((3,), 0.4), perm, generator=torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert bool(((one[1] >= 0.4) & (one[1] < 1)).all())  # what is clipped at the border stays one's own
