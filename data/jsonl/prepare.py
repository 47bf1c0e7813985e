"""JSONL files of {"text": "..."} or {"text": [id, title, body]}, plain or compressed (gzip, bzip2, xz, zstd), or from a pipe
(- is standard input) -> train.bin, val.bin, tokenizer.json, meta.json. Other kinds of files: data/text/prepare.py."""

import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import output_folder, run
from data import corpus, sources


def main():
    options = corpus.parser(__doc__, Path(__file__).parent)
    options.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl")
    options.add_argument("--text_key", default="text", metavar="NAME", help="name of the text in a record (default: %(default)s)")
    args = options.parse_args()
    corpus.check(args)
    left_out = sources.LeftOut(args.skip_bad)
    with output_folder(args.out_dir), ExitStack() as stack:
        files = [(stack.enter_context(sources.rereadable(file, args.out_dir)), sources.called(file)) for file in args.files]
        texts = lambda: (text for path, name in files for text in sources.jsonl(path, name, args.text_key, left_out))
        corpus.prepare(texts, " ".join(name for _, name in files), args)
    left_out.report()


if __name__ == "__main__":
    run(main)
