#!/usr/bin/env bash
# Does the domain's memory matter? The quick start's model on two domains, the documentation of Python and a JSONL file of
# yours (docs/domain_memory.md's figures are of security advisories), for 500 steps:
#
#     bash runs/domain.sh FILE.jsonl ["1 2 3"]
#
# 1. From scratch: with the domain's graph or one with the same degrees and weights on other edges, with random token embeddings
#    or the domain's own, on all of the corpus or a tenth of it.
# 2. The models of Python's documentation, fine-tuned on the other domain: with their own memory, with that domain's, or
#    with a random one.
# 3. The models trained on all of a corpus with its own graph, their memory swapped for another: results/my_NAME_swaps.jsonl.
# 4. How well energies tell the other domain's held-out documents from Python's: results/my_NAME_energies.txt.
#
# 66 runs for three seeds, an hour and a half on two cores. Finished runs are not repeated, interrupted ones go on. Their lines go
# to results/my_NAME.jsonl, NAME=domain unless it is set.
[ $# -ge 1 ] || { echo 'usage: bash runs/domain.sh FILE.jsonl ["SEEDS"]' >&2; exit 2; }
[ -f "$1" ] || { echo "runs/domain.sh: $1 is not a file" >&2; exit 2; }
text=$(realpath "$1") seeds=${2:-1 2 3}
. "$(dirname "$(realpath "$0")")/setup.sh"
name=$(own_name "${NAME:-domain}")
numbers SEEDS "$seeds"
own=$(corpus_name "$text")

graphs() {  # CORPUS: its embeddings and graphs of 128 features
    [ -f "$1/token_embeddings.npy" ] || show python data/embed.py "$1" --dim=128 --overwrite
    [ -f "$1/laplacian.parquet" ] || show python build_laplacian.py "$1/embeddings.npy" --out="$1/laplacian.parquet"
    [ -f "$1/random.parquet" ] || show python build_laplacian.py "$1/embeddings.npy" --graph=random --out="$1/random.parquet"
}
train() { show python train.py configs/quickstart_published.toml --init_from=auto --results=results/$name.jsonl "$@"; }

python_docs=data/python_docs other=data/$own tuned=data/${own}_tuned
bpe_corpus $python_docs 2048 python_docs
bpe_corpus $other 2048 jsonl "$text"
graphs $python_docs
graphs $other
[ -f data/chain.parquet ] || show python build_laplacian.py --graph=chain --dim=128 --out=data/chain.parquet

for seed in $seeds; do
    for fraction in 1.0 0.1; do for data in $python_docs $other; do for graph in laplacian random; do for init in normal domain; do
        train --data_dir=$data --laplacian=$data/$graph.parquet --embedding_init=$init --train_fraction=$fraction --seed=$seed \
            --max_steps=500 --lr_decay_steps=500 --eval_interval=100 --out_dir=out/$name/$(basename $data)/$graph/$init/$fraction/$seed
    done; done; done; done

    for init in normal domain; do
        trained=out/$name/python_docs/laplacian/$init/1.0/$seed
        [ -f $tuned/meta.json ] || show python data/jsonl/prepare.py "$text" --tokenizer=$trained --val_fraction=0.05 --out_dir=$tuned
        graphs $tuned
        for graph in $python_docs/laplacian $tuned/laplacian $tuned/random; do
            out=out/$name/tuned/$init/$graph/$seed
            from=$trained
            compgen -G "$out/step_*" > /dev/null && from=auto
            train --init_from=$from --data_dir=$tuned --laplacian=$graph.parquet --embedding_init=$init --seed=$seed --learning_rate=1e-3 \
                --max_steps=200 --lr_decay_steps=200 --warmup_steps=20 --eval_interval=50 --out_dir=$out
        done
    done

    for data in $python_docs $other; do for init in normal domain; do
        trained=out/$name/$(basename $data)/laplacian/$init/1.0/$seed
        for graph in $python_docs/laplacian $other/laplacian $data/random data/chain; do
            line="{\"run\": \"$trained\", \"seed\": $seed, \"laplacian\": \"$graph\""
            grep -qsF "$line" results/${name}_swaps.jsonl && continue
            losses=($(python train.py configs/quickstart_published.toml --data_dir=$data --init_from=$trained --eval_only=True \
                --laplacian=$graph.parquet --seed=$seed | tee /dev/stderr | sed -n 's/^validation loss \([0-9.]*\),.*/\1/p'))
            echo "$line, \"tau_kept\": ${losses[0]}, \"tau_measured\": ${losses[1]}}" >> results/${name}_swaps.jsonl
        done
    done; done
done
for graph in laplacian random; do
    show python studies/energy.py $other --laplacian=$other/$graph.parquet --embeddings=$other --against=$python_docs --overwrite
done | tee results/${name}_energies.txt
show python studies/study.py results/$name.jsonl
