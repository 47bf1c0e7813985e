"""What the recall heads of a trained model attend to."""

import numpy as np
import torch

from benchmarks.decoding import trained_models
from benchmarks.report import write
from common import UserError
from ops.attention import attention_weights

WINDOWS = 64  # of block_size tokens, from the beginning of the validation text
COLUMNS = ("key_follows_the_same_token", "key_follows_the_same_two", "weight_on_keys_that_follow_the_same", "sink_where_none_does")


@torch.no_grad()
def bench_matches(args):
    """For each recall head of trained tau models, and of the queries whose token came before in the window: how often the heaviest key is
    one that follows the same token; of those of which the token before came with it, how often both are the same; what share of the
    softmax such keys have; and what the sink has where there is none."""
    rows = []
    for out_dir, model, corpus in trained_models(args):
        config, T = model.config, model.config.block_size
        if config.attention != "tau" or not config.recall_heads:
            raise UserError(f"{out_dir} has no recall heads of tau attention")
        if len(corpus.val) < WINDOWS * T:
            raise UserError(f"{args.data_dir}: {len(corpus.val):,} tokens of validation are fewer than {WINDOWS} windows of {T}")
        idx = torch.from_numpy(corpus.batch(np.arange(WINDOWS) * T, T - 1, "val"))
        with model.recording() as seen:
            model(idx)
        one, two = follows(idx)
        there = one.any(-1)
        for layer, (_, _, *arguments) in enumerate(seen):
            weights = attention_weights(*arguments)[:, -config.recall_heads :]
            heaviest = weights.argmax(-1, keepdim=True)
            for head, temperature in enumerate(arguments[2][-config.recall_heads :].tolist()):
                found = [same.gather(-1, heaviest[:, head])[..., 0][same.any(-1)].double().mean().item() for same in (one, two)]
                found.append((weights[:, head] * one).sum(-1)[there].mean().item())
                found.append(1 - weights[:, head].sum(-1)[~there].mean().item())
                rows.append({"run": str(out_dir), "layer": layer, "head": head, "temperature": temperature} | dict(zip(COLUMNS, found)))
    write("matches", rows, args)


def follows(idx):
    """Masks (B, T, T) of tokens idx (B, T): whether key j, which stands for the token j - 1, is one of query i or before it and stands for
    the same token; and whether the tokens before these are the same, too."""
    B, T = idx.shape
    nothing = idx.new_tensor([[-1]]).expand(B, 1)
    before = torch.cat([nothing, idx[:, :-1]], 1)
    two_before = torch.cat([nothing - 1, before[:, :-1]], 1)
    one = (idx[:, :, None] == before[:, None]) & torch.ones(T, T, dtype=torch.bool).tril()
    return one, one & (before[:, :, None] == two_before[:, None])
