#!/usr/bin/env bash
# The 30M models on one GPU, in pieces, where one is there for a limited time only:
#
#     PARTS="a b c" LIMIT=540 bash runs/gpu_30m.sh [--key=value ...]
#
# a: tau_30m, the published run, 5,000 steps. b: its twin dot_30m, and tau_30m_best and dot_30m_best, 1,500 steps each, on the same
# batches. c: for each model that is there, three samples and the loss on the held-out records. After LIMIT seconds it saves what is
# unfinished and ends; the same command goes on. The corpus and its Laplacian must be in DATA (data/cve; runs/tau_30m.sh makes them).
# Metrics, samples and the table go to results/my_NAME (NAME=30m), checkpoints to out/gpu_30m. MODELS="tau_30m_best" leaves out the
# others. Options go to train.py. Needs no network: it takes .venv if there is one, else the active python3 (or PYTHON).
set -euo pipefail
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."
[[ ${LIMIT:=540} =~ ^[0-9]+$ ]] || { echo "$0: LIMIT=$LIMIT must be seconds" >&2; exit 2; }
deadline=$((SECONDS + LIMIT))
data=${DATA:-data/cve} results=results/my_${NAME:-30m} parts=${PARTS:-a b c} all="tau_30m dot_30m tau_30m_best dot_30m_best"
models=${MODELS:-$all}
[ ! -f .venv/bin/activate ] || . .venv/bin/activate
python=${PYTHON:-python3}
for file in train.bin val.bin laplacian.parquet; do
    [ -f "$data/$file" ] || { echo "gpu_30m.sh: $data/$file does not exist: make it with runs/tau_30m.sh, or give DATA=" >&2; exit 2; }
done
for model in $models; do
    [[ " $all " == *" $model "* ]] || { echo "gpu_30m.sh: MODELS=\"$models\" must be of ${all// /, }" >&2; exit 2; }
done
mkdir -p "$results"

left() { echo $((deadline - SECONDS)); }

train() {  # MODEL STEPS [--key=value ...]
    local model=$1 out=out/gpu_30m/$1 status=0
    [[ " $models " == *" $model "* ]] && [ "$(left)" -gt 30 ] || return 0
    printf '\n%s: %d s left\n' "$model" "$(left)"
    timeout -s TERM -k 30 $(($(left) - 15)) "$python" train.py "configs/$model.toml" --init_from=auto --out_dir="$out" --data_dir="$data" \
        --batch_size=128 --grad_accum_steps=1 --checkpoint_interval=1000 --keep_last=1 --diag_interval=250 \
        --results="$results/gpu_30m.jsonl" --max_steps="$2" "${@:3}" || status=$?
    mkdir -p "$results/$model"
    for file in metrics diagnostics; do
        [ ! -f "$out/$file.jsonl" ] || cp "$out/$file.jsonl" "$results/$model/"
    done
    [ $status -eq 0 ] || [ $status -eq 124 ] || exit $status  # 124: out of time, and saved
}

look() {  # MODEL [--key=value ...]
    local out=out/gpu_30m/$1 to=$results/$1
    [ -f "$out/best.safetensors" ] && [ "$(left)" -gt 30 ] || return 0
    [ ! "$to/held_out.txt" -nt "$out/best.safetensors" ] || return 0
    timeout "$(left)" "$python" sample.py "$out" --prompt="CVE-2026-" --max_new_tokens=120 --num_samples=3 --seed=1 > "$to/samples.txt"
    timeout "$(left)" "$python" train.py "configs/$1.toml" --eval_only=True --init_from="$out" --data_dir="$data" --batch_size=128 \
        --grad_accum_steps=1 "${@:2}" | tee "$to/held_out.txt"
}

for part in $parts; do
    case $part in
        a) train tau_30m 5000 "$@" ;;
        b) for model in dot_30m tau_30m_best dot_30m_best; do train $model 1500 "$@"; done ;;
        c) for model in $models; do look $model "$@"; done ;;
        *) echo "gpu_30m.sh: PARTS=\"$parts\" must be of a, b and c" >&2; exit 2 ;;
    esac
done

"$python" - "$results" $models <<'END_OF_TABLE' | tee "$results/gpu_30m.txt"
import json, statistics, sys
from pathlib import Path

results, *models = sys.argv[1:]
print(f"{'':>14} {'steps':>6} {'at 100':>7} {'500':>7} {'1000':>7} {'1500':>7} {'2000':>7} {'last':>7} {'best':>7} {'at':>5} {'tokens/s':>10} {'s':>6} {'MB':>7}")
for model in models:
    path = Path(results, model, "metrics.jsonl")
    if not path.exists():
        continue
    records = [json.loads(line) for line in path.read_text().splitlines()]
    val = {record["step"]: record["loss"] for record in records if record["split"] == "val"}
    speed = [record["tokens_per_s"] for record in records if record["split"] == "train"][2:] or [0]
    best, last = min(val, key=val.get), max(val)
    at = [f"{val[step]:7.4f}" if step in val else f"{'-':>7}" for step in (100, 500, 1000, 1500, 2000)]
    print(f"{model:>14} {records[-1]['step']:>6} {' '.join(at)} {val[last]:7.4f} {val[best]:7.4f} {best:>5} {statistics.median(speed):>10,.0f} "
          f"{records[-1]['elapsed_s']:>6.0f} {max(record['peak_mem_mb'] for record in records):>7,.0f}")
END_OF_TABLE
