#!/usr/bin/env bash
# Summarisation, trained and scored. Stopped, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -f runs/smollm2/model.gguf ] || python ../shared/models/fetch.py smollm2-135m runs/smollm2
[ -f runs/samsum/adapter/report.html ] || distillm train studies/samsum/adapter.yaml resume=auto
distillm compare runs/samsum/adapter --baseline before -o runs/samsum/scores.md
