"""What the energies do: per layer and head their percentiles, and how far and how sharply the heads look. train.py
writes it to OUT_DIR/diagnostics.jsonl every diag_interval steps; plot.py --bands draws it."""

import torch

from ops.attention import attention_weights
from training.taumode import tau_of

QUERIES = 64  # the last ones of each sequence, whose attention is looked at
NEAR = 16  # tokens, the query's own among them
PERCENTILES = (0.05, 0.5, 0.95)
COLLAPSED = 0.01  # a head collapses when 90 % of its keys' lambdas lie within this, at ...
IN_A_ROW = 3  # ... so many diagnostics in a row


@torch.no_grad()
def diagnose(model, idx):
    """Of tokens idx (B, T): {name: a list over layers of lists over heads}. "E_q", "E_k", "lambda_q", "lambda_k" hold
    [p05, p50, p95] of queries' and keys' energies; "entropy" of the attention's rows, nats, and "near_mass", the share of
    the weight on the query's own and the 15 tokens before, are means over the last 64 queries of each sequence;
    "tau" that of the key heads. Local heads have no energies: the others are counted from 0."""
    with model.recording() as seen:
        model(idx, head=False)
    record = {name: [] for name in ("E_q", "E_k", "lambda_q", "lambda_k", "entropy", "near_mass")}
    for layer in seen:
        by_token = {
            "E_q": layer.E_q,
            "E_k": layer.E_k,
            "lambda_q": layer.lambda_q.transpose(1, 2),
            "lambda_k": layer.lambda_k.transpose(1, 2),
        }
        for name, x in by_token.items():
            x = x.flatten(0, 1)  # (B T, heads)
            record[name].append(torch.quantile(x, x.new_tensor(PERCENTILES), dim=0).T.tolist())
        entropy, near = [], []
        for b in range(len(idx)):  # a sequence at a time
            q, k, decay, bias = (
                x if x is None else x[b : b + 1] for x in (layer.lambda_q, layer.lambda_k, layer.log_decay, layer.key_bias)
            )
            p = attention_weights(q[..., -QUERIES:].contiguous(), k.contiguous(), layer.temperature, decay, bias)[0]
            entropy.append(torch.special.entr(p).sum(-1).mean(-1))
            age = torch.arange(p.size(1), device=p.device)[:, None] + p.size(2) - p.size(1) - torch.arange(p.size(2), device=p.device)
            near.append((p * (age < NEAR)).sum(-1).mean(-1))
        record["entropy"].append(torch.stack(entropy).mean(0).tolist())
        record["near_mass"].append(torch.stack(near).mean(0).tolist())
    return record | {"tau": tau_of(model).tolist()}


def collapses(record, narrow):
    """Lines that name the heads of a record that have just collapsed. narrow: {"layer.head": diagnostics in a row at which
    its spread was small}, brought up to date."""
    lines = []
    for layer, heads in enumerate(record["lambda_k"]):
        for head, (low, median, high) in enumerate(heads):
            name = f"{layer}.{head}"
            narrow[name] = narrow.get(name, 0) + 1 if high - low < COLLAPSED else 0
            if narrow[name] == IN_A_ROW:
                lines.append(f"collapse: key head {head} of layer {layer}: lambda between {low:.4f} (p05) and {high:.4f} (p95)")
    return lines
