"""Decoding with a StreamCache on a GPU: the hundreds of kernels of a token as one CUDA graph, which is launched at once."""

import math

import torch

from common import first_line
from decoding.cache import say_once
from decoding.stream import RECENT


def recorded(step, device, pool):
    """(a function that executes what step() does, on the same memory; what step() returns). step() itself is not executed. pool: of the
    memory for what is in between."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        before = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.Stream()):
                result = step()
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # a recording that fails at its end leaves its own behind
            raise (error.__context__ or error) from None
    return graph.replay, result


class GraphDecoder:
    """decode_one_token() of a model with a StreamCache. What a token does depends on its place among the RECENT ones and on nothing else
    that is not in memory, so there is a graph for each place. The first tokens go as they come, until the cache has all that it keeps."""

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.first = max(RECENT, model.config.local_window, model.config.conv)
        self.graphs, self.pool = {}, None  # of each place: a function, and the logits that it writes
        self.token = self.rotary = None  # what it reads

    def step(self, token, rotary=None):
        return self.model.logits(self.model(token, cache=self.cache, head=False, rotary=rotary)[:, -1])

    def __call__(self, token):
        """Logits (B, V) of the token after one more token (B, 1), which is added to the cache. The next call overwrites them."""
        if self.first > 0:
            self.first -= 1
            return self.step(token)
        length = self.cache.length
        rotary = self.model.rotary(length, length + 1)
        if self.token is None:
            self.token, self.rotary = token.clone(), [x.clone() for x in rotary]
            self.pool = torch.cuda.graph_pool_handle() if token.is_cuda else None
        for x, new in zip((self.token, *self.rotary), (token, *rotary)):
            x.copy_(new)
        if length % RECENT not in self.graphs:
            try:
                self.graphs[length % RECENT] = recorded(lambda: self.step(self.token, self.rotary), token.device, self.pool)
            except RuntimeError as error:
                say_once(f"stream cache: the kernels of a token are launched one by one, for no CUDA graph was made: {first_line(error)}")
                self.first = math.inf
            self.cache.length = length
            if self.first:
                return self.step(token)
        execute, logits = self.graphs[length % RECENT]
        execute()
        self.cache.length += 1
        return logits
