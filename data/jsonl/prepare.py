"""JSONL files of {"text": "..."} or {"text": [id, title, body]}, plain or compressed (gzip, bzip2, xz, zstd) -> train.bin, val.bin,
tokenizer.json, meta.json."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import run
from data import corpus


def main():
    options = corpus.parser(__doc__, Path(__file__).parent)
    options.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl")
    args = options.parse_args()
    left_out = corpus.LeftOut(args.skip_bad)
    corpus.prepare(lambda: corpus.read_jsonl(args.files, left_out), " ".join(map(str, args.files)), args)
    left_out.report()


if __name__ == "__main__":
    run(main)
