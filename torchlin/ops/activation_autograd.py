"""Derivatives of activations: the kernel's own backward pass first, the plain torch form of its body beyond.

Nothing but inputs and slots is saved. Also here: what torch.compile and vmap know of the raw ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlin import _library
from torchlin.catalogue.program import value_of
from torchlin.ops._checks import compute_dtype, in_forward_mode, needs_grad
from torchlin.ops.activation_forms import kernel_reference, unpacked, vector_slots

_raw: Any = torch.ops.torchlin
_HAS_KERNELS = "_activation_fwd" in _library.ops()
_fwd: Any = _raw._activation_fwd.default if _HAS_KERNELS else None
_bwd: Any = _raw._activation_bwd.default if _HAS_KERNELS else None
_raw_short: Any = _raw._activation.default if _HAS_KERNELS else None
_SLOTS = 8  # the bit of a request for gradients that means the slots; bit i is the i-th input


def apply(inputs, slots, learnable, kernel, lengths, channel_dim, split, split_dim):
    """The op on arguments that are valid already, differentiable; by the slots too if they are learnable."""
    if in_forward_mode():
        if learnable or split:
            return _kernel_values(inputs, slots, kernel, lengths, channel_dim, split, split_dim)
        return _ActivationForward.apply(slots, kernel, lengths, channel_dim, split, split_dim, *inputs)
    # Constant slots are not asked: a traced graph does not know whether its constants require grad.
    if needs_grad(*inputs) or (learnable and needs_grad(slots)):
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return _ActivationTransformed.apply(
                slots, kernel, lengths, channel_dim, split, split_dim, *inputs
            )
        return _Activation.apply(slots, kernel, lengths, channel_dim, split, split_dim, *inputs)
    return _fwd(inputs, kernel, slots, lengths, channel_dim, split, split_dim)


def write(out, inputs, slots, kernel, lengths, channel_dim, split, split_dim):
    """Writes the result into out, which autograd is told of."""
    _raw._activation_out(inputs, kernel, slots, lengths, channel_dim, split, split_dim, out)
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def write_plain(out, x, kernel, slots):
    return write(out, [x], slots, kernel, _ones(slots), 0, 0, 0)


def _ones(slots):
    """The lengths of slots that are all scalars."""
    return () if slots is None else (1,) * slots.shape[0]


def _kernel_values(inputs, slots, kernel, lengths, channel_dim, split, split_dim):
    """The kernel's body in plain torch on the raw op's own arguments: what derivatives of higher order come from."""
    names, body = kernel_reference(kernel)
    parts = unpacked(inputs, split, split_dim)
    dtype = compute_dtype(parts[0].dtype)
    values: dict[str, Any] = {name: part.to(dtype) for name, part in zip(names, parts, strict=True)}
    shape = [1] * parts[0].dim()
    if slots is not None:
        if slots.shape[1] > 1:
            shape[channel_dim] = slots.shape[1]
        rows = [row.view(shape) for row in slots.unbind(0)]
        for i, (length, vector) in enumerate(zip(lengths, vector_slots(kernel), strict=True)):
            values[f"p{i}"] = rows[:length] if vector else rows[0]
            rows = rows[length:]
    return value_of(body, values, values[names[0]]).to(parts[0].dtype)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slots, kernel, lengths, channel_dim, split, split_dim, *inputs):
        ctx.static = kernel, lengths, channel_dim, split, split_dim
        ctx.save_for_backward(slots, *inputs)
        return _fwd(list(inputs), kernel, slots, lengths, channel_dim, split, split_dim)

    @staticmethod
    def backward(ctx, grad):
        slots, *inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        needs = _SLOTS if wanted[0] else 0
        for i in range(len(inputs)):
            needs += int(wanted[6 + i]) << i
        found = list(_backward(needs, grad, inputs, slots, *ctx.static))
        grad_slots = found.pop() if wanted[0] else None
        grads = [found.pop(0) if wanted[6 + i] else None for i in range(len(inputs))]
        return grad_slots, None, None, None, None, None, *grads


class PlainActivation(torch.autograd.Function):
    """One input, slots that are scalars and constant: as short as it can be."""

    @staticmethod
    def forward(ctx, x, kernel, slots):
        ctx.kernel, ctx.slots = kernel, slots
        ctx.save_for_backward(x)
        return _raw_short(x, kernel, slots)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return _backward(1, grad, [x], ctx.slots, ctx.kernel, _ones(ctx.slots), 0, 0, 0)[0], None, None


class _ActivationTransformed(_Activation):
    """The form that torch.func and torch.compile ask for: binding its arguments costs a call 25 microseconds."""

    generate_vmap_rule = True

    @staticmethod
    def forward(slots, kernel, lengths, channel_dim, split, split_dim, *inputs):  # type: ignore[override]
        return _fwd(list(inputs), kernel, slots, lengths, channel_dim, split, split_dim)

    @staticmethod
    def setup_context(ctx, arguments, output):
        slots, *ctx.static = arguments[:6]
        ctx.save_for_backward(slots, *arguments[6:])


class _ActivationForward(_ActivationTransformed):
    """With a forward derivative: a class of its own, because torch.compile refuses to trace a Function that has one."""

    @staticmethod
    def setup_context(ctx, arguments, output):
        _ActivationTransformed.setup_context(ctx, arguments, output)
        ctx.save_for_forward(arguments[0], *arguments[6:])

    @staticmethod
    def jvp(ctx, _slots, _kernel, _lengths, _channel_dim, _split, _split_dim, *tangents):
        slots, *inputs = ctx.saved_tensors
        total = None
        for i, tangent in enumerate(tangents):
            if tangent is not None:
                part = _backward(1 << i, tangent, inputs, slots, *ctx.static)[0]
                total = part if total is None else total + part
        return total


def _backward(needs, grad, inputs, slots, kernel, lengths, channel_dim, split, split_dim):
    """Gradients that `needs` asks for, inputs first; differentiable again outside of traced graphs."""
    static = kernel, lengths, channel_dim, split, split_dim
    if not torch.compiler.is_compiling():
        if needs_grad(grad, slots, *inputs):
            return _ActivationBackward.apply(grad, slots, *static, needs, *inputs)
        if torch._C._functorch.is_legacy_batchedtensor(
            grad
        ):  # is_grads_batched=True: it knows no operator of lists
            return _plain_backward(needs, grad, inputs, slots, static)
    return _raw._activation_bwd(
        grad, list(inputs), kernel, slots, lengths, channel_dim, split, split_dim, needs
    )


def _plain_backward(needs, grad, inputs, slots, static):
    """The same from the plain torch form."""
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in inputs]
        slots = None if slots is None else slots.detach().requires_grad_()
        y = _kernel_values(inputs, slots, *static)
    return torch.autograd.grad(y, _wanted(needs, inputs, slots), grad, materialize_grads=True)


def _wanted(needs, inputs, slots):
    return [t for i, t in enumerate(inputs) if needs >> i & 1] + ([slots] if needs & _SLOTS else [])


class _ActivationBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad, slots, kernel, lengths, channel_dim, split, split_dim, needs, *inputs):
        return tuple(
            _raw._activation_bwd(
                grad, list(inputs), kernel, slots, lengths, channel_dim, split, split_dim, needs
            )
        )

    @staticmethod
    def setup_context(ctx, arguments, output):
        grad, slots, *ctx.static = arguments[:8]
        ctx.save_for_backward(grad, slots, *arguments[8:])

    @staticmethod
    def backward(ctx, *cotangents):
        grad, slots, *inputs = ctx.saved_tensors
        *static, needs = ctx.static
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Leaves of their own where the derivative ends here; the tensors themselves where it goes on.
            take = (lambda t: t) if create_graph else (lambda t: t.detach().requires_grad_())
            grad = take(grad)
            inputs = [take(t) for t in inputs]
            slots = None if slots is None else take(slots)
            y = _kernel_values(inputs, slots, *static)
            first = torch.autograd.grad(
                y, _wanted(needs, inputs, slots), grad, create_graph=True, materialize_grads=True
            )
            pairs = [
                (f, c.to(f.dtype))
                for f, c in zip(first, cotangents, strict=True)
                if c is not None and f.requires_grad
            ]
            wanted = [grad, *([] if slots is None else [slots]), *inputs]
            asked = [t for t in wanted if t.requires_grad]
            second: tuple[Tensor | None, ...] = (None,) * len(asked)
            if pairs and asked:
                second = torch.autograd.grad(
                    [f for f, _ in pairs],
                    asked,
                    [c for _, c in pairs],
                    create_graph=create_graph,
                    allow_unused=True,
                )
        found = dict(zip(map(id, asked), second, strict=True))
        of_slots = None if slots is None else found.get(id(slots))
        return (
            found.get(id(grad)),
            of_slots,
            *[None] * 6,
            *(found.get(id(t)) for t in inputs),
        )


class ActivationInplace(torch.autograd.Function):
    """For functions with f'(f(x)) = f'(x): the kernel's backward, on the output."""

    @staticmethod
    def forward(ctx, x, slots, kernel, lengths):
        _raw._activation_out([x], kernel, slots, lengths, 0, 0, 0, x)
        ctx.mark_dirty(x)
        ctx.static = kernel, lengths
        ctx.save_for_backward(x, slots)
        return x

    @staticmethod
    def backward(ctx, grad):
        y, slots = ctx.saved_tensors
        kernel, lengths = ctx.static
        return _backward(1, grad, [y], slots, kernel, lengths, 0, 0, 0)[0], None, None, None


# ---------------------------------------------------------------------------------------------- fake kernels, vmap


def _fake_activation(x, kernel, slots=None):
    return torch.empty_like(x)


def _fake_fwd(inputs, kernel, slots, lengths, channel_dim, split, split_dim):
    if not split:
        return torch.empty_like(inputs[0])
    shape = list(inputs[0].shape)
    shape[split_dim] = shape[split_dim] // 2
    return inputs[0].new_empty(shape)


def _fake_out(inputs, kernel, slots, lengths, channel_dim, split, split_dim, out):
    return None


def _fake_bwd(grad, inputs, kernel, slots, lengths, channel_dim, split, split_dim, needs):
    grads = [torch.empty_like(t) for i, t in enumerate(inputs) if needs >> i & 1]
    return grads + ([torch.empty_like(slots)] if needs & _SLOTS else [])


def _batch_first(tensor, dim, size):
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _vmap_activation(info, in_dims, x, kernel, slots=None):
    dims = ([in_dims[0]], None, in_dims[2] if len(in_dims) > 2 else None, None, None, None, None)
    return _vmap_fwd(info, dims, [x], kernel, slots, [1] * (0 if slots is None else slots.shape[0]), 0, 0, 0)


def _vmap_fwd(info, in_dims, inputs, kernel, slots, lengths, channel_dim, split, split_dim):
    batched = [_batch_first(t, d, info.batch_size) for t, d in zip(inputs, in_dims[0], strict=True)]
    if in_dims[2] is None:
        return _raw._activation_fwd(batched, kernel, slots, lengths, channel_dim + 1, split, split_dim + 1), 0
    each = slots.movedim(in_dims[2], 0).contiguous()
    parts = [
        _raw._activation_fwd([t[i] for t in batched], kernel, each[i], lengths, channel_dim, split, split_dim)
        for i in range(info.batch_size)
    ]
    return torch.stack(parts), 0


def _vmap_bwd(info, in_dims, grad, inputs, kernel, slots, lengths, channel_dim, split, split_dim, needs):
    """One call for the whole batch where no sum over it would be wrong: each element has slots of its own gradient."""
    size = info.batch_size
    batched = [_batch_first(t, d, size) for t, d in zip(inputs, in_dims[1], strict=True)]
    grads = _batch_first(grad, in_dims[0], size)
    if in_dims[3] is None and not needs & _SLOTS:
        found = _raw._activation_bwd(
            grads, batched, kernel, slots, lengths, channel_dim + 1, split, split_dim + 1, needs
        )
        return found, [0] * len(found)
    each = None if slots is None else _batch_first(slots, in_dims[3], size).contiguous()
    rows = [
        _raw._activation_bwd(
            grads[i],
            [t[i] for t in batched],
            kernel,
            None if each is None else each[i],
            lengths,
            channel_dim,
            split,
            split_dim,
            needs,
        )
        for i in range(size)
    ]
    found = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    return found, [0] * len(found)


if _HAS_KERNELS:
    torch.library.register_fake("torchlin::_activation", _fake_activation)
    torch.library.register_fake("torchlin::_activation_fwd", _fake_fwd)
    torch.library.register_fake("torchlin::_activation_out", _fake_out)
    torch.library.register_fake("torchlin::_activation_bwd", _fake_bwd)
    torch.library.register_vmap("torchlin::_activation", _vmap_activation)
    torch.library.register_vmap("torchlin::_activation_fwd", _vmap_fwd)
    torch.library.register_vmap("torchlin::_activation_bwd", _vmap_bwd)
