"""The parts of the model whose backward passes are written by hand, for speed and memory: each saves one or two tensors, and
the loss never holds all logits at once. The formulas are in model.py, where these parts are called."""

import math

import torch
import torch.nn.functional as F

from ops.attention import gpu_kernels

ENERGY_EPS = NORM_EPS = 1e-6
LOSS_CHUNK = 128  # tokens whose logits are in memory at once, or a 32nd of the batch if that is more


class RMSNorm(torch.autograd.Function):
    """norm(), which saves its output for the gradient: the next layer saves that anyway. In float32 at least."""

    @staticmethod
    def forward(ctx, x):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (torch.linalg.vecdot(x, x)[..., None] / x.size(-1) + NORM_EPS).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, y)[..., None] / y.size(-1)
        return torch.addcmul(grad, along, y, value=-1).mul_(scale)


def by_head(x, matrices):
    """x (B, T, H, D) times each head's matrix, (H, D, D) -> (B, T, H, D)."""
    return torch.bmm(x.flatten(0, 1).transpose(0, 1), matrices).transpose(0, 1).unflatten(0, x.shape[:2])


def rayleigh_quotient(x, laplacian):
    return by_head(x, laplacian).mul_(x).sum(-1).clamp_min_(0) / (torch.linalg.vecdot(x, x) + ENERGY_EPS)


class Energy(torch.autograd.Function):
    """energy(), which saves only x for its gradient dE/dx = 2 (L x - E x) / (x^T x + eps). The Laplacian gets no gradient."""

    @staticmethod
    def forward(ctx, x, laplacian):
        ctx.save_for_backward(x, laplacian)
        return rayleigh_quotient(x, laplacian)

    @staticmethod
    def backward(ctx, grad):
        x, laplacian = ctx.saved_tensors
        Lx = by_head(x, laplacian)
        xx = torch.linalg.vecdot(x, x) + ENERGY_EPS
        E = torch.linalg.vecdot(x, Lx) / xx
        return Lx.addcmul_(E[..., None], x, value=-1).mul_((2 * grad / xx)[..., None]), None


class SquaredReluMLP(torch.autograd.Function):
    """relu(x W1^T)^2 W2^T, which saves only x and the relu for its gradients."""

    @staticmethod
    def forward(ctx, x, up, down):
        """x (B, T, C), up (4C, C), down (C, 4C) -> (B, T, C)."""
        hidden = F.linear(x, up).relu_()
        ctx.save_for_backward(x, hidden, up, down)
        return F.linear(hidden.square(), down)

    @staticmethod
    def backward(ctx, grad):
        x, hidden, up, down = ctx.saved_tensors
        dtype = grad.dtype  # under autocast the weights and x may be wider
        grad_down = grad.flatten(0, 1).T @ hidden.square().flatten(0, 1)
        grad_hidden = (grad @ down.to(dtype)).mul_(hidden).mul_(2)
        grad_up = grad_hidden.flatten(0, 1).T @ x.to(dtype).flatten(0, 1)
        return grad_hidden @ up.to(dtype), grad_up, grad_down


class ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy of the softcapped logits x W^T, whose (N, V) matrix is never in memory as a whole: some rows at a
    time, in place, and their gradients in the same pass."""

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, needs_grad):
        """x (N, C), weight (V, C), targets (N,) int64 -> scalar float32."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        summed = summed_loss_on_cuda if x.is_cuda else summed_loss
        loss, grad_x, grad_weight = summed(x, weight, targets, softcap, needs_grad, dtype)
        ctx.grads = grad_x, grad_weight, (4 if softcap else 1) / len(x)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight, scale = ctx.grads
        return grad_x.mul_(grad_loss * scale), grad_weight.mul_(grad_loss * scale), None, None, None


def summed_loss(x, weight, targets, softcap, needs_grad, dtype):
    """(loss summed over the rows of x, float32; its gradients of x and of weight, None if not needed). With a softcap the
    gradients are a quarter of the true ones. dtype: of the matrix products."""
    loss = x.new_zeros((), dtype=torch.float32)
    grad_x, grad_weight = (torch.zeros_like(x), torch.zeros_like(weight)) if needs_grad else (None, None)
    chunk = min(len(x), max(LOSS_CHUNK, math.ceil(len(x) / 32)))
    W = weight.to(dtype)
    logits = x.new_empty(chunk, len(W), dtype=dtype)
    softmax, sigmoid = (torch.empty_like(logits, dtype=torch.float32) for _ in range(2))
    for start in range(0, len(x), chunk):
        x_c, target = x[start : start + chunk].to(dtype), targets[start : start + chunk, None]
        n = len(x_c)
        z = torch.mm(x_c, W.T, out=logits[:n]).float()
        if softcap:  # softcap tanh(z / softcap) = 2 softcap sigmoid(2 z / softcap) - softcap, and faster
            s = torch.mul(z, 2 / softcap, out=sigmoid[:n]).sigmoid_()
            torch.mul(s, 2 * softcap, out=z)
        p = torch.softmax(z, -1, out=softmax[:n])
        log_denominator = z.amax(-1) - p.amax(-1).log()
        loss += (log_denominator - z.gather(1, target)[:, 0]).sum()
        if needs_grad:  # of the logits: softmax, minus 1 at the target, times a quarter of the softcap's derivative
            p.scatter_add_(1, target, p.new_full((n, 1), -1))
            if softcap:
                p.mul_(s.addcmul_(s, s, value=-1))
            grad_z = p.to(dtype)
            grad_x[start : start + chunk] = grad_z @ W
            if dtype is grad_weight.dtype:
                grad_weight.addmm_(grad_z.T, x_c)
            else:
                grad_weight += grad_z.T @ x_c
    return loss, grad_x, grad_weight


@torch.library.custom_op("tauformer::summed_loss", mutates_args=())
def summed_loss_on_cuda(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float, needs_grad: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """summed_loss(), by a Triton kernel where that is possible; gradients that are not needed are empty tensors."""
    if gpu_kernels():
        from ops.fused_triton import summed_loss as by_kernel

        with torch.cuda.device_of(x):
            return by_kernel(x, weight, targets, softcap, needs_grad, dtype)
    loss, *grads = summed_loss(x, weight, targets, softcap, needs_grad, dtype)
    return loss, *(grads if needs_grad else (x.new_empty(0), x.new_empty(0)))


@summed_loss_on_cuda.register_fake
def _(x, weight, targets, softcap, needs_grad, dtype):
    grads = (torch.empty_like(x), torch.empty_like(weight)) if needs_grad else (x.new_empty(0), x.new_empty(0))
    return x.new_empty((), dtype=torch.float32), *grads
