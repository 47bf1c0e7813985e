#!/usr/bin/env bash
# What each switch is worth, for tau and for its dot-product twin, on three corpora: Tiny Shakespeare characters, the
# documentation of Python, and a JSONL file of yours (docs/quality.md's figures are of security advisories).
#
#     bash runs/study.sh FILE.jsonl                        all of it: the rows below down to the empty line
#     bash runs/study.sh FILE.jsonl "tau + gate" dot       these rows only
#
# These may be set: SEEDS="1 2 3", CORPORA="shakespeare_char python_docs FILE" (there is python_code too, which has a context of 512),
# TEXT=tinyshakespeare.txt (otherwise loaded through `datasets`, unless data/shakespeare_char is there), WORKERS=2 (runs at a time, with one
# thread each), OPTIONS="--max_steps=900 ..." (for every run; give another NAME with them), NAME=study. Runs go to
# out/my_NAME/CORPUS/ROW/SEED, their lines to results/my_NAME.jsonl. Finished runs are not repeated, interrupted ones go on; another NAME
# makes them again.
[ $# -ge 1 ] || { echo 'usage: bash runs/study.sh FILE.jsonl ["ROW" ...]' >&2; exit 2; }
for file in "$1" ${TEXT:+"$TEXT"}; do [ -f "$file" ] || { echo "runs/study.sh: $file is not a file" >&2; exit 2; }; done
jsonl=$(realpath "$1") text=${TEXT:+$(realpath "$TEXT")}
shift
. "$(dirname "$(realpath "$0")")/setup.sh"
name=$(own_name "${NAME:-study}")
numbers SEEDS "${SEEDS:=1 2 3}"
count WORKERS "${WORKERS:=2}"
own=$(corpus_name "$jsonl")
corpora=${CORPORA:-shakespeare_char python_docs $own}

best="$of_both $of_tau --n_head=8 --local_heads=4"
recall="$of_both $of_tau --n_head=8 --local_heads=3 --recall_heads=4"
rows=$(sed 's/ *| */|/' <<EOF
dot                             | --attention=dot
dot + all                       | --attention=dot $of_both
dot + all, 8 heads              | --attention=dot $of_both --n_head=8
tau, published                  |
tau + all                       | $of_both $of_tau --local_heads=2
tau + all, 8 heads              | $best
dot + learned scale             | --attention=dot --learn_temperature=True
dot + slope                     | --attention=dot --forget=slope
dot + gate                      | --attention=dot --forget=gate
dot + convolution               | --attention=dot --conv=4
dot + key bias                  | --attention=dot --key_bias=True
dot + output gate               | --attention=dot --output_gate=True
dot + 8 heads                   | --attention=dot --n_head=8
tau + temperature 0.05          | --temperature=0.05
tau + learned temperature       | --temperature=0.1 --learn_temperature=True
tau + slope                     | --forget=slope
tau + gate                      | --forget=gate
tau + spectral filter           | --spectral_filter=True
tau + convolution               | --conv=4
tau + key bias                  | --key_bias=True
tau + output gate               | --output_gate=True
tau + local heads               | --local_heads=2
tau + energies unrotated        | --tau_rope=False
tau + 8 heads                   | --n_head=8
tau + all, 8 heads, random graph   | $best --laplacian=DATA/random.parquet
tau + all, 8 heads, chain          | $best --laplacian=DATA/chain.parquet
tau + all, 8 heads, complete graph | $best --laplacian=DATA/complete.parquet
tau, published, random graph    | --laplacian=DATA/random.parquet
tau, published, chain           | --laplacian=DATA/chain.parquet
tau, published, complete graph  | --laplacian=DATA/complete.parquet

tau + all, 8 heads, 4 recall                     | $recall
dot + all, 8 heads, 4 recall                     | --attention=dot $of_both --n_head=8 --recall_heads=4
tau + all, 8 heads, 4 recall, random graph       | $recall --laplacian=DATA/random.parquet
tau + all, 8 heads, 4 recall, chain              | $recall --laplacian=DATA/chain.parquet
tau + all, 8 heads, 4 recall, complete graph     | $recall --laplacian=DATA/complete.parquet
tau + all, 8 heads, 4 recall, token vectors                | $recall --embedding_init=domain
tau + all, 8 heads, 4 recall, token vectors, random graph  | $recall --embedding_init=domain --laplacian=DATA/random.parquet
tau + all, 16 heads, 12 local                    | $of_both $of_tau --n_head=16 --local_heads=12
dot + all, 16 heads                              | --attention=dot $of_both --n_head=16
tau + all, 8 heads, token vectors                | $best --embedding_init=domain
tau + all, 8 heads, token vectors, random graph  | $best --embedding_init=domain --laplacian=DATA/random.parquet
EOF
)
chosen=$(rows_called "$rows" "$@")
rows=${chosen:-${rows%%$'\n\n'*}}

prepare() {  # CORPUS: makes it, and its graphs of F = n_embd features
    local data=data/$1 documents=data/$1
    case $1 in
    shakespeare_char)
        documents=data/shakespeare_speeches
        [ -f $data/meta.json ] || show python data/shakespeare_char/prepare.py ${text:+"$text"}
        [ -f $documents/meta.json ] || python -c '
import json, data.corpus
text, = data.corpus.Corpus("data/shakespeare_char").documents("train")
for speech in text.split("\n\n"):
    print(json.dumps({"text": speech}))' > data/shakespeare_speeches.jsonl
        [ -f $documents/meta.json ] || show python data/jsonl/prepare.py data/shakespeare_speeches.jsonl --tokenizer=char --out_dir=$documents ;;
    python_docs | python_code) bpe_corpus $data 2048 $1 ;;
    "$own") bpe_corpus $data 2048 jsonl "$jsonl" ;;
    *) echo "runs/study.sh: no corpus $1; there are: shakespeare_char python_docs python_code $own" >&2; exit 2 ;;
    esac
    [ -f $documents/embeddings.npy ] || show python data/embed.py $documents --dim=128
    for graph in domain random; do
        [ -f $data/$graph.parquet ] || show python build_laplacian.py $documents/embeddings.npy --graph=$graph --out=$data/$graph.parquet
    done
    for graph in chain complete; do
        [ -f $data/$graph.parquet ] || show python build_laplacian.py --graph=$graph --dim=128 --out=$data/$graph.parquet
    done
}

one() {  # CORPUS SEED "ROW|SETTINGS": a run, unless its line is there
    local row=${3%%|*} settings=${3#*|} config=configs/study.toml out
    out="out/$name/$1/$row/$2"
    [ $1 = shakespeare_char ] && config=configs/shakespeare_char_tau.toml
    [ $1 = python_code ] && settings+=" --block_size=512 --batch_size=2"
    grep -qs "\"run\": \"$out\".*}}\$" "results/$name.jsonl" && return
    OMP_NUM_THREADS=1 python train.py $config --init_from=auto --data_dir=data/$1 --laplacian=data/$1/domain.parquet \
        --eval_interval=300 --diag_interval=0 --seed=$2 --results="results/$name.jsonl" --out_dir="$out" ${settings//DATA/data/$1} ${OPTIONS:-} 2>&1 |
        last_line || { echo "$out: failed" >&2; return 1; }
}

for corpus in $corpora; do prepare $corpus; done
export name OPTIONS
export -f one last_line
for seed in $SEEDS; do for corpus in $corpora; do
    while read -r row; do printf '%s\0%s\0%s\0' $corpus $seed "$row"; done <<< "$rows"
done; done | xargs -0 -n 3 -P $WORKERS bash -o pipefail -c 'one "$@"' one || { echo "runs/study.sh: runs failed, see above" >&2; exit 1; }
show python studies/study.py "results/$name.jsonl" --rows --figure="results/$name.png" --overwrite
