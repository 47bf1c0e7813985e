"""Does attention find what lies far back? Small models learn four tasks, and their accuracy is taken at each length.

    python studies/long_memory.py configs/shakespeare_char_tau.toml configs/shakespeare_char_dot.toml
    python studies/long_memory.py --results=results/long_memory.jsonl --figure=FILE.png       of results that are there, and their table

copy       up to 16 of the tokens are letters, the others blank; after a mark the letters are to be repeated in their order
recall     pairs of key and value; then some of the keys come again, and each is to be followed by its value
needle     one marked letter among many others; the mark comes again, and is to be followed by that letter
induction  random tokens; then some that occurred once before come again, and each is to be followed by what followed it then

(The paper's author timed the model on these tasks; here they are learned.) A config gives the attention: all its model settings but
the size, which is 2 layers of width 64; the graph is a chain. Training draws fresh sequences of 16 to 128 tokens; the tests, whose
sequences are fresh too, go to 2,048. tau is the median energy of the first batch, as in train.py. RESULTS gets one line per task,
config and seed; those that it has already are not run again."""

import math
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Parser, UserError, append_line, check_place, commit, read_lines, replacing, run  # isort: skip, for it tells of packages that are missing
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.laplacian import laplacian_of
from model import ModelConfig, Tauformer
from training import optim, taumode
from training.config import Settings, changed_settings, read_settings

LETTERS = 32  # tokens 0 .. 31
BLANK, MARK = 32, 33
SIZE = dict(block_size=2048, vocab_size=34, n_layer=2, n_embd=64, softcap=0.0)
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)  # of a sequence; those above TRAINED are longer than any trained on
LEAST_LENGTHS = 6  # earlier results have these alone
TRAINED = 128


def copy(draw, B, T):
    n = min(16, T // 4)
    letters = draw.integers(LETTERS, size=(B, n))
    idx = np.full((B, T - n), BLANK)
    places = np.sort(draw.permuted(np.tile(np.arange(T - n - 1), (B, 1)), axis=1)[:, :n], axis=1)
    np.put_along_axis(idx, places, letters, 1)
    idx[:, -1] = MARK
    return np.concatenate([idx, letters], 1), np.arange(T - n, T)


def recall(draw, B, T):
    n = min(T // 4, LETTERS // 2)  # pairs, whose keys are the first half of the letters
    keys = draw.permuted(np.tile(np.arange(LETTERS // 2), (B, 1)), axis=1)[:, :n]
    values = draw.integers(LETTERS // 2, LETTERS, size=(B, n))
    pairs = np.stack([keys, values], 2)
    asked = np.take_along_axis(pairs, draw.permuted(np.tile(np.arange(n), (B, 1)), axis=1)[:, : min(n, 4), None], 1)
    idx = np.concatenate([pairs.reshape(B, -1), np.full((B, T - 2 * n - 2 * asked.shape[1]), BLANK), asked.reshape(B, -1)], 1)
    return idx, np.arange(T - 2 * asked.shape[1] + 1, T, 2)


def needle(draw, B, T):
    idx = draw.integers(LETTERS, size=(B, T))
    place = draw.integers(T - 3, size=(B, 1))
    np.put_along_axis(idx, place, MARK, 1)
    idx[:, -2] = MARK
    idx[:, -1:] = np.take_along_axis(idx, place + 1, 1)
    return idx, np.array([T - 1])


def induction(draw, B, T):
    n = min(4, T // 16)
    letters = draw.permuted(np.tile(np.arange(LETTERS), (B, 1)), axis=1)
    rare, common = letters[:, :n], letters[:, n:]  # the tokens that come back, and the others
    idx = np.take_along_axis(common, draw.integers(LETTERS - n, size=(B, T)), 1)
    places = 2 * draw.permuted(np.tile(np.arange(T // 2 - n), (B, 1)), axis=1)[:, :n]
    np.put_along_axis(idx, places, rare, 1)
    idx[:, -2 * n :: 2] = rare
    idx[:, 1 - 2 * n :: 2] = np.take_along_axis(idx, places + 1, 1)
    return idx, np.arange(T - 2 * n + 1, T, 2)


TASKS = {task.__name__: task for task in (copy, recall, needle, induction)}


def answers(model, idx, places):
    """(logits (B, n, V), right tokens (B, n)) at the n places of a batch idx (B, T) that are to be predicted."""
    idx = torch.from_numpy(idx)
    x = model(idx[:, :-1], head=False)[:, places - 1]
    return model.head(x), idx[:, places]


def learn(config, task, seed, steps, batch_size, learning_rate):
    """Train a model of `config` on a task; returns its accuracies, {length: share of right answers}."""
    torch.manual_seed(seed)
    D = config.head_size
    chain = laplacian_of(np.diag(np.ones(D - 1), 1) + np.diag(np.ones(D - 1), -1))
    model = Tauformer(config, torch.from_numpy(chain) if config.attention == "tau" else None)
    batch = lambda draw: task(draw, batch_size, int(draw.integers(16, TRAINED + 1)))
    if config.attention == "tau":
        idx, _ = batch(np.random.default_rng(seed))  # the first of the training
        taumode.calibrate(model, [torch.from_numpy(idx)], Settings(tau_mode=config.tau_mode))
    draw = np.random.default_rng(seed)
    optimizer = optim.adamw(model, learning_rate, (0.9, 0.99), weight_decay=0.0)
    for step in (progress := tqdm(range(steps), unit=" steps", dynamic_ncols=True, disable=None, leave=False)):
        optim.set_learning_rate(optimizer, learning_rate * min(1, (step + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * step / steps)))
        logits, right = answers(model, *batch(draw))
        loss = F.cross_entropy(logits.flatten(0, 1), right.flatten())
        optimizer.zero_grad()
        loss.backward()
        optim.clip_gradients(model, 1.0)
        optimizer.step()
        if step % 10 == 0:
            progress.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    model.eval()
    accuracy = {}
    with torch.no_grad():
        for T in LENGTHS:
            draw = np.random.default_rng([seed, T])
            B = 32 if T <= 512 else 8
            batches = (task(draw, B, T) for _ in range(256 // B))
            right = [(logits.argmax(-1) == right).float().mean().item() for logits, right in (answers(model, *batch) for batch in batches)]
            accuracy[T] = sum(right) / len(right)
    return accuracy


def attention_of(path):
    """The ModelConfig of a file of settings, but with SIZE."""
    names = {f.name for f in fields(ModelConfig)} - {"dropout", "n_kv_head", *SIZE}
    return ModelConfig(**SIZE, **{name: value for name, value in read_settings(path).items() if name in names})


def read_results(path):
    """The records in a file of results; none if there is no file. Raises UserError for a damaged one."""
    records = (
        [
            record
            for _, record in read_lines(path, task=str, form=str, seed=int, accuracy=dict, steps=int, batch_size=int, learning_rate=float)
        ]
        if path.exists()
        else []
    )
    for record in records:
        shares = [record["accuracy"].get(str(T)) for T in LENGTHS]
        there = [share for share in shares if share is not None]
        if shares[: len(there)] != there or len(there) < LEAST_LENGTHS or not all(isinstance(x, float) and 0 <= x <= 1 for x in there):
            which = f"{record['form']}, {record['task']}, seed {record['seed']}"
            raise UserError(f"{path} is damaged: the accuracy of {which} lacks a length or is no share")
    return records


def table(records):
    """Markdown: the mean accuracy over the seeds, and in brackets the lowest."""
    groups = {}
    for record in records:
        groups.setdefault((record["task"], record["form"]), []).append(record["accuracy"])
    lines = ["| task | attention | " + " | ".join(f"{T} tokens" for T in LENGTHS) + " | seeds |", "| " + "--- | " * (len(LENGTHS) + 3)]
    for (task, form), runs in groups.items():
        at = [[accuracy[str(T)] for accuracy in runs if str(T) in accuracy] for T in LENGTHS]
        lines.append(
            f"| {task} | {form} | "
            + " | ".join(f"{sum(shares) / len(shares):.3f} ({min(shares):.3f})" if shares else "-" for shares in at)
            + f" | {len(runs)} |"
        )
    return "\n".join(lines)


def draw_accuracies(records, path):
    """A panel per task: the mean over the seeds against the length, and the range as a band."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    tasks, forms = (list(dict.fromkeys(record[name] for record in records)) for name in ("task", "form"))
    figure, axes = plt.subplots(1, len(tasks), figsize=(1 + 3.5 * len(tasks), 3.5), sharey=True, squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks):
        for number, form in enumerate(forms):
            at = np.array(
                [
                    [record["accuracy"].get(str(T), np.nan) for T in LENGTHS]
                    for record in records
                    if (record["task"], record["form"]) == (task, form)
                ]
            )
            if len(at):
                axis.plot(LENGTHS, at.mean(0), marker=".", color=f"C{number}", label=form)
                axis.fill_between(LENGTHS, at.min(0), at.max(0), color=f"C{number}", alpha=0.2)
        axis.axvline(TRAINED, color="grey", linestyle=":")
        axis.set(title=task, xlabel="tokens", xscale="log", xticks=LENGTHS, xticklabels=LENGTHS)
        axis.minorticks_off()
    axes[0, 0].set(ylabel="accuracy")
    axes[0, 0].legend(fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main():
    options = Parser(__doc__)
    options.add_argument("configs", nargs="*", type=Path, metavar="CONFIG.toml", help="models to train (none: show the results)")
    options.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: all)")
    options.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="SEED", help="(default: 1 2 3)")
    options.add_argument("--steps", type=int, default=2000, help="of training (default: %(default)s)")
    options.add_argument("--batch_size", type=int, default=32, help="(default: %(default)s)")
    options.add_argument("--learning_rate", type=float, default=3e-3, help="(default: %(default)s)")
    options.add_argument(
        "--results",
        type=Path,
        default=Path("results/my_long_memory.jsonl"),
        metavar="RESULTS.jsonl",
        help="file to which each run adds a line, and which is shown (default: %(default)s)",
    )
    options.add_argument("--figure", type=Path, metavar="FILE.png", help="draw them")
    options.add_argument("--overwrite", action="store_true", help="replace a figure that is there already")
    args = options.parse_args()
    if min(args.steps, args.batch_size) < 1 or not 0 < args.learning_rate < math.inf:
        raise UserError("--steps, --batch_size and --learning_rate must be positive")
    if not all(0 <= seed < 2**31 for seed in args.seeds):
        raise UserError(f"--seeds={' '.join(map(str, args.seeds))}: they must be 0 or more and below 2^31")
    if args.figure:
        check_place(args.figure, ".png", args.overwrite, "--figure")
    forms = {path.stem: attention_of(path) for path in args.configs}
    if len(forms) < len(args.configs):
        raise UserError("two of these configs have the same name, by which the results tell them apart: rename one")
    training = {name: getattr(args, name) for name in ("steps", "batch_size", "learning_rate")}
    if forms:
        open(args.results, "a").close()  # a place that cannot be written to is found now
        for record in read_results(args.results):
            if (other := {name: record[name] for name in training}) != training:
                raise UserError(f"{args.results} has runs of {other}, not {training}: give another --results")
            if record["form"] in forms and "settings" in record:
                if (other := record["settings"]) != (ours := changed_settings(forms[record["form"]])):
                    raise UserError(f"{args.results} has runs of {record['form']} with {other}, not {ours}: give another --results")
    there = {(record["task"], record["form"], record["seed"]) for record in read_results(args.results)}
    for seed in args.seeds:
        for task in args.tasks:
            for form, config in forms.items():
                if (task, form, seed) in there:
                    continue
                accuracy = learn(config, TASKS[task], seed, args.steps, args.batch_size, args.learning_rate)
                append_line(
                    args.results,
                    {"task": task, "form": form, "seed": seed, "accuracy": accuracy}
                    | training
                    | {"settings": changed_settings(config), "commit": commit()},
                )
                print(f"{task}, {form}, seed {seed}: " + ", ".join(f"{share:.3f} at {T}" for T, share in accuracy.items()), flush=True)
    records = read_results(args.results)
    if not records:
        raise UserError(f"no results in {args.results}: give configs to train")
    print(table(records))
    if args.figure:
        draw_accuracies(records, args.figure)


if __name__ == "__main__":
    run(main)
