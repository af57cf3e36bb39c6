"""A divergence of your own: `python examples/custom_divergence.py run.yaml`.

Write it per token, from log-probabilities, teacher first: (p, q) -> one value a row. The loss on hidden states takes it
as it is, a block of rows at a time, by autograd; no [batch, length, vocabulary] tensor is formed.
"""

import sys

from torch import Tensor

import distillm
from distillm.losses import distill
from distillm.methods import Method


def hellinger(p: Tensor, q: Tensor) -> Tensor:
    """The squared Hellinger distance: ``1 - sum_v sqrt(p_v q_v)``, ``[..., V] -> [...]``."""
    return 1 - ((p + q) / 2).exp().sum(-1)


run = distillm.load_run(sys.argv[1], sys.argv[2:])
project = distillm.build(run)
# A method is a source of rows and a loss: keep the run's own source, and put another loss in its place.
project.method = Method(project.method.source, distill(hellinger))
for step in distillm.steps(project):
    print(f"step {step.step}  hellinger {step.terms['hellinger']:.4f}  {step.batch}")
