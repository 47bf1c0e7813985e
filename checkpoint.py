"""A run's checkpoints, OUT_DIR/last.safetensors, which a run resumes from, and OUT_DIR/best.safetensors, the one with
the lowest validation loss. One file holds all it takes: tensors "model.*", "laplacian" and, in last, "optimizer.*", and
in its header, as JSON, the model's "config", the "tokenizer", and "run", the state of the training script."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import UserError, replacing
from model import ModelConfig, Tauformer

HEADER = ("config", "tokenizer", "run")


def write(path, model, laplacian, tokenizer, run, optimizer=None):
    """Write a checkpoint, whole or not at all. laplacian: (F, F) or None; tokenizer and run: what JSON can hold."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if laplacian is not None:
        tensors["laplacian"] = laplacian
    if optimizer is not None:
        for name, weight in model.named_parameters():
            tensors |= {f"optimizer.{key}.{name}": value for key, value in optimizer.state[weight].items()}
    header = {"config": asdict(model.config), "tokenizer": tokenizer, "run": run}
    with replacing(path) as temporary:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary,
                  {key: json.dumps(value) for key, value in header.items()})


def find(out_dir):
    """The path of the best checkpoint of a run, of its last if there is no best yet. Raises UserError if none."""
    for name in ("best", "last"):
        if (path := Path(out_dir) / f"{name}.safetensors").exists():
            return path
    raise UserError(f"no checkpoint in {out_dir}: it should be an output folder of train.py")


def read(path):
    """(tensors, header) of a checkpoint. Runs no code of the file. Raises FileNotFoundError, and UserError if it is
    damaged."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, "pt") as file:
            header = {key: json.loads(file.metadata()[key]) for key in HEADER}
            return {name: file.get_tensor(name) for name in file.keys()}, header
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged, or no checkpoint of train.py ({type(error).__name__}: {error})") from None


def build_model(tensors, header, path, laplacian=None, **changes):
    """The model of a checkpoint that read() gave: with another Laplacian and with changed config fields, if given."""
    try:
        config = ModelConfig(**header["config"] | changes)
        model = Tauformer(config, tensors.get("laplacian") if laplacian is None else laplacian)
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()
                               if name.startswith("model.")})
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{path}: weights and config do not fit: {error}") from None
    return model


def restore_optimizer(optimizer, model, tensors, path):
    """Give the optimizer the state that the checkpoint holds."""
    try:
        for name, weight in model.named_parameters():
            optimizer.state[weight] = {key: tensors[f"optimizer.{key}.{name}"].to(weight.device)
                                       for key in ("step", "exp_avg", "exp_avg_sq")}
    except KeyError as error:
        raise UserError(f"{path} cannot be resumed: it has no {error}") from None
