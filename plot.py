"""Draw runs: their loss curves, energy percentiles, and the Laplacian of the first that has one.

    python plot.py out/quickstart
    python plot.py out/shakespeare_char_tau out/shakespeare_char_dot --out=pair.png
    python plot.py data/python_docs/laplacian.parquet --out=laplacian.png
    python plot.py out/tau_30m results/published_30m --out=beside_the_published.png --max_loss=5

--idea=TEXT draws where the tokens of a text lie on the line of lambdas, in one head of a trained model, and the softmax weight of each.
--bands draws, for one run, how widely the lambdas of each head's keys spread over time, layer by layer.
Without --out the figure goes into the first OUT_DIR, and one that plot.py has drawn there before is drawn again."""

from functools import partial
from pathlib import Path

from common import Parser, UserError, check_place, read_lines, replacing, run, waiting  # isort: skip, for it tells of packages that are missing

with waiting("importing matplotlib"):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
import numpy as np

from data import tokenizer as tokenizers
from data.laplacian import load_laplacian

ENERGIES = ("E_p05", "E_p50", "E_p95", "tau")
MAY_LACK = ("loss", "elapsed_s", *ENERGIES)  # fields of metrics.jsonl: a loss that is not finite is null, a published run has no seconds
SOFTWARE = "tauformer plot.py"  # by which a figure tells that it may be drawn again


def read_metrics(folder):
    """{"train": records, "val": records} of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    records = [record for _, record in read_lines(path, split=str, tokens=int, **dict.fromkeys(MAY_LACK, int | float | None))]
    metrics = {split: [record for record in records if record["split"] == split] for split in ("train", "val")}
    if not metrics["val"]:
        raise UserError(f"{path} has no validation loss yet")
    return metrics


def draw_losses(axis, runs, key, label, max_loss):
    for number, (name, metrics) in enumerate(runs.items()):
        lone = dict(marker="x", linestyle="none")  # for a run of which only some validations are known
        for split, style in (("train", dict(alpha=0.35, linewidth=1)), ("val", dict(marker=".") if metrics["train"] else lone)):
            points = [(record[key], record.get("loss")) for record in metrics[split] if record.get(key) is not None]
            if points:
                axis.plot(*zip(*points), color=f"C{number}", label=name if split == "val" else None, **style)
    axis.set(xlabel=label, ylabel="loss, nats a token", title=f"validation loss against {label} (faint: of training)")
    axis.set_ylim(top=max_loss)
    axis.legend(fontsize="small")


def has_energies(record):
    return all(record.get(name) is not None for name in ENERGIES)


def draw_energies(axis, runs):
    for number, (name, metrics) in enumerate(runs.items()):
        points = [[record[key] for key in ("tokens", *ENERGIES)] for record in metrics["val"] if has_energies(record)]
        if points:
            tokens, low, median, high, tau = zip(*points)
            axis.fill_between(tokens, low, high, color=f"C{number}", alpha=0.2)
            axis.plot(tokens, median, color=f"C{number}", label=name)
            axis.plot(tokens, tau, color=f"C{number}", linestyle=":")
    axis.set(xlabel="tokens", ylabel="E", title="energies of block 0's keys: p05 to p95, median (dotted: tau)")
    axis.legend(fontsize="small")


def read_diagnostics(folder):
    """(tokens (N,), lambda_k (N, layers, heads, 3)) of a run's diagnostics.jsonl."""
    path = folder / "diagnostics.jsonl"
    if not path.exists():
        raise UserError(f"{path} does not exist: train.py writes it for tau attention, with diag_interval above 0")
    try:
        records = [record for _, record in read_lines(path, tokens=int, lambda_k=list)]
        tokens, lambdas = (np.array([record[name] for record in records], float) for name in ("tokens", "lambda_k"))
        if lambdas.ndim != 4 or lambdas.shape[3] != 3:
            raise ValueError("lambda_k must hold three percentiles for each layer and head")
        return tokens, lambdas
    except UserError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from None


def draw_bands(axis, layer, tokens, lambdas):
    """lambdas: (N, heads, 3)."""
    for head, (low, median, high) in enumerate(lambdas.transpose(1, 2, 0)):
        axis.fill_between(tokens, low, high, color=f"C{head}", alpha=0.15)
        axis.plot(tokens, median, color=f"C{head}", label=f"key head {head}")
    axis.set(xlabel="tokens", ylabel="lambda", ylim=(0, 1), title=f"layer {layer}: lambdas of keys, p05, p50, p95")
    axis.legend(fontsize="small")


def draw_spectra(axis, L, heads):
    """Eigenvalues of L (F, F) and of the Laplacians (D, D) of heads."""
    axis.plot(np.linalg.eigvalsh(L), label=f"L, F = {len(L)}")
    for number, head in enumerate(heads):
        axis.plot(np.linalg.eigvalsh(head), alpha=0.7, linewidth=1, label=f"key head {number}")
    axis.set(xlabel="eigenvector", ylabel="eigenvalue", title="spectrum of the Laplacian")
    axis.legend(fontsize="small")


def draw_adjacency(axis, L):
    order = np.linalg.eigh(L)[1][:, 1].argsort()  # by the Fiedler vector: neighbours in the graph stand together
    weights = (np.diag(np.diag(L)) - L)[order][:, order]
    image = axis.imshow(weights, cmap="magma", interpolation="nearest")
    axis.set(xlabel="feature, in Fiedler order", ylabel="feature, in Fiedler order", title="adjacency: edge weights")
    axis.figure.colorbar(image, ax=axis, shrink=0.8)


def draw_degrees(axis, L):
    axis.hist((L != 0).sum(1) - 1, bins=30)
    axis.set(xlabel="edges of a feature", ylabel="features", title="degrees")


def laplacian_panels(L, heads):
    return [partial(draw_spectra, L=L, heads=heads), partial(draw_adjacency, L=L), partial(draw_degrees, L=L)]


def overview(sources, folders, max_loss, n_head):
    """The panels of the usual figure, functions of an axis. n_head: into how many heads to divide a Laplacian read from a file."""
    import torch  # here, and in idea(), because it takes seconds: a mistake in the command line is answered at once

    from model import head_laplacians, kron_reduction
    from training import checkpoint

    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = map(str, folders)
    runs, L, heads = {name: read_metrics(folder) for name, folder in zip(names, folders)}, None, []
    for source in sources:
        if L is None and source.suffix == ".parquet":
            L = torch.from_numpy(load_laplacian(source))
            if n_head is not None and (n_head < 1 or len(L) % n_head or n_head == len(L)):
                raise UserError(f"--n_head={n_head} must divide the {len(L)} features into heads of two or more")
            D = len(L) // n_head if n_head else None
            heads = [kron_reduction(L, slice(at, at + D)) for at in range(0, len(L), D)] if D else []
        elif L is None and any(source.glob("*.safetensors")):
            path = checkpoint.find(source)
            tensors, header = checkpoint.read(path)
            L, model = tensors.get("laplacian"), checkpoint.build_model(tensors, header, path)
            heads = head_laplacians(L, model.config) if L is not None and len(L) == model.config.n_embd else []
    panels = [
        partial(draw_losses, runs=runs, key=key, label=label, max_loss=max_loss)
        for key, label in (("tokens", "tokens"), ("elapsed_s", "seconds"))
        if runs
    ]
    if any(has_energies(record) for metrics in runs.values() for record in metrics["val"]):
        panels.append(partial(draw_energies, runs=runs))
    if L is not None:
        panels += laplacian_panels(L.numpy(), [head.numpy() for head in heads])
    return panels


def idea(folder, text, layer, head):
    """The panel of one head: where the last token's query and all keys of a text lie on the line of lambdas, and the softmax weights."""
    import torch

    from ops.attention import attention_weights
    from training import checkpoint

    path = checkpoint.find(folder)
    tensors, header = checkpoint.read(path)
    model, tokenizer = checkpoint.build_model(tensors, header, path), tokenizers.from_json(header["tokenizer"])
    config, tokens = model.config, tokenizer.encode(text)
    heads = config.n_head - config.local_heads
    if config.attention != "tau":
        raise UserError(f"--idea={text!r} is for tau attention; {folder} has {config.attention}")
    if not (0 <= layer < config.n_layer and 0 <= head < heads):
        raise UserError(
            f"--layer={layer} --head={head}: {folder} has the layers 0 to {config.n_layer - 1} and the tau heads 0 to {heads - 1}"
        )
    if not 2 <= len(tokens) <= config.block_size:
        raise UserError(f"--idea={text!r} has {len(tokens)} tokens; 2 to {config.block_size} can be drawn")
    with torch.no_grad(), model.recording() as seen:
        model(torch.tensor([tokens]), head=False)
        at = seen[layer]
        weights = attention_weights(at.lambda_q, at.lambda_k, at.temperature, at.log_decay, at.key_bias, at.sink)[0, head, -1]
    temperature = at.temperature.expand(heads)[head].item() if torch.is_tensor(at.temperature) else at.temperature
    names = [tokenizer.decode_bytes([token]).decode(errors="replace").strip().replace("$", r"\$") or "_" for token in tokens]
    lambda_q, lambda_k = at.lambda_q[0, head, -1].item(), at.lambda_k[0, head * at.lambda_k.size(1) // heads].numpy()
    return partial(draw_idea, lambda_q=lambda_q, lambda_k=lambda_k, weights=weights.numpy(), temperature=temperature, names=names)


def draw_idea(axis, lambda_q, lambda_k, weights, temperature, names):
    """lambda_q: that of the last token's query; lambda_k, weights: (T,); names: of the T tokens."""
    line = np.linspace(min(lambda_k.min(), lambda_q) - 0.02, max(lambda_k.max(), lambda_q) + 0.02, 500)
    axis.plot(line, np.exp(-np.abs(line - lambda_q) / temperature), color="C1", label=f"exp(-|lambda_q - lambda_k| / {temperature:.3g})")
    axis.axvline(lambda_q, color="C1", linestyle=":", label=f'lambda_q of "{names[-1]}"')
    axis.vlines(lambda_k, 0, weights / weights.max(), color="C0", alpha=0.5)
    axis.plot(lambda_k, weights / weights.max(), "o", color="C0", markersize=4, label="keys, at their weight in the softmax")
    for number, (x, y, name) in enumerate(zip(lambda_k.tolist(), (weights / weights.max()).tolist(), names)):
        axis.annotate(name, (x, y), (0, 5 + 9 * (number % 2)), textcoords="offset points", fontsize=8, ha="center", rotation=45)
    axis.set(xlabel="lambda", ylabel="weight, the heaviest is 1", ylim=(0, 1.25))
    axis.legend(fontsize="small", loc="upper left")


def draw(panels, out, width=5.5):
    """Draw panels, functions of an axis, into one figure and write it to `out`."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, 4.5 * rows), layout="constrained", squeeze=False)
    for axis, draw in zip(axes.flat, panels):
        draw(axis)
    for unused in axes.flat[len(panels) :]:
        unused.remove()
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": SOFTWARE})
    print(f"figure: {out}")


def drawn_here(path):
    """Whether a file is a figure that this program has written."""
    return path.is_file() and f"tEXtSoftware\0{SOFTWARE}".encode() in path.read_bytes()


def main():
    options = Parser(__doc__)
    options.add_argument("sources", nargs="+", type=Path, metavar="OUT_DIR_OR_LAPLACIAN")
    options.add_argument("--out", type=Path, help="(default: figure.png in the first OUT_DIR)")
    options.add_argument("--bands", action="store_true", help="the keys' lambdas in every layer and head instead (bands.png)")
    options.add_argument("--idea", metavar="TEXT", help="one head instead: the text's tokens on the line of lambdas (idea.png)")
    options.add_argument("--layer", type=int, default=0, help="with --idea (default: %(default)s)")
    options.add_argument("--head", type=int, default=0, help="with --idea, counted without the local ones (default: %(default)s)")
    options.add_argument("--n_head", type=int, help="of a Laplacian file: also the spectra of a model's heads, n_embd being F")
    options.add_argument("--max_loss", type=float, help="upper end of the losses' axis (default: the highest)")
    options.add_argument(
        "--overwrite", action="store_true", help="replace a file that is there already; one that plot.py drew, without --out, always is"
    )
    args = options.parse_args()

    if args.max_loss is not None and not 0 < args.max_loss < np.inf:
        raise UserError(f"--max_loss={args.max_loss} must be positive")
    if args.idea == "":
        raise UserError("--idea= is an empty text")
    folders = [source for source in args.sources if source.suffix != ".parquet"]
    options.refuse_given(args, () if args.idea else ("layer", "head"), "is for --idea: leave it out")
    options.refuse_given(args, ("max_loss",) if args.bands or args.idea else (), "is for curves of losses: leave it out")
    options.refuse_given(args, ("n_head",) if folders == args.sources else (), "is for the file of a Laplacian: leave it out")
    if (args.bands or args.idea) and (len(args.sources) != 1 or not folders or args.bands and args.idea):
        raise UserError("--bands and --idea take one output folder of train.py, each by itself")
    if not folders and args.out is None:
        raise UserError("--out=FILE.png is missing")
    if missing := next((source for source in args.sources if not source.exists()), None):
        raise UserError(f"{missing} does not exist: give an output folder of train.py, or the file of a Laplacian")
    out = args.out or folders[0] / ("bands.png" if args.bands else "idea.png" if args.idea else "figure.png")
    check_place(out, ".png", args.overwrite or args.out is None and drawn_here(out))

    if args.idea:
        return draw([idea(folders[0], args.idea, args.layer, args.head)], out, width=10)
    if args.bands:
        tokens, lambdas = read_diagnostics(folders[0])
        panels = [partial(draw_bands, layer=layer, tokens=tokens, lambdas=lambdas[:, layer]) for layer in range(lambdas.shape[1])]
    else:
        panels = overview(args.sources, folders, args.max_loss, args.n_head)
    draw(panels, out)


if __name__ == "__main__":
    run(main)
