#!/usr/bin/env bash
# Every check that needs a CUDA device, in one call; the tables go to $OUT (default benchmarks/results).
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
failed=0

run() { # run NAME COMMAND…: keeps the output, goes on after a failure, says so at the end
    echo "== $1"
    "${@:2}" 2>&1 | tee "$OUT/$1.log" || { echo "FAILED: $1"; failed=1; }
}

# A process for each file: peaks of memory are those of its own runs.
for tests in test_gpu trainers/test_plan_gpu trainers/test_fsdp2_strategy; do
    run "gpu-tests-${tests##*/}" "$PYTHON" -m pytest -q -m gpu "tests/$tests.py"
done
run gpu-step-float32 "$PYTHON" benchmarks/step.py --presets 9m 130m --device cuda --out "$OUT/step-cuda-float32.md"
run gpu-step-bfloat16 "$PYTHON" benchmarks/step.py --presets 130m 1b --device cuda --dtype bfloat16 --renewals 1 \
    --out "$OUT/step-cuda-bfloat16.md"
run gpu-renewal "$PYTHON" benchmarks/renewal.py --out "$OUT/renewal-cuda.md"
run gpu-memory-7b "$PYTHON" benchmarks/memory.py
run gpu-memory-1b-adamw "$PYTHON" benchmarks/memory.py --preset 1b --method adamw --bits 32 --in-backward off
run gpu-memory-1b-galore "$PYTHON" benchmarks/memory.py --preset 1b --rank 512 --in-backward project
run gpu-strategy-overhead "$PYTHON" benchmarks/strategy_overhead.py --out "$OUT/strategy-overhead-cuda.md"
run gpu-layers-130m "$PYTHON" benchmarks/layers.py --tokens 4096 65536 --dtype bfloat16 --out "$OUT/layers-cuda-130m.md"
run gpu-layers-1b "$PYTHON" benchmarks/layers.py --preset 1b --rank 512 --tokens 4096 65536 --dtype bfloat16 \
    --out "$OUT/layers-cuda-1b.md"
run gpu-loss "$PYTHON" benchmarks/loss.py --device cuda --out "$OUT/loss-cuda.md"
run gpu-monitoring "$PYTHON" benchmarks/monitoring.py --presets 9m 60m 130m --precision bf16-mixed --device cuda \
    --out "$OUT/monitoring-cuda.md"
run gpu-pretrain-watched "$PYTHON" launch/pretrain.py monitors=full guard=zscore layerwise=llr \
    trainer.cross_entropy=auto trainer.z_loss=1e-4 run.dir="$(mktemp -d)/run"
run gpu-pretrain "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 1 launch/pretrain.py \
    run.dir="$(mktemp -d)/pretrain"
for strategy in thinrank_ddp thinrank_owned thinrank_fsdp2 thinrank_zero1 thinrank_zero2 thinrank_zero3; do
    run "gpu-pretrain-$strategy" "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 1 launch/pretrain.py \
        "strategy=$strategy" optimizer=galore run.dir="$(mktemp -d)/run"
done
for reparam in sst lost loro; do
    run "gpu-pretrain-$reparam" "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 1 launch/pretrain.py \
        "model.reparam=$reparam" optimizer=adamw trainer.max_steps=250 run.dir="$(mktemp -d)/run"
done
exit $failed
