"""Writes prompts of one domain, workshop and kitchen tools, without any answers: the teacher gives those."""

import json
import random
from pathlib import Path

TOOLS = """anvil, awl, axe, bellows, bench vice, bolt cutter, bread knife, broom, bucket, candle, cheese grater, chisel,
clamp, colander, compass, corkscrew, crowbar, cutting board, drill, dustpan, file, fishing rod, flashlight,
fork, frying pan, funnel, garden hose, garlic press, glue gun, hammer, hand saw, hoe, hourglass, ice cream
scoop, iron, juicer, kettle, ladder, ladle, lawn mower, level, magnet, magnifying glass, mallet, measuring
cup, microscope, mortar, nail, needle, nutcracker, oven, paint brush, peeler, pestle, pickaxe, pitchfork,
plane, pliers, plough, plunger, potato masher, pulley, rake, rolling pin, rope, ruler, salad spinner,
sandpaper, scale, scissors, screwdriver, scythe, sewing machine, shovel, sickle, sieve, sledgehammer,
soldering iron, spade, spanner, spatula, sponge, spoon, stapler, stopwatch, tape measure, telescope,
thermometer, thimble, timer, toaster, tongs, trowel, tweezers, vacuum cleaner, vegetable knife, watering can,
wheelbarrow, whisk, wok, workbench, wrench"""
QUESTIONS = [
    "In one sentence, what is a tool called {} used for?",
    "Explain to a child in one sentence what this is: {}.",
]


def main() -> None:
    """``prompts/train.jsonl``, ``valid.jsonl`` and ``test.jsonl``: different tools in each."""
    draw = random.Random(0)
    tools = " ".join(TOOLS.split()).split(", ")
    draw.shuffle(tools)
    folder = Path("prompts")
    folder.mkdir(exist_ok=True)
    parts = {"train": tools[:70], "valid": tools[70:78], "test": tools[78:98]}
    for name, part in parts.items():
        asked = [question.format(tool) for tool in part for question in QUESTIONS]
        draw.shuffle(asked)
        text = "".join(json.dumps({"instruction": ask}) + "\n" for ask in asked)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(asked)} prompts")


if __name__ == "__main__":
    main()
