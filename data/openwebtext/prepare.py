"""OpenWebText in GPT-2's vocabulary -> train.bin, val.bin, tokenizer.json, meta.json.

Without FILE the text is loaded through `datasets` (54 GB in its cache, 17 GB of train.bin); FILE is parquet or JSONL
with a "text" in every row or record."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import run
from data import corpus, sources

DATASET = "Skylion007/openwebtext"
REVISION = "refs/pr/22"  # the same in parquet: its main branch was a script, which `datasets` no longer runs


def main():
    options = corpus.parser(__doc__, Path(__file__).parent)
    options.set_defaults(tokenizer="gpt2", val_fraction=0.0005)
    options.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the texts, if you have them")
    options.add_argument("--text_key", default="text", metavar="NAME", help="name of the text in a record or row (default: %(default)s)")
    args = options.parse_args()
    left_out = sources.LeftOut(args.skip_bad)
    if args.file is None:
        dataset = sources.hub_dataset(DATASET, REVISION)
        texts = lambda: sources.dataset(dataset, DATASET, args.text_key, left_out)
    elif args.file.suffix == ".parquet":
        texts = lambda: sources.parquet(args.file, args.file, args.text_key, left_out)
    else:
        texts = lambda: sources.read_jsonl([args.file], left_out, args.text_key)
    corpus.prepare(texts, args.file or DATASET, args)
    left_out.report()


if __name__ == "__main__":
    run(main)
