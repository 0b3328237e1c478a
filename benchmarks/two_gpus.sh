#!/usr/bin/env bash
# Measures everything that a report of a machine with two GPUs needs, into FOLDER. About half an hour on two H200s:
#
#     bash benchmarks/two_gpus.sh FOLDER [PART ...]     parts: tests constants decode batches paper steps tensor prefill million
#
# The parts are independent: one that fails or runs out of time does not affect the others. FlashAttention-3 takes
# part if the package fa3-fwd is installed.
set -u
cd "$(dirname "$0")/.."
out=$(realpath "$1")
shift
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 PYTHONPATH="$PWD/src:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
model=src/tree_attention/cost/models/llama-3.1-8b.json

python=.venv/bin/python
[ -x $python ] || python=python3

ours() { $python -c 'from tree_attention.cli import main; main()' "$@"; }

tests() { # -p no:benchmark: where that plug-in is installed, it warns, and warnings are errors
    $python -m pytest -m "gpu and not slow" -p no:benchmark --numprocesses 12 --dist worksteal
    $python -m pytest -m "gpu and slow"
}
constants() { ours calibrate --nproc 2 --output "$out/machine.json"; }
decode() {
    ours bench decode --rounds 11 --peers cudnn,flash2,flash3,three_all_reduce,all_gather,ring --output "$out/decode.jsonl"
}
batches() {
    for lengths in "" --ragged; do
        ours bench decode --no-eager --rounds 7 --pairs --batch 16,64 --keys 16384,4096 --layout NHD \
            --peers cudnn,flash3 $lengths --output "$out/batches.jsonl"
    done
}
paper() {
    ours bench decode --no-eager --rounds 7 --heads 16 --kv-heads 16 --keys 40960,327680,655360 \
        --peers cudnn,flash3,three_all_reduce,all_gather,ring --output "$out/paper.jsonl"
}
steps() { ours bench steps --config $model --contexts 1024,131072,524288,1048576 --output "$out/steps.jsonl"; }
tensor() {
    ours bench steps --config $model --tensor-parallel 2 --contexts 1024,131072,524288,1048576 \
        --variants "ours captured,ours compiled" --output "$out/tensor.jsonl"
}
prefill() { ours bench prefill --config $model --contexts 32768,131072 --rounds 2 --output "$out/prefill.jsonl"; }
million() {
    ours bench prefill --config $model --contexts 1048576 --rounds 1 --variants ours --output "$out/prefill.jsonl"
}

[ $# -gt 0 ] || set -- tests constants decode batches paper steps tensor prefill million
for part in "$@"; do
    echo "== $part, $(date +%T)"
    "$part" || echo "== $part ended with $?"
done
