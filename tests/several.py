"""Runs made by several processes that share them: started by torchrun, one after another, as the tests ask."""

import json
import sys
from typing import Any

import torch
from torch import distributed

from distillm.config import make_run
from distillm.errors import DistillmError
from distillm.pipeline import distill
from distillm.processes import leave


def main() -> None:
    """several.py SETTINGS.json...: each a run; a failure is told, and the next one made."""
    torch.set_num_threads(1)
    for path in sys.argv[1:]:
        with open(path, encoding="utf-8") as file:
            settings: dict[str, Any] = json.load(file)
        try:
            distill(make_run(settings))
            distributed.barrier()  # one run's models are gone in all processes before the next one's are made
        except DistillmError as error:
            sys.stderr.write(f"\n{type(error).__name__} in {distributed.get_rank()}: {error}\n")


if __name__ == "__main__":
    main()
    leave()
