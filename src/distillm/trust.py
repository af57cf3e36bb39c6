"""What a model folder could have run as it is loaded, refused unless its author is trusted."""

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from .errors import ModelError


def refuse_pickles(source: Path) -> None:
    """Raise ModelError where the only weights in ``source`` are pickled."""
    pickles = [p.name for p in sorted(source.glob("*")) if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles and not any(source.glob("*.safetensors")):
        raise ModelError(
            f"the weights of {source} are pickled ({pickles[0]}), and unpickling can run any code: save them as "
            "safetensors (save_pretrained does), or set trust_remote_code if you trust their author"
        )


def refuse_kernels(config: PretrainedConfig, source: Path) -> None:
    """Raise ModelError where ``config`` names an attention kernel of the hub, which transformers would load and run."""
    parts: list[Any] = [config, *vars(config).values()]
    named = [str(getattr(part, "_attn_implementation", "")) for part in parts if isinstance(part, PretrainedConfig)]
    if kernels := [name for name in named if "/" in name]:
        raise ModelError(
            f"config.json of {source} asks for the attention kernel {kernels[0]} of the hub, whose code would run: "
            "take attn_implementation out of it, or set trust_remote_code if you trust its author"
        )
