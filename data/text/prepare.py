"""Any text -> train.bin, val.bin, tokenizer.json, meta.json. A SOURCE is

    FILE.jsonl or FILE.json    records {"text": "..."} or {"text": [id, title, body]}: one a line, or an array of them
    FILE.parquet               a column of texts
    any other file             text: a document or, with --split_on, several; a single one is a running text, as in nanoGPT
    - (standard input), pipe   any of these
    FOLDER                     all such files in it, at any depth; hidden and binary files are left out
    FOLDER                     a data set saved by `datasets`; or nanoGPT's train.bin and val.bin, with meta.pkl or in GPT-2's tokens
    NAME or OWNER/NAME         a data set of the Hugging Face hub

Files may be compressed (gzip, bzip2, xz, zstd). Line ends in files of text become \\n; nothing else is changed, nothing stripped."""

import argparse
import pickle
import re
import sys
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import MARKS, UserError, decoded, output_folder, run
from data import corpus, sources
from data import tokenizer as tokenizers


class Plain(pickle.Unpickler):
    """Reads numbers, texts, lists and dicts, which is what nanoGPT's meta.pkl holds; whatever would run code is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def files_of(folder, out_dir, left_out):
    """Yield the files in a folder at any depth, in the order of their names. What is no file of the user's text is left out."""
    for path in sorted(folder.iterdir()):
        if sources.is_foreign(path.name):
            left_out("files of other programs", path)
        elif path.name.startswith("."):
            left_out("hidden files", path)
        elif path.is_dir():
            if path.resolve() != out_dir.resolve():
                yield path
                yield from files_of(path, out_dir, left_out)
        elif path.is_file():
            yield path
        elif path.is_symlink():
            left_out.bad(path, "a link that leads nowhere")
        else:
            left_out("pipes and devices", path)


def is_one_object(path, key):
    """Whether a .json file holds one object that is no record: settings of a program, for example."""
    try:
        with sources.opened(path) as file:
            values = sources.json_values(decoded(file, path), path)
            first, second = next(values, None), next(values, None)
        return isinstance(first, dict) and key not in first and second is None
    except UserError:  # which is said when it is read
        return False


def readers_of(args, left_out, stack):
    """([function that starts an iterator over documents], [kind]) of the sources, in their order. Pipes are copied to files, which
    `stack` removes. Raises UserError for what cannot be taken."""
    readers, kinds, seen = [], [], {}

    def claim(path, source):
        first, of = seen.setdefault(path.resolve(), (path, source))
        if first != path:
            raise UserError(f"{path} and {first} are the same: sources must not overlap")
        if of is not source:
            outer = next((outer for outer in (of, source) if outer != path), None)
            raise UserError(f"{path} is {f'in {outer}, which is given, too' if outer else 'given twice'}: sources must not overlap")

    def add(kind, reader, *where):
        readers.append(partial(reader, *where, left_out))
        kinds.append(kind)

    def add_file(path, name, in_folder):
        kind, start = sources.form(path, name)
        if kind in sources.NOT_TAKEN and in_folder:
            left_out(f"{kind} files", name)
        elif in_folder and kind == "text" and b"\0" in start and not start.startswith(tuple(MARKS)):
            left_out("binary files", name)
        elif in_folder and kind == "json" and is_one_object(path, args.text_key):
            left_out("JSON files without records", name)
        elif kind == "text":
            add(kind, sources.text_file, path, name, args.split_on)
        else:
            add(kind, sources.reader(kind, name), path, name, args.text_key)

    for source in args.sources:
        path, name, before = Path(source), sources.called(source), len(readers)
        if source == "-" or path.exists():
            claim(path, path)
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            add("data set", sources.dataset, sources.saved_dataset(path), name, args.text_key)
        elif (path / "train.bin").exists():
            raise UserError(f"{path} is a prepared corpus, which train.py takes as it is, or nanoGPT's, which must be the only source")
        elif path.is_dir():
            if path.resolve() == args.out_dir.resolve():
                raise UserError(f"{path} is --out_dir, too: give another")
            for file in files_of(path, args.out_dir, left_out):
                claim(file, path)
                if not file.is_dir():
                    try:
                        add_file(file, str(file), True)
                    except PermissionError as error:
                        left_out.bad(str(file), error.strerror)
            if len(readers) == before:
                raise UserError(f"{path} holds no file that is taken" + (f" ({left_out})" if left_out.names else ""))
        elif source == "-" or path.exists():
            add_file(stack.enter_context(sources.rereadable(path, args.out_dir)), name, False)
        elif path.is_symlink() or re.search(r"\.[A-Za-z]\w*$", source) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
            raise UserError(f"{name} {'is a link that leads nowhere' if path.is_symlink() else 'does not exist'}")
        else:
            try:
                add("data set", sources.dataset, sources.hub_dataset(source), name, args.text_key)
            except UserError as error:
                raise UserError(f"there is no file or folder {source}, and {error}") from None
    return readers, kinds


def separator(text):
    """The text that --split_on means: \\n, \\t and other escapes are what they are in Python, line ends are \\n as in the files."""
    try:
        text = text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not understood: {error.reason}; a backslash is \\\\") from None
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def nanogpt_tokenizer(folder, args):
    """That of the tokens in a folder of nanoGPT's."""
    file = folder / "meta.pkl"
    if not file.exists():
        return corpus.named_tokenizer("gpt2" if args.tokenizer == "bpe" else args.tokenizer)
    try:
        with open(file, "rb") as opened:
            meta = Plain(opened).load()
        tokens = [meta["itos"][token] for token in range(meta["vocab_size"])]
        if not all(isinstance(token, str) and len(token) == 1 for token in tokens):
            raise ValueError("its tokens are not single characters")
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(
            f"{file} is not what nanoGPT writes ({type(error).__name__}: {error}): without it the tokens count as GPT-2's"
        ) from None
    return tokenizers.Characters(tokens, None)


def main():
    options = corpus.parser(__doc__, Path(__file__).parent)
    options.add_argument("sources", nargs="+", metavar="SOURCE")
    options.add_argument("--text_key", default="text", metavar="NAME", help="name of the text in a record or row (default: %(default)s)")
    options.add_argument(
        "--split_on", type=separator, metavar="TEXT", help=r"what stands between the documents of a file of text, such as '\n\n'"
    )
    args = options.parse_args()
    corpus.check(args)
    folder = Path(args.sources[0])
    if len(args.sources) == 1 and [(folder / name).exists() for name in ("train.bin", "val.bin", "meta.json")] == [True, True, False]:
        options.refuse_given(
            args, ("vocab_size", "val_fraction", "text_key", "split_on"), "is nothing for tokens that are there: leave it out"
        )
        corpus.prepare_tokens(folder, nanogpt_tokenizer(folder, args), folder, args)
        return
    left_out = sources.LeftOut(args.skip_bad)
    with output_folder(args.out_dir), ExitStack() as stack:
        readers, kinds = readers_of(args, left_out, stack)
        if args.split_on and "text" not in kinds:
            raise UserError("--split_on is for files of text: there is none among the sources")
        if set(kinds) == {"text"}:
            options.refuse_given(args, ("text_key",), "is for records: there are none among the sources")
        source = " ".join(map(sources.called, args.sources)) + (f" ({len(kinds):,} files)" if len(kinds) > len(args.sources) else "")
        if kinds == ["text"] and not args.split_on:
            path, name = readers[0].args[:2]
            corpus.prepare(lambda: sources.text_pieces(path, name), source, args, one_document=True)
        else:
            corpus.prepare(lambda: chain.from_iterable(reader() for reader in readers), source, args)
    left_out.report()


if __name__ == "__main__":
    run(main)
