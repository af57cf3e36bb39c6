#!/usr/bin/env bash
# An encoder-decoder teacher from scratch and a student of a quarter of its size. Stopped, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=studies/multi30k_seq2seq runs=runs/multi30k_seq2seq
[ -d $runs/tokenizer ] || distillm tokenizer ../shared/data/multi30k/train.jsonl -o $runs/tokenizer --size 5000
[ -f $runs/teacher/report.html ] || distillm train $here/teacher.yaml resume=auto
[ -f $runs/student/report.html ] || distillm train $here/student.yaml resume=auto
seeds=${SEEDS:-1,2,3}
distillm sweep $here/methods.yaml data.responses=teacher "seed=$seeds" output=$runs/responses
distillm sweep $here/methods.yaml method.name=sft,seqkd,distillm "seed=$seeds"
distillm compare $runs/responses/*/ $runs/methods/*/ $runs/teacher $runs/student -o $runs/scores.md
