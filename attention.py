"""tau attention: the operator. One scalar lambda a token and head takes the place of query and key vectors."""

import torch

IMPLS = ("auto", "naive")


def tau_attention(lambda_q, lambda_k, v, temperature, log_decay=None, key_bias=None, impl="auto"):
    """Causal attention by distance of scalars: out_i = sum_{j<=i} softmax_j(logit_ij) v_j, where

        logit_ij = -|lambda_q,i - lambda_k,j| / temperature  +  key_bias_j  +  sum of log_decay over j+1 .. i

    (Topological Transformer, 2026, section "taumode attention"; the last two terms are zero in the published form.)

    lambda_q     (B, H, Tq)        bounded energies of the queries, the last Tq of the T positions; Tq = T in training
    lambda_k     (B, Hkv, T)       of the keys; H is a multiple of Hkv, query head h reads key head h // (H/Hkv)
    v            (B, Hkv, T, D)    values
    temperature  number > 0 or (H,)
    log_decay    (B, H, T) or (H,), <= 0: what a step forward costs
    key_bias     (B, Hkv, T)
    impl         "naive": dense, O(T^2) time and memory. "auto": the fastest there is, which is "naive" so far.

    Returns (B, H, Tq, D) in v's dtype; scores and weights are in the lambdas' dtype. Differentiable in every float
    input. Raises ValueError for shapes that do not fit and for an unknown impl.
    """
    B, H, Tq = lambda_q.shape
    Hkv, T, D = v.shape[1:]
    if lambda_k.shape != (B, Hkv, T) or v.shape[0] != B or H % Hkv or Tq > T:
        raise ValueError(f"shapes do not fit: lambda_q {tuple(lambda_q.shape)}, lambda_k {tuple(lambda_k.shape)}, "
                         f"v {tuple(v.shape)}")
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: one of {', '.join(IMPLS)}")
    return naive(lambda_q, lambda_k, v, temperature, log_decay, key_bias)


def naive(lambda_q, lambda_k, v, temperature, log_decay=None, key_bias=None):
    """The reference: the definition of tau_attention, line by line."""
    B, H, Tq = lambda_q.shape
    Hkv, T, D = v.shape[1:]
    group = H // Hkv

    distance = (lambda_q.view(B, Hkv, group, Tq, 1) - lambda_k.view(B, Hkv, 1, 1, T)).abs()  # (B, Hkv, group, Tq, T)
    if torch.is_tensor(temperature) and temperature.ndim:
        temperature = temperature.view(Hkv, group, 1, 1)
    logits = -distance / temperature
    if key_bias is not None:
        logits = logits + key_bias.view(B, Hkv, 1, 1, T)
    if log_decay is not None:
        steps = log_decay.double() if log_decay.ndim == 3 else log_decay.double()[:, None].expand(H, T)
        total = steps.cumsum(-1).view(-1, Hkv, group, T)  # (B or 1, Hkv, group, T)
        logits = logits + (total[..., T - Tq:, None] - total[..., None, :]).to(logits.dtype)
    future = torch.ones(Tq, T, dtype=torch.bool, device=v.device).triu(T - Tq + 1)
    weights = logits.masked_fill(future, float("-inf")).softmax(-1)
    out = weights.flatten(2, 3).to(v.dtype) @ v  # (B, Hkv, group * Tq, D)
    return out.view(B, H, Tq, D)
