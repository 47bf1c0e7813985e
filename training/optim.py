"""The optimiser of a run: which weights decay, which state it keeps per weight, and its learning rate at each step. Another
optimiser or schedule belongs here."""

import math

import torch

from training.processes import whole

SHARP = ("recall.key.weight", "hold.weight", "hold.bias", "log_filter")  # names of what the lambdas of recall heads are made of
FAST, SPEED = ("log_sharpness", "hold.weight", "hold.bias"), 10.0  # of tau with recall heads: names, and times the learning rate
NUMBERS = 2  # that the optimizer keeps per parameter


def adamw(model, learning_rate, betas, weight_decay):
    """AdamW (Loshchilov & Hutter 2019) with weight decay on matrices only. With tau's recall heads temperatures and gates learn ten
    times as fast: within a short run one is to go from 0.1 to 1e-5, the other from 0.3 to 0.999999, without which it does not copy."""
    groups, fast = {}, FAST if model.config.attention == "tau" and model.config.recall_heads else ()
    for name, weight in model.named_parameters():
        speed = SPEED if name.endswith(fast) else 1.0
        groups.setdefault((weight_decay if weight.ndim >= 2 else 0.0, speed), []).append(weight)
    return torch.optim.AdamW(
        [{"params": weights, "weight_decay": decay, "speed": speed} for (decay, speed), weights in groups.items()],
        lr=learning_rate,
        betas=betas,
        fused=True,
    )


def optimizer_of(model, settings):
    return adamw(model, settings.learning_rate, (settings.beta1, settings.beta2), settings.weight_decay)


def kept(optimizer, weight):
    """{name: tensor} of the optimizer's state for a weight, under the optimizer's own names: each tensor stands for one of the same
    shape, dtype and device. Checkpoints hold this state, and a resume refuses one that lacks any of it."""
    return {"step": torch.zeros((), device=weight.device), "exp_avg": weight, "exp_avg_sq": weight}


def learning_rate(settings, step, scale):
    """The learning rate of the step that follows `step` finished ones. scale: the plateau rule's factor."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / (settings.warmup_steps + 1)
    if settings.lr_schedule == "cosine":
        done = min(1, (step - settings.warmup_steps) / (settings.lr_decay_steps - settings.warmup_steps))
        return settings.min_lr + (settings.learning_rate - settings.min_lr) * (1 + math.cos(math.pi * done)) / 2
    return settings.learning_rate * scale


def clip_gradients(model, limit):
    """Scale the gradients so that their norm is `limit` at most (0: no limit). Those of what recall heads' lambdas are made of have a
    norm of their own: temperatures of 1e-4 magnify them, and in one norm they would take from all other weights most of their step.
    Returns the norm of all before. Collective."""
    rest, sharp = [], []
    for name, weight in model.named_parameters():
        (sharp if model.config.recall_heads and name.endswith(SHARP) else rest).append(weight)
    norms = [torch.nn.utils.clip_grad_norm_(weights, limit or math.inf) for weights in (rest, sharp) if weights]
    return math.hypot(*(whole(norm).item() for norm in norms))


def set_learning_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate * group["speed"]
