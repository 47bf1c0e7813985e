"""Files of embeddings as people have them: each is read to the same numbers, or refused with a line that says what it is."""

import gzip
import pickle
import zipfile

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from build_laplacian import gram_matrix
from common import UserError
from data.embeddings import all_rows, opened

N, F = 200, 12
X = np.random.default_rng(0).integers(-9, 9, (N, F)).astype(float)
IDS = np.arange(N)


def write(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=50)


def lists(values=X, kind="float32"):
    return pyarrow.array(list(values), pyarrow.list_(pyarrow.type_for_alias(kind)))


def columns(values=X, name="f{}"):
    return {name.format(i): values[:, i] for i in range(F)}


def with_one(value, rows=X):
    """The rows as lists, with `value` as row 77."""
    return [*map(list, rows[:77]), value, *map(list, rows[78:])]


def test_tables(tmp_path):
    """The one column of lists, the one that is named, or the columns of floats; the rest is left out and named."""
    tensors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(X.ravel()), F)
    shaped = pyarrow.ExtensionArray.from_storage(pyarrow.fixed_shape_tensor(pyarrow.float64(), [F]), tensors)
    table = {
        "beside": (dict(id=IDS, text=["a"] * N, words=[["a"]] * N, embedding=lists()), None),
        "named": (dict(id=IDS, title=lists(X[::-1]), body=lists(kind="float16")), "body"),
        "whole": (dict(e=lists(X.astype(int).tolist(), "int8")), "e"),
        "shaped": (dict(id=IDS, e=shaped), None),
        "columns": (dict(id=IDS, seen=[True] * N, **columns(), text=["a"] * N), None),
        "mixed": (columns() | {"f3": X[:, 3].astype(int)}, None),
        "int8": (columns(X.astype("int8"), "{}"), None),
    }
    for name, (content, column) in table.items():
        write(tmp_path / f"{name}.parquet", **content)
        np.testing.assert_array_equal(all_rows(opened(tmp_path / f"{name}.parquet", column)), X, name)


def test_what_is_left_out_is_said(tmp_path, capsys):
    write(tmp_path / "a.parquet", id=IDS, text=["a"] * N, embedding=lists())
    write(tmp_path / "b.parquet", id=IDS, **columns())
    for name in "ab":
        opened(tmp_path / f"{name}.parquet")
    assert capsys.readouterr().out == (
        f"{tmp_path}/a.parquet: embedding read, id, text left out\n{tmp_path}/b.parquet: 12 columns read, id left out\n"
    )


def test_arrays(tmp_path):
    for kind in ("float16", "float32", "float64", "longdouble", ">f4", "int8", "int64"):
        np.save(tmp_path / f"{kind}.npy", X.astype(kind))
    np.save(tmp_path / "turned.npy", np.asfortranarray(X))
    np.savez(tmp_path / "one.npz", X)
    np.savez_compressed(tmp_path / "beside.npz", vectors=X.astype("f4"), ids=np.array(["a"] * N))
    save_file({"e": torch.tensor(X).bfloat16(), "scale": torch.ones(F)}, tmp_path / "e.safetensors")
    torch.save(torch.nn.Parameter(torch.tensor(X)), tmp_path / "bare.pt")
    torch.save({"e": torch.tensor(X).to(torch.int8), "ids": ["a"]}, tmp_path / "dict.pth")
    files = list(tmp_path.iterdir())
    assert len(files) == 13
    for path in files:
        shards = opened(path)
        assert (all_rows(shards) == X).all() and (gram_matrix(shards)[0] == X.T @ X).all(), path
    np.save(tmp_path / "unsigned.npy", np.full((70000, 2), 255, np.uint8))
    assert gram_matrix(opened(tmp_path / "unsigned.npy"))[0].tolist() == [[70000 * 255.0**2] * 2] * 2
    np.savez(tmp_path / "several.npz", a=X[:5], b=X)
    torch.save({"a": torch.ones(3, F), "b": torch.tensor(X)}, tmp_path / "several.pt")
    save_file({"a": torch.ones(3, F), "b": torch.tensor(X)}, tmp_path / "several.safetensors")
    for path in tmp_path.glob("several.*"):
        assert (all_rows(opened(path, "b")) == X).all(), path
        refused(path, r"b float64 \(200, 12\).*: choose one with --column=NAME")
        refused(path, r"--column=c: .* has no such array; it has .*b float64 \(200, 12\)", "c")


def text(rows=X, header=None, separator=","):
    return "".join(separator.join(map(str, row)) + "\n" for row in ([header] if header else []) + list(rows))


def test_texts(tmp_path):
    numbers = [str(i) for i in range(F)]
    quoted = [[f'"a, b\n{i}"', *row] for i, row in zip(IDS, X)]
    for name, content in (
        ("bare.csv", text()),
        ("whole.csv", text(X.astype(int))),
        ("blanks.csv", text().replace(",", ", ")),
        ("named.csv", text(header=[f"f{i}" for i in range(F)])),
        ("numbered.tsv", text(header=numbers, separator="\t")),
        ("pandas.csv", text(np.column_stack([IDS, X]), ["", *numbers])),
        ("ids.csv", text([[i, *row] for i, row in zip(IDS, X)], ["id", *numbers])),
        ("quoted.csv", text(quoted, ["text", *numbers])),
    ):
        (tmp_path / name).write_text(content)
        np.testing.assert_array_equal(all_rows(opened(tmp_path / name)), X, name)
    pyarrow.csv.write_csv(pyarrow.table(columns()), tmp_path / "pyarrow.csv")
    assert (all_rows(opened(tmp_path / "pyarrow.csv")) == X).all()


def test_a_folder_of_many_kinds(tmp_path, capsys):
    """In the order of the names' numbers; what surely is none is passed over and said, anything else refused."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write(folder / "s0.parquet", id=IDS[:30], embedding=lists(X[:30]))
    (folder / "s1.csv").write_text(text(X[30:60]))
    np.savez(folder / "s2.npz", X[60:90])
    save_file({"e": torch.tensor(X[90:120])}, folder / "s3.safetensors")
    torch.save(torch.tensor(X[120:150]), folder / "s4.pt")
    np.save(folder / "s10.npy", X[150:])
    for name in (".hidden.npy", "_SUCCESS", "README.md", "LICENSE", "meta.json"):
        (folder / name).write_text("{}")
    for column in (None, "embedding"):
        if column:  # it is for those files that have names
            for name in ("s2.npz", "s3.safetensors"):
                (folder / name).unlink()
        shards = opened(folder, column)
        assert (all_rows(shards) == X[[*range(60), *range(120, 200)] if column else slice(None)]).all()
        assert "passed over .hidden.npy, LICENSE, README.md, _SUCCESS, meta.json" in capsys.readouterr().out
    for name, content, expected in (
        ("train.bin", b"\1\2\3\4", "train.bin is none of the files that hold embeddings"),
        ("more.h5", b"\x89HDF\r\n\x1a\n", "more.h5 is an HDF5 file"),
        ("texts.jsonl", b'{"text": "a"}\n', "texts.jsonl is JSON"),
        ("s5.csv", b"1,2\n", "s5.csv has 2 features, .*s0.parquet has 12"),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=expected):
            opened(folder)
        (folder / name).unlink()
    (folder / "more").mkdir()
    with pytest.raises(UserError, match="more is not a file"):
        opened(folder)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def refused(path, expected, column=None):
    with pytest.raises(UserError, match=expected) as error:
        all_rows(opened(path, column))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_file_of_embeddings(tmp_path):
    """A line says what it is, whatever its name says."""
    np.savez(tmp_path / "a.npz", X)
    write(tmp_path / "a.parquet", e=lists())
    torch.save(torch.tensor(X), tmp_path / "a.pt")
    torch.save(torch.tensor(X), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"x": X}, tmp_path / "objects.pt")
    torch.save([torch.tensor(X)], tmp_path / "list.pt")
    np.save(tmp_path / "rows.npy", X.astype(object))
    torch.save(torch.tensor(X).to_sparse(), tmp_path / "sparse.pt")
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    content = {name: (tmp_path / name).read_bytes() for name in ("a.npz", "a.parquet", "a.pt")}
    for name, data, expected in (
        ("npz.npy", content["a.npz"], "by its content a .npz file"),
        ("parquet.npy", content["a.parquet"], "by its content a .parquet file"),
        ("torch.npz", content["a.pt"], "by its content a .pt file"),
        ("lfs.npy", LFS, "Git LFS pointer.*git lfs pull"),
        ("lfs.parquet", LFS, "Git LFS pointer"),
        ("lfs.csv", LFS, "Git LFS pointer"),
        ("hdf.npy", b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        ("a.pkl", pickle.dumps(X), "a pickle.*may run code"),
        ("pickle.npy", pickle.dumps(X, 2), "a pickle"),
        ("a.csv.gz", gzip.compress(b"1,2"), "unpack it with gunzip"),
        ("a.feather", b"ARROW1\0\0", "an Arrow file"),
        ("page.npy", b"<!DOCTYPE html>", "download the file again"),
        ("a.jsonl", b"{}", "JSON"),
        ("empty.npy", b"", "is empty"),
        ("a.bin", b"abcdefgh", "none of the files"),
        ("texts.zip", None, "a zip archive"),
        ("old.pt", None, "torch.save's old format"),
        ("objects.pt", None, "Python objects beside tensors"),
        ("list.pt", None, "holds a list"),
        ("rows.npy", None, "holds Python objects .* no numbers"),
        ("semicolons.csv", b"a;b\n1.5;2.5\n", "separated by semicolons: write it with commas"),
        ("decimal.csv", b"0,5;0,25\n1,5;2,5\n", "separated by semicolons: write it with commas, and points"),
        ("tabs.csv", b"1.5\t2.5\n", "separated by tabs: name it .tsv"),
        ("commas.tsv", b"1.5,2.5\n", "separated by commas: name it .csv"),
        ("blanks.csv", b"1.5 2.5\n", "separated by blanks"),
        ("sparse.pt", None, "holds sparse_coo float64"),
        ("cut.npz", content["a.npz"][:-9], "not a whole .npz"),
        ("cut.parquet", content["a.parquet"][:-9], "not a whole .parquet"),
        ("named.parquet", content["a.parquet"].replace(b"list", b"l\x81st"), "not a whole .parquet"),
        ("cut.pt", content["a.pt"][:-9], "not a whole .pt"),
        ("bits.npz", content["a.npz"].replace(X[9].tobytes(), X[8].tobytes()), "not a whole .npz .*CRC"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, expected)
    (tmp_path / "content").write_bytes(content["a.parquet"])  # a name without an ending says nothing else
    assert (all_rows(opened(tmp_path / "content")) == X).all()


def test_what_is_no_embedding(tmp_path):
    for kind in ("bool", "complex64", "U3", "object"):
        np.save(tmp_path / "a.npy", X.astype(kind))
        refused(tmp_path / "a.npy", {"U3": "holds str96", "object": "Python objects"}.get(kind, f"holds {kind}"))
    np.savez(tmp_path / "turned.npz", np.asfortranarray(X))
    refused(tmp_path / "turned.npz", "arr_0 is stored column by column")
    np.save(tmp_path / "bare.npy", X)
    refused(tmp_path / "bare.npy", "--column=a: .* leave it out", "a")
    for content, expected, column in (
        (dict(a=lists(), b=lists()), "has the columns of lists a, b: choose one with --column=NAME", None),
        (dict(a=lists(), b=["a"] * N), "b holds string; there is a", "b"),
        (dict(a=lists()), "it has no such column; there is a", "b"),
        (dict(id=IDS, **columns()), "f0 holds double; there is none", "f0"),
        (dict(mask=[[True] * F] * N), "it has mask", None),
        (dict(a=["a"] * N, b=["b"] * N), r"it has a \(string\), b \(string\)", None),
        (dict(id=IDS, **columns(X.astype("int8"))), r"which of its whole numbers are features.* it has id \(int64\), f0 \(int8\)", None),
        (columns() | {"f3": ["a"] * N}, "its column f3 holds string", None),
    ):
        write(tmp_path / "a.parquet", **content)
        refused(tmp_path / "a.parquet", expected, column)
    for content, expected in (
        (text(separator=";"), "separated by semicolons"),
        (text([["a", *row] for row in X]), "holds names and the number"),
        (text(with_one(["a", *X[77][1:]])), "Row #78.*invalid value 'a'"),
        (text(with_one(X[77][:5])), "Row #78: Expected 12 columns, got 5"),
        ("a,b\n", "column of floats a feature"),
        ("a,a\n1,2\n", "two columns called 'a'"),
    ):
        (tmp_path / "a.csv").write_text(content)
        refused(tmp_path / "a.csv", expected)


def test_a_bad_row_is_named(tmp_path):
    """By its number in its file, a shard of a folder too."""
    folder = tmp_path / "shards"
    folder.mkdir()
    np.save(folder / "a.npy", X)
    bad = X.copy()
    bad[77, 3] = np.nan
    null, gap = [None, *X[77][1:]], columns()
    gap["f3"] = [None if i == 77 else value for i, value in enumerate(X[:, 3])]
    whole = {name: pyarrow.array([None if value is None else int(value) for value in values]) for name, values in gap.items()}
    for content, expected in (
        (columns(bad), "NaN or infinity"),
        (gap, "a null"),
        (whole, "a null"),
        (dict(e=lists(bad)), "NaN or infinity"),
        (dict(e=lists(with_one(None))), "a null"),
        (dict(e=lists(with_one(null))), "a null"),
    ):
        write(folder / "b.parquet", **content)
        refused_row(folder, "b.parquet", f"row 77 holds {expected}")
    write(folder / "b.parquet", e=lists(with_one([1.0])))
    refused_row(folder, "b.parquet", " has lists of other lengths than the first, 12: row 77 has 1")
    (folder / "b.parquet").unlink()
    save_file({"e": torch.tensor(bad)}, folder / "b.safetensors")
    refused_row(folder, "b.safetensors", "row 77 holds NaN or infinity")
    (folder / "b.safetensors").unlink()
    np.savez(folder / "b.npz", bad)
    refused_row(folder, "b.npz", "row 77 holds NaN or infinity")
    (folder / "b.npz").unlink()
    for value, expected in (("", "a null"), ("inf", "NaN or infinity")):
        (folder / "b.csv").write_text(text(with_one([value, *X[77][1:]])))
        refused_row(folder, "b.csv", f"row 77 holds {expected}")


def refused_row(folder, name, expected):
    for read in (all_rows, gram_matrix):
        with pytest.raises(UserError, match=f"{name}:? ?{expected}"):
            read(opened(folder))
