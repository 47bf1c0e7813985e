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
    corpus.prepare(lambda: corpus.read_jsonl(args.files), " ".join(map(str, args.files)), args)


if __name__ == "__main__":
    run(main)
