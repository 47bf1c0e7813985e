import hashlib
import json
import re
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, fails, ok
from matplotlib.image import imread

import build_laplacian
import data.embeddings
from build_laplacian import load_laplacian, neighbour_graph, save_laplacian
from common import UserError


def embeddings(N=200, F=12, seed=0):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((N, 5)) @ generator.standard_normal((5, F)) + 0.3 * generator.standard_normal((N, F))


def by_definition(X, k=25, topk=15, eps=1.31, p=1.8, sigma=0.535):
    """The recipe, a pair of features at a time, for a graph that is connected by itself."""
    F = X.shape[1]
    distance = np.array(
        [[1 - max(0, X[:, a] @ X[:, b] / np.sqrt((X[:, a] @ X[:, a]) * (X[:, b] @ X[:, b]))) for b in range(F)] for a in range(F)]
    )
    W = np.zeros((F, F))
    for a in range(F):
        nearest = sorted((distance[a, b].round(12), b) for b in range(F) if b != a)[: min(k, topk, F - 1)]
        for d, b in nearest:
            if d <= eps:
                W[a, b] = W[b, a] = 1 / (1 + (distance[a, b] / sigma) ** p)
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


def gram(path, **options):
    return build_laplacian.gram_matrix(build_laplacian.opened(path), **options)


def write_columns(path, X, **options):
    pyarrow.parquet.write_table(pyarrow.table({f"col_{i}": X[:, i] for i in range(X.shape[1])}), path, **options)


def write_lists(path, X, type):
    pyarrow.parquet.write_table(pyarrow.table({"embedding": pyarrow.array(list(X), type)}), path, row_group_size=50)


def test_every_form_of_embeddings_gives_the_same(tmp_path, monkeypatch):
    X = np.random.default_rng(0).integers(-9, 9, (200, 12)).astype(float)
    for kind in ("float16", "float32", "float64"):
        np.save(tmp_path / f"{kind}.npy", X.astype(kind))
        write_columns(tmp_path / f"{kind}.parquet", X.astype(kind), row_group_size=30)
    for name, kind in (
        ("list", pyarrow.list_(pyarrow.float32())),
        ("fixed", pyarrow.list_(pyarrow.float64(), 12)),
        ("large", pyarrow.large_list(pyarrow.float16())),
    ):
        write_lists(tmp_path / f"{name}.parquet", X.astype("float16" if name == "large" else float), kind)
    forms = list(tmp_path.iterdir())
    (tmp_path / "shards").mkdir()
    np.save(tmp_path / "shards" / "a.npy", X[:90])
    write_lists(tmp_path / "shards" / "b.parquet", X[90:120], pyarrow.list_(pyarrow.float32()))
    write_columns(tmp_path / "shards" / "c.parquet", X[120:])
    for rows in (7, 4096):
        monkeypatch.setattr(data.embeddings, "CHUNK_ROWS", rows)
        for path in (*forms, tmp_path / "shards"):
            found, count = gram(path)
            assert count == 200 and (found == X.T @ X).all(), path
            np.testing.assert_allclose(gram(path, center=True)[0], 200 * np.cov(X.T, bias=True), atol=1e-9)


def test_row_groups_may_be_empty(tmp_path):
    X = embeddings()
    with pyarrow.parquet.ParquetWriter(tmp_path / "e.parquet", pyarrow.schema([(f"c{i}", pyarrow.float64()) for i in range(12)])) as writer:
        for rows in (X[:0], X[:50], X[:0], X[50:]):
            writer.write_table(pyarrow.table({f"c{i}": rows[:, i] for i in range(12)}))
    found, count = gram(tmp_path / "e.parquet", center=True)
    assert count == 200
    np.testing.assert_allclose(found, 200 * np.cov(X.T, bias=True))


def test_center_does_not_cancel(tmp_path):
    """Means of 1e6 beside deviations of 1; a constant feature becomes one of zeros."""
    X = embeddings() + 1e6
    X[:, 5] = 0.1
    np.save(tmp_path / "e.npy", X)
    found, _ = gram(tmp_path / "e.npy", center=True)
    X -= X[0]
    np.testing.assert_allclose(found, 200 * np.cov(X.T, bias=True), atol=1e-6)
    assert (found[5] == 0).all()
    assert "1 of 12 features are constant" in ok("build_laplacian.py", "e.npy", "--center", "--out=l.parquet", cwd=tmp_path)


def torchrun(folder, *options):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--local_addr=127.0.0.1",
            "--nproc_per_node=2",
            ROOT / "build_laplacian.py",
            *options,
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_two_processes_equal_one(tmp_path):
    (tmp_path / "shards").mkdir()
    X = embeddings(N=9000)
    np.save(tmp_path / "shards" / "a.npy", X[:7000])
    write_columns(tmp_path / "shards" / "b.parquet", X[7000:])
    done = torchrun(tmp_path, "shards", "--out=two.parquet", "--center")
    assert done.returncode == 0 and done.stdout.count("12 features") == 1, done.stderr
    ok("build_laplacian.py", "shards", "--out=one.parquet", "--center", cwd=tmp_path)
    one, two = (load_laplacian(tmp_path / name) for name in ("one.parquet", "two.parquet"))
    np.testing.assert_allclose(one, two, atol=1e-10)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["sha256"] == two["sha256"] and one["rows"] == two["rows"] == 9000
    X[5000, 3] = np.inf  # of the second process's part
    np.save(tmp_path / "shards" / "a.npy", X[:7000])
    done = torchrun(tmp_path, "shards", "--out=bad.parquet")
    assert done.returncode == 1 and "on rank 1: shards/a.npy: row 5000 holds NaN or infinity" in done.stderr
    assert not (tmp_path / "bad.parquet").exists()


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


def test_random_control_has_degrees_and_weights_of_the_domain(tmp_path):
    np.save(tmp_path / "e.npy", embeddings(F=40))
    for name, options in (
        ("domain", []),
        ("random", ["--graph=random"]),
        ("again", ["--graph=random"]),
        ("other", ["--graph=random", "--seed=1"]),
    ):
        ok("build_laplacian.py", "e.npy", "--k=6", f"--out={name}.parquet", *options, cwd=tmp_path)
    domain, random, again, other = (load_laplacian(tmp_path / f"{name}.parquet") for name in ("domain", "random", "again", "other"))
    pairs = np.triu_indices(40, 1)
    for control in (random, other):
        assert ((control != 0).sum(1) == (domain != 0).sum(1)).all()
        np.testing.assert_array_equal(np.sort(control[pairs]), np.sort(domain[pairs]))
        assert ((control != 0) & (domain != 0))[pairs].sum() < 0.5 * (domain[pairs] != 0).sum()
    assert (random == again).all() and (random != other).any()


def test_dim_projects_first(built):
    out = ok("build_laplacian.py", "e.npy", "--dim=6", "--out=l.parquet", cwd=built)
    assert "6 features" in out
    projection = np.random.default_rng(0).standard_normal((12, 6))
    np.testing.assert_allclose(
        load_laplacian(built / "l.parquet"), by_definition(np.load(built / "e.npy").astype(float) @ projection), atol=1e-6
    )


def test_features_of_zeros_stay_connected(tmp_path):
    X = embeddings()
    X[:, 3] = X[:, 9] = 0
    np.save(tmp_path / "e.npy", X)
    assert "2 of 12 features are zero" in ok("build_laplacian.py", "e.npy", "--out=l.parquet", cwd=tmp_path)
    L = load_laplacian(tmp_path / "l.parquet")
    assert L[3, 0] == pytest.approx(-1 / (1 + (1 / 0.535) ** 1.8))


def recipe(gram):
    """The domain's Laplacian as the command builds it."""
    distances = build_laplacian.feature_distances(gram)
    edges, _ = neighbour_graph(distances, k=4, topk=15, eps=1.31)
    return build_laplacian.laplacian_of(build_laplacian.edge_weights(distances, edges, 1.8, 0.535))


@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 2**32),
    N=st.integers(1, 60),
    F=st.integers(2, 20),
    zeros=st.integers(0, 3),
    twins=st.booleans(),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    parts=st.integers(1, 7),
)
def test_any_embeddings_give_a_laplacian(seed, N, F, zeros, twins, scale, parts):
    """Also for fewer rows than features, features of zeros, equal features and equal rows. The order of the rows and the
    parts they are summed in do not matter, where no two distances tie."""
    generator = np.random.default_rng(seed)
    X = scale * generator.standard_normal((N, F))
    X[:, generator.integers(F, size=zeros)] = 0
    if twins:
        X[:, 0], X[-1] = X[:, F - 1], X[0]
    L = recipe(X.T @ X)
    build_laplacian.check_laplacian(L, "L")
    assert (L == recipe(X.T @ X)).all()
    other = recipe(sum(part.T @ part for part in np.array_split(generator.permutation(X), parts)))
    distances = np.sort(build_laplacian.feature_distances(X.T @ X)[np.triu_indices(F, 1)])
    gaps = np.diff(distances[distances < 1])
    if not len(gaps) or gaps.min() > 1e-9:
        np.testing.assert_allclose(other, L, atol=1e-9)


def test_inspect(built):
    ok("build_laplacian.py", "e.npy", "--k=4", "--out=l.parquet", cwd=built)
    out = ok("build_laplacian.py", "--inspect", "l.parquet", "--n_head=3", cwd=built)
    L = load_laplacian(built / "l.parquet")
    assert "features     12\n" in out and f"edges        {np.count_nonzero(np.triu(L, 1))}," in out and "head 2" in out
    assert f"eigenvalues  0, {np.linalg.eigvalsh(L)[1]:.4g} (connectivity)" in out
    assert imread(built / "l.png").std() > 0.05
    assert ok("build_laplacian.py", "--inspect", "l.parquet", "--n_head=3", cwd=built) == out  # its own figure is drawn again
    (built / "l.png").write_bytes(b"a picture of the user's")
    assert "l.png exists already" in fails("build_laplacian.py", "--inspect", "l.parquet", cwd=built)
    (built / "l.png").unlink()
    settings = json.loads((built / "l.json").read_text())
    assert settings["sha256"] == hashlib.sha256((built / "e.npy").read_bytes()).hexdigest()
    assert settings["edges"] == np.count_nonzero(np.triu(L, 1)) and settings["connectivity"] > 0


def coordinate_table(L, **changes):
    """The author's file: as the specification has it, written by pyarrow alone."""
    row, col = (np.asarray(index, np.uint64) for index in np.nonzero(L))
    n = len(row)
    columns = {
        "name_id": ["domain"] * n,
        "n_rows": np.full(n, len(L), np.uint64),
        "n_cols": np.full(n, len(L), np.uint64),
        "nnz": np.full(n, n, np.uint64),
        "row": row,
        "col": col,
        "value": L[np.nonzero(L)].astype(float),
    } | changes
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
    changes = {
        "not square": {"n_cols": np.full(n, 13, np.uint64)},
        "no column value": {"value": None},
        "past its": {"row": np.full(n, 10**6, np.uint64)},
        "features; 1 to": {"n_rows": np.full(n, 10**12, np.uint64), "n_cols": np.full(n, 10**12, np.uint64)},
        "twice": {"row": np.zeros(n, np.uint64)},
        "row holds a null": {"row": pyarrow.array([None, *range(n - 1)], pyarrow.uint64())},
        "value holds a null": {"value": pyarrow.array([*L[np.nonzero(L)][:-1], None])},
        "not a Laplacian file": {"col": np.full(n, -1)},
        "it announces": {"nnz": np.full(n, 5, np.uint64)},
        "one number on every row": {"n_rows": np.arange(n).astype(np.uint64)},
    }.get(what, {})
    return coordinate_table(L, **changes)


def test_damaged_laplacian(tmp_path):
    """Each with its own line; of an entry that is wrong, the row of the file."""
    L = by_definition(embeddings())
    for what, row in (
        ("not symmetric", ""),
        ("a row sums to", ""),
        ("not positive semi-definite", ""),
        ("NaN", "in row 0 its entry at \\(0, 0\\) is"),
        ("not connected", ""),
        ("not square", ""),
        ("no column value", ""),
        ("past its", "in row 0 it has an entry at \\(1000000, 0\\)"),
        ("features; 1 to", ""),
        ("twice", "in row 12 it has the entry"),
        ("it announces", ""),
        ("one number on every row", ""),
        ("row holds a null", "in row 0 its column"),
        ("value holds a null", f"in row {np.count_nonzero(L) - 1} its column"),
        ("not a Laplacian file", "-1"),
    ):
        pyarrow.parquet.write_table(broken(L, what), tmp_path / "l.parquet")
        with pytest.raises(UserError, match=what) as error:
            load_laplacian(tmp_path / "l.parquet")
        assert re.search(row, str(error.value)), (what, error.value)


def test_what_is_no_laplacian(tmp_path):
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "lfs.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    np.save(tmp_path / "e.npy", embeddings())
    (tmp_path / "e.npy").rename(tmp_path / "npy.parquet")
    pyarrow.parquet.write_table(pyarrow.table([[1], [2]], names=["row", "row"]), tmp_path / "two.parquet")
    for name, expected in (
        ("folder", "is a folder"),
        ("lfs", "git lfs pull"),
        ("npy", r"it is \.npy"),
        ("two", "two columns called 'row'"),
    ):
        with pytest.raises(UserError, match=expected):
            load_laplacian(tmp_path / f"{name}.parquet")


def test_a_laplacian_file_that_is_cut_or_changed(tmp_path):
    save_laplacian(tmp_path / "l.parquet", by_definition(embeddings()), {})
    content = (tmp_path / "l.parquet").read_bytes()
    cut = [content[:length] for length in range(0, len(content), len(content) // 10 + 1)]
    for damaged in (*cut, content.replace(b"value", b"val\x81e")):
        (tmp_path / "l.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match="not a whole parquet file"):
            load_laplacian(tmp_path / "l.parquet")


def nan_embeddings(path):
    X = embeddings()
    X[123, 4] = np.nan
    np.save(path, X)


@pytest.mark.parametrize(
    "args, expected",
    [
        (["nan.npy", "--out=l.parquet"], "row 123"),
        (["absent.npy", "--out=l.parquet"], "absent.npy"),
        (["--out=l.parquet"], "EMBEDDINGS"),
        (["--graph=chain", "--out=l.parquet"], "--dim"),
        (["--graph=chain", "--dim=1", "--out=l.parquet"], "--dim=1"),
        (["e.npy", "--out=l.csv"], ".parquet"),
        (["e.npy", "--out=taken.parquet"], "--overwrite"),
        (["e.npy", "--out=l.parquet", "--sigma=0"], "--sigma=0"),
        (["e.npy", "--out=l.parquet", "--graph=ring"], "ring"),
        (["one.npy", "--out=l.parquet"], "(N, F)"),
        (["short.npy", "--out=l.parquet"], "short.npy"),
        (["e.npy", "--out=nowhere/l.parquet"], "nowhere"),
        (["taken.parquet", "--out=l.parquet"], "taken.parquet"),
        (["e.npy", "--out=l.parquet", "--dim=0"], "--dim=0"),
        (["e.npy", "--out=l.parquet", "--dim=1000000000"], "--dim=1000000000"),
        (["archive.npy", "--out=l.parquet"], "archive"),
        (["e.npy", "--out=l.parquet", "--p=5000", "--sigma=1e-300"], "--sigma"),
        (["e.npy", "--out=theirs.parquet"], "theirs.json"),
        (["empty", "--out=l.parquet"], "empty holds no"),
        (["mixed", "--out=l.parquet"], "b.npy has 5 features, mixed/a.npy has 12"),
        (["uneven.parquet", "--out=l.parquet"], "lists of other lengths than the first, 12"),
        (["words.parquet", "--out=l.parquet"], "column of floats a feature"),
        (["e.npy"], "--out=FILE.parquet is missing"),
        (["zip.npy", "--out=l.parquet"], "zip.npy is not a whole .npy"),
        (["huge.npy", "--out=l.parquet"], "scale them down"),
        (["zeros.npy", "--out=l.parquet"], "every feature is zero"),
        (["wide.npy", "--out=l.parquet"], "20000 features"),
        (["turned", "--out=l.parquet"], "same order"),
        (["--graph=chain", "--dim=8", "--center", "--out=l.parquet"], "--center needs"),
        (["--graph=chain", "--dim=8", "--column=e", "--out=l.parquet"], "--column needs EMBEDDINGS"),
        (["e.npy", "--column=e", "--out=l.parquet"], "--column=e: e.npy has no named arrays"),
        (["one.csv", "--out=one.parquet"], "one.csv has one row: a graph of features is made of many documents"),
        (["e.npy", "--n_head=3", "--out=l.parquet"], "is for --inspect"),
        (["--inspect=chain.parquet", "--out=nowhere/l.png"], "nowhere"),
        (["--inspect=absent.parquet"], "absent.parquet does not exist"),
        (["e.npy", "--inspect=l.parquet"], "leave e.npy out"),
        (["--inspect=l.parquet", "--sigma=1"], "--sigma is for building"),
        (["--inspect=l.parquet", "--out=l.pdf"], ".png"),
        (["--inspect=chain.parquet", "--n_head=5"], "--n_head=5"),
        (["--inspect=theirs.parquet", "--out=theirs.png"], "--overwrite"),
    ],
)
def test_mistakes(built, args, expected):
    nan_embeddings(built / "nan.npy")
    np.save(built / "one.npy", np.zeros(5))
    (built / "one.csv").write_text("1.5,2,3\n")
    (built / "short.npy").write_bytes((built / "e.npy").read_bytes()[:100])
    (built / "taken.parquet").write_bytes(b"mine")
    (built / "theirs.json").write_text("mine")
    np.savez(built / "archive.npz", np.zeros((3, 3)))
    (built / "archive.npz").rename(built / "archive.npy")
    (built / "zip.npy").write_bytes(b"PK\x03\x04 and no more")
    for name, X in (("huge", embeddings() * 1e200), ("zeros", np.zeros((9, 4))), ("wide", np.ones((1, 20000)))):
        np.save(built / f"{name}.npy", X)
    (built / "turned").mkdir()
    for name, columns in (("a", "xy"), ("b", "yx")):
        pyarrow.parquet.write_table(pyarrow.table({column: [0.5] for column in columns}), built / "turned" / f"{name}.parquet")
    (built / "empty").mkdir()
    (built / "mixed").mkdir()
    np.save(built / "mixed" / "a.npy", embeddings())
    np.save(built / "mixed" / "b.npy", embeddings(F=5))
    pyarrow.parquet.write_table(pyarrow.table({"e": [[0.5] * 12, [0.5] * 11]}), built / "uneven.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"e": [0.5], "text": ["word"]}), built / "words.parquet")
    save_laplacian(built / "chain.parquet", by_definition(embeddings()), {})
    (built / "theirs.png").write_bytes(b"mine")
    assert expected in fails("build_laplacian.py", *args, cwd=built)
    assert (built / "taken.parquet").read_bytes() == b"mine" and not (built / "l.parquet").exists()
