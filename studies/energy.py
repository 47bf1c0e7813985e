"""Energies of texts on a domain's manifold: E = x^T L x / (x^T x + eps) of the embedding x (F,) of each document, and
lambda = E / (E + tau), where tau is the median of E.

    python studies/energy.py mine.jsonl --laplacian=data/mine/laplacian.parquet --embeddings=mine.npy
    python studies/energy.py data/mine --laplacian=data/mine/laplacian.parquet --embeddings=data/mine --against=other.jsonl

A document of low energy has similar values on features that are neighbours in the graph: it is typical of the domain.
Prints percentiles and the most and least typical documents; with --against, how often one of the first texts has a lower
energy than one of the others (the AUC). Writes NAME.energies.jsonl (for a folder: energies.jsonl in it), one line per
document, where "document" is its number, from 0, among those that are not empty, and beside it the histogram, a .png."""

import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Parser, UserError, check_place, refuse_existing, replacing, run, waiting  # isort: skip, for it tells of packages that are missing
import numpy as np

with waiting("importing torch and matplotlib"):
    import torch

    import plot
from data import sources
from data.corpus import Corpus
from data.embed import lsa_embeddings, sentence_model
from data.embeddings import READERS, all_rows, opened
from data.laplacian import load_laplacian
from model import energy
from ops.fused import ENERGY_EPS

SHOWN = 5  # documents at either end
PERCENTILES = (5, 25, 50, 75, 95)


def documents(path, key):
    """The texts, called `key`, of a file of records (JSONL, JSON or parquet), or of a prepared corpus the validation documents, which the
    embeddings were not fitted to."""
    if path.is_dir():
        texts = list(Corpus(path).documents("val"))
    else:
        texts = list(sources.reader(sources.form(path, path)[0], path)(path, path, key, sources.LeftOut()))
    if not texts:
        raise UserError(f"{path} holds no documents")
    return texts


def embeddings_of(texts, path, source, column):
    """(N, F) float64: read from such files as build_laplacian.py takes, or computed by a corpus folder's LSA or a sentence model."""
    given = Path(source)
    model = given.is_dir() and any((given / name).exists() for name in ("lsa.npz", "meta.json", "modules.json", "config.json"))
    if not model and (given.exists() or given.suffix.lower() in READERS):
        x = all_rows(opened(given, column))
        if len(x) != len(texts):
            raise UserError(f"{source} has {len(x)} rows, {path} has {len(texts)} documents: they must match, row by row")
        return x
    if column is not None:
        raise UserError(f"--column={column} is for files of embeddings: {source} is none")
    if (given / "lsa.npz").exists():
        x = lsa_embeddings(texts, given / "lsa.npz").astype(np.float64)
    elif (given / "meta.json").exists():
        raise UserError(
            f"{source} has no lsa.npz: make it with `python data/embed.py {source} --overwrite`, or give "
            "a file of embeddings or a sentence model"
        )
    else:
        x = sentence_model(texts, source).astype(np.float64)
    if not np.isfinite(x).all():
        raise UserError(f"{source}: row {np.flatnonzero(~np.isfinite(x).all(1))[0]} holds NaN or infinity")
    return x


def energies(x, L):
    """E (N,) of x (N, F), L (F, F); NaN for rows of zeros, which have no direction."""
    E = energy(torch.from_numpy(x)[None, :, None], torch.from_numpy(L)[None])[0, :, 0].numpy()
    return np.where(x.any(1), E, np.nan)


def auc(low, high):
    """The share of pairs, one of `low` (N,) and one of `high` (M,), in which the first is smaller; a tie counts half."""
    high = np.sort(high)
    below, upto = (np.searchsorted(high, low, side) for side in ("left", "right"))
    return float(1 - (below + upto).mean() / 2 / len(high))


def draw_histogram(axis, groups):
    bins = np.histogram_bin_edges(np.concatenate([E for _, E in groups]), 60)
    for name, E in groups:
        axis.hist(E, bins, density=True, alpha=0.5, label=f"{name} ({len(E):,})")
    axis.set(xlabel="E", ylabel="density", title="energies of documents")
    axis.legend(fontsize="small")


def main():
    options = Parser(__doc__)
    options.add_argument(
        "texts", type=Path, metavar="TEXTS", help="file of records (JSONL, JSON, parquet), or a prepared corpus: its validation part"
    )
    options.add_argument("--text_key", default="text", metavar="NAME", help="name of the text in a record or row (default: %(default)s)")
    options.add_argument("--laplacian", type=Path, required=True, metavar="FILE.parquet")
    options.add_argument(
        "--embeddings",
        required=True,
        help="files as build_laplacian.py takes them, with a row for each document; or what makes them: a corpus folder with an lsa.npz, "
        "or a sentence model",
    )
    options.add_argument("--column", metavar="NAME", help="the column of lists or the array to read, where a file has several")
    options.add_argument("--against", type=Path, metavar="TEXTS", help="other texts, to tell apart from the first")
    options.add_argument("--against_embeddings", help="theirs (default: made by what --embeddings names)")
    options.add_argument(
        "--out", type=Path, metavar="FILE.jsonl", help="(default: NAME.energies.jsonl beside TEXTS, or energies.jsonl in a folder)"
    )
    options.add_argument("--overwrite", action="store_true", help="replace what is there already")
    args = options.parse_args()
    out = args.out or (args.texts / "energies.jsonl" if args.texts.is_dir() else args.texts.with_suffix(".energies.jsonl"))
    check_place(out, ".jsonl", args.overwrite)
    refuse_existing(out.with_suffix(".png"), args.overwrite)
    if args.against_embeddings and not args.against:
        raise UserError("--against_embeddings needs --against")

    L, groups = load_laplacian(args.laplacian), []
    for path, source in ((args.texts, args.embeddings), (args.against, args.against_embeddings or args.embeddings)):
        if path is None:
            continue
        texts = documents(path, args.text_key)
        x = embeddings_of(texts, path, source, args.column)
        if x.shape[1] != len(L):
            raise UserError(f"{source} has {x.shape[1]} features, {args.laplacian} has {len(L)}: they must be the same")
        groups.append((path, texts, energies(x, L)))
        if np.isnan(groups[-1][2]).all():
            raise UserError(f"{source}: every embedding of {path} is zero")
    _, texts, E = groups[0]
    tau = np.nanmedian(E).clip(ENERGY_EPS)
    known = [(path, E[~np.isnan(E)]) for path, _, E in groups]

    for (name, values), (_, all_texts, _) in zip(known, groups):
        left_out = len(all_texts) - len(values)
        print(f"{name}: {len(values):,} documents" + (f", and {left_out:,} whose embedding is zero" if left_out else ""))
        for label, numbers in (("E", values), ("lambda", values / (values + tau))):
            print(f"  {label:<8}" + "  ".join(f"p{p:02} {value:.4f}" for p, value in zip(PERCENTILES, np.percentile(numbers, PERCENTILES))))
    print(f"tau = {tau:.4g}, the median E of {args.texts}")
    order = np.argsort(E, kind="stable")[: len(known[0][1])]
    for title, chosen in (("most typical, lowest E", order[:SHOWN]), ("least typical, highest E", order[::-1][:SHOWN])):
        print(f"{title}:")
        for number in chosen:
            print(f"  {E[number]:8.4f}  {number:>6}  {' '.join(texts[number].split())[:90]}")
    if args.against:
        print(f"AUC {auc(*(E for _, E in known)):.3f}: the share of pairs in which the document of {args.texts} has the lower energy")
    with replacing(out) as temporary:
        lambdas = E / (E + tau)
        temporary.write_text(
            "".join(
                json.dumps(
                    {
                        "document": number,
                        "energy": None if np.isnan(E[number]) else E[number],
                        "lambda": None if np.isnan(E[number]) else lambdas[number],
                    }
                )
                + "\n"
                for number in range(len(E))
            )
        )
    plot.draw([partial(draw_histogram, groups=known)], out.with_suffix(".png"))


if __name__ == "__main__":
    run(main)
