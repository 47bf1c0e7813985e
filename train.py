"""Train a Tauformer, or its dot-product twin.

    python train.py configs/quickstart.toml --learning_rate=1e-3
    torchrun --nproc_per_node=8 train.py configs/tau_30m.toml

Writes metrics.jsonl, last.safetensors and best.safetensors to out/NAME, NAME being the config's."""

import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
from build_laplacian import load_laplacian
from common import UserError, choose_device, peak_rss_mb, replacing, run
from config import parse
from data.corpus import Corpus
from model import ModelConfig, Tauformer

PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
              "4090": 165e12, "3090": 71e12}  # dense bfloat16, by a part of the device's name
LOWEST_SCALE = 0.03125  # of the plateau rule: 5 halvings, the published run's last
REPLACED = ("last.safetensors", "best.safetensors", "metrics.jsonl")


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
                        f"--out={settings.laplacian}`")
    return torch.from_numpy(load_laplacian(settings.laplacian))


def started_model(settings, given, corpus):
    """(model, laplacian, tensors, state): the model to start with; of a resumed run, also its checkpoint's tensors
    and the state of the script."""
    names = [f.name for f in fields(ModelConfig) if f.name != "vocab_size"]
    if settings.init_from == "scratch":
        laplacian = domain_laplacian(settings)
        config = ModelConfig(vocab_size=corpus.vocab_size, **{name: getattr(settings, name) for name in names})
        check_length(settings, corpus, config.block_size)
        try:
            return Tauformer(config, laplacian), laplacian, None, None
        except (RuntimeError, MemoryError) as error:
            raise UserError(f"the model does not fit into memory: lower n_layer = {config.n_layer} or n_embd = "
                            f"{config.n_embd} ({str(error).splitlines()[0]})") from None

    resume = settings.init_from == "resume"
    path = Path(settings.out_dir) / "last.safetensors" if resume else checkpoint.find(settings.init_from)
    if resume and not path.exists():
        raise UserError(f"nothing to resume: {path} does not exist; start with --init_from=scratch")
    tensors, header = checkpoint.read(path)
    if header["tokenizer"] != corpus.tokenizer.to_json():
        raise UserError(f"the vocabulary of {settings.data_dir} ({corpus.vocab_size} tokens) is not the one of {path} "
                        f"({header['config'].get('vocab_size')}): prepare the text with --tokenizer={path.parent}")
    changes = {}
    for name in sorted(given.intersection(names)):
        ours, theirs = getattr(settings, name), header["config"].get(name)
        if name in ("block_size", "dropout"):
            changes[name] = ours
        elif ours != theirs and not (name == "n_kv_head" and ours == 0):
            raise UserError(f"{name} = {ours!r}, but {path} has {theirs!r}: leave it out")
    laplacian = own = tensors.get("laplacian")
    if "laplacian" in given and own is not None and (os.path.exists(settings.laplacian) or not resume or settings.eval_only):
        laplacian = domain_laplacian(settings)
        if resume and not settings.eval_only and not torch.equal(laplacian, own):
            raise UserError(f"{settings.laplacian} is not the Laplacian of the run in {settings.out_dir}: leave it out, "
                            f"or start a run from this one with --init_from={settings.out_dir} --out_dir=OTHER")
    check_length(settings, corpus, changes.get("block_size", header["config"].get("block_size", 0)))
    model = checkpoint.build_model(tensors, header, path, laplacian, **changes)
    return model, laplacian, *((tensors, header["run"]) if resume else (None, None))


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
    starts = np.random.default_rng([settings.seed, step, micro]).integers(0, len(corpus.train) - T, settings.batch_size)
    return corpus.batch(starts, T, "train")


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


def metrics_until(path, step):
    """The text of metrics.jsonl without the lines that a resume from `step` will write again."""
    kept = []
    try:
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}, line {len(kept) + 1} is damaged ({type(error).__name__}: {error}): mend or remove "
                        "it") from None
    return "".join(kept)


def peak_mem_mb(device):
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_rss_mb()


def wandb_run(settings, state):
    import wandb
    try:
        return wandb.init(project=settings.wandb_project, name=settings.wandb_run_name or Path(settings.out_dir).name,
                          config=asdict(settings), dir=settings.out_dir, id=state.get("wandb_id"), resume="allow")
    except wandb.errors.Error as error:
        raise UserError(f"wandb cannot start ({error}): log in, or set WANDB_MODE=offline") from None


def main():
    settings, given = parse(__doc__)

    # processes: one, or those that torchrun started
    rank, local_rank, world = (int(os.environ.get(name, default))
                               for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    master = rank == 0
    device = choose_device(settings.device, local_rank)
    dtype = choose_dtype(settings.dtype, device)
    if settings.grad_accum_steps % world:
        raise UserError(f"grad_accum_steps = {settings.grad_accum_steps} must be a multiple of {world} processes")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # tf32 where the device has it

    # data, model: everything that can be the user's mistake is found before the output folder is touched
    corpus = Corpus(settings.data_dir)
    torch.manual_seed(settings.seed)
    raw_model, laplacian, tensors, state = started_model(settings, given, corpus)
    T = raw_model.config.block_size
    out_dir = Path(settings.out_dir)
    metrics_path = out_dir / "metrics.jsonl"
    resume = state is not None
    held = [name for name in REPLACED if (out_dir / name).exists()]
    if held and not (resume or settings.overwrite or settings.eval_only):
        raise UserError(f"{out_dir} holds a run already ({', '.join(held)}): give --init_from=resume, "
                        "--overwrite=True, or another --out_dir")
    past = metrics_until(metrics_path, state["step"]) if resume and not settings.eval_only else ""
    if settings.eval_only and settings.init_from == "scratch":
        raise UserError("eval_only needs a trained model: give --init_from=resume or --init_from=OUT_DIR")

    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    raw_model.to(device)
    model = torch.compile(raw_model) if settings.compile else raw_model
    if world > 1:
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    if raw_model.tau is not None and not (resume or settings.eval_only):
        raw_model.calibrate_tau(to_device(training_batch(corpus, settings, T, 0, 0), device)[0])
    weights = list(raw_model.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [w for w in weights if w.ndim >= 2], "weight_decay": settings.weight_decay},
         {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0}],
        lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True)
    if resume:
        checkpoint.restore_optimizer(optimizer, raw_model, tensors, out_dir / "last.safetensors")
    state = state or {"step": 0, "best_loss": math.inf, "stale": 0, "lr_scale": 1.0, "elapsed_s": 0.0}
    del tensors

    autocast = torch.autocast(device.type, dtype) if dtype is torch.bfloat16 else nullcontext()
    tokens_per_step = settings.grad_accum_steps * settings.batch_size * T
    windows = validation_starts(corpus, settings, T)
    micro_batches = range(rank, settings.grad_accum_steps, world)

    def summed(value):
        """The sum over all processes of a number."""
        if world > 1:
            value = torch.tensor(value, dtype=torch.float64, device=device)
            dist.all_reduce(value)
            value = value.item()
        return value

    @torch.no_grad()
    def validate():
        """The mean loss over the validation windows, nats a token."""
        raw_model.eval()
        total = 0.0
        for at in range(rank * settings.batch_size, len(windows), world * settings.batch_size):
            starts = windows[at:at + settings.batch_size]
            with autocast:
                total += raw_model(*to_device(corpus.batch(starts, T, "val"), device)).item() * len(starts)
        raw_model.train()
        return summed(total) / len(windows)

    def validation_record():
        loss = validate()
        record = {"step": state["step"], "tokens": state["step"] * tokens_per_step, "split": "val", "loss": loss,
                  "perplexity": math.exp(min(loss, 700)), "bits_per_byte": corpus.bits_per_byte(loss)}
        if raw_model.tau is not None:
            E = raw_model.key_energies(to_device(corpus.batch(windows[:settings.batch_size], T, "val"), device)[0])
            percentiles = np.percentile(E.cpu().numpy(), (5, 50, 95))
            record |= {"tau": raw_model.tau.item()} | dict(zip(("E_p05", "E_p50", "E_p95"), percentiles.tolist()))
        return record

    def shown(record):
        return (f"validation loss {record['loss']:.4f}, perplexity {record['perplexity']:.1f}, "
                f"bits per byte {record['bits_per_byte']:.3f}")

    if settings.eval_only:
        record = validation_record()
        if master:
            print(shown(record))
        return
    if state["step"] >= settings.max_steps and resume:
        if master:
            print(f"{out_dir} is at step {state['step']} already: nothing to do")
        return

    if master:
        out_dir.mkdir(parents=True, exist_ok=True)
        wandb_log = wandb_run(settings, state) if settings.wandb_log else None
        if wandb_log is not None:
            state["wandb_id"] = wandb_log.id
        if resume:
            with replacing(metrics_path) as temporary:
                temporary.write_text(past)
        else:
            for name in held:
                (out_dir / name).unlink()
        print(f"{out_dir}: {raw_model.parameter_count() / 1e6:.2f} M parameters, {raw_model.config.attention} attention"
              + (f" with tau = {raw_model.tau.item():.4g}" if raw_model.tau is not None else "")
              + f", {tokens_per_step:,} tokens a step, on {world} x {device.type}, {str(dtype).removeprefix('torch.')}")
    progress = tqdm(total=settings.max_steps, initial=state["step"], unit=" steps", disable=None if master else True,
                    dynamic_ncols=True)
    begin = time.perf_counter() - state["elapsed_s"]

    def log(record):
        if not master:
            return
        record |= {"elapsed_s": time.perf_counter() - begin, "peak_mem_mb": peak_mem_mb(device)}
        with open(metrics_path, "a") as file:
            file.write(json.dumps(record) + "\n")
        if wandb_log is not None:
            split = record["split"]
            wandb_log.log({f"{split}/{key}": value for key, value in record.items() if key != "split"},
                          step=record["step"])

    def stop_unless_finite(good, what):
        if not good:
            last = out_dir / "last.safetensors"
            raise SystemExit(f"train.py: {what} at step {state['step']} is not finite: "
                             + (f"{last} is the last good checkpoint; " if last.exists() else "")
                             + f"try a learning_rate lower than {settings.learning_rate}")

    def save(name, with_optimizer):
        stop_unless_finite(all(weight.isfinite().all() for weight in weights), "a weight")
        if master:
            state["elapsed_s"] = time.perf_counter() - begin
            checkpoint.write(out_dir / name, raw_model, laplacian, corpus.tokenizer.to_json(),
                             {**state, "settings": asdict(settings)}, optimizer if with_optimizer else None)

    def evaluate():
        """Validate, log, keep the best, and apply the plateau rule."""
        record = validation_record()
        stop_unless_finite(math.isfinite(record["loss"]), "the validation loss")
        log(record)
        if master:
            progress.write(f"step {state['step']:>5}: {shown(record)}")
        if record["loss"] < state["best_loss"]:
            state["best_loss"], state["stale"] = record["loss"], 0
            save("best.safetensors", with_optimizer=False)
        else:
            state["stale"] += 1
            if settings.lr_schedule == "plateau" and state["stale"] >= settings.plateau_patience:
                state["lr_scale"], state["stale"] = max(state["lr_scale"] / 2, LOWEST_SCALE), 0

    if not resume:
        evaluate()
    trained_s, trained_tokens = 0.0, 0
    while state["step"] < settings.max_steps:
        step_begin = time.perf_counter()
        lr = learning_rate(settings, state["step"], state["lr_scale"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=device)
        for micro in micro_batches:
            torch.manual_seed(np.random.SeedSequence([settings.seed, state["step"], micro]).generate_state(1)[0].item())
            idx, targets = to_device(training_batch(corpus, settings, T, state["step"], micro), device)
            with model.no_sync() if world > 1 and micro != micro_batches[-1] else nullcontext():
                with autocast:
                    loss = model(idx, targets) / len(micro_batches)  # the processes' gradients are averaged
                loss.backward()
            total += loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(weights, settings.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["step"] += 1
        step, last = state["step"], state["step"] == settings.max_steps
        trained_tokens += tokens_per_step

        logged = step == 1 or step % settings.log_interval == 0
        if logged:
            loss = summed(total.item()) / world
            stop_unless_finite(math.isfinite(loss), "the loss")
        trained_s += time.perf_counter() - step_begin
        if logged:
            speed = trained_tokens / trained_s
            log({"step": step, "tokens": step * tokens_per_step, "split": "train", "loss": loss, "lr": lr,
                 "grad_norm": grad_norm.item(), "tokens_per_s": speed})
            trained_s, trained_tokens = 0.0, 0
            flops = speed * raw_model.flops_per_token()
            peak = next((peak for part, peak in PEAK_FLOPS.items()
                         if device.type == "cuda" and part in torch.cuda.get_device_name()), None)
            progress.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s, {flops / 1e9:,.0f} GFLOP/s"
                                     + (f", MFU {flops / world / peak:.1%}" if peak else ""), refresh=False)
        progress.update()
        if step % settings.eval_interval == 0 or last:
            evaluate()
        if step % settings.checkpoint_interval == 0 or last:
            save("last.safetensors", with_optimizer=True)

    progress.close()
    if master:
        if wandb_log is not None:
            wandb_log.finish()
        print(f"{out_dir}: best validation loss {state['best_loss']:.4f}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
