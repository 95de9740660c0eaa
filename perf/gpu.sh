#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: the tests marked gpu and the benchmark, in stages that each run
# alone and are stopped after three minutes. JSON, tables and charts go to $OUT, else perf/results.
#
#   perf/gpu.sh [STAGE...]          default: all of them
#   perf/gpu.sh --list              names the stages
#   PYTHON=python3 perf/gpu.sh      another interpreter than .venv's
set -euo pipefail
cd "$(dirname "$0")/.."

# At 8B one system at a time: the reference's float32 weights alone are 32 GB.
stages='
tests       tests of the kernels and of the backends
1b-speed    --model tinyllama-1.1b --backend compile --backend transformers --prompt-len 128 1024 --new-tokens 128
1b-static   --model tinyllama-1.1b --backend compile --backend transformers-static --new-tokens 128
1b-eager    --model tinyllama-1.1b --backend eager
1b-batch    --model tinyllama-1.1b --backend compile --batch-size 1 4 16 --new-tokens 64
1b-ort      --model tinyllama-1.1b --backend compile --backend ort-cuda --prompt-len 128 1024 --new-tokens 128
1b-sweep    --model tinyllama-1.1b --backend compile --sweep 512 8192
1b-cold     --model tinyllama-1.1b --backend compile --cold-start
1b-kernels  --kernels --model tinyllama-1.1b
1b-kernels-8 --kernels --model tinyllama-1.1b --batch-size 8
1b-packed   --model tinyllama-1.1b --backend compile --backend compile-int8 --backend compile-int4
3.2-1b      --model llama-3.2-1b --backend compile --prompt-len 32 --new-tokens 128
3.2-1b-batch --model llama-3.2-1b --backend compile --prompt-len 32 --new-tokens 128 --batch-size 8 32
8b-speed    --model llama-3-8b --backend compile --new-tokens 128
8b-short    --model llama-3-8b --backend compile --prompt-len 32 --new-tokens 128
8b-batch-8  --model llama-3-8b --backend compile --prompt-len 32 --new-tokens 128 --batch-size 8
8b-batch-32 --model llama-3-8b --backend compile --prompt-len 32 --new-tokens 128 --batch-size 32
8b-peer     --model llama-3-8b --backend transformers
8b-static   --model llama-3-8b --backend transformers-static
8b-int8     --model llama-3-8b --backend compile-int8 --new-tokens 128
8b-int4     --model llama-3-8b --backend compile-int4 --new-tokens 128
8b-sweep    --model llama-3-8b --backend compile --sweep 8192
'

refuse() {
    echo "perf/gpu.sh: $1" >&2
    exit 2
}

find_stage() {
    awk -v name="$1" '$1 == name { $1 = ""; print substr($0, 2) }' <<<"$stages"
}

if [[ ${1:-} == --list ]]; then
    sed '/^$/d' <<<"$stages"
    exit
fi
(($#)) || mapfile -t all < <(awk 'NF { print $1 }' <<<"$stages")
(($#)) || set -- "${all[@]}"
for stage; do
    [[ -n $(find_stage "$stage") ]] || refuse "no stage $stage; perf/gpu.sh --list names them"
done

python=${PYTHON:-.venv/bin/python}
gpus=$(nvidia-smi --list-gpus 2>/dev/null) || refuse "no NVIDIA GPU found: nvidia-smi lists none"
[[ -n $gpus ]] || refuse "no NVIDIA GPU found: nvidia-smi lists none"
"$python" -c "from importlib.util import find_spec; find_spec('llamac.perf').name" 2>/dev/null ||
    refuse "llamac is not installed for $python; $python -m pip install --editable '.[torch,perf,dev]'"
"$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || refuse \
    "torch sees no GPU; install a CUDA build of torch that fits the driver"
echo "$gpus"

failed=0
for stage; do
    read -ra words <<<"$(find_stage "$stage")"
    command=(-m llamac.perf.bench --device cuda --dtype bfloat16)
    [[ ${words[0]:-} == --kernels ]] || command+=(--json "${OUT:-perf/results}")
    command+=("${words[@]}")
    [[ $stage != tests ]] || command=(-m pytest -m gpu tests)
    echo "== $stage"
    timeout --kill-after=5 180 "$python" "${command[@]}" || {
        echo "perf/gpu.sh: $stage ended with code $?" >&2
        failed=1
    }
done
exit "$failed"
