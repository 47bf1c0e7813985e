"""What every script shares: how a user's mistake ends a program, how a file is replaced as a whole, settings, arguments."""

import argparse
import codecs
import difflib
import errno
import fcntl
import glob
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import tokenize
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import field
from pathlib import Path

# Read when torch is imported after this. Its threads wait for each other in a loop, by default for milliseconds, which on a machine whose
# cores have other work too takes the time of the thread that is waited for; asleep at once they lose time on an idle one. This is between.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
RANK, LOCAL_RANK, WORLD, RESTARTS = (
    int(os.environ.get(name, default))  # among the processes that torchrun started, and how often --max-restarts restarted them
    for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("TORCHELASTIC_RESTART_COUNT", 0))
)
ROOT = Path(__file__).resolve().parent  # root of the checkout
NUMBER = (int, float)  # for read_lines
DAMAGED_ARRAY = (  # what numpy.load raises for a damaged file
    *(ValueError, TypeError, LookupError, EOFError, RuntimeError, SyntaxError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)
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


def setting(default, meaning, rule=None, group=None):
    """A dataclass field with its meaning and its rule: (predicate of the value, what the value must be) or None. group: the heading
    in --help above this setting and those that follow it."""
    return field(default=default, metadata={"meaning": meaning, "rule": rule, "group": group})


def check_rule(f, value, source=None):
    """Raise UserError unless the value satisfies the rule of the field f. source: where it was given, for the message."""
    rule = f.metadata["rule"]
    if rule and not rule[0](value):  # NaN and infinity too
        raise UserError((f"{source}: " if source else "") + f"{f.name} = {value!r} must be {rule[1]}")


OTHER_NAMES = {
    "max_iters": "max_steps",
    "steps": "max_steps",
    "gradient_accumulation_steps": "grad_accum_steps",
    "warmup_iters": "warmup_steps",
    "lr_decay_iters": "lr_decay_steps",
    "dataset": "data_dir=data/NAME",
    "start": "prompt",
    "lr": "learning_rate",
    "wd": "weight_decay",
    "output_dir": "out_dir",
    "resume": "init_from=resume",
    "seq_len": "block_size",
    "context_length": "block_size",
    "d_model": "n_embd",
    "hidden_size": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "bf16": "dtype=bfloat16",
    "gpu": "device=cuda",
    "cuda": "device=cuda",
    "cpu": "device=cpu",
}  # what nanoGPT and others call a setting, and what it is here
NONE_HERE = {
    "always_save_checkpoint": "checkpoint_interval and keep_last say which checkpoints stay, and the best one always does",
    "backend": "several processes use nccl on GPUs, gloo on CPUs",
    "decay_lr": "lr_schedule = constant does not decay, cosine and plateau do",
    "bias": "no layer has one",
    "fp16": "dtype = bfloat16 needs no scaled loss",
    "epochs": "max_steps says how long a run is",
    "num_train_epochs": "max_steps says how long a run is",
}  # such settings without one here, and why


def meant(name, names, dashes=""):
    """What to say of a name that is none of `names`: the right one, or why there is none; "" where neither is known."""
    name = name.replace("-", "_").lower()
    if name in NONE_HERE:
        return f", it has none here: {NONE_HERE[name]}"
    off = name.removeprefix("no_")
    near = OTHER_NAMES.get(name) or (f"{off}=False" if off != name and off in names else "")
    if near.partition("=")[0] not in names:
        near = next(iter(difflib.get_close_matches(name, names, 1)), "")
    return f", did you mean {dashes}{near}?" if near else ""


def not_by_us(kind, error, trace):
    """The excepthook, for what happens while a script imports: Ctrl-C ends it with exit code 130, without a traceback; a package of
    requirements.txt that is not installed with one line and exit code 2."""
    if interrupted(error):
        sys.exit(130)
    name = (getattr(error, "name", None) or "").partition(".")[0]
    name = "scikit-learn" if name == "sklearn" else name
    if kind is ModuleNotFoundError and name in re.findall("^[a-z-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE):
        print(f"{Path(sys.argv[0]).name}: error: {name} is not installed: pip install -r {ROOT / 'requirements.txt'}", file=sys.stderr)
        sys.exit(2)
    sys.__excepthook__(kind, error, trace)


def interrupted(error):
    """Whether an exception is Ctrl-C, or what a package made of it while it was imported."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def not_raised(lost):
    """The unraisablehook: Ctrl-C that came in a callback of the interpreter's, where it is dropped, comes again a moment later."""
    if lost.exc_type is KeyboardInterrupt:
        with suppress(RuntimeError):  # the interpreter ends already
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(lost)


sys.excepthook, sys.unraisablehook = not_by_us, not_raised


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors, like every other mistake. Options may be written with - for _, and True or
    False may follow a flag."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        missing = re.search(r"arguments are required: (.*)", message)
        example = re.search(r"^ +((?:python|bash) .*?)(  |$)", self.description, re.M)  # the first of the doc-string
        if missing:
            message = f"{missing[1]} is missing, as in `{example[1] if example else f'python {sys.argv[0]} {missing[1]}'}`"
        raise UserError(f"{message} (--help lists the options)")

    def parse_args(self, words=None):
        parsed, unknown = self.parse_known_intermixed_args(self.spelled(sys.argv[1:] if words is None else words))
        if unknown:
            self.refuse(unknown)
        return parsed

    def spelled(self, words):
        """The words of a command line, with its options as argparse knows them. Raises UserError for an unknown option."""
        if "--" in words:  # what follows are paths, which argparse, where they begin with a dash, loses
            at = words.index("--")
            words = [*words[:at], *(f"./{word}" if re.match("-.", word) else word for word in words[at + 1 :])]
        flags, spelled = [name for name, action in self._option_string_actions.items() if action.nargs in (0, "?")], []
        for word in words:
            if spelled and spelled[-1] in flags and word.lower() in ("true", "false"):
                spelled[-1] += f"={word}"
                continue
            name, equals, value = word.partition("=")
            if word.startswith("--") and " " not in name:
                name = "--" + name[2:].replace("-", "_")
                if name not in self._option_string_actions:
                    self.refuse([word])
            spelled.append(name + equals + value)
        return [word for word in map(self.flagged, spelled) if word is not None]

    def flagged(self, word):
        """A flag's word as argparse takes it: without a value where it has none; None where it is off. Others stay as they are."""
        name, equals, value = word.partition("=")
        action = self._option_string_actions.get(name)
        if action and action.nargs == "?":
            return word if equals else f"{name}=True"
        if action and action.nargs == 0 and equals:
            if value.lower() not in ("true", "false"):
                self.error(f"{word} must be True or False")
            return name if value.lower() == "true" else None
        return word

    def _get_value(self, action, word):
        if action.type is Path and not word:  # which Path takes for the current folder
            raise argparse.ArgumentError(action, "an empty path names nothing: give a path")
        return super()._get_value(action, word)

    def refuse_given(self, args, names, why):
        """Raise UserError for the first of these options that is given, which nothing would come of."""
        for name in names:
            if getattr(args, name) != self.get_default(name):
                raise UserError(f"--{name} {why}")

    def refuse(self, words):
        """Raise UserError for words that are no arguments, with what the first of them was meant to be."""
        names = [option.removeprefix("--") for option in self._option_string_actions]
        places = [action.metavar or action.dest for action in self._positionals._group_actions]
        name, equals, value = words[0].lstrip("-").partition("=")
        if place := next((place for place in places if place.partition(".")[0] == name.upper()), None):
            hint = f": {place} stands by itself, without --{name}"
        elif words[0].startswith("-") or equals and name in (*names, *OTHER_NAMES):
            hint = meant(name, names, "--")
        else:
            hint = f": only one {places[0]} is taken" if places else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{hint}")


@contextmanager
def waiting(what):
    """Say on standard error what the block does, once it has taken three seconds; not where TQDM_DISABLE hides progress."""

    def say():
        from tqdm import tqdm  # here, because not every script needs it

        tqdm.write(f"{what} ...", file=sys.stderr)

    timer = threading.Timer(3, say)
    timer.daemon = True
    if RANK == 0 and not os.environ.get("TQDM_DISABLE"):
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


NOTES = []  # the lines of note() that are in no log yet


def note(line):
    """Say a line on standard error, of rank 0 alone; a run's log.txt has it too."""
    if RANK == 0:
        print(line, file=sys.stderr)
        NOTES.append(line)


def end(number, _):
    """The handler of a signal that ends the program: the same one may come twice, to this process and to its process group."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def run(main):
    """main(), or the end of the program: with exit code 1 for a disk that is full or fails, 2 for a user's mistake (one line on
    stderr either way), 130 after Ctrl-C, 141 if the reader of the output has left."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode))
    if WORLD == 1 and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):  # by default they end a program before it has removed what is half written
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, end)
    try:
        result = main()
        sys.stdout.flush()
        return result
    except BrokenPipeError:  # the reader of our output left, as in `sample.py ... | head`
        end_output()
        sys.exit(141)
    except (UserError, OSError, UnicodeEncodeError) as error:
        rank = f" on rank {RANK}" if WORLD > 1 else ""
        print(f"{Path(sys.argv[0]).name}: error{rank}: {' '.join(told(error).split())}", file=sys.stderr)
        end_output()
        sys.exit(1 if getattr(error, "errno", None) in (*FULL, errno.EIO) else 2)
    except KeyboardInterrupt:
        sys.exit(130)


def told(error):
    """What an exception says; of the system's about a file: which, what is wrong with it and what to do."""
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[max(0, error.start - 40) : error.end]!r} holds a byte that is no UTF-8: give another name"
    number, path = getattr(error, "errno", None), getattr(error, "filename", None)
    if path is None and number in FULL and error.strerror == os.strerror(number):
        return f"{error.strerror}, where the output goes: free some, or let it go elsewhere"
    if number == errno.EFBIG:
        return f"{error}, which `ulimit -f` allows no more of: raise that, or write less"
    if not isinstance(path, (str, os.PathLike)) or number in (*FULL, errno.EIO):
        return str(error)
    path = Path(re.sub(r"(^|/)\.([^/]+)\.\d+\.tmp$", r"\1\2", str(path)))  # what was to become of replacing()'s temporary file
    if number == errno.ENOENT and path.parent.is_dir():
        return f"{path} does not exist, and is to be read: give a file that is there" if path.name else "an empty path names no file"
    what = {
        errno.ENOENT: f"cannot be read or written: there is no folder {path.parent}: make it, or give another path",
        errno.EISDIR: "is a folder, where a file is meant: give the path of a file",
        errno.ENOTDIR: f"cannot be read or written: {path.parent} is a file, no folder: give another path",
        errno.EACCES: "may not be read or written (permission denied): change its permissions, or give another path",
        errno.EROFS: "cannot be written: its file system is for reading only: give another path",
        errno.ENAMETOOLONG: "has too long a name: give another path",
    }.get(number, f"cannot be read or written ({error.strerror}): give another path")
    return f"{path} {what}"


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


def is_running(number):
    """Whether there is a process of this number."""
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; when the block ends well it becomes `path`, otherwise it is removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # by one that was killed
        if (number := left.name.split(".")[-2]).isdecimal() and not is_running(int(number)):
            left.unlink(missing_ok=True)
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
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (*FULL, errno.EIO):
            raise
        raise UserError(f"the folder {path} cannot be made ({error.strerror}): give another --out_dir") from None
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
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{path} exists already: give --overwrite to replace it, or another place")


def check_place(path, suffix, overwrite, option="--out"):
    """Raise UserError unless `path` ends in `suffix`, its folder exists, and it is not there yet or may be overwritten."""
    if path.suffix != suffix:
        raise UserError(f"{option}={path} must end in {suffix}")
    if not path.parent.is_dir():
        what = "is a file, no folder: give another path" if path.parent.exists() else "does not exist: make it first"
        raise UserError(f"folder {path.parent} {what}")
    if path.is_dir():
        raise UserError(f"{option}={path} is a folder: give the path of a file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write to {path.parent} (permission denied): give another {option}")
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


def check_lines(path):
    """Raise UserError for a file of results that is there and that append_line() is not meant for: a line of it begins no object."""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            if any(not line.startswith(b'{"') for line in file):
                raise UserError(f"--results={path} is no JSON Lines file, to which a line could be added: give another")


def read_lines(path, half=False, /, **fields):
    """[(line, object)] of a JSON Lines file; an unterminated last line, which a killed writer leaves, is left out. fields: names
    and types of the fields of each object; numbers are finite, whole ones fit in 64 bits, and what may be None may lack. half: a last
    line that is no JSON is left out too, and such a line is named on standard error. Raises UserError for a line that is not such an
    object."""
    records, lines = [], read_text(path, "replace").splitlines(keepends=True)
    if half := half and lines and not is_json(lines[-1]):
        lines.pop()
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            try:
                record = json.loads(line)
                for field, kind in fields.items():
                    value = record.get(field) if isinstance(None, kind) else record[field]
                    if not isinstance(value, kind) or isinstance(value, bool) or isinstance(value, NUMBER) and not fits(value):
                        raise TypeError(f"{field} is {value!r}")
                records.append((line, record))
            except KeyError as error:
                raise UserError(f"{path}, line {number} has no {error}: mend or remove it, or leave this file out") from None
            except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                raise UserError(
                    f"{path}, line {number} is damaged ({type(error).__name__}: {error}): mend or remove it, or leave this file out"
                ) from None
    if half and records:
        print(f"{Path(sys.argv[0]).name}: warning: {path}, line {number + 1} is half written: passed over", file=sys.stderr)
    return records


def fits(number):
    return -(2**63) <= number < 2**63 if isinstance(number, int) else math.isfinite(number)


def is_json(line):
    try:
        json.loads(line)
        return line.endswith("\n")
    except (ValueError, RecursionError):
        return False


def choose_device(name, local_rank=0):
    """The torch.device called `name`; "auto" is cuda, else mps, else cpu; "cuda" is cuda:local_rank. Raises UserError if it is unusable
    or unknown."""
    import torch  # here, because scripts that only prepare data do without it

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    reason, visible = None, os.environ.get("CUDA_VISIBLE_DEVICES")
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,4})?", name):
        reason = "it is none of auto, cpu, mps, cuda and cuda:N"
    elif name == "mps" and not torch.backends.mps.is_available():
        reason = "torch finds no Apple GPU"
    elif name.startswith("cuda") and not torch.cuda.is_available():
        found = "finds no GPU" if torch.backends.cuda.is_built() else "is built without CUDA"
        reason = f"torch {found}" + ("" if visible is None else f", with CUDA_VISIBLE_DEVICES={visible!r}")
    elif name.startswith("cuda"):
        name, count = f"cuda:{local_rank}" if name == "cuda" else name, torch.cuda.device_count()
        if int(name[5:]) >= count:
            reason = f"there are {count}, from cuda:0 on" + ("" if visible is None else f", with CUDA_VISIBLE_DEVICES={visible!r}")
    try:
        if not reason:
            torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # a driver that does not fit, a device that is full
        reason = first_line(error)
    if reason:
        raise UserError(f"device {name!r} cannot be used here: {reason}: give another --device, or leave it out")
    return torch.device(name)


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
