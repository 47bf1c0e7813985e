"""Train a Tauformer, or its dot-product twin.

    python train.py configs/quickstart.toml --learning_rate=1e-3
    torchrun --nproc_per_node=8 train.py configs/tau_30m.toml

Writes metrics.jsonl, diagnostics.jsonl, log.txt (the lines that it prints), config.toml (its settings), checkpoints to resume
from and best.safetensors to out/NAME, where NAME is the config's. On SIGTERM, SIGINT (Ctrl-C) or SIGHUP it finishes the step,
saves and ends; on another one, over a second later, it ends at once. On SIGUSR1 it saves."""

import math
import os
import shlex
import sys
import time
from contextlib import nullcontext
from datetime import timedelta

import common  # isort: skip, for it tells of packages that are missing
import numpy as np

from common import RANK, WORLD, waiting
from data import checkpoint_file
from training import inputs

if __name__ == "__main__":  # first of all, for importing torch takes seconds: a mistake in the command line is answered at once
    settings, given = common.run(lambda: inputs.asked(__doc__))
with waiting("importing torch"):
    import torch

    from training import checkpoint, memory, optim, processes, taumode
    from training.batches import batch_of, step_batches
    from training.evaluation import averaged, shown, validation_record
    from training.folder import keep_line, only_looks
    from training.log import Log, profiled
    from training.processes import no_sync, summed
    from training.start import doubts, start

LOWEST_SCALE = 0.03125  # lowest factor of the plateau rule: 5 halvings, the published run's last
MEMORY = 0.98  # share of the losses' running mean that is kept per step: about the mean of 50 steps


def main(settings, given):
    sys.stdout, sys.stderr = common.Unread(sys.stdout), common.Unread(sys.stderr)
    with memory.memory_errors_named(settings):
        asked = processes.Signals()
        if not only_looks(settings):
            asked.heed()
        with waiting("preparing the run"):
            run = start(settings, given)
        if settings.eval_only:
            evaluate_only(run)
        elif run.resumed and run.state.step >= settings.max_steps:
            if RANK == 0:
                print(
                    f"{run.out_dir} is at step {run.state.step} already: nothing to do; a greater --max_steps goes on, "
                    f"python plot.py {shlex.quote(str(run.out_dir))} draws it"
                )
        else:
            (dry_run if settings.dry_run else train)(run, asked)
    processes.part()


def train(run, asked):
    settings, state = run.settings, run.state
    log = Log(run)
    warn(run)
    diagnoses = settings.diag_interval and run.raw_model.config.attention == "tau"
    profiler = profiled(run.out_dir / "profile.json") if settings.profile and log.master else None
    if state.step == 0:
        if not run.resumed:
            save(run, log)
        with waiting(f"validating for the first time, on {len(run.windows)} windows"):
            if diagnoses:
                log.diagnose()
            evaluate(run, log)

    to_stop = False
    while state.step < settings.max_steps and not to_stop:
        begin = time.perf_counter()
        loss, grad_norm, to_stop, to_save = training_step(run, asked)
        log.step(loss, grad_norm, time.perf_counter() - begin)
        last = state.step == settings.max_steps
        if settings.tau_mode == "adaptive" and state.step % settings.tau_interval == 0:
            move_tau(run, taumode.adapt)
        if diagnoses and (state.step % settings.diag_interval == 0 or last):
            log.diagnose()
        if state.step % settings.eval_interval == 0 or last:
            evaluate(run, log)
        if last:
            log.finished()
        if state.step % settings.checkpoint_interval == 0 or last or to_stop or to_save:
            save(run, log)
        if profiler is not None:
            profiler.step()

    if profiler is not None:
        profiler.stop()
    log.close()


def warn(run):
    for line in doubts(run):
        common.note(f"train.py: warning: {line}")


def training_step(run, asked):
    """One optimiser step, whose update is left out if it is bad. Returns (loss, gradient norm, stop, save); the last two are above 0
    if a signal to any process has asked for it."""
    settings, state, step = run.settings, run.state, run.state.step
    optim.set_learning_rate(run.optimizer, optim.learning_rate(settings, step, state.lr_scale))
    total = torch.zeros((), device=run.device)
    for micro in run.micro_batches:
        torch.manual_seed(np.random.SeedSequence([settings.seed, step, micro]).generate_state(1)[0].item())
        idx, targets = run.ahead.pop((step, micro), None) or batch_of(run, step, micro)
        with no_sync(run.model) if micro != run.micro_batches[-1] else nullcontext():
            with run.autocast():
                loss = run.model(idx, targets) / len(run.micro_batches)  # gradients are then averaged over the processes
            run.scaler.scale(loss).backward()
        total += loss.detach()
    first = run.micro_batches[0]
    run.ahead[step + 1, first] = batch_of(run, step + 1, first)  # while the GPU still computes
    run.scaler.unscale_(run.optimizer)
    grad_norm = optim.clip_gradients(run.raw_model, settings.grad_clip)
    loss, to_stop, to_save = summed([total.item() / WORLD, asked.stop, asked.save], run.device)
    asked.save = False
    if is_good(run, loss, grad_norm):
        run.scaler.step(run.optimizer)
        with torch.no_grad():
            for weight, mean in zip(run.raw_model.parameters(), run.ema or ()):
                mean.lerp_(weight, 1 - settings.ema_decay)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.tokens += run.tokens_per_step
    return loss, grad_norm, to_stop, to_save


def is_good(run, loss, grad_norm):
    """Whether to make a step's update. Updates the running mean of the losses and the counts of bad steps, and ends the run at one
    bad step too many. A gradient that overflows because the loss is scaled makes no bad step: the scaler halves its scale."""
    settings, state = run.settings, run.state
    average = loss if state.loss_average is None else state.loss_average
    scale = run.scaler.get_scale()  # 1 unless in float16
    if scale > 1 and math.isfinite(loss) and not math.isfinite(grad_norm):
        state.skipped += 1
        return False
    if math.isfinite(loss + grad_norm) and not (settings.spike and loss > average + settings.spike):
        state.bad, state.loss_average = 0, MEMORY * average + (1 - MEMORY) * loss
        return True
    state.bad += 1
    state.skipped += 1
    if state.bad > settings.skip_limit:
        scaled = f", scale of the loss {scale:g}" if run.scaler.is_enabled() else ""
        what = f"loss {loss:.4g}, running mean {average:.4g}, norm of the gradient {grad_norm:.4g}{scaled}"
        fail(run, f"step {state.step + 1} is bad: {what}")
    return False


def evaluate(run, log):
    """Validate, log and save the best; then the plateau rule, and that of tau_mode = "gradient". Ends the run if it diverged."""
    settings, state = run.settings, run.state
    record = validation_record(run)
    if not math.isfinite(record["loss"]):
        fail(run, f"the validation loss at step {state.step} is not finite")
    log.record(record)
    log.say(shown(record))
    if record["loss"] < state.best_loss:
        state.best_loss, state.stale = record["loss"], 0
        with averaged(run):
            write_checkpoint(run, log, run.out_dir / checkpoint_file.BEST, checkpoint.snapshot(run.raw_model))
        if settings.tau_mode == "gradient" and state.step:
            move_tau(run, taumode.follow)
    else:
        state.stale += 1
        if settings.lr_schedule == "plateau" and state.stale >= settings.plateau_patience:
            state.lr_scale, state.stale = max(state.lr_scale / 2, LOWEST_SCALE), 0


def move_tau(run, move):
    if run.raw_model.config.attention == "tau":
        with run.autocast():
            move(run.raw_model, step_batches(run), run.settings)


def save(run, log):
    """Write a checkpoint to resume from, and delete all but the newest keep_last."""
    tensors = checkpoint.snapshot(run.raw_model, run.optimizer if run.state.step else None, run.ema)
    write_checkpoint(run, log, checkpoint.step_path(run.out_dir, run.state.step), tensors)
    if log.master:
        for path in checkpoint.steps(run.out_dir)[run.settings.keep_last :]:
            path.unlink()


def write_checkpoint(run, log, path, tensors):
    if not log.master:
        return
    bad = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if bad:
        fail(run, f"{bad} at step {run.state.step} is not finite")
    for file in run.logs:  # the logs that belong to the checkpoint are on disk before it
        if file.exists():
            with open(file, "r+b") as opened:
                os.fsync(opened.fileno())
    run.state.elapsed_s, run.state.scaler = log.elapsed_s, run.scaler.state_dict()
    checkpoint.write(path, tensors, run.laplacian, run.raw_model.config, run.corpus.tokenizer.to_json(), run.state, run.settings)


def fail(run, what):
    good = [] if only_looks(run.settings) else checkpoint.steps(run.out_dir)
    line = (
        f"train.py: {what}; "
        + (f"{good[0]} is the last good checkpoint; " if good else "")
        + f"try a learning_rate lower than {run.settings.learning_rate}, or a skip_limit above "
        f"{run.settings.skip_limit} (bad steps in a row that are left out)"
    )
    if RANK == 0 and not only_looks(run.settings):
        keep_line(run.out_dir, line)
    raise SystemExit(line)


def evaluate_only(run):
    """Print the validation loss of a trained model; with another Laplacian, also with tau measured on the energies of that one."""
    swapped = run.raw_model.config.attention == "tau" and "laplacian" in run.given
    with waiting(f"validating on {len(run.windows)} windows"):
        record = validation_record(run)
    if RANK == 0:
        print(shown(record) + (", with tau as it was" if swapped else ""))
    if swapped:
        move_tau(run, taumode.calibrate)
        record = validation_record(run)
        if RANK == 0:
            print(shown(record) + ", with tau measured on the energies of this Laplacian")


def dry_run(run, asked):
    """Print the memory and time that the run would take, by counting and measured on three steps."""
    settings, model = run.settings, run.raw_model
    warn(run)
    with run.autocast():
        sequence = memory.kept_a_sequence(model, *(x[:1] for x in batch_of(run, run.state.step, run.micro_batches[0])))
    if RANK == 0:
        fits = {gigabytes: memory.fitting(model, settings, sequence, gigabytes) for gigabytes in (24, 40, 80)}
        print(
            f"parameters       {model.parameter_count():,}\n"
            f"tokens           {run.tokens_per_step:,} a step, {run.tokens_per_step * settings.max_steps:,} in all\n"
            f"memory           {memory.memory_needed(model, settings, sequence) / 2**30:.2f} GB on each device by counting\n"
            "batch            "
            + "; ".join(
                f"in {gigabytes} GB " + (f"batch_size = {fit[0]} and grad_accum_steps = {fit[1]}" if fit else "not one sequence")
                for gigabytes, fit in fits.items()
            ),
            flush=True,
        )
    with waiting("making four steps, to measure three"):
        training_step(run, asked)
        begin = time.perf_counter()
        for _ in range(3):
            training_step(run, asked)
    seconds = (time.perf_counter() - begin) / 3
    if RANK == 0:
        left = settings.max_steps - (run.state.step - 4)
        print(
            f"peak             {memory.peak_mem_mb(run.device) / 2**10:.2f} GB at most in these steps\n"
            f"time             {seconds:.2f} s a step, {run.tokens_per_step / seconds:,.0f} tokens/s, "
            f"{timedelta(seconds=round(seconds * left))} h for {left:,} steps, without validation"
        )


if __name__ == "__main__":
    common.run(lambda: main(settings, given))
