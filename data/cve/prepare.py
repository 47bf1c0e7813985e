"""The CVE list as it is released, a folder or zip of CVE JSON 5.x records -> documents.jsonl -> train.bin, val.bin,
tokenizer.json, meta.json.

A record is [CVE number, title or "(no title)", English description]. Rejected records and those without a description
are counted and left out. A release of the CVE list is a zip inside a zip, which is read as it is."""

import json
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import UserError, run
from data import corpus


def json_files(source):
    """Yield (name, bytes) of every .json file in a folder or a zip, and in zips inside the zip."""
    if source.is_dir():
        for path in sorted(source.rglob("*.json")):
            yield str(path), path.read_bytes()
        return
    try:
        with zipfile.ZipFile(source) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".json"):
                    yield f"{source}/{name}", archive.read(name)
                elif name.endswith(".zip"):
                    with tempfile.NamedTemporaryFile(suffix=".zip") as inner:
                        shutil.copyfileobj(archive.open(name), inner)
                        inner.flush()
                        yield from json_files(Path(inner.name))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise UserError(f"{source} is neither a folder nor a whole zip file ({error})") from None


def records(source, left_out):
    """Yield the published records; left_out, a Counter, counts the others by reason."""
    for name, content in tqdm(json_files(source), desc="reading CVE records", unit=" files", disable=None):
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name} is not JSON: {error}") from None
        if not isinstance(record, dict) or "cveMetadata" not in record:
            left_out["not a CVE record"] += 1
            continue
        try:
            number, container = record["cveMetadata"]["cveId"], record["containers"]["cna"]
            if record["cveMetadata"].get("state") == "REJECTED":
                left_out["rejected"] += 1
                continue
            description = next(
                (entry["value"].strip() for entry in container.get("descriptions", []) if entry["lang"].lower().startswith("en")), ""
            )
            title = container.get("title") or "(no title)"
            if not isinstance(number, str) or not isinstance(title, str):
                raise TypeError("cveId and title are texts")
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{name} is not a CVE record of JSON schema 5.x ({type(error).__name__}: {error})") from None
        if description:
            yield {"text": [number, title, description]}
        else:
            left_out["without a description"] += 1


def main():
    options = corpus.parser(__doc__, Path(__file__).parent)
    options.add_argument("source", type=Path, metavar="FOLDER_OR_ZIP")
    args = options.parse_args()
    if not args.source.exists():
        raise UserError(f"{args.source} does not exist: download a release of github.com/CVEProject/cvelistV5")
    left_out = Counter()
    corpus.prepare_records(records(args.source, left_out), args.source, args)
    print("left out: " + (", ".join(f"{count:,} {why}" for why, count in left_out.items()) or "none"))


if __name__ == "__main__":
    run(main)
