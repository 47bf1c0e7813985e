"""The one reader and writer of a Laplacian's file, and the check that a matrix is a Laplacian."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from common import UserError, replacing
from data.embeddings import first_bytes_say, types_of

MOST_FEATURES = 16384  # a dense float64 matrix of that size takes 2 GiB
COLUMNS = {
    "name_id": pyarrow.string(),
    "n_rows": pyarrow.uint64(),
    "n_cols": pyarrow.uint64(),
    "nnz": pyarrow.uint64(),
    "row": pyarrow.uint64(),
    "col": pyarrow.uint64(),
    "value": pyarrow.float64(),
}


def laplacian_of(weights):
    """L = Deg - W of the weights W (F, F)."""
    return np.diag(weights.sum(1)) - weights


def components(edges):
    """The component number of every node, (F,), counted from 0."""
    from scipy.sparse.csgraph import connected_components

    return connected_components(edges, directed=False)[1]


def check_laplacian(L, what):
    """Raise UserError unless L is the Laplacian of a connected graph: finite, symmetric, rows that sum to 0, positive
    semi-definite. Tolerances are relative to the largest entry and allow for float32 files. what: L's name in messages."""
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
    """Write L (F, F), an array or a tensor on the CPU, in coordinate form, float64, to a parquet file with the columns of the author's
    tool, and settings, a dict, to the JSON beside it."""
    path, L = Path(path), np.asarray(L)
    row, col = np.nonzero(L)
    constants = {"name_id": path.stem, "n_rows": len(L), "n_cols": len(L), "nnz": len(row)}
    table = pyarrow.table(
        {
            name: pyarrow.array(values, COLUMNS[name])
            for name, values in [(name, [value] * len(row)) for name, value in constants.items()]
            + [("row", row), ("col", col), ("value", L[row, col])]
        }
    )
    with replacing(path.with_suffix(".json")) as settings_path, replacing(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)
        settings_path.write_text(json.dumps(settings, indent=1) + "\n")


def said_beside(path):
    """The dict in the JSON beside a file that was made; {} where there is none, or it is damaged."""
    try:
        said = json.loads(Path(path).with_suffix(".json").read_text())
        return said if isinstance(said, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def load_laplacian(path):
    """The dense Laplacian (F, F) float64 of a parquet file written by save_laplacian or by the author's tool.
    Raises FileNotFoundError, or UserError if the file is damaged or its matrix is not the Laplacian of a connected graph."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: name the Laplacian's file in it")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = first_bytes_say(path)
        raise UserError(f"{path} is not a whole parquet file ({error if what in (None, '.parquet') else f'it is {what}'})") from None
    types = types_of(path, table.schema)
    missing = [name for name in COLUMNS if name not in types]
    if missing:
        raise UserError(f"{path} is not a Laplacian file: it has no column {', '.join(missing)}")
    try:
        columns = {name: table[name].cast(COLUMNS[name]).to_numpy() for name in COLUMNS if name != "name_id"}
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Laplacian file ({error})") from None
    for name in columns:
        if table[name].null_count:
            at = table[name].is_null().to_numpy().argmax()
            raise UserError(f"{path} is damaged: in row {at} its column {name} holds a null: build it again")
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
    for name in ("row", "col"):
        if columns[name].max() >= F:
            at = columns[name].argmax()
            raise UserError(f"{path} is damaged: in row {at} it has an entry at ({row[at]}, {col[at]}), past its {F} rows: build it again")
    if not np.isfinite(value).all():
        at = np.isfinite(value).argmin()
        raise UserError(f"{path} is damaged: in row {at} its entry at ({row[at]}, {col[at]}) is NaN or infinity: build it again")
    entries, first = np.unique(row * np.uint64(F) + col, return_index=True)
    if len(entries) != len(row):
        at = np.setdiff1d(np.arange(len(row)), first)[0]
        raise UserError(f"{path} is damaged: in row {at} it has the entry at ({row[at]}, {col[at]}) twice: build it again")
    L = np.zeros((F, F))
    L[row, col] = value
    check_laplacian(L, path)
    return L
