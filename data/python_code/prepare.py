"""The source code of Python's standard library, a file a document -> train.bin, val.bin, tokenizer.json, meta.json.

It needs no network; nothing is imported or run. The text depends on the Python version; tests are left out."""

import platform
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import read_text, run
from data import corpus
from data.python_docs.prepare import LEFT_OUT


def main():
    args = corpus.parser(__doc__, Path(__file__).parent).parse_args()
    library = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(library.rglob("*.py")) if not LEFT_OUT.intersection(path.relative_to(library).parts)]
    texts = lambda: (text for text in map(read_text, paths) if text.strip())
    corpus.prepare(texts, f"source code of Python {platform.python_version()}", args)


if __name__ == "__main__":
    run(main)
