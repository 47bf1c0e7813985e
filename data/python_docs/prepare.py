"""The documentation that ships with Python itself -> documents.jsonl -> train.bin, val.bin, tokenizer.json, meta.json.

Two sources, neither of which needs a network: the reference topics behind `help()` (pydoc_data.topics) and the doc-strings of
the standard library's modules, classes and functions, read from its source text; nothing is imported or run.
A record is [dotted name, its definition's first line, doc-string, stripped]. The text depends on the Python version."""

import ast
import platform
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import run
from data import corpus

LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "turtledemo", "pydoc_data", "ensurepip"}
SHORTEST = 40  # characters of a doc-string worth a document


def records():
    """Yield topics first, then doc-strings in the order of the files; a doc-string that came before is left out."""
    for name, body in sorted(topics.items()):
        yield {"text": [name, "Python topic", body.strip()]}
    library, seen = Path(sysconfig.get_path("stdlib")), set()
    for path in tqdm(sorted(library.rglob("*.py")), desc="reading doc-strings", unit=" files", disable=None):
        parts = path.relative_to(library).with_suffix("").parts
        if LEFT_OUT.intersection(parts) or parts[0].startswith("config-"):
            continue
        module = ".".join(part for part in parts if part != "__init__") or parts[0]
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue
        for name, node in definitions(tree, module):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= SHORTEST and docstring not in seen:
                seen.add(docstring)
                yield {"text": [name, title(node, module), docstring.rstrip()]}


def definitions(node, name):
    """Yield (dotted name, node) of a module, class or function and of all classes and functions inside it."""
    yield name, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from definitions(child, f"{name}.{child.name}")


def title(node, module):
    if isinstance(node, ast.Module):
        return f"module {module}"
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}({', '.join(map(ast.unparse, node.bases))})"
    return f"def {node.name}({ast.unparse(node.args)})"


def main():
    args = corpus.parser(__doc__, Path(__file__).parent).parse_args()
    corpus.prepare_records(records(), f"documentation of Python {platform.python_version()}", args)


if __name__ == "__main__":
    run(main)
