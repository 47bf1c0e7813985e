import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import build_laplacian
from build_laplacian import load_laplacian, neighbour_graph, save_laplacian
from common import UserError
from conftest import fails, ok


def embeddings(N=200, F=12, seed=0):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((N, 5)) @ generator.standard_normal((5, F)) + 0.3 * generator.standard_normal((N, F))


def by_definition(X, k=25, topk=15, eps=1.31, p=1.8, sigma=0.535):
    """The recipe, a pair of features at a time, for a graph that is connected by itself."""
    F = X.shape[1]
    distance = np.array([[1 - max(0, X[:, a] @ X[:, b] / np.sqrt((X[:, a] @ X[:, a]) * (X[:, b] @ X[:, b])))
                          for b in range(F)] for a in range(F)])
    W = np.zeros((F, F))
    for a in range(F):
        nearest = sorted((distance[a, b].round(12), b) for b in range(F) if b != a)[:min(k, topk, F - 1)]
        for d, b in nearest:
            if d <= eps:
                W[a, b] = W[b, a] = 1 / (1 + (distance[a, b] / sigma)**p)
    return np.diag(W.sum(1)) - W


@pytest.fixture
def built(tmp_path):
    np.save(tmp_path / "e.npy", embeddings().astype(np.float32))
    return tmp_path


def test_recipe(built):
    ok("build_laplacian.py", "e.npy", "--out=l.parquet", cwd=built)
    np.testing.assert_allclose(load_laplacian(built / "l.parquet"), by_definition(embeddings()), atol=1e-6)
    ok("build_laplacian.py", "e.npy", "--out=m.parquet", "--k=4", "--topk=9", "--p=2", "--sigma=0.3", cwd=built)
    np.testing.assert_allclose(load_laplacian(built / "m.parquet"), by_definition(embeddings(), k=4, p=2, sigma=0.3), atol=1e-6)
    settings = json.loads((built / "m.json").read_text())
    assert settings["rows"] == 200 and settings["k"] == 4 and settings["topk"] == 9 and "--sigma=0.3" in settings["command"]


def test_parquet_embeddings_and_chunks_give_the_same(built, monkeypatch):
    X = np.load(built / "e.npy")
    pyarrow.parquet.write_table(pyarrow.table({f"col_{i}": X[:, i] for i in range(12)}), built / "e.parquet")
    whole = build_laplacian.gram_matrix(built / "e.npy")
    monkeypatch.setattr(build_laplacian, "CHUNK_ROWS", 7)
    for name in ("e.npy", "e.parquet"):
        gram, rows = build_laplacian.gram_matrix(built / name)
        assert rows == 200
        np.testing.assert_allclose(gram, whole[0], rtol=1e-12)


def test_ties_go_to_the_lower_index():
    edges, joins = neighbour_graph(np.ones((6, 6)) - np.eye(6), k=2, topk=2, eps=1.31)
    assert joins == 0
    assert [tuple(np.flatnonzero(row)) for row in edges] == [(1, 2, 3, 4, 5), (0, 2, 3, 4, 5), (0, 1), (0, 1), (0, 1), (0, 1)]


def test_components_are_joined_by_their_shortest_pair():
    position = np.array([0.0, 0.1, 0.3, 5.0, 5.2, 9.0])
    edges, joins = neighbour_graph(np.abs(position[:, None] - position), k=1, topk=1, eps=1.0)
    assert joins == 2
    assert {(a, b) for a, b in np.argwhere(edges) if a < b} == {(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)}


def test_controls(tmp_path):
    for graph in ("chain", "random", "complete"):
        ok("build_laplacian.py", f"--graph={graph}", "--dim=8", f"--out={graph}.parquet", cwd=tmp_path)
    chain = np.diag([1.0, 2, 2, 2, 2, 2, 2, 1]) - np.eye(8, k=1) - np.eye(8, k=-1)
    np.testing.assert_array_equal(load_laplacian(tmp_path / "chain.parquet"), chain)
    np.testing.assert_array_equal(load_laplacian(tmp_path / "complete.parquet"), 8 * np.eye(8) - 1)
    ok("build_laplacian.py", "--graph=random", "--dim=8", "--out=again.parquet", cwd=tmp_path)
    ok("build_laplacian.py", "--graph=random", "--dim=8", "--seed=1", "--out=other.parquet", cwd=tmp_path)
    random, again, other = (load_laplacian(tmp_path / f"{name}.parquet") for name in ("random", "again", "other"))
    assert (random == again).all() and (random != other).any()


def test_random_control_has_the_distances_of_the_domain(built):
    ok("build_laplacian.py", "e.npy", "--k=11", "--out=l.parquet", cwd=built)
    ok("build_laplacian.py", "e.npy", "--k=11", "--graph=random", "--out=r.parquet", cwd=built)
    domain, random = (load_laplacian(built / name)[np.triu_indices(12, 1)] for name in ("l.parquet", "r.parquet"))
    np.testing.assert_allclose(np.sort(domain), np.sort(random))  # k = F - 1: every pair has its edge
    assert (domain != random).any()


def test_dim_projects_first(built):
    out = ok("build_laplacian.py", "e.npy", "--dim=6", "--out=l.parquet", cwd=built)
    assert "6 features" in out
    projection = np.random.default_rng(0).standard_normal((12, 6))
    np.testing.assert_allclose(load_laplacian(built / "l.parquet"), by_definition(np.load(built / "e.npy").astype(float) @ projection),
                               atol=1e-6)


def test_features_of_zeros_stay_connected(tmp_path):
    X = embeddings()
    X[:, 3] = X[:, 9] = 0
    np.save(tmp_path / "e.npy", X)
    assert "2 of 12 features are zero" in ok("build_laplacian.py", "e.npy", "--out=l.parquet", cwd=tmp_path)
    L = load_laplacian(tmp_path / "l.parquet")
    assert L[3, 0] == pytest.approx(-1 / (1 + (1 / 0.535)**1.8))


def coordinate_table(L, **changes):
    """The author's file: as the specification has it, written by pyarrow alone."""
    row, col = (np.asarray(index, np.uint64) for index in np.nonzero(L))
    n = len(row)
    columns = {"name_id": ["domain"] * n, "n_rows": np.full(n, len(L), np.uint64), "n_cols": np.full(n, len(L), np.uint64),
               "nnz": np.full(n, n, np.uint64), "row": row, "col": col, "value": L[np.nonzero(L)].astype(float)} | changes
    return pyarrow.table({name: values for name, values in columns.items() if values is not None})


def test_file_of_the_authors_tool(tmp_path):
    L = by_definition(embeddings())
    pyarrow.parquet.write_table(coordinate_table(L), tmp_path / "l.parquet")
    np.testing.assert_array_equal(load_laplacian(tmp_path / "l.parquet"), L)
    save_laplacian(tmp_path / "m.parquet", L, {})
    table = pyarrow.parquet.read_table(tmp_path / "m.parquet")
    assert table.schema.types == coordinate_table(L).schema.types and table.column_names == coordinate_table(L).column_names


def broken(L, what):
    n = np.count_nonzero(L)
    L = L.copy()
    if what == "not symmetric":
        L[0, 1] *= 2
        L[0, 0] -= L[0].sum()
    if what == "a row sums to":
        L[0, 0] += 1
    if what == "not positive semi-definite":
        L = -L
    if what == "NaN":
        L[0, 0] = np.nan
    if what == "not connected":
        half = by_definition(embeddings(F=6))
        L = np.block([[half, np.zeros((6, 6))], [np.zeros((6, 6)), half]])
    changes = {"not square": {"n_cols": np.full(n, 13, np.uint64)}, "no column value": {"value": None},
               "past its": {"row": np.full(n, 10**6, np.uint64)}, "features; 1 to": {"n_rows": np.full(n, 10**12, np.uint64),
                                                                      "n_cols": np.full(n, 10**12, np.uint64)},
               "twice": {"row": np.zeros(n, np.uint64)}, "it announces": {"nnz": np.full(n, 5, np.uint64)},
               "one number on every row": {"n_rows": np.arange(n).astype(np.uint64)}}.get(what, {})
    return coordinate_table(L, **changes)


@pytest.mark.parametrize("what", ["not symmetric", "a row sums to", "not positive semi-definite", "NaN", "not connected",
                                  "not square", "no column value", "past its", "features; 1 to", "twice", "it announces",
                                  "one number on every row"])
def test_damaged_laplacian(tmp_path, what):
    pyarrow.parquet.write_table(broken(by_definition(embeddings()), what), tmp_path / "l.parquet")
    with pytest.raises(UserError, match=what):
        load_laplacian(tmp_path / "l.parquet")


def test_truncated_laplacian(tmp_path):
    save_laplacian(tmp_path / "l.parquet", by_definition(embeddings()), {})
    content = (tmp_path / "l.parquet").read_bytes()
    for length in range(0, len(content), len(content) // 10 + 1):
        (tmp_path / "l.parquet").write_bytes(content[:length])
        with pytest.raises(UserError, match="not a whole parquet file"):
            load_laplacian(tmp_path / "l.parquet")


def nan_embeddings(path):
    X = embeddings()
    X[123, 4] = np.nan
    np.save(path, X)


@pytest.mark.parametrize("args, expected", [
    (["nan.npy", "--out=l.parquet"], "row 123"), (["absent.npy", "--out=l.parquet"], "absent.npy"),
    (["--out=l.parquet"], "EMBEDDINGS"), (["--graph=chain", "--out=l.parquet"], "--dim"),
    (["--graph=chain", "--dim=1", "--out=l.parquet"], "--dim=1"), (["e.npy", "--out=l.csv"], ".parquet"),
    (["e.npy", "--out=taken.parquet"], "--overwrite"), (["e.npy", "--out=l.parquet", "--sigma=0"], "--sigma=0"),
    (["e.npy", "--out=l.parquet", "--graph=ring"], "ring"), (["one.npy", "--out=l.parquet"], "(N, F)"),
    (["short.npy", "--out=l.parquet"], "short.npy"), (["e.npy", "--out=nowhere/l.parquet"], "nowhere"),
    (["taken.parquet", "--out=l.parquet"], "taken.parquet"), (["e.npy", "--out=l.parquet", "--dim=0"], "--dim=0"),
    (["e.npy", "--out=l.parquet", "--dim=1000000000"], "--dim=1000000000"), (["archive.npy", "--out=l.parquet"], "archive"),
    (["e.npy", "--out=l.parquet", "--p=5000", "--sigma=1e-300"], "--sigma"), (["e.npy", "--out=theirs.parquet"], "theirs.json")])
def test_mistakes(built, args, expected):
    nan_embeddings(built / "nan.npy")
    np.save(built / "one.npy", np.zeros(5))
    (built / "short.npy").write_bytes((built / "e.npy").read_bytes()[:100])
    (built / "taken.parquet").write_bytes(b"mine")
    (built / "theirs.json").write_text("mine")
    np.savez(built / "archive.npz", np.zeros((3, 3)))
    (built / "archive.npz").rename(built / "archive.npy")
    assert expected in fails("build_laplacian.py", *args, cwd=built)
    assert (built / "taken.parquet").read_bytes() == b"mine" and not (built / "l.parquet").exists()
