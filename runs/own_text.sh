#!/usr/bin/env bash
# From a text of yours to a trained Tauformer, a figure and a sample: minutes on two CPU cores, no network.
#
#     bash runs/own_text.sh FILE_OR_FOLDER ... [--key=value ...]
#
# Files and folders are what data/text/prepare.py takes. The sizes of vocabulary, graph, model and run are chosen by the amount of text
# (data/sizes.py) and printed, each with the option that changes it. Options go to train.py, those of data/text/prepare.py (--text_key,
# --split_on, --skip_bad, --tokenizer, --vocab_size, --val_fraction) to that. NAME is that of the first file unless it is set: the corpus
# goes to data/my_NAME, the run to out/my_NAME. What is there already, of the same text, is left; what was interrupted goes on.
usage='usage: bash runs/own_text.sh FILE_OR_FOLDER ... [--key=value ...]'
paths=() preparing=() options=()
for argument; do
    case $argument in
    --) ;;
    --out[_-]dir* | --data[_-]dir*) echo "runs/own_text.sh: ${argument%%=*} cannot be given: NAME=... names the folders" >&2; exit 2 ;;
    --text[_-]key* | --split[_-]on* | --skip_bad | --tokenizer* | --vocab[_-]size* | --val[_-]fraction*) preparing+=("$argument") ;;
    --help | -h) echo "$usage"; exit ;;
    -*) options+=("$argument") ;;
    *)
        [ -f "$argument" ] || [ -d "$argument" ] || { echo "runs/own_text.sh: $argument is no file or folder ($usage)" >&2; exit 2; }
        paths+=("$(realpath "$argument")") ;;
    esac
done
[ ${#paths[@]} -ge 1 ] || { echo "$usage" >&2; exit 2; }
. "$(dirname "$(realpath "$0")")/setup.sh"

name=$(basename "${paths[0]}")
name=${name%%.*}
name=$(own_name "${NAME:-${name//[^A-Za-z0-9_-]/_}}")
[[ $name =~ ^[A-Za-z0-9._-]+$ ]] || { echo "$0: NAME=$NAME must be letters, digits, dots, dashes and underscores" >&2; exit 2; }
data=data/$name out=out/$name elsewhere=NAME=ANOTHER

choose() {  # ARGUMENT ...: sets the sizes that data/sizes.py chooses, and shows them
    local sizes
    sizes=$(python data/sizes.py "$@")
    printf '\n%s\n' "$sizes"
    eval "$sizes"
}

choose "${paths[@]}"
made $data/meta.json "${paths[@]}" -- show python data/text/prepare.py "${paths[@]}" --out_dir=$data --vocab_size=$vocab_size \
    --val_fraction=$val_fraction ${preparing[@]+"${preparing[@]}"}
choose --data_dir=$data ${options[@]+"${options[@]}"}
graph=(--graph=$graph --dim=$features)
if [ ${graph[0]} = --graph=domain ]; then
    made $data/embeddings.npy $data/meta.json -- show python data/embed.py $data --dim=$features --documents=20000
    graph=($data/embeddings.npy)
fi
made $data/laplacian.parquet $data/meta.json -- show python build_laplacian.py "${graph[@]}" --out=$data/laplacian.parquet
show python train.py configs/own_text.toml --init_from=auto --data_dir=$data --out_dir=$out --n_layer=$n_layer --n_embd=$n_embd \
    --n_head=$n_head --local_heads=$local_heads --block_size=$block_size --batch_size=$batch_size --max_steps=$max_steps \
    --warmup_steps=$warmup_steps --lr_decay_steps=$lr_decay_steps --eval_interval=$eval_interval ${options[@]+"${options[@]}"}
[ -f $out/metrics.jsonl ] || exit 0  # --dry_run
[ $out/figure.png -nt $out/metrics.jsonl ] || show python plot.py $out --overwrite
show python sample.py $out --max_new_tokens=120
printf '\n\nlosses, energies and Laplacian: %s/figure.png\nmore: python sample.py %s --prompt=TEXT\n' $out $out
