"""From a text of yours to a trained Tauformer, a figure and a sample: minutes on two CPU cores.

    bash runs/own_text.sh FILE_OR_FOLDER ... [--key=value ...]
    bash runs/own_text.sh notes.jsonl --text_key=body --max_steps=5000
    zcat notes.gz | NAME=notes bash runs/own_text.sh -

A FILE_OR_FOLDER is whatever data/text/prepare.py takes: files of text, JSONL, JSON or parquet, compressed or not, folders of them, a pipe
(- is standard input), OWNER/NAME of a data set on the Hugging Face hub, or nanoGPT's data folder. The sizes of vocabulary, graph, model
and run are chosen by the amount of text (data/sizes.py) and printed, each with the option that gives another; the other settings are those
of configs/own_text.toml. The corpus goes to data/my_NAME, the run to out/my_NAME, where NAME is that of the first file, or what the
variable NAME says. What is there already, of the same text, is left; what was interrupted goes on."""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ROOT, Parser, UserError, run
from ops.model_config import ModelConfig, chosen_heads
from training.config import Settings, add_settings, check_schedule, given_settings, model_settings, read_settings

OF_SIZES = ("vocab_size", "val_fraction")  # options of data/text/prepare.py that data/sizes.py chooses where they are not given
PATHS = ("tokenizer", "laplacian", "init_from", "results")  # options that may name a file: as seen from where the user stands


def options():
    parser = Parser(__doc__)
    parser.usage = "bash runs/own_text.sh FILE_OR_FOLDER ... [--key=value ...]"
    parser.add_argument("sources", nargs="+", metavar="FILE_OR_FOLDER")
    group = parser.add_argument_group("how the text is read (data/text/prepare.py --help says more)")
    group.add_argument("--text_key", metavar="NAME", help="name of the text in a record or row [text]")
    group.add_argument("--split_on", metavar="TEXT", help=r"what stands between the documents of a file of text, such as '\n\n'")
    group.add_argument("--skip_bad", action="store_true", help="leave out records that are broken")
    group.add_argument("--tokenizer", help="bpe, char, a name of tiktoken's, or the folder of a corpus or a run [bpe]")
    group.add_argument("--vocab_size", type=int, metavar="INT", help="tokens of a bpe, at most")
    group.add_argument("--val_fraction", type=float, metavar="FLOAT", help="part of the text for validation")
    add_settings(parser)
    for action in parser._actions:
        if action.dest in ("data_dir", "out_dir"):
            action.help = argparse.SUPPRESS  # they are named by NAME
    return parser


def checked_source(source):
    """The path of a source, absolute, or the name of a data set. Raises UserError for what is neither."""
    path = Path(source)
    if path.is_file() or path.is_dir():
        return str(path.resolve())
    if source == "-" or path.exists():
        if not os.environ.get("NAME"):
            raise UserError(f"{'standard input' if source == '-' else source} has no name: NAME=... bash runs/own_text.sh ... gives one")
        return source if source == "-" else str(path.absolute())
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not re.search(r"\.[A-Za-z]\w*$", source):
        return source
    raise UserError(f"{source} is no file or folder, nor OWNER/NAME of a data set")


def checked_settings(given):
    """Raise UserError for settings that train.py would refuse after all the rest was done."""
    settings = Settings(**read_settings(ROOT / "configs/own_text.toml") | chosen_heads(given) | given)
    check_schedule(settings)
    ModelConfig(**model_settings(settings))
    if given.get("init_from", "auto") not in ("auto", "scratch", "resume") and not os.path.exists(given["init_from"]):
        raise UserError(f"init_from = {given['init_from']!r} is no folder of a run")
    if "laplacian" in given and not os.path.exists(given["laplacian"]):
        raise UserError(f"laplacian = {given['laplacian']!r} does not exist")


def main():
    """Print the command line, checked, as arrays of bash: paths, preparing and sized for data/, settings for train.py."""
    args = options().parse_args()
    for name in ("data_dir", "out_dir"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} cannot be given: NAME=... names the folders")
    if args.vocab_size is not None and args.tokenizer not in (None, "bpe"):
        raise UserError(
            f"--vocab_size={args.vocab_size} is for a tokenizer that is made, not for --tokenizer={args.tokenizer}: leave it out"
        )
    for name in PATHS:
        if getattr(args, name) is not None and (os.path.exists(getattr(args, name)) or name == "results"):
            setattr(args, name, os.path.abspath(getattr(args, name)))
    paths, given = [checked_source(source) for source in args.sources], given_settings(args)
    checked_settings(given)
    if given.get("overwrite"):
        given.setdefault("init_from", "scratch")
    reading = {name: getattr(args, name) for name in ("text_key", "split_on", "tokenizer") if getattr(args, name) is not None}
    sized = {name: getattr(args, name) for name in OF_SIZES if getattr(args, name) is not None}
    words = lambda values: shlex.join(f"--{name}={value}" for name, value in values.items())
    print(f"paths=({shlex.join(paths)})")
    print(f"preparing=({words(reading)}{' --skip_bad' * args.skip_bad}) sized=({words(sized)}) settings=({words(given)})")


if __name__ == "__main__":
    sys.argv[0] = "runs/own_text.sh"
    run(main)
