"""The one reader and writer of a file of tensors (safetensors), whose header holds JSON and "sha256", the hash of the file with the
digits of that hash set to zero. A run's checkpoints are such files (training/checkpoint.py says what they hold), and so are the
sessions of sample.py."""

import errno
import hashlib
import json
import os
import re
from pathlib import Path

from common import UserError, replacing

HEADER = ("config", "tokenizer", "run")  # of a checkpoint
DIGITS = 64  # of the hash
BEST = "best.safetensors"  # of a run's checkpoints the one whose validation loss is the lowest


def save(path, tensors, header):
    """Write tensors {name: tensor}, a header {name: dict that JSON can hold}, and the hash of both, whole or not at all."""
    with replacing(path) as temporary:
        save_tensors(temporary, tensors, {key: json.dumps(value) for key, value in header.items()} | {"sha256": "0" * DIGITS}, path)
        with open(temporary, "r+b") as file:
            at, digest = hashed(file)
            file.seek(at)
            file.write(digest)


def save_tensors(path, tensors, metadata, shown=None):
    """Write tensors {name: tensor} and {name: text} to a file. shown: the path that an error names. Raises OSError."""
    from safetensors import SafetensorError  # here, because it brings torch, which most readers of a corpus do without
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # its form of the system's error
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, f"{shown or path} could not be written: {error}") from None


def hashed(file):
    """(offset of the hash's digits in an open file, what they should be). Raises ValueError if there are none."""
    file.seek(0)
    start = file.read(8)
    start += file.read(min(int.from_bytes(start, "little"), os.fstat(file.fileno()).st_size))
    at = start.find(mark := b'"sha256":"') + len(mark)
    if at < len(mark):
        raise ValueError("its header has no sha256")
    digest = hashlib.sha256(start[:at] + b"0" * DIGITS + start[at + DIGITS :])
    while part := file.read(1 << 24):
        digest.update(part)
    return at, digest.hexdigest().encode()


def load(path, names, kind):
    """(tensors, header) of a file that save() wrote; the header has the dicts called `names`, and "sha256". Runs no code from the
    file. Raises FileNotFoundError, or UserError if it is damaged or no `kind`."""
    from safetensors import SafetensorError, safe_open

    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with open(path, "rb") as file:
            at, digest = hashed(file)
            file.seek(at)
            if file.read(DIGITS) != digest:
                raise ValueError("its sha256 is not that of its content")
        with safe_open(path, "pt") as file:
            header = {key: json.loads(file.metadata()[key]) for key in names}
            if not all(isinstance(value, dict) for value in header.values()):
                raise ValueError("its header is not of objects")
            return {name: file.get_tensor(name) for name in file.keys()}, header | {"sha256": digest.decode()}
    except PermissionError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, or no {kind} ({type(error).__name__}: {error})") from None


def find(out_dir):
    """The path of a run's best checkpoint, or of its newest if there is no best yet; a checkpoint itself stands for itself. Raises
    UserError if there is none."""
    if Path(out_dir).is_file():
        return Path(out_dir)
    for path in [Path(out_dir) / BEST, *steps(out_dir)]:
        if path.exists():
            return path
    what = "it should be an output folder of train.py" if Path(out_dir).is_dir() else "there is no such folder or file"
    raise UserError(f"no checkpoint in {out_dir}: {what}")


def step_path(out_dir, step):
    return Path(out_dir) / f"step_{step:08d}.safetensors"


def steps(out_dir):
    """The paths of the checkpoints to resume from, the newest first."""
    return sorted((path for path in Path(out_dir).glob("step_*") if re.fullmatch(r"step_\d{8,}\.safetensors", path.name)), reverse=True)


def read(path):
    """(tensors, header) of a checkpoint, as load() gives them."""
    try:
        return load(path, HEADER, "checkpoint of train.py")
    except UserError as error:
        newest = next(iter(steps(Path(path).parent)), None)
        if Path(path).name != BEST or newest is None:
            raise
        raise UserError(f"{error}: {newest} is of the same run, and may be whole") from None
