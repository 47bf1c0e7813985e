"""The settings of train.py, one line each with its meaning: read from a TOML file and overridden by --key=value."""

import difflib
import hashlib
import json
import os
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from common import FRACTION, NOT_NEGATIVE, POSITIVE, ROOT, Parser, UserError, check_rule, meant, one_of, read_text, setting
from ops.model_config import ModelSettings


@dataclass
class Settings(ModelSettings):
    """All settings of train.py: the model's, and these."""

    data_dir: str = setting(
        "data/python_docs", "prepared corpus: the folder of its train.bin, val.bin, meta.json", group="what is read and written"
    )
    laplacian: str = setting("", "Laplacian file (default: laplacian.parquet in data_dir); dot attention uses none")
    out_dir: str = setting("", "folder for checkpoints and metrics.jsonl (default: out/NAME of the config)")
    init_from: str = setting(
        "scratch",
        "scratch; resume: go on with the run in out_dir; auto: resume where it has a "
        "checkpoint, else scratch; or another run's folder, whose weights, model and "
        "Laplacian to start from",
    )
    overwrite: bool = setting(False, "replace the run that out_dir holds")
    results: str = setting("out/runs.jsonl", "file to which a finished run adds a line")
    embedding_init: str = setting(
        "normal",
        "of the token embeddings of a run from scratch. normal: N(0, 0.02); domain: the "
        "domain's own token vectors, DATA_DIR/token_embeddings.npy, scaled to that variance",
        one_of("normal", "domain"),
    )
    tau_scope: str = setting(
        "global",
        "global: block 0's tau for all layers and heads; head: one for each",
        one_of("global", "head"),
        group="where tau comes from (tau_mode, above)",
    )
    tau_percentile: float = setting(75.0, "of tau_mode percentile", (lambda value: 0 <= value <= 100, "0 to 100"))
    tau_interval: int = setting(100, "steps between the moves of tau_mode adaptive", POSITIVE)
    tau_smoothing: float = setting(0.5, "share of log tau that such a move keeps", FRACTION)
    tau_drift: float = setting(0.1, "|log(median energy / tau)| past which tau_mode gradient moves", NOT_NEGATIVE)
    train_fraction: float = setting(
        1.0,
        "part of train.bin, from its start, that is trained on",
        (lambda value: 0 < value <= 1, "above 0 and at most 1"),
        group="a step",
    )
    sampling: str = setting(
        "random",
        "random: windows of the context's length that begin anywhere, drawn anew for each batch; passes: windows "
        "side by side, none seen twice before all have been, each pass in another order",
        one_of("random", "passes"),
    )
    max_steps: int = setting(5000, "optimiser steps of the whole run", NOT_NEGATIVE)
    batch_size: int = setting(16, "sequences in memory at once, on each device", POSITIVE)
    grad_accum_steps: int = setting(8, "batches per step, all devices together", POSITIVE)
    learning_rate: float = setting(5e-4, "after the warm-up", POSITIVE)
    warmup_steps: int = setting(100, "steps of linear warm-up", NOT_NEGATIVE)
    lr_schedule: str = setting(
        "constant",
        "constant; cosine: down to min_lr at lr_decay_steps; plateau: halved, five times at most, when validation no longer improves",
        one_of("constant", "cosine", "plateau"),
    )
    min_lr: float = setting(5e-5, "end of the cosine", NOT_NEGATIVE)
    lr_decay_steps: int = setting(5000, "step of the cosine's end", POSITIVE)
    plateau_patience: int = setting(3, "validations without a new best before the plateau rule halves", POSITIVE)
    weight_decay: float = setting(0.1, "AdamW, on matrices only", NOT_NEGATIVE)
    beta1: float = setting(0.9, "AdamW", FRACTION)
    beta2: float = setting(0.95, "AdamW", FRACTION)
    grad_clip: float = setting(1.0, "greatest norm of the gradient (0: no limit)", NOT_NEGATIVE)
    spike: float = setting(
        0.0, "a step whose loss is this many nats above the running mean of about 50 steps is bad (0: none is)", NOT_NEGATIVE
    )
    skip_limit: int = setting(
        0,
        "bad steps in a row (loss or gradient not finite, or a spike) whose update is left out; at the next one the run stops",
        NOT_NEGATIVE,
    )
    ema_decay: float = setting(0.0, "decay of a running mean of the weights, which is then validated and saved as best (0: none)", FRACTION)
    eval_interval: int = setting(100, "steps between validations", POSITIVE, group="what is logged and kept, and when")
    eval_iters: int = setting(20, "batches of a validation, spread evenly over val.bin, the same each time", POSITIVE)
    eval_only: bool = setting(False, "validate the model of init_from, print it, write nothing")
    log_interval: int = setting(10, "steps between lines of the training loss", POSITIVE)
    diag_interval: int = setting(100, "steps between lines of diagnostics.jsonl, tau only (0: none)", NOT_NEGATIVE)
    checkpoint_interval: int = setting(500, "steps between checkpoints to resume from", POSITIVE)
    keep_last: int = setting(2, "such checkpoints kept", POSITIVE)
    wandb_log: bool = setting(False, "send the metrics to Weights & Biases too")
    wandb_project: str = setting("tauformer", "its project")
    wandb_run_name: str = setting("", "its name for this run (default: the name of out_dir)")
    seed: int = setting(1337, "of weights, batches and dropout", NOT_NEGATIVE, group="the machine, and what to do on it")
    device: str = setting(
        "auto",
        "auto: cuda, else mps, else cpu; or one of them by name, such as cuda:1",
        (re.compile(r"auto|(cpu|cuda|mps|xpu)(:\d+)?").fullmatch, "auto, cpu, mps, cuda, or one GPU such as cuda:1"),
    )
    dtype: str = setting(
        "auto",
        "of matrix products (autocast). auto: on a CUDA device bfloat16, or where it has none float16, else float32; float16 scales "
        "the loss, so that gradients do not vanish",
        one_of("auto", "float32", "bfloat16", "float16"),
    )
    deterministic: bool = setting(False, "on CUDA, use only operations that give the same bits every time (others raise); on a CPU all do")
    compile: bool = setting(False, "torch.compile the model")
    shard: str = setting(
        "ddp", "with several processes: ddp, each holds the whole model; fsdp, each holds a part of every weight", one_of("ddp", "fsdp")
    )
    dry_run: bool = setting(False, "print parameters, memory, tokens and the time to expect, measured on 3 steps; write nothing")
    profile: bool = setting(False, "profile the third to fifth step into out_dir/profile.json (chrome://tracing)")


NO_RESULT = (
    "out_dir",
    "init_from",
    "overwrite",
    "results",
    "seed",
    "log_interval",
    "diag_interval",
    "checkpoint_interval",
    "keep_last",
    "wandb_log",
    "wandb_project",
    "wandb_run_name",
    "dry_run",
    "profile",
)  # settings that config_hash() ignores


COMMAND_LINE = "command line"
WRITTEN = "# The settings of the run in this folder, written by train.py, which takes this file as its CONFIG.toml too."
OF_THE_CALL = ("out_dir", "init_from", "overwrite", "eval_only", "dry_run", "profile")  # not of the run


def config_hash(settings, **contents):
    """A hash that is the same for runs that differ only in the settings of NO_RESULT: seed, folders, logs. contents: what stands behind
    the paths data_dir and laplacian, and what the weights started from."""
    kept = {name: value for name, value in changed_settings(settings).items() if name not in NO_RESULT} | contents
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def changed_settings(settings):
    """{name: value} of the settings that are not at their defaults."""
    return {f.name: getattr(settings, f.name) for f in fields(settings) if getattr(settings, f.name) != f.default}


def checked(name, value, kind, source):
    """The value of a setting of type `kind`, a whole number as int or float, whichever that is. Raises UserError for a wrong type or
    value."""
    if kind is float and type(value) is int and abs(value) < 2**53 or kind is int and type(value) is float and value.is_integer():
        value = kind(value)
    if type(value) is not kind:
        raise UserError(f"{source}: {name} = {value!r} must be {kind.__name__}, not {type(value).__name__}")
    check_rule(Settings.__dataclass_fields__[name], value, source)
    return value


def from_text(text, name, kind):
    """The value that --name=text means. Raises UserError if it is no `kind`."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return float(text) if kind is int and re.fullmatch(r"[\d.]+e\+?\d+", text, re.I) else kind(text)
    except (KeyError, ValueError):
        must = {bool: "True or False", int: "int, a whole number such as 5000 or 5e3", float: "float, a number such as 0.001 or 1e-3"}
        raise UserError(f"--{name}={text} must be {must[kind]}") from None


def read_settings(path):
    """{name: value} of a TOML file of settings. Raises UserError for a broken file, an unknown key or a wrong type or value."""
    kinds, text = {f.name: f.type for f in fields(Settings)}, read_text(path)
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # broken TOML, or numbers with thousands of digits
        raise UserError(f"{path} is not a TOML file: {error}") from None
    for name in values:
        if name not in kinds:
            raise UserError(f"{path}: unknown setting {name!r}{meant(name, kinds)} (train.py --help lists them)")
    return {name: checked(name, value, kinds[name], path) for name, value in values.items()}


def parse(description):
    """(settings, given) of the command line: the Settings, and {name: where it is set} of those that are set, by the path of the
    file or COMMAND_LINE. Raises UserError for an unknown key, a wrong type or a value that makes no sense."""
    parser = Parser(description)
    parser.usage = "%(prog)s [-h] CONFIG.toml [--key=value ...]"
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="file of settings; --key=value overrides it")
    add_settings(parser)
    args = parser.parse_args()
    check_config(args.config, Settings.__dataclass_fields__)
    file, line = read_settings(args.config), given_settings(args)
    settings = Settings(**file | line)
    settings.out_dir = settings.out_dir or f"out/{args.config.stem}"
    settings.laplacian = settings.laplacian or f"{settings.data_dir}/laplacian.parquet"
    check_schedule(settings)
    return settings, dict.fromkeys(file, str(args.config)) | dict.fromkeys(line, COMMAND_LINE)


def add_settings(parser):
    """Give a parser an option for every setting; given_settings() reads them."""
    for f in fields(Settings):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        rule = f.metadata["rule"]
        choices = rule[1].removeprefix("one of ").split(", ") if rule and rule[1].startswith("one of ") else []
        group.add_argument(
            f"--{f.name}",
            nargs="?" if f.type is bool else None,  # a flag alone is True
            metavar="{" + ",".join(choices) + "}" if choices else f.type.__name__.upper(),
            help=f.metadata["meaning"].replace("%", "%%") + ("" if f.default == "" else f" [{f.default}]"),
        )


def given_settings(args):
    """{name: value} of the settings that a command line gives. Raises UserError for a wrong type or a value that makes no sense."""
    said = {f: getattr(args, f.name) for f in fields(Settings)}
    return {f.name: checked(f.name, from_text(text, f.name, f.type), f.type, COMMAND_LINE) for f, text in said.items() if text is not None}


def check_config(path, kinds):
    """Raise UserError if there is no config file at `path`, with the one that was meant, or all that there are."""
    if path.exists() and not path.is_dir():
        return
    name, equals, value = str(path).partition("=")
    if equals and name in kinds:
        raise UserError(f"{path} is no CONFIG.toml: settings are given after it, as --{path}")
    ours = sorted((ROOT / "configs").glob("*.toml"))
    beside = sorted((path if path.is_dir() else path.parent).glob("*.toml"))
    shown = {found.stem: os.path.relpath(found) if found.is_relative_to(Path.cwd()) else str(found) for found in (*ours, *beside)}
    near = difflib.get_close_matches(path.stem, shown, 1)
    hint = f"did you mean {shown[near[0]]}?" if near else f"there are {', '.join(shown[found.stem] for found in ours)}"
    raise UserError(f"{path} {'is a folder, no' if path.is_dir() else 'does not exist, it should be a'} CONFIG.toml: {hint}")


def check_schedule(settings):
    if settings.lr_schedule == "cosine" and settings.min_lr > settings.learning_rate:
        raise UserError(f"min_lr = {settings.min_lr} is above learning_rate = {settings.learning_rate}")
    if settings.lr_schedule == "cosine" and settings.lr_decay_steps <= settings.warmup_steps:
        raise UserError(f"lr_decay_steps = {settings.lr_decay_steps} must be past warmup_steps = {settings.warmup_steps}")


def config_text(settings, began):
    """All settings of a run as TOML, which read_settings() reads. began: init_from and laplacian, where the run's first call gave them."""
    lines = [WRITTEN]
    for f in fields(settings):
        if f.metadata["group"]:
            lines += ["", f"# {f.metadata['group']}"]
        value = began.get(f.name) if f.name in ("init_from", "laplacian") else getattr(settings, f.name)
        if value is not None and (f.name not in OF_THE_CALL or f.name in ("out_dir", "init_from")):
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # in JSON as in TOML, but for this character
            lines.append(f"{f.name} = {text}")
    return "\n".join(lines) + "\n"


def model_settings(settings):
    """{name: value} of ModelConfig, but for vocab_size, which is the corpus's."""
    return {f.name: getattr(settings, f.name) for f in fields(ModelSettings)}


def stored_settings(header, path):
    """{name: value} of the settings in a checkpoint's header. Raises UserError for a wrong type or value."""
    stored, kinds = header["run"].get("settings", {}), {f.name: f.type for f in fields(Settings)}
    if not isinstance(stored, dict):
        raise UserError(f"{path} is damaged: the settings of its run are {stored!r}")
    return {name: checked(name, value, kinds[name], path) for name, value in stored.items() if name in kinds}


def go_on_with(settings, given, stored, file):
    """Give the settings of a run that is resumed the values that its checkpoint holds, but for those of the command line, those that
    are the call's own, and max_steps. Returns lines that name what is not as it was. stored: the checkpoint's settings; file: what
    its config file said."""
    lines = []
    for f in fields(settings):
        name, ours = f.name, getattr(settings, f.name)
        if name in OF_THE_CALL or name not in stored or ours == stored[name]:
            continue
        if given.get(name) == COMMAND_LINE or name == "max_steps":
            lines.append(f"{name} = {ours!r} from here on, {stored[name]!r} before")
            continue
        if name in given and name in file and file[name] != ours:
            lines.append(f"{name} = {stored[name]!r} as before: {given[name]} says {ours!r} now (--{name}={ours} changes it)")
        setattr(settings, name, stored[name])
    check_schedule(settings)
    return lines
