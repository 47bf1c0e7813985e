"""A prepared corpus is a folder: train.bin and val.bin hold token numbers (uint16, or uint32 past 65,536 tokens),
tokenizer.json turns them back into text, and meta.json says what they are. prepare() writes it, Corpus reads it."""

import builtins
import bz2
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import Parser, UserError, output_folder, refuse_existing, replacing
from data import checkpoint_file
from data import tokenizer as tokenizers

FILES = ("meta.json", "tokenizer.json", "train.bin", "val.bin")
COMPRESSED = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ\0": lzma}
ZSTD = b"\x28\xb5\x2f\xfd"
BATCH_BYTES = 1 << 22  # characters of text tokenised at a time
SKIPPED = 1000  # broken records that --skip_bad leaves out
COUNT_TOKENS = 1 << 24  # tokens counted at a time
BASELINE_TOKENS = 10_000_000  # validation tokens on which the baselines are measured, at most


def parser(description, out_dir):
    """The options that every prepare.py has."""
    options = Parser(description)
    options.add_argument("--out_dir", type=Path, default=out_dir, help="folder to write (default: %(default)s)")
    options.add_argument(
        "--tokenizer",
        default="bpe",
        help="bpe: trained on this corpus; char; a name of tiktoken's, such as gpt2; or that of another corpus's folder, "
        "or of an output folder or a checkpoint of train.py (default: %(default)s)",
    )
    options.add_argument("--vocab_size", type=int, default=30522, help="of a bpe, the end token counted (default: %(default)s)")
    options.add_argument(
        "--val_fraction", type=float, default=0.01, help="part of the documents kept for validation (default: %(default)s)"
    )
    options.add_argument(
        "--skip_bad",
        action="store_true",
        help=f"leave out records that are broken, {SKIPPED:,} at most, instead of ending at the first one",
    )
    options.add_argument("--overwrite", action="store_true", help="replace a corpus that is there already")
    return options


class LeftOut:
    """What is not taken of a source, counted by its reason, each file or record once, however often the source is read."""

    def __init__(self, skip_bad=False):
        self.skip_bad, self.names = skip_bad, {}

    def __call__(self, reason, name):
        self.names.setdefault(reason, set()).add(name)

    def bad(self, name, error):
        """A broken record. Raises UserError, unless such are to be left out and there are not too many."""
        if not self.skip_bad:
            raise UserError(f"{name}: {error} (--skip_bad leaves such records out)")
        self("broken", name)
        if len(self.names["broken"]) > SKIPPED:
            raise UserError(f"{name}: {error}; these are more than {SKIPPED:,} broken records")

    def report(self):
        counts = [
            f"{len(names):,} {reason}" + (f" (such as {min(names)})" if reason == "broken" else "") for reason, names in self.names.items()
        ]
        if counts:
            print("left out: " + ", ".join(counts))


def prepare(texts, source, args, one_document=False):
    """Tokenise a corpus into args.out_dir.

    texts: a function that starts a new iterator over the documents, each a str; it is called three times at most.
    source: where they come from, for meta.json.
    one_document: the corpus is one running text: no end token, and its last val_fraction is for validation. Otherwise
    the hash of a document's text decides whether it is for validation, wherever it stands; the one with the lowest hash
    always is.

    Raises UserError for an empty corpus or a bad option. Memory does not grow with the corpus.
    """
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction={args.val_fraction} must be between 0 and 1")
    if args.tokenizer == "bpe" and not 257 <= args.vocab_size < 2**24:
        raise UserError(f"--vocab_size={args.vocab_size} must be 257 (256 bytes and the end token) to {2**24 - 1}")
    for name in FILES:
        refuse_existing(args.out_dir / name, args.overwrite)
    with output_folder(args.out_dir):
        _prepare(texts, source, args, one_document)


def prepare_records(records, source, args):
    """prepare() the records {"text": [id, title, body]} of an iterator, and write them to documents.jsonl."""
    refuse_existing(args.out_dir / "documents.jsonl", args.overwrite)
    with output_folder(args.out_dir), replacing(args.out_dir / "documents.jsonl") as file:
        with open(file, "w", encoding="utf-8", errors="replace") as lines:
            for record in records:
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        prepare(lambda: read_jsonl([file]), source, args)


def survey(texts):
    """(sha256 of a corpus, as in meta.json; number of its documents; the lowest of their hashes) from an iterator over them."""
    sha256, documents, lowest = hashlib.sha256(), 0, 2**64
    for text in tqdm(texts, desc="reading", unit=" documents", disable=None):
        digest = hashlib.sha256(text.encode())
        sha256.update(digest.digest())
        documents += 1
        lowest = min(lowest, _number(digest))
    return sha256.hexdigest(), documents, lowest


def _prepare(texts, source, args, one_document):
    sha256, documents, lowest = survey(texts())
    if documents == 0:
        raise UserError(f"{source}: no documents: the corpus is empty")
    if documents == 1 and not one_document:
        raise UserError(f"{source}: one document only: two at least are needed, one of them for validation")
    highest_val = max(int(args.val_fraction * 2**64), lowest + 1)

    def pieces():
        for text in texts():
            if one_document:
                cut = int(len(text) * (1 - args.val_fraction))
                yield "train", text[:cut]
                yield "val", text[cut:]
            else:
                yield "val" if _number(hashlib.sha256(text.encode())) < highest_val else "train", text

    training_texts = (text for split, text in pieces() if split == "train")
    if args.tokenizer == "bpe":
        tokenizer = tokenizers.BPE.train(
            tqdm(training_texts, desc="training the tokenizer", unit=" documents", disable=None), args.vocab_size
        )
    elif args.tokenizer == "char":
        tokenizer = tokenizers.Characters.train((text for _, text in pieces()), end_token=not one_document)
    elif (Path(args.tokenizer) / "tokenizer.json").exists():
        tokenizer = Corpus(args.tokenizer).tokenizer
    elif Path(args.tokenizer).exists():
        tokenizer = tokenizers.from_json(checkpoint_file.read(checkpoint_file.find(args.tokenizer))[1]["tokenizer"])
    else:
        tokenizer = tokenizers.BPE.named(args.tokenizer)

    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 65536 else "uint32")
    counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in ("train", "val")}
    end = [] if one_document else [tokenizer.end_token]
    with ExitStack() as stack:  # left in reverse order: meta.json is renamed last, so it vouches for the rest
        paths = {name: stack.enter_context(replacing(args.out_dir / name)) for name in FILES}
        files = {split: stack.enter_context(open(paths[f"{split}.bin"], "wb")) for split in counts}
        progress = stack.enter_context(tqdm(total=documents, desc="tokenising", unit=" documents", disable=None))
        for batch in _batches(pieces()):
            for (split, text), tokens in zip(batch, tokenizer.encode_batch([text for _, text in batch])):
                np.array(tokens + end, dtype).tofile(files[split])
                counts[split]["documents"] += 1
                counts[split]["tokens"] += len(tokens) + len(end)
                counts[split]["bytes"] += len(text.encode())
            progress.update(len(batch))
        for split, file in files.items():
            file.flush()
            if counts[split]["tokens"] < 2:
                raise UserError(f"{source}: the {split} split is empty: the corpus is too small for --val_fraction={args.val_fraction}")
        baselines = unigram_and_bigram_loss(*(np.memmap(paths[f"{split}.bin"], dtype, "r") for split in counts), tokenizer.vocab_size)
        paths["tokenizer.json"].write_text(json.dumps(tokenizer.to_json()))
        paths["meta.json"].write_text(
            json.dumps(
                {
                    "source": str(source),
                    "sha256": sha256,
                    "tokenizer": tokenizer.kind,
                    "vocab_size": tokenizer.vocab_size,
                    "dtype": dtype.name,
                    "val_fraction": args.val_fraction,
                    **counts,
                    "unigram_loss": baselines[0],
                    "bigram_loss": baselines[1],
                },
                indent=1,
            )
            + "\n"
        )

    for split, count in counts.items():
        print(
            f"{args.out_dir / split}.bin: {count['documents']:,} documents, {count['tokens']:,} tokens, "
            f"{count['bytes'] / count['tokens']:.2f} bytes a token"
        )
    print(f"vocabulary: {tokenizer.vocab_size:,} ({tokenizer.kind})")
    print(f"validation loss to beat, nats a token: unigram {baselines[0]:.3f}, bigram {baselines[1]:.3f}")


def _number(digest):
    return int.from_bytes(digest.digest()[:8], "big")


def _batches(pieces):
    batch, size = [], 0
    for split, text in pieces:
        batch.append((split, text))
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def unigram_and_bigram_loss(train, val, vocab_size):
    """Mean negative log likelihood, in nats per token, of val under two models counted on train.

    unigram: p(b) = (n_b + 1) / (n + V). bigram, interpolated with it: p(b|a) = (n_ab + k p(b)) / (n_a + k)
    (a Dirichlet prior: MacKay & Peto 1995), with the k of 1, 2, 4, ... 4,096 that serves the validation text best.
    Only the pairs that val holds are counted, so memory does not grow with train.
    """
    val = np.asarray(val[:BASELINE_TOKENS], np.int64)
    pairs, repeats = np.unique(val[:-1] * vocab_size + val[1:], return_counts=True)
    n_pair = np.zeros(len(pairs), np.int64)
    n = np.zeros(vocab_size, np.int64)
    for start in tqdm(range(0, len(train), COUNT_TOKENS), desc="counting", disable=None, leave=False):
        tokens = np.asarray(train[start : start + COUNT_TOKENS + 1], np.int64)
        n += np.bincount(tokens[:COUNT_TOKENS], minlength=vocab_size)
        seen, times = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
        at = np.minimum(np.searchsorted(pairs, seen), len(pairs) - 1)
        n_pair += np.bincount(at, np.where(pairs[at] == seen, times, 0), len(pairs)).astype(np.int64)
    p = (n + 1) / (len(train) + vocab_size)
    a, b = pairs // vocab_size, pairs % vocab_size
    bigram = min(-(repeats * np.log((n_pair + k * p[b]) / (n[a] + k))).sum() for k in 2.0 ** np.arange(13))
    return float(-np.log(p[val]).mean()), float(bigram / repeats.sum())


class Corpus:
    """A prepared corpus, opened for reading: train and val are memory-mapped arrays of token numbers, meta is
    meta.json, tokenizer turns tokens into text. Raises UserError if the folder is no corpus or is damaged."""

    def __init__(self, data_dir):
        self.folder = Path(data_dir)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            self.tokenizer = tokenizers.from_json(json.loads((self.folder / "tokenizer.json").read_text()))
            self.vocab_size = self.meta["vocab_size"]
            self.train, self.val = (np.memmap(self.folder / f"{split}.bin", self.meta["dtype"], "r") for split in ("train", "val"))
            whole = (
                len(self.train) == self.meta["train"]["tokens"]
                and len(self.val) == self.meta["val"]["tokens"]
                and self.vocab_size == self.tokenizer.vocab_size
                and self.meta["val"]["bytes"] > 0
                and self.meta["dtype"] in ("uint16", "uint32")
            )
        except FileNotFoundError as error:
            name = self.folder.name
            name = name if (Path(__file__).parent / name / "prepare.py").exists() else "jsonl"
            raise UserError(
                f"no corpus in {self.folder} ({Path(error.filename).name} is missing): make it with "
                f"`python data/{name}/prepare.py --out_dir={self.folder}` (--help)"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"damaged corpus in {self.folder} ({error}): prepare it again with --overwrite") from None
        if not whole:
            raise UserError(f"damaged corpus in {self.folder}: its files are not what meta.json says: prepare it again with --overwrite")

    def documents(self, split):
        """The texts of the documents of "train" or "val", in order."""
        tokens, end, begin = getattr(self, split), self.tokenizer.end_token, 0

        def text(stop):
            try:
                return self.tokenizer.decode_bytes(tokens[begin:stop].tolist()).decode()
            except (UnicodeDecodeError, IndexError):
                raise UserError(
                    f"damaged corpus: {self.folder / split}.bin is no text between the tokens {begin} and "
                    f"{stop}: prepare it again with --overwrite"
                ) from None

        for start in range(0, len(tokens), COUNT_TOKENS):
            for stop in start + np.flatnonzero(tokens[start : start + COUNT_TOKENS] == end):
                yield text(stop)
                begin = stop + 1
        if begin < len(tokens):  # one running text has no end token
            yield text(len(tokens))

    def batch(self, starts, length, split):
        """int64 (len(starts), length + 1): the windows of a split that begin at starts. Raises UserError for an unknown token."""
        tokens = getattr(self, split)
        windows = np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64)
        if windows.max() >= self.vocab_size:
            raise UserError(
                f"damaged corpus: {self.folder / split}.bin holds token {windows.max()}, past its "
                f"vocabulary of {self.vocab_size}: prepare it again with --overwrite"
            )
        return windows

    def bits_per_byte(self, loss):
        """Bits per byte of a validation loss in nats per token."""
        return loss / math.log(2) * self.meta["val"]["tokens"] / self.meta["val"]["bytes"]


def record_text(record):
    """The document of a record {"text": "..."} or {"text": [id, title, body]}: its parts, one per line.
    Raises ValueError for anything else."""
    text = record["text"] if isinstance(record, dict) and "text" in record else None
    if isinstance(text, list) and all(isinstance(part, str) for part in text):
        text = "\n".join(text)
    if not isinstance(text, str):
        raise ValueError('a record is {"text": "..."} or {"text": [id, title, body]}')
    return text.encode("utf-8", "replace").decode().strip()


@contextmanager
def opened(path):
    """Yield a file to read bytes from; one that is compressed (gzip, bzip2, xz, zstd), by its first bytes, is decompressed. Raises
    UserError if `path` is no regular file, since it is read more than once, and inside the block for damaged compressed data."""
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file" if Path(path).exists() else f"{path} does not exist")
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
        raise UserError(f"{path} is damaged: {error}") from None


def read_jsonl(paths, left_out=None):
    """Yield the documents of JSONL files, compressed or not; empty ones are left out. Raises UserError with file and line for a
    broken record, unless left_out takes it, and for what opened() cannot read."""
    for path in paths:
        with opened(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    text = record_text(json.loads(line))
                except (ValueError, RecursionError) as error:  # broken JSON or UTF-8 too
                    (left_out or LeftOut()).bad(f"{path}, line {number}", error)
                    continue
                if text:
                    yield text


def read_text(path):
    """The text of a UTF-8 file. Raises UserError if it is not one."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None


def hub_dataset(name, revision):
    """The splits of a data set of the Hugging Face hub, through its cache. Raises UserError if it cannot be loaded."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are not the user's concern
    import datasets

    try:
        return datasets.load_dataset(name, revision=revision)
    except Exception as error:  # the library has no common base for "no network" and "no such data set"
        raise UserError(f"data set {name!r} could not be loaded ({type(error).__name__}): give a local FILE") from None
