"""The CVE list as it is released, a folder or zip of CVE JSON 5.x records -> documents.jsonl -> train.bin, val.bin,
tokenizer.json, meta.json.

A record is [CVE number, title or "(no title)", English description, stripped]; several are joined. Rejected and reserved
records and those without a description are counted and left out, as are files of other programs (`__MACOSX`, `._NAME`). A
release of the CVE list is a zip inside a zip; it is read as it is."""

import io
import json
import shutil
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import UserError, decoded, run  # isort: skip, for it tells of packages that are missing
from tqdm import tqdm

from data import corpus, sources


def json_files(source, left_out):
    """Yield (name, bytes) of every .json file in a folder or a zip, and in zips inside the zip; left_out counts other programs' files."""
    if source.is_dir():
        for path in sorted(source.rglob("*.json")):
            if sources.is_foreign(path.relative_to(source)):
                left_out("files of other programs", str(path))
            else:
                yield str(path), path.read_bytes()
        return
    try:
        with zipfile.ZipFile(source) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith((".json", ".zip")) and sources.is_foreign(name):
                    left_out("files of other programs", f"{source}/{name}")
                elif name.endswith(".json"):
                    yield f"{source}/{name}", archive.read(name)
                elif name.endswith(".zip"):
                    with tempfile.NamedTemporaryFile(suffix=".zip") as inner:
                        shutil.copyfileobj(archive.open(name), inner)
                        inner.flush()
                        yield from json_files(Path(inner.name), left_out)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, UnicodeDecodeError) as error:
        raise UserError(f"{source} is neither a folder nor a whole zip file ({error})") from None


def records(source, left_out):
    """Yield the published records; left_out, a sources.LeftOut, counts the others by reason."""
    for name, content in tqdm(json_files(source, left_out), desc="reading CVE records", unit=" files", disable=None):
        try:
            record = json.loads("".join(decoded(io.BytesIO(content), name)))
            if not isinstance(record, dict) or "cveMetadata" not in record:
                left_out("not a CVE record", name)
                continue
            state = record["cveMetadata"].get("state", "PUBLISHED")
            if state != "PUBLISHED":  # before its text, which it need not have
                left_out(str(state).lower(), name)
                continue
            number, container = record["cveMetadata"]["cveId"], record["containers"]["cna"]
            descriptions = [entry["value"].strip() for entry in container.get("descriptions", []) if entry["lang"].lower().startswith("en")]
            title = container.get("title") or "(no title)"
            if not isinstance(number, str) or not isinstance(title, str):
                raise TypeError("cveId and title are texts")
        except (ValueError, RecursionError) as error:
            left_out.bad(name, error if isinstance(error, UserError) else f"not JSON: {error}")
            continue
        except (KeyError, TypeError, AttributeError) as error:
            left_out.bad(name, f"not a CVE record of JSON schema 5.x ({type(error).__name__}: {error})")
            continue
        if description := "\n".join(filter(None, descriptions)):
            yield {"text": [number, title, description]}
        else:
            left_out("without a description", name)


def main():
    options = corpus.parser(__doc__, Path(__file__).parent)
    options.add_argument("source", type=Path, metavar="FOLDER_OR_ZIP")
    args = options.parse_args()
    if not args.source.exists():
        raise UserError(f"{args.source} does not exist: download a release of github.com/CVEProject/cvelistV5")
    left_out = sources.LeftOut(args.skip_bad)
    corpus.prepare_records(records(args.source, left_out), args.source, args)
    left_out.report()


if __name__ == "__main__":
    run(main)
