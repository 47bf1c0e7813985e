"""A run's checkpoints: OUT_DIR/step_NNNNNNNN.safetensors, which a run resumes from, and OUT_DIR/best.safetensors, the
model with the lowest validation loss. One file holds all it takes: tensors "model.*", "laplacian" and, to resume,
"optimizer.*" and "ema.*", and in its header, as JSON, the model's "config", the "tokenizer", and "run", the RunState with
the run's settings (data/checkpoint_file.py is the file's format)."""

import math
import sys
from dataclasses import asdict, dataclass, field, fields

from common import RANK, UserError
from data import tokenizer as tokenizers
from data.checkpoint_file import find, read, save, step_path, steps  # noqa: F401 (callers find and read checkpoints through this module)
from model import ModelConfig, Tauformer
from training import optim
from training.processes import placed, whole


@dataclass
class RunState:
    """How far a run is: all that it goes on with, beside weights, optimizer and running mean."""

    step: int = 0
    tokens: int = 0
    best_loss: float = math.inf
    stale: int = 0  # validations since the best one, or since the rate was halved
    lr_scale: float = 1.0  # of the plateau rule
    elapsed_s: float = 0.0
    loss_average: float | None = None  # running mean of the training losses
    bad: int = 0  # steps in a row whose update was left out
    skipped: int = 0  # all of them
    narrow: dict = field(default_factory=dict)  # diagnostics.collapses
    wandb_id: str | None = None
    origin: str = "scratch"  # or the hash of the checkpoint whose weights it began with
    data: str | None = None  # the hash of the text that it is trained on
    file: dict = field(default_factory=dict)  # what the config file said

    @classmethod
    def of(cls, header):
        """That of a checkpoint."""
        return cls(**{f.name: header["run"][f.name] for f in fields(cls) if f.name in header["run"]})


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


def write(path, tensors, laplacian, config, tokenizer, state, settings):
    """Write a checkpoint, whole or not at all. laplacian: (F, F) or None; tokenizer: what JSON can hold."""
    if laplacian is not None:
        tensors = tensors | {"laplacian": laplacian}
    save(path, tensors, {"config": asdict(config), "tokenizer": tokenizer, "run": asdict(state) | {"settings": asdict(settings)}})


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


def build_model(tensors, header, path, laplacian=None, **changes):
    """The model of a checkpoint that read() gave: with another Laplacian and with changed config fields, if given."""
    try:
        config = ModelConfig(**header["config"] | changes)
        if tokenizers.from_json(header["tokenizer"]).vocab_size != config.vocab_size:
            raise RuntimeError("the tokenizer has another size than the vocabulary")
        model = Tauformer(config, tensors.get("laplacian") if laplacian is None else laplacian)
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")})
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
        optimizer.state[weight] = {key: stored(f"optimizer.{key}.{name}", like) for key, like in optim.kept(optimizer, weight).items()}
        if ema is not None and f"ema.{name}" in tensors:
            ema[at] = stored(f"ema.{name}", weight)
