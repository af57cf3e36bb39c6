#!/usr/bin/env bash
# The instruction sets of the paper, answered by SmolLM2-135M-Instruct: ROUGE-L, greedily, in one command.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -f runs/smollm2/model.gguf ] || python ../shared/models/fetch.py smollm2-135m runs/smollm2
sets=(--data dolly --data self_instruct --data vicuna --data super_natural_instructions)
[ ! -d ../shared/data/unnatural_instructions ] || sets+=(--data unnatural_instructions)
distillm eval runs/smollm2/model.gguf "${sets[@]}" --folder ../shared/data --output runs/five_sets \
  --temperature 0 --max-new-tokens 128 --batch-size 64
