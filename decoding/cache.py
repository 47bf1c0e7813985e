"""What attention keeps of the tokens so far, so that a new one costs little. The model calls attend(), recent() and energy().

Cache        all keys, and a new token reads them all: for tau (V, lambda_k), B Hkv T (D + 1) numbers per layer; for dot (K, V),
             2 B Hkv T D
ExactCache   tau: the same numbers, sorted by lambda in segments whose sizes are powers of two, with running sums: a new token
             reads O(log T) rows (decode.cpp), and the result is the same
StreamCache  tau: rows for keys that lie close together, whose number does not depend on that of the tokens; the result is nearly the same
"""

import functools
import math
import sys

import torch

from common import UserError, first_line
from data import checkpoint_file
from decoding.stream import NOWHERE, RECENT, stream
from model import energy
from ops.attention import compiled, finest
from ops.fused import ENERGY_EPS

SEGMENT, BLOCK = 128, 16  # as in decode.cpp


class Cache:
    energy = staticmethod(energy)

    def __init__(self, config, length=0):
        """Allocated for `length` tokens (0: block_size) and written in place; where more come, for twice as many."""
        self.config = config
        self.size = length or config.block_size  # tokens that there is room for at first
        self.length = 0  # tokens that every layer has stored
        self.kept, self.last = {}, {}

    def nbytes(self):
        return sum(x.nbytes for x in [*self.kept.values(), *self.last.values()])

    def extend(self, layer, **new):
        """Store tensors of new tokens, each (B, heads, T, ...) or None; returns the same tensors of all tokens so far, as a list."""
        whole = []
        for name, x in new.items():
            if x is not None:
                kept, end = self.kept.get((layer, name), x[:, :, :0]), self.length + x.size(2)
                if end > kept.size(2):
                    kept = self.kept[layer, name] = grown(kept, max(end, self.size, 2 * kept.size(2)))
                kept[:, :, self.length : end] = x
                x = kept[:, :, :end]
            whole.append(x)
        return whole

    def attend(self, layer, operator):
        """The operator, tau_attention or dot_attention, as a function of new tokens alone: it stores them and attends to all so far."""

        def attend(queries, keys, v, scale, log_decay, key_bias, **more):
            keys, v, log_decay, key_bias = self.extend(layer, keys=keys, values=v, log_decay=log_decay, key_bias=key_bias)
            return operator(queries, keys, v, scale, log_decay, key_bias, **more)

        return attend

    def recent(self, layer, name, x, n, dim):
        """x with the last n tokens before it, or as many as there were, in front of it along dim; stores the last n for the next call."""
        if (layer, name) in self.last:
            x = torch.cat([self.last[layer, name], x], dim)
        left = min(n, x.size(dim))
        self.keep((layer, name), x.narrow(dim, x.size(dim) - left, left))
        return x

    def keep(self, key, x):
        """Store x for the next call, in the same memory as the last time if it has the same shape: a CUDA graph knows no other."""
        if key in self.last and self.last[key].shape == x.shape:
            self.last[key].copy_(x)
        else:
            self.last[key] = x.clone()


def grown(x, size):
    """x (B, heads, n, ...) as the first n of `size` rows, the others 0. Raises UserError if there is no memory for them."""
    try:
        larger = x.new_zeros(*x.shape[:2], size, *x.shape[3:])
    except RuntimeError as error:
        raise UserError(
            f"no memory for a cache of {size:,} tokens: take fewer, or, with attention = \"tau\", cache 'stream', which does not grow "
            f"({first_line(error)})"
        ) from None
    larger[:, :, : x.size(2)] = x
    return larger


@functools.cache
def decode():
    return compiled("decoding/decode.cpp", "tauformer_decode")


class CompiledCache(Cache):
    """For tau on a CPU in float32, by decode.cpp."""

    @staticmethod
    def energy(x, laplacian):
        """model.energy(), in one pass if the tokens are few."""
        return decode().energy(x, laplacian, ENERGY_EPS) if x.size(1) < 8 else energy(x, laplacian)


class ExactCache(CompiledCache):
    def __init__(self, config, length=0):
        super().__init__(config, length)
        self.layers = {}

    def nbytes(self):
        return super().nbytes() + sum(x.nbytes for kept in self.layers.values() for x in kept)

    def attend(self, layer, operator):
        def attend(lambda_q, lambda_k, v, temperature, log_decay, key_bias, sink=None):
            end = self.length + v.size(2)
            if layer not in self.layers:
                self.layers[layer] = self.allocated(v, lambda_q.size(1), temperature)
            elif (times := -(-end // self.layers[layer][0].size(2))) > 1:
                self.layers[layer] = tuple(grown(x, max(2, times) * x.size(2)) if x.ndim > 2 else x for x in self.layers[layer])
            if self.length == 0:
                self.fill(self.layers[layer], lambda_k, v, log_decay, key_bias)
                return operator(lambda_q, lambda_k, v, temperature, log_decay, key_bias, sink=sink)
            sink = None if sink is None else sink.double()
            tokens = lambda_q, lambda_k, v, log_decay, key_bias
            if v.size(2) == 1:
                return self.step(self.layers[layer], self.length, sink, *tokens)
            return torch.cat(
                [
                    self.step(self.layers[layer], self.length + t, sink, *(x if x is None else x[:, :, t : t + 1] for x in tokens))
                    for t in range(v.size(2))
                ],
                2,
            )

        return attend

    def allocated(self, v, H, temperature):
        """(lambdas, weight, values, sums, scales, temperature, ends, now) of a layer, as decode.cpp describes them."""
        B, Hkv, T, D = v.shape
        N = -(-max(T, self.size) // SEGMENT) * SEGMENT
        single, double = (functools.partial(torch.zeros, B, dtype=dtype) for dtype in (torch.float32, torch.float64))
        return (
            grown(single(Hkv, 0), N),
            grown(single(H, 0), N),
            grown(single(Hkv, 0, D), N),
            grown(single(H, 0, 2, D + 1), N // BLOCK),
            grown(double(H, 0, 2), N // BLOCK),
            torch.as_tensor(temperature, dtype=torch.float64).expand(H).contiguous(),
            double(H, 1 + N // SEGMENT),
            double(H),
        )

    def fill(self, kept, lambda_k, v, log_decay, key_bias):
        """Store the first tokens, all at once."""
        lambdas, weight, values, sums, scales, temperature, ends, now = kept
        T = v.size(2)
        lambdas[:, :, :T], values[:, :, :T] = lambda_k, v
        sealed = T // SEGMENT * SEGMENT
        if log_decay is not None:
            c = log_decay.double().cumsum(-1)
            ends[:, :, 1 : 1 + T // SEGMENT] = c[:, :, SEGMENT - 1 :: SEGMENT]
            now.copy_(c[:, :, -1])
            for begin, end in [*segments(sealed), (sealed, T)]:
                weight[:, :, begin:end] = ends[:, :, min(end, sealed) // SEGMENT, None] - c[:, :, begin:end]
        if key_bias is not None:
            weight[:, :, :T] += key_bias.repeat_interleave(weight.size(1) // v.size(1), 1)
        for begin, end in segments(sealed):
            decode().seal(lambdas, weight, values, sums, scales, temperature, begin, end)

    def step(self, kept, length, sink, *token):
        """Store one token, the one after `length` others, and attend: (B, H, 1, D)."""
        lambdas, weight, values, sums, scales, temperature, ends, now = kept
        y = decode().attend(*(x if x is None else x.contiguous() for x in token), *kept, sink, length)
        if (length + 1) % SEGMENT == 0:  # it completes a segment, which absorbs the shorter ones before it
            sealed, end = length // SEGMENT * SEGMENT, length + 1
            ends[:, :, end // SEGMENT] = now
            begin = segments(end)[-1][0]
            shorter = [(start, stop, stop) for start, stop in segments(sealed) if start >= begin]
            for start, stop, counted_from in [*shorter, (sealed, end, sealed)]:
                weight[:, :, start:stop] += (now - ends[:, :, counted_from // SEGMENT])[..., None]
            decode().seal(lambdas, weight, values, sums, scales, temperature, begin, end)
        return y


def segments(length):
    """[(start, stop)] of the segments of `length` tokens, a multiple of SEGMENT: its decomposition into powers of two, the
    greatest first."""
    found, start = [], 0
    while start < length:
        size = 1 << ((length - start) // SEGMENT).bit_length() - 1
        found.append((start, start + size * SEGMENT))
        start += size * SEGMENT
    return found


class StreamCache(Cache):
    """A cache for any number of tokens: a token's memory and time do not depend on how many came before it.

    A head's cells are CELLS per temperature, side by side in [0, 1). Keys in one cell are read as one key of their weight, mean place
    and mean value, so that none is off by more than 1 / CELLS of a temperature, its weight by a factor between exp(-1 / CELLS) and
    exp(1 / CELLS). A head keeps as many rows as it has cells, as long as the states of all layers take at most STATE_BYTES for a batch of
    one. Where that is fewer, cells with keys may come to be more than rows: then those are joined to their neighbours that are missed
    least, by their weight, which decays, and their distance.
    ("Topological Transformer", conclusion, proposes sums over bins as per-centroid aggregates.)"""

    CELLS, STATE_BYTES = 32, 8e6

    def __init__(self, config, device="cpu"):
        """On a CPU by decode.cpp, where it could be compiled; otherwise by stream.py, which computes the same with the same state."""
        super().__init__(config)
        self.step = stream
        if torch.device(device).type == "cpu" and not not_compiled():
            self.step, self.energy = decode().stream, CompiledCache.energy
        self.pending = []  # the last token, if any, which is not stored yet: it goes in front of the next ones
        self.unshown = b""  # the first bytes of a character of which the sample has not had the others yet

    def rows(self, cells, D):
        """How many rows each head of a layer keeps besides the RECENT ones. cells (H,)."""
        room = self.STATE_BYTES / (self.config.n_layer * len(cells) * 4 * (D + 2)) - RECENT
        return max(1, int(min(room, cells.max())))

    def attend(self, layer, operator):
        def attend(lambda_q, lambda_k, v, temperature, log_decay, key_bias, sink=None):
            B, H, T = lambda_q.shape
            for x in (lambda_q, lambda_k) if T > 1 or v.device.type == "cpu" else ():  # a GPU would wait for the answer at each token
                least, greatest = (bound.item() for bound in torch.aminmax(x))
                if not 0 <= least <= greatest <= 1:  # NaN too; in float32 lambda may round to 1
                    raise UserError(
                        f"cache 'stream' needs lambdas from 0 to 1; layer {layer} has {least:.4g} to {greatest:.4g}: use 'exact'"
                    )
            Hkv, D, fine = v.size(1), v.size(3), finest(v.device)
            if not torch.is_tensor(temperature):
                temperature = v.new_full((), temperature, dtype=fine)
            temperature = temperature.to(fine).expand(H).contiguous()
            cells = (self.CELLS / temperature).ceil()
            if (layer, "place") not in self.kept:
                N = self.rows(cells, D) + RECENT
                self.kept[layer, "place"] = v.new_full((B, H, N), NOWHERE, dtype=torch.float32)
                self.kept[layer, "weight"] = v.new_full((B, H, N), -math.inf, dtype=torch.float32)
                self.kept[layer, "value"] = v.new_zeros(B, H, N, D, dtype=torch.float32)
                self.kept[layer, "passed"] = v.new_zeros(B, H, dtype=fine)
            zeros = lambda heads: v.new_zeros(B, heads, T, dtype=fine)
            return self.step(
                lambda_q.contiguous(),
                lambda_k.contiguous(),
                v.contiguous(),
                zeros(H) if log_decay is None else log_decay.to(fine).contiguous(),
                zeros(Hkv) if key_bias is None else key_bias.to(fine).contiguous(),
                temperature,
                cells,
                *(self.kept[layer, name] for name in ("place", "weight", "value", "passed")),
                None if sink is None else sink.to(fine),
                self.length,
            )

        return attend

    def save(self, path, model_hash):
        """Write the state after the tokens so far to a file, to go on from with the same model. model_hash: its checkpoint's sha256."""
        tensors = {
            f"{kind}.{layer}.{name}": x.contiguous() for kind in ("kept", "last") for (layer, name), x in getattr(self, kind).items()
        }
        session = {"length": self.length, "pending": self.pending, "unshown": self.unshown.hex(), "model": model_hash}
        checkpoint_file.save(path, tensors, {"session": session})

    @classmethod
    def load(cls, path, model, model_hash):
        """The StreamCache that save() wrote, on the model's device. Raises UserError if the file is damaged or of another model."""
        tensors, header = checkpoint_file.load(path, ["session"], "session of sample.py")
        config, device, session = model.config, model.head.weight.device, header["session"]
        cache, alike = cls(config, device), cls(config, device)
        if session.get("model") != model_hash:
            raise UserError(f"{path} is the session of another checkpoint: give the one that it was begun with, or another --session")
        try:
            cache.length, cache.pending, cache.unshown = session["length"], session["pending"], bytes.fromhex(session["unshown"])
            if type(cache.length) is not int or not 0 <= cache.length < 2**52:  # positions are float64
                raise ValueError("its length is no number of tokens")
            if type(cache.pending) is not list or len(cache.pending) > 1 or len(cache.unshown) > 3:
                raise ValueError("its last token is none")
            for key, x in tensors.items():
                kind, layer, name = key.split(".")
                dtype = finest(device) if name == "passed" else x.dtype
                getattr(cache, kind)[int(layer), name] = x.to(device, dtype)
            if cache.length:  # what recent() keeps is no longer than this
                place = cache.kept.get((0, "place"))
                if place is None or not place.numel():
                    raise ValueError("its state is empty, or an earlier version's: begin it anew")
                size = place.size(0), min(cache.length, max(config.conv, config.local_window))
                with torch.no_grad():
                    model(torch.zeros(size, dtype=torch.long, device=device), cache=alike)
            shapes = [{key: (x.shape, x.dtype) for key, x in (other.kept | other.last).items()} for other in (cache, alike)]
            if shapes[0] != shapes[1] or not all(type(token) is int and 0 <= token < config.vocab_size for token in cache.pending):
                raise ValueError("its state is not that of this model")
            if any(x.isnan().any() or (x == math.inf).any() for x in [*cache.kept.values(), *cache.last.values()]):
                raise ValueError("it holds what is no number")
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"{path} is damaged, or no session of sample.py ({error})") from None
        return cache


def make_cache(name, config, device, length=0):
    """The cache called "plain", "exact" or "stream", with room for `length` tokens at first (0: block_size). Where exact does not
    apply (dot, a GPU, no compiler) it is the plain one, whose results are the same. Raises UserError for stream with dot."""
    tau = config.attention == "tau"
    if name == "stream" and not tau:
        raise UserError("cache 'stream' is of attention = \"tau\": take exact")
    if name != "plain" and tau and device.type == "cpu" and (reason := not_compiled()):
        slow = "plain torch, slower" if name == "stream" else "a token reads all before it"
        say_once(f"{name} cache: {slow}, for decode.cpp could not be compiled: {reason}")
    if name == "stream":
        return StreamCache(config, device)
    return ExactCache(config, length) if name == "exact" and tau and device.type == "cpu" and not not_compiled() else Cache(config, length)


@functools.cache
def not_compiled():
    """The first line of the error if decode.cpp cannot be compiled, else None."""
    try:
        decode()
    except Exception as error:  # no compiler, or one that cannot compile this code
        return first_line(error)


@functools.cache
def say_once(text):
    print(text, file=sys.stderr)
