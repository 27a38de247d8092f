"""Activations by name: the public functions and their checks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchlin import _library
from torchlin.ops import activation_forms as forms
from torchlin.ops._checks import (
    check_dim,
    check_float_tensor,
    check_inplace,
    check_out,
    in_forward_mode,
    needs_grad,
)
from torchlin.ops.activation_autograd import ActivationInplace, PlainActivation, apply, write, write_plain
from torchlin.ops.activation_composed import IMPLEMENTATIONS
from torchlin.ops.activation_kernel import load_late

_raw: Any = torch.ops.torchlin
_CPU_KERNEL = "_activation_fwd" in _library.ops()
_short: Any = _raw._activation.default if _CPU_KERNEL else None

# Plain calls seen before: (name, dtype) -> kernel and slots; for what needs neither noise nor parameters of the caller.
_plain: dict[tuple[str, torch.dtype], tuple[int, Tensor | None]] = {}
_exporting = 0


def activation(
    x: Tensor,
    name: str,
    *,
    training: bool = False,
    inplace: bool = False,
    out: Tensor | None = None,
    channel_dim: int = 1,
    generator: torch.Generator | None = None,
    **parameters: Any,
) -> Tensor:
    """Apply the activation `name` of the catalogue, in one pass over memory.

    Args:
        x: float32, float64, float16 or bfloat16 tensor of any shape and strides. Arithmetic is float32 (float64 for float64)
            with one rounding at the end. A name of two tensors takes them as halves of the last dimension.
        name: a name or alias: `torchlin.names("activation")` lists them.
        training: draw the noise of a stochastic activation; otherwise what takes its place in evaluation.
        inplace: overwrite and return x. Under autograd only where the output tells the gradient, as with relu.
        out: tensor that takes the result; x's shape, dtype and device, sharing no memory with the inputs.
        channel_dim: the dimension along which parameters that are tensors [channels] have their values.
        generator: of the noise.
        parameters: by their names in the catalogue. A number, or a tensor of one element or [channels]; for a coefficient
            vector a sequence, or a tensor [length] or [length, channels]. Tensors are differentiable.

    Returns:
        A tensor of x's shape, dtype and memory format.

    Raises:
        ValueError: an unknown name (the closest ones are given), a parameter outside of its domain or that does not fit x,
            an out or in-place x that cannot be written.
        TypeError: an argument of the wrong type or dtype, or a parameter that the activation does not have.

    Source: `torchlin show <name>` gives formula and source of each.

    Example:
        >>> import torch, torchlin
        >>> torchlin.functional.activation(torch.tensor([-1.0, 0.0, 2.0]), "leaky_relu", a=0.1)
        tensor([-0.1000,  0.0000,  2.0000])
    """
    # Checking the arguments of a small tensor's call costs more than its arithmetic. A plain call that was seen before goes
    # straight to the op; what is not so plain takes the long way, which says why.
    if (
        not parameters
        and x.__class__ is Tensor
        and not inplace
        and not training
        and not _exporting
        and (known := _plain.get((name, x.dtype))) is not None
        and x.is_cpu
        and not in_forward_mode()
    ):
        if out is None and not (x.requires_grad and torch.is_grad_enabled()):
            try:
                return _short(x, *known)
            except RuntimeError:
                pass
        elif not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
            if out is None:
                return PlainActivation.apply(x, *known)
            if _can_take(out, x):
                return write_plain(out, x, *known)
    canonical, implementation, tensors, _ = forms.kind_of(name)
    if implementation:
        return _composed(
            x, canonical, implementation, training, inplace, out, channel_dim, generator, parameters
        )
    if tensors > 1:
        if inplace:
            raise ValueError(f"inplace=True is for activations of one tensor; {canonical} has {tensors}")
        return gated_activation(x, None, canonical, out=out, channel_dim=channel_dim, **parameters)
    check_float_tensor("x", x)
    call = forms.prepare(canonical, training, parameters, x, generator)
    channel_dim = _check_channels(call, x.shape, channel_dim)
    _check_outputs(x, inplace, out, [v for v in parameters.values() if isinstance(v, Tensor)])
    if not parameters and not torch.compiler.is_compiling() and (name, x.dtype) not in _plain:
        _remember(name, call, x)
    inputs = [x, *forms.noise_inputs(call, x, generator)]
    return _compute(call, inputs, channel_dim, 0, 0, inplace, out)


def gated_activation(
    a: Tensor,
    b: Tensor | None = None,
    name: str = "swiglu",
    *,
    layout: str | None = None,
    gate: str | None = None,
    dim: int = -1,
    out: Tensor | None = None,
    channel_dim: int = 1,
    **parameters: Any,
) -> Tensor:
    """Apply a gated unit, as SwiGLU, to two tensors or to the halves of one, without copying them apart.

    Args:
        a: float32, float64, float16 or bfloat16 tensor of any strides; the packed tensor if b is not given.
        b: tensor that broadcasts with a; None for a packed tensor.
        name: a name or alias of an activation of two tensors.
        layout: "split": two tensors. "halves": a is [first half | second half] along dim, as torch.nn.functional.glu has
            it. "interleaved": the two alternate along dim. None means "split" if b is given, else "halves".
        gate: "first" or "second": which of the two is the gate, the one that goes through the non-linearity. None is the
            convention of the name: first in silu(a)·b (LLaMA), second in a·sigmoid(b) (torch).
        dim: the packed dimension, of even size.
        out: tensor that takes the result, sharing no memory with the inputs.
        channel_dim: as in :func:`activation`.
        parameters: as in :func:`activation`; further tensors of the formula by their names.

    Returns:
        A tensor of a's dtype; of the shape of both tensors broadcast, or with half of dim.

    Raises:
        ValueError, TypeError: as :func:`activation`; a dim of odd size, tensors that do not broadcast.

    Source: Dauphin et al., arXiv:1612.08083; Shazeer, arXiv:2002.05202.

    Example:
        >>> import torch, torchlin
        >>> packed = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> torchlin.functional.gated_activation(packed, name="reglu")
        tensor([3., 8.])
    """
    canonical, implementation, tensors, of_name = forms.kind_of(name)
    if implementation or tensors < 2:
        raise ValueError(
            f"name: {canonical!r} is no function of two tensors; use activation(x, {canonical!r})"
        )
    form = forms.form_of(canonical, False)
    others = []
    for key in form.inputs[2:]:
        if not isinstance(parameters.get(key), Tensor):
            raise TypeError(f"{canonical} needs the tensor {key}=, got {parameters.get(key)!r}")
        others.append(parameters.pop(key))
    second_first = _swapped(canonical, of_name, gate)
    layout = ("halves" if b is None else "split") if layout is None else layout
    if layout not in ("split", "halves", "interleaved"):
        raise ValueError(f"layout must be 'split', 'halves' or 'interleaved', got {layout!r}")
    if (layout == "split") != (b is not None):
        raise ValueError(
            f"layout {layout!r} takes {'two tensors, b is missing' if b is None else 'one tensor, got b too'}"
        )
    check_float_tensor("a", a)
    for key, tensor in zip(("b", *form.inputs[2:]), (*([] if b is None else [b]), *others), strict=False):
        check_float_tensor(key, tensor)
        if tensor.dtype is not a.dtype or tensor.device != a.device:
            raise TypeError(f"{key} must have a's dtype and device, got {tensor.dtype} on {tensor.device}")
    if b is not None:
        split, split_dim = 0, 0
        if b is a:  # torch.compile takes no tensor twice
            b = a.view_as(a)
        tensors_in = _broadcast(canonical, [b, a, *others] if second_first else [a, b, *others])
        shape = tensors_in[0].shape
    else:
        split_dim = check_dim("dim", dim, a.dim())
        if a.shape[split_dim] % 2:
            raise ValueError(
                f"dim {dim} must have an even size to be split in two, got shape {tuple(a.shape)}"
            )
        split = (1 if layout == "halves" else 3) + second_first
        shape = torch.Size((*a.shape[:split_dim], a.shape[split_dim] // 2, *a.shape[split_dim + 1 :]))
        tensors_in = [
            a,
            *(_expand(key, other, shape) for key, other in zip(form.inputs[2:], others, strict=True)),
        ]
    call = forms.prepare(canonical, False, parameters, a, None)
    channel_dim = _check_channels(call, shape, channel_dim)
    if out is not None:
        check_out(
            out, a.new_empty(shape), *tensors_in, *(v for v in parameters.values() if isinstance(v, Tensor))
        )
    return _compute(call, tensors_in, channel_dim, split, split_dim, False, out)


def _composed(x, name, implementation, training, inplace, out, channel_dim, generator, parameters):
    """What no formula over elements says: a composition of torch's operators."""
    y = IMPLEMENTATIONS[implementation](
        x, activation=name, training=training, generator=generator, channel_dim=channel_dim, **parameters
    )
    if not inplace and out is None:
        return y
    if inplace and (y.shape != x.shape or needs_grad(x, y)):
        raise ValueError(f"inplace=True: {name} cannot be computed in place of this x: use inplace=False")
    _check_outputs(y if out is not None else x, inplace, out, [x])
    return (x if inplace else out).copy_(y)


def _swapped(name: str, of_name: str, gate: str | None) -> bool:
    """Whether the formula's a is the second tensor; of_name is the one that gates in the formula."""
    if gate is None:
        return False
    if gate not in ("first", "second"):
        raise ValueError(f"gate must be 'first', 'second' or None, got {gate!r}")
    if not of_name:
        raise ValueError(f"gate: {name} has no gate; leave it out")
    return (of_name == "a") != (gate == "first")


def _broadcast(name: str, tensors: list[Tensor]) -> list[Tensor]:
    try:
        return list(torch.broadcast_tensors(*tensors))
    except RuntimeError:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"the tensors of {name} must broadcast, got shapes {shapes}") from None


def _expand(key: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    try:
        return tensor.expand(shape)
    except RuntimeError:
        raise ValueError(f"{key} must broadcast to {tuple(shape)}, got shape {tuple(tensor.shape)}") from None


def _check_channels(call: forms.Call, shape: torch.Size, channel_dim: int) -> int:
    """channel_dim as a non-negative index."""
    if call.channels == 1:
        return 0
    if not isinstance(channel_dim, int) or isinstance(channel_dim, bool):
        raise TypeError(f"channel_dim must be an int, got {type(channel_dim).__name__}")
    if not -len(shape) <= channel_dim < len(shape):
        raise ValueError(
            f"channel_dim {channel_dim} does not exist in a tensor of shape {tuple(shape)}, "
            f"but a parameter of {call.form.name} has {call.channels} values, one a channel"
        )
    channel_dim %= len(shape)
    if shape[channel_dim] != call.channels:
        raise ValueError(
            f"a parameter of {call.form.name} has {call.channels} values, which does not fit the "
            f"{shape[channel_dim]} channels (dimension {channel_dim}) of shape {tuple(shape)}"
        )
    return channel_dim


def _check_outputs(x: Tensor, inplace: bool, out: Tensor | None, parameters: Sequence[Tensor]) -> None:
    if out is not None:
        if inplace:
            raise ValueError("inplace=True and out= exclude each other: pass one of them")
        check_out(out, x, *parameters)
    if inplace:
        check_inplace(x)


def _compute(
    call: forms.Call,
    inputs: list[Tensor],
    channel_dim: int,
    split: int,
    split_dim: int,
    inplace: bool,
    out: Tensor | None,
) -> Tensor:
    x = inputs[0]
    by_autograd = inplace and needs_grad(x)
    if by_autograd and torch.compiler.is_compiling():  # a traced graph keeps what it needs
        return x.copy_(_compute(call, inputs, channel_dim, split, split_dim, False, None))
    if by_autograd and (call.items is None or not forms.keeps_slope(call.form.name, call.items)):
        raise ValueError(
            f"inplace=True overwrites x, which the gradient of {call.form.name} needs: use inplace=False"
        )
    if _use_reference(call.form, x):
        kept = [x.clone(), *inputs[1:]] if by_autograd else inputs
        y = forms.formula_reference(call, forms.unpacked(kept, split, split_dim), channel_dim)
        if out is None and not inplace:
            return y
        return (x if out is None else out).copy_(y)
    slots, lengths = forms.slots_of(call, x)
    kernel = call.form.kernel
    if by_autograd:
        return ActivationInplace.apply(x, slots, kernel, lengths)
    if inplace or out is not None:
        target = x if out is None else out
        return write(target, inputs, slots, kernel, lengths, channel_dim, split, split_dim)
    return apply(inputs, slots, call.items is None, kernel, lengths, channel_dim, split, split_dim)


def _can_take(out: Any, x: Tensor) -> bool:
    """Whether out plainly passes all that check_out asks for."""
    if (
        out.__class__ is not Tensor
        or out.dtype is not x.dtype
        or not out.is_cpu
        or out.shape != x.shape
        or (torch.is_grad_enabled() and (x.requires_grad or out.requires_grad))
        or not (x.is_contiguous() and out.is_contiguous())
    ):
        return False
    distance, size = out.data_ptr() - x.data_ptr(), x.numel() * x.element_size()
    return distance >= size or -distance >= size


def _remember(name: str, call: forms.Call, x: Tensor) -> None:
    """Keeps what the short way needs, if this call was plain."""
    form = call.form
    defaults = tuple(zip(form.parameters, form.defaults, strict=True))
    if (
        call.items == defaults
        and x.is_cpu
        and not (call.training or any(form.vectors) or _use_reference(form, x))
    ):
        _plain[(name, x.dtype)] = form.kernel, forms.slots_of(call, x)[0]


def activation_reference(
    x: Tensor,
    name: str,
    *,
    training: bool = False,
    channel_dim: int = 1,
    generator: torch.Generator | None = None,
    **parameters: Any,
) -> Tensor:
    """The activation in plain torch: oracle of the tests, baseline of the benchmarks, fallback, and what exporters trace.

    Same arguments, result and rounding as :func:`activation`; every intermediate is float32 (float64 for float64 x).
    """
    with exportable():
        return activation(
            x, name, training=training, channel_dim=channel_dim, generator=generator, **parameters
        )


def gated_activation_reference(
    a: Tensor, b: Tensor | None = None, name: str = "swiglu", **arguments: Any
) -> Tensor:
    """The gated unit in plain torch; arguments as :func:`gated_activation`, without `out`."""
    with exportable():
        return gated_activation(a, b, name, **arguments)


@contextlib.contextmanager
def exportable() -> Iterator[None]:
    """Within it, activations are computed by aten operators alone, as exporters to other formats need.

    It is on by itself while `torch.onnx.export` runs.

    Example:
        >>> import torch, torchlin
        >>> from torchlin.ops.activation import exportable
        >>> with exportable():
        ...     torchlin.functional.activation(torch.zeros(1), "mish")
        tensor([0.])
    """
    global _exporting
    _exporting += 1
    try:
        yield
    finally:
        _exporting -= 1


def _is_exporting() -> bool:
    return _exporting > 0 or torch.onnx.is_in_onnx_export()


def _use_reference(form: forms.Form, x: Tensor) -> bool:
    return (
        _is_exporting()
        or (x.device.type not in form.devices and not load_late(form.kernel, x.device.type))
        or not _library.has_kernel(x.device.type)
        or (x.is_cuda and x.dtype is torch.float64)
        or not _CPU_KERNEL
    )


def forget() -> None:
    """Drops what was derived from the catalogue, after a name was added to it or replaced."""
    forms.forget()
    _plain.clear()
