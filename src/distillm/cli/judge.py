"""``distillm judge``: the options, what is written, and the table. The work is in ``judge/``."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..display import Terminal
from ..errors import ConfigError, ServerError, first_of

FIXED = ("model", "messages", "stream", "n")
"""Fields of a request that ``--body`` must leave alone."""
DECISIVE = ("judge", "prompt", "temperature", "max_tokens", "body")
"""Settings that every reply depends on."""

Source = Annotated[Path, typer.Argument(metavar="EVAL_JSON", help="Answers: eval/NAME.json of a run, or of its form.")]
ServerUrl = Annotated[str, typer.Option("--server", help="Chat completions, such as http://127.0.0.1:8000/v1.")]
Model = Annotated[str, typer.Option(help="The judge's name on that server.")]
Against = Annotated[Path | None, typer.Option(help="Another such file: compare the two, pair by pair.")]
SeedIndex = Annotated[int | None, typer.Option(min=0, help="Only the answers of this decoding seed, from 0.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first rows.")]
Prompt = Annotated[Path | None, typer.Option(help="Your own question to the judge, a Jinja template (docs/judge.md).")]
Temperature = Annotated[float, typer.Option(min=0, help="The judge's.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest reply of the judge.")]
Body = Annotated[str | None, typer.Option(metavar="JSON", help="More fields of each request; null leaves one out.")]
Jobs = Annotated[int, typer.Option(min=1, help="Questions at a time.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds to wait for one reply.")]
Attempts = Annotated[int, typer.Option(min=1, help="Requests for one reply until the question counts as failed.")]
Backoff = Annotated[float, typer.Option(min=0, help="Seconds before the second of them; doubled each time.")]
Tries = Annotated[int, typer.Option(min=1, help="Replies asked for until one has a readable verdict.")]
MaxFailed = Annotated[float, typer.Option(min=0, max=100, help="Percent that may fail before the exit code is 5.")]
KeyEnv = Annotated[str, typer.Option(help="Environment variable with the server's key, if it wants one.")]
Price = Annotated[float | None, typer.Option(min=0, help="Money per million tokens.")]
CacheFile = Annotated[Path | None, typer.Option("--cache", help="Kept replies; beside the output unless given.")]
Output = Annotated[Path | None, typer.Option(help="Judgments and scores, as JSON; RUN/judge/NAME.json unless given.")]


def judge(
    source: Source,
    server: ServerUrl,
    model: Model,
    against: Against = None,
    seed_index: SeedIndex = None,
    limit: Limit = None,
    prompt: Prompt = None,
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = 512,
    body: Body = None,
    jobs: Jobs = 4,
    timeout: Timeout = 120.0,
    attempts: Attempts = 6,
    backoff: Backoff = 1.0,
    tries: Tries = 3,
    max_failed: MaxFailed = 5.0,
    key_env: KeyEnv = "OPENAI_API_KEY",
    price_in: Price = None,
    price_out: Price = None,
    cache: CacheFile = None,
    output: Output = None,
) -> None:
    """Let a language model grade answers from 1 to 10, or compare those of two systems.

    \b
    distillm judge runs/first/eval/dolly-student.json --server http://127.0.0.1:8000/v1 --model NAME
    distillm judge A.json --against B.json --server https://api.openai.com/v1 --model NAME

    The score is 100 * sum(grades of the answers) / sum(grades of the references). Pairs are asked in both orders.
    What was answered is kept: after an interruption the same command goes on, and nothing is paid for twice.
    """
    from ..client import Server, bearer_key, require_httpx
    from ..judge.chat import chat_completions
    from ..judge.prompts import load_template
    from ..judge.scoring import Judge

    require_httpx("distillm judge", "judge")
    chat_completions(server)
    kind = "single" if against is None else "pair"
    asked = _Asked(
        source,
        against,
        seed_index,
        limit,
        Server(server, bearer_key(key_env), jobs, timeout, attempts, backoff),
        Judge(model, load_template(kind, prompt), temperature, max_tokens, _extra(body), tries),
        (price_in, price_out),
    )
    target = output or _default_output(source, against)
    if output is None:
        _check_replaced(target, asked.settings())
    found, left_out = _run(asked, target, cache or target.with_suffix(".cache.jsonl"))
    _show(found, target)
    total = found["failed"]["total"]
    if left_out > total * max_failed / 100:
        raise ServerError(
            f"{left_out} of {total} {'answers' if kind == 'single' else 'pairs'} could not be judged, more than "
            f"--max-failed {max_failed:g} percent: {first_of(_failed_names(found['failed']['rows']), 8)}\n"
            f"the reasons are in {target}; the same command asks again those that had no answer"
        )


@dataclass(frozen=True)
class _Asked:
    """The options, checked. ``prices`` are per million tokens that go in and come out."""

    source: Path
    against: Path | None
    seed_index: int | None
    limit: int | None
    server: Any
    judge: Any
    prices: tuple[float | None, float | None]

    def settings(self) -> dict[str, Any]:
        """All that the result depends on, as it is written; the key is no part of it."""
        judge = self.judge
        return {
            "judge": judge.model,
            "prompt": {"name": judge.template.name, "sha256": judge.template.sha256},
            "temperature": judge.temperature,
            "max_tokens": judge.max_tokens,
            "body": dict(judge.extra),
            "tries": judge.tries,
            "seed_index": self.seed_index,
            "limit": self.limit,
        }


def _run(asked: _Asked, target: Path, cached: Path) -> tuple[dict[str, Any], int]:
    """Judge, write ``target``, and return what was written and how many are in no score."""
    from ..display import Display
    from ..judge.asking import ask
    from ..judge.cache import Cache
    from ..judge.chat import Usage
    from ..judge.scoring import read_answers, score_pairs, score_single, seeds_chosen
    from ..writing import make_folder_of, write_text

    answers = read_answers(asked.source, asked.limit)
    against = None if asked.against is None else read_answers(asked.against, asked.limit)
    places = seeds_chosen(answers, against, asked.seed_index)
    make_folder_of(target)
    display, usage = Display(), Usage()
    if asked.server.exposed:
        display.note(f"the key goes to {asked.server.url} without encryption")
    with Cache(cached, display.note) as cache:

        def answer(questions: Any) -> Any:
            return ask(asked.server, cache, questions, usage, display)

        if against is None:
            scored = score_single(answers, asked.judge, answer, places)
        else:
            scored = score_pairs(answers, against, asked.judge, answer, places)
    files = [(asked.source, answers), *([] if against is None else [(asked.against, against)])]
    found = {
        "kind": asked.judge.template.kind,
        "answers": [
            {"file": str(path), "data": each.data, "system": each.system, "model": each.model, "seeds": each.seeds}
            for path, each in files
        ],
        "settings": asked.settings(),
        "server": asked.server.url,
        "num_rows": len(answers.predictions),
        "scores": scored.scores,
        "failed": {"left_out": scored.left_out, "total": scored.total, "rows": scored.failed},
        "usage": asdict(usage) | _cost(usage, asked.prices),
        "rows": scored.rows,
    }
    write_text(target, json.dumps(found, ensure_ascii=False, indent=1))
    return found, scored.left_out


def _cost(usage: Any, prices: tuple[float | None, float | None]) -> dict[str, float]:
    """What this run cost and what it would have without the cache, where prices are given."""
    if prices == (None, None):
        return {}
    into, out = (price or 0.0 for price in prices)
    cost = (into * usage.prompt_tokens + out * usage.completion_tokens) / 1e6
    saved = (into * usage.cached_prompt_tokens + out * usage.cached_completion_tokens) / 1e6
    return {"cost": cost, "cached_cost": saved}


def _extra(body: str | None) -> dict[str, Any]:
    try:
        found = json.loads(body or "{}")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--body: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError("--body: write an object, such as '{\"top_p\": 0.9}'")
    fixed = [name for name in FIXED if name in found]
    if fixed:
        raise ConfigError(f"--body: {', '.join(fixed)} cannot be set there")
    from ..client import secrets_in

    if secret := secrets_in("", found):
        raise ConfigError(f"--{secret} would be written down; name an environment variable by --key-env")
    return found


def _default_output(source: Path, against: Path | None) -> Path:
    """Beside the source, but in RUN/judge for RUN/eval, all files of which are taken for scores of that run."""
    name = source.stem
    if against is not None:
        other = against.resolve().parent
        other = other.parent if other.name == "eval" else other
        name += f"-against-{other.name}-{against.stem}"
    if source.resolve().parent.name == "eval":
        return source.parent.parent / "judge" / f"{name}.json"
    return source.with_name(f"{name}.judge.json")


def _check_replaced(target: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to replace what was judged in another way, unless the user names the file.

    Other rows, seeds or numbers of tries of the same judging are in the cache, so nothing is lost with them.
    """
    if not target.exists():
        return
    try:
        there = json.loads(target.read_bytes())["settings"]
        same = all(there[name] == settings[name] for name in DECISIVE)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ConfigError(
            f"{target} holds something made with other settings; give --output FILE (the same one to replace it)"
        )


def _failed_names(rows: list[dict[str, Any]]) -> list[str]:
    def part(row: Mapping[str, Any]) -> str:
        order = f" order {row['order']}" if "order" in row else ""
        return "reference" if row["seed"] is None else f"seed {row['seed']}{order}"

    return [f"{row['id']} ({part(row)})" for row in rows]


def _show(found: Mapping[str, Any], target: Path) -> None:
    console = Terminal(soft_wrap=True)
    seeds = found["answers"][0]["seeds"]
    count = 1 if found["settings"]["seed_index"] is not None else len(seeds)
    table = Table(
        "Score", "Mean", "± std", title=f"{found['num_rows']} rows, {count} seed(s), by {found['settings']['judge']}"
    )
    for name, score in found["scores"].items():
        if "mean" in score:
            table.add_row(name, *("-" if score[part] is None else f"{score[part]:.2f}" for part in ("mean", "std")))
    console.print(table)
    if found["kind"] == "pair":
        _show_pairs(found, console)
    failed, usage = found["failed"], found["usage"]
    if failed["rows"]:
        console.print(
            f"in no score: {failed['left_out']} of {failed['total']}; failed: "
            f"{first_of(_failed_names(failed['rows']), 8)}"
        )
    console.print(
        f"{usage['calls']} calls, {usage['cached']} from the cache, {usage['retries']} repeated; "
        f"{usage['prompt_tokens']} tokens in, {usage['completion_tokens']} out"
        + (f" (without those of {usage['unknown']} replies, not given by the server)" if usage["unknown"] else "")
        + (f"; cost {usage['cost']:.4f}, saved by the cache {usage['cached_cost']:.4f}" if "cost" in usage else "")
    )
    console.print(f"judgments and scores: {target}")


def _show_pairs(found: Mapping[str, Any], console: Terminal) -> None:
    scores = found["scores"]
    pairs, preferred, interval = scores["pairs"], scores["preferred"], scores["win_rate"]["interval"]
    console.print(
        f"wins {pairs['win']}, losses {pairs['loss']}, ties {pairs['tie']} (the orders disagree in "
        f"{pairs['disagreeing']}, the answers are equal in {pairs['equal']})"
        + ("" if interval is None else f"; 95 % interval of the win rate {interval[0]:.1f} to {interval[1]:.1f}")
    )
    console.print(f"the answer shown first was preferred {preferred['A']} times, the second {preferred['B']} times")
