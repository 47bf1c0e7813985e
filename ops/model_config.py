"""The model's settings, one line each: default, meaning, and the rule that a value must satisfy; ModelConfig checks them together.
Not in model.py, so that what only reads settings does without torch, whose import takes seconds."""

from dataclasses import dataclass, fields

from common import FRACTION, NOT_NEGATIVE, POSITIVE, UserError, check_rule, one_of, setting


@dataclass
class ModelSettings:
    block_size: int = setting(1024, "context, tokens", POSITIVE, group="the model")
    n_layer: int = setting(6, "blocks", (lambda value: 0 < value <= 10000, "positive and at most 10,000"))
    n_head: int = setting(6, "heads of queries", POSITIVE)
    n_kv_head: int = setting(0, "heads of keys and values, a divisor of n_head (0: n_head)", NOT_NEGATIVE)
    n_embd: int = setting(384, "width", POSITIVE)
    dropout: float = setting(0.0, "on embeddings and on what attention and MLP add; for small corpora", FRACTION)
    attention: str = setting("tau", "tau, or its twin that scores by dot product: dot", one_of("tau", "dot"))
    temperature: float = setting(
        1.0,
        "of the tau logits -|lambda_q - lambda_k| / temperature (dot does not use it)",
        (lambda value: 1e-9 <= value < 2**31, "at least 1e-9 and below 2^31"),
    )
    tau_mode: str = setting(
        "fixed",
        "fixed: tau is the median energy of block 0's keys on the first batch (published); mean; percentile; "
        "adaptive; gradient; learned, a parameter of every key head (training/taumode.py)",
        one_of("fixed", "mean", "percentile", "adaptive", "gradient", "learned"),
    )
    softcap: float = setting(15.0, "the output logits become softcap * tanh(logits / softcap); 0: no cap", NOT_NEGATIVE)
    learn_temperature: bool = setting(
        False,
        "learn a temperature per head, from the given one on (dot: a scale per head, from 1.2 on)",
        group="the model, beyond the published form",
    )
    forget: str = setting(
        "none",
        "none; slope: each head learns a constant cost per step back; gate: the cost is computed from the token",
        one_of("none", "slope", "gate"),
    )
    spectral_filter: bool = setting(
        False, "tau: the energy weights the Laplacian's eigenvectors by learned numbers, initially the eigenvalues"
    )
    conv: int = setting(0, "taps of a causal depthwise convolution over tokens, added to q, k and v (0: none)", NOT_NEGATIVE)
    key_bias: bool = setting(False, "a bias per key, computed from its token: how much the key counts")
    output_gate: bool = setting(False, "multiply the heads' output by the sigmoid of a projection of the token")
    local_heads: int = setting(0, "tau: query heads that attend by dot product instead, to the last local_window tokens only", NOT_NEGATIVE)
    recall_heads: int = setting(
        0,
        "query heads, the last ones, whose queries are their own keys, made of the token alone, and whose keys stand one token later: they "
        "attend to what followed an earlier occurrence of the query's token (tau: where the tokens before it were the same too, first)",
        NOT_NEGATIVE,
    )
    local_window: int = setting(16, "tokens that a local head sees, the query's own included", POSITIVE)
    tau_rope: bool = setting(True, "tau: apply RoPE also to the queries and keys whose energies are compared, not only to the local heads'")


@dataclass
class ModelConfig(ModelSettings):
    vocab_size: int = setting(30522, "tokens", POSITIVE)

    def __post_init__(self):
        """Raises UserError for a value that is invalid by itself or together with others."""
        self.n_kv_head = self.n_kv_head or self.n_head
        for f in fields(self):
            check_rule(f, getattr(self, f.name))
        if self.n_embd % self.n_head or self.head_size % 2:
            raise UserError(f"n_embd={self.n_embd} must be n_head={self.n_head} times an even head size")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}")
        if self.conv > self.block_size:
            raise UserError(f"conv={self.conv} must be 0, or up to block_size={self.block_size} taps")
        group = self.n_head // self.n_kv_head
        if self.local_heads % group or self.local_heads >= self.n_head:
            raise UserError(
                f"local_heads={self.local_heads} must be at most {self.n_head - group}, of n_head={self.n_head}, n_kv_head={self.n_kv_head}"
                + (f", and a multiple of {group}, the heads that share keys" if group > 1 else "")
            )
        most = self.n_head - self.local_heads - (0 if self.local_heads else group)
        if self.recall_heads % group or self.recall_heads > most:
            raise UserError(
                f"recall_heads={self.recall_heads} must be at most {most}"
                + (f" and a multiple of {group}, the heads that share keys" if group > 1 else "")
                + f", of n_head={self.n_head} with local_heads={self.local_heads}, n_kv_head={self.n_kv_head}"
            )
        if self.attention == "dot" and (self.spectral_filter or self.local_heads or not self.tau_rope):
            raise UserError(
                "attention='dot' has no spectral_filter, no local_heads, and rotates: give spectral_filter=False, "
                "local_heads=0, tau_rope=True"
            )

    @property
    def head_size(self):
        return self.n_embd // self.n_head

    @property
    def local_kv_heads(self):
        return self.local_heads * self.n_kv_head // self.n_head

    @property
    def recall_kv_heads(self):
        return self.recall_heads * self.n_kv_head // self.n_head


def chosen_heads(given, characters=False):
    """{name: value} of n_head, local_heads and recall_heads, as runs/own_text.sh takes them where they are not in `given`, its settings:
    one half of the heads recall heads, all but one of the other local. characters: the tokens are characters, among which recall heads
    gain nothing."""
    n_head = given.get("n_head", 8)
    sharing = max(1, n_head // max(given.get("n_kv_head", n_head), 1))  # query heads to a head of keys, all of one sort
    half = lambda left: max(0, min(n_head // 2, left)) // sharing * sharing
    recall_heads = given.get("recall_heads", 0 if characters else half(n_head - given.get("local_heads", 0)))
    local_heads = given.get("local_heads", half(n_head - recall_heads - sharing))
    return dict(n_head=n_head, local_heads=local_heads, recall_heads=recall_heads)
