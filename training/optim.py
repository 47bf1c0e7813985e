"""The optimiser of a run: which weights decay, what it keeps of each of them, and its learning rate at a step. Another optimiser
or schedule is written here."""

import math

import torch

NUMBERS = 2  # that the optimizer keeps for each number of a weight


def adamw(model, learning_rate, betas, weight_decay):
    """AdamW (Loshchilov & Hutter 2019) that decays matrices only."""
    weights = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [w for w in weights if w.ndim >= 2], "weight_decay": weight_decay},
            {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=betas,
        fused=True,
    )


def optimizer_of(model, settings):
    return adamw(model, settings.learning_rate, (settings.beta1, settings.beta2), settings.weight_decay)


def kept(optimizer, weight):
    """What the optimizer keeps of a weight, by its own names: tensors of the shapes, on the devices that these have. A checkpoint
    holds them, and a run that resumes refuses one that lacks any."""
    return {"step": torch.zeros((), device=weight.device), "exp_avg": weight, "exp_avg_sq": weight}


def learning_rate(settings, step, scale):
    """Of the step after `step` finished ones; scale is the plateau rule's."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / (settings.warmup_steps + 1)
    if settings.lr_schedule == "cosine":
        done = min(1, (step - settings.warmup_steps) / (settings.lr_decay_steps - settings.warmup_steps))
        return settings.min_lr + (settings.learning_rate - settings.min_lr) * (1 + math.cos(math.pi * done)) / 2
    return settings.learning_rate * scale


def set_learning_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate
