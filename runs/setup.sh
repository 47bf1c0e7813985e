# Sourced by the other scripts: goes to the repository's root, makes .venv once, and installs requirements.txt in it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
command -v "$python" > /dev/null || { echo "$python not found: set PYTHON to Python 3.11 or later" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "$python is older than Python 3.11: set PYTHON to a newer one" >&2; exit 2; }
[ -f .venv/bin/activate ] || "$python" -m venv .venv
. .venv/bin/activate
echo "installing requirements.txt into .venv ..."
pip install --quiet --disable-pip-version-check --requirement requirements.txt

show() {  # a command, and then what it does
    printf '\n$'; printf ' %q' "$@"; printf '\n'
    "$@"
}

corpus_name() {  # of a JSONL file; those of the corpora that the scripts make themselves are taken
    local name=$(basename "${1// /_}" .jsonl)
    case $name in python_docs | shakespeare_char | shakespeare_speeches)
        echo "$1: the scripts have a corpus $name of their own: rename the file" >&2; exit 2 ;;
    esac
    echo "$name"
}

text_corpus() {  # FILE.jsonl FOLDER VOCAB_SIZE: that file in BPE; a folder that holds it so already is taken as it is
    [ -f "$2/meta.json" ] || show python data/jsonl/prepare.py "$1" --out_dir="$2" --vocab_size=$3 --val_fraction=0.05
    python - "$@" <<'END' || exit 2
import json, sys
file, folder, vocab_size = sys.argv[1:]
made = json.load(open(f"{folder}/meta.json"))
if (made["source"], made["tokenizer"], made["val_fraction"]) != (file, "bpe", 0.05) or made["vocab_size"] > int(vocab_size):
    sys.exit(f"{folder} is of another file or of other settings than {file} with --vocab_size={vocab_size} --val_fraction=0.05 "
             "(its meta.json tells): move it away, or rename the file")
END
}

last_line() { (trap '' INT TERM; tail -1); }  # of a program that ends by itself after Ctrl-C
