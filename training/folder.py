"""A run's output folder: what it holds, and how a run takes it over."""

import fcntl
import os
import re
from pathlib import Path

from common import NOTES, ROOT, UserError, check_lines, output_folder, read_lines, replacing
from data import checkpoint_file
from training.config import WRITTEN, config_text

LOGS = "metrics.jsonl", "diagnostics.jsonl"
LINES, CONFIG = "log.txt", "config.toml"  # the lines that the run prints, and its settings
UNFINISHED = re.compile(  # of a killed run
    r"\.((best|step_\d+)\.safetensors|(metrics|diagnostics)\.jsonl|profile\.json|config\.toml)\.\d+\.tmp"
)


def only_looks(settings):
    """Whether the run writes nothing."""
    return settings.eval_only or settings.dry_run


def files_of(out_dir):
    """The files of a run that the folder holds."""
    return [
        *checkpoint_file.steps(out_dir),
        *(path for path in (Path(out_dir) / name for name in (checkpoint_file.BEST, *LOGS)) if path.exists()),
    ]


def lines_until(path, step):
    """The text of a JSON Lines file without the lines that a resume from `step` will write again."""
    lines = read_lines(path, step=int) if path.exists() else []
    return "".join(line for line, record in lines if record["step"] <= step)


def is_ours(path):
    """Whether a config.toml is there, and written by train.py."""
    return path.exists() and path.read_bytes().startswith(WRITTEN.encode())


def refuse_to_replace(settings):
    """Raise UserError for an output folder that holds a run already, or is meant for something else."""
    out_dir = Path(settings.out_dir)
    kind = "a corpus" if (out_dir / "meta.json").exists() else "the repository itself" if out_dir.resolve() == ROOT else None
    if kind:
        raise UserError(f"out_dir = {settings.out_dir!r} is {kind}: give a folder of the run's own")
    held = files_of(out_dir)
    if not held and (out_dir / LINES).exists() and not is_ours(out_dir / CONFIG):
        held = [out_dir / LINES]  # which a run writes after its config.toml
    if held and not (settings.init_from == "resume" or settings.overwrite or only_looks(settings)):
        raise UserError(
            f"{out_dir} holds a run already ({', '.join(path.name for path in held)}): give "
            + ("--init_from=resume, " if checkpoint_file.steps(settings.out_dir) else "--init_from=scratch with ")
            + "--overwrite=True, or another --out_dir"
        )


def take_folder(run):
    """Make the output folder and lock it until this process ends. Raises UserError if another process has."""
    with output_folder(run.out_dir):
        Path(run.settings.results).parent.mkdir(parents=True, exist_ok=True)
        check_lines(run.settings.results)
        open(run.settings.results, "a").close()  # a file that cannot be written is found now
    try:
        fcntl.flock(os.open(run.out_dir, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process trains in {run.out_dir}: wait for it, or give another --out_dir") from None


def clear_folder(run):
    """Delete from the folder the checkpoints and metrics past the step that the run resumes from; for a new run, all of an old run.
    Write the run's config.toml, unless there is one that train.py has not written."""
    later = [path for path in checkpoint_file.steps(run.out_dir) if path > checkpoint_file.step_path(run.out_dir, run.state.step)]
    unfinished = [path for path in run.out_dir.glob(".*.tmp") if UNFINISHED.fullmatch(path.name)]
    for path in [*(later if run.resumed else files_of(run.out_dir)), *unfinished]:
        path.unlink()
    if run.settings.overwrite:
        (run.out_dir / LINES).unlink(missing_ok=True)
    for path, text in zip(run.logs, run.past):
        if text:
            with replacing(path) as temporary:
                temporary.write_text(text)
        else:
            path.unlink(missing_ok=True)
    path = run.out_dir / CONFIG
    if not path.exists() or is_ours(path):
        with replacing(path) as temporary:
            temporary.write_text(config_text(run.settings, run.state.began), encoding="utf-8", errors="replace")


def keep_line(out_dir, line):
    """Add a line that the run prints to its log.txt, after those on standard error that are not in it yet."""
    with open(Path(out_dir) / LINES, "a", encoding="utf-8", errors="replace") as file:
        file.writelines(f"{said}\n" for said in (*NOTES, line))
    NOTES.clear()
