"""The pages say where things are: links, files and commands that they name exist, and every result is named on a page."""

import re
from collections import Counter

import pytest
from conftest import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md"]
LONGEST_README = 200
ENDINGS = (".py", ".sh", ".cpp", ".toml", ".sbatch", ".md", ".json", ".jsonl", ".png", ".txt")
ELSEWHERE = {
    "metrics.jsonl",
    "diagnostics.jsonl",
    "profile.json",
    "log.txt",
    "embeddings.json",
    "config.toml",
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "figure.png",
    "bands.png",
    "meta.json",
    "tokenizer.json",
    "laplacian.json",
    "mine.jsonl",
    "train.jsonl",
}  # what runs make, and texts of others
FOLDERS = [path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_")) and path.name != "out"]


def links(text):
    """The targets of a page's links and pictures that are in this repository."""
    text = re.sub(r"^```.*?^```|^    .*?$", "", text, flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`", lambda code: re.sub(r"[\[\]()]", " ", code[0]), text)  # brackets in `code` are no links
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", target)]


def anchors(text):
    """The names that GitHub gives a page's headings; of equal ones, the later get a number."""
    names, seen = [], Counter()
    for heading in re.findall(r"^#+ +(.*?) *$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        names.append(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def named_files(text):
    """What in `code` and code blocks looks like a file or folder of this repository: a word with a slash that begins with one of its
    folders, or one that ends as its files do. Not what runs make, patterns, or names to be filled in, which have capitals."""
    code = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*$", "", text, flags=re.M))
    for block in re.findall(r"^```.*?\n(.*?)^```", text, flags=re.M | re.S) + re.findall(r"^    (.*)$", text, flags=re.M):
        code += [line.split(" # ")[0] for line in block.splitlines()]
    names = []
    for word in " ".join(code).replace("\\", " ").split():
        word = re.split("=", word.strip("\"',;:()"))[-1].strip("\"'").removeprefix("./")
        first, slash, rest = word.partition("/")
        if not re.fullmatch(r"[\w./-]+", word) or re.search(r"[A-Z]", word.removesuffix("README.md").removesuffix("CONTRIBUTING.md")):
            continue
        if word.startswith(("out/", "results/my_", "/", "http")) or word in ELSEWHERE:
            continue
        if first == "data" and slash and not word.endswith((".py", ".md")):  # a corpus, or a part of one
            continue
        if word.endswith(ENDINGS) or slash and first in FOLDERS:
            names.append(word)
    return names


def find(name, page):
    """The path of this repository that a page means by a name: from the root, from the page's folder, or, of a name without a folder,
    anywhere in it. None where there is none."""
    for place in (ROOT, page.parent):
        if (place / name).exists():
            return place / name
    if "/" not in name:
        return next((path for folder in FOLDERS for path in (ROOT / folder).rglob(name)), None)
    return None


def mistakes(page):
    """What a page says that is not so, a line each."""
    text, found = page.read_text(), []
    for target in links(text):
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        if not other.exists():
            found.append(f"{page.name}: the link {target} leads nowhere")
        elif anchor and anchor not in anchors(other.read_text()):
            found.append(f"{page.name}: there is no heading for the link {target}")
    return found + [f"{page.name}: there is no {name}" for name in named_files(text) if find(name, page) is None]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    assert not mistakes(page)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= LONGEST_README


def test_every_result_is_named_on_a_page():
    named = {(page.parent / target.partition("#")[0]).resolve() for page in PAGES for target in links(page.read_text())}
    named |= {path.resolve() for page in PAGES for name in named_files(page.read_text()) if "/" in name and (path := find(name, page))}
    results = [path for path in (ROOT / "results").rglob("*") if path.is_file()]
    results = [path for path in results if not path.relative_to(ROOT / "results").parts[0].startswith(("my_", "runs.jsonl"))]
    assert len(results) > 20 and not [str(path.relative_to(ROOT)) for path in results if path.resolve() not in named]


@pytest.mark.parametrize(
    "line, expected",
    [
        ("see [it](absent.md)", "absent.md leads nowhere"),
        ("![a picture](results/absent.png)", "leads nowhere"),
        ("see [`absent.json`](absent.json)", "leads nowhere"),
        ("see [it](page.md#no-such-thing)", "no heading"),
        ("see [it](#no-such-thing)", "no heading"),
        ("`ops/absent.py` has it", "no ops/absent.py"),
        ("`absent_at_all.py` has it", "no absent_at_all.py"),
        ("`python absent_at_all.py --out=x`", "no absent_at_all.py"),
        ("`train.py --results=results/absent.jsonl`", "no results/absent.jsonl"),
        ("    bash runs/absent.sh  # it", "no runs/absent.sh"),
        ("```\nbash runs/absent.sh\n```", "no runs/absent.sh"),
        ("`configs/absent.toml`", "no configs/absent.toml"),
    ],
)
def test_mistakes_are_found(tmp_path, line, expected):
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n{line}\n")
    assert mistakes(page) and expected in mistakes(page)[0]


def test_what_is_right_is_no_mistake(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page: its `name`\n\n## Again\n\n## Again\n\n[up](#a-page-its-name) [there](page.md#again-1) [out](https://example.org/x.md)\n\n"
        "`train.py`, `ops/`, `results/README.md`, `data/jsonl/prepare.py`, `data/mine/laplacian.json`, `out/x/y.json`\n\n"
        "`results/my_x.jsonl`, `metrics.jsonl`, `data/NAME/prepare.py`, `runs/*.sh`, `L[a](b.md)`\n\n"
        "    python train.py configs/tau_30m.toml --data_dir=data/mine --out_dir=out/mine\n"
    )
    assert not mistakes(page)
