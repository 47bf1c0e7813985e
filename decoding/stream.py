"""StreamCache's step in plain torch, for any device and without a compiler: what decode.cpp's stream() computes, for some tokens at
once, with the same state."""

import torch

MOST = 30  # the greatest log weight, relative to the state's scale: beyond it the state is rescaled
LEAST = 1e-30  # the least weight of a bin that counts


def stream(lambda_q, lambda_k, v, log_decay, bias, temperature, first, state, scale, sink):
    """Add T tokens to the state, in place, and return what each attends to, (B, H, T, D).

    lambda_q (B, H, T), lambda_k (B, Hkv, T), v (B, Hkv, T, D), log_decay (B, H, T), bias (B, Hkv, T), temperature (H,). first (H + 1,):
    where each head's bins begin among the N of all. state (B, N, 2, D + 1): of each bin the sums of exp(x + w) (v, 1) and of
    exp(-x + w) (v, 1), where x is a key's distance from the bin's centre in temperatures and w its log weight; both in units of
    exp(scale), (B, H), -inf at first. sink (H,), if any: the log weight of a value 0. Memory is O(T N H + T^2 H)."""
    B, H, T = lambda_q.shape
    group, fine, D = H // lambda_k.size(1), scale.dtype, v.size(-1)
    lambda_k, bias, v = (x.repeat_interleave(group, 1) for x in (lambda_k, bias, v))  # of each query head
    bins, sharpness = first.diff().to(fine)[:, None], 1 / temperature.to(fine)[:, None]  # (H, 1)
    q, k = lambda_q.to(fine), lambda_k.to(fine)
    own, into = ((x * bins).floor().clamp_min(0).minimum(bins - 1) for x in (q, k))  # each token's bin as a query and as a key
    center = lambda number: (number + 0.5) / bins
    x = (k - center(into)) * sharpness
    w = bias.to(fine) - log_decay.to(fine).cumsum(-1)
    scale.copy_(torch.where(scale.isinf(), w.amax(-1), scale))  # nothing is stored yet
    w = w - scale[..., None]  # in units of the state; the queries' part, the decay since then, cancels

    # in a query's own bin, where a key lies on either side, a weight is the mean over the places that the key may have
    below = (q - own / bins) * sharpness
    above = sharpness / bins - below
    factor = ((2 - (-below).exp() - (-above).exp()) / (2 * below.sinh() + 2 * above.sinh())).log()
    offset = (q - center(own)) * sharpness

    # the tokens before: (B, H, T, N) exponents of a bin's first and of its second sum
    head = torch.repeat_interleave(torch.arange(H, device=q.device), first.diff(), output_size=state.size(1))  # (N,) of each bin
    number = torch.arange(len(head), device=q.device) - first[head]
    mine = head == torch.arange(H, device=q.device)[:, None]  # (H, N)
    place, number = (number + 0.5) / bins[head, 0], number.to(fine)
    distance = (q[..., None] - place).abs() * sharpness[..., None]
    held = state[:, None, None, :, 0, D] > LEAST
    exponents = side_exponents(distance, number, own[..., None], factor[..., None], offset[..., None], held & mine[:, None])
    mass = state[:, None, None, :, 0, D].clamp_min(LEAST).to(fine).log()

    # the tokens of this call: (B, H, T, T)
    distance = (q[..., None] - center(into)[..., None, :]).abs() * sharpness[..., None]
    seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    pairs = side_exponents(distance, into[..., None, :], own[..., None], factor[..., None], offset[..., None], seen)
    pairs = torch.logaddexp(pairs[0] + x[..., None, :], pairs[1] - x[..., None, :]) + w[..., None, :]

    most = torch.maximum((torch.maximum(*exponents) + mass).amax(-1), pairs.amax(-1))[..., None]
    rows = torch.cat([v.float(), torch.ones_like(v[..., :1], dtype=torch.float32)], -1)
    total = (pairs - most).exp().float() @ rows
    for side in (0, 1):
        total = total + ((exponents[side] - most).exp().float().flatten(1, 2) @ state[:, :, side]).unflatten(1, (H, T))

    if sink is not None:
        total[..., D:] += (sink[:, None, None] - most - (scale[..., None] + log_decay.to(fine).cumsum(-1))[..., None]).exp().float()

    # the state after them
    scale += log_decay.to(fine).sum(-1)
    highest = w.amax(-1)
    shift = torch.where(highest > MOST, highest, 0)
    scale += shift
    state *= (-shift).exp()[:, head, None, None].float()
    to = (first[:-1, None] + into.long()).flatten(1)  # (B, H T)
    hit = (to[:, None] == torch.arange(len(head), device=q.device)[:, None]).float()  # (B, N, H T)
    weights = (torch.stack([x, -x], -1) + (w - shift[..., None])[..., None]).exp().float()  # (B, H, T, 2)
    added = weights[..., None] * rows[..., None, :]
    state += (hit @ added.flatten(1, 2).flatten(2)).unflatten(-1, (2, D + 1))
    return (total[..., :D] / total[..., D:]).to(v.dtype)


def side_exponents(distance, number, own, factor, offset, counts):
    """The log weights of both sums of the bins `number` for queries in the bins `own`; -inf where a sum does not count."""
    nothing = distance.new_tensor(-torch.inf)
    first = torch.where(number < own, -distance, torch.where(number == own, factor - offset, nothing))
    second = torch.where(number > own, -distance, torch.where(number == own, factor + offset, nothing))
    return torch.where(counts, first, nothing), torch.where(counts, second, nothing)
