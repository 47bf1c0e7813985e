"""Tauformer, the topological transformer.

A GPT whose attention compares not query and key vectors but one scalar per token and head: the bounded energy of the
query or key on a graph Laplacian L, which is built once from a domain's embeddings (build_laplacian.py) and not trained.

    E(x)     = x^T L x / (x^T x + eps)                          energy
    lambda   = E / (E + tau)                                    bounded energy, in [0, 1)
    logit_ij = -|lambda_q,i - lambda_k,j| / temperature         for j <= i

Otherwise: pre-norm blocks, RMS-norm without weights, no biases, RoPE and then RMS-norm on queries and keys, relu^2 MLP,
grouped-query attention, untied embedding and output head, logit softcap. attention = "dot" is the twin, which scores by
dot product and differs in nothing else. The settings and switches, a line each: ops/model_config.py. (Article "Training a 30M
parameters Topological Transformer", 2026; paper "Topological Transformer", 2026.)
"""

import math
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError
from ops.attention import tau_attention
from ops.dot import DOT_SCALE, dot_attention, window_attention
from ops.fused import ENERGY_EPS, NORM_EPS, ChunkedLoss, Energy, RMSNorm, SquaredReluMLP, by_head, rayleigh_quotient
from ops.model_config import ModelConfig, ModelSettings  # noqa: F401 (callers take them from here, beside Tauformer)
from ops.recurrence import recurrence

INIT_STD = 0.02
# Where recall heads start: their matrix; for tau the temperature, and the logit of a key of value 0; for dot the sharpness of the logits;
RECALL_STD, RECALL_TEMPERATURE, RECALL_SINK, RECALL_SHARPNESS = 1.0, 1e-4, -4.0, 3.0
RECALL_HOLD = {"tau": -6.0, "dot": -1.0}  # and the logit of what a vector keeps of the one before;
RECALL_WARM = 0.1, -1.0  # for tau, temperature and that logit of the last one, which learns what is to be passed over: see Recall;
RECALL_SLOPE = 2**-12  # and what a step back costs them: they are to see far


def without_autocast(x):
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def norm(x):
    """RMS-norm over the last dimension, without weights; returns x's shape, in float32 at least, under autocast too: a sum of squares may
    overflow in float16."""
    with without_autocast(x):
        if torch.is_grad_enabled():
            return RMSNorm.apply(x)
        return F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:], eps=NORM_EPS)


def energy(x, laplacian):
    """E(x) = x^T L x / (x^T x + eps), the Rayleigh quotient: x (B, T, H, D), laplacian (H, D, D) -> (B, T, H), >= 0.
    Computed in the Laplacian's dtype, and returned in it, under autocast too."""
    with without_autocast(x):
        quotient = Energy.apply if torch.is_grad_enabled() else rayleigh_quotient
        return quotient(x.to(laplacian.dtype), laplacian)


def filtered_energy(x, roots, log_filter):
    """E(x) = x^T g(L) x / (x^T x + eps), where g(L) = U diag(eigenvalue * exp(log_filter)) U^T: x (B, T, H, D), roots
    (H, D, D) = U diag(sqrt(eigenvalue)), log_filter (H, D) -> (B, T, H). A constant x keeps energy 0."""
    with without_autocast(x):
        x = x.to(roots.dtype)
        y = by_head(x, roots * (log_filter / 2).exp()[:, None])
        return torch.linalg.vecdot(y, y) / (torch.linalg.vecdot(x, x) + ENERGY_EPS)


def bounded(E, tau):
    """lambda = E / (E + tau), in [0, 1)."""
    return E / (E + tau)


def kron_reduction(L, keep):
    """Kron reduction of the Laplacian L (F, F) to the features `keep`, a slice of D: the Schur complement
    L_aa - L_ab L_bb^+ L_ba, (D, D). It is again the Laplacian of a connected graph (symmetric, PSD, rows that sum to 0)
    and keeps the effective resistances (Dörfler & Bullo 2013)."""
    inside = torch.zeros(len(L), dtype=torch.bool)
    inside[keep] = True
    L_aa, L_ab, L_bb = L[inside][:, inside], L[inside][:, ~inside], L[~inside][:, ~inside]
    return L_aa - L_ab @ torch.linalg.pinv(L_bb, hermitian=True) @ L_ab.T


def head_laplacians(L, config):
    """One Laplacian per key/value head, (Hkv, D, D) float32, from the domain's L (F, F), a tensor or what torch.as_tensor() takes.

    F == D: every head uses L. F == n_embd: query head h owns the features h*D .. (h+1)*D - 1 and sees the whole
    manifold through them, by Kron reduction; query heads that share a key/value head use the Laplacian of the first of
    them. Raises UserError for any other F."""
    H, Hkv, D = config.n_head, config.n_kv_head, config.head_size
    L = torch.as_tensor(L).detach().to("cpu", torch.float64)
    if L.shape == (D, D):
        heads = [L] * Hkv
    elif L.shape == (config.n_embd, config.n_embd):
        heads = [kron_reduction(L, slice(h * D, (h + 1) * D)) for h in range(0, H, H // Hkv)]
    else:
        raise UserError(
            f"the Laplacian has F={len(L)} features; they must be as many as the head size, {D}, or as "
            f"n_embd, {config.n_embd}: build one that fits with `build_laplacian.py --dim={config.n_embd}`"
        )
    return torch.stack(heads).float()


def rotary_angles(config, start, stop):
    """(cos, sin) of position * 10000^(-2i/D), for rope(): each (stop - start, 1, D/2) float32, at the positions start .. stop - 1."""
    half = config.head_size // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(start, stop, dtype=torch.float64), frequencies)[:, None]
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


def spectral_roots(L):
    """R = U diag(sqrt(eigenvalue)) of L (H, D, D), so that R R^T = L: (H, D, D) float32."""
    eigenvalues, U = torch.linalg.eigh(L.double())
    eigenvalues[:, 0] = 0  # that of the constant vector, which rounding leaves slightly off zero
    return (U * eigenvalues.clamp_min(0).sqrt()[:, None]).float()


class Seen(NamedTuple):
    """What one layer of tau attention computed: the energies of its queries and keys, and its arguments to tau_attention()."""

    E_q: torch.Tensor  # (B, T, H)
    E_k: torch.Tensor  # (B, T, Hkv)
    lambda_q: torch.Tensor  # (B, H, T)
    lambda_k: torch.Tensor  # (B, Hkv, T)
    temperature: torch.Tensor | float
    log_decay: torch.Tensor | None
    key_bias: torch.Tensor | None
    sink: torch.Tensor | None


def starts_warm(config):
    """Whether one recall key/value head of each layer, the last, starts warm."""
    return config.attention == "tau" and config.learn_temperature and config.recall_kv_heads > 1


class Recall(nn.Module):
    """The queries and keys of recall heads, of all layers at once, for they are made of the tokens alone: running means

    kbar_t = r_t kbar_(t-1) + (1 - r_t) k_t

    of a projection k, with a gate r of the token. At token t, kbar_t is the query and kbar_(t-1) the key, so that a query finds the values
    of what followed tokens like its own. With a small r, the energy of kbar is a number whose leading digits are the token's, and further
    ones those of the tokens before it, so that the nearest lambda is that of the longest common suffix; an r near 1 passes a token over.
    No gradient tells r to grow where lambdas are farther apart than a few temperatures: one head starts warm."""

    def __init__(self, config):
        super().__init__()
        self.config, heads = config, config.n_layer * config.recall_kv_heads
        self.key = nn.Linear(config.n_embd, heads * config.head_size, bias=False)
        self.hold = nn.Linear(config.n_embd, heads)
        nn.init.constant_(self.hold.bias, RECALL_HOLD[config.attention])
        if starts_warm(config):
            nn.init.constant_(self.hold.bias.view(config.n_layer, -1)[:, -1], RECALL_WARM[1])

    def forward(self, tokens, cache):
        """tokens (B, T, C), normed -> n_layer tensors (B, group + 1, T, recall_kv_heads, D), as Attention.projections() takes them."""
        config = self.config
        with without_autocast(tokens):  # equal tokens are to be equal to the last bit
            k = norm(self.key(tokens).unflatten(-1, (-1, config.head_size)))
            r = self.hold(tokens).sigmoid()[..., None]
            before = None if cache is None else cache.last.get((0, "recalled"))
            before = torch.zeros_like(k[:, :1]) if before is None else before
            kbar = recurrence(F.pad(r, (0, 0, 0, 0, 1, 0)), torch.cat([before, (1 - r) * k], 1))  # from the token before on
        if cache is not None:
            cache.keep((0, "recalled"), kbar[:, -1:])
        queries = kbar[:, None, 1:].expand(-1, config.n_head // config.n_kv_head, -1, -1, -1)
        return torch.cat([queries, kbar[:, None, :-1]], 1).chunk(config.n_layer, 3)


class Attention(nn.Module):
    """As published, with all switches off:

    q, k, v            = norm(rope(query(x))), norm(rope(key(x))), value(x)
    lambda_q, lambda_k = bounded(energy(q, laplacian), tau), bounded(energy(k, laplacian), tau)
    y                  = out(tau_attention(lambda_q, lambda_k, v, temperature))"""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.operator = tau_attention if config.attention == "tau" else dot_attention
        C, D, H, Hkv = config.n_embd, config.head_size, config.n_head, config.n_kv_head
        far_kv = Hkv - config.local_kv_heads  # key/value heads that are not local
        self.query = nn.Linear(C, (H - config.recall_heads) * D, bias=False)
        self.key = nn.Linear(C, (Hkv - config.recall_kv_heads) * D, bias=False)
        if config.recall_heads and config.attention == "tau":
            self.sink = nn.Parameter(torch.full((config.recall_heads,), RECALL_SINK))
        self.value = nn.Linear(C, Hkv * D, bias=False)
        self.out = nn.Linear(H * D, C, bias=False)
        if config.attention == "tau":
            log_tau = torch.zeros(far_kv)
            if config.tau_mode == "learned":
                self.log_tau = nn.Parameter(log_tau)
            else:
                self.register_buffer("log_tau", log_tau)
            self.seen = None  # a list, inside Tauformer.recording()

        log_sharpness = torch.zeros(H)
        log_sharpness[H - config.recall_heads :] = math.log(
            config.temperature / RECALL_TEMPERATURE if config.attention == "tau" else RECALL_SHARPNESS
        )
        if starts_warm(config):
            log_sharpness[-(H // Hkv) :] = math.log(config.temperature / RECALL_WARM[0])
        if config.learn_temperature:
            self.log_sharpness = nn.Parameter(log_sharpness)
        elif config.recall_heads:
            self.register_buffer("log_sharpness", log_sharpness)
        slope = 2.0 ** (-8 * torch.arange(1, H + 1) / H)  # ALiBi's (Press et al. 2022)
        slope[H - config.recall_heads :] = RECALL_SLOPE
        if config.forget == "slope":
            self.log_slope = nn.Parameter(slope.log())
        if config.forget == "gate":  # Forgetting Transformer (Lin et al. 2025); initially the slopes
            self.forget = nn.Linear(C, H)
            self.forget.bias.data = -slope.expm1().log()
        if config.spectral_filter:
            self.log_filter = nn.Parameter(torch.zeros(far_kv * D))
        if config.conv:
            self.taps = nn.Parameter(torch.zeros(config.conv, (H - config.recall_heads + 2 * Hkv - config.recall_kv_heads) * D))
        if config.key_bias:
            self.key_bias = nn.Linear(C, Hkv, bias=False)
        if config.output_gate:
            self.gate = nn.Linear(C, H * D, bias=False)

    def projections(self, x, rotary, cache, recalled):
        """(qk, v) of x (B, T, C): qk (B, group + 1, T, Hkv, D) holds for each key head the queries that read it and then
        its keys, rotated and normed, those of recall heads as they are given; v (B, Hkv, T, D) holds the values."""
        config = self.config
        projected = [self.query(x), self.key(x), self.value(x)]
        if config.conv:
            qkv = torch.cat(projected, -1)
            past = qkv if cache is None else cache.recent(self.layer, "qkv", qkv, config.conv - 1, 1)
            past = F.pad(past, (0, 0, qkv.size(1) + config.conv - 1 - past.size(1), 0))
            qkv = qkv + sum(tap * past[:, i : i + qkv.size(1)] for i, tap in enumerate(self.taps))
            projected = qkv.split([p.size(-1) for p in projected], -1)
        q, k, v = (p.unflatten(-1, (-1, config.head_size)) for p in projected)
        qk = torch.cat([q.unflatten(2, (k.size(2), -1)).movedim(3, 1), k[:, None]], 1)
        rotated = k.size(2) if config.tau_rope else config.local_kv_heads
        if rotated == k.size(2):
            qk = rope(qk, rotary)
        elif rotated:
            qk = torch.cat([rope(qk[..., :rotated, :], rotary), qk[..., rotated:, :]], -2)
        if config.recall_heads:
            qk = torch.cat([qk.to(recalled.dtype), recalled], 3)
        return norm(qk), v.transpose(1, 2)

    def energies(self, qk, laplacian, cache):
        """Energies (B, group + 1, T, Hkv) of the queries and keys qk (B, group + 1, T, Hkv, D)."""
        x = qk.flatten(1, 2)
        if self.config.spectral_filter:
            return filtered_energy(x, laplacian, self.log_filter.view(len(laplacian), -1)).view(qk.shape[:-1])
        return (energy if cache is None else cache.energy)(x, laplacian).view(qk.shape[:-1])

    def lambdas(self, E):
        return bounded(E, self.log_tau.exp())

    def switches(self, x):
        """What the switches do to the attention logits, from x (B, T, C): (sharpness (H,), log_decay (B, H, T), key_bias
        (B, Hkv, T)); 1.0, None and None where they are off."""
        sharpness, log_decay, key_bias = 1.0, None, None
        if self.config.learn_temperature or self.config.recall_heads:
            sharpness = self.log_sharpness.exp()
        if self.config.forget == "gate":
            log_decay = F.logsigmoid(self.forget(x)).transpose(1, 2)
        if self.config.forget == "slope":
            log_decay = -self.log_slope.exp()[:, None].expand(len(x), -1, x.size(1))
        if self.config.key_bias:
            key_bias = self.key_bias(x).transpose(1, 2)
        return sharpness, log_decay, key_bias

    def local(self, qk, v, sharpness, log_decay, key_bias, cache):
        """(output (B, local_heads, T, D) of the local heads, which come first; then the other heads' part of each argument but cache)."""
        n, m, window = self.config.local_heads, self.config.local_kv_heads, self.config.local_window
        split = lambda x, count, dim: x.tensor_split([count], dim) if torch.is_tensor(x) else (x, x)
        parts = split(qk, m, 3), split(v, m, 1), split(sharpness, n, 0), split(log_decay, n, 1), split(key_bias, m, 1)
        (qk, v, sharpness, log_decay, key_bias), others = zip(*parts)
        q, k = queries_keys(qk)
        past = {"local keys": k, "local values": v, "local decay": log_decay, "local bias": key_bias}
        if cache is not None:
            past = {name: None if x is None else cache.recent(self.layer, name, x, window - 1, 2) for name, x in past.items()}
        return window_attention(q, *past.values(), window, DOT_SCALE * sharpness), *others

    def forward(self, x, rotary, laplacian, cache, recalled=None):
        """x (B, T, C), the block's input, normed; recalled (B, group + 1, T, recall_kv_heads, D): see Recall."""
        config = self.config
        qk, v = self.projections(x, rotary, cache, recalled)
        sharpness, log_decay, key_bias = self.switches(x)
        if config.local_heads:
            near, qk, v, sharpness, log_decay, key_bias = self.local(qk, v, sharpness, log_decay, key_bias, cache)
        if config.attention == "tau":
            E = self.energies(qk, laplacian, cache)
            queries, keys = queries_keys(self.lambdas(E))  # (B, H, T), (B, Hkv, T)
            scale = config.temperature / sharpness
        else:
            queries, keys = queries_keys(qk)  # (B, H, T, D), (B, Hkv, T, D)
            scale = DOT_SCALE * sharpness
        more = {}
        if config.recall_heads and config.attention == "tau":  # where no key matches, nothing is to be recalled
            more["sink"] = F.pad(self.sink, (queries.size(1) - config.recall_heads, 0), value=-math.inf)
        if config.attention == "tau" and self.seen is not None:
            E_q, E_k = (e.transpose(1, 2) for e in queries_keys(E.detach()))
            self.seen.append(Seen(E_q, E_k, queries, keys, scale, log_decay, key_bias, more.get("sink")))
        attend = self.operator if cache is None else cache.attend(self.layer, self.operator)
        y = attend(queries, keys, v, scale, log_decay, key_bias, **more)
        if config.local_heads:
            y = torch.cat([near, y], 1)
        y = y.transpose(1, 2).flatten(2)  # (B, T, H D)
        if config.output_gate:
            y = y * self.gate(x).sigmoid()
        return self.out(y)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        if torch.is_grad_enabled():
            return SquaredReluMLP.apply(x, self.up.weight, self.down.weight)
        return self.down(self.up(x).relu_().square_())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, *context):
        x = x + self.dropout(self.attention(norm(x), *context))
        return x + self.dropout(self.mlp(norm(x)))


def softcapped(z, softcap):
    return softcap * torch.tanh(z / softcap) if softcap else z


class Tauformer(nn.Module):
    def __init__(self, config, laplacian):
        """laplacian: (F, F) tensor or array, F the head size or n_embd; attention = "dot" ignores it.
        Raises UserError if F is neither, or if attention = "tau" gets None."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.recall = Recall(config) if config.recall_heads else None
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, buffer in zip(("cos", "sin"), rotary_angles(config, 0, config.block_size)):
            self.register_buffer(name, buffer, persistent=False)
        if config.attention == "tau":
            if laplacian is None:
                raise UserError('attention = "tau" needs a Laplacian')
            laplacian = head_laplacians(laplacian, config)[config.local_kv_heads :]  # (Hkv, D, D)
            self.register_buffer("laplacian", spectral_roots(laplacian) if config.spectral_filter else laplacian, persistent=False)
        else:
            self.laplacian = None
        self.init_weights()

    def init_weights(self):
        """As in nanoGPT: every matrix is normal with standard deviation 0.02, or, if it writes to the residual stream
        (attention.out, mlp.down), 0.02 / sqrt(2 n_layer)."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2 and not name.endswith("taps"):
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                std = INIT_STD / math.sqrt(2 * self.config.n_layer) if residual else INIT_STD
                nn.init.normal_(weight, std=RECALL_STD if name == "recall.key.weight" else std)

    def rotary(self, start, stop):
        if stop <= self.config.block_size:
            return self.cos[start:stop], self.sin[start:stop]
        return [x.to(self.cos.device) for x in rotary_angles(self.config, start, stop)]

    def forward(self, idx, targets=None, cache=None, head=True, rotary=None):
        """idx (B, T) int64 -> logits (B, T, V) float32; with targets (B, T) int64, the mean cross-entropy in nats, a
        float32 scalar; with head=False, the normed hidden states (B, T, C) that the head would read.
        With a cache, idx continues the tokens in it and is added to it, beyond block_size too. rotary: of its positions, if not made here.
        Raises ValueError for more tokens than block_size without one."""
        start = cache.length if cache is not None else 0
        stop = start + idx.size(1)
        if cache is None and stop > self.config.block_size:
            raise ValueError(f"{stop} tokens are more than {self.config.block_size}")
        x = self.embedding(idx)  # (B, T, C)
        recalled = [None] * len(self.blocks) if self.recall is None else self.recall(norm(x.detach()), cache)
        x = self.dropout(x)
        rotary = rotary or self.rotary(start, stop)
        for block, vectors in zip(self.blocks, recalled, strict=True):
            x = block(x, rotary, self.laplacian, cache, vectors)
        if cache is not None:
            cache.length = stop
        x = norm(x)
        if not head:
            return x
        if targets is None:
            return self.logits(x)
        return ChunkedLoss.apply(x.flatten(0, 1), self.head.weight, targets.flatten(), self.config.softcap, torch.is_grad_enabled())

    def logits(self, x):
        """Softcapped logits (..., V) float32 of hidden states x (..., C), which forward(head=False) returns."""
        return softcapped(self.head(x).float(), self.config.softcap)

    @contextmanager
    def recording(self):
        """Inside the block every forward pass, without dropout, appends a Seen per layer of tau attention to the yielded list."""
        seen, training = [], self.training
        self.eval()
        try:
            for block in self.blocks:
                block.attention.seen = seen
            yield seen
        finally:
            for block in self.blocks:
                block.attention.seen = None
            self.train(training)

    def parameter_count(self):
        return sum(weight.numel() for weight in self.parameters())

    def flops_per_token(self):
        """Floating-point operations per token of a training step, forward and backward, by the usual count (PaLM 2022,
        appendix B): 6 per weight of a matrix product, plus attention over the whole context."""
        config = self.config
        D, T = config.head_size, config.block_size
        weights = self.parameter_count() - self.embedding.weight.numel()
        if config.attention == "dot":
            attention = 12 * config.n_head * D * T  # q.k and the weighted sum of values
        else:
            attention = 6 * config.n_head * D * T + 6 * (config.n_head + config.n_kv_head) * D * D
        return 6 * weights + config.n_layer * attention
