"""Generate tokens with a trained model: prefill, decode one token, decode n tokens, sample (the four functions of gpt-fast)."""

import torch
import torch.nn as nn

from decoding.cache import StreamCache, make_cache
from decoding.graphs import GraphDecoder

PIECE = 256  # tokens per forward pass, where memory must not grow with the text


def for_decoding(model):
    """The model, changed in place: on a CPU, weight matrices with more outputs than inputs are stored column by column, which makes
    the product of a single token with them up to twice as fast."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features > module.in_features and module.weight.device.type == "cpu":
            module.weight.data = module.weight.data.T.contiguous().T
    return model


def probabilities(logits, temperature, top_k, top_p):
    """(B, V) float64 of logits (B, V): divided by the temperature, then cut to the top_k most likely tokens (0: all),
    then to the fewest of those that hold top_p of the mass. temperature 0: all mass is on the most likely token."""
    logits = logits.double()
    logits = logits - logits.amax(-1, keepdim=True)
    if temperature == 0:
        return torch.zeros_like(logits).scatter(1, logits.argmax(-1, keepdim=True), 1.0)
    ordered, order = (logits / temperature).sort(descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = float("-inf")
    p = ordered.softmax(-1)
    p[p.cumsum(-1) - p >= top_p] = 0
    return torch.zeros_like(p).scatter(1, order, p / p.sum(-1, keepdim=True))


def sample(p, generators):
    """One token (B, 1) int64 from each row of p (B, V) on the CPU, row i by generators[i] alone: a sample does not depend
    on the others in its batch."""
    u = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in generators])[:, None]
    cumulated = p.cumsum(-1)
    return torch.searchsorted(cumulated, u * cumulated[:, -1:], right=True).clamp_max(p.size(1) - 1)


def prefill(model, tokens, cache):
    """Logits (B, V) of the token after tokens (B, T >= 1), which are added to the cache, if it is not None. A StreamCache gets PIECE
    of them at a time, so that memory does not grow with T."""
    for part in tokens.split(PIECE if isinstance(cache, StreamCache) else tokens.size(1), 1):
        x = model(part, cache=cache, head=False)
    return model.logits(x[:, -1])


def decode_one_token(model, token, cache):
    """Logits (B, V) of the token after one more token (B, 1), which is added to the cache."""
    return prefill(model, token, cache)


def decoder(model, cache):
    """decode_one_token() as a function of the token alone: for a StreamCache on a GPU by CUDA graphs."""
    if isinstance(cache, StreamCache) and model.head.weight.is_cuda:
        return GraphDecoder(model, cache)
    return lambda token: decode_one_token(model, token, cache)


@torch.no_grad()
def decode_n_tokens(model, prompts, seeds, max_new_tokens, temperature, top_k, top_p, cache="exact", stop=()):
    """Yield (row, token) for each new token of each prompt. prompts: lists of tokens, at least one in each. Row i draws with
    seeds[i] alone, and ends after max_new_tokens or with a token of `stop`.

    All rows start with as many tokens as the shortest prompt has; the rest of a longer prompt is fed in token by token while other
    rows are already sampled. Of a prompt longer than block_size the last block_size tokens are read, with cache = "stream" all; the
    context grows on from there without a limit. With "none" nothing is cached.
    A StreamCache in place of a name goes on from the tokens it holds and stores its one prompt and the sample, except the last
    token, which stays pending; with a pending token the prompt may be empty."""
    device, block_size = model.head.weight.device, model.config.block_size
    session = None if isinstance(cache, str) else cache
    if session is not None:
        prompts = [session.pending + prompt for prompt in prompts]
        session.pending = prompts[0][-1:]
    elif cache != "stream":
        prompts = [prompt[-block_size:] for prompt in prompts]
    length = min(block_size, max(map(len, prompts)) + max_new_tokens)
    current = session or (None if cache == "none" else make_cache(cache, model.config, device, length))
    decode = decoder(model, current)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    left = [max_new_tokens] * len(prompts)
    at = min(map(len, prompts))  # tokens of each row so far
    context = torch.tensor([prompt[:at] for prompt in prompts], device=device)
    if max_new_tokens:
        logits = prefill(model, context, current)
    elif session is not None and at > 1:
        prefill(model, context[:, :-1], current)
    while any(left):
        token = torch.tensor([prompt[at] if at < len(prompt) else 0 for prompt in prompts])[:, None]
        rows = [row for row, prompt in enumerate(prompts) if at >= len(prompt) and left[row]]
        if rows:
            p = probabilities(logits[rows].cpu(), temperature, top_k, top_p)
            token[rows] = sample(p, [generators[row] for row in rows])
        for row in rows:
            new = token[row].item()
            if session is not None:
                session.pending = [new]
            yield row, new
            left[row] = 0 if new in stop else left[row] - 1
        at += 1
        if not any(left):
            return
        token = token.to(device)
        if current is not None:
            logits = decode(token)
        else:
            context = torch.cat([context, token], 1)
            logits = prefill(model, context, None if at <= block_size else make_cache("plain", model.config, device, at))
