"""Draw runs: their loss curves, energy percentiles, and the Laplacian of the first that has one.

    python plot.py out/quickstart
    python plot.py out/shakespeare_char_tau out/shakespeare_char_dot --out=pair.png
    python plot.py data/python_docs/laplacian.parquet --out=laplacian.png"""

import json
from pathlib import Path

import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch

import checkpoint
from build_laplacian import load_laplacian
from common import Parser, UserError, refuse_existing, replacing, run
from model import head_laplacians


def read_metrics(folder):
    """{"train": records, "val": records} of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        metrics = {split: [record for record in records if record["split"] == split] for split in ("train", "val")}
        if not metrics["val"]:
            raise ValueError("it has no validation loss")
        for record in records:
            record["tokens"], record["elapsed_s"], record["loss"]
        return metrics
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from None


def draw_losses(axis, runs, key, label):
    for number, (name, metrics) in enumerate(runs.items()):
        for split, style in (("train", dict(alpha=0.35, linewidth=1)), ("val", dict(marker="."))):
            points = [(record[key], record["loss"]) for record in metrics[split]]
            if points:
                axis.plot(*zip(*points), color=f"C{number}", label=f"{name}, {split}", **style)
    axis.set(xlabel=label, ylabel="loss, nats a token", title=f"loss against {label}")
    axis.legend(fontsize="small")


def draw_energies(axis, runs):
    for number, (name, metrics) in enumerate(runs.items()):
        points = [[record[key] for key in ("tokens", "E_p05", "E_p50", "E_p95", "tau")]
                  for record in metrics["val"] if "tau" in record]
        if points:
            tokens, low, median, high, tau = zip(*points)
            axis.fill_between(tokens, low, high, color=f"C{number}", alpha=0.2, label=f"{name}, p05 to p95")
            axis.plot(tokens, median, color=f"C{number}", label="p50")
            axis.plot(tokens, tau, color=f"C{number}", linestyle=":", label="tau")
    axis.set(xlabel="tokens", ylabel="E", title="energies of block 0's keys")
    axis.legend(fontsize="small")


def draw_spectra(axis, L, config):
    """Eigenvalues of L (F, F) and, of a model's, of the Laplacians that its heads use."""
    axis.plot(torch.linalg.eigvalsh(L), label=f"L, F = {len(L)}")
    if config is not None and len(L) == config.n_embd:
        for number, head in enumerate(head_laplacians(L, config)):
            axis.plot(torch.linalg.eigvalsh(head), alpha=0.7, linewidth=1, label=f"key head {number}")
    axis.set(xlabel="eigenvector", ylabel="eigenvalue", title="spectrum of the Laplacian")
    axis.legend(fontsize="small")


def draw_adjacency(figure, axis, L):
    weights = (L.diag().diag() - L).numpy()
    image = axis.imshow(weights, cmap="magma", interpolation="nearest")
    axis.set(xlabel="feature", ylabel="feature", title="adjacency: edge weights")
    figure.colorbar(image, ax=axis, shrink=0.8)


def main():
    options = Parser(__doc__)
    options.add_argument("sources", nargs="+", type=Path, metavar="OUT_DIR_OR_LAPLACIAN")
    options.add_argument("--out", type=Path, help="(default: figure.png in the first OUT_DIR)")
    options.add_argument("--overwrite", action="store_true", help="replace a figure that is there already")
    args = options.parse_args()

    runs, L, config = {}, None, None
    for source in args.sources:
        if source.suffix == ".parquet":
            L = torch.from_numpy(load_laplacian(source)) if L is None else L
            continue
        runs[str(source)] = read_metrics(source)
        if L is None and any(source.glob("*.safetensors")):
            path = checkpoint.find(source)
            tensors, header = checkpoint.read(path)
            L, config = tensors.get("laplacian"), checkpoint.build_model(tensors, header, path).config
    if not runs and args.out is None:
        raise UserError("--out=FILE.png is missing")
    out = args.out or next(source for source in args.sources if source.suffix != ".parquet") / "figure.png"
    if out.suffix != ".png":
        raise UserError(f"--out={out} must end in .png")
    refuse_existing(out, args.overwrite)

    energies = any("tau" in record for metrics in runs.values() for record in metrics["val"])
    panels = 2 * bool(runs) + energies + 2 * (L is not None)
    rows, columns = -(-panels // 3), min(panels, 3)
    figure, axes = plt.subplots(rows, columns, figsize=(5.5 * columns, 4.5 * rows), layout="constrained", squeeze=False)
    for unused in axes.flat[panels:]:
        unused.remove()
    axes = iter(axes.flat)
    if runs:
        draw_losses(next(axes), runs, "tokens", "tokens")
        draw_losses(next(axes), runs, "elapsed_s", "seconds")
    if energies:
        draw_energies(next(axes), runs)
    if L is not None:
        draw_spectra(next(axes), L, config)
        draw_adjacency(figure, next(axes), L)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    print(f"figure: {out}")


if __name__ == "__main__":
    run(main)
