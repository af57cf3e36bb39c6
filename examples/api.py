"""Distil from Python: `python examples/api.py run.yaml`. The loop is yours; look at each step, stop when you like."""

import sys

import distillm

run = distillm.load_run(sys.argv[1], sys.argv[2:])
project = distillm.build(run)  # models, rows, method, optimizer; nothing is written
for step in distillm.steps(project):
    print(f"step {step.step}  loss {step.loss:.3f}  {step.batch}  p {step.figures.get('probability')}")
figures = distillm.measure(run, project.models, project.validation.examples)
print({name: round(value, 3) for name, value in figures.items()})
project.models.student.save_pretrained(f"{run.output}/student")
