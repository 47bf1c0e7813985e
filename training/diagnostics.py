"""Diagnostics of tau attention: per layer and head the percentiles of energies and lambdas, and how far back and how
sharply the heads attend. train.py writes them to OUT_DIR/diagnostics.jsonl every diag_interval steps; plot.py --bands
draws the lambdas."""

import torch

from ops.attention import attention_weights
from training.taumode import tau_of

QUERIES = 64  # of each sequence, the last ones: their attention is measured
NEAR = 16  # tokens, the query's own included
PERCENTILES = (0.05, 0.5, 0.95)
COLLAPSED = 0.01  # a head has collapsed when 90 % of its keys' lambdas lie within this range in ...
IN_A_ROW = 3  # ... so many diagnostics, one after another


@torch.no_grad()
def diagnose(model, idx):
    """{name: list over layers of lists over heads} for tokens idx (B, T) int64. "E_q", "E_k", "lambda_q" and "lambda_k"
    hold [p05, p50, p95] of the queries' and keys' energies and lambdas. "entropy" of the softmax weights, in nats, and
    "near_mass", the weight on the query's own token and the 15 before it, are means over the last 64 queries of each
    sequence. "tau" is that of the key heads. Local heads have no energies: the tau heads are counted from 0."""
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
            p = attention_weights(q[..., -QUERIES:].contiguous(), k.contiguous(), layer.temperature, decay, bias, layer.sink)[0]
            entropy.append(torch.special.entr(p).sum(-1).mean(-1))
            age = torch.arange(p.size(1), device=p.device)[:, None] + p.size(2) - p.size(1) - torch.arange(p.size(2), device=p.device)
            near.append((p * (age < NEAR)).sum(-1).mean(-1))
        record["entropy"].append(torch.stack(entropy).mean(0).tolist())
        record["near_mass"].append(torch.stack(near).mean(0).tolist())
    return record | {"tau": tau_of(model).tolist()}


def collapses(record, narrow):
    """Lines that name the key heads of a record of diagnose() that have just collapsed. narrow: {"layer.head": diagnostics
    in a row in which the range of its lambdas was small}, updated in place."""
    lines = []
    for layer, heads in enumerate(record["lambda_k"]):
        for head, (low, median, high) in enumerate(heads):
            name = f"{layer}.{head}"
            narrow[name] = narrow.get(name, 0) + 1 if high - low < COLLAPSED else 0
            if narrow[name] == IN_A_ROW:
                lines.append(f"collapse: key head {head} of layer {layer}: lambda between {low:.4f} (p05) and {high:.4f} (p95)")
    return lines
