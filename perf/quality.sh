#!/usr/bin/env bash
# How far quantized weights carry a model from what it was: for each recipe the KL divergence, the
# share of equal predictions and the ratio of perplexities, on a text, in float32.
# perf/quality.sh SOURCE TEXT_FILE [RECIPE ...]
set -euo pipefail
source=$1 text=$2
shift 2
[ $# -gt 0 ] || set -- int8-g32 int8 int4 int4-g64 int4-g128
for recipe in "$@"; do
  printed=$(llamac score "$source" --quantize "$recipe" --against "$source" --text-file "$text" \
    --backend eager --dtype float32 --max-seq-len 512)
  echo "$recipe: ${printed##*$'\n'}"
done
