"""What every script shares: how a user's mistake ends a program, how a file is replaced as a whole, settings, arguments."""

import argparse
import codecs
import difflib
import errno
import fcntl
import io
import json
import math
import os
import re
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import field
from pathlib import Path

RANK, LOCAL_RANK, WORLD = (
    int(os.environ.get(name, default))  # among the processes that torchrun started
    for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
)
ROOT = Path(__file__).resolve().parent  # root of the checkout
NUMBER = (int, float)  # for read_lines
MARKS = {  # byte-order marks; UTF-32's first, since one of UTF-16's begins it
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEXT_PIECE = 1 << 20  # bytes of a text read at a time
POSITIVE = (lambda value: 0 < value < 2**31, "positive and below 2^31")
NOT_NEGATIVE = (lambda value: 0 <= value < 2**31, "0 or more and below 2^31")
FRACTION = (lambda value: 0 <= value < 1, "at least 0 and below 1")


class UserError(ValueError):
    """A user's mistake: one line that says what was wrong, with which value, and what to do."""


def one_of(*choices):
    return (lambda value: value in choices, "one of " + ", ".join(choices))


def setting(default, meaning, rule=None):
    """A dataclass field with its meaning and its rule: (predicate of the value, what the value must be) or None."""
    return field(default=default, metadata={"meaning": meaning, "rule": rule})


def check_rule(f, value, source=None):
    """Raise UserError unless the value satisfies the rule of the field f. source: where it was given, for the message."""
    rule = f.metadata["rule"]
    if rule and not rule[0](value):  # NaN and infinity too
        raise UserError((f"{source}: " if source else "") + f"{f.name} = {value!r} must be {rule[1]}")


NANOGPT = {
    "max_iters": "max_steps",
    "lr": "learning_rate",
    "gradient_accumulation_steps": "grad_accum_steps",
    "warmup_iters": "warmup_steps",
    "lr_decay_iters": "lr_decay_steps",
    "dataset": "data_dir",
}  # its names for settings, and ours


def meant(name, names, dashes=""):
    """ ", did you mean ...?" of a name that is none of `names`, nanoGPT's among them; "" where none is near."""
    name = name.replace("-", "_")
    near = [NANOGPT[name]] if NANOGPT.get(name) in names else difflib.get_close_matches(name, names, 1)
    return f", did you mean {dashes}{near[0]}?" if near else ""


def package_missing(kind, error, trace):
    """The excepthook: for a package of requirements.txt that is not installed, one line and exit code 2."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    name = "scikit-learn" if name == "sklearn" else name
    if kind is ModuleNotFoundError and name in re.findall("^[a-z-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE):
        print(f"{Path(sys.argv[0]).name}: error: {name} is not installed: pip install -r {ROOT / 'requirements.txt'}", file=sys.stderr)
        sys.exit(2)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = package_missing


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors, like every other mistake."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message} (--help lists the options)")

    def parse_args(self, *args):
        parsed, unknown = self.parse_known_args(*args)
        if unknown:
            names = [option.removeprefix("--") for option in self._option_string_actions]
            hint = meant(unknown[0].removeprefix("--").partition("=")[0], names, "--") if unknown[0].startswith("--") else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed


def run(main):
    """Call main() and end the program with exit code 0, or 1 for a disk that is full or fails, 2 for a user's mistake (one line on
    stderr either way), 130 after Ctrl-C, 141 if the reader of the output has left."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode))
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left, as in `sample.py ... | head`
        end_output()
        sys.exit(141)
    except (UserError, OSError) as error:
        rank = f" on rank {RANK}" if WORLD > 1 else ""
        print(f"{Path(sys.argv[0]).name}: error{rank}: {' '.join(str(error).split())}", file=sys.stderr)
        end_output()
        sys.exit(1 if getattr(error, "errno", None) in (*FULL, errno.EIO) else 2)
    except KeyboardInterrupt:
        sys.exit(130)


class Unread:
    """A stream whose reader may leave (`| head`, a `tee` that dies, a terminal that is gone): what is written after that is dropped."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.unless_gone(self.stream.write, text)

    def flush(self):
        return self.unless_gone(self.stream.flush)

    def unless_gone(self, function, *args):
        try:
            return function(*args)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def first_line(error):
    """What an exception says first, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def end_output():
    """Flush standard output, if that is possible, and let nothing more reach it."""
    with suppress(OSError):
        sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; when the block ends well it becomes `path`, otherwise it is removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.umask(umask := os.umask(0))
        os.chmod(temporary, 0o666 & ~umask)  # some writers create files that others may not read
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the new name, too, survives a power cut
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def output_folder(path):
    """Make the folder `path`. If the block fails, a folder that did not exist before is removed again, unless it holds
    something. An error that says that the disk is full gets its name."""
    existed = path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException as error:
        if getattr(error, "errno", None) in FULL and error.filename is None:
            error.filename = str(path)
        if not existed and not any(path.iterdir()):
            path.rmdir()
        raise


def refuse_existing(path, overwrite):
    """Raise UserError if `path` exists and may not be overwritten."""
    if Path(path).exists() and not overwrite:
        raise UserError(f"{path} exists already: give --overwrite to replace it, or another place")


def check_place(path, suffix, overwrite, option="--out"):
    """Raise UserError unless `path` ends in `suffix`, its folder exists, and it is not there yet or may be overwritten."""
    if path.suffix != suffix:
        raise UserError(f"{option}={path} must end in {suffix}")
    if not path.parent.is_dir():
        raise UserError(f"folder {path.parent} does not exist: make it first")
    refuse_existing(path, overwrite)


def decoded(file, name, errors="strict"):
    """Yield the text of a file opened for bytes, piece by piece: UTF-8, or UTF-16 or UTF-32 if it begins with their byte-order mark.
    A mark is no part of the text, and every line end (CRLF, lone CR) becomes \\n; nothing else is changed.

    Raises UserError, with the byte and its offset, for what is no text. errors: as of bytes.decode(), to go on there instead.
    """
    data = file.read(TEXT_PIECE)
    mark = next((mark for mark in MARKS if data.startswith(mark)), b"")
    encoding, data, offset = MARKS.get(mark, "utf-8"), data[len(mark) :], len(mark)
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(errors), translate=True)
    while True:
        if errors == "strict" and encoding == "utf-8" and (zero := data.find(b"\0")) >= 0:
            raise UserError(
                f"{name} is no text: a zero byte at offset {offset + zero} (not text at all, or UTF-16 without a byte-order mark: "
                f"`iconv -f UTF-16LE -t UTF-8 {name} > NEW` converts that)"
            )
        try:
            yield decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name} is no {encoding.upper()} text: byte 0x{error.object[error.start]:02x} at offset "
                f"{offset + len(data) - len(error.object) + error.start}: convert it, by `iconv -f LATIN1 -t UTF-8 {name} > NEW` or so"
            ) from None
        if not data:
            return
        offset += len(data)
        data = file.read(TEXT_PIECE)


def read_text(path, errors="strict"):
    """The text of a file, or of standard input for "-", as decoded() reads it."""
    if str(path) == "-":
        return "".join(decoded(sys.stdin.buffer, "standard input", errors))
    with open(path, "rb") as file:
        return "".join(decoded(file, path, errors))


def append_line(path, record):
    """Append an object to a JSON Lines file, in place of an unterminated last line, if a killed writer left one. Several processes
    may do so at a time."""
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        lines = file.read()
        if lines and not lines.endswith(b"\n"):
            file.truncate(lines.rfind(b"\n") + 1)
        file.write(json.dumps(record).encode() + b"\n")


def read_lines(path, **fields):
    """[(line, object)] of a JSON Lines file; an unterminated last line, which a killed writer leaves, is left out. fields: names
    and types of the fields that each object must have, numbers finite. Raises UserError for a line that is not such an object."""
    records = []
    for number, line in enumerate(read_text(path, "replace").splitlines(keepends=True), 1):
        if line.endswith("\n"):
            try:
                records.append((line, json.loads(line)))
                for field, kind in fields.items():
                    value = records[-1][1][field]
                    if not isinstance(value, kind) or isinstance(value, bool) or isinstance(value, float) and not math.isfinite(value):
                        raise TypeError(f"{field} is {value!r}")
            except KeyError as error:
                raise UserError(f"{path}, line {number} has no {error}: mend or remove it, or leave this file out") from None
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(f"{path}, line {number} is damaged ({type(error).__name__}: {error}): mend or remove it") from None
    return records


def choose_device(name, local_rank=0):
    """The torch.device called `name`; "auto" is cuda, else mps, else cpu; "cuda" is cuda:local_rank. Raises UserError if it is unusable."""
    import torch  # here, because scripts that only prepare data do without it

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here: {first_line(error)}") from None
    return device


def commit():
    """The git commit of the running code, "-dirty" if it was changed; None outside a checkout, and without git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"], capture_output=True, text=True, cwd=ROOT
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def peak_rss_mb():
    """Peak resident memory of this process, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count that of the process that started this one, too
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
