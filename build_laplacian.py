"""Embeddings -> laplacian.parquet, the graph Laplacian L = Deg - W over their features: the model's domain memory.

The published recipe (arrowspace, JOSS 09002): the distance of two features is d = 1 - max(0, cosine of their columns),
neighbours of a feature are the nearest min(k, topk, F-1) within eps, an edge has the weight 1 / (1 + (d/sigma)^p).
One pass over the embeddings, of any number, sums the F x F Gram matrix, which is all that the graph needs."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from common import Parser, UserError, refuse_existing, replacing, run

CHUNK_ROWS = 8192
MOST_FEATURES = 16384  # a dense float64 matrix of that size takes 2 GiB
COLUMNS = {"name_id": pyarrow.string(), "n_rows": pyarrow.uint64(), "n_cols": pyarrow.uint64(),
           "nnz": pyarrow.uint64(), "row": pyarrow.uint64(), "col": pyarrow.uint64(), "value": pyarrow.float64()}


def chunks(path):
    """Yield the embeddings of a .npy file, memory-mapped, or of a parquet file with one column a feature, some rows
    (n, F) float64 at a time. Raises UserError for anything else and for a row with NaN or infinity."""
    first = 0
    for rows in npy_rows(path) if path.suffix == ".npy" else parquet_rows(path):
        rows = rows.astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(rows).all(1))
        if len(bad):
            raise UserError(f"{path}: row {first + bad[0]} holds NaN or infinity: leave it out")
        yield rows
        first += len(rows)


def npy_rows(path):
    try:
        embeddings = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is not a whole .npy file ({error})") from None
    if not isinstance(embeddings, np.ndarray):
        raise UserError(f"{path} is an archive of arrays; embeddings are one array (N, F)")
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f" or 0 in embeddings.shape:
        raise UserError(f"{path} holds {embeddings.dtype} {embeddings.shape}; embeddings are floats (N, F)")
    for start in tqdm(range(0, len(embeddings), CHUNK_ROWS), desc="reading embeddings", disable=None):
        yield embeddings[start:start + CHUNK_ROWS]


def parquet_rows(path):
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if file.metadata.num_rows == 0 or not all(pyarrow.types.is_floating(t) for t in file.schema_arrow.types):
            raise UserError(f"{path}: embeddings have one column of floats a feature; it has {file.metadata.num_rows} "
                            f"rows of {', '.join(names[:4])}, ...")
        for batch in tqdm(file.iter_batches(CHUNK_ROWS), desc="reading embeddings", disable=None):
            yield np.column_stack([column.to_numpy(zero_copy_only=False) for column in batch.columns])
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole parquet file ({error})") from None


def gram_matrix(path):
    """X^T X, (F, F) float64, of embeddings X (N, F); and N."""
    gram, count = 0, 0
    for rows in chunks(path):
        gram = gram + rows.T @ rows
        count += len(rows)
    return gram, count


def project(gram, dim, seed):
    """The Gram matrix (dim, dim) of the embeddings X P, where P is a seeded Gaussian projection (F, dim)."""
    projection = np.random.default_rng(seed).standard_normal((len(gram), dim)) / np.sqrt(dim)
    return projection.T @ gram @ projection


def feature_distances(gram):
    """d = 1 - max(0, cos) between feature columns, (F, F) in [0, 1]; a column of zeros is at 1 from every other."""
    length = np.sqrt(np.diag(gram))
    length[length == 0] = np.inf
    distances = 1 - np.clip(gram / np.outer(length, length), 0, 1)
    np.fill_diagonal(distances, 0)
    return (distances + distances.T) / 2


def random_distances(F, distances, seed):
    """Symmetric (F, F): the distances given, if any, between other pairs; uniform in [0, 1) otherwise."""
    generator, pairs = np.random.default_rng(seed), np.triu_indices(F, 1)
    values = generator.random(len(pairs[0])) if distances is None else generator.permutation(distances[pairs])
    shuffled = np.zeros((F, F))
    shuffled[pairs] = values
    return shuffled + shuffled.T


def neighbour_graph(distances, k, topk, eps):
    """Edges (F, F) bool: each feature to its min(k, topk, F-1) nearest with distance <= eps, ties by the lower index,
    an edge where either chose the other; components that remain are joined by their shortest pair. And how many
    such joins there were."""
    F = len(distances)
    reach = distances.copy()
    np.fill_diagonal(reach, np.inf)
    nearest = np.argsort(reach, axis=1, kind="stable")[:, :min(k, topk, F - 1)]
    edges = np.zeros((F, F), bool)
    np.put_along_axis(edges, nearest, True, axis=1)
    edges &= reach <= eps
    edges |= edges.T
    joins = 0
    while (component := components(edges)).any():
        outside = np.where(component[:, None] != component[None, :], distances, np.inf)
        a, b = np.unravel_index(outside.argmin(), outside.shape)
        edges[a, b] = edges[b, a] = True
        joins += 1
    return edges, joins


def components(edges):
    """The component number of every node, (F,), counted from 0."""
    from scipy.sparse.csgraph import connected_components
    return connected_components(edges, directed=False)[1]


def edge_weights(distances, edges, p, sigma):
    """W (F, F): 1 / (1 + (d/sigma)^p) on the edges, 0 elsewhere."""
    return np.where(edges, 1 / (1 + (distances / sigma)**p), 0.0)


def laplacian_of(weights):
    """L = Deg - W."""
    return np.diag(weights.sum(1)) - weights


def check_laplacian(L, what):
    """Raise UserError unless L is a Laplacian of a connected graph: finite, symmetric, rows that sum to 0, positive
    semi-definite, its second eigenvalue above 0. Bounds are relative to the largest entry, for float32 files."""
    if not np.isfinite(L).all():
        raise UserError(f"{what} holds NaN or infinity: build it again")
    bound = 1e-6 * max(np.abs(L).max(), np.finfo(float).tiny)
    if np.abs(L - L.T).max() > bound:
        raise UserError(f"{what} is not symmetric: entries differ by {np.abs(L - L.T).max():.3g}: build it again")
    if np.abs(L.sum(1)).max() > bound * len(L):
        raise UserError(f"{what} is not a Laplacian: a row sums to {np.abs(L.sum(1)).max():.3g}, not 0: build it again")
    smallest = np.linalg.eigvalsh(L)[0]
    if smallest < -bound * len(L):
        raise UserError(f"{what} is not positive semi-definite: it has the eigenvalue {smallest:.3g}: build it again")
    parts = components((L != 0) | np.eye(len(L), dtype=bool)).max() + 1
    if parts > 1:
        raise UserError(f"{what} is not connected: its graph falls into {parts} parts: build it again")


def save_laplacian(path, L, settings):
    """Write L (F, F) in coordinate form, float64, to a parquet file with the columns of the author's tool, and
    settings, a dict, to the JSON beside it."""
    path = Path(path)
    row, col = np.nonzero(L)
    constants = {"name_id": path.stem, "n_rows": len(L), "n_cols": len(L), "nnz": len(row)}
    table = pyarrow.table({name: pyarrow.array(values, COLUMNS[name]) for name, values in
                           [(name, [value] * len(row)) for name, value in constants.items()]
                           + [("row", row), ("col", col), ("value", L[row, col])]})
    with replacing(path.with_suffix(".json")) as settings_path, replacing(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)
        settings_path.write_text(json.dumps(settings, indent=1) + "\n")


def load_laplacian(path):
    """The dense Laplacian (F, F) float64 of a parquet file written by save_laplacian or by the author's tool.
    Raises FileNotFoundError, and UserError if the file is damaged or its matrix is no connected graph's Laplacian."""
    try:
        table = pyarrow.parquet.read_table(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole parquet file ({error}): build it again") from None
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise UserError(f"{path} is not a Laplacian file: it has no column {', '.join(missing)}")
    try:
        columns = {name: table[name].cast(COLUMNS[name]).to_numpy() for name in COLUMNS if name != "name_id"}
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Laplacian file ({error})") from None
    row, col, value = columns["row"], columns["col"], columns["value"]
    for name in ("n_rows", "n_cols", "nnz"):
        if len(row) == 0 or (columns[name] != columns[name][0]).any():
            raise UserError(f"{path} is damaged: {name} must be one number on every row: build it again")
    F, nnz = int(columns["n_rows"][0]), int(columns["nnz"][0])
    if F != columns["n_cols"][0]:
        raise UserError(f"{path} is not square: {F} x {columns['n_cols'][0]}: build it again")
    if nnz != len(row):
        raise UserError(f"{path} is damaged: {len(row)} entries, not the {nnz} it announces: build it again")
    if not 0 < F <= MOST_FEATURES:
        raise UserError(f"{path} announces {F} features; 1 to {MOST_FEATURES} are possible")
    if max(row.max(), col.max()) >= F:
        raise UserError(f"{path} is damaged: it has an entry at ({row.max()}, {col.max()}), past its {F} rows")
    if len(np.unique(row * np.uint64(F) + col)) != len(row):
        raise UserError(f"{path} is damaged: an entry stands there twice: build it again")
    L = np.zeros((F, F))
    L[row, col] = value
    check_laplacian(L, path)
    return L


def build(args):
    """(L, settings) as the command line says."""
    distances, settings = None, {"graph": args.graph}
    F = args.dim
    if args.embeddings:
        gram, rows = gram_matrix(args.embeddings)
        settings |= {"embeddings": str(args.embeddings), "rows": rows, "columns": len(gram),
                     "zero_columns": int((np.diag(gram) == 0).sum()),
                     "gram_sha256": hashlib.sha256(gram.tobytes()).hexdigest()}
        if settings["zero_columns"]:
            print(f"{settings['zero_columns']} of {len(gram)} features are zero everywhere: "
                  "they stay, at distance 1 from all others")
        if args.dim is not None:
            gram = project(gram, args.dim, args.seed)
            settings["seed"] = args.seed
        F, distances = len(gram), feature_distances(gram)
    elif args.graph == "domain":
        raise UserError("EMBEDDINGS is missing: a .npy or parquet file, such as `python data/embed.py DATA_DIR` makes")
    elif F is None:
        raise UserError(f"--graph={args.graph} needs EMBEDDINGS, or --dim=F in their place")
    if not 2 <= F <= MOST_FEATURES:
        raise UserError(f"{F} features: a graph has 2 to {MOST_FEATURES}")
    settings["F"] = F

    if args.graph == "chain":
        return laplacian_of(np.eye(F, k=1) + np.eye(F, k=-1)), settings
    if args.graph == "complete":
        return laplacian_of(1 - np.eye(F)), settings
    if args.graph == "random":
        distances = random_distances(F, distances, args.seed)
        settings["seed"] = args.seed
    edges, joins = neighbour_graph(distances, args.k, args.topk, args.eps)
    if joins:
        print(f"the graph fell into {joins + 1} parts: joined by {joins} shortest pairs")
    settings |= {"k": args.k, "topk": args.topk, "eps": args.eps, "p": args.p, "sigma": args.sigma, "joins": joins}
    return laplacian_of(edge_weights(distances, edges, args.p, args.sigma)), settings


def main():
    options = Parser(__doc__)
    options.add_argument("embeddings", nargs="?", type=Path, metavar="EMBEDDINGS", help=".npy (N, F), or parquet")
    options.add_argument("--out", type=Path, required=True, metavar="FILE.parquet")
    options.add_argument("--graph", choices=("domain", "chain", "random", "complete"), default="domain",
                         help="domain: the recipe above (default). Controls: chain, a path with weights 1; "
                              "random, the recipe on shuffled distances; complete, all pairs with weight 1")
    options.add_argument("--dim", type=int, help="reduce the embeddings to DIM features by a seeded random projection; "
                                                 "for the controls, in place of EMBEDDINGS")
    options.add_argument("--seed", type=int, default=0, help="of --dim and --graph=random (default: %(default)s)")
    options.add_argument("--k", type=int, default=25, help="neighbours (default: %(default)s)")
    options.add_argument("--topk", type=int, default=15, help="neighbours kept (default: %(default)s)")
    options.add_argument("--eps", type=float, default=1.31, help="greatest distance (default: %(default)s)")
    options.add_argument("--p", type=float, default=1.8, help="power of the weight (default: %(default)s)")
    options.add_argument("--sigma", type=float, default=0.535, help="scale of the weight (default: %(default)s)")
    options.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    args = options.parse_args()
    for name in ("k", "topk", "eps", "p", "sigma"):
        if not 0 < getattr(args, name) < np.inf:
            raise UserError(f"--{name}={getattr(args, name)} must be positive")
    if args.seed < 0:
        raise UserError(f"--seed={args.seed} must not be negative")
    if args.dim is not None and not 2 <= args.dim <= MOST_FEATURES:
        raise UserError(f"--dim={args.dim}: a graph has 2 to {MOST_FEATURES} features")
    if args.out.suffix != ".parquet":
        raise UserError(f"--out={args.out} must end in .parquet")
    if not args.out.parent.is_dir():
        raise UserError(f"folder {args.out.parent} does not exist: make it first")
    for path in (args.out, args.out.with_suffix(".json")):
        refuse_existing(path, args.overwrite)
    with np.errstate(all="ignore"):  # what overflows is found by the check
        L, settings = build(args)
    try:
        check_laplacian(L, "the graph")
    except UserError as error:
        raise UserError(f"{error}, with embeddings of a smaller range or other --p and --sigma") from None
    settings["command"] = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    save_laplacian(args.out, L, settings)
    eigenvalues = np.linalg.eigvalsh(L)
    print(f"{args.out}: {len(L)} features, {(np.count_nonzero(L) - len(L)) // 2:,} edges, "
          f"eigenvalues 0, {eigenvalues[1]:.4g} ... {eigenvalues[-1]:.4g}")


if __name__ == "__main__":
    run(main)
