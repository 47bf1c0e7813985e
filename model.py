"""Tauformer, the topological transformer.

A GPT whose attention compares, instead of queries and keys, one scalar for each token and head: the bounded energy of
its query or key on a fixed graph Laplacian L, built once from a domain's embeddings (build_laplacian.py).

    E(x)     = x^T L x / (x^T x + eps)                          energy
    lambda   = E / (E + tau)                                    bounded energy, in [0, 1)
    logit_ij = -|lambda_q,i - lambda_k,j| / temperature         for j <= i

Notable: pre-norm blocks, RMS-norm without weights, no biases, RoPE and then RMS-norm on queries and keys, relu^2 MLP,
grouped-query heads, untied embedding and head, logit softcap. attention = "dot" is the twin that scores by dot product;
nothing else differs. (Article "Training a 30M parameters Topological Transformer", 2026; paper "Topological
Transformer", 2026.)
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import tau_attention
from common import UserError

ENERGY_EPS = NORM_EPS = 1e-6
TAU_MODES = ("fixed", "mean", "percentile", "adaptive", "gradient", "learned")  # taumode.py
INIT_STD = 0.02
DOT_SCALE = 1.2  # sharpens the dot twin, whose queries and keys are normed
LOSS_CHUNK = 128  # tokens whose logits are in memory at once, or a 32nd of the batch if that is more


@dataclass
class ModelConfig:
    block_size: int = 1024      # longest context, tokens
    vocab_size: int = 30522
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int = 0          # heads of keys and values, a divisor of n_head; 0: n_head
    n_embd: int = 384
    dropout: float = 0.0        # on the embeddings and on what each attention and MLP adds
    attention: str = "tau"      # "tau" or "dot"
    temperature: float = 1.0    # of the tau logits
    tau_mode: str = "fixed"     # learned: tau is a parameter of every key head; else taumode.py sets it
    softcap: float = 15.0       # logits are softcap * tanh(logits / softcap); 0: as they are

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be positive")
        if self.n_embd % self.n_head or self.head_size % 2:
            raise UserError(f"n_embd={self.n_embd} must be n_head={self.n_head} times an even head size")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}")
        if self.tau_mode not in TAU_MODES:
            raise UserError(f"tau_mode={self.tau_mode!r} must be one of {', '.join(TAU_MODES)}")
        if self.attention not in ("tau", "dot"):
            raise UserError(f"attention={self.attention!r} must be tau or dot")

    @property
    def head_size(self):
        return self.n_embd // self.n_head


def norm(x):
    """RMS-norm over the last dimension, without weights."""
    return RMSNorm.apply(x)


class RMSNorm(torch.autograd.Function):
    """norm(), which keeps its result for the gradient: the layer behind it keeps that anyway. In float32 at least."""

    @staticmethod
    def forward(ctx, x):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (torch.linalg.vecdot(x, x)[..., None] / x.size(-1) + NORM_EPS).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, y)[..., None] / y.size(-1)
        return torch.addcmul(grad, along, y, value=-1).mul_(scale)


def energy(x, laplacian):
    """E(x) = x^T L x / (x^T x + eps), the Rayleigh quotient: x (B, T, H, D), laplacian (H, D, D) -> (B, T, H), >= 0.
    Computed in the Laplacian's precision also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return Energy.apply(x.to(laplacian.dtype), laplacian)


class Energy(torch.autograd.Function):
    """energy(), which keeps x alone for its gradient dE/dx = 2 (L x - E x) / (x^T x + eps). The Laplacian gets none."""

    @staticmethod
    def forward(ctx, x, laplacian):
        ctx.save_for_backward(x, laplacian)
        Lx = torch.einsum("bthd,hde->bthe", x, laplacian)
        return Lx.mul_(x).sum(-1).clamp_min_(0) / (torch.linalg.vecdot(x, x) + ENERGY_EPS)

    @staticmethod
    def backward(ctx, grad):
        x, laplacian = ctx.saved_tensors
        Lx = torch.einsum("bthd,hde->bthe", x, laplacian)
        xx = torch.linalg.vecdot(x, x) + ENERGY_EPS
        E = torch.linalg.vecdot(x, Lx) / xx
        return Lx.addcmul_(E[..., None], x, value=-1).mul_((2 * grad / xx)[..., None]), None


def bounded(E, tau):
    """lambda = E / (E + tau), in [0, 1)."""
    return E / (E + tau)


def kron_reduction(L, keep):
    """The Laplacian of the network L (F, F) as seen from the features `keep`, a slice of D: the Schur complement
    L_aa - L_ab L_bb^+ L_ba, (D, D). Symmetry, PSD, zero row sums, connectivity and effective resistances stay
    (Dörfler & Bullo 2013)."""
    inside = torch.zeros(len(L), dtype=torch.bool)
    inside[keep] = True
    L_aa, L_ab, L_bb = L[inside][:, inside], L[inside][:, ~inside], L[~inside][:, ~inside]
    return L_aa - L_ab @ torch.linalg.pinv(L_bb, hermitian=True) @ L_ab.T


def head_laplacians(L, config):
    """One Laplacian for each key head, (Hkv, D, D) float32, from the domain's L (F, F).

    F == D: every head uses L. F == n_embd: query head h owns the features h*D .. (h+1)*D - 1 and sees the whole
    manifold through them; the heads that share keys share the first one's. Raises UserError for any other F."""
    H, Hkv, D = config.n_head, config.n_kv_head, config.head_size
    L = L.detach().to("cpu", torch.float64)
    if L.shape == (D, D):
        heads = [L] * Hkv
    elif L.shape == (config.n_embd, config.n_embd):
        heads = [kron_reduction(L, slice(h * D, (h + 1) * D)) for h in range(0, H, H // Hkv)]
    else:
        raise UserError(f"the Laplacian has F={len(L)} features; they must be as many as the head size, {D}, or as "
                        f"n_embd, {config.n_embd}: build one that fits with `build_laplacian.py --dim={config.n_embd}`")
    return torch.stack(heads).float()


def rotary_angles(config):
    """cos and sin for rope(), each (block_size, 1, D/2): position times base^(-2i/D), base 10000."""
    half = config.head_size // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(config.block_size, dtype=torch.float64), frequencies)[:, None]
    return angles.cos().float(), angles.sin().float()


def rope(x, rotary):
    """Rotate the two halves of x (B, T, H, D) against each other by angles that grow with the position."""
    cos, sin = rotary
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(x.dtype)


class Cache:
    """What attention keeps of the tokens so far, for each layer: (V, lambda_k) for tau, B Hkv T (D+1) numbers, where
    (K, V) for dot takes B Hkv T 2D. Allocated whole, for block_size tokens, and written in place."""

    def __init__(self, config, batch_size, device):
        shape = (config.n_layer, batch_size, config.n_kv_head, config.block_size)
        self.keys = torch.zeros(shape if config.attention == "tau" else (*shape, config.head_size), device=device)
        self.values = torch.zeros(*shape, config.head_size, device=device)
        self.length = 0  # tokens of which every layer has been written

    def extend(self, layer, keys, values):
        """Write the keys and values (B, Hkv, T, ...) of new tokens; returns those of all tokens so far."""
        end = self.length + keys.size(2)
        self.keys[layer, :, :, self.length:end] = keys
        self.values[layer, :, :, self.length:end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        C, D = config.n_embd, config.head_size
        self.query = nn.Linear(C, config.n_head * D, bias=False)
        self.key = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.value = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.out = nn.Linear(config.n_head * D, C, bias=False)
        if config.attention == "tau":
            log_tau = torch.zeros(config.n_kv_head)
            if config.tau_mode == "learned":
                self.log_tau = nn.Parameter(log_tau)
            else:
                self.register_buffer("log_tau", log_tau)
            self.energies = None  # a list, inside Tauformer.recording()

    def heads(self, projection, x, rotary):
        """Queries or keys (B, T, heads, D) of x (B, T, C): projected, rotated, normed."""
        return norm(rope(projection(x).unflatten(-1, (-1, self.config.head_size)), rotary))

    def forward(self, x, rotary, laplacian, cache):
        config = self.config
        q = self.heads(self.query, x, rotary)  # (B, T, H, D)
        k = self.heads(self.key, x, rotary)  # (B, T, Hkv, D)
        v = self.value(x).unflatten(-1, (-1, config.head_size)).transpose(1, 2)  # (B, Hkv, T, D)
        if config.attention == "tau":
            group = config.n_head // config.n_kv_head
            E_q, E_k = energy(q, laplacian.repeat_interleave(group, 0)), energy(k, laplacian)  # (B, T, H), (B, T, Hkv)
            if self.energies is not None:
                self.energies.append((E_q.detach(), E_k.detach()))
            tau = self.log_tau.exp()  # (Hkv,)
            lambda_q = bounded(E_q, tau.repeat_interleave(group)).transpose(1, 2)  # (B, H, T)
            keys = bounded(E_k, tau).transpose(1, 2)  # (B, Hkv, T)
        else:
            q, keys = q.transpose(1, 2), k.transpose(1, 2)  # (B, H, T, D), (B, Hkv, T, D)
        if cache is not None:
            keys, v = cache.extend(self.layer, keys, v)
        if config.attention == "tau":
            y = tau_attention(lambda_q, keys, v, config.temperature)
        else:
            y = dot_attention(q, keys, v)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, C)


def dot_attention(q, k, v):
    """The twin's operator: softmax(DOT_SCALE q.k / sqrt(D)), causal. q (B, H, Tq, D) are the last Tq of the T
    positions of k and v (B, Hkv, T, D); returns (B, H, Tq, D)."""
    Tq, T, D = q.size(2), k.size(2), k.size(3)
    mask = None if Tq in (1, T) else torch.ones(Tq, T, dtype=torch.bool, device=q.device).tril(T - Tq)
    return F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, is_causal=Tq == T,
                                          scale=DOT_SCALE / math.sqrt(D), enable_gqa=q.size(1) != k.size(1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return SquaredReluMLP.apply(x, self.up.weight, self.down.weight)


class SquaredReluMLP(torch.autograd.Function):
    """relu(x W1^T)^2 W2^T, which keeps x and the relu alone for its gradients."""

    @staticmethod
    def forward(ctx, x, up, down):
        """x (B, T, C), up (4C, C), down (C, 4C) -> (B, T, C)."""
        hidden = F.linear(x, up).relu_()
        ctx.save_for_backward(x, hidden, up, down)
        return F.linear(hidden.square(), down)

    @staticmethod
    def backward(ctx, grad):
        x, hidden, up, down = ctx.saved_tensors
        dtype = grad.dtype  # the weights and x may be wider, under autocast
        grad_down = grad.flatten(0, 1).T @ hidden.square().flatten(0, 1)
        grad_hidden = (grad @ down.to(dtype)).mul_(hidden).mul_(2)
        grad_up = grad_hidden.flatten(0, 1).T @ x.to(dtype).flatten(0, 1)
        return grad_hidden @ up.to(dtype), grad_up, grad_down


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, *context):
        x = x + self.dropout(self.attention(norm(x), *context))
        return x + self.dropout(self.mlp(norm(x)))


class ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy of softcapped logits x W^T, whose (N, vocab) matrix never stands in memory whole: some rows
    at a time, in place, the gradients made in the same pass."""

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, needs_grad):
        """x (N, C), weight (V, C), targets (N,) int64 -> scalar float32."""
        loss = x.new_zeros((), dtype=torch.float32)
        grad_x, grad_weight = (torch.zeros_like(x), torch.zeros_like(weight)) if needs_grad else (None, None)
        chunk = min(len(x), max(LOSS_CHUNK, math.ceil(len(x) / 32)))
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        W = weight.to(dtype)
        logits = x.new_empty(chunk, len(W), dtype=dtype)
        softmax, sigmoid = (torch.empty_like(logits, dtype=torch.float32) for _ in range(2))
        for start in range(0, len(x), chunk):
            x_c, target = x[start:start + chunk].to(dtype), targets[start:start + chunk, None]
            n = len(x_c)
            z = torch.mm(x_c, W.T, out=logits[:n]).float()
            if softcap:  # softcap tanh(z / softcap) = 2 softcap sigmoid(2 z / softcap) - softcap, and faster
                s = torch.mul(z, 2 / softcap, out=sigmoid[:n]).sigmoid_()
                torch.mul(s, 2 * softcap, out=z)
            p = torch.softmax(z, -1, out=softmax[:n])
            log_denominator = z.amax(-1) - p.amax(-1).log()
            loss += (log_denominator - z.gather(1, target)[:, 0]).sum()
            if needs_grad:  # of the logits: softmax, less 1 at the target, and a quarter of the softcap's derivative
                p.scatter_add_(1, target, p.new_full((n, 1), -1))
                if softcap:
                    p.mul_(s.addcmul_(s, s, value=-1))
                grad_z = p.to(dtype)
                grad_x[start:start + chunk] = grad_z @ W
                if dtype is grad_weight.dtype:
                    grad_weight.addmm_(grad_z.T, x_c)
                else:
                    grad_weight += grad_z.T @ x_c
        ctx.grads = grad_x, grad_weight, (4 if softcap else 1) / len(x)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight, scale = ctx.grads
        return grad_x.mul_(grad_loss * scale), grad_weight.mul_(grad_loss * scale), None, None, None


def softcapped(z, softcap):
    return softcap * torch.tanh(z / softcap) if softcap else z


class Tauformer(nn.Module):
    def __init__(self, config, laplacian):
        """laplacian: (F, F) tensor, F the head size or n_embd; None for attention = "dot", which uses none.
        Raises UserError if F fits neither."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, buffer in zip(("cos", "sin"), rotary_angles(config)):
            self.register_buffer(name, buffer, persistent=False)
        if config.attention == "tau":
            if laplacian is None:
                raise UserError('attention = "tau" needs a Laplacian')
            self.register_buffer("laplacian", head_laplacians(laplacian, config), persistent=False)  # (Hkv, D, D)
        else:
            self.laplacian = None
        self.init_weights()

    def init_weights(self):
        """As nanoGPT: every matrix normal with deviation 0.02, those that write to the residual stream (attention.out,
        mlp.down) 0.02 / sqrt(2 n_layer)."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(weight, std=INIT_STD / math.sqrt(2 * self.config.n_layer) if residual else INIT_STD)

    def rotary(self, start, stop):
        return self.cos[start:stop], self.sin[start:stop]

    def forward(self, idx, targets=None, cache=None, head=True):
        """idx (B, T) int64 -> logits (B, T, V); with targets (B, T), the mean loss in nats, a scalar.
        With a cache, idx are the tokens that follow those in it, and it takes them up. Without the head: what it would
        read, (B, T, C).
        Raises ValueError if the tokens are more than block_size."""
        start = cache.length if cache is not None else 0
        stop = start + idx.size(1)
        if stop > self.config.block_size:
            raise ValueError(f"{stop} tokens are more than block_size={self.config.block_size}")
        x = self.dropout(self.embedding(idx))  # (B, T, C)
        for block in self.blocks:
            x = block(x, self.rotary(start, stop), self.laplacian, cache)
        if cache is not None:
            cache.length = stop
        x = norm(x)
        if not head:
            return x
        if targets is None:
            return softcapped(self.head(x).float(), self.config.softcap)
        return ChunkedLoss.apply(x.flatten(0, 1), self.head.weight, targets.flatten(), self.config.softcap,
                                 torch.is_grad_enabled())

    @contextmanager
    def recording(self):
        """Yields a list to which every forward pass inside, without dropout, appends each block's energies, (E_q (B, T, H),
        E_k (B, T, Hkv)) of its queries and keys."""
        energies, training = [], self.training
        self.eval()
        try:
            for block in self.blocks:
                block.attention.energies = energies
            yield energies
        finally:
            for block in self.blocks:
                block.attention.energies = None
            self.train(training)

    def parameter_count(self):
        return sum(weight.numel() for weight in self.parameters())

    def flops_per_token(self):
        """Floating-point operations of a training step, forward and backward, a token, by the usual count (PaLM 2022,
        appendix B): 6 for each weight of a matrix product, and attention over the whole context."""
        config = self.config
        D, T = config.head_size, config.block_size
        weights = self.parameter_count() - self.embedding.weight.numel()
        if config.attention == "dot":
            attention = 12 * config.n_head * D * T  # q.k and the sum of values
        else:
            attention = 6 * config.n_head * D * T + 6 * (config.n_head + config.n_kv_head) * D * D
        return 6 * weights + config.n_layer * attention
