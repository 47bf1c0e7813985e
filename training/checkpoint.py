"""A run's checkpoints: OUT_DIR/step_NNNNNNNN.safetensors, which a run resumes from, and OUT_DIR/best.safetensors, the
model with the lowest validation loss. One file holds everything: the tensors "model.*", "laplacian" and, to resume,
"optimizer.*" and "ema.*"; and in its header, as JSON, the model's "config", the "tokenizer", and "run", the RunState and
the run's settings. data/checkpoint_file.py defines the file format."""

import math
from dataclasses import asdict, dataclass, field, fields

import safetensors.torch  # noqa: F401 (a run that could not save does not begin)
import torch

from common import RANK, UserError, note
from data import tokenizer as tokenizers
from data.checkpoint_file import find, read, save, step_path, steps  # noqa: F401 (callers find and read checkpoints through this module)
from model import ModelConfig, Tauformer
from training import optim
from training.processes import placed, whole


@dataclass
class RunState:
    """How far a run is: all that it resumes from, beside weights, optimizer state and the running mean of the weights."""

    step: int = 0
    tokens: int = 0
    best_loss: float = math.inf
    stale: int = 0  # validations since the best one, or since the learning rate was last halved
    lr_scale: float = 1.0  # the plateau rule's factor on the learning rate
    elapsed_s: float = 0.0
    loss_average: float | None = None  # running mean of the training losses
    bad: int = 0  # steps in a row whose update was left out
    skipped: int = 0  # all such steps
    scaler: dict = field(default_factory=dict)  # of a run in float16: its GradScaler's state
    narrow: dict = field(default_factory=dict)  # as diagnostics.collapses() counts
    wandb_id: str | None = None
    origin: str = "scratch"  # or the hash of the checkpoint, or of the token vectors, that its weights began with
    data: str | None = None  # the hash of the text that it is trained on
    file: dict = field(default_factory=dict)  # what the config file said
    began: dict = field(default_factory=dict)  # init_from and laplacian, where the run's first call gave them

    @classmethod
    def of(cls, header, path):
        """The RunState in a checkpoint's header. Raises UserError for a value of another type."""
        state = cls(**{f.name: header["run"][f.name] for f in fields(cls) if f.name in header["run"]})
        for f in fields(cls):
            value, inside = getattr(state, f.name), {"narrow": int, "began": str}.get(f.name, object)
            right = isinstance(value, f.type) and not isinstance(value, bool)
            if right and isinstance(value, int):
                right = 0 <= value < 2**63
            if right and isinstance(value, dict):
                right = all(isinstance(x, inside) for x in value.values())
            if not right:
                raise UserError(f"{path} is damaged: the {f.name} of its run is {value!r}")
        return state


def snapshot(model, optimizer=None, ema=None):
    """{name: tensor} of a checkpoint: on rank 0 whole tensors on the CPU, elsewhere none. Tensors that are whole and on the
    CPU already are not copied. ema: the running mean of the weights, in the order of model.parameters(). Collective."""
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
    """Write a checkpoint, whole or not at all. laplacian: (F, F) or None; tokenizer: its to_json()."""
    if laplacian is not None:
        tensors = tensors | {"laplacian": laplacian}
    save(path, tensors, {"config": asdict(config), "tokenizer": tokenizer, "run": asdict(state) | {"settings": asdict(settings)}})


def to_resume(out_dir):
    """(path, tensors, header) of the newest undamaged checkpoint to resume from; damaged ones are named on standard error.
    Raises UserError if there is none."""
    damaged = []
    for path in steps(out_dir):
        try:
            found = path, *read(path)
        except UserError as error:
            damaged.append(f"{error}: the one before it is taken")
            continue
        for line in damaged:
            note(line)
        return found
    raise UserError(f"nothing to resume: no whole step_*.safetensors in {out_dir}; start with --init_from=scratch --overwrite=True")


def config_of(header, path, **changes):
    """The ModelConfig of a checkpoint's header. Raises UserError for an unknown field or a wrong value."""
    try:
        return ModelConfig(**header["config"] | changes)
    except (TypeError, OverflowError) as error:
        raise UserError(f"{path} is damaged: its config is that of no model: {error}") from None


def build_model(tensors, header, path, laplacian=None, **changes):
    """The Tauformer of a checkpoint that read() returned. laplacian (F, F) and changes, fields of its config, replace its own.
    Raises UserError if weights and config do not fit."""
    try:
        config = config_of(header, path, **changes)
        if tokenizers.from_json(header["tokenizer"]).vocab_size != config.vocab_size:
            raise RuntimeError("the tokenizer has another size than the vocabulary")
        if "laplacian" in tensors and tensors["laplacian"].dtype != torch.float64:
            raise RuntimeError(f"its Laplacian is of {tensors['laplacian'].dtype}, not of torch.float64")
        model = Tauformer(config, tensors.get("laplacian") if laplacian is None else laplacian)
        weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        if lacking := sorted(model.state_dict().keys() - weights.keys()):
            raise RuntimeError(f"it lacks {lacking[0]} (one of {len(lacking)}): perhaps an earlier version of the code wrote it")
        model.load_state_dict(weights)
        if bad := next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None):
            raise UserError(f"{path} is damaged: its {bad} is not finite")
    except (TypeError, RuntimeError, MemoryError, OverflowError) as error:
        raise UserError(f"{path}: weights and config do not fit: {error}") from None
    return model


def restore(model, optimizer, ema, path, tensors):
    """Load the optimizer's state and, if the run keeps one, the running mean of the weights; a mean that the checkpoint does
    not hold starts from the weights. Raises UserError for a missing or misshapen tensor."""

    def stored(name, like):
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != like.shape:
            raise UserError(f"{path} cannot be resumed: its {name} is missing or damaged")
        return placed(tensor, like)

    for at, (name, weight) in enumerate(model.named_parameters()):
        optimizer.state[weight] = {key: stored(f"optimizer.{key}.{name}", like) for key, like in optim.kept(optimizer, weight).items()}
        if ema is not None and f"ema.{name}" in tensors:
            ema[at] = stored(f"ema.{name}", weight)
