#!/usr/bin/env bash
# How does the loss change in texts longer than the context a model was trained on, and what do the stream cache's bins cost? Six small
# models, tau in the published form, in the best one without recall heads, whose temperatures are learned and sharp, and in that with
# them, and their dot-product twins, on a JSONL file of yours:
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
show python train.py configs/study.toml --init_from=auto --data_dir=$data --out_dir=$out/best $of_both $of_tau --local_heads=2
show python train.py configs/study.toml --init_from=auto --data_dir=$data --out_dir=$out/recall $of_both $of_tau --n_head=8 \
    --local_heads=3 --recall_heads=4
show python train.py configs/study.toml --init_from=auto --data_dir=$data --out_dir=$out/dot --attention=dot
show python train.py configs/study.toml --init_from=auto --data_dir=$data --out_dir=$out/dot_best --attention=dot $of_both
show python train.py configs/study.toml --init_from=auto --data_dir=$data --out_dir=$out/dot_recall --attention=dot $of_both --n_head=8 \
    --recall_heads=4
show python bench.py context --runs $out/published $out/best $out/recall $out/dot $out/dot_best $out/dot_recall --data_dir=$data
