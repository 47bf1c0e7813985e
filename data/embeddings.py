"""The one reader of embeddings (N, F): .npy, .npz, .parquet, .csv, .tsv, .safetensors and .pt files, and folders of such shards, a
chunk of rows in memory at a time."""

import errno
import pickle
import re
import struct
import zipfile
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet
from pyarrow.types import is_fixed_size_list, is_floating, is_integer, is_large_list, is_list
from safetensors import SafetensorError

from common import DAMAGED_ARRAY, RANK, UserError, first_line

CHUNK_ROWS = 4096
TEXT_BLOCK = 1 << 21  # bytes of a .csv file that are parsed at a time, and more than any row of it has
SEPARATORS = {  # of a .csv or .tsv file: name, and what to do where it is not the one of the file's kind
    ";": ("semicolons", "write it with commas, and points in its numbers"),
    "|": ("bars", "write it with commas"),
    "\t": ("tabs", "name it .tsv"),
    ",": ("commas", "name it .csv"),
    " ": ("blanks", "write it with commas"),
}
SHOWN = 6  # names in a message
DAMAGED = (OSError, pyarrow.ArrowException, SafetensorError, *DAMAGED_ARRAY)  # what the libraries raise for a damaged file
FIRST_BYTES = {  # of a file: its kind, or what it is and what to do
    b"\x93NUMPY": ".npy",
    b"PAR1": ".parquet",
    b"version https://git-lfs": "a Git LFS pointer, not the file that it stands for: `git lfs pull` fetches that",
    b"\x89HDF": "an HDF5 file: save its array with numpy.save",
    b"\x80": "a pickle, or of torch.save's old format; reading one may run code: save its array with numpy.save",
    b"ARROW1": "an Arrow file: write its table with pyarrow.parquet.write_table",
    b"\xff\xff\xff\xff": "an Arrow stream: write its table with pyarrow.parquet.write_table",
    b"\x1f\x8b": "compressed: unpack it with gunzip",
    b"BZh": "compressed: unpack it with bunzip2",
    b"\xfd7zXZ": "compressed: unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "compressed: unpack it with unzstd",
    b"{": "JSON: write the table that pyarrow.json.read_json makes of its lines with pyarrow.parquet.write_table",
    b"<": "a page of HTML or XML: download the file again",
}
PASSED_OVER = re.compile(r"[._].*|(README|LICENSE)(\..*)?|.*\.(json|md)", re.I)  # files of a folder that are surely no embeddings


class Embeddings:
    """A file of embeddings, (rows, columns) numbers, in `pieces` [(first row, rows)], which processes share out. column: the name of
    the array or column of lists that is read, where there are names; names: of the features, where each is a column with a name;
    left_out: names of what else the file holds."""

    column, names, left_out = None, None, ()

    def __init__(self, path, kind, column):
        """kind: an ending of READERS; column: as opened() takes it. Raises UserError for a file that is damaged or holds no embeddings."""
        self.path, self.kind = path, kind
        with self.whole():
            self.open(column)

    def chunks(self, number):
        """Yield the rows of a piece in order, as arrays (n, columns) float64. Raises UserError for a row with a null, NaN or infinity,
        and for a damaged file."""
        first = self.pieces[number][0]
        with self.whole():
            for rows in self.read(number):
                rows = rows.astype(np.float64)
                if not np.isfinite(rows.sum()):
                    bad = np.flatnonzero(~np.isfinite(rows).all(1))
                    if len(bad):
                        raise UserError(f"{self.path}: row {first + bad[0]} holds NaN or infinity: leave it out")
                first += len(rows)
                yield rows

    @contextmanager
    def whole(self):
        """Raise UserError for what the libraries raise in the block where a file is damaged."""
        try:
            yield
        except UserError:  # which is a ValueError too
            raise
        except DAMAGED as error:
            if getattr(error, "errno", None) not in (None, errno.EINVAL):  # the system's; torch.load gives this one for a file cut short
                raise
            raise UserError(f"{self.path} is not a whole {self.kind} file ({first_line(error)})") from None


class ArrayEmbeddings(Embeddings):
    """An array of a .npy, .safetensors or .pt file, memory-mapped."""

    def open(self, column):
        found = self.mapped()
        if isinstance(found, dict):
            self.column, self.left_out = chosen(self.path, {name: (type_of(x), tuple(x.shape)) for name, x in found.items()}, column)
            found = found[self.column]
        self.rows, self.columns = checked_shape(self.path, type_of(found), tuple(found.shape))
        self.pieces = [(first, min(CHUNK_ROWS, self.rows - first)) for first in range(0, self.rows, CHUNK_ROWS)]

    def mapped(self):
        """The file's array, or {name: array} if it has names."""
        if self.kind == ".npy":
            with open(self.path, "rb") as file:
                shape, _, dtype = npy_header(file)
            if dtype.hasobject:
                raise UserError(f"{self.path} holds Python objects {shape}, no numbers: save numpy.array(x.tolist(), numpy.float32)")
            return np.load(self.path, mmap_mode="r")
        import torch  # here, because the other kinds do without it
        from safetensors.torch import load_file

        if self.kind == ".safetensors":
            return load_file(self.path)
        try:
            found = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError:
            raise UserError(f"{self.path} holds Python objects beside tensors: save one tensor (N, F) or a dict of tensors") from None
        except (AttributeError, AssertionError, struct.error) as error:  # what unpickling damaged bytes may raise too
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if isinstance(found, dict):
            return {str(name): x.detach() for name, x in found.items() if isinstance(x, torch.Tensor)}
        if not isinstance(found, torch.Tensor):
            raise UserError(f"{self.path} holds a {type(found).__name__}: save one tensor (N, F) or a dict of tensors")
        return found.detach()

    def read(self, number):
        first, rows = self.pieces[number]
        found = self.mapped()  # opened anew, so that pages that were read are given back
        rows = (found if self.column is None else found[self.column])[first : first + rows]
        yield rows if isinstance(rows, np.ndarray) else rows.double().numpy()


class NpzEmbeddings(Embeddings):
    """An array of an .npz archive, unpacked row by row, so in one piece."""

    def open(self, column):
        headers = {}
        with zipfile.ZipFile(self.path) as archive:
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as file:
                        headers[name.removesuffix(".npy")] = npy_header(file)
        self.column, self.left_out = chosen(self.path, {name: (x.name, shape) for name, (shape, _, x) in headers.items()}, column)
        shape, by_columns, dtype = headers[self.column]
        self.rows, self.columns = checked_shape(self.path, dtype.name, shape)
        if by_columns:
            raise UserError(
                f"{self.path}: {self.column} is stored column by column: save it with numpy.save, or as numpy.ascontiguousarray"
            )
        self.pieces = [(0, self.rows)]

    def read(self, number):
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.column}.npy") as file:
            _, _, dtype = npy_header(file)
            for first in range(0, self.rows, CHUNK_ROWS):
                count = min(CHUNK_ROWS, self.rows - first) * self.columns
                yield np.frombuffer(file.read(count * dtype.itemsize), dtype, count).reshape(-1, self.columns)


class ParquetEmbeddings(Embeddings):
    """A parquet file with a column of lists, or with a column for each feature; the pieces are its row groups."""

    def open(self, column):
        with self.file() as file:
            types = {name: getattr(kind, "storage_type", kind) for name, kind in types_of(self.path, file.schema_arrow).items()}
            self.rows = file.metadata.num_rows
            if not self.rows:
                raise UserError(f"{self.path} has no rows")
            self.column = list_column(self.path, types, column)
            if self.column is None:
                self.names, self.left_out = features(self.path, types)
                odd = next((name for name in self.names if not is_feature(types[name])), None)
                if odd is not None:
                    raise UserError(f"{self.path}: its column {odd} holds {types[odd]}, not numbers as the columns of like names")
                self.columns = len(self.names)
            else:
                self.left_out = [name for name in types if name != self.column]
                lists = next(file.iter_batches(1, columns=[self.column])).column(0)
                refuse_null(self.path, 0, lists)
                self.columns = len(lists[0].as_py())
            rows = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            self.pieces = list(zip(np.cumsum([0, *rows]).tolist(), rows))

    def file(self):
        return pyarrow.parquet.ParquetFile(self.path, buffer_size=1 << 16, pre_buffer=False)

    def read(self, number):
        first, names = self.pieces[number][0], self.names if self.column is None else [self.column]
        with self.file() as file:
            for batch in file.iter_batches(CHUNK_ROWS, row_groups=[number], columns=names, use_threads=False):
                yield feature_rows(self.path, first, batch) if self.column is None else self.list_rows(first, batch.column(0))
                first += len(batch)

    def list_rows(self, first, lists):
        """(n, columns) of a pyarrow array of n lists, of which the first is row `first` of the file."""
        lists = getattr(lists, "storage", lists)
        refuse_null(self.path, first, lists)
        lengths = pyarrow.compute.list_value_length(lists).to_numpy(zero_copy_only=False)
        if (lengths != self.columns).any():
            at = (lengths != self.columns).argmax()
            raise UserError(f"{self.path} has lists of other lengths than the first, {self.columns}: row {first + at} has {lengths[at]}")
        values = lists.flatten()
        refuse_null(self.path, first, values, self.columns)
        return values.to_numpy(zero_copy_only=False).reshape(len(lists), self.columns)


class CsvEmbeddings(Embeddings):
    """A .csv or .tsv file with a column for each feature, whose first line names them or is a row too; in one piece."""

    def open(self, column):
        self.separator = "\t" if self.kind == ".tsv" else ","
        with open(self.path, encoding="utf-8", errors="replace") as file:
            line = file.readline().strip()
        ours = line.count(self.separator)
        for mark, (name, what) in SEPARATORS.items():  # 0,5;0,25 has as many commas as numbers
            if mark != self.separator and (theirs := line.count(mark)) and (theirs + 1 >= ours if mark != " " else not ours):
                raise UserError(f"{self.path} is separated by {name}: {what}")
        self.header = True
        with self.batches() as batches:
            names = batches.schema.names
        self.header = not all(map(is_number, names)) or names == [str(number) for number in range(len(names))]
        value = next((name for name in names if self.header and is_number(name) and not name.isdigit()), None)
        if value is not None:
            raise UserError(f"{self.path}: its first line holds names and the number {value}: give it a line of names, or numbers only")
        with self.batches() as batches:
            self.kept, self.left_out = features(self.path, types_of(self.path, batches.schema))
        self.names, self.columns = self.kept if self.header else None, len(self.kept)
        with self.batches(self.kept) as batches:
            self.rows = sum(len(batch) for batch in batches)
        if not self.rows:
            raise UserError(f"{self.path} has no rows")
        self.pieces = [(0, self.rows)]

    def batches(self, kept=()):
        """A reader of the columns `kept`, as float64, or of all, each as its first lines look."""
        return pyarrow.csv.open_csv(
            self.path,
            pyarrow.csv.ReadOptions(use_threads=False, block_size=TEXT_BLOCK, autogenerate_column_names=not self.header),
            pyarrow.csv.ParseOptions(delimiter=self.separator, newlines_in_values=True),
            pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(kept, pyarrow.float64()), include_columns=kept or None),
        )

    def read(self, number):
        first = 0
        with self.batches(self.kept) as batches:
            for batch in batches:
                yield feature_rows(self.path, first, batch)
                first += len(batch)


READERS = {
    ".npy": ArrayEmbeddings,
    ".npz": NpzEmbeddings,
    ".parquet": ParquetEmbeddings,
    ".csv": CsvEmbeddings,
    ".tsv": CsvEmbeddings,
    ".safetensors": ArrayEmbeddings,
    ".pt": ArrayEmbeddings,
}


def type_of(array):
    """The name of the type of a numpy or torch array's numbers."""
    name = getattr(array.dtype, "name", str(array.dtype).removeprefix("torch."))
    layout = str(getattr(array, "layout", "torch.strided")).removeprefix("torch.")
    return name if layout == "strided" else f"{layout} {name}"


def is_matrix(kind, shape):
    """Whether an array of such a type and shape may be embeddings."""
    return len(shape) == 2 and 0 not in shape and kind.startswith(("float", "bfloat", "int", "uint"))


def checked_shape(path, kind, shape):
    if not is_matrix(kind, shape):
        raise UserError(f"{path} holds {kind} {shape}; embeddings are floats or whole numbers (N, F)")
    return shape


def chosen(path, arrays, column):
    """(name, other names) of the array to read of {name: (type, shape)}: `column`, or the only one that may be embeddings."""
    fitting = [name for name, about in arrays.items() if is_matrix(*about)]
    listed = shown([f"{name} {kind} {shape}" for name, (kind, shape) in arrays.items() if column or name in fitting or not fitting])
    if column is not None and column not in arrays:
        raise UserError(f"--column={column}: {path} has no such array; it has {listed or 'none'}")
    if column is None and len(fitting) != 1:
        choose = "choose one with --column=NAME" if fitting else "embeddings are floats or whole numbers (N, F)"
        raise UserError(f"{path} holds {listed or 'no array'}: {choose}")
    name = fitting[0] if column is None else column
    return name, [other for other in arrays if other != name]


def npy_header(file):
    """(shape, whether stored column by column, dtype) of an open .npy file; what follows are its numbers."""
    version = np.lib.format.read_magic(file)
    return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)


def types_of(path, schema):
    """{column: type} of a pyarrow schema."""
    twice = [name for name, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise UserError(f"{path} has two columns called {twice[0]!r}: name them apart")
    return dict(zip(schema.names, schema.types))


def list_column(path, types, column):
    """The column of lists of numbers to read of {column: type}: `column`, or the only one; None if there is none."""
    is_lists = lambda kind: is_list(kind) or is_large_list(kind) or is_fixed_size_list(kind)
    lists = [name for name, kind in types.items() if is_lists(kind) and is_feature(kind.value_type)]
    if column is not None and column not in lists:
        found = f"{column} holds {types[column]}" if column in types else "it has no such column"
        raise UserError(f"--column={column}: a column of lists of numbers is meant; in {path} {found}; there is {shown(lists) or 'none'}")
    if column is None and len(lists) > 1:
        raise UserError(f"{path} has the columns of lists {shown(lists)}: choose one with --column=NAME")
    return column or next(iter(lists), None)


def is_feature(kind):
    return is_floating(kind) or is_integer(kind)


def features(path, types):
    """(features, others) of {column: type} where each feature has a column: the columns of floats, and those that are named like one
    but for digits; without floats, all columns of whole numbers if they are named alike so."""
    alike = lambda name: re.sub(r"\d+", "0", name)
    floats = [name for name, kind in types.items() if name and is_floating(kind)]  # without a name: pandas' index
    numbers = floats or [name for name, kind in types.items() if is_integer(kind)]
    kinds = {alike(name) for name in numbers}
    found = [name for name in types if alike(name) in kinds]
    others = [name for name in types if alike(name) not in kinds]
    has = shown([f"{name[:40]} ({kind})" for name, kind in types.items()])
    if not floats and len(kinds) > 1:
        raise UserError(f"{path}: which of its whole numbers are features? Their columns' names differ in digits only; it has {has}")
    if len(found) < 2:
        raise UserError(f"{path}: embeddings have a column of floats a feature, or one column of lists of numbers; it has {has}")
    return found, others


def feature_rows(path, first, batch):
    """(n, F) of a pyarrow batch of n rows, of which the first is row `first` of the file."""
    for column in batch.columns:
        refuse_null(path, first, column)
    return np.column_stack([column.to_numpy(zero_copy_only=False) for column in batch.columns])


def refuse_null(path, first, values, width=1):
    """Raise UserError if a pyarrow array has a null. `width` of its values are a row, the first of them row `first` of the file."""
    if values.null_count:
        at = values.is_null().to_numpy(zero_copy_only=False).argmax()
        raise UserError(f"{path}: row {first + at // width} holds a null: leave it out")


def is_number(text):
    try:
        float(text)
        return True
    except ValueError:
        return False


def shown(names):
    return ", ".join(name or repr(name) for name in names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def first_bytes_say(path):
    """What a file is: an ending of READERS, or of a file that is not read, what it is and what to do; None where its first bytes do not
    tell."""
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        return "empty: make or download it again"
    if head[5:9] == b"\0\0\0{":  # the length of its header, in 8 bytes, and the header
        return ".safetensors"
    if head.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, UnicodeDecodeError, RuntimeError):  # no UTF-8 in a name; a kind of zip that Python does not read
            return None
        inside = {".npz": ".npy", ".pt": "/data.pkl"}
        return next((kind for kind, end in inside.items() if any(name.endswith(end) for name in names)), "a zip archive: unpack it")
    return next((what for magic, what in FIRST_BYTES.items() if head.startswith(magic)), None)


def kind_of_file(path):
    """The ending, of READERS, that says how to read a file. Raises UserError if it is no file of embeddings, or its ending another one."""
    if not path.is_file():
        raise UserError(f"{path} is not a file: embeddings are files, or a folder with nothing but them")
    ending, what = path.suffix.lower().replace(".pth", ".pt"), first_bytes_say(path)
    if what is None and ending in READERS:
        return ending
    if what in READERS and (ending == what or ending not in READERS):
        return what
    if what in READERS:
        raise UserError(f"{path} is by its content a {what} file: name it so")
    if what is not None:
        raise UserError(f"{path} is {what}")
    raise UserError(f"{path} is none of the files that hold embeddings ({', '.join(READERS)}): convert it, or leave it out of its folder")


def files_of(folder):
    """The files of a folder, in the order of their names, numbers in them by value. What surely are no embeddings is passed over, and
    printed."""
    in_order = lambda path: [int(part) if at % 2 else part for at, part in enumerate(re.split(r"(\d+)", path.name))]
    paths = sorted(folder.iterdir(), key=in_order)
    passed_over = [path.name for path in paths if PASSED_OVER.fullmatch(path.name)]
    if passed_over and RANK == 0:
        print(f"{folder}: passed over {shown(passed_over)}")
    if len(passed_over) == len(paths):
        raise UserError(f"{folder} holds no file of embeddings ({', '.join(READERS)})")
    return [path for path in paths if path.name not in passed_over]


def opened(path, column=None):
    """The Embeddings of a file, or of a folder's files. column: the array or column of lists to read, where there are several. What is
    left out is printed. Raises UserError for a file that holds no embeddings, and unless all have the same number of features and,
    where features have names, the same names."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    shards = []
    for file in files_of(path) if path.is_dir() else [path]:
        kind = kind_of_file(file)
        shards.append(READERS[kind](file, kind, column))
    if column is not None and all(shard.column is None for shard in shards):
        raise UserError(f"--column={column}: {path} has no named arrays and no columns of lists: leave it out")
    said = {}
    for shard in shards:
        if shard.columns != shards[0].columns:
            raise UserError(f"{shard.path} has {shard.columns} features, {shards[0].path} has {shards[0].columns}: shards have the same")
        named = next((other for other in shards if other.names), shard)
        if shard.names and shard.names != named.names:
            raise UserError(f"{shard.path} does not have the columns of {named.path} in the same order: shards have the same")
        said.setdefault((shard.column, *shard.left_out), shard)
    for shard in said.values():
        if shard.left_out and RANK == 0:
            print(f"{shard.path}: {shard.column or f'{shard.columns} columns'} read, {shown(shard.left_out)} left out")
    return shards


def all_rows(shards):
    """All rows (N, F) float64 of what opened() returned."""
    return np.concatenate([rows for shard in shards for number in range(len(shard.pieces)) for rows in shard.chunks(number)])
