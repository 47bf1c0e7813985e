"""The house: imports run downwards, without a circle; few files in the root, no long functions."""

import ast
from graphlib import TopologicalSorter

from conftest import ROOT

FLOORS = [  # from the ground up; those on one floor may know one another
    {"common"},
    {"ops", "data", "hub"},
    {"model"},
    {"training", "decoding"},
    {"train", "sample", "plot", "view", "export", "build_laplacian"},
    {"studies", "benchmarks"},
    {"bench"},
]
FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): ast.parse(path.read_text(encoding="utf-8"))
    for folder in (ROOT, *(ROOT / room for floor in FLOORS for room in floor))
    for path in (folder.glob("*.py") if folder in (ROOT, ROOT / "model") else folder.rglob("*.py"))
}


def imports(name):
    """The files of this repository that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(FILES[name]):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found.update(name for name in names if name in FILES)
    return found


def floor(name):
    return next(number for number, rooms in enumerate(FLOORS) if name.split(".")[0] in rooms)


def test_imports_run_downwards():
    graph = {name: imports(name) for name in FILES}
    assert len(graph) > 40 and graph["train"] > {"common", "training.log"}
    upwards = [(name, other) for name, others in graph.items() for other in others if floor(other) > floor(name)]
    assert not upwards
    assert not [
        (name, other)
        for name, others in graph.items()
        for other in others
        if {floor(name), floor(other)} == {3} and name.split(".")[0] != other.split(".")[0]
    ]  # training and decoding do not know each other
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_root_is_short_and_so_is_every_function():
    assert len([path for path in ROOT.iterdir() if path.suffix in (".py", ".cpp")]) <= 9
    long = [
        (name, node.name)
        for name, tree in FILES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 90 and not node.name.endswith("_kernel")
    ]
    assert not long
