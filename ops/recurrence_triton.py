"""The recurrence on a GPU: a program goes through the tokens of one head, a few rows in registers at a time while the next are on their
way. One row after the other, so that the result for a token does not depend on where in the sequence it stands."""

import torch
import triton
import triton.language as tl

from ops.attention_triton import width

ROWS = 8  # loaded at once


@triton.jit
def row_of(tile, i):
    """Row i of a tile (ROWS, WIDTH) or entry i of (ROWS,)."""
    rows = tl.arange(0, tile.shape[0])
    return tl.sum(tl.where((rows == i) if len(tile.shape) == 1 else (rows == i)[:, None], tile, 0.0), 0)


def recurrence_kernel(a, b, y, T, H, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """y_t = a_t y_(t-1) + b_t: a (B, T, H), b and y (B, T, H, D)."""
    head = tl.program_id(0).to(tl.int64)
    head = head // H * T * H + head % H  # its first token
    r, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = head + r * H
    inside, place = r < T, at[:, None] * D + d[None, :]
    kept, rows = tl.load(a + at, mask=inside, other=0.0), tl.load(b + place, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    last = tl.zeros([WIDTH], tl.float32)
    for start in range(0, T, ROWS):
        later = start + ROWS + r < T
        next_kept = tl.load(a + at + ROWS * H, mask=later, other=0.0)
        next_rows = tl.load(b + place + ROWS * H * D, mask=later[:, None] & (d < D)[None, :], other=0.0)
        for i in tl.static_range(ROWS):
            last = row_of(kept, i) * last + row_of(rows, i)
            rows = tl.where((r == i)[:, None], last[None, :], rows)
        tl.store(y + place, rows, mask=(start + r < T)[:, None] & (d < D)[None, :])
        kept, rows = next_kept, next_rows
        at += ROWS * H
        place += ROWS * H * D


def recurrence_gradient_kernel(grad, a, y, to_a, to_b, T, H, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """From the last token to the first: grad_b_t = grad_t + a_(t+1) grad_b_(t+1), grad_a_t = grad_b_t . y_(t-1)."""
    head = tl.program_id(0).to(tl.int64)
    head = head // H * T * H + head % H
    r, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    t = T - 1 - r
    at = head + t * H
    place, real = at[:, None] * D + d[None, :], (d < D)[None, :]
    kept = tl.load(a + at + H, mask=(t >= 0) & (t < T - 1), other=0.0)
    rows = tl.load(grad + place, mask=(t >= 0)[:, None] & real, other=0.0)
    last = tl.zeros([WIDTH], tl.float32)
    for start in range(0, T, ROWS):
        before = tl.load(y + place - H * D, mask=(t >= 1)[:, None] & real, other=0.0)
        next_kept = tl.load(a + at + H - ROWS * H, mask=t >= ROWS, other=0.0)
        next_rows = tl.load(grad + place - ROWS * H * D, mask=(t >= ROWS)[:, None] & real, other=0.0)
        for i in tl.static_range(ROWS):
            last = row_of(kept, i) * last + row_of(rows, i)
            rows = tl.where((r == i)[:, None], last[None, :], rows)
        tl.store(to_b + place, rows, mask=(t >= 0)[:, None] & real)
        tl.store(to_a + at, tl.sum(rows * before, 1), mask=t >= 0)
        kept, rows = next_kept, next_rows
        t -= ROWS
        at -= ROWS * H
        place -= ROWS * H * D


launch = triton.jit(recurrence_kernel)
launch_gradient = triton.jit(recurrence_gradient_kernel)


def recurrence(a, b):
    (B, T, H, D), y = b.shape, torch.empty_like(b)
    with torch.cuda.device_of(b):
        launch[B * H,](a, b, y, T, H, D, width(D), ROWS, num_warps=1)
    return y


def recurrence_backward(grad, a, y):
    (B, T, H, D), to_a, to_b = y.shape, torch.empty_like(a), torch.empty_like(y)
    with torch.cuda.device_of(y):
        launch_gradient[B * H,](grad, a, y, to_a, to_b, T, H, D, width(D), ROWS, num_warps=1)
    return to_a, to_b
