"""The run that a command line asks for. Every mistake that a user can make is found here, before anything is written."""

import hashlib
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from common import DAMAGED_ARRAY, LOCAL_RANK, RANK, WORLD, UserError, choose_device, first_line, waiting
from data.corpus import Corpus
from data.laplacian import load_laplacian
from model import INIT_STD, ModelConfig, Tauformer
from training import checkpoint, optim, processes, taumode
from training.batches import step_batches
from training.checkpoint import RunState
from training.config import COMMAND_LINE, Settings, go_on_with, model_settings, stored_settings
from training.evaluation import validation_starts
from training.folder import LOGS, lines_until, only_looks
from training.inputs import check_laplacian_exists


@dataclass
class Run:
    """What is trained, on what, and how far it is."""

    settings: Settings
    given: dict  # {name: where} of the settings that the command line or the config file names
    corpus: Corpus
    device: torch.device
    dtype: torch.dtype  # of the matrix products
    raw_model: Tauformer  # holds the weights
    model: torch.nn.Module  # raw_model as a training step calls it: compiled, in DDP
    laplacian: torch.Tensor | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of the loss in float16; does nothing in another dtype
    ema: list | None  # running means of the weights, in the order of parameters()
    windows: np.ndarray  # where the validation windows begin
    state: RunState
    resumed: bool
    past: list  # the text of each log up to the step that the run resumes from
    lines: list  # that name the settings of a resumed run which are not as they were
    ahead: dict = field(default_factory=dict)  # the next step's first batch, by (step, micro), on its way to the device

    @property
    def out_dir(self):
        return Path(self.settings.out_dir)

    @property
    def logs(self):
        return [self.out_dir / name for name in LOGS]

    @property
    def T(self):
        return self.raw_model.config.block_size

    @property
    def tokens_per_step(self):
        return self.settings.grad_accum_steps * self.settings.batch_size * self.T

    @property
    def micro_batches(self):
        """The numbers of those batches of a step that this process takes."""
        return range(RANK, self.settings.grad_accum_steps, WORLD)

    def autocast(self):
        return nullcontext() if self.dtype is torch.float32 else torch.autocast(self.device.type, self.dtype)


def start(settings, given):
    """The Run, with tau and weights as it starts or resumes. Raises UserError for a user's mistake. Collective."""
    file = {name: getattr(settings, name) for name, where in given.items() if where != COMMAND_LINE}
    began = {name: getattr(settings, name) for name in ("init_from", "laplacian") if name in given}
    stored, state, lines = None, RunState(file=file, began=began), []
    if settings.init_from == "resume":
        stored = checkpoint.to_resume(settings.out_dir)
        path, _, header = stored
        state = RunState.of(header, path)
        lines = go_on_with(settings, given, stored_settings(header, path), state.file)
        state.file = file
    device = choose_device(settings.device, LOCAL_RANK)
    dtype = choose_dtype(settings.dtype, device)
    if settings.grad_accum_steps % WORLD:
        raise UserError(f"grad_accum_steps = {settings.grad_accum_steps} must be a multiple of {WORLD} processes")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high")  # tf32 where the device has it

    try:
        corpus = Corpus(settings.data_dir)
    except UserError as error:
        if stored and given.get("data_dir") != COMMAND_LINE:
            raise UserError(
                f"{error}; the run's checkpoint names this folder, as seen from where it ran: --data_dir=DIR gives another"
            ) from None
        raise
    corpus.train = corpus.train[: math.ceil(len(corpus.train) * settings.train_fraction)]
    corpus.check(corpus.val, "val")  # train.bin, which may be large, is checked batch by batch
    if state.data not in (None, corpus.meta["sha256"]) and not settings.eval_only:
        raise UserError(
            f"{settings.data_dir} is not the text that the run in {settings.out_dir} is trained on: leave it out, or start a run "
            f"from this one with --init_from={settings.out_dir} --out_dir=OTHER"
        )
    state.data = corpus.meta["sha256"]
    torch.manual_seed(settings.seed)
    raw_model, laplacian, origin = started_model(settings, given, corpus, stored)
    state.origin = state.origin if stored else origin
    for name, value in model_settings(settings).items():  # of a run that starts from a checkpoint
        real = getattr(raw_model.config, name)
        if name != "n_kv_head" or value or real != raw_model.config.n_head:  # 0 stands for n_head
            setattr(settings, name, real)
    past = [lines_until(Path(settings.out_dir) / name, state.step) if state.step and not only_looks(settings) else "" for name in LOGS]

    processes.meet(device)
    model = processes.wrapped(raw_model, device, settings.shard, settings.compile)
    run = Run(
        settings,
        given,
        corpus,
        device,
        dtype,
        raw_model,
        model,
        laplacian,
        optimizer=optim.optimizer_of(raw_model, settings),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype is torch.float16),
        ema=None,
        windows=validation_starts(corpus, settings, raw_model.config.block_size),
        state=state,
        resumed=stored is not None,
        past=past,
        lines=lines,
    )
    if raw_model.config.attention == "tau" and not (run.resumed or settings.eval_only):
        with waiting(f"measuring tau on the first batch, {run.tokens_per_step:,} tokens"), run.autocast():
            taumode.calibrate(raw_model, step_batches(run), settings)
    if settings.ema_decay:
        run.ema = [weight.detach().clone() for weight in raw_model.parameters()]
    if run.resumed and run.state.step:
        checkpoint.restore(raw_model, run.optimizer, run.ema, *stored[:2])
        if state.scaler:
            try:
                run.scaler.load_state_dict(state.scaler)
            except (RuntimeError, KeyError, TypeError) as error:
                raise UserError(f"{stored[0]} is damaged: the scaler of its run cannot go on ({error})") from None
    return run


def doubts(run):
    """Yield what will hardly be meant in the settings of a run, a line each."""
    settings, count = run.settings, {split: run.corpus.meta[split]["documents"] for split in ("train", "val")}
    steps, decay = settings.max_steps, settings.lr_decay_steps
    if count["val"] == 1 < count["train"]:
        yield f"validation is on one document of {settings.data_dir}: a larger --val_fraction when it is prepared gives more"
    if steps and settings.warmup_steps >= steps:
        yield f"warmup_steps = {settings.warmup_steps} fills max_steps = {steps}: learning_rate = {settings.learning_rate} is not reached"
    if steps and settings.lr_schedule == "cosine" and not 0.5 <= decay / steps <= 1.5:
        yield f"lr_decay_steps = {decay} is far from max_steps = {steps}: --lr_decay_steps={steps} lets the learning rate end at its lowest"
    if steps and settings.lr_schedule == "plateau" and settings.plateau_patience * settings.eval_interval >= steps:
        yield (
            f"the plateau rule needs more than {settings.plateau_patience} x {settings.eval_interval} steps (plateau_patience x "
            f"eval_interval) to act, max_steps = {steps}: the learning rate stays {settings.learning_rate}"
        )
    tokens = len(run.corpus.train) * settings.train_fraction
    if (passes := round(steps * run.tokens_per_step / tokens)) > 10:
        yield f"max_steps = {steps} are {passes} passes over {tokens:,.0f} tokens: the model may learn them by heart"


def choose_dtype(name, device):
    """The torch.dtype of the setting dtype. Raises UserError for float16 on other devices than CUDA and a CPU."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name == "float16" and device.type not in ("cuda", "cpu"):
        raise UserError(f"dtype = 'float16' is for a CUDA device or a CPU, not {device.type}: leave it out, which is float32 there")
    return getattr(torch, name)


def domain_laplacian(settings):
    """The (F, F) float64 tensor of the settings' Laplacian file; None for dot. Raises UserError if there is no such file."""
    if settings.attention == "dot":
        return None
    check_laplacian_exists(settings)
    return torch.from_numpy(load_laplacian(settings.laplacian))


def started_model(settings, given, corpus, stored):
    """(model, laplacian, origin): the model to start with, and what its weights began as. stored: of a run that is resumed, its
    checkpoint's (path, tensors, header)."""
    if settings.init_from == "scratch":
        return new_model(settings, corpus)
    resume = stored is not None
    if resume:
        path, tensors, header = stored
    else:
        path = checkpoint.find(settings.init_from)
        tensors, header = checkpoint.read(path)
    if header["tokenizer"] != corpus.tokenizer.to_json():
        raise UserError(
            f"the {corpus.vocab_size} tokens of {settings.data_dir} are not the {header['config'].get('vocab_size')} of {path}: "
            f"prepare the text with --tokenizer={path.parent}, or start a run from scratch in another --out_dir"
        )
    changes = changes_of(settings, given, path, header)
    laplacian = own = tensors.get("laplacian")
    if not resume and "laplacian" not in given:
        settings.laplacian = ""  # the checkpoint's own
    if "laplacian" in given and own is not None and (os.path.exists(settings.laplacian) or not resume or settings.eval_only):
        laplacian = domain_laplacian(settings)
        if resume and not settings.eval_only and not torch.equal(laplacian, own):
            raise UserError(
                f"{settings.laplacian} is not the Laplacian of the run in {settings.out_dir}: leave it out, "
                f"or start a run from this one with --init_from={settings.out_dir} --out_dir=OTHER"
            )
    check_length(settings, corpus, checkpoint.config_of(header, path, **changes).block_size)
    model = checkpoint.build_model(tensors, header, path, laplacian, **changes)
    return model, laplacian, header["sha256"][:12]


def new_model(settings, corpus):
    """(model, laplacian, origin) of a run from scratch. Raises UserError if the model does not fit into memory."""
    laplacian, origin = domain_laplacian(settings), "scratch"
    config = ModelConfig(vocab_size=corpus.vocab_size, **model_settings(settings))
    check_length(settings, corpus, config.block_size)
    try:
        model = Tauformer(config, laplacian)
        if settings.embedding_init == "domain":
            origin = start_embedding(model, Path(settings.data_dir) / "token_embeddings.npy")
        return model, laplacian, origin
    except (RuntimeError, MemoryError) as error:
        raise UserError(
            f"the model does not fit into memory: lower n_layer = {config.n_layer} or n_embd = {config.n_embd} ({first_line(error)})"
        ) from None


def changes_of(settings, given, path, header):
    """{name: value} of the given model settings that may differ from the checkpoint's. Raises UserError if others do."""
    changes = {}
    for name, ours in sorted(model_settings(settings).items()):
        theirs = header["config"].get(name)
        if name not in given:
            continue
        if name in ("block_size", "dropout") or name == "tau_mode" and settings.init_from != "resume":
            changes[name] = ours
        elif ours != theirs and not (name == "n_kv_head" and ours == 0):
            raise UserError(f"{name} = {ours!r}, but {path} has {theirs!r}: leave it out")
    begun = stored_settings(header, path).get("embedding_init", settings.embedding_init)
    if "embedding_init" in given and settings.embedding_init != begun:
        raise UserError(f"embedding_init = {settings.embedding_init!r}, but the embeddings of {path} began as {begun!r}: leave it out")
    settings.embedding_init = begun
    return changes


@torch.no_grad()
def start_embedding(model, path):
    """Give every token's embedding the direction of its row in a file (V, F), F = n_embd, and the length that random ones
    have on average; a token whose row is zero keeps its random vector. Returns a hash of the vectors. Raises UserError for a file that
    does not fit."""
    if not path.exists():
        raise UserError(f'embedding_init = "domain" needs {path}: make it with `python data/embed.py {path.parent} --overwrite`')
    try:
        vectors = torch.from_numpy(np.load(path)).float()
        if not vectors.isfinite().all():
            raise ValueError("it holds NaN or infinity")
    except DAMAGED_ARRAY as error:
        raise UserError(f"{path} is damaged ({error}): make it again with data/embed.py --overwrite") from None
    weight = model.embedding.weight
    if vectors.shape != weight.shape:
        raise UserError(
            f"{path} is {tuple(vectors.shape)}, but vocabulary and n_embd are {tuple(weight.shape)}: make it again "
            f"with data/embed.py --dim={weight.size(1)} --overwrite"
        )
    length = vectors.norm(dim=1, keepdim=True)
    weight.copy_(torch.where(length > 0, vectors * (INIT_STD * math.sqrt(weight.size(1)) / length.clamp_min(1e-30)), weight))
    return hashlib.sha256(vectors.numpy().tobytes()).hexdigest()[:12]


def check_length(settings, corpus, T):
    for split in ("train", "val"):
        if (length := len(getattr(corpus, split))) <= T:
            raise UserError(f"{settings.data_dir}/{split}.bin has {length} tokens, too few for one context: block_size = {T} needs {T + 1}")
