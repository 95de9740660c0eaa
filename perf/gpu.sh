#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: the tests marked gpu, then the benchmark of the 1.1B and 8B
# shapes in bfloat16. JSON, tables and charts go to perf/results/.
#
#   perf/gpu.sh [MODEL...]          default: tinyllama-1.1b llama-3-8b
#   PYTHON=python3 perf/gpu.sh      another interpreter than .venv's
set -euo pipefail
cd "$(dirname "$0")/.."

refuse() {
    echo "perf/gpu.sh: $1" >&2
    exit 2
}

python=${PYTHON:-.venv/bin/python}
gpus=$(nvidia-smi --list-gpus 2>/dev/null) || refuse "no NVIDIA GPU found: nvidia-smi lists none"
[[ -n $gpus ]] || refuse "no NVIDIA GPU found: nvidia-smi lists none"
"$python" -c "from importlib.util import find_spec; find_spec('llamac.perf').name" 2>/dev/null ||
    refuse "llamac is not installed for $python; $python -m pip install --editable '.[torch,perf,dev]'"
"$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || refuse \
    "torch sees no GPU; install a CUDA build of torch that fits the driver"
echo "$gpus"

failed=0
"$python" -m pytest -m gpu tests || failed=1
bench() {
    "$python" -m llamac.perf.bench --device cuda --dtype bfloat16 --json perf/results "$@" || failed=1
}
(($#)) || set -- tinyllama-1.1b llama-3-8b
for model; do
    "$python" -m llamac.perf.gpu_steps "$model" \
        >"perf/results/$(basename "$model")-cuda-bfloat16-$(date +%F)-steps.json" || failed=1
    # Not all at once: at 8B that takes more than 80 GB.
    bench --model "$model" --backend eager --backend compile --backend transformers \
        --prompt-len 128 1024 --new-tokens 128
    # ONNX Runtime's CUDA provider is skipped by itself where it isn't installed.
    bench --model "$model" --backend compile --backend ort-cuda \
        --prompt-len 128 1024 --new-tokens 128 --sweep 512 8192
done
bench --model "$1" --backend compile --backend ort-cuda --backend transformers --cold-start
exit "$failed"
