"""A run's checkpoints: OUT_DIR/step_NNNNNNNN.safetensors, which a run resumes from, and OUT_DIR/best.safetensors, the
model with the lowest validation loss. One file holds all it takes: tensors "model.*", "laplacian" and, to resume,
"optimizer.*" and "ema.*", and in its header, as JSON, the model's "config", the "tokenizer", "run", the state of the
training script, and "sha256", the hash of the file with that hash's digits as zeros."""

import errno
import hashlib
import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import RANK, UserError, replacing
from data import tokenizer as tokenizers
from model import ModelConfig, Tauformer
from processes import placed, whole

HEADER = ("config", "tokenizer", "run")
DIGITS = 64  # of the hash


def snapshot(model, optimizer=None, ema=None):
    """The tensors of a checkpoint, whole and on the CPU, on rank 0; elsewhere none. Not copies, where they are so already.
    ema: a running mean of the weights, in the order of model.parameters(). All processes call it."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for at, (name, weight) in enumerate(model.named_parameters()):
        if optimizer is not None:
            tensors |= {f"optimizer.{key}.{name}": value for key, value in optimizer.state[weight].items()}
        if ema is not None:
            tensors[f"ema.{name}"] = ema[at]
    kept = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor.detach())
        if RANK == 0:
            kept[name] = tensor.cpu().contiguous()
    return kept


def write(path, tensors, laplacian, config, tokenizer, run):
    """Write a checkpoint, whole or not at all. laplacian: (F, F) or None; tokenizer and run: what JSON can hold."""
    if laplacian is not None:
        tensors = tensors | {"laplacian": laplacian}
    save(path, tensors, {"config": asdict(config), "tokenizer": tokenizer, "run": run})


def save(path, tensors, header):
    """Write tensors and a header of dicts, what JSON can hold, and the hash of both."""
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, {key: json.dumps(value) for key, value in header.items()} | {"sha256": "0" * DIGITS})
        except SafetensorError as error:  # its name for what the system says
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, f"{path} could not be written: {error}") from None
        with open(temporary, "r+b") as file:
            at, digest = hashed(file)
            file.seek(at)
            file.write(digest)


def hashed(file):
    """(where the digits of the hash stand in an open file, what they should be). Raises ValueError if there are none."""
    file.seek(0)
    start = file.read(8)
    start += file.read(min(int.from_bytes(start, "little"), os.fstat(file.fileno()).st_size))
    at = start.index(b'"sha256":"') + len(b'"sha256":"')
    digest = hashlib.sha256(start[:at] + b"0" * DIGITS + start[at + DIGITS:])
    while part := file.read(1 << 24):
        digest.update(part)
    return at, digest.hexdigest().encode()


def find(out_dir):
    """The path of the best checkpoint of a run, of its last if there is no best yet. Raises UserError if none."""
    for path in [Path(out_dir) / "best.safetensors", *steps(out_dir)]:
        if path.exists():
            return path
    raise UserError(f"no checkpoint in {out_dir}: it should be an output folder of train.py")


def step_path(out_dir, step):
    return Path(out_dir) / f"step_{step:08d}.safetensors"


def steps(out_dir):
    """The paths of the checkpoints to resume from, the newest first."""
    return sorted(Path(out_dir).glob("step_*.safetensors"), reverse=True)


def to_resume(out_dir):
    """(path, tensors, header) of the newest checkpoint to resume from that is whole; damaged ones are named on standard
    error. Raises UserError if there is none."""
    damaged = []
    for path in steps(out_dir):
        try:
            found = path, *read(path)
        except UserError as error:
            damaged.append(f"{error}: the one before it is taken")
            continue
        if damaged and RANK == 0:
            print("\n".join(damaged), file=sys.stderr)
        return found
    raise UserError(f"nothing to resume: no whole step_*.safetensors in {out_dir}; start with --init_from=scratch --overwrite=True")


def read(path):
    """(tensors, header) of a checkpoint, as load() gives them."""
    return load(path, HEADER, "checkpoint of train.py")


def load(path, names, kind):
    """(tensors, header) of a file that save() wrote: the dicts of these names, and "sha256". Runs no code of the file. Raises
    FileNotFoundError, and UserError if it is damaged."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with open(path, "rb") as file:
            at, digest = hashed(file)
            file.seek(at)
            if file.read(DIGITS) != digest:
                raise ValueError("its sha256 is not that of its content")
        with safe_open(path, "pt") as file:
            header = {key: json.loads(file.metadata()[key]) for key in names}
            if not all(isinstance(value, dict) for value in header.values()):
                raise ValueError("its header is not of objects")
            return {name: file.get_tensor(name) for name in file.keys()}, header | {"sha256": digest.decode()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, or no {kind} ({type(error).__name__}: {error})") from None


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


def restore(model, optimizer, ema, path, tensors):
    """Give the optimizer, and the running mean of the weights where there is one, what the checkpoint holds. A mean that the
    run had not before starts from the weights."""
    def stored(name, like):
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != like.shape:
            raise UserError(f"{path} cannot be resumed: its {name} is missing or damaged")
        return placed(tensor, like)
    for at, (name, weight) in enumerate(model.named_parameters()):
        optimizer.state[weight] = {"step": stored(f"optimizer.step.{name}", torch.zeros((), device=weight.device)),
                                   **{key: stored(f"optimizer.{key}.{name}", weight) for key in ("exp_avg", "exp_avg_sq")}}
        if ema is not None and f"ema.{name}" in tensors:
            ema[at] = stored(f"ema.{name}", weight)
