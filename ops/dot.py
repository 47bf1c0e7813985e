"""Attention by dot product: the operator of the twin, and of tau's local heads."""

import math

import torch
import torch.nn.functional as F

from ops.attention import add_terms, finest, running_sum

DOT_SCALE = 1.2  # sharpens the softmax of normed queries and keys


def dot_attention(q, k, v, scale=DOT_SCALE, log_decay=None, key_bias=None):
    """The twin's operator, causal: the logits are scale q.k / sqrt(D), plus the decay and bias that tau_attention adds to its own.
    q (B, H, Tq, D) are the last Tq of the T positions of k and v (B, Hkv, T, D), scale is a number or (H,). Returns (B, H, Tq, D)
    in q's dtype."""
    Tq, T, D, group = q.size(2), k.size(2), k.size(3), q.size(1) // k.size(1)
    if torch.is_tensor(scale):
        q, scale = q * scale.view(-1, 1, 1).to(q.dtype), 1.0
    mask, scale = None, scale / math.sqrt(D)
    if log_decay is not None or key_bias is not None:
        if Tq == T:
            q, k, v = with_key_weights(q * scale, k, v, log_decay, key_bias)
            scale = 1.0
        else:
            mask = add_terms(q.new_zeros(1, q.size(1), Tq, T), log_decay, key_bias)
    elif Tq not in (1, T):
        mask = torch.ones(Tq, T, dtype=torch.bool, device=q.device).tril(T - Tq)
    return F.scaled_dot_product_attention(
        q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, is_causal=mask is None and Tq == T, scale=scale, enable_gqa=group > 1
    )[..., :D]


def with_key_weights(q, k, v, log_decay, key_bias):
    """q, k and v with extra columns, with which flash attention adds to q.k the key's log weight bias_j - c_j, where c is the running
    sum of log_decay (c_i is the same for all keys of a query, so it cancels in the softmax). Each key holds its log weight once
    per query head that reads it, in three parts, which keep float32's precision in bfloat16; queries hold ones, values zeros. The
    logits are as large as c, so a softmax weight is off by at most 2^-24 c of itself: 6e-5 where the decays before it sum to 1,000.
    float16 holds log weights up to 65,504 only."""
    (B, H, T, D), Hkv = q.shape, k.size(1)
    weight = 0 if log_decay is None else -running_sum(log_decay.to(finest(q.device)))
    if key_bias is not None:
        weight = weight + key_bias.to(finest(q.device)).repeat_interleave(H // Hkv, 1)
    high = weight + (weight.bfloat16() - weight).detach()  # high carries the whole gradient
    rest = (weight - high).detach()
    middle = rest.bfloat16().to(rest.dtype)
    parts = torch.stack([high, middle, rest - middle], -1).to(k.dtype)  # (B, H, T, 3)
    parts = parts.view(B, Hkv, -1, T, 3).movedim(2, 3).flatten(3)
    ones = torch.eye(H // Hkv, dtype=q.dtype, device=q.device).repeat_interleave(3, 1).repeat(Hkv, 1)[:, None].expand(B, H, T, -1)
    width = -(-(D + ones.size(-1)) // 8) * 8  # flash attention wants a multiple of 8
    padded = lambda x: F.pad(x, (0, width - x.size(-1)))
    return padded(torch.cat([q, ones], -1)), padded(torch.cat([k, parts], -1)), padded(v)


def window_attention(q, k, v, log_decay, key_bias, window, scale):
    """dot_attention to the last `window` tokens, the query's own included: q (B, H, Tq, D) are the last Tq of the T <= Tq +
    window - 1 positions of k and v (B, Hkv, T, D); log_decay (B, H, T) and key_bias (B, Hkv, T), or None; scale is a number or
    (H,). Returns (B, H, Tq, D). O(T window) time."""
    (B, H, Tq, D), Hkv, T = q.shape, k.size(1), k.size(2)
    if T <= window:
        return dot_attention(q, k, v, scale, log_decay, key_bias)
    blocks, group = -(-Tq // window), H // k.size(1)
    before, after = window - (T - Tq), blocks * window - Tq
    blocked = lambda x: F.pad(x, (0, 0) * (x.ndim - 3) + (before, after)).unfold(2, 2 * window, window)  # a block and the one before it
    scale = torch.as_tensor(scale / math.sqrt(D), dtype=q.dtype, device=q.device)
    q = F.pad(q * scale.view(-1, 1, 1), (0, 0, 0, after))
    k, v = blocked(k.to(q.dtype)), blocked(v.to(q.dtype))  # (B, Hkv, blocks, D, 2 window)
    logits = q.view(B, Hkv, group, blocks, window, D) @ k[:, :, None]
    if log_decay is not None:
        c = blocked(running_sum(log_decay.to(finest(q.device)))).view(B, Hkv, group, blocks, 2 * window)
        c = (c - c[..., window : window + 1]).to(q.dtype)
        logits = logits + c[..., window:, None] - c[..., None, :]
    if key_bias is not None:
        logits = logits + blocked(key_bias.to(q.dtype))[:, :, None, :, None]
    i, j = (torch.arange(n, device=q.device) for n in (window, 2 * window))
    seen = (j > i[:, None]) & (j <= window + i[:, None]) & (j + window * torch.arange(blocks, device=q.device)[:, None, None] >= before)
    y = logits.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, :, None].transpose(-1, -2)
    return y.view(B, H, blocks * window, D)[:, :, :Tq]
