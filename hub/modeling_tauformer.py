"""Tauformer, the topological transformer, as a model of the library `transformers`. This file needs torch and transformers, nothing else.

A GPT whose attention compares not query and key vectors but one scalar per token and head: the bounded energy of the
query or key on a graph Laplacian L, which is built once from a domain's embeddings and not trained.

    E(x)     = x^T L x / (x^T x + eps)                          energy
    lambda   = E / (E + tau)                                    bounded energy, in [0, 1)
    logit_ij = -|lambda_q,i - lambda_k,j| / temperature         for j <= i

Otherwise: pre-norm blocks, RMS-norm without weights, no biases, RoPE and then RMS-norm on queries and keys, relu^2 MLP,
grouped-query attention, untied embedding and output head, logit softcap. attention = "dot" is the twin, which scores by
dot product and differs in nothing else.

It computes what the model.py that trained it computes, every pair of tokens by itself: O(T^2) time and memory, where the
project's own operators take O(T log T). What it has beside: padding on the left, and the library's cache.
(Article "Training a 30M parameters Topological Transformer", 2026; paper "Topological Transformer", 2026.)
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

EPS = 1e-6  # of norms and energies
DOT_SCALE = 1.2  # sharpens the softmax of normed queries and keys


class TauformerConfig(PreTrainedConfig):
    """The settings of a model, by the names that they have in training."""

    model_type = "tauformer"
    attribute_map = {
        "max_position_embeddings": "block_size",
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
    }

    vocab_size: int = 30522
    block_size: int = 1024  # context that it was trained with, tokens
    n_layer: int = 6
    n_head: int = 6  # of queries
    n_kv_head: int = 0  # of keys and values; 0: n_head
    n_embd: int = 384
    dropout: float = 0.0
    attention: str = "tau"  # or its twin that scores by dot product: "dot"
    temperature: float = 1.0  # of the attention's logits; that of sampling is an argument of generate()
    tau_mode: str = "fixed"  # where tau came from in training; "learned": it is a parameter
    softcap: float = 15.0  # the output logits become softcap * tanh(logits / softcap); 0: no cap
    learn_temperature: bool = False  # a temperature per head
    forget: str = "none"  # "slope": a constant cost per step back for each head; "gate": computed from the token
    spectral_filter: bool = False  # the energy weights the Laplacian's eigenvectors by learned numbers
    conv: int = 0  # taps of a causal depthwise convolution over tokens, added to q, k and v
    key_bias: bool = False  # a bias per key, computed from its token
    output_gate: bool = False  # multiply the heads' output by the sigmoid of a projection of the token
    local_heads: int = 0  # the first query heads: by dot product, to the last local_window tokens
    recall_heads: int = 0  # the last query heads, which attend to what followed an earlier occurrence of the query's token
    local_window: int = 16
    tau_rope: bool = True  # apply RoPE also to the queries and keys whose energies are compared, not only to the local heads'
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.n_kv_head = self.n_kv_head or self.n_head
        super().__post_init__(**kwargs)

    @property
    def head_size(self):
        return self.n_embd // self.n_head

    @property
    def local_kv_heads(self):
        return self.local_heads * self.n_kv_head // self.n_head

    @property
    def recall_kv_heads(self):
        return self.recall_heads * self.n_kv_head // self.n_head


class TauformerCacheLayer(DynamicLayer):
    """What a layer keeps of the tokens so far: `values` (B, Hkv, T, D), and in the place of keys one lambda per token and key head, `keys`
    (B, Hkv, T, 1); for dot, keys (B, Hkv, T, D). Beside them, by name in `more`, what the switches need: log decays and key biases of
    all tokens, and what convolution, local heads and recall heads look back to, of the last few."""

    is_croppable = False  # running means do not know what they were

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.more = {}

    def recent(self, name, x, dim, n=None):
        """x with what is kept under `name` in front of it along dim. Of both together the last n are kept for the next call; None: all."""
        if name in self.more:
            x = torch.cat([self.more[name], x], dim)
        left = x.size(dim) if n is None else min(n, x.size(dim))
        self.more[name] = x.narrow(dim, x.size(dim) - left, left).clone()
        return x

    def reset(self):
        super().reset()
        self.more = {}

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self.more = {name: x.index_select(0, beam_idx.to(x.device)) for name, x in self.more.items()}

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self.more = {name: x.repeat_interleave(repeats, dim=0) for name, x in self.more.items()}

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.more = {name: x[indices] for name, x in self.more.items()}

    def crop(self, tokens_to_remove):
        if tokens_to_remove:
            raise NotImplementedError("a Tauformer's cache cannot forget its last tokens, which assisted decoding asks for")


def with_our_layers(cache, config):
    """The DynamicCache, whose layers, while it is empty, are made TauformerCacheLayers. Raises ValueError for another cache."""
    if not cache.layers or not all(hasattr(layer, "recent") for layer in cache.layers):
        if not isinstance(cache, DynamicCache) or cache.get_seq_length():
            raise ValueError(f"{type(cache).__name__}: a Tauformer takes a DynamicCache, which is empty or which it has filled itself")
        cache.layers, cache.layer_class_to_replicate = [TauformerCacheLayer() for _ in range(config.n_layer)], None
    return cache


def finest(x):
    """The most precise float dtype that x's device has."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def without_autocast(x):
    return torch.autocast(x.device.type, enabled=False)


def norm(x):
    """RMS-norm over the last dimension, without weights; in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=EPS)


def by_head(x, matrices):
    """x (B, T, H, D) times each head's matrix, (H, D, D) -> (B, T, H, D)."""
    return torch.bmm(x.flatten(0, 1).transpose(0, 1), matrices).transpose(0, 1).unflatten(0, x.shape[:2])


def energy(x, laplacian):
    """E(x) = x^T L x / (x^T x + eps), the Rayleigh quotient: x (B, T, H, D), laplacian (H, D, D) -> (B, T, H), >= 0."""
    with without_autocast(x):
        return (by_head(x, laplacian) * x).sum(-1).clamp_min(0) / (torch.linalg.vecdot(x, x) + EPS)


def filtered_energy(x, roots, log_filter):
    """E(x) = x^T g(L) x / (x^T x + eps), where g(L) = U diag(eigenvalue * exp(log_filter)) U^T: x (B, T, H, D), roots
    (H, D, D) = U diag(sqrt(eigenvalue)), log_filter (H, D) -> (B, T, H). A constant x keeps energy 0."""
    with without_autocast(x):
        roots = roots.mT.contiguous().mT  # column by column in memory, as in training, for sums that are equal to the last bit
        y = by_head(x, roots * (log_filter / 2).exp()[:, None])
        return torch.linalg.vecdot(y, y) / (torch.linalg.vecdot(x, x) + EPS)


def bounded(E, tau):
    """lambda = E / (E + tau), in [0, 1)."""
    return E / (E + tau)


def rotary_angles(config, positions):
    """(cos, sin) of position * 10000^(-2i/D), for rope(): each (B, 1, T, 1, D/2) float32, of positions (B, T)."""
    half = config.head_size // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=finest(positions), device=positions.device) / half)
    angles = (positions[..., None].to(frequencies.dtype) * frequencies)[:, None, :, None]
    return angles.cos().float(), angles.sin().float()


def rope(x, rotary):
    """RoPE: rotate each pair (x_i, x_{i + D/2}) of x (..., T, H, D) by its position's angle; rotary: from rotary_angles()."""
    cos, sin = rotary
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(x.dtype)


def queries_keys(x):
    """Split x (B, group + 1, T, Hkv, ...), which holds for each key head the `group` query heads that read it and then the
    keys, into queries (B, H, T, ...) and keys (B, Hkv, T, ...)."""
    x = x.movedim(3, 1)
    return x[:, :, :-1].flatten(1, 2), x[:, :, -1]


def recurrence(a, b, y):
    """y_t = a_t y_(t-1) + b_t along dim 1 of a and b, one after the other, so that no result depends on where its token stands; before
    them y itself."""
    steps = [y]
    for kept, new in zip(a.unbind(1), b.unbind(1)):
        y = kept * y + new
        steps.append(y)
    return torch.stack(steps, 1)


def attend(logits, v, real, log_decay=None, key_bias=None, sink=None, window=None):
    """out_i = sum_{j<=i} softmax_j(logit_ij + key_bias_j + sum of log_decay over j+1 .. i) v_j, (B, H, Tq, D).

    logits (B, H, Tq, T): of the last Tq of the T tokens with all of them; v (B, Hkv, T, D); real (B, T): False for padding, which
    gets no weight; log_decay (B, H, T); key_bias (B, Hkv, T); sink (H,): the logit of one more key, whose value is 0; window: how
    many tokens a query sees, its own included (None: all)."""
    (B, H, Tq, T), Hkv = logits.shape, v.size(1)
    if key_bias is not None:
        logits = logits + key_bias.repeat_interleave(H // Hkv, 1)[:, :, None]
    if log_decay is not None:
        total = log_decay.to(finest(log_decay)).cumsum(-1)
        logits = logits + (total[..., T - Tq :, None] - total[..., None, :]).to(logits.dtype)
    logits = logits.masked_fill(~real[:, None, None], torch.finfo(logits.dtype).min)  # not -inf: padding itself has nothing else to see
    ahead = torch.arange(T, device=v.device) - torch.arange(T - Tq, T, device=v.device)[:, None]  # of the query, tokens
    logits = logits.masked_fill(ahead > 0 if window is None else (ahead > 0) | (ahead <= -window), -math.inf)
    if sink is not None:
        logits = torch.cat([logits, sink.to(logits.dtype)[:, None, None].expand(B, H, Tq, 1)], -1)
    weights = logits.softmax(-1)[..., :T]
    return (weights.unflatten(1, (Hkv, -1)).flatten(2, 3) @ v.to(weights.dtype)).view(B, H, Tq, -1)


class Recall(nn.Module):
    """The queries and keys of recall heads, of all layers at once, for they are made of the tokens alone: running means

    kbar_t = r_t kbar_(t-1) + (1 - r_t) k_t

    of a projection k, with a gate r of the token. At token t, kbar_t is the query and kbar_(t-1) the key, so that a query finds the values
    of what followed tokens like its own. With a small r, the energy of kbar is a number whose leading digits are the token's, and further
    ones those of the tokens before it, so that the nearest lambda is that of the longest common suffix; an r near 1 passes a token over."""

    def __init__(self, config):
        super().__init__()
        self.config, heads = config, config.n_layer * config.recall_kv_heads
        self.key = nn.Linear(config.n_embd, heads * config.head_size, bias=False)
        self.hold = nn.Linear(config.n_embd, heads)

    def forward(self, tokens, kept):
        """tokens (B, T, C), normed -> n_layer tensors (B, group + 1, T, recall_kv_heads, D), as Attention.projections() takes them. kept:
        the cache's first layer, or None."""
        config = self.config
        with without_autocast(tokens):  # equal tokens are to be equal to the last bit
            k = norm(self.key(tokens).unflatten(-1, (-1, config.head_size)))
            r = self.hold(tokens).float().sigmoid()[..., None]
        none = torch.zeros_like(k[:, 0])
        before = none if kept is None else kept.more.get("recalled", none)
        kbar = recurrence(r, (1 - r) * k, before)  # from the token before on
        if kept is not None:
            kept.more["recalled"] = kbar[:, -1].clone()
        queries = kbar[:, None, 1:].expand(-1, config.n_head // config.n_kv_head, -1, -1, -1)
        return torch.cat([queries, kbar[:, None, :-1]], 1).chunk(config.n_layer, 3)


class Attention(nn.Module):
    """As published, with all switches off:

    q, k, v            = norm(rope(query(x))), norm(rope(key(x))), value(x)
    lambda_q, lambda_k = bounded(energy(q, laplacian), tau), bounded(energy(k, laplacian), tau)
    y                  = out(attend(-|lambda_q - lambda_k| / temperature, v))"""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        C, D, H, Hkv = config.n_embd, config.head_size, config.n_head, config.n_kv_head
        far_kv = Hkv - config.local_kv_heads  # key/value heads that are not local
        self.query = nn.Linear(C, (H - config.recall_heads) * D, bias=False)
        self.key = nn.Linear(C, (Hkv - config.recall_kv_heads) * D, bias=False)
        if config.recall_heads and config.attention == "tau":
            self.sink = nn.Parameter(torch.zeros(config.recall_heads))
        self.value = nn.Linear(C, Hkv * D, bias=False)
        self.out = nn.Linear(H * D, C, bias=False)
        if config.attention == "tau":
            self.keep("log_tau", torch.zeros(far_kv), config.tau_mode == "learned")
        if config.learn_temperature or config.recall_heads:
            self.keep("log_sharpness", torch.zeros(H), config.learn_temperature)
        if config.forget == "slope":
            self.log_slope = nn.Parameter(torch.zeros(H))
        if config.forget == "gate":
            self.forget = nn.Linear(C, H)
        if config.spectral_filter:
            self.log_filter = nn.Parameter(torch.zeros(far_kv * D))
        if config.conv:
            self.taps = nn.Parameter(torch.zeros(config.conv, (H - config.recall_heads + 2 * Hkv - config.recall_kv_heads) * D))
        if config.key_bias:
            self.key_bias = nn.Linear(C, Hkv, bias=False)
        if config.output_gate:
            self.gate = nn.Linear(C, H * D, bias=False)

    def keep(self, name, tensor, learned):
        """A parameter if it is learned, else a number that is stored with the weights."""
        self.register_parameter(name, nn.Parameter(tensor)) if learned else self.register_buffer(name, tensor)

    def projections(self, x, rotary, kept, recalled):
        """(qk, v) of x (B, T, C): qk (B, group + 1, T, Hkv, D) holds for each key head the queries that read it and then
        its keys, rotated and normed, those of recall heads as they are given; v (B, Hkv, T, D) holds the values."""
        config = self.config
        projected = [self.query(x), self.key(x), self.value(x)]
        if config.conv:
            qkv = torch.cat(projected, -1)
            past = qkv if kept is None else kept.recent("qkv", qkv, 1, config.conv - 1)
            past = F.pad(past, (0, 0, qkv.size(1) + config.conv - 1 - past.size(1), 0))
            qkv = qkv + sum(tap * past[:, i : i + qkv.size(1)] for i, tap in enumerate(self.taps))
            projected = qkv.split([p.size(-1) for p in projected], -1)
        q, k, v = (p.unflatten(-1, (-1, config.head_size)) for p in projected)
        qk = torch.cat([q.unflatten(2, (k.size(2), -1)).movedim(3, 1), k[:, None]], 1)
        rotated = k.size(2) if config.tau_rope else config.local_kv_heads
        qk = torch.cat([rope(qk[..., :rotated, :], rotary), qk[..., rotated:, :]], -2)
        if config.recall_heads:
            qk = torch.cat([qk.to(recalled.dtype), recalled], 3)
        return norm(qk), v.transpose(1, 2)

    def energies(self, qk, laplacian):
        """Energies (B, group + 1, T, Hkv) of the queries and keys qk (B, group + 1, T, Hkv, D)."""
        x = qk.flatten(1, 2)
        if self.config.spectral_filter:
            return filtered_energy(x, laplacian, self.log_filter.view(len(laplacian), -1)).view(qk.shape[:-1])
        return energy(x, laplacian).view(qk.shape[:-1])

    def switches(self, x):
        """What the switches do to the attention logits, from x (B, T, C): (sharpness (H,), log_decay (B, H, T), key_bias
        (B, Hkv, T)); ones, None and None where they are off."""
        config, log_decay, key_bias = self.config, None, None
        sharpness = torch.ones(config.n_head, device=x.device)
        if config.learn_temperature or config.recall_heads:
            sharpness = self.log_sharpness.exp()
        if config.forget == "gate":
            log_decay = F.logsigmoid(self.forget(x)).transpose(1, 2)
        if config.forget == "slope":
            log_decay = -self.log_slope.exp()[:, None].expand(len(x), -1, x.size(1))
        if config.key_bias:
            key_bias = self.key_bias(x).transpose(1, 2)
        return sharpness, log_decay, key_bias

    def local(self, qk, v, sharpness, log_decay, key_bias, real, kept):
        """(output (B, local_heads, T, D) of the local heads, which come first; then the other heads' part of the first five arguments)."""
        n, m, window = self.config.local_heads, self.config.local_kv_heads, self.config.local_window
        split = lambda x, count, dim: (x, x) if x is None else x.tensor_split([count], dim)
        parts = split(qk, m, 3), split(v, m, 1), split(sharpness, n, 0), split(log_decay, n, 1), split(key_bias, m, 1)
        (qk, v, sharpness, log_decay, key_bias), others = zip(*parts)
        q, k = queries_keys(qk)
        past = {"local keys": k, "local values": v, "local decay": log_decay, "local bias": key_bias}
        if kept is not None:
            past = {name: None if x is None else kept.recent(name, x, 2, window - 1) for name, x in past.items()}
        k, v, log_decay, key_bias = past.values()
        logits = dot_logits(q, k, sharpness)
        return attend(logits, v, real[:, real.size(1) - k.size(2) :], log_decay, key_bias, window=window), *others

    def forward(self, x, rotary, laplacian, real, cache, recalled):
        """x (B, T, C), the block's input, normed, 0 for padding, and so is the result; real (B, T so far), False for padding; recalled
        (B, group + 1, T, recall_kv_heads, D): see Recall."""
        config, kept, near, sink = self.config, None if cache is None else cache.layers[self.layer], [], None
        qk, v = self.projections(x, rotary, kept, recalled)
        sharpness, log_decay, key_bias = self.switches(x)
        if config.local_heads:
            out, qk, v, sharpness, log_decay, key_bias = self.local(qk, v, sharpness, log_decay, key_bias, real, kept)
            near = [out]
        if config.attention == "tau":
            E = self.energies(qk, laplacian)
            queries, keys = queries_keys(bounded(E, self.log_tau.exp())[..., None])  # (B, H, T, 1), (B, Hkv, T, 1)
        else:
            queries, keys = queries_keys(qk)  # (B, H, T, D), (B, Hkv, T, D)
        if config.recall_heads and config.attention == "tau":  # where no key matches, nothing is to be recalled
            sink = F.pad(self.sink, (queries.size(1) - config.recall_heads, 0), value=-math.inf)
        if cache is not None:
            keys, v = cache.update(keys, v, self.layer)
            log_decay, key_bias = (
                None if more is None else kept.recent(name, more, 2) for name, more in (("log_decay", log_decay), ("key_bias", key_bias))
            )
        if config.attention == "tau":
            logits = -(queries - per_query(keys, queries).mT).abs() / (config.temperature / sharpness)[:, None, None]
        else:
            logits = dot_logits(queries, keys, sharpness)
        y = torch.cat([*near, attend(logits, v, real, log_decay, key_bias, sink)], 1).to(x.dtype)
        y = y.transpose(1, 2).flatten(2)  # (B, T, H D)
        if config.output_gate:
            y = y * self.gate(x).sigmoid()
        return self.out(y)


def per_query(keys, queries):
    """keys (B, Hkv, T, ...) once for each of the query heads that read them, (B, H, T, ...)."""
    return keys.repeat_interleave(queries.size(1) // keys.size(1), 1)


def dot_logits(q, k, sharpness):
    """The twin's logits, and the local heads': q (B, H, Tq, D), k (B, Hkv, T, D), sharpness (H,) -> (B, H, Tq, T)."""
    q = q * (DOT_SCALE * sharpness)[:, None, None] / math.sqrt(q.size(-1))
    return q @ per_query(k, q).mT


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(self.up(x).relu().square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, *context):
        x = x + self.dropout(self.attention(norm(x).to(x.dtype), *context))
        return x + self.dropout(self.mlp(norm(x).to(x.dtype)))


def softcapped(z, softcap):
    return softcap * torch.tanh(z / softcap) if softcap else z


class SamplingConfig(GenerationConfig):
    @classmethod
    def from_model_config(cls, model_config):
        """Nothing of a model's config: its temperature is not that of sampling."""
        return cls()


class TauformerForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TauformerConfig
    generation_config_class = SamplingConfig
    _input_embed_layer = "embedding"
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = ["laplacian", "log_tau", "log_filter", "log_sharpness", "log_slope", "sink"]

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.recall = Recall(config) if config.recall_heads else None
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        heads, D = config.n_kv_head - config.local_kv_heads, config.head_size
        # One per key head that is not local, reduced to the head's features; with spectral_filter its root, U diag(sqrt(eigenvalue))
        self.register_buffer("laplacian", torch.zeros(heads, D, D) if config.attention == "tau" else None)
        self.post_init()

    def _init_weights(self, module):
        """Nothing: weights and Laplacian come from a file."""

    def get_output_embeddings(self):
        return self.head

    def set_output_embeddings(self, head):
        self.head = head

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        cache=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """input_ids (B, T) int64 -> logits (B, T, V) float32; with labels (B, T) int64 also the mean cross-entropy, in nats, of those that
        are not -100 and have a token before them, from which each is predicted.

        attention_mask (B, T so far): 0 for padding, on the left, which has no influence on anything. cache: a DynamicCache; input_ids
        continue the tokens in it and are added to it. use_cache: make one if there is none.
        position_ids (B, T): by default tokens are counted without padding. logits_to_keep: how many of the last tokens' logits to
        compute (0: all). Raises ValueError for a mask that does not fit, and for another cache."""
        if cache is not None or use_cache:
            cache = with_our_layers(DynamicCache() if cache is None else cache, self.config)
        B, T = input_ids.shape
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None:
            attention_mask = input_ids.new_ones(B, past + T)
        if attention_mask.shape != (B, past + T):
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}; it must be {(B, past + T)}: the tokens in the cache count")
        real = attention_mask.bool()
        if position_ids is None:
            position_ids = (real.cumsum(1) - 1).clamp_min(0)[:, past:]
        rotary = rotary_angles(self.config, position_ids)

        here = real[:, past:]
        x = self.embedding(input_ids.masked_fill(~here, 0)) * here[..., None]  # 0 for padding, and so is all that is made of it
        recalled = [None] * len(self.blocks)
        if self.recall is not None:
            recalled = self.recall(norm(x.detach()).to(x.dtype), None if cache is None else cache.layers[0])
        x = self.dropout(x)
        for block, vectors in zip(self.blocks, recalled):
            x = block(x, rotary, self.laplacian, real, cache, vectors)
        x = norm(slice_logits_to_keep(x, logits_to_keep)).to(x.dtype)
        logits = softcapped(self.head(x).float(), self.config.softcap)
        if labels is not None:  # a token after padding has none before it
            labels = torch.cat([labels[:, :1], labels[:, 1:].masked_fill(~here[:, :-1], -100)], 1)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)
