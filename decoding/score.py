"""The loss of a text on a trained model, whatever its length."""

import torch
import torch.nn.functional as F

from decoding.cache import make_cache
from decoding.generate import PIECE


@torch.no_grad()
def loss_of(model, tokens, cache_name, stride):
    """The loss, in nats, of all tokens of a list but the first, in all: each is predicted from all before it with cache "stream",
    else from those before it in a window of block_size tokens. Windows begin `stride` tokens after one another, and what an earlier
    one has predicted is only context in a later one. Apart from the tokens themselves, memory does not grow with the text."""
    device, total, done, last = model.head.weight.device, 0.0, 0, len(tokens) - 1
    endless = cache_name == "stream"
    window, stride = (last, last) if endless else (model.config.block_size, stride)
    for begin in range(0, last, stride):
        end = min(begin + window, last)
        cache = make_cache(cache_name if endless else "plain", model.config, device)
        for start in range(begin, end, PIECE):
            stop = min(start + PIECE, end)
            idx = torch.tensor([tokens[start:stop]], device=device)
            x = model(idx, cache=cache, head=False)[0, max(0, done - start) :]  # of the tokens whose next one counts
            targets = torch.tensor(tokens[stop + 1 - len(x) : stop + 1], dtype=torch.long, device=device)
            total += F.cross_entropy(model.logits(x), targets, reduction="sum").item()
        done = end
        if end == last:
            return total
    return total
