#!/usr/bin/env bash
# What one GPU can measure in seven minutes, where one is there for a limited time only:
#
#     PARTS="steps attention tests decode" LIMIT=420 bash runs/gpu_bench.sh
#
# steps: the 30M training step, compiled, of tau, its best form, the dot-product twin and nanoGPT (NANOGPT=DIR, a checkout of it).
# attention: the operator in three forms against flash attention and cuDNN's. tests: those marked cuda. decode: a token after up to
# 131,072 others, of 1 and 16 sequences at a time, from the stream, the exact cache and the twin's (K, V) cache. A part that is out of time
# is ended; what it has measured so far is in results/my_* by then, and its log in results/my_gpu_bench/. Needs no network: it takes
# .venv if there is one, else the active python3 (or PYTHON).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ ${LIMIT:=420} =~ ^[0-9]+$ ]] || { echo "$0: LIMIT=$LIMIT must be seconds" >&2; exit 2; }
deadline=$((SECONDS + LIMIT)) status=0 logs=results/my_gpu_bench
[ ! -f .venv/bin/activate ] || . .venv/bin/activate
python=${PYTHON:-python3}
mkdir -p $logs

part() {  # NAME SECONDS COMMAND ...
    local name=$1 most=$2 left=$((deadline - SECONDS)) ended=0
    [ $left -gt 20 ] || { echo "$name: no time left"; return; }
    [ $left -lt $most ] && most=$left
    printf '\n%s: %d s at most\n' "$name" $most
    timeout $most "${@:3}" 2>&1 | tee "$logs/$name.txt" || ended=$?
    [ $ended -eq 124 ] && echo "$name: out of time" || [ $ended -eq 0 ] || { echo "$name: exit code $ended" >&2; status=1; }
}

for name in ${PARTS:-steps attention tests decode}; do
    case $name in
        steps) part steps 240 "$python" bench.py train_step --device=cuda --compile --repeats=1 --steps=20 ${NANOGPT:+--nanogpt="$NANOGPT"} ;;
        attention) part attention 150 "$python" bench.py attention --device=cuda --repeats=3 ;;
        decode) part decode 120 "$python" bench.py decode --device=cuda --repeats=2 ;;
        tests) part tests 120 "$python" -m pytest -q -m cuda -n 8 tests ;;
        *) echo "$0: PARTS=\"$PARTS\" must be of steps, attention, tests and decode" >&2; exit 2 ;;
    esac
done
exit $status
