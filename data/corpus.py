"""A prepared corpus is a folder: train.bin and val.bin hold token numbers (uint16, or uint32 past 65,536 tokens),
tokenizer.json turns them back into text, and meta.json says what they are. prepare() writes it, Corpus reads it."""

import hashlib
import json
import math
import re
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import Parser, UserError, output_folder, refuse_existing, replacing
from data import checkpoint_file
from data import tokenizer as tokenizers
from data.sources import SKIPPED, read_jsonl

VOCABULARY = 30522  # tokens of a bpe, where nothing is said
FILES = ("meta.json", "tokenizer.json", "train.bin", "val.bin")
BATCH_BYTES = 1 << 22  # characters of text tokenised at a time
SEAM = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")  # where a text may be cut: the patterns of BPE have no token across it
SEAM_SOUGHT = 10_000  # characters before that size in which a seam is looked for
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
    options.add_argument("--vocab_size", type=int, help=f"of a bpe, the end token counted (default: {VOCABULARY})")
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


def check(args):
    """Raise UserError for options that prepare() cannot take, or a corpus that may not be replaced."""
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction={args.val_fraction} must be between 0 and 1")
    if args.tokenizer != "bpe" and args.vocab_size is not None:
        raise UserError(f"--vocab_size={args.vocab_size} is of a bpe that is trained, not of --tokenizer={args.tokenizer}: leave it out")
    if args.vocab_size is not None and not 257 <= args.vocab_size < 2**24:
        raise UserError(f"--vocab_size={args.vocab_size} must be 257 (256 bytes and the end token) to {2**24 - 1}")
    for name in FILES:
        refuse_existing(args.out_dir / name, args.overwrite)


def prepare(texts, source, args, one_document=False):
    """Tokenise a corpus into args.out_dir.

    texts: a function that starts a new iterator over the documents, each a str; it is called three times at most.
    source: where they come from, for meta.json.
    one_document: the corpus is one running text, whose pieces `texts` gives (it is called five times at most then): no end token, and
    its last val_fraction is for validation. Otherwise the hash of a document's text decides whether it is for validation, wherever
    it stands; the one with the lowest hash always is.

    Raises UserError for an empty corpus or a bad option. Memory does not grow with the corpus.
    """
    check(args)
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


def prepare_tokens(folder, tokenizer, source, args):
    """Make a corpus of a folder's train.bin and val.bin, tokens in uint16 as nanoGPT writes them; split and tokens stay as they are.
    Raises UserError for what is not whole, and for tokens that the tokenizer does not have."""
    try:
        bins = {split: np.memmap(folder / f"{split}.bin", np.uint16, "r") for split in ("train", "val")}
    except ValueError as error:  # an empty file, or half a token
        raise UserError(f"{folder}: train.bin and val.bin are not whole files of uint16: {error}") from None
    sha256, val_fraction = hashlib.sha256(), len(bins["val"]) / (len(bins["train"]) + len(bins["val"]))
    sizes = [len(tokenizer.decode_bytes([token])) if token != tokenizer.end_token else 0 for token in range(tokenizer.vocab_size)]
    with output_folder(args.out_dir), _writing(source, tokenizer, val_fraction, args) as (files, meta):
        for split, tokens in bins.items():
            for start in tqdm(range(0, len(tokens), COUNT_TOKENS), desc=f"copying {split}.bin", disable=None):
                part = np.asarray(tokens[start : start + COUNT_TOKENS])
                if part.max() >= tokenizer.vocab_size:
                    raise UserError(f"{folder}: {split}.bin holds token {part.max()}, past the {tokenizer.vocab_size} of its vocabulary")
                files[split].write(data := part.tobytes())
                sha256.update(data)
                meta[split]["documents"] += int((part == tokenizer.end_token).sum())
                meta[split]["tokens"] += len(part)
                meta[split]["bytes"] += int(np.take(sizes, part).sum())
            meta[split]["documents"] += int(tokens[-1] != tokenizer.end_token)
        meta["sha256"] = sha256.hexdigest()


@contextmanager
def _writing(source, tokenizer, val_fraction, args):
    """Yield (files, meta) to write a corpus with: its train.bin and val.bin, opened, and the fields of meta.json, whose sha256 and
    counts the block fills in. If it ends well these become the corpus, and its numbers are printed."""
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 65536 else "uint32")
    meta = {
        "source": str(source),
        "sha256": None,
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "val_fraction": val_fraction,
        "train": {"documents": 0, "tokens": 0, "bytes": 0},
        "val": {"documents": 0, "tokens": 0, "bytes": 0},
    }
    with ExitStack() as stack:  # left in reverse order: meta.json is renamed last, so it vouches for the rest
        paths = {name: stack.enter_context(replacing(args.out_dir / name)) for name in FILES}
        files = {split: stack.enter_context(open(paths[f"{split}.bin"], "wb")) for split in ("train", "val")}
        yield files, meta
        for split, file in files.items():
            file.flush()
            if meta[split]["tokens"] < 2:
                raise UserError(f"{source}: the {split} split is empty: the corpus is too small for --val_fraction={val_fraction}")
        bins = [np.memmap(paths[f"{split}.bin"], dtype, "r") for split in files]
        meta["unigram_loss"], meta["bigram_loss"] = unigram_and_bigram_loss(*bins, tokenizer.vocab_size)
        paths["tokenizer.json"].write_text(json.dumps(tokenizer.to_json()))
        paths["meta.json"].write_text(json.dumps(meta, indent=1) + "\n")
    for split in files:
        count = meta[split]
        print(
            f"{args.out_dir / split}.bin: {count['documents']:,} documents, {count['tokens']:,} tokens, "
            f"{count['bytes'] / count['tokens']:.2f} bytes a token"
        )
    print(f"vocabulary: {tokenizer.vocab_size:,} ({tokenizer.kind})")
    print(f"validation loss to beat, nats a token: unigram {meta['unigram_loss']:.3f}, bigram {meta['bigram_loss']:.3f}")


def survey(texts):
    """(sha256 of a corpus, as in meta.json; number of its documents; the lowest of their hashes) from an iterator over them."""
    sha256, documents, lowest = hashlib.sha256(), 0, 2**64
    for text in tqdm(texts, desc="reading", unit=" documents", disable=None):
        digest = hashlib.sha256(text.encode())
        sha256.update(digest.digest())
        documents += 1
        lowest = min(lowest, _number(digest))
    return sha256.hexdigest(), documents, lowest


def _measure(pieces):
    """(sha256 of a corpus that is one running text, as in meta.json; its number of characters, 0 if there is nothing but white space)."""
    digest, characters, blank = hashlib.sha256(), 0, True
    for piece in tqdm(pieces, desc="reading", unit=" pieces", disable=None):
        digest.update(piece.encode())
        characters += len(piece)
        blank = blank and (not piece or piece.isspace())
    return hashlib.sha256(digest.digest()).hexdigest(), 0 if blank else characters


def _between(pieces, begin, end):
    """Yield the characters begin ... end - 1 of a text from an iterator over its pieces, in pieces of about BATCH_BYTES that end where
    tokens do."""
    place, held = 0, ""
    for piece in pieces:
        held += piece[max(0, begin - place) : max(0, end - place)]
        place += len(piece)
        while len(held) > BATCH_BYTES:
            seams = [seam.start() for seam in SEAM.finditer(held, BATCH_BYTES - SEAM_SOUGHT, BATCH_BYTES)]
            cut = seams[-1] if seams else BATCH_BYTES
            yield held[:cut]
            held = held[cut:]
        if place >= end:
            break
    yield held


def named_tokenizer(name):
    """That of a corpus's folder, of an output folder or a checkpoint of train.py, or one of tiktoken's. Raises UserError."""
    if (Path(name) / "tokenizer.json").exists():
        return Corpus(name).tokenizer
    if Path(name).exists():
        return tokenizers.from_json(checkpoint_file.read(checkpoint_file.find(name))[1]["tokenizer"])
    return tokenizers.BPE.named(name)


def _tokenizer(pieces, args, one_document):
    """The tokenizer that the options ask for, trained on an iterator over (split, text) where it is the corpus's own."""
    if args.tokenizer == "bpe":
        training_texts = (text for split, text in pieces if split == "train")
        return tokenizers.BPE.train(
            tqdm(training_texts, desc="training the tokenizer", unit=" documents", disable=None), args.vocab_size or VOCABULARY
        )
    if args.tokenizer == "char":
        return tokenizers.Characters.train((text for _, text in pieces), end_token=not one_document)
    tokenizer = named_tokenizer(args.tokenizer)
    if tokenizer.end_token is None and not one_document:
        raise UserError(f"--tokenizer={args.tokenizer} is that of one running text: it has no token for the end of a document")
    return tokenizer


def _prepare(texts, source, args, one_document):
    sha256, size, lowest = (*_measure(texts()), None) if one_document else survey(texts())  # size: of characters or of documents
    if size == 0:
        raise UserError(f"{source}: no documents: the corpus is empty")
    if size == 1 and not one_document:
        raise UserError(f"{source}: one document only: two at least are needed, one of them for validation")

    def pieces():
        if one_document:
            cut = int(size * (1 - args.val_fraction))
            for split, begin, end in (("train", 0, cut), ("val", cut, size)):
                yield from ((split, text) for text in _between(texts(), begin, end))
            return
        highest_val = max(int(args.val_fraction * 2**64), lowest + 1)
        for text in texts():
            yield "val" if _number(hashlib.sha256(text.encode())) < highest_val else "train", text

    tokenizer = _tokenizer(pieces(), args, one_document)
    end = [] if one_document else [tokenizer.end_token]
    total, unit = (None, " pieces") if one_document else (size, " documents")
    with (
        _writing(source, tokenizer, args.val_fraction, args) as (files, meta),
        tqdm(total=total, desc="tokenising", unit=unit, disable=None) as progress,
    ):
        meta["sha256"] = sha256
        for batch in _batches(pieces()):
            for (split, text), tokens in zip(batch, tokenizer.encode_batch([text for _, text in batch])):
                files[split].write(np.array(tokens + end, meta["dtype"]).tobytes())
                meta[split]["documents"] += 1
                meta[split]["tokens"] += len(tokens) + len(end)
                meta[split]["bytes"] += len(text.encode())
            progress.update(len(batch))
        if one_document:
            meta["train"]["documents"] = meta["val"]["documents"] = 1


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
            if self.meta["dtype"] not in ("uint16", "uint32"):
                raise ValueError(f"its dtype is {self.meta['dtype']!r}")
            if not isinstance(self.meta["sha256"], str):
                raise TypeError(f"its sha256 is {self.meta['sha256']!r}")
            self.train, self.val = (np.memmap(self.folder / f"{split}.bin", self.meta["dtype"], "r") for split in ("train", "val"))
            whole = (
                len(self.train) == self.meta["train"]["tokens"]
                and len(self.val) == self.meta["val"]["tokens"]
                and self.vocab_size == self.tokenizer.vocab_size
                and self.meta["val"]["bytes"] > 0
                and self.meta["train"]["documents"] > 0
                and self.meta["val"]["documents"] > 0
            )
        except FileNotFoundError as error:
            name = self.folder.name
            made = f"{name}/prepare.py" if (Path(__file__).parent / name / "prepare.py").exists() else "text/prepare.py SOURCE"
            raise UserError(
                f"no corpus in {self.folder} ({Path(error.filename).name} is missing): make it with "
                f"`python data/{made} --out_dir={self.folder}` (--help)"
            ) from None
        except NotADirectoryError:
            raise UserError(
                f"{self.folder} is a file, and not a prepared corpus: make one of it with `python data/text/prepare.py {self.folder} "
                "--out_dir=DIR`, and give that"
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
        self.check(windows, split)
        return windows

    def check(self, tokens, split):
        """Raise UserError if the vocabulary has not all the tokens (...) of a split."""
        if (greatest := tokens.max()) >= self.vocab_size:
            raise UserError(
                f"damaged corpus: {self.folder / split}.bin holds token {greatest}, past its vocabulary of {self.vocab_size}: "
                "prepare it again with --overwrite"
            )

    def bits_per_byte(self, loss):
        """Bits per byte of a validation loss in nats per token."""
        return loss / math.log(2) * self.meta["val"]["tokens"] / self.meta["val"]["bytes"]
