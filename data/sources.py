"""What people bring -> documents, each a str: files of JSONL, JSON, parquet and text, compressed or not, pipes, and data sets.

A file of text is read as common.decoded() says. A text inside a record (JSON, parquet, a data set) is taken exactly as it stands there.
Nothing is stripped; what is nothing but white space is no document. Every reader takes (path, name), the name being what a message
calls it, and yields its documents one by one: memory holds a record, a batch of parquet's rows or one text file at a time."""

import builtins
import bz2
import gzip
import io
import json
import lzma
import os
import re
import socket
import sys
import tempfile
import threading
import urllib.parse
import urllib.request
import zlib
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from tqdm import tqdm

from common import FULL, UserError, decoded, first_line

COMPRESSED = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ\0": lzma}
ZSTD = b"\x28\xb5\x2f\xfd"
SKIPPED = 1000  # broken records that --skip_bad leaves out
LONGEST = 1 << 26  # characters of a value in a JSON file
ROWS = 1000  # of parquet or a data set, in memory at a time
ENDINGS = (".gz", ".bz2", ".xz", ".zst")
START = 1 << 13  # bytes of a file that tell what it is
UNPACK = "unpack it, and give the folder"
PANDOC = "`pandoc --to=plain -o NEW.txt FILE` makes text of it"
PANDAS = "`python -c \"import pandas; pandas.read_{}('FILE').to_parquet('NEW.parquet')\"` makes parquet of it"
NOT_TAKEN = {  # by the end of the name: what to do
    ".pdf": "`pdftotext FILE NEW.txt` makes text of it",
    **dict.fromkeys((".docx", ".odt", ".epub", ".rtf"), PANDOC),
    **dict.fromkeys((".doc", ".ppt", ".pptx"), "save it as text"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"), UNPACK),
    **dict.fromkeys((".xlsx", ".xls"), PANDAS.format("excel")),
    ".csv": PANDAS.format("csv"),
    ".tsv": PANDAS.format("table"),
    ".arrow": PANDAS.format("feather"),
    ".feather": PANDAS.format("feather"),
}
BEGINNINGS = {b"%PDF": ".pdf", b"PK\3\4": ".zip", b"Rar!": ".rar", b"7z\xbc\xaf": ".7z", b"{\\rtf": ".rtf", b"\xd0\xcf\x11\xe0": ".doc"}
KEYS = ("text", "content", "body", "document", "article", "code", "markdown", "description", "abstract")  # usual names of the text


class LeftOut:
    """What is not taken of a source, counted by its reason, each file or record once, however often the source is read."""

    def __init__(self, skip_bad=None):
        """skip_bad: whether the program was given --skip_bad; None: it has no such option."""
        self.skip_bad, self.names = skip_bad, {}

    def __call__(self, reason, name):
        self.names.setdefault(reason, set()).add(str(name))

    def bad(self, name, error):
        """A broken record or file. Raises UserError, unless such are to be left out and there are not too many."""
        said = str(error) if isinstance(error, UserError) else f"{name}: {error}"  # a UserError has the name in it
        if not self.skip_bad:
            raise UserError(said + (" (--skip_bad leaves such records out)" if self.skip_bad is not None else ""))
        self("broken", name)
        if len(self.names["broken"]) > SKIPPED:
            raise UserError(f"{said}; these are more than {SKIPPED:,} broken records")

    def __str__(self):
        counts = [
            f"{len(names):,} {reason}" + (f" (such as {min(names)})" if reason == "broken" else "") for reason, names in self.names.items()
        ]
        return "left out: " + ", ".join(counts).encode("utf-8", "backslashreplace").decode() if counts else ""

    def report(self):
        if self.names:
            print(self)


def is_foreign(name):
    """Whether a path inside a source is another program's, such as those that macOS adds to folders and archives."""
    return any(part == "__MACOSX" or part.startswith("._") for part in Path(name).parts)


@contextmanager
def rereadable(path, folder):
    """Yield a file that can be read again and again: `path` itself, or of a pipe ("-" is standard input) a copy in a temporary file
    of `folder`, which is removed afterwards."""
    if str(path) != "-" and (not path.exists() or path.is_file() or path.is_dir()):
        yield path
        return
    with (
        tempfile.NamedTemporaryFile(dir=folder, prefix=".pipe.") as copy,
        nullcontext(sys.stdin.buffer) if str(path) == "-" else open(path, "rb") as pipe,
        tqdm(desc=f"copying {called(path)}", unit="B", unit_scale=True, disable=None) as progress,
    ):
        while data := pipe.read(1 << 20):
            copy.write(data)
            progress.update(len(data))
        copy.flush()
        yield Path(copy.name)


def called(path):
    """What a message calls a source."""
    return "standard input" if str(path) == "-" else str(path)


@contextmanager
def opened(path, name=None):
    """Yield a file to read bytes from; one that is compressed (gzip, bzip2, xz, zstd), by its first bytes, is decompressed. Raises
    UserError if `path` is no regular file, since it is read more than once, and inside the block for damaged compressed data."""
    name = name or path
    if not Path(path).is_file():
        raise UserError(f"{name} is not a file" if Path(path).exists() else f"{name} does not exist")
    with open(path, "rb") as file:
        start = file.read(6)
    if start.startswith(ZSTD):
        import pyarrow

        file = io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    else:
        module = next((module for magic, module in COMPRESSED.items() if start.startswith(magic)), builtins)
        file = module.open(path, "rb")
    try:
        with file:
            yield file
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        if getattr(error, "errno", None) is not None:  # an error of the system's
            raise
        raise UserError(f"{name} is damaged: {error}") from None


def as_text(value):
    """The document that a value of a record is: a text, or the parts of [id, title, body], a line each. Raises ValueError for others."""
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise ValueError(f"{json.dumps(value, default=str)[:40]} is neither a text nor [id, title, body]")
    return value if value.isascii() else value.encode("utf-8", "replace").decode()  # a lone surrogate becomes ?


def record_text(record, key="text"):
    """The document of a record {key: "..."} or {key: [id, title, body]}, or of one that is just a text. Raises ValueError for others."""
    if isinstance(record, str):
        return as_text(record)
    if not isinstance(record, dict):
        raise ValueError(f'a record is {{"{key}": "..."}} or {{"{key}": [id, title, body]}}')
    if key not in record:
        texts = [name for name, value in record.items() if isinstance(value, str)]
        lists = [name for name, value in record.items() if isinstance(value, list) and value and isinstance(value[0], dict | str)]
        inner = f"; the records of its list {lists[0]!r} are taken out by `jq -c '.{lists[0]}[]' FILE > NEW.jsonl`" if lists else ""
        raise ValueError(f"there is no {key!r} in it{other_keys(texts)}{inner}")
    return as_text(record[key])


def other_keys(names):
    """What to do when the text of a record is missed: the names of its other texts, usual ones first."""
    names = sorted(names, key=lambda name: KEYS.index(name) if name in KEYS else len(KEYS))
    return f": --text_key=NAME takes another of its texts: {', '.join(names[:5])}" if names else ""


def documents(items, text_of, place, left_out):
    """Yield text_of(item) of each (number, item), but for what is nothing but white space. A ValueError of text_of is a broken
    record's, which is called f"{place} {number}"."""
    for number, item in items:
        try:
            text = text_of(item)
        except (ValueError, RecursionError) as error:
            left_out.bad(f"{place} {number}", error)
        else:
            if text and not text.isspace():
                yield text


def split(pieces, separator):
    """Yield what stands between the separators of a text, from an iterator over its pieces."""
    keep, parts, last = len(separator) - 1, [""], ""  # last: the end of the text so far, where a separator may have begun
    for piece in pieces:
        first, *others = (last + piece).split(separator)
        parts.append(first)
        for other in others:
            yield "".join(parts)
            parts = [other]
        cut = max(0, len(parts[-1]) - keep)
        parts[-1], last = parts[-1][:cut], parts[-1][cut:]
    yield "".join(parts) + last


def from_json_line(line, key):
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"byte 0x{ord(line[error.start]) - 0xDC00:02x} is not UTF-8") from None
    return record_text(json.loads(line), key)


def jsonl(path, name, key, left_out):
    with opened(path, name) as file:
        lines = (line.removeprefix("\ufeff") for line in split(decoded(file, name, "surrogateescape"), "\n"))  # of files joined by cat, too
        items = ((number, line) for number, line in enumerate(lines, 1) if line and not line.isspace())
        yield from documents(items, lambda line: from_json_line(line, key), f"{name}, line", left_out)


def read_jsonl(paths, left_out=None, key="text"):
    """Yield the documents of JSONL files, compressed or not; empty ones are left out. Raises UserError with file and line for a
    broken record, unless left_out takes it, and for what opened() cannot read."""
    for path in paths:
        yield from jsonl(path, path, key, left_out or LeftOut())


def json_values(pieces, name):
    """Yield the elements of a JSON array, or JSON values one after another, from an iterator over the pieces of their text. Raises
    UserError for what is broken, since where the next value begins is not known then."""
    decode, blanks = json.JSONDecoder().raw_decode, re.compile(r"[ \t\n\r]*")
    text, number, complete = "", 1, False
    while not text.lstrip() and not complete:
        text, complete = more(text, pieces)
    place = blanks.match(text).end()
    array = text.startswith("[", place)
    blanks, place = (re.compile(r"[ \t\n\r,]*"), place + 1) if array else (blanks, place)
    while True:
        place = blanks.match(text, place).end()
        if array and text.startswith("]", place):
            place, rest = blanks.match(text, place + 1).end(), "".join(pieces).strip()
            if text[place:] or rest:
                raise UserError(
                    f"{name}: something follows the end of its array, after record {number - 1:,}: put it into a file of its own"
                )
            return
        if place == len(text) and complete and not array:
            return
        try:
            value, end = decode(text, place)
            whole = end < len(text) or complete  # a number may go on
            problem = ""
        except (ValueError, RecursionError) as error:
            problem, at = getattr(error, "msg", str(error)), getattr(error, "pos", place)
            whole = complete or not problem.startswith("Unterminated string") and len(text) - at > 16
        if whole and problem:
            raise UserError(f"{name}, record {number:,} is broken JSON: {problem}: mend it, or give the records a line each (JSONL)")
        if whole:
            yield value
            number, place = number + 1, end
        elif len(text) - place > LONGEST:
            raise UserError(
                f"{name}, record {number:,} is longer than {LONGEST:,} characters: a file holds an array of records, or one a line; "
                f"if they are in a list inside an object, `jq -c '.NAME[]' {name} > NEW.jsonl` takes them out"
            )
        else:
            text, complete = more(text[place:], pieces)
            place = 0


def more(text, pieces):
    """(the text with as much again, whether the pieces are at their end)."""
    added = []
    for piece in pieces:
        added.append(piece)
        if sum(map(len, added)) > len(text):
            return text + "".join(added), False
    return text + "".join(added), True


def json_file(path, name, key, left_out):
    """The documents of a .json file: an array of records, or records one after another, a line each or not."""
    with opened(path, name) as file:
        start = next(decoded(file, name, "surrogateescape")).lstrip()
    line = start.partition("\n")
    try:
        by_line = line[1] and isinstance(json.loads(line[0]), dict)
    except (ValueError, RecursionError):
        by_line = False
    if by_line:
        yield from jsonl(path, name, key, left_out)
        return
    with opened(path, name) as file:
        values = enumerate(json_values(decoded(file, name), name), 1)
        yield from documents(values, lambda record: record_text(record, key), f"{name}, record", left_out)


def is_text(kind):
    """Whether an arrow type is one of texts, or of lists of them."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return is_text(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return is_text(kind.value_type)
    return any(
        is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    )


def column(tables, schema, name, key, left_out):
    """The documents of a column of arrow tables or batches, whose rows are counted from 1."""
    import pyarrow

    if key not in schema.names or not is_text(schema.field(key).type):
        what = f"column {key!r} holds {schema.field(key).type}" if key in schema.names else f"there is no column {key!r}"
        raise UserError(f"{name}: {what}" + (other_keys([f.name for f in schema if is_text(f.type)]) or ", nor one of texts"))
    plain = not pyarrow.types.is_nested(schema.field(key).type)

    def values():
        for table in tables:  # bytes are decoded one by one, so that a broken text is one row
            try:
                rows = (table[key].cast(pyarrow.large_binary()) if plain else table[key]).to_pylist()
            except UnicodeDecodeError as error:
                raise UserError(f"{name} holds lists that are no texts: {error}") from None
            yield from rows

    yield from documents(enumerate(values(), 1), as_text, f"{name}, row", left_out)


def parquet(path, name, key, left_out):
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 16, pre_buffer=False) as file:
            batches = file.iter_batches(ROWS, columns=[key], use_threads=False)
            yield from column(batches, file.schema_arrow, name, key, left_out)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name} is not a whole parquet file: {first_line(error)}") from None


def text_pieces(path, name=None):
    """Yield the text of a file, compressed or not, piece by piece."""
    with opened(path, name) as file:
        yield from decoded(file, name or path)


def text_file(path, name, separator, left_out):
    """The document that a file of text is or, with a separator, those that it holds."""
    try:
        pieces = text_pieces(path, name)
        for text in ["".join(pieces)] if separator is None else split(pieces, separator):
            if text and not text.isspace():
                yield text
    except UserError as error:
        left_out.bad(name, error)


def seek_hub():
    """Whether the Hugging Face hub answers. If it does not within three seconds, its client, not imported yet, is told to look into its
    cache alone, since it would try for twenty. Behind a proxy that cannot be known."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are not the user's concern
    if urllib.request.getproxies():
        return True
    answers = []

    def connect():
        host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
        with suppress(OSError):
            socket.create_connection((host.hostname, host.port or (80 if host.scheme == "http" else 443)), 3).close()
            answers.append(host)

    thread = threading.Thread(target=connect, daemon=True)  # for looking up a name has no time limit of its own
    thread.start()
    thread.join(3)
    if not answers:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return bool(answers)


def hub_dataset(name, revision=None):
    """The splits of a data set of the Hugging Face hub, through its cache. Raises UserError if it cannot be loaded."""
    answers = seek_hub()
    import datasets

    try:
        return datasets.load_dataset(name, revision=revision)
    except Exception as error:  # the library has no common base for "no network" and "no such data set"
        if getattr(error, "errno", None) in FULL:
            raise
        why = f"{type(error).__name__}: {first_line(error)}" if answers else "the hub does not answer, and its cache here does not have it"
        raise UserError(f"data set {name!r} could not be loaded ({why}): give a local FILE") from None


def saved_dataset(folder):
    """What save_to_disk() of `datasets` wrote: its rows, or its splits. Raises UserError if it is damaged."""
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # of the system's, arrow's, JSON's and the library's own
        raise UserError(f"{folder} is a damaged data set ({type(error).__name__}: {first_line(error)}): save it again") from None


def dataset(found, name, key, left_out):
    """The documents of a data set: of its split "train" or of its only one."""
    if isinstance(found, dict):
        split = "train" if "train" in found else next(iter(found)) if len(found) == 1 else None
        if split is None:
            raise UserError(f"{name} has the splits {', '.join(found)}: save the one that you want with save_to_disk() and give that")
        for other in found.keys() - {split}:
            left_out("splits that are not train", f"{name}, {other}")
        found = found[split]
    yield from column(found.with_format("arrow").iter(ROWS), found.features.arrow_schema, name, key, left_out)


def form(path, name):
    """(kind, start) of a file: "jsonl", "json", "parquet", "text", or the ending of a kind that is not taken; its first bytes."""
    suffixes = Path(name).suffixes
    suffix = "".join(suffixes[-1:]).lower()
    if suffix in ENDINGS:
        suffix = "".join(suffixes[-2:-1]).lower()
    with opened(path, name) as file:
        start = file.read(START)
    if start.startswith(b"PAR1"):
        return "parquet", start
    if suffix in NOT_TAKEN:
        return suffix, start
    for beginning, kind in BEGINNINGS.items():
        if start.startswith(beginning):
            return kind, start
    if start[257:262] == b"ustar":
        return ".tar", start
    text = next(decoded(io.BytesIO(start), name, "replace")).lstrip()
    if suffix in (".jsonl", ".ndjson"):
        return "json" if text.startswith("[") else "jsonl", start
    if suffix == ".json" or not suffix and re.match(r'(\[\s*)?\{\s*"', text):
        return "json", start
    if suffix == ".parquet":
        return "parquet", start
    return "text", start


def reader(kind, name):
    """The function that reads the records of a file of this kind, by form(). Raises UserError for a kind that is not taken."""
    if kind in NOT_TAKEN:
        raise UserError(f"{name} is a {kind} file, which is not taken: {NOT_TAKEN[kind].replace('FILE', str(name))}")
    return {"json": json_file, "parquet": parquet}.get(kind, jsonl)
