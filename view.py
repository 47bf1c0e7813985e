"""One page that shows what a trained model makes of a text: what each token attends to, what the graph knows, how the run went.

    python view.py out/quickstart --text="Return the number of items in the list"
    python view.py out/quickstart --text_file=FILE --out=page.html

The page is one HTML file, which opens from the disk, without a network or a server. Without --out it goes into OUT_DIR as view.html,
and one that view.py has written there before is written again. view.html, beside this file, is the page without its data."""

import base64
import json
import math
from dataclasses import asdict
from pathlib import Path

from common import DAMAGED_ARRAY, ROOT, Parser, UserError, check_place, note, read_text, replacing, run, waiting  # isort: skip, for it tells of packages that are missing
import numpy as np

from data import checkpoint_file
from data import tokenizer as tokenizers
from data.embed import token_strings
from data.laplacian import laplacian_of, load_laplacian, said_beside

# What needs torch or matplotlib, whose imports take seconds, is imported where it is used: a mistake in the command is answered at once.

TEMPLATE = ROOT / "view.html"
EMPTY = '<script type="application/json" id="data">null</script>'  # where the template takes the data
GENERATOR = b'<meta name="generator" content="tauformer view.py">'  # by which a page tells that it may be written again
MOST_TOKENS = 2048  # of a text
TOP = 10  # edges of a token's energy, likeliest next tokens, words of a feature
MOST_EDGES = 2000  # of the graph, the heaviest, that are drawn
MOST_POINTS = 1000  # of a curve
LOG_STEPS = 2048  # a weight w is kept as round(-log(w) * 2048), to 0.03 %; 65535 stands for 0
ROUNDS = 200  # of layout()
CURVES = ("tokens", "loss", "lr", "E_p05", "E_p50", "E_p95", "tau")


def packed(x, kind="f4"):
    """An array or tensor as the page reads it: {kind: base64 of its little-endian numbers}."""
    return {kind: base64.b64encode(np.ascontiguousarray(x, f"<{kind}").tobytes()).decode()}


def operator_weights(attend, v):
    """The softmax weights (H, T, T) of an attention operator, for v (1, Hkv, T, D): what it returns for unit vectors as values, of which D
    fit in at a time."""
    import torch

    (Hkv, T, D), units = v.shape[1:], torch.eye(v.size(2), dtype=v.dtype)
    units = torch.nn.functional.pad(units, (0, -T % D)).split(D, 1)
    return torch.cat([attend(unit.expand(1, Hkv, T, D)) for unit in units], -1)[0, ..., :T]


def watch(attention):
    """Make a layer keep what it computes in the dict that is returned: "vectors", the queries and keys (1, group + 1, T, Hkv, D) whose
    energies are compared; "weights" (heads, T, T) of the heads that attend by dot product."""
    kept, local, energies, operator = {}, attention.local, attention.energies, attention.operator

    def watched_local(qk, v, *more):
        kept["weights"] = operator_weights(lambda unit: local(qk, unit, *more)[0], v)
        return local(qk, v, *more)

    def watched_energies(qk, *more):
        kept["vectors"] = qk
        return energies(qk, *more)

    def watched_dot(q, k, v, *more, **named):
        kept["weights"] = operator_weights(lambda unit: operator(q, k, unit, *more, **named), v)
        return operator(q, k, v, *more, **named)

    attention.local, attention.energies = watched_local, watched_energies
    if attention.config.attention == "dot":
        attention.operator = watched_dot
    return kept


def edge_parts(x, graph):
    """What the energies of x (T, D) are made of: E = sum over i < j of -g_ij (x_i - x_j)^2 / (x^T x + eps), g (D, D) being the head's
    graph. The TOP terms that count most: {"pairs": (T, TOP, 2) of i and j, "terms": (T, TOP)}."""
    import torch

    from ops.fused import ENERGY_EPS

    i, j = torch.triu_indices(*graph.shape, 1)
    terms = -graph[i, j] * (x[:, i] - x[:, j]).square() / (x.square().sum(1, keepdim=True) + ENERGY_EPS)
    most = terms.abs().topk(min(TOP, len(i))).indices
    return {"pairs": packed(torch.stack([i[most], j[most]], -1), "u2"), "terms": packed(terms.gather(1, most))}


def head_graphs(model, layer):
    """(g (Hkv, D, D), eigenvalues (Hkv, D)) of the graphs that the energies of a layer are of: the heads' Laplacians, or, with
    spectral_filter, what the layer's learned numbers make of them."""
    import torch

    if not model.config.spectral_filter:
        return model.laplacian, torch.linalg.eigvalsh(model.laplacian)
    scaled = model.laplacian * (model.blocks[layer].attention.log_filter.view(len(model.laplacian), 1, -1) / 2).exp()
    return scaled @ scaled.mT, scaled.square().sum(1)


def layer_record(model, layer, kept, seen):
    """What the page needs of one layer. kept: of watch(); seen: the layer's Seen, of tau attention. Where "weights" are kept, of the
    first heads, they are rows of the last `width` keys; those of tau heads the page computes by itself, from what it gets of seen."""
    import torch

    from model import queries_keys
    from ops.attention import attention_weights

    config, record, weights = model.config, {}, []
    if "weights" in kept:
        weights = [kept["weights"]]
        n, width = weights[0].size(1), config.local_window if config.local_heads else config.block_size
        rows = torch.cat([weights[0][:, i, max(0, i + 1 - width) : i + 1] for i in range(n)], 1)
        record |= {"rows": packed((-rows.double().log() * LOG_STEPS).clamp(0, 65535).round(), "u2"), "width": width}
    if seen is not None:
        weights.append(attention_weights(*seen[2:])[0])
        for name in ("lambda_q", "lambda_k", "log_decay", "key_bias", "sink"):
            record[name] = None if getattr(seen, name) is None else packed(getattr(seen, name))
        record |= {"E_q": packed(seen.E_q[0].T), "E_k": packed(seen.E_k[0].T)}
        heads, temperature = seen.lambda_q.size(1), torch.as_tensor(seen.temperature)
        record |= {"temperature": packed(temperature.expand(heads)), "tau": packed(model.blocks[layer].attention.log_tau.exp())}
        graphs, eigenvalues = head_graphs(model, layer)
        record["eigenvalues"] = packed(eigenvalues)
        q, k = (x[0] for x in queries_keys(kept["vectors"]))
        group = len(q) // len(k)
        record["query_parts"] = [edge_parts(x, graphs[head // group]) for head, x in enumerate(q)]
        record["key_parts"] = [edge_parts(x, graph) for x, graph in zip(k, graphs)]
    p = torch.cat(weights).double()  # (H, T, T)
    age = torch.arange(p.size(1))[:, None] - torch.arange(p.size(1))
    entropy, distance = torch.special.entr(p).sum(-1).mean(-1), (p * age).sum((1, 2)) / p.sum((1, 2)).clamp_min(1e-30)
    return record | {"entropy": packed(entropy), "distance": packed(distance)}


def text_record(model, tokenizer, tokens):
    """What the page needs of a text: its tokens, the layers, and the likeliest next tokens at each place."""
    import torch

    seen, kept = [], [watch(block.attention) for block in model.blocks]
    with torch.no_grad():
        if model.config.attention == "tau":
            with model.recording() as seen:
                logits = model(torch.tensor([tokens]))[0]
        else:
            logits = model.eval()(torch.tensor([tokens]))[0]
        layers = [layer_record(model, layer, kept[layer], seen[layer] if seen else None) for layer in range(len(kept))]
    p = logits.double().softmax(-1)  # (T, V)
    likeliest = p.topk(min(TOP, p.size(1)))
    after = p[:-1].gather(1, torch.tensor(tokens[1:], dtype=torch.long)[:, None])
    known = sorted({*tokens, *likeliest.indices.flatten().tolist()})
    return {
        "tokens": tokens,
        "pieces": pieces(tokenizer, tokens),
        "names": {token: tokenizer.decode_bytes([token]).decode(errors="backslashreplace") for token in known},
        "next": packed(likeliest.indices, "u4"),
        "next_p": packed(likeliest.values),
        "after_p": packed(after),
        "after_rank": packed((p[:-1] > after).sum(1), "u4"),
        "layers": layers,
    }


def pieces(tokenizer, tokens):
    """The text that each token adds to what is shown: a character of several tokens stands at the last of them."""
    from sample import Text

    shown = Text(tokenizer)
    return [shown.add(token) + (shown.end() if at == len(tokens) - 1 else "") for at, token in enumerate(tokens)]


def layout(W):
    """Places (F, 2) in the unit square of the features of a graph with the weights W (F, F): edges pull, all push each other away
    (Fruchterman and Reingold 1991), beginning with the eigenvectors of the smallest eigenvalues."""
    vectors = np.linalg.eigh(laplacian_of(W))[1]
    places, near = np.stack([vectors[:, 1], vectors[:, min(2, len(W) - 1)]], 1), 1 / math.sqrt(len(W))
    places = places / np.abs(places).max() / 2 + 1e-4 * np.random.default_rng(0).standard_normal(places.shape)
    for heat in np.geomspace(0.1, 0.001, ROUNDS):
        between = places[:, None] - places
        distance = np.sqrt((between**2).sum(-1)) + np.eye(len(W))
        force = near**2 / distance**2 - W / W.max() * distance / near
        moves = (between * force[..., None]).sum(1)
        places += moves * np.minimum(1, heat / (np.linalg.norm(moves, axis=1, keepdims=True) + 1e-12))
    return (places - places.min(0)) / np.ptp(places, 0).clip(1e-9)


def memory_record(model, L, settings, tokenizer, data_dir):
    """What the page needs of the domain's graph L (F, F): its features, with their words, edges and eigenvalues."""
    config, W = model.config, np.diag(np.diag(L)) - L
    i, j = np.nonzero(np.triu(W > 0, 1))
    heaviest = np.argsort(-W[i, j], kind="stable")[:MOST_EDGES]
    own = len(L) == config.n_embd and len(L) != config.head_size  # a head has its own part of the features
    group = config.n_head // config.n_kv_head
    words, why = feature_words(L, settings, tokenizer, data_dir)
    return {
        "places": packed(layout(W)),
        "edges": len(i),
        "pairs": packed(np.stack([i[heaviest], j[heaviest]], -1), "u2"),
        "weights": packed(W[i, j][heaviest]),
        "words": words,
        "why": why,
        "eigenvalues": packed(np.linalg.eigvalsh(L)),
        "first": [head * group * config.head_size if own else 0 for head in range(config.local_kv_heads, config.n_kv_head)],
    }


def feature_words(L, settings, tokenizer, data_dir):
    """(words of each feature of L, None), or (None, why there are none). They come from beside the embeddings that L was built from, in
    the folder data_dir, or where the run's settings say."""
    try:
        folder = Path(data_dir or settings["data_dir"])
        path = folder / "laplacian.parquet" if data_dir else Path(settings["laplacian"])
        if not path.exists():
            return None, f"{path} is not there, seen from here: --data_dir names the folder of the corpus."
        stored, said, made = load_laplacian(path), said_beside(path), said_beside(folder / "embeddings.npy")
        if stored.shape != L.shape or not np.allclose(stored, L, rtol=1e-4, atol=1e-6 * np.abs(L).max()):
            return None, f"{path} is another graph than the run's."
        if "sha256" not in said or said.get("graph") in ("chain", "complete"):
            return None, f"the graph is a {said.get('graph', 'given')} one, and not made of words."
        if said.get("columns") != len(L):
            return None, f"its {len(L)} features are random mixtures of the embeddings' {said.get('columns')}."
        if said["sha256"] != made.get("embeddings"):
            return None, f"{folder} does not hold the embeddings that the graph was built from."
        if (folder / "lsa.npz").exists():
            with np.load(folder / "lsa.npz") as file:
                words, vectors = file["words"].tolist(), file["vectors"]
        elif json.loads((folder / "tokenizer.json").read_text()) != tokenizer.to_json():
            return None, f"{folder} has another vocabulary than the run."
        else:
            words, vectors = token_strings(tokenizer), np.load(folder / "token_embeddings.npy")
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-9)
        if vectors.shape != (len(words), len(L)):
            raise ValueError(f"its words have {vectors.shape} numbers")
    except (UserError, OSError, *DAMAGED_ARRAY) as error:
        return None, f"they could not be read ({error})."
    order = np.argsort(-vectors, 0, kind="stable")
    return [[words[at] for at in order[:TOP, f] if vectors[at, f] > 0 and words[at]] for f in range(len(L))], None


def curves_record(folder):
    """The curves of a run's metrics.jsonl and diagnostics.jsonl; None where it has none."""
    if not (folder / "metrics.jsonl").exists():
        return None
    from plot import read_diagnostics, read_metrics

    def number(value):
        return value if isinstance(value, float | int) and abs(value) < 1e300 else None  # no NaN, which JSON lacks

    record = {}
    for split, lines in read_metrics(folder).items():
        lines = [*lines[: -1 : -(-len(lines) // MOST_POINTS)], *lines[-1:]]
        record[split] = {name: [number(line.get(name)) for line in lines] for name in CURVES}
    if (folder / "diagnostics.jsonl").exists():
        tokens, lambdas = read_diagnostics(folder)  # (N,), (N, layers, heads, 3)
        step = -(-len(tokens) // (MOST_POINTS // 5))
        record["bands"] = {"tokens": tokens[::step].tolist(), "lambda_k": packed(lambdas[::step]), "shape": lambdas[::step].shape}
    return record


def page(path, text, data_dir):
    """The page, as text, of a checkpoint and a text. Raises UserError for a text that is too long, or that its tokenizer cannot read."""
    import torch

    from training import checkpoint
    from training.diagnostics import NEAR, PERCENTILES

    tensors, header = checkpoint.read(path)
    model, tokenizer = checkpoint.build_model(tensors, header, path), tokenizers.from_json(header["tokenizer"])
    tokens, config = tokenizer.encode(text), model.config
    if len(tokens) > min(config.block_size, MOST_TOKENS):
        limit = f"the model's context holds {config.block_size}" if len(tokens) > config.block_size else f"a page shows {MOST_TOKENS:,}"
        raise UserError(f"the text has {len(tokens):,} tokens, and {limit}: give a shorter text")
    state, curves = checkpoint.RunState.of(header, path), None
    try:
        curves = curves_record(path.parent)
    except UserError as error:
        note(f"view.py: warning: {error}: the page has no curves")
    data = {
        "run": str(path.parent),
        "file": path.name,
        "step": state.step,
        "loss": state.best_loss if math.isfinite(state.best_loss) else None,
        "config": asdict(config),
        "near": NEAR,
        "percentiles": PERCENTILES,
        "log_steps": LOG_STEPS,
        "text": text_record(model, tokenizer, tokens),
        "memory": None,
        "curves": curves,
    }
    if config.attention == "tau":
        with torch.no_grad():
            data["memory"] = memory_record(model, tensors["laplacian"].double().numpy(), header["run"].get("settings"), tokenizer, data_dir)
    safe = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")  # so that no text ends the element
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace(EMPTY, EMPTY.replace("null", safe), 1)


def main():
    options = Parser(__doc__)
    options.add_argument("out_dir", metavar="OUT_DIR", help="output folder of train.py, whose best checkpoint is taken, or a checkpoint")
    group = options.add_argument_group("the text")
    group.add_argument("--text", help="up to as many tokens as the model's context")
    group.add_argument("--text_file", metavar="FILE", help="file that holds it; - for standard input")
    group = options.add_argument_group("the page")
    group.add_argument("--out", type=Path, metavar="FILE.html", help="(default: view.html in OUT_DIR, or beside the checkpoint)")
    group.add_argument("--data_dir", metavar="DIR", help="corpus whose words the graph's features stand for (default: the run's)")
    group.add_argument(
        "--overwrite", action="store_true", help="replace a file that is there already; a page of view.py's, without --out, always is"
    )
    args = options.parse_args()
    if args.text is None and args.text_file is None:
        raise UserError('no text is given: give --text="..." or --text_file=FILE')
    if args.text is not None and args.text_file is not None:
        raise UserError("give --text or --text_file, not both")
    text = read_text(args.text_file) if args.text is None else args.text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if not text:
        raise UserError("--text= is an empty text" if args.text_file is None else f"{args.text_file} holds no text")
    if args.data_dir is not None and not Path(args.data_dir).is_dir():
        raise UserError(f"--data_dir={args.data_dir} is no folder: give that of the corpus, or leave it out")
    path = checkpoint_file.find(args.out_dir)
    out = args.out or path.parent / "view.html"
    mine = args.out is None and out.is_file() and GENERATOR in out.read_bytes()
    check_place(out, ".html", args.overwrite or mine)
    with waiting("computing the page"):
        written = page(path, text, args.data_dir)
    with replacing(out) as temporary:
        temporary.write_text(written, encoding="utf-8")
    print(f"page: {out}")


if __name__ == "__main__":
    run(main)
