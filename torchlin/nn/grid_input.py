"""The activation transform of quantized layers, computed once for all layers that see the same input.

Query, key and value read one tensor, and so do gate and up. Who reads what is seen while the model runs: layers whose
transforms are equal share one :class:`InputTransform`, and it remembers the last input and what it made of it.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from torchlin import _library
from torchlin.functional import hadamard_transform
from torchlin.ops._checks import in_forward_mode
from torchlin.ops.hadamard import check_order, make_constant
from torchlin.ops.hadamard_matrix import core_matrix

_FAST = frozenset((torch.float32, torch.bfloat16, torch.float16))
_fwd: Any = torch.ops.torchlin._hadamard_fwd.default if _library.status()["cpu"].loaded else None

# All transforms in use, by what they compute: {(size, order, signs, device): InputTransform}.
_shared: weakref.WeakValueDictionary[Any, InputTransform] = weakref.WeakValueDictionary()
# Grid points on other devices than the CPU: {points on the CPU: {device: points there}}.
_points: Any = WeakIdKeyDictionary()


class InputTransform:
    r"""x to :math:`H (s \circ x) / \sqrt h`, in blocks of h neighbours of the last dimension; remembers the last x.

    A second call with the very same, unchanged tensor returns the result of the first, where no gradient is taken. What is
    remembered is one attribute, replaced as a whole, so threads at worst compute twice; it goes when the input goes.

    Args:
        size: of the last dimension.
        order: h, a Hadamard order that divides size.
        signs: s, (size,), or None for ones.
        device: where x will be.
    """

    def __init__(self, size: int, order: int, signs: Tensor | None, device: torch.device) -> None:
        self.size, self.order = size, order
        _, k = check_order(size, order)
        self.scale = 1 / math.sqrt(order)
        self.core = make_constant(lambda: core_matrix(k), device) if k > 1 else None
        self.factors = signs
        self.identity = order == 1 and signs is None
        self._raw = _fwd if device.type in ("cpu", "cuda") and _library.has_kernel(device.type) else None
        self._last: tuple[weakref.ref[Tensor], Any, list[Tensor]] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.identity:
            return x
        return hadamard_transform(x, block_size=self.order, signs=self.factors, had_k=self.core)

    def rows(self, x: Tensor) -> Tensor:
        """The transform of an x that `is_plain` and has no gradient to take, as rows (-1, size); remembered."""
        if self.identity:
            return x.reshape(-1, self.size).contiguous()
        if x.is_inference():  # its changes leave no trace
            return self._transform_rows(x)
        state = x._version if x.is_cpu else (x._version, _stream(x))
        last = self._last
        if last is not None and last[0]() is x and last[1] == state:
            return last[2][0]
        y = self._transform_rows(x)
        cell = [y]
        self._last = weakref.ref(x, lambda _: cell.clear()), state, cell
        return y

    def _transform_rows(self, x: Tensor) -> Tensor:
        if self._raw is None:
            return self(x).reshape(-1, self.size)
        y = self._raw(x, self.scale, x.dim() - 1, self.order, self.factors, self.core, False)
        return y.reshape(-1, self.size).contiguous()

    def adjoint(self, w: Tensor) -> Tensor:
        r"""Rows that multiply the transformed x to rows that multiply x: :math:`s \circ (H^T w) / \sqrt h`."""
        if self.identity:
            return w
        return hadamard_transform(
            w, block_size=self.order, signs=self.factors, had_k=self.core, transpose=True
        )


def is_plain(x: Tensor) -> bool:
    """Whether x is an ordinary tensor that nothing traces, transforms or differentiates forward."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and x.dtype in _FAST
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and not in_forward_mode()
    )


def _stream(x: Tensor) -> Any:
    """What has to be the same for a result on x's GPU to be there already; never, in a graph that is being captured."""
    if torch.cuda.is_current_stream_capturing():
        return object()
    return torch._C._cuda_getCurrentRawStream(x.device.index)


def input_transform(
    size: int, order: int, signs: Tensor | None, device: torch.device
) -> InputTransform | None:
    """The transform of these arguments, one object for all who ask; None on the meta device, which has no signs."""
    if device.type == "meta":
        return None
    if isinstance(signs, nn.Parameter):  # it learns by itself
        return InputTransform(size, order, signs, device)
    known = None if signs is None else (signs.dtype, signs.cpu().view(torch.uint8).numpy().tobytes())
    key = (size, order, known, device)
    found = _shared.get(key)
    if found is None:
        factors = None if signs is None else make_constant(lambda: signs.detach().float(), device)
        found = _shared.setdefault(key, InputTransform(size, order, factors, device))
    return found


def points_on(points: Tensor, device: torch.device) -> Tensor:
    """A grid's points on a device, one tensor for all who ask."""
    if points.device == device:
        return points
    if device.type == "meta":
        return points.to(device)
    there = _points.setdefault(points, {})
    if device not in there:
        there[device] = make_constant(lambda: points, device)
    return there[device]
