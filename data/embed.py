"""Texts -> embeddings.npy (N, F) float32: one row for each document of a prepared corpus's training split.

lsa, the default, is latent semantic analysis (Deerwester et al. 1990): TF-IDF of the documents' words, the F largest
singular directions, turned so that each stands for few words (varimax), rows of unit length. It needs no download.
The turn changes no distance between documents, but a graph of features needs it: as the SVD leaves them, any two
feature columns are orthogonal, and no feature has neighbours. Any other --model is a sentence-transformers model, by
name or by path; all-MiniLM-L6-v2 is the published run's."""

import os
import sys
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Parser, UserError, refuse_existing, replacing, run
from data.corpus import Corpus


def lsa(texts, dim, seed):
    """(N, dim) float32, rows of unit length; a document without any word that others have too is a row of zeros."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize
    try:
        tfidf = TfidfVectorizer(sublinear_tf=True, min_df=2, max_features=50_000).fit_transform(texts)
    except UserError:
        raise
    except ValueError:  # no word stands in two documents
        raise UserError("no word occurs in two documents: the corpus is too small for --model=lsa") from None
    if dim >= min(tfidf.shape):
        raise UserError(f"--dim={dim} needs more than {dim} documents and words; the corpus has {tfidf.shape[0]} and "
                        f"{tfidf.shape[1]}: take a smaller --dim")
    svd = TruncatedSVD(dim, random_state=seed)
    documents = svd.fit_transform(tfidf)
    return normalize(documents @ varimax(svd.components_.T)).astype(np.float32)


def varimax(loadings):
    """(F, F) rotation R that makes each column of loadings @ R, (words, F), large for few words (Kaiser 1958), with
    the large ones positive."""
    rotation = np.eye(loadings.shape[1])
    for _ in range(30):
        turned = loadings @ rotation
        left, _, right = np.linalg.svd(loadings.T @ (turned**3 - turned * (turned**2).mean(0)))
        rotation = left @ right
    return rotation * np.sign(((loadings @ rotation)**3).sum(0))


def sentence_model(texts, name, dim):
    """(N, F) float32 of unit length, F the model's own."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are not the user's concern
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError(f"--model={name} needs sentence-transformers: `pip install sentence-transformers`, "
                        "or take --model=lsa") from None
    try:
        model = SentenceTransformer(name)
    except Exception as error:  # whatever the hub's client raises without a network
        raise UserError(f"model {name!r} could not be loaded ({type(error).__name__}): give the path of a "
                        "downloaded one, or take --model=lsa") from None
    F = len(model.encode(""))
    if dim not in (None, F):
        raise UserError(f"--dim={dim}: {name} makes {F} features; leave --dim out here and give it to "
                        "build_laplacian.py")
    return model.encode(list(texts), normalize_embeddings=True, show_progress_bar=True).astype(np.float32)


def main():
    options = Parser(__doc__)
    options.add_argument("data_dir", type=Path, metavar="DATA_DIR", help="a prepared corpus")
    options.add_argument("--model", default="lsa", help="lsa (default), or a sentence-transformers model")
    options.add_argument("--dim", type=int, help="features F of lsa (default: 384)")
    options.add_argument("--documents", type=int, help="only the first so many; lsa holds its words in memory, about "
                                                       "2 KB a document (default: all)")
    options.add_argument("--seed", type=int, default=0, help="of the randomised SVD (default: %(default)s)")
    options.add_argument("--overwrite", action="store_true", help="replace embeddings that are there already")
    args = options.parse_args()
    for name in ("dim", "documents"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be positive")
    out = args.data_dir / "embeddings.npy"
    corpus = Corpus(args.data_dir)
    refuse_existing(out, args.overwrite)
    texts = islice(corpus.documents("train"), args.documents)
    embeddings = lsa(texts, args.dim or 384, args.seed) if args.model == "lsa" \
        else sentence_model(texts, args.model, args.dim)
    with replacing(out) as temporary, open(temporary, "wb") as file:
        np.save(file, embeddings)
    print(f"{out}: {embeddings.shape[0]:,} documents, {embeddings.shape[1]} features")


if __name__ == "__main__":
    run(main)
