#!/usr/bin/env bash
# A real pretrained encoder-decoder and a student of a third of its layers. Stopped, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=studies/multi30k_en_fr runs=runs/multi30k-en-fr
[ -d $runs/opus-mt-en-fr ] || python ../shared/models/fetch.py opus-mt-en-fr $runs/opus-mt-en-fr
[ -f $runs/teacher/report.html ] || distillm train $here/teacher.yaml resume=auto
[ -f $runs/student/report.html ] || distillm train $here/student.yaml resume=auto
seeds=${SEEDS:-1,2,3}
distillm sweep $here/methods.yaml data.responses=teacher "seed=$seeds" output=$runs/responses
distillm sweep $here/methods.yaml method.name=sft,seqkd,distillm "seed=$seeds"
distillm compare $runs/responses/*/ $runs/methods/*/ $runs/teacher $runs/student -o $runs/scores.md
