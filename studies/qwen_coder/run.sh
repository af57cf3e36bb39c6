#!/usr/bin/env bash
# Peak memory and time per part, with fused heads and with all logits formed. Both are in the reports and in metrics.jsonl.
set -euo pipefail
cd "$(dirname "$0")/../.."
for size in 0.5b 1.5b; do
  [ -f runs/qwen2.5-coder/$size/model.gguf ] || python ../shared/models/fetch.py qwen2.5-coder-$size runs/qwen2.5-coder/$size
done
[ -f runs/qwen2.5-coder/run/report.html ] || distillm train studies/qwen_coder/run.yaml resume=auto
python studies/qwen_coder/full_logits.py
