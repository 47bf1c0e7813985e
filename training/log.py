"""What a run reports: metrics.jsonl, diagnostics.jsonl, log.txt, the progress bar, Weights & Biases, and its line in the results file. Only
rank 0 writes."""

import hashlib
import json
import math
import os
import shlex
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime

import torch
from tqdm import tqdm

from common import RANK, WORLD, UserError, append_line, commit, replacing
from training import taumode
from training.batches import to_device
from training.config import changed_settings, config_hash
from training.diagnostics import collapses, diagnose
from training.folder import CONFIG, clear_folder, is_ours, keep_line, take_folder
from training.memory import peak_mem_mb

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
}  # FLOP/s in dense bfloat16, by a part of the device's name
DIAGNOSED = 4  # validation windows that the diagnostics use


class Log:
    def __init__(self, run):
        """Lock the output folder for this process, and delete from it what is not of this run."""
        self.run, self.master, self.wandb = run, RANK == 0, None
        if self.master:
            take_folder(run)
            self.wandb = wandb_run(run) if run.settings.wandb_log else None
            clear_folder(run)
            for line in (*run.lines, went_on(run) if run.resumed else first_line(run)):
                self.print(line)
        self.progress = tqdm(
            total=run.settings.max_steps, initial=run.state.step, unit=" steps", disable=None if self.master else True, dynamic_ncols=True
        )
        self.begin = time.perf_counter() - run.state.elapsed_s
        self.trained_s, self.trained_tokens = 0.0, 0  # since the last training line

    @property
    def elapsed_s(self):
        return time.perf_counter() - self.begin

    def print(self, line, shown=True):
        """Print a line, unless it is not to be shown, and keep it in log.txt."""
        if self.master:
            keep_line(self.run.out_dir, line)
            if shown:
                tqdm.write(line)

    def say(self, text, shown=True):
        self.print(f"step {self.run.state.step:>5}: {text}", shown)

    def record(self, record):
        """Add a line to metrics.jsonl."""
        if not self.master:
            return
        record = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()}
        record |= {"elapsed_s": self.elapsed_s, "peak_mem_mb": peak_mem_mb(self.run.device)}
        self.write(0, record)
        if self.wandb is not None:
            split = record["split"]
            self.wandb.log({f"{split}/{key}": value for key, value in record.items() if key != "split"}, step=record["step"])

    def write(self, number, record):
        with open(self.run.logs[number], "a") as file:
            file.write(json.dumps(record) + "\n")

    def step(self, loss, grad_norm, seconds):
        """Count a training step that took `seconds`; add a line to metrics.jsonl after every log_interval of them."""
        run, state = self.run, self.run.state
        self.trained_s += seconds
        self.trained_tokens += run.tokens_per_step
        if state.step == 1 or state.step % run.settings.log_interval == 0:
            speed = self.trained_tokens / self.trained_s
            self.record(
                {
                    "step": state.step,
                    "tokens": state.tokens,
                    "split": "train",
                    "loss": loss,
                    "lr": run.optimizer.param_groups[0]["lr"],
                    "grad_norm": grad_norm,
                    "skipped": state.skipped,
                    "tokens_per_s": speed,
                }
            )
            self.trained_s, self.trained_tokens = 0.0, 0
            flops = speed * run.raw_model.flops_per_token()
            peak = next(
                (peak for part, peak in PEAK_FLOPS.items() if run.device.type == "cuda" and part in torch.cuda.get_device_name()), None
            )
            text = f"loss {loss:.3f}, {speed:,.0f} tokens/s, {flops / 1e9:,.0f} GFLOP/s" + (
                f", MFU {flops / WORLD / peak:.1%}" if peak else ""
            )
            self.say(text, shown=self.progress.disable)  # without a terminal; the bar shows it, too
            self.progress.set_postfix_str(text, refresh=False)
        self.progress.update()

    def diagnose(self):
        """Add a line to diagnostics.jsonl, and name the heads that have collapsed."""
        run, state = self.run, self.run.state
        with run.autocast():
            record = diagnose(run.raw_model, to_device(run.corpus.batch(run.windows[:DIAGNOSED], run.T, "val"), run.device)[0])
        for line in collapses(record, state.narrow) if self.master else ():
            self.say(line)
        if self.master:
            self.write(1, {"step": state.step, "tokens": state.tokens} | record)

    def finished(self):
        """Add the line of a finished run to the settings' results file."""
        run, settings, state = self.run, self.run.settings, self.run.state
        if self.master:
            meta, laplacian = run.corpus.meta, digest_of(run.laplacian)
            data = [meta["sha256"], meta["vocab_size"], meta["train"]["tokens"], meta["val"]["tokens"]]  # the text, and how it is divided
            append_line(
                settings.results,
                {
                    "run": settings.out_dir,
                    "date": datetime.now(UTC).isoformat(timespec="seconds"),
                    "config": config_hash(settings, data_dir=data, laplacian=laplacian, origin=state.origin),
                    "seed": settings.seed,
                    "commit": commit(),
                    "data": state.data[:12],
                    "laplacian": laplacian,
                    "origin": state.origin,
                    "parameters": run.raw_model.parameter_count(),
                    "steps": state.step,
                    "tokens": state.tokens,
                    "seconds": round(self.elapsed_s, 1),
                    "best_loss": state.best_loss,
                    "bits_per_byte": run.corpus.bits_per_byte(state.best_loss),
                    "settings": changed_settings(settings),
                },
            )

    def close(self):
        run, state = self.run, self.run.state
        self.progress.close()
        if self.wandb is not None:
            self.wandb.finish()
        out_dir = shlex.quote(str(run.out_dir))
        config = f"{out_dir}/{CONFIG}" + ("" if is_ours(run.out_dir / CONFIG) else f" --out_dir={out_dir}")
        self.print(
            f"{run.out_dir}: best validation loss {state.best_loss:.4f}: python sample.py {out_dir} --prompt=TEXT samples from it"
            if state.step == run.settings.max_steps
            else f"{run.out_dir}: stopped and saved at step {state.step}: --init_from=resume goes on: "
            f"{'python' if WORLD == 1 else 'torchrun ...'} train.py {config} --init_from=resume"
        )


def digest_of(laplacian):
    return None if laplacian is None else hashlib.sha256(laplacian.numpy().tobytes()).hexdigest()[:12]


def first_line(run):
    tau = taumode.tau_of(run.raw_model)
    return (
        f"{run.out_dir}: {run.raw_model.parameter_count() / 1e6:.2f} M parameters, {run.raw_model.config.attention} attention"
        + (f" with tau = {tau[0].median().item():.4g} ({run.settings.tau_mode})" if tau is not None else "")
        + f", {run.tokens_per_step:,} tokens a step, {machine(run)}"
    )


def went_on(run):
    return f"{run.out_dir}: goes on at step {run.state.step} of {run.settings.max_steps}, {machine(run)}"


def machine(run):
    return f"on {WORLD} x {run.device.type}, {str(run.dtype).removeprefix('torch.')}"


def wandb_run(run):
    import wandb

    try:
        log = wandb.init(
            project=run.settings.wandb_project,
            name=run.settings.wandb_run_name or run.out_dir.name,
            config=asdict(run.settings),
            dir=run.settings.out_dir,
            id=run.state.wandb_id,
            resume="allow",
        )
    except wandb.errors.Error as error:
        raise UserError(f"wandb cannot start ({error}): log in, or set WANDB_MODE=offline") from None
    run.state.wandb_id = log.id
    return log


def profiled(path):
    """A profiler, already started, of the third to fifth step; it writes its trace to `path`."""

    def write(profiler):
        with replacing(path) as temporary:
            profiler.export_chrome_trace(str(temporary))
        tqdm.write(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15), file=sys.stderr)

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # so that it does not say on standard error when it starts and stops
    profiler = torch.profiler.profile(schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1), on_trace_ready=write)
    profiler.start()
    return profiler
