#!/usr/bin/env bash
# How does the loss change in texts longer than the context a model was trained on, and what do the stream cache's bins cost? Two
# small models, the published form and the best one, whose temperatures are learned and sharp, on a JSONL file of yours:
#
#     bash runs/context.sh FILE.jsonl
#
# It needs a million tokens or more: 5 % are for validation, 51,200 at least. The table goes to results/my_context.json.
[ $# -ge 1 ] || { echo 'usage: bash runs/context.sh FILE.jsonl' >&2; exit 2; }
[ -f "$1" ] || { echo "runs/context.sh: $1 is not a file" >&2; exit 2; }
jsonl=$(realpath "$1")
. "$(dirname "$(realpath "$0")")/setup.sh"
own=$(corpus_name "$jsonl")
data=data/$own out=out/context/$own

bpe_corpus $data 2048 jsonl "$jsonl"
[ -f $data/embeddings.npy ] || show python data/embed.py $data --dim=128
[ -f $data/laplacian.parquet ] || show python build_laplacian.py $data/embeddings.npy --out=$data/laplacian.parquet
show python train.py configs/study.toml --init_from=auto --data_dir=$data --out_dir=$out/published
show python train.py configs/study.toml --init_from=auto --data_dir=$data --out_dir=$out/best --temperature=0.1 \
    --learn_temperature=True --forget=gate --conv=4 --key_bias=True --output_gate=True --spectral_filter=True --tau_rope=False \
    --local_heads=2
show python bench.py context --runs $out/published $out/best --data_dir=$data
