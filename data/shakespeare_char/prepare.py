"""Tiny Shakespeare as in nanoGPT, one document with 65 different characters -> train.bin, val.bin, tokenizer.json, meta.json.

Without FILE the text is loaded through `datasets`. No end token; the last 10 % is validation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import run
from data import corpus, sources

DATASET = "karpathy/tiny_shakespeare"
REVISION = "refs/convert/parquet"  # its main branch is a script, which `datasets` no longer runs


def main():
    options = corpus.parser(__doc__, Path(__file__).parent)
    options.set_defaults(tokenizer="char", val_fraction=0.1)
    options.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the text, if you have it")
    args = options.parse_args()
    if args.file:
        pieces = lambda: sources.text_pieces(args.file)
    else:
        splits = sources.hub_dataset(DATASET, REVISION)
        pieces = lambda: (text for name in ("train", "validation", "test") for text in splits[name]["text"])
    corpus.prepare(pieces, args.file or DATASET, args, one_document=True)


if __name__ == "__main__":
    run(main)
