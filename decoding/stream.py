"""StreamCache's step in plain torch, for any device and without a compiler: what decode.cpp's stream() computes, for some tokens at
once, with the same state.

A row of the state stands for keys that lie close together: where they lie on average, the log of their weight and their mean value. A
head has N of them, sorted by place, and after them RECENT more for the latest tokens as they came. When these are full, all are joined:
rows in the same cell of [0, 1), and, if more than N are left, those that will be missed least."""

import math

import torch
import torch.nn.functional as F

from ops.attention import finest

RECENT = 16  # as in decode.cpp
NOWHERE = 2.0  # the place of a row without a key, whose weight is -inf


def stream(lambda_q, lambda_k, v, log_decay, bias, temperature, cells, place, weight, value, passed, sink, length):
    """Add T tokens, after `length` others, to the state, in place, and return what each attends to, (B, H, T, D).

    lambda_q (B, H, T), lambda_k (B, Hkv, T), v (B, Hkv, T, D), log_decay (B, H, T), bias (B, Hkv, T); of each head the temperature
    (H,) and how many cells [0, 1) has, (H,). The state: place (B, H, N + RECENT), weight likewise and value (B, H, N + RECENT, D)
    are the rows; passed (B, H) is the sum of log decays since they were joined, from when on their weights count. sink (H,), if any: the
    log weight of a value 0. Memory is O(RECENT N H)."""
    H, T = lambda_q.shape[1:]
    lambda_k, bias, v = (x.repeat_interleave(H // x.size(1), 1) for x in (lambda_k, bias, v))  # of each query head
    N = place.size(2) - RECENT
    outs, start = [], 0
    while start < T:
        recent = (length + start) % RECENT
        stop = min(T, start + RECENT - recent)
        begin, end = N + recent, N + recent + stop - start  # rows of these tokens
        since = passed[..., None] + log_decay[..., start:stop].cumsum(-1)
        place[..., begin:end] = lambda_k[..., start:stop]
        weight[..., begin:end] = bias[..., start:stop] - since
        value[:, :, begin:end] = v[:, :, start:stop]
        distance = (lambda_q[..., start:stop, None].to(since.dtype) - place[:, :, None, :end]).abs()
        logits = weight[:, :, None, :end] - distance / temperature[:, None, None]
        future = torch.ones(stop - start, end, dtype=torch.bool, device=v.device).triu(begin + 1)
        logits = logits.masked_fill(future, -math.inf)
        if sink is not None:
            logits = torch.cat([logits, (sink[:, None] - since)[..., None]], -1)
        outs.append(logits.softmax(-1)[..., :end].float() @ value[:, :, :end])
        passed.copy_(since[..., -1])
        if end == N + RECENT:
            weight += passed[..., None]
            passed.zero_()
            compress(place, weight, value, temperature[:, None], cells[:, None])
        start = stop
    return torch.cat(outs, 2).to(v.dtype)


def compress(place, weight, value, temperature, cells):
    """Join rows until at most N are left. temperature, cells (H, 1)."""
    N = place.size(-1) - RECENT
    order = place.argsort(dim=-1, stable=True)
    rows = place.gather(-1, order), weight.gather(-1, order), value.gather(2, order[..., None].expand_as(value))
    cell = (rows[0] * cells).floor().minimum(cells - 1) + rows[1].isneginf()
    rows = joined(*rows, cell.diff() != 0)
    gap = rows[0].to(temperature.dtype).diff()
    missed = rows[1][..., :-1] + (gap / (gap + temperature)).log()  # the log of what a query there would miss of a row
    missed = missed.masked_fill(rows[1][..., 1:].isneginf(), math.inf)
    excess = (~rows[1].isneginf()).sum(-1, keepdim=True) - N
    least = missed.argsort(dim=-1, stable=True).argsort(dim=-1) < excess
    rows[1][..., :-1] -= torch.where(least, gap / temperature, 0).float()  # as the next row's place sees it
    rows = joined(*rows, ~least)
    for x, new in zip((place, weight, value), rows):
        x.copy_(new)


def joined(place, weight, value, apart):
    """The rows with each row i + 1 for which apart[..., i] is false joined to the one before it; then rows without a key."""
    run = F.pad(apart, (1, 0)).cumsum(-1)
    most = torch.full_like(weight, -math.inf).scatter_reduce_(2, run, weight, "amax")  # of each run
    mass = torch.where(weight.isneginf(), 0, (weight - most.gather(2, run)).to(finest(place.device)).exp())[..., None]
    rows = torch.cat([mass, mass * place[..., None], mass * value], -1)
    rows = torch.zeros_like(rows).scatter_add_(2, run[..., None].expand_as(rows), rows)
    mass, place, value = rows.split([1, 1, value.size(3)], -1)
    mean = lambda x: (x / mass.clamp_min(1)).float()  # where there is a key it is 1 at least
    return torch.where(most.isneginf(), NOWHERE, mean(place)[..., 0]), most + mass[..., 0].log().float(), mean(value)
