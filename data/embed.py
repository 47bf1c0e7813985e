"""Texts -> embeddings.npy (N, F) float32, one row for each document of a prepared corpus's training split, and
token_embeddings.npy (V, F), one for each token of its vocabulary (embedding_init = "domain" starts from it). embeddings.json says by
their hashes of which corpus and vocabulary they are.

lsa, the default, is latent semantic analysis (Deerwester et al. 1990): TF-IDF of the documents' words, the F largest
singular directions, rotated so that each stands for few words (varimax), rows of unit length. It needs no download.
The rotation changes no distance between documents, but a graph of features needs it: as the SVD leaves them, any two
feature columns are orthogonal, and no feature has neighbours. lsa.npz keeps the words and their vectors, for other texts.
Any other --model is a sentence-transformers model, by name or by path; all-MiniLM-L6-v2 is the published run's."""

import errno
import hashlib
import json
import sys
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DAMAGED_ARRAY, Parser, UserError, refuse_existing, replacing, run, waiting  # isort: skip, for it tells of packages that are missing
import numpy as np

from data.corpus import Corpus
from data.sources import seek_hub


def lsa(texts, dim, seed):
    """((N, dim) float32, words, idf (W,), vectors (W, dim)): the documents' embeddings, rows of unit length (of zeros for a
    document that shares no word with another), and what lsa_embeddings() needs to embed other texts. Raises UserError for
    a corpus that is too small."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, max_features=50_000)
    try:
        tfidf = vectorizer.fit_transform(texts)
    except UserError:  # a damaged corpus; UserError is a ValueError too
        raise
    except ValueError:  # no word occurs in two documents
        raise UserError("no word occurs in two documents: the corpus is too small for --model=lsa") from None
    if dim >= min(tfidf.shape):
        raise UserError(
            f"--dim={dim} needs more than {dim} documents and words; the corpus has {tfidf.shape[0]} and "
            f"{tfidf.shape[1]}: take a smaller --dim"
        )
    svd = TruncatedSVD(dim, random_state=seed)
    documents = svd.fit_transform(tfidf)
    rotation = varimax(svd.components_.T)
    return (
        normalize(documents @ rotation).astype(np.float32),
        vectorizer.get_feature_names_out().astype(str),
        vectorizer.idf_,
        (svd.components_.T @ rotation).astype(np.float32),
    )


def lsa_embeddings(texts, path):
    """Embeddings (N, F) float32 of other texts by the lsa.npz of a corpus: rows of unit length, or of zeros for a text without
    any of its words. Raises UserError if the file is damaged."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.preprocessing import normalize

    try:
        with np.load(path) as file:
            words, idf, vectors = file["words"], file["idf"], file["vectors"]
        if not len(words) == len(idf) == len(vectors) or vectors.ndim != 2:
            raise ValueError("its arrays do not fit together")
        counts = CountVectorizer(vocabulary=words.tolist()).transform(texts).astype(float)
    except DAMAGED_ARRAY as error:
        raise UserError(f"{path} is damaged ({error}): make it again with data/embed.py --overwrite") from None
    counts.data = (1 + np.log(counts.data)) * idf[counts.indices]
    return normalize(counts @ vectors).astype(np.float32)


def lsa_token_embeddings(tokenizer, words, idf, vectors):
    """(V, F) float32: for each token the mean vector of the words that it is part of, weighted by how many documents have the
    word; rows of zeros for tokens that are in no word."""
    from scipy.sparse import csr_array

    tokens, parts = [], []
    for number, word in enumerate(words):
        for form in (word, f" {word}", word.capitalize(), f" {word.capitalize()}", word.upper()):
            try:
                tokens += (ids := tokenizer.encode(form))
                parts += [number] * len(ids)
            except UserError:  # a character that is not in the vocabulary
                pass
    weights = csr_array((np.exp(-idf)[parts], (tokens, parts)), shape=(tokenizer.vocab_size, len(words)))
    return (weights @ vectors / np.maximum(weights.sum(1), 1e-12)[:, None]).astype(np.float32)


def varimax(loadings):
    """(F, F) rotation R that makes each column of loadings @ R, (words, F), large for few words (Kaiser 1958), with
    the large ones positive."""
    rotation = np.eye(loadings.shape[1])
    for _ in range(30):
        turned = loadings @ rotation
        left, _, right = np.linalg.svd(loadings.T @ (turned**3 - turned * (turned**2).mean(0)))
        rotation = left @ right
    return rotation * np.sign(((loadings @ rotation) ** 3).sum(0))


def sentence_model(texts, name, dim=None):
    """(N, F) float32, rows of unit length, by a sentence-transformers model, whose own F a given dim must equal. Raises UserError."""
    if not Path(name).exists():
        seek_hub()
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError(
            f"{name!r}, as a sentence model, needs sentence-transformers: `pip install sentence-transformers`; lsa needs nothing"
        ) from None
    try:
        model = SentenceTransformer(name)
    except Exception as error:  # whatever the hub's client raises without a network
        raise UserError(
            f"{name!r} could not be loaded as a sentence model ({type(error).__name__}): give the path of a downloaded one; lsa needs none"
        ) from None
    F = len(model.encode(""))
    if dim not in (None, F):
        raise UserError(f"--dim={dim}: {name} makes {F} features; leave --dim out here and give it to build_laplacian.py")
    return model.encode(list(texts), normalize_embeddings=True, show_progress_bar=True).astype(np.float32)


def token_strings(tokenizer):
    """What each token stands for, without the space around it: "" for the end token and for parts of a character."""
    texts = (tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size))
    texts = [text.decode(errors="ignore").strip() for text in texts]
    if tokenizer.end_token is not None:
        texts[tokenizer.end_token] = ""
    return texts


def main():
    options = Parser(__doc__)
    options.add_argument("data_dir", type=Path, metavar="DATA_DIR", help="a prepared corpus")
    options.add_argument("--model", default="lsa", help="lsa (default), or a sentence-transformers model")
    options.add_argument("--dim", type=int, help="features F of lsa (default: 384)")
    options.add_argument(
        "--documents", type=int, help="only the first so many; lsa holds its words in memory, about 2 KB a document (default: all)"
    )
    options.add_argument("--seed", type=int, default=0, help="of the randomised SVD (default: %(default)s)")
    options.add_argument("--overwrite", action="store_true", help="replace embeddings that are there already")
    args = options.parse_args()
    for name in ("dim", "documents"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < 2**31:
            raise UserError(f"--{name}={getattr(args, name)} must be positive and below 2^31")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed={args.seed} must be 0 or more and below 2^32")
    corpus = Corpus(args.data_dir)
    for name in ("embeddings.npy", "token_embeddings.npy", "lsa.npz", "embeddings.json"):
        refuse_existing(args.data_dir / name, args.overwrite)

    def digest(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    files = {}
    texts = islice(corpus.documents("train"), args.documents)
    if args.model == "lsa":
        with waiting("counting words and reducing them to features, seconds to minutes"):
            embeddings, words, idf, vectors = lsa(texts, args.dim or 384, args.seed)
        with waiting("giving the vocabulary's tokens the vectors of their words"):
            tokens = lsa_token_embeddings(corpus.tokenizer, words, idf, vectors)
        files["lsa.npz"] = lambda file: np.savez(file, words=words, idf=idf, vectors=vectors)
    else:
        embeddings, strings = sentence_model(texts, args.model, args.dim), token_strings(corpus.tokenizer)
        tokens = sentence_model(strings, args.model)
        tokens[[not string for string in strings]] = 0
    files["token_embeddings.npy"] = partial(np.save, arr=tokens)
    files["embeddings.npy"] = partial(np.save, arr=embeddings)
    with ExitStack() as stack:  # left in reverse order: embeddings.json is renamed last
        paths = {name: stack.enter_context(replacing(args.data_dir / name)) for name in ("embeddings.json", *files)}
        for name, save in files.items():
            try:
                with open(paths[name], "wb") as file:
                    save(file)
            except OSError as error:  # which does not name the file; numpy's own, for a full disk, has no number either
                what = f"{args.data_dir / name} could not be written: {error.strerror or error}"
                raise OSError(error.errno or errno.ENOSPC, what) from None
        made = {"corpus": corpus.meta.get("sha256"), "vocabulary": digest(args.data_dir / "tokenizer.json"), "model": args.model}
        made |= {"embeddings": digest(paths["embeddings.npy"]), "token_embeddings": digest(paths["token_embeddings.npy"])}
        paths["embeddings.json"].write_text(json.dumps(made, indent=1) + "\n")
        (args.data_dir / "embeddings.json").unlink(missing_ok=True)
        if "lsa.npz" not in files:
            (args.data_dir / "lsa.npz").unlink(missing_ok=True)  # it belongs to other features
    print(f"{args.data_dir / 'embeddings.npy'}: {embeddings.shape[0]:,} documents, {embeddings.shape[1]} features")


if __name__ == "__main__":
    run(main)
