"""y_0 = b_0, y_t = a_t y_(t-1) + b_t along the tokens, and its gradients: compiled on a CPU, on a GPU by Triton, else in plain torch."""

import functools

import torch
import torch.nn.functional as F

from ops.attention import contiguous, gpu_kernels, load_walk


def recurrence(a, b):
    """y (B, T, H, D) of a (B, T, H, 1) and b (B, T, H, D), float32 or float64. a_0 is not used."""
    if b.size(1) == 1:
        return b
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return recurrence_op(a, b)
    return backend(b).recurrence(*contiguous(a, b))  # an operator takes 0.1 ms, of a token's 15


@torch.library.custom_op("tauformer::recurrence", mutates_args=())
def recurrence_op(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return backend(b).recurrence(*contiguous(a, b))


@torch.library.custom_op("tauformer::recurrence_backward", mutates_args=())
def recurrence_backward(grad: torch.Tensor, a: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return backend(y).recurrence_backward(*contiguous(grad, a, y))


@recurrence_op.register_fake
def _(a, b):
    return torch.empty_like(b, memory_format=torch.contiguous_format)


@recurrence_backward.register_fake
def _(grad, a, y):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a, y))


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx, grad):
    return recurrence_backward(grad, *ctx.saved_tensors)


recurrence_op.register_autograd(_backward, setup_context=_save)


def backend(x):
    """What computes the recurrence of tensors like x."""
    if x.is_cuda and x.dtype is torch.float32 and gpu_kernels():
        from ops import recurrence_triton

        return recurrence_triton
    return on_cpu() if x.device.type == "cpu" else Doubling


@functools.cache
def on_cpu():
    try:
        return load_walk()
    except Exception:  # no compiler, or one that cannot compile this code
        return Doubling


class Doubling:
    """In log2(T) steps: in step n each entry has taken in 2^n and gets the 2^n before them."""

    @staticmethod
    def recurrence(a, b):
        step, T = 1, b.size(1)
        while step < T:
            (a_head, a_rest), (b_head, b_rest) = a.tensor_split([step], 1), b.tensor_split([step], 1)
            b = torch.cat([b_head, b_rest + a_rest * b.narrow(1, 0, T - step)], 1)
            a = torch.cat([a_head, a_rest * a.narrow(1, 0, T - step)], 1)
            step *= 2
        return b

    @staticmethod
    def recurrence_backward(grad, a, y):
        after = F.pad(a[:, 1:], (0, 0, 0, 0, 0, 1))  # what the next entry keeps of each
        grad_b = Doubling.recurrence(after.flip(1), grad.flip(1)).flip(1).contiguous()
        grad_a = torch.linalg.vecdot(grad_b[:, 1:], y[:, :-1])[..., None]
        return F.pad(grad_a, (0, 0, 0, 0, 1, 0)), grad_b
