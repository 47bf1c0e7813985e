# Sourced by the other scripts: goes to the repository's root, makes .venv once, and installs requirements.txt in it.
set -euo pipefail
child= ending=
trap 'end_with 130' INT  # it has reached the child too
trap 'end_with 143 TERM' TERM
trap 'end_with 129 HUP' HUP
end_with() {  # STATUS [SIGNAL]: ends the script, or hands the signal on and lets show() do so when its command, which may be saving, has ended
    ending=$1
    [ -n "$child" ] || leave
    [ -z "${2-}" ] || kill -$2 $child 2> /dev/null || true
}
leave() {
    [ $ending -ne 130 ] || echo "$0: interrupted" >&2
    exit $ending
}
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."
python=${PYTHON:-python3}
command -v "$python" > /dev/null || { echo "$python not found: set PYTHON to Python 3.11 or later" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "$python is older than Python 3.11: set PYTHON to a newer one" >&2; exit 2; }
[ -f .venv/bin/activate ] || "$python" -m venv .venv
. .venv/bin/activate

require() {  # FILE: installs a file of requirements into .venv, unless the same one has been
    [ "$(cat "$1")" != "$(cat ".venv/$1" 2> /dev/null)" ] || return 0
    echo "installing $1 into .venv ..."
    python -c 'import pip' 2> /dev/null || python -m ensurepip > /dev/null  # as uv leaves it
    python -m pip install --quiet --disable-pip-version-check --requirement "$1" || return
    cp "$1" ".venv/$1" 2> /dev/null || true  # where .venv is for reading only, pip looks each time
}
require requirements.txt

show() {  # COMMAND ...: prints the command, then runs it; signals to this script alone reach it too, unless in a pipeline
    local status=0
    printf '\n$'; printf ' %q' "$@"; printf '\n'
    [ "$BASH_SUBSHELL" -eq 0 ] || { "$@"; return; }
    (trap - INT QUIT; exec "$@") <&0 &  # bash heeds signals meanwhile; otherwise the command would ignore Ctrl-C
    child=$!
    wait $child || status=$?
    while [ -n "$ending" ] && kill -0 $child 2> /dev/null; do wait $child || true; done
    child=
    [ -z "$ending" ] || leave
    return $status
}

timed() {  # COMMAND ...: runs the command, then prints how long it took
    local begin=$SECONDS
    "$@"
    echo "($((SECONDS - begin)) s)"
}

made() {  # OUTPUT INPUT ... -- COMMAND ...: runs the command, unless it has made OUTPUT already, from the same inputs
    local output=$1 stamp again= inputs=()
    shift
    while [ "$1" != -- ]; do inputs+=("$1"); shift; done
    stamp=$(python - "$@" -- "${inputs[@]}" <<'END'
import hashlib, os, sys

stamp = hashlib.sha256(os.fsencode("\0".join(sys.argv[1:])))
for path in sys.argv[sys.argv.index("--", 2) + 1:]:
    if os.path.isfile(path) and os.access(path, os.R_OK):
        with open(path, "rb") as file:
            stamp.update(hashlib.file_digest(file, "sha256").digest())
    for folder, _, names in sorted(os.walk(path)):
        for name in sorted(names):
            status = os.lstat(os.path.join(folder, name))
            stamp.update(os.fsencode(f"{folder}/{name} {status.st_size} {status.st_mtime_ns}"))
print(stamp.hexdigest())
END
)
    shift
    [ "$(cat "$output.made" 2> /dev/null)" != "$stamp" ] || again=--overwrite  # what a killed call has left
    if [ -e "$output" ]; then
        [ -n "$again" ] || { echo "$0: $output was made otherwise, of another input or with other options: give ${elsewhere:-DATA=ANOTHER_FOLDER}" >&2; exit 2; }
        echo "$output: there already"
        return
    fi
    mkdir -p "$(dirname "$output")" || exit 2
    echo "$stamp" > "$output.made"  # written first: OUTPUT appears last, and whole
    timed "$@" $again
}

own_name() { echo "my_${1#my_}"; }  # NAME: my_NAME, for results; those that came with the repository have no "my_", and stay

numbers() {  # NAME "1 2 3": refuses a setting that is not whole numbers
    [[ $2 =~ ^[0-9]+(\ +[0-9]+)*$ ]] || { echo "$0: $1=\"$2\" must be whole numbers" >&2; exit 2; }
}

# the switches of the best form: those that dot product has too, and those of tau alone
of_both="--learn_temperature=True --forget=gate --conv=4 --key_bias=True --output_gate=True"
of_tau="--temperature=0.1 --spectral_filter=True --tau_rope=False"

count() {  # NAME 2: refuses a setting that is not one whole number above 0
    [[ $2 =~ ^0*[1-9][0-9]*$ ]] || { echo "$0: $1=\"$2\" must be one whole number above 0" >&2; exit 2; }
}

rows_called() {  # "NAME|SETTINGS of a row in each line" NAME ...: the rows of these names; one that there is not is refused
    local rows=$1 row line
    shift
    for row; do
        line=$(awk -F'|' -v row="$row" '$1 == row' <<< "$rows")
        [ -n "$line" ] || { echo "$0: no row \"$row\"; there are: $(cut -d'|' -f1 <<< "$rows" | paste -sd';')" >&2; exit 2; }
        echo "$line"
    done
}

corpus_name() {  # FILE.jsonl: the name of its corpus; those of the corpora that the scripts make themselves are refused
    local name=$(basename "${1// /_}" .jsonl)
    case $name in python_docs | python_code | shakespeare_char | shakespeare_speeches)
        echo "$1: the scripts have a corpus $name of their own: rename the file" >&2; exit 2 ;;
    esac
    echo "$name"
}

bpe_corpus() {  # FOLDER VOCAB_SIZE NAME [FILE.jsonl]: by data/NAME/prepare.py; a folder that holds just this corpus already is used
    if [ ! -f "$1/meta.json" ]; then
        show python data/$3/prepare.py ${4:+"$4"} --out_dir="$1" --vocab_size=$2 --val_fraction=0.05
        return
    fi
    python - "$0" "$@" <<'END'
import sys
from common import UserError, run
from data.corpus import Corpus, read_jsonl, survey

def main():
    _, folder, vocab_size, _, *files = sys.argv
    meta = Corpus(folder).meta
    if (meta.get("tokenizer"), meta.get("val_fraction")) != ("bpe", 0.05) or meta["vocab_size"] > int(vocab_size) \
            or files and survey(read_jsonl(files))[0] != meta.get("sha256"):
        raise UserError(f"{folder} is not {' '.join(files) or 'that corpus'} in BPE of {vocab_size} tokens with a val_fraction of 0.05 "
                        "(its meta.json tells): move it away" + ", or rename the file" * len(files))
sys.argv[:1] = []  # errors begin with the script's name
run(main)
END
}

last_line() { (trap '' INT TERM; tail -1); }  # of a program's output; Ctrl-C is left to the program, which then ends by itself
