#!/usr/bin/env bash
# Eight methods on Multi30k En-De with small decoder-only models from scratch. Stopped, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=studies/multi30k
[ -d runs/multi30k/tokenizer ] || distillm tokenizer ../shared/data/multi30k/train.jsonl -o runs/multi30k/tokenizer --size 4000
[ -f runs/multi30k/teacher/report.html ] || distillm train $here/teacher.yaml resume=auto
[ -f runs/multi30k/student/report.html ] || distillm train $here/student.yaml resume=auto
distillm sweep $here/methods.yaml method.name=sft,seqkd,kd,imitkd,gkd,minillm,distillm,distillm2 "seed=${SEEDS:-1}"
