"""The domain's vectors for tokens and texts, and what is done with them."""

import hashlib
import json

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import fails, metrics, ok
from matplotlib.image import imread
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from test_train import last

from build_laplacian import load_laplacian
from data.corpus import Corpus
from data.embed import lsa, lsa_embeddings, lsa_token_embeddings, token_strings
from studies.energy import auc, energies
from training import checkpoint

TEXTS = [f"the {animal} eats {food} and the {animal} sleeps" for animal in ("cat", "dog", "hen") for food in ("fish", "corn", "meat")]


def test_texts_embedded_again_have_their_embeddings(tmp_path):
    """Of a full SVD, which is exact; and what the turned components embed is what scikit-learn's do, but for the turn."""
    found, words, idf, vectors = lsa(TEXTS, 6, seed=0)
    np.savez(tmp_path / "lsa.npz", words=words, idf=idf, vectors=vectors)
    again = lsa_embeddings([*TEXTS, "zebra"], tmp_path / "lsa.npz")
    np.testing.assert_allclose(again[:-1], found, atol=1e-5)
    assert (again[-1] == 0).all()
    tfidf = TfidfVectorizer(sublinear_tf=True, min_df=2).fit_transform(TEXTS)
    plain = TruncatedSVD(6, random_state=0).fit(tfidf).transform(tfidf)
    plain /= np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(again[:-1] @ again[:-1].T, plain @ plain.T, atol=1e-5)


def test_token_embeddings_are_means_of_the_words_vectors(work):
    tokenizer = Corpus(work / "docs").tokenizer
    vectors, idf = np.array([[1.0, 0], [0, 1]], np.float32), np.array([1.0, 1 + np.log(6)])
    found = lsa_token_embeddings(tokenizer, ["return", "zzz"], idf, vectors)
    assert found.shape == (tokenizer.vocab_size, 2)
    z, n, digit = (tokenizer.encode(text)[0] for text in ("z", "n", "7"))
    assert found[n].tolist() == [1, 0] and found[z].tolist() == [0, 1] and not found[digit].any()
    both = lsa_token_embeddings(tokenizer, ["z", "zz"], idf, vectors)[z]
    assert both.tolist() == pytest.approx([2 / 3, 1 / 3])  # 2 z's in "z", " z"; 6 in "zz", " zz", "Zz", " Zz", of a sixth the documents


def test_what_a_sentence_model_is_given_of_a_token(work):
    tokenizer = Corpus(work / "docs").tokenizer
    strings = token_strings(tokenizer)
    assert len(strings) == tokenizer.vocab_size and strings[tokenizer.end_token] == "" and strings[tokenizer.encode(" ")[0]] == ""
    assert strings[tokenizer.encode(" th")[0]] in (" th".strip(), "t") and strings[0xFF] == ""  # no character begins with 0xFF


def test_training_starts_from_the_domains_token_vectors(here):
    ok("train.py", "small.toml", "--embedding_init=domain", "--max_steps=0", "--out_dir=d", cwd=here)
    ok("train.py", "small.toml", "--max_steps=0", "--out_dir=n", cwd=here)
    started, normal = (last(here / name)["model.embedding.weight"] for name in "dn")
    vectors = torch.from_numpy(np.load(here / "docs" / "token_embeddings.npy"))
    origins = [checkpoint.read(here / name / "step_00000000.safetensors")[1]["run"]["origin"] for name in "dn"]
    assert origins == [hashlib.sha256(vectors.numpy().tobytes()).hexdigest()[:12], "scratch"]  # the hash of what it began with
    known = vectors.norm(dim=1) > 0
    assert 0 < known.sum() < len(known)
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(started[known], vectors[known]), torch.ones(int(known.sum())))
    torch.testing.assert_close(started[known].norm(dim=1), torch.full((int(known.sum()),), 0.02 * 32**0.5))
    assert torch.equal(started[~known], normal[~known])
    for name in last(here / "d").keys() - {"model.embedding.weight"}:
        if "log_tau" not in name:
            assert torch.equal(last(here / "d")[name], last(here / "n")[name])


def test_a_part_of_the_corpus_is_enough_where_only_that_is_read(here):
    """A run on the first tenth gives the same as one on a file that ends there."""
    ok("train.py", "small.toml", "--train_fraction=0.1", "--out_dir=a", "--max_steps=4", "--eval_interval=2", cwd=here)
    corpus = Corpus(here / "docs")
    (here / "cut").mkdir()
    for path in (here / "docs").iterdir():
        (here / "cut" / path.name).symlink_to(path)
    for name in ("train.bin", "meta.json"):
        (here / "cut" / name).unlink()
    short = corpus.train[: -(-len(corpus.train) // 10)]
    short.tofile(here / "cut" / "train.bin")
    (here / "cut" / "meta.json").write_text(json.dumps(corpus.meta | {"train": corpus.meta["train"] | {"tokens": len(short)}}))
    ok("train.py", "small.toml", "--data_dir=cut", "--out_dir=b", "--max_steps=4", "--eval_interval=2", cwd=here)
    assert [record["loss"] for record in metrics(here / "a")] == [record["loss"] for record in metrics(here / "b")]


def test_energies_are_rayleigh_quotients():
    generator = np.random.default_rng(0)
    L, x = np.diag(np.arange(4.0)), generator.standard_normal((5, 4))
    x[3] = 0
    expected = [sum(i * value**2 for i, value in enumerate(row)) / (row @ row + 1e-6) if row.any() else np.nan for row in x]
    np.testing.assert_allclose(energies(x, L), expected)


def test_auc_counts_pairs():
    low, high = [1.0, 2, 3, 3], [2.0, 3, 5]
    pairs = [1.0 if a < b else 0.5 if a == b else 0.0 for a in low for b in high]
    assert auc(np.array(low), np.array(high)) == pytest.approx(sum(pairs) / len(pairs))


def write_records(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_energies_of_texts(here, work):
    """By the domain's LSA and from a file of embeddings: the same."""
    texts = list(Corpus(here / "docs").documents("val"))
    write_records(here / "mine.jsonl", texts)
    write_records(here / "other.jsonl", [" ".join(reversed(text.split()))[:50] for text in texts] + ["zzzz zzzz"])
    out = ok("data/energy.py", "mine.jsonl", "--laplacian=docs/laplacian.parquet", "--embeddings=docs", "--against=other.jsonl", cwd=here)
    records = [json.loads(line) for line in (here / "mine.energies.jsonl").read_text().splitlines()]
    x = lsa_embeddings(texts, here / "docs" / "lsa.npz")
    E = energies(x.astype(float), load_laplacian(here / "docs" / "laplacian.parquet"))
    known = ~np.isnan(E)
    np.testing.assert_allclose([record["energy"] for record in records if record["energy"] is not None], E[known])
    assert f"p50 {np.median(E[known]):.4f}" in out and "AUC 0." in out and "whose embedding is zero" in out
    half = min((record for record in records if record["energy"]), key=lambda record: abs(record["lambda"] - 0.5))
    assert half["energy"] == pytest.approx(np.median(E[known]), rel=0.05)
    assert out.index("most typical") < out.index(f"{np.nanmin(E):8.4f}") < out.index("least typical") < out.index(f"{np.nanmax(E):8.4f}")
    assert imread(here / "mine.energies.png").std() > 0.05

    columns = {"id": range(len(x)), "title": list(x[::-1]), "body": list(x)}
    pyarrow.parquet.write_table(pyarrow.table(columns), here / "x.parquet")
    given = ["--embeddings=x.parquet", "--column=body"]
    again = ok("data/energy.py", "mine.jsonl", "--laplacian=docs/laplacian.parquet", *given, "--out=again.jsonl", cwd=here)
    assert f"p50 {np.median(E[known]):.4f}" in again
    held_out = ok("data/energy.py", f"{work}/docs", "--laplacian=docs/laplacian.parquet", "--embeddings=docs", "--out=v.jsonl", cwd=here)
    assert f"p50 {np.median(E[known]):.4f}" in held_out
    same = ok(
        "data/energy.py",
        "mine.jsonl",
        "--laplacian=docs/laplacian.parquet",
        "--embeddings=docs",
        "--against=mine.jsonl",
        "--out=same.jsonl",
        cwd=here,
    )
    assert "AUC 0.500" in same


@pytest.mark.parametrize(
    "args, expected",
    [
        (["absent.jsonl"], "absent.jsonl"),
        (["mine.jsonl", "--embeddings=few.npy"], "few.npy has 2 rows, mine.jsonl has 3 documents"),
        (["mine.jsonl", "--embeddings=narrow.npy"], "narrow.npy has 5 features, docs/laplacian.parquet has 32"),
        (["mine.jsonl", "--embeddings=nan.npy"], "row 1 holds NaN"),
        (["mine.jsonl", "--embeddings=lfs.safetensors"], "lfs.safetensors is a Git LFS pointer"),
        (["mine.jsonl", "--column=e"], "--column=e is for files of embeddings: docs is none"),
        (["mine.jsonl", "--embeddings=absent.npz"], "absent.npz does not exist"),
        (["mine.jsonl", "--embeddings=zero.npy"], "every embedding"),
        (["mine.jsonl", "--laplacian=absent.parquet"], "absent.parquet"),
        (["mine.jsonl", "--embeddings=torn"], "torn/lsa.npz is damaged"),
        (["mine.jsonl", "--out=o.csv"], "must end in .jsonl"),
        (["mine.jsonl", "--out=taken.jsonl"], "--overwrite"),
        (["mine.jsonl", "--against_embeddings=docs"], "needs --against"),
        (["empty.jsonl"], "no documents"),
        (["mine.jsonl", "--embeddings=data/nope"], "'data/nope', as a sentence model"),
        (["mine.jsonl", "--out=nowhere/o.jsonl"], "nowhere"),
    ],
)
def test_mistakes_with_texts(here, args, expected):
    write_records(here / "mine.jsonl", TEXTS[:3])
    (here / "empty.jsonl").write_text("")
    (here / "taken.jsonl").write_text("mine")
    for name, x in (
        ("few", np.ones((2, 32))),
        ("narrow", np.ones((3, 5))),
        ("zero", np.zeros((3, 32))),
        ("nan", np.array([1, np.nan, 1])[:, None] * np.ones((3, 32))),
    ):
        np.save(here / f"{name}.npy", x)
    (here / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (here / "torn").mkdir()
    (here / "torn" / "lsa.npz").write_bytes((here / "docs" / "lsa.npz").read_bytes()[:-100])
    given = " ".join(args)
    defaults = [option for option in ("--laplacian=docs/laplacian.parquet", "--embeddings=docs") if option.split("=")[0] + "=" not in given]
    assert expected in fails("data/energy.py", *args, *defaults, cwd=here)
    assert (here / "taken.jsonl").read_text() == "mine" and not list(here.glob("*.energies.*"))


@pytest.mark.parametrize(
    "what, expected",
    [("absent", "token_embeddings.npy: make it"), ("narrow", "(290, 5), but vocabulary"), ("torn", "is damaged"), ("nan", "holds NaN")],
)
def test_mistakes_with_token_vectors(here, what, expected):
    (here / "own").mkdir()
    for path in (here / "docs").iterdir():
        if path.name != "token_embeddings.npy":
            (here / "own" / path.name).symlink_to(path)
    if what != "absent":
        np.save(here / "own" / "token_embeddings.npy", np.ones((290, 5), np.float32))
    if what == "nan":
        np.save(here / "own" / "token_embeddings.npy", np.full((290, 32), np.nan, np.float32))
    if what == "torn":
        (here / "own" / "token_embeddings.npy").write_bytes(b"\x93NUMPY")
    assert expected in fails("train.py", "small.toml", "--data_dir=own", "--embedding_init=domain", "--out_dir=o", cwd=here)
    assert not (here / "o").exists()
