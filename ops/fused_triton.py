"""The loss on a GPU: a kernel that turns a row of logits into its gradient, in place. It reads the row once, into registers, or twice, once
for the loss and once for the gradient, whichever is faster on the device (fused.summed_loss is the same in plain torch)."""

import functools

import torch
import triton
import triton.language as tl

from ops.attention_triton import cdiv, tuned

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1
CHUNK = 4096  # tokens whose logits are in memory at once, or a 32nd of the batch if that is more
ALIGNED = 64  # the columns of the logits are padded to a multiple of it: matrix products of unaligned rows are slow
MOST, BLOCK = 32768, 8192  # logits of a row that may be kept in registers; those of others at a time
WARPS = 16, 32


@triton.jit
def capped(row, v, width, V, softcap, CAPPED: tl.constexpr, FAST: tl.constexpr):
    """A row's logits v after the softcap, -inf from V on: softcap tanh(z / softcap) = softcap (2 sigmoid(2 z / softcap) - 1). FAST: by the
    GPU's own tanh, one instruction, whose error, 2^-11, is below that of logits in 16 bits."""
    z = tl.load(row + v, mask=v < width, other=0.0).to(tl.float32)  # masked at V it could not read 16 bytes at once
    if CAPPED and FAST:
        z = softcap * tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z / softcap], tl.float32, is_pure=True, pack=1)
    elif CAPPED:
        z = softcap * (2 / (1 + tl.exp(-2 / softcap * z)) - 1)
    return tl.where(v < V, z, float("-inf"))


@triton.jit
def store_gradient(row, z, v, target, lse, width, V, softcap, CAPPED: tl.constexpr):
    grad = tl.exp(z - lse) - tl.where(v == target, 1.0, 0.0)
    if CAPPED:
        grad *= 0.25 - 0.25 / softcap / softcap * z * z
    tl.store(row + v, tl.where(v < V, grad, 0.0).to(row.dtype.element_ty), mask=v < width)


def row_kernel(logits, targets, losses, width, V, softcap, CAPPED: tl.constexpr, FAST: tl.constexpr, NEEDS_GRAD: tl.constexpr,
               BLOCK: tl.constexpr, ONE: tl.constexpr):  # fmt: skip
    """A row of logits (N, width), of which the first V count: writes its loss, log sum_v exp(z_v) - z_target, and overwrites the row
    with its gradient, softmax(z) minus 1 at the target, times, if there is a softcap, a quarter of its derivative
    1 - (z / softcap)^2; zeros from V on. ONE: the row is a single block."""
    n = tl.program_id(0).to(tl.int64)
    row, target = logits + n * width, tl.load(targets + n)
    at_target = capped(row, target, width, V, softcap, CAPPED, FAST)  # before anything is overwritten: the sums below wait for all threads
    greatest, total = float("-inf"), 0.0
    if ONE:
        v = tl.arange(0, BLOCK)
        z = capped(row, v, width, V, softcap, CAPPED, FAST)
        greatest = tl.max(z, 0)
        total = tl.sum(tl.exp(z - greatest), 0)
    else:
        for start in range(0, V, BLOCK):
            z = capped(row, start + tl.arange(0, BLOCK), width, V, softcap, CAPPED, FAST)
            new = tl.maximum(greatest, tl.max(z, 0))
            total = total * tl.exp(greatest - new) + tl.sum(tl.exp(z - new), 0)
            greatest = new
    lse = greatest + tl.log(total)
    tl.store(losses + n, lse - at_target)
    if NEEDS_GRAD:
        if ONE:
            store_gradient(row, z, v, target, lse, width, V, softcap, CAPPED)
        else:
            for start in range(0, width, BLOCK):
                v = start + tl.arange(0, BLOCK)
                store_gradient(row, capped(row, v, width, V, softcap, CAPPED, FAST), v, target, lse, width, V, softcap, CAPPED)


@functools.cache
def launcher(fits):
    """The kernel, a grid and its arguments given. fits: a row has at most MOST logits, so that it may be ONE block."""
    kernel, blocks = triton.jit(row_kernel), [{"BLOCK": BLOCK, "ONE": False}, {"BLOCK": MOST, "ONE": True}]
    if INTERPRETED:  # autotuning needs a device
        return lambda grid, *args: kernel[grid](*args, **blocks[fits])
    configs = [triton.Config(block, num_warps=warps) for block in blocks[: 1 + fits] for warps in WARPS]
    return tuned(kernel, configs, ["width", "NEEDS_GRAD"], restore_value=["logits"])


def summed_loss(x, weight, targets, softcap, needs_grad, dtype):
    """As fused.summed_loss(), but gradients that are not needed are empty tensors."""
    N, V = len(x), len(weight)
    width = cdiv(V, ALIGNED) * ALIGNED
    W = torch.nn.functional.pad(weight.to(dtype), (0, 0, 0, width - V))
    chunk = min(N, max(CHUNK, cdiv(N, 32)))
    logits, losses = x.new_empty(chunk, width, dtype=dtype), x.new_empty(N, dtype=torch.float32)
    grad_x, grad_weight = (torch.empty_like(x), weight.new_zeros(width, weight.size(1))) if needs_grad else (x.new_empty(0), x.new_empty(0))
    for start in range(0, N, chunk):
        x_c, target, loss = (part[start : start + chunk] for part in (x, targets, losses))
        x_c = x_c.to(dtype)
        z = torch.mm(x_c, W.T, out=logits[: len(x_c)])
        fast = z.dtype is not torch.float32 and not INTERPRETED
        launcher(width <= MOST)((len(z),), z, target, loss, width, V, softcap or 1.0, bool(softcap), fast, needs_grad)
        if needs_grad:
            grad_x[start : start + chunk] = z @ W
            grad_weight += z.T @ x_c
    return losses.sum(), grad_x, grad_weight[:V]
