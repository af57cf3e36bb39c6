"""What a run was made with: versions, command, machine, models."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel

from .models import num_parameters
from .screen import without_credentials


def provenance(models: dict[str, PreTrainedModel | None], device: torch.device, command: str | None) -> dict[str, Any]:
    """The figures that make a run repeatable; ``models`` by role."""
    return {
        "distillm": version("distillm"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "git": _revision(),
        "command": without_credentials(command or " ".join(["python", *sys.argv])),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "device": _named(device),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "models": {name: _facts(model) for name, model in models.items() if model is not None},
    }


def _named(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _facts(model: PreTrainedModel) -> dict[str, Any]:
    config: Any = model.config
    facts = {"parameters": num_parameters(model), "layers": getattr(config, "num_hidden_layers", None)}
    facts |= {"width": getattr(config, "hidden_size", None), "vocabulary": config.vocab_size}
    return facts | {"encoder_decoder": bool(config.is_encoder_decoder)}


def _revision() -> str | None:
    """The git revision of the working folder, if it is one."""
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip()
