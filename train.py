"""Train a Tauformer, or its dot-product twin.

    python train.py configs/quickstart.toml --learning_rate=1e-3
    torchrun --nproc_per_node=8 train.py configs/tau_30m.toml

Writes metrics.jsonl, diagnostics.jsonl, checkpoints to resume from and best.safetensors to out/NAME, NAME being the
config's. SIGTERM and SIGINT (Ctrl-C) finish the step, save and end, another one, a second later, ends at once; SIGUSR1
saves."""

import fcntl
import functools
import json
import math
import os
import signal
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import processes
import taumode
from build_laplacian import load_laplacian
from common import LOCAL_RANK, RANK, WORLD, UserError, append_line, choose_device, commit, output_folder, peak_rss_mb, read_lines, replacing, run
from config import changed_settings, config_hash, parse
from data.corpus import Corpus
from diagnostics import collapses, diagnose
from fused import LOSS_CHUNK
from model import INIT_STD, ModelConfig, Tauformer
from processes import no_sync, summed, whole

PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
              "4090": 165e12, "3090": 71e12}  # dense bfloat16, by a part of the device's name
LOWEST_SCALE = 0.03125  # of the plateau rule: 5 halvings, the published run's last
MEMORY = 0.98  # of the running mean of the losses, a step: that of 50 steps
DIAGNOSED = 4  # validation windows that diagnostics are made of


def choose_dtype(name, device):
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return getattr(torch, name)


def domain_laplacian(settings):
    """The (F, F) float64 tensor of the settings' file; None for dot."""
    if settings.attention == "dot":
        return None
    if not os.path.exists(settings.laplacian):
        raise UserError(f"no Laplacian at {settings.laplacian}: make it with `python data/embed.py {settings.data_dir} "
                        f"--dim={settings.n_embd}` and `python build_laplacian.py {settings.data_dir}/embeddings.npy "
                        f"--out={settings.laplacian}`, or, for a corpus of one document, a chain with `python build_laplacian.py "
                        f"--graph=chain --dim={settings.n_embd // settings.n_head} --out={settings.laplacian}`")
    return torch.from_numpy(load_laplacian(settings.laplacian))


def started_model(settings, given, corpus):
    """(model, laplacian, checkpoint): the model to start with; of a resumed run also its (path, tensors, header)."""
    names = [f.name for f in fields(ModelConfig) if f.name != "vocab_size"]
    if settings.init_from == "scratch":
        laplacian = domain_laplacian(settings)
        config = ModelConfig(vocab_size=corpus.vocab_size, **{name: getattr(settings, name) for name in names})
        check_length(settings, corpus, config.block_size)
        try:
            model = Tauformer(config, laplacian)
            if settings.embedding_init == "domain":
                start_embedding(model, Path(settings.data_dir) / "token_embeddings.npy")
            return model, laplacian, None
        except (RuntimeError, MemoryError) as error:
            raise UserError(f"the model does not fit into memory: lower n_layer = {config.n_layer} or n_embd = "
                            f"{config.n_embd} ({str(error).splitlines()[0]})") from None

    resume = settings.init_from == "resume"
    if resume:
        path, tensors, header = checkpoint.to_resume(settings.out_dir)
    else:
        path = checkpoint.find(settings.init_from)
        tensors, header = checkpoint.read(path)
    if header["tokenizer"] != corpus.tokenizer.to_json():
        raise UserError(f"the {corpus.vocab_size} tokens of {settings.data_dir} are not the {header['config'].get('vocab_size')} of {path}: "
                        f"prepare the text with --tokenizer={path.parent}, or start a run from scratch in another --out_dir")
    changes = {}
    for name in sorted(given.intersection(names)):
        ours, theirs = getattr(settings, name), header["config"].get(name)
        if name in ("block_size", "dropout") or name == "tau_mode" and not resume:
            changes[name] = ours
        elif ours != theirs and not (name == "n_kv_head" and ours == 0):
            raise UserError(f"{name} = {ours!r}, but {path} has {theirs!r}: leave it out")
    begun = header["run"].get("settings", {}).get("embedding_init", settings.embedding_init)
    if "embedding_init" in given and settings.embedding_init != begun:
        raise UserError(f"embedding_init = {settings.embedding_init!r}, but the embeddings of {path} began as {begun!r}: leave it out")
    settings.embedding_init = begun
    laplacian = own = tensors.get("laplacian")
    if "laplacian" in given and own is not None and (os.path.exists(settings.laplacian) or not resume or settings.eval_only):
        laplacian = domain_laplacian(settings)
        if resume and not settings.eval_only and not torch.equal(laplacian, own):
            raise UserError(f"{settings.laplacian} is not the Laplacian of the run in {settings.out_dir}: leave it out, "
                            f"or start a run from this one with --init_from={settings.out_dir} --out_dir=OTHER")
    check_length(settings, corpus, changes.get("block_size", header["config"].get("block_size", 0)))
    model = checkpoint.build_model(tensors, header, path, laplacian, **changes)
    return model, laplacian, (path, tensors, header) if resume else None


@torch.no_grad()
def start_embedding(model, path):
    """Give every token the direction of its row of a file (V, F), F = n_embd, and the length that it has on average
    anyway; one whose row is zero keeps its random vector."""
    if not path.exists():
        raise UserError(f'embedding_init = "domain" needs {path}: make it with `python data/embed.py {path.parent} --overwrite`')
    try:
        vectors = torch.from_numpy(np.load(path)).float()
        if not vectors.isfinite().all():
            raise ValueError("it holds NaN or infinity")
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): make it again with data/embed.py --overwrite") from None
    weight = model.embedding.weight
    if vectors.shape != weight.shape:
        raise UserError(f"{path} is {tuple(vectors.shape)}, but vocabulary and n_embd are {tuple(weight.shape)}: make it again "
                        f"with data/embed.py --dim={weight.size(1)} --overwrite")
    length = vectors.norm(dim=1, keepdim=True)
    weight.copy_(torch.where(length > 0, vectors * (INIT_STD * math.sqrt(weight.size(1)) / length.clamp_min(1e-30)), weight))


def check_length(settings, corpus, T):
    for split in ("train", "val"):
        if (length := len(getattr(corpus, split))) <= T:
            raise UserError(f"{settings.data_dir}/{split}.bin has {length} tokens, too few for one context: "
                            f"block_size = {T} needs {T + 1}")


def learning_rate(settings, step, scale):
    """Of the step after `step` finished ones; scale is the plateau rule's."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / (settings.warmup_steps + 1)
    if settings.lr_schedule == "cosine":
        done = min(1, (step - settings.warmup_steps) / (settings.lr_decay_steps - settings.warmup_steps))
        return settings.min_lr + (settings.learning_rate - settings.min_lr) * (1 + math.cos(math.pi * done)) / 2
    return settings.learning_rate * scale


def training_batch(corpus, settings, T, step, micro):
    """int64 (batch_size, T + 1), a function of (seed, step, micro) alone: the same for any number of processes, and
    after any resume."""
    if settings.sampling == "passes":
        windows = (len(corpus.train) - 1) // T
        first = (step * settings.grad_accum_steps + micro) * settings.batch_size
        starts = [T * window_order(settings.seed, number // windows, windows)[number % windows]
                  for number in range(first, first + settings.batch_size)]
    else:
        starts = np.random.default_rng([settings.seed, step, micro]).integers(0, len(corpus.train) - T, settings.batch_size)
    return corpus.batch(starts, T, "train")


@functools.lru_cache(maxsize=2)
def window_order(seed, number, windows):
    """The order of the windows in the pass of this number, (windows,)."""
    return np.random.default_rng([seed, number]).permutation(windows)


def validation_starts(corpus, settings, T):
    """The windows of every validation: eval_iters * batch_size of them, or as many as val.bin has."""
    count = min(settings.eval_iters * settings.batch_size, (len(corpus.val) - 1) // T)
    return np.linspace(0, len(corpus.val) - 1 - T, count).astype(int)


def to_device(batch, device):
    """(idx, targets), each (B, T), of a batch (B, T + 1)."""
    batch = torch.from_numpy(batch)
    if device.type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    else:
        batch = batch.to(device)
    return batch[:, :-1], batch[:, 1:]


def lines_until(path, step):
    """The text of a file of lines without those that a resume from `step` will write again."""
    lines = read_lines(path, step=int) if path.exists() else []
    return "".join(line for line, record in lines if record["step"] <= step)


def peak_mem_mb(device):
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_rss_mb()


def wandb_run(settings, state):
    import wandb
    try:
        return wandb.init(project=settings.wandb_project, name=settings.wandb_run_name or Path(settings.out_dir).name,
                          config=asdict(settings), dir=settings.out_dir, id=state.get("wandb_id"), resume="allow")
    except wandb.errors.Error as error:
        raise UserError(f"wandb cannot start ({error}): log in, or set WANDB_MODE=offline") from None


def finished(settings, state, model, corpus, seconds):
    """Add the line of a finished run to the settings' results file."""
    line = {"run": settings.out_dir, "config": config_hash(settings), "seed": settings.seed, "commit": commit(),
            "data": corpus.meta["sha256"][:12], "parameters": model.parameter_count(), "steps": state["step"],
            "tokens": state["tokens"], "seconds": round(seconds, 1), "best_loss": state["best_loss"],
            "bits_per_byte": corpus.bits_per_byte(state["best_loss"]), "settings": changed_settings(settings)}
    append_line(settings.results, line)


def profiled(path):
    """A started profiler of the third to fifth step, which writes its trace to `path`."""
    def write(profiler):
        with replacing(path) as temporary:
            profiler.export_chrome_trace(str(temporary))
        tqdm.write(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15), file=sys.stderr)
    profiler = torch.profiler.profile(schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1), on_trace_ready=write)
    profiler.start()
    return profiler


def heed_signals(asked):
    """From now on signals set asked["stop"] and asked["save"]."""
    first = math.inf

    def stop(number, frame):
        nonlocal first
        asked["stop"] = True
        now = time.monotonic()
        if now > first + 1:  # the same one may come twice, by the terminal or the scheduler and by torchrun
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        first = min(first, now)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGUSR1, lambda number, frame: asked.update(save=True))


@contextmanager
def memory_errors_named(settings):
    """Out of memory ends the run with one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        raise SystemExit(f"train.py: out of memory: lower batch_size = {settings.batch_size} (and raise grad_accum_steps = "
                         f"{settings.grad_accum_steps} in its place), or block_size = {settings.block_size} "
                         f"({str(error).splitlines()[0]})") from None


def kept_a_sequence(model, idx, targets):
    """Bytes that another sequence leaves for the backward pass: what two leave less what one does. idx, targets (1, T)."""
    def kept(sequences):
        sizes = {}

        def noted(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x
        with torch.autograd.graph.saved_tensors_hooks(noted, lambda x: x):
            loss = model(idx.repeat(sequences, 1), targets.repeat(sequences, 1))  # as long as it lives, so do they
        return sum(sizes.values())
    return kept(2) - kept(1)


def memory_needed(model, settings, sequence):
    """Bytes of a training step of which each sequence leaves so many: with weights, gradients, AdamW's two means and the logits, and
    a tenth more."""
    logits = 3 * max(LOSS_CHUNK, settings.batch_size * model.config.block_size / 32) * model.config.vocab_size
    weights = model.parameter_count() * (5 if settings.ema_decay else 4)
    return 1.1 * (4 * (weights + logits) + settings.batch_size * sequence)


def fitting(model, settings, sequence, gigabytes):
    """(batch_size, grad_accum_steps) for the same tokens a step with the greatest batch that memory_needed() lets in."""
    sequences = settings.batch_size * settings.grad_accum_steps
    for batch_size in range(sequences // WORLD, 0, -1):
        if sequences % (batch_size * WORLD) == 0 \
                and memory_needed(model, replace(settings, batch_size=batch_size), sequence) <= gigabytes * 2**30:
            return batch_size, sequences // batch_size
    return None


def main():
    settings, given = parse(__doc__)
    with memory_errors_named(settings):
        train(settings, given)
    processes.part()


def train(settings, given):
    master = RANK == 0
    only_looks = settings.eval_only or settings.dry_run
    asked = {"stop": False, "save": False}  # by signals, of this process
    if not only_looks:
        heed_signals(asked)
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

    # data, model: everything that can be the user's mistake is found before the output folder is touched
    corpus = Corpus(settings.data_dir)
    corpus.train = corpus.train[:math.ceil(len(corpus.train) * settings.train_fraction)]
    out_dir = Path(settings.out_dir)
    if settings.overwrite and settings.init_from in ("auto", "resume"):
        raise UserError(f"overwrite = True starts a run anew, init_from = {settings.init_from!r} goes on with it: leave one out")
    if (settings.init_from == "auto" or processes.RESTARTS) and checkpoint.steps(out_dir):
        settings.init_from = "resume"
    elif settings.init_from == "auto":
        settings.init_from = "scratch"
    torch.manual_seed(settings.seed)
    raw_model, laplacian, resumed = started_model(settings, given, corpus)
    config, T = raw_model.config, raw_model.config.block_size
    settings.tau_mode = config.tau_mode
    logs = out_dir / "metrics.jsonl", out_dir / "diagnostics.jsonl"
    held = [path for path in (*checkpoint.steps(out_dir), out_dir / "best.safetensors", *logs) if path.exists()]
    resume = resumed is not None
    if held and not (resume or settings.overwrite or only_looks):
        raise UserError(f"{out_dir} holds a run already ({', '.join(path.name for path in held)}): give "
                        + ("--init_from=resume, " if checkpoint.steps(out_dir) else "--init_from=scratch with ")
                        + "--overwrite=True, or another --out_dir")
    state = {"step": 0, "tokens": 0, "best_loss": math.inf, "stale": 0, "lr_scale": 1.0, "elapsed_s": 0.0, "loss_average": None, "bad": 0,
             "skipped": 0, "narrow": {}}
    if resume:
        state = resumed[2]["run"]
    past = [lines_until(path, state["step"]) for path in logs] if state["step"] and not only_looks else ("", "")
    if settings.eval_only and settings.init_from == "scratch":
        raise UserError("eval_only needs a trained model: give --init_from=resume or --init_from=OUT_DIR")

    # on to the devices
    processes.meet(device)
    model = processes.wrapped(raw_model, device, settings.shard, settings.compile)
    weights = list(raw_model.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [w for w in weights if w.ndim >= 2], "weight_decay": settings.weight_decay},
         {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0}],
        lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True)
    autocast = torch.autocast(device.type, dtype) if dtype is torch.bfloat16 else nullcontext()
    tokens_per_step = settings.grad_accum_steps * settings.batch_size * T
    windows = validation_starts(corpus, settings, T)
    micro_batches = range(RANK, settings.grad_accum_steps, WORLD)

    def step_batches():
        """The idx (B, T) of this process's batches of the step to come."""
        return (to_device(training_batch(corpus, settings, T, state["step"], micro), device)[0] for micro in micro_batches)

    if config.attention == "tau" and not (resume or settings.eval_only):
        with autocast:
            taumode.calibrate(raw_model, step_batches(), settings)
    ema = [weight.detach().clone() for weight in weights] if settings.ema_decay else None
    if resume and state["step"]:
        checkpoint.restore(raw_model, optimizer, ema, *resumed[:2])
    del resumed

    @contextmanager
    def averaged():
        """Inside it, the weights are their running mean, where there is one."""
        def swap():
            for weight, mean in zip(weights, ema or ()):
                held = weight.detach().clone()
                weight.data.copy_(mean)
                mean.copy_(held)
        swap()
        yield
        swap()

    @torch.no_grad()
    def validate():
        """(mean loss over the validation windows, nats a token; block 0's key energies on the first of them)."""
        total, E = 0.0, None
        for at in range(0, len(windows), WORLD * settings.batch_size):
            starts = windows[at + RANK * settings.batch_size:][:settings.batch_size]
            idx, targets = to_device(corpus.batch(starts if len(starts) else windows[:1], T, "val"), device)
            with autocast, raw_model.recording() as energies:
                total += raw_model(idx, targets).item() * len(starts)
            E = energies[0][1] if energies and E is None else E
        return summed([total], device)[0] / len(windows), E

    def validation_record():
        with averaged():
            loss, E = validate()
        record = {"step": state["step"], "tokens": state["tokens"], "split": "val", "loss": loss,
                  "perplexity": math.exp(min(loss, 700)), "bits_per_byte": corpus.bits_per_byte(loss)}
        if E is not None:
            percentiles = np.percentile(E.cpu().numpy(), (5, 50, 95))
            record |= {"tau": taumode.tau_of(raw_model)[0].median().item()}
            record |= dict(zip(("E_p05", "E_p50", "E_p95"), percentiles.tolist()))
        return record

    def shown(record):
        return (f"validation loss {record['loss']:.4f}, perplexity {record['perplexity']:.1f}, "
                f"bits per byte {record['bits_per_byte']:.3f}")

    batch_of = lambda step, micro: to_device(training_batch(corpus, settings, T, step, micro), device)
    ahead = {}

    def training_step():
        """One step: (loss, norm of the gradient, whether to stop, whether to save), the last two as signals to any
        process asked. The update is made unless the step is bad."""
        step = state["step"]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, state["lr_scale"])
        total = torch.zeros((), device=device)
        for micro in micro_batches:
            torch.manual_seed(np.random.SeedSequence([settings.seed, step, micro]).generate_state(1)[0].item())
            idx, targets = ahead.pop((step, micro), None) or batch_of(step, micro)
            with no_sync(model) if micro != micro_batches[-1] else nullcontext():
                with autocast:
                    loss = model(idx, targets) / len(micro_batches)  # the processes' gradients are averaged
                loss.backward()
            total += loss.detach()
        ahead[step + 1, micro_batches[0]] = batch_of(step + 1, micro_batches[0])  # while a GPU still computes
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(weights, settings.grad_clip or math.inf)).item()
        loss, to_stop, to_save = summed([total.item() / WORLD, asked["stop"], asked["save"]], device)
        asked["save"] = False
        average = loss if state["loss_average"] is None else state["loss_average"]
        if not math.isfinite(loss + grad_norm) or settings.spike and loss > average + settings.spike:
            state["bad"] += 1
            state["skipped"] += 1
            if state["bad"] > settings.skip_limit:
                stop(f"step {step + 1} is bad: loss {loss:.4g}, running mean {average:.4g}, norm of the gradient {grad_norm:.4g}")
        else:
            state["bad"], state["loss_average"] = 0, MEMORY * average + (1 - MEMORY) * loss
            optimizer.step()
            with torch.no_grad():
                for weight, mean in zip(weights, ema or ()):
                    mean.lerp_(weight, 1 - settings.ema_decay)
        optimizer.zero_grad(set_to_none=True)
        state["step"] += 1
        state["tokens"] += tokens_per_step
        return loss, grad_norm, to_stop, to_save

    def stop(what):
        good = checkpoint.steps(out_dir)
        raise SystemExit(f"train.py: {what}; " + (f"{good[0]} is the last good checkpoint; " if good and not only_looks else "")
                         + f"try a learning_rate lower than {settings.learning_rate}, or a skip_limit above "
                         f"{settings.skip_limit} (bad steps in a row that are left out)")

    if settings.eval_only:
        swapped = config.attention == "tau" and "laplacian" in given
        record = validation_record()
        if master:
            print(shown(record) + (", with tau as it was" if swapped else ""))
        if swapped:
            with autocast:
                taumode.calibrate(raw_model, step_batches(), settings)
            record = validation_record()
            if master:
                print(shown(record) + ", with tau measured on the energies of this Laplacian")
        return
    if state["step"] >= settings.max_steps and resume:
        if master:
            print(f"{out_dir} is at step {state['step']} already: nothing to do")
        return
    if settings.dry_run:
        with autocast:
            sequence = kept_a_sequence(raw_model, *(x[:1] for x in batch_of(state["step"], micro_batches[0])))
        if master:
            print(f"parameters       {raw_model.parameter_count():,}\n"
                  f"tokens           {tokens_per_step:,} a step, {tokens_per_step * settings.max_steps:,} in all\n"
                  f"memory           {memory_needed(raw_model, settings, sequence) / 2**30:.2f} GB on each device by counting\n"
                  f"batch            " + "; ".join(f"in {gigabytes} GB " + (
                      "batch_size = {} and grad_accum_steps = {}".format(*fits) if (fits := fitting(raw_model, settings, sequence, gigabytes))
                      else "not one sequence") for gigabytes in (24, 40, 80)), flush=True)
        training_step()
        begin = time.perf_counter()
        for _ in range(3):
            training_step()
        seconds = (time.perf_counter() - begin) / 3
        if master:
            left = settings.max_steps - (state["step"] - 4)
            print(f"peak             {peak_mem_mb(device) / 2**10:.2f} GB at most in these steps\n"
                  f"time             {seconds:.2f} s a step, {tokens_per_step / seconds:,.0f} tokens/s, "
                  f"{timedelta(seconds=round(seconds * left))} h for {left:,} steps, without validation")
        return

    # the output folder
    if master:
        with output_folder(out_dir):
            Path(settings.results).parent.mkdir(parents=True, exist_ok=True)
            open(settings.results, "a").close()  # a place that cannot be written to is found now
        try:
            fcntl.flock(os.open(out_dir, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        except BlockingIOError:
            raise UserError(f"another process trains in {out_dir}: wait for it, or give another --out_dir") from None
        wandb_log = wandb_run(settings, state) if settings.wandb_log else None
        if wandb_log is not None:
            state["wandb_id"] = wandb_log.id
        later = [path for path in checkpoint.steps(out_dir) if path > checkpoint.step_path(out_dir, state["step"])]
        for path in [*(later if resume else held), *out_dir.glob(".*.tmp")]:  # of a run that was killed
            path.unlink()
        for path, text in zip(logs, past):
            if text:
                with replacing(path) as temporary:
                    temporary.write_text(text)
            else:
                path.unlink(missing_ok=True)
        tau = taumode.tau_of(raw_model)
        print(f"{out_dir}: {raw_model.parameter_count() / 1e6:.2f} M parameters, {config.attention} attention"
              + (f" with tau = {tau[0].median().item():.4g} ({settings.tau_mode})" if tau is not None else "")
              + f", {tokens_per_step:,} tokens a step, on {WORLD} x {device.type}, {str(dtype).removeprefix('torch.')}")
    progress = tqdm(total=settings.max_steps, initial=state["step"], unit=" steps", disable=None if master else True,
                    dynamic_ncols=True)
    begin = time.perf_counter() - state["elapsed_s"]

    def log(record):
        if master:
            record = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                      for name, value in record.items()}
            record |= {"elapsed_s": time.perf_counter() - begin, "peak_mem_mb": peak_mem_mb(device)}
            with open(logs[0], "a") as file:
                file.write(json.dumps(record) + "\n")
            if wandb_log is not None:
                split = record["split"]
                wandb_log.log({f"{split}/{key}": value for key, value in record.items() if key != "split"},
                              step=record["step"])

    def save():
        """A checkpoint to resume from; of the older ones, keep_last - 1 stay."""
        tensors = checkpoint.snapshot(raw_model, optimizer if state["step"] else None, ema)
        if master:
            write(checkpoint.step_path(out_dir, state["step"]), tensors)
            for path in checkpoint.steps(out_dir)[settings.keep_last:]:
                path.unlink()

    def write(path, tensors):
        bad = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
        if bad:
            stop(f"{bad} at step {state['step']} is not finite")
        for log in logs:  # what the checkpoint counts on is on the disk before it
            if log.exists():
                with open(log, "r+b") as file:
                    os.fsync(file.fileno())
        state["elapsed_s"] = time.perf_counter() - begin
        checkpoint.write(path, tensors, laplacian, config, corpus.tokenizer.to_json(), state | {"settings": asdict(settings)})

    def evaluate():
        """Validate, log, keep the best; then the plateau rule, and the one of tau_mode = "gradient"."""
        record = validation_record()
        if not math.isfinite(record["loss"]):
            stop(f"the validation loss at step {state['step']} is not finite")
        log(record)
        if master:
            progress.write(f"step {state['step']:>5}: {shown(record)}")
        if record["loss"] < state["best_loss"]:
            state["best_loss"], state["stale"] = record["loss"], 0
            with averaged():
                tensors = checkpoint.snapshot(raw_model)
                if master:
                    write(out_dir / "best.safetensors", tensors)
            if settings.tau_mode == "gradient" and state["step"]:
                move_tau(taumode.follow)
        else:
            state["stale"] += 1
            if settings.lr_schedule == "plateau" and state["stale"] >= settings.plateau_patience:
                state["lr_scale"], state["stale"] = max(state["lr_scale"] / 2, LOWEST_SCALE), 0

    def move_tau(move):
        if config.attention == "tau":
            with autocast:
                move(raw_model, step_batches(), settings)

    def look():
        """A line of diagnostics.jsonl."""
        with autocast:
            record = diagnose(raw_model, to_device(corpus.batch(windows[:DIAGNOSED], T, "val"), device)[0])
        for line in collapses(record, state["narrow"]) if master else ():
            progress.write(f"step {state['step']:>5}: {line}")
        if master:
            with open(logs[1], "a") as file:
                file.write(json.dumps({"step": state["step"], "tokens": state["tokens"]} | record) + "\n")

    looks = settings.diag_interval and config.attention == "tau"
    profiler = profiled(out_dir / "profile.json") if settings.profile and master else None
    if state["step"] == 0:
        if not resume:
            save()
        if looks:
            look()
        evaluate()
    trained_s, trained_tokens = 0.0, 0
    to_stop = False
    while state["step"] < settings.max_steps and not to_stop:
        step_begin = time.perf_counter()
        loss, grad_norm, to_stop, to_save = training_step()
        step, last = state["step"], state["step"] == settings.max_steps
        trained_s, trained_tokens = trained_s + time.perf_counter() - step_begin, trained_tokens + tokens_per_step
        if step == 1 or step % settings.log_interval == 0:
            speed = trained_tokens / trained_s
            log({"step": step, "tokens": state["tokens"], "split": "train", "loss": loss,
                 "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm, "skipped": state["skipped"], "tokens_per_s": speed})
            trained_s, trained_tokens = 0.0, 0
            flops = speed * raw_model.flops_per_token()
            peak = next((peak for part, peak in PEAK_FLOPS.items()
                         if device.type == "cuda" and part in torch.cuda.get_device_name()), None)
            progress.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s, {flops / 1e9:,.0f} GFLOP/s"
                                     + (f", MFU {flops / WORLD / peak:.1%}" if peak else ""), refresh=False)
        progress.update()
        if settings.tau_mode == "adaptive" and step % settings.tau_interval == 0:
            move_tau(taumode.adapt)
        if looks and (step % settings.diag_interval == 0 or last):
            look()
        if step % settings.eval_interval == 0 or last:
            evaluate()
        if last and master:
            finished(settings, state, raw_model, corpus, time.perf_counter() - begin)
        if step % settings.checkpoint_interval == 0 or last or to_stop or to_save:
            save()
        if profiler is not None:
            profiler.step()

    if profiler is not None:
        profiler.stop()
    progress.close()
    if master:
        if wandb_log is not None:
            wandb_log.finish()
        print(f"{out_dir}: best validation loss {state['best_loss']:.4f}" if state["step"] == settings.max_steps else
              f"{out_dir}: stopped and saved at step {state['step']}: --init_from=resume goes on")


if __name__ == "__main__":
    run(main)
