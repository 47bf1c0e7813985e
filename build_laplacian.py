"""Embeddings -> laplacian.parquet, the graph Laplacian L = Deg - W over their features: the model's domain memory.

    python build_laplacian.py data/cve/embeddings.npy --out=data/cve/laplacian.parquet
    torchrun --nproc_per_node=8 build_laplacian.py SHARDS/ --out=FILE.parquet
    python build_laplacian.py --inspect FILE.parquet --n_head=6

The published recipe (arrowspace, JOSS 09002): the distance of two features is d = 1 - max(0, cosine of their columns),
the neighbours of a feature are the nearest min(k, topk, F-1) within eps, and an edge has the weight 1 / (1 + (d/sigma)^p).
One pass over the embeddings, however many, sums up the F x F Gram matrix, which is all that the graph needs; with several
processes (torchrun) each takes a part of the rows."""

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import RANK, ROOT, WORLD, Parser, UserError, check_place, commit, refuse_existing, run  # isort: skip, for it tells of packages that are missing
import numpy as np
from tqdm import tqdm

from data.embeddings import opened
from data.laplacian import MOST_FEATURES, check_laplacian, components, laplacian_of, load_laplacian, said_beside, save_laplacian


def gram_matrix(shards, center=False):
    """(X^T X (F, F) float64, N) of the embeddings X (N, F), minus the mean of every feature if center. Collective: all
    processes call it. Raises UserError for a row with NaN or infinity."""
    F = shards[0].columns
    gram, total, count = np.zeros((F, F)), np.zeros(F), 0
    todo = [(shard, number) for shard in shards for number, (_, rows) in enumerate(shard.pieces) if rows]
    origin = next(todo[0][0].chunks(todo[0][1]))[0] if center else 0.0  # near the mean, so that little cancels below
    todo = todo[RANK::WORLD]
    progress = tqdm(
        total=sum(shard.pieces[number][1] for shard, number in todo),
        desc="reading embeddings",
        unit=" rows",
        disable=None if RANK == 0 else True,
    )
    for shard, number in todo:
        for rows in shard.chunks(number):
            if center:
                rows -= origin
                total += rows.sum(0)
            gram += rows.T @ rows
            count += len(rows)
            progress.update(len(rows))
            del rows  # before the next ones are made
    progress.close()
    if WORLD > 1:
        gram, total, count = joined(gram, total, count)
    gram = gram - np.outer(total, total) / count if center else gram
    if not np.isfinite(gram).all():
        raise UserError("the embeddings' products overflow float64: their greatest length is over 1e150: scale them down")
    return gram, count


def joined(gram, total, count):
    """The sums over all processes."""
    import torch  # here, because a single process does without it
    import torch.distributed as dist

    from training import processes

    processes.meet(torch.device("cpu"))
    count = np.array([count])
    for array in (gram, total, count):
        dist.all_reduce(torch.from_numpy(array))
    processes.part()
    return gram, total, int(count[0])


def sha256(shards):
    """The hash of the files' bytes, one file after the other: of one file, what `sha256sum` prints."""
    digest = hashlib.sha256()
    for shard in shards:
        with open(shard.path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def project(gram, dim, seed):
    """The Gram matrix (dim, dim) of the embeddings X P, where P is a seeded Gaussian projection (F, dim)."""
    projection = np.random.default_rng(seed).standard_normal((len(gram), dim)) / np.sqrt(dim)
    return projection.T @ gram @ projection


def feature_distances(gram):
    """d = 1 - max(0, cos) between feature columns, (F, F) in [0, 1]; a column of zeros is at distance 1 from every other."""
    length = np.sqrt(np.maximum(np.diag(gram), 0))
    length[length == 0] = np.inf
    distances = 1 - np.clip(gram / np.outer(length, length), 0, 1)
    np.fill_diagonal(distances, 0)
    return (distances + distances.T) / 2


def random_distances(F, seed):
    """Symmetric (F, F), uniform in [0, 1)."""
    distances = np.triu(np.random.default_rng(seed).random((F, F)), 1)
    return distances + distances.T


def rewired(weights, seed):
    """A random connected graph (F, F) in which every feature has as many edges as in `weights` (F, F), with the same weights
    on other edges: pairs of edges swap ends where that duplicates no edge (Maslov & Sneppen 2002), in ten passes over all
    edges, and the weights are shuffled."""
    generator = np.random.default_rng(seed)
    ends, edges = np.argwhere(np.triu(weights)), weights > 0
    dealt = generator.permutation(weights[tuple(ends.T)])
    kept = ends.copy()
    for _ in range(10):
        for i, j in generator.integers(len(ends), size=(len(ends), 2)):
            (a, b), (c, d) = ends[i], ends[j][:: generator.choice((1, -1))]
            if len({a, b, c, d}) == 4 and not (edges[a, d] or edges[c, b]):
                edges[a, b] = edges[b, a] = edges[c, d] = edges[d, c] = False
                edges[a, d] = edges[d, a] = edges[c, b] = edges[b, c] = True
                ends[i], ends[j] = (a, d), (c, b)
        if not components(edges).any():
            kept = ends.copy()
    new = np.zeros_like(weights)
    new[tuple(kept.T)] = dealt
    return new + new.T


def neighbour_graph(distances, k, topk, eps):
    """(edges (F, F) bool, joins). Each feature chooses its min(k, topk, F-1) nearest with distance <= eps, at a tie the one
    of lower index; there is an edge where either chose the other. Components that remain are joined by the shortest pair
    between them; `joins` counts these."""
    F = len(distances)
    reach = distances.copy()
    np.fill_diagonal(reach, np.inf)
    nearest = np.argsort(reach, axis=1, kind="stable")[:, : min(k, topk, F - 1)]
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


def edge_weights(distances, edges, p, sigma):
    """W (F, F): 1 / (1 + (d/sigma)^p) on the edges, 0 elsewhere."""
    return np.where(edges, 1 / (1 + (distances / sigma) ** p), 0.0)


def build(args):
    """(L (F, F), settings) as the command line says; (None, None) on ranks other than 0. Raises UserError."""
    distances, settings = None, {"graph": args.graph}
    F = args.dim
    if args.embeddings:
        shards = opened(args.embeddings, args.column)
        if not 2 <= shards[0].columns <= MOST_FEATURES:
            raise UserError(f"{args.embeddings} has {shards[0].columns} features: a graph has 2 to {MOST_FEATURES}")
        if sum(shard.rows for shard in shards) < 2:
            raise UserError(f"{args.embeddings} has one row: a graph of features is made of many documents, two at least")
        with ThreadPoolExecutor(1) as beside:
            digest = beside.submit(sha256, shards) if RANK == 0 else None
            gram, rows = gram_matrix(shards, args.center)
        if RANK:
            return None, None
        settings |= {
            "embeddings": str(args.embeddings),
            "column": shards[0].column,
            "sha256": digest.result(),
            "rows": rows,
            "columns": len(gram),
            "center": args.center,
            "zero_columns": int((np.diag(gram) <= 0).sum()),
        }
        if (made := said_beside(args.embeddings)).get("embeddings") == settings["sha256"]:
            settings["corpus"] = made.get("corpus")  # the hash of the text, as in its meta.json
        if settings["zero_columns"] == len(gram):
            raise UserError(f"{args.embeddings}: every feature is {'constant' if args.center else 'zero'}: there is no graph in it")
        if settings["zero_columns"]:
            print(
                f"{settings['zero_columns']} of {len(gram)} features are {'constant' if args.center else 'zero everywhere'}: "
                "they stay, at distance 1 from all others"
            )
        if args.dim is not None:
            gram = project(gram, args.dim, args.seed)
            settings["seed"] = args.seed
        F, distances = len(gram), feature_distances(gram)
    elif args.center or args.column is not None:
        raise UserError(f"--{'center' if args.center else 'column'} needs EMBEDDINGS")
    elif args.graph == "domain":
        raise UserError("EMBEDDINGS is missing: a file such as `python data/embed.py DATA_DIR` makes")
    elif F is None:
        raise UserError(f"--graph={args.graph} needs EMBEDDINGS, or --dim=F in their place")
    settings["F"] = F

    if args.graph == "chain":
        return laplacian_of(np.eye(F, k=1) + np.eye(F, k=-1)), settings
    if args.graph == "complete":
        return laplacian_of(1 - np.eye(F)), settings
    if args.graph == "random":
        settings["seed"] = args.seed
    if distances is None:
        distances = random_distances(F, args.seed)
    edges, joins = neighbour_graph(distances, args.k, args.topk, args.eps)
    if joins:
        print(f"the graph fell into {joins + 1} parts: joined by {joins} shortest pairs")
    settings |= {"k": args.k, "topk": args.topk, "eps": args.eps, "p": args.p, "sigma": args.sigma, "joins": joins}
    weights = edge_weights(distances, edges, args.p, args.sigma)
    if args.graph == "random" and args.embeddings:
        weights = rewired(weights, args.seed)
        settings["edges_kept"] = float((edges & (weights > 0)).sum() / edges.sum())
        print(f"{settings['edges_kept']:.0%} of the edges are the domain's own: the denser its graph, the more must be")
    return laplacian_of(weights), settings


def numbers(L):
    """The numbers of a Laplacian that --inspect prints and the JSON holds."""
    eigenvalues, degree = np.linalg.eigvalsh(L), (np.triu(L, 1) + np.tril(L, -1) != 0).sum(1)
    return {
        "edges": int(degree.sum()) // 2,
        "degree": [int(degree.min()), float(np.median(degree)), int(degree.max())],
        "connectivity": float(eigenvalues[1]),
        "median_eigenvalue": float(np.median(eigenvalues)),
        "largest_eigenvalue": float(eigenvalues[-1]),
    }


def inspect(path, n_head, out):
    """Print the numbers of a Laplacian's file and have plot.py draw it. Returns plot.py's exit code."""
    import torch  # here, because building does without it

    from model import kron_reduction

    L = load_laplacian(path)
    F, found, eigenvalues = len(L), numbers(L), np.linalg.eigvalsh(L)
    if n_head is not None and (n_head < 1 or F % n_head or F == n_head):
        raise UserError(f"--n_head={n_head} must divide the {F} features into heads of two or more")
    of = lambda values: f"{values[1]:.4g} (connectivity), median {np.median(values):.4g}, largest {values[-1]:.4g}"
    print(
        f"features     {F}\n"
        f"edges        {found['edges']:,}, {2 * found['edges'] / (F * (F - 1)):.1%} of all pairs\n"
        f"degree       {found['degree'][0]} to {found['degree'][2]} edges, median {found['degree'][1]:g}; weight "
        f"{L.diagonal().min():.4g} to {L.diagonal().max():.4g}, median {np.median(L.diagonal()):.4g}\n"
        f"connected    yes\n"
        f"eigenvalues  0, {of(eigenvalues)}"
    )
    for h in range(n_head or 0):
        D = F // n_head
        head = kron_reduction(torch.from_numpy(L), slice(h * D, (h + 1) * D))
        print(
            f"head {h:<7} features {h * D} to {(h + 1) * D - 1}, by Kron reduction: eigenvalues 0, {of(np.linalg.eigvalsh(head.numpy()))}"
        )
    sys.stdout.flush()
    heads = [f"--n_head={n_head}"] if n_head else []
    return subprocess.run([sys.executable, ROOT / "plot.py", path, f"--out={out}", "--overwrite", *heads]).returncode


def main():
    parser = options = Parser(__doc__)
    options.add_argument(
        "embeddings",
        nargs="?",
        type=Path,
        metavar="EMBEDDINGS",
        help=".npy, .npz, .safetensors or .pt with an array (N, F); .parquet with a column of lists, or a column a feature; .csv or "
        ".tsv; or a folder of such files",
    )
    options.add_argument("--column", metavar="NAME", help="the column of lists or the array to read, where a file has several")
    options.add_argument("--out", type=Path, metavar="FILE.parquet", help="the Laplacian to write; FILE.json beside it gets its settings")
    options.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    options = parser.add_argument_group("to look at a Laplacian")
    options.add_argument(
        "--inspect",
        type=Path,
        metavar="FILE.parquet",
        help="print the numbers of a Laplacian and draw it (to --out; default: FILE.png, drawn again if plot.py drew it); build nothing",
    )
    options.add_argument("--n_head", type=int, help="with --inspect: also the Laplacians of a model's heads, n_embd being F")
    options = parser.add_argument_group("the recipe")
    options.add_argument("--center", action="store_true", help="take the mean of every feature off first")
    options.add_argument(
        "--graph",
        choices=("domain", "chain", "random", "complete"),
        default="domain",
        help="domain: the recipe above (default). Controls: chain, a path with weights 1; "
        "random, the domain's weights on other edges, as many at each feature "
        "(without EMBEDDINGS: the recipe on random distances); complete, all pairs with weight 1",
    )
    options.add_argument(
        "--dim",
        type=int,
        help="reduce the embeddings to DIM features by a seeded random projection; for the controls, in place of EMBEDDINGS",
    )
    options.add_argument("--seed", type=int, default=0, help="of --dim and --graph=random (default: %(default)s)")
    options.add_argument("--k", type=int, default=25, help="neighbours (default: %(default)s)")
    options.add_argument("--topk", type=int, default=15, help="neighbours kept (default: %(default)s)")
    options.add_argument("--eps", type=float, default=1.31, help="greatest distance (default: %(default)s)")
    options.add_argument("--p", type=float, default=1.8, help="power of the weight (default: %(default)s)")
    options.add_argument("--sigma", type=float, default=0.535, help="scale of the weight (default: %(default)s)")
    args = parser.parse_args()
    for name in ("k", "topk", "eps", "p", "sigma"):
        if not 0 < getattr(args, name) < np.inf:
            raise UserError(f"--{name}={getattr(args, name)} must be positive")
    if args.seed < 0:
        raise UserError(f"--seed={args.seed} must not be negative")
    if args.dim is not None and not 2 <= args.dim <= MOST_FEATURES:
        raise UserError(f"--dim={args.dim}: a graph has 2 to {MOST_FEATURES} features")
    if args.inspect:
        if args.embeddings:
            raise UserError(f"--inspect={args.inspect} builds nothing: leave {args.embeddings} out")
        recipe = "column center graph dim seed k topk eps p sigma".split()
        parser.refuse_given(args, recipe, f"is for building, and --inspect={args.inspect} builds nothing: leave it out")
        out = args.out or args.inspect.with_suffix(".png")
        from plot import drawn_here  # here, because it brings matplotlib

        check_place(out, ".png", args.overwrite or args.out is None and drawn_here(out))
        if RANK == 0:
            sys.exit(inspect(args.inspect, args.n_head, out))
        return
    if args.n_head is not None:
        raise UserError(f"--n_head={args.n_head} is for --inspect: a Laplacian is the same for any number of heads")
    if args.out is None:
        raise UserError("--out=FILE.parquet is missing")
    check_place(args.out, ".parquet", args.overwrite)
    refuse_existing(args.out.with_suffix(".json"), args.overwrite)
    with np.errstate(all="ignore"):  # what overflows is found by the check
        L, settings = build(args)
    if RANK:
        return
    try:
        check_laplacian(L, "the graph")
    except UserError as error:
        raise UserError(f"{error}, with embeddings of a smaller range or other --p and --sigma") from None
    settings |= numbers(L) | {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "version": commit()}
    save_laplacian(args.out, L, settings)
    print(
        f"{args.out}: {len(L)} features, {settings['edges']:,} edges, eigenvalues 0, {settings['connectivity']:.4g} ... "
        f"{settings['largest_eigenvalue']:.4g}"
    )


if __name__ == "__main__":
    run(main)
