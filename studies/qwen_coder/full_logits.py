"""The run of run.yaml with every logit of both models formed at once, and what the two runs took, side by side."""

import json
from functools import partial
from pathlib import Path
from unittest.mock import patch

from distillm import distill, load_run
from distillm.kernels import linear_cross_entropy, linear_divergence

FUSED, FULL = Path("runs/qwen2.5-coder/run"), Path("runs/qwen2.5-coder/full_logits")


def taken(folder: Path) -> tuple[float, dict[str, float]]:
    """GiB held at most, and seconds by part."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    times = [line for line in lines if line["kind"] == "time"]
    names = {name for line in times for name in line["seconds"]}
    parts = {name: sum(line["seconds"].get(name, 0.0) for line in times) for name in names}
    return max(line["peak_bytes"] for line in times) / 2**30, parts


if not (FULL / "report.html").exists():
    eager = {f.__name__: partial(f, impl="eager") for f in (linear_divergence, linear_cross_entropy)}
    with patch.multiple("distillm.losses", **eager):
        distill(load_run("studies/qwen_coder/run.yaml", [f"output={FULL}", "overwrite=true"]))
(fused, parts), (full, other) = taken(FUSED), taken(FULL)
print("| | fused heads | full logits |\n|---|---|---|")
print(f"| memory at most, GiB | {fused:.1f} | {full:.1f} |")
for part in sorted(parts, key=lambda name: -parts[name]):
    print(f"| {part}, s | {parts[part]:.0f} | {other.get(part, 0.0):.0f} |")
