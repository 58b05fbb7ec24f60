#!/bin/sh
# What is to be run on a machine with a GPU, each step within a time limit, on its own or all of them:
#   sh benchmarks/run_on_gpu.sh [test] [bench] [pretrain]
# Results and logs are in RESULTS (default: outputs/gpu). PYTHON is the interpreter (default: python3), which needs
# PyTorch and the packages that docs/gpu.md lists, and no network. A step that fails does not keep the next from running.
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-outputs/gpu}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$RESULTS"
failed=0

step() {  # name, seconds, command...
    name=$1 seconds=$2
    shift 2
    echo "== $name: $*"
    # The signal is SIGINT first: training then saves a checkpoint.
    timeout --signal=INT --kill-after=30 "$seconds" "$@" >"$RESULTS/$name.log" 2>&1
    code=$?
    tail -n "${LINES_SHOWN:-150}" "$RESULTS/$name.log"
    echo "== $name: exit code $code"
    # 124: its time was over, which is how the training is meant to end
    [ "$code" -eq 0 ] || [ "$name$code" = pretrain124 ] || failed=1
}

[ $# -gt 0 ] || set -- test bench pretrain
for name in "$@"; do
    case $name in
        test) # what compiles takes longest, and comes last; each result is in the log at once, should the time be over
            t=tests/gpu/test_gpu_
            step test "${TEST_SECONDS:-540}" "$PYTHON" -m pytest -v -m gpu -rs --durations=10 \
                ${t}parity.py ${t}memory.py ${t}training.py ${t}video.py ${t}compile.py ;;
        bench) step bench "${BENCH_SECONDS:-480}" "$PYTHON" -m benchmarks.bench_gpu \
            --seconds $((${BENCH_SECONDS:-480} - 20)) --output "$RESULTS/gpu.json" --page docs/speed.md
            cp docs/speed.md "$RESULTS/speed.md" ;;
        pretrain) step pretrain "${PRETRAIN_SECONDS:-540}" "$PYTHON" train_flow.py \
            --config configs/pretrain_synthetic_small.yaml --output_dir "$RESULTS/pretrain_synthetic_small" \
            --resume_from_checkpoint auto --report_to none --checkpoints_total_limit 1 ${PRETRAIN_FLAGS:-} ;;
        *) echo "run_on_gpu.sh: the steps are test, bench and pretrain; got $name" >&2; exit 2 ;;
    esac
done
exit $failed
