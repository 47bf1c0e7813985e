"""A run's checkpoints, OUT_DIR/last.safetensors, which a run resumes from, and OUT_DIR/best.safetensors, the one with
the lowest validation loss. One file holds all it takes: tensors "model.*", "laplacian" and, in last, "optimizer.*", and
in its header, as JSON, the model's "config", the "tokenizer", and "run", the state of the training script."""

import errno
import json
import os
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import UserError, replacing
from data import tokenizer as tokenizers
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
        try:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary,
                      {key: json.dumps(value) for key, value in header.items()})
        except SafetensorError as error:  # its name for a full disk
            raise OSError(errno.ENOSPC, f"{path} could not be written: {error}") from None


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
            if not all(isinstance(value, dict) for value in header.values()):
                raise ValueError("its header is not three objects")
            return {name: file.get_tensor(name) for name in file.keys()}, header
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, or no checkpoint of train.py ({type(error).__name__}: {error})") from None


def build_model(tensors, header, path, laplacian=None, **changes):
    """The model of a checkpoint that read() gave: with another Laplacian and with changed config fields, if given."""
    try:
        config = ModelConfig(**header["config"] | changes)
        if tokenizers.from_json(header["tokenizer"]).vocab_size != config.vocab_size:
            raise RuntimeError("the tokenizer has another size than the vocabulary")
        model = Tauformer(config, tensors.get("laplacian") if laplacian is None else laplacian)
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()
                               if name.startswith("model.")})
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{path}: weights and config do not fit: {error}") from None
    return model


def restore_optimizer(optimizer, model, tensors, path):
    """Give the optimizer the state that the checkpoint holds."""
    for name, weight in model.named_parameters():
        for key, shape in (("step", ()), ("exp_avg", weight.shape), ("exp_avg_sq", weight.shape)):
            tensor = tensors.get(f"optimizer.{key}.{name}")
            if tensor is None or tensor.shape != shape:
                raise UserError(f"{path} cannot be resumed: its optimizer state {key} of {name} is missing or damaged")
            optimizer.state[weight][key] = tensor.to(weight.device)
