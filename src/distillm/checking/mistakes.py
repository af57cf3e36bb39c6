"""The usual mistakes: each is looked for in what the run reads and says, not guessed from its settings."""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from ..assess import measure, teacher_cross_entropy
from ..caching import size
from ..config import Run
from ..data import LengthReport, eights, roomy
from ..data_settings import Data
from ..errors import DistillmError
from ..generation import truncated
from ..paths import is_file
from ..readers import LocalTeacher
from ..rows import end_of_response, placed, tokenised
from ..tasks import CHAT
from ..types import Example, last_turn
from ..vocabulary import behind_response
from .cost import Cost
from .subject import Subject

MANY = 0.1
"""The share of rows from which on a mistake would waste a run."""
BETTER, MUCH_BETTER = 0.05, 0.25
"""How much better a template must be to be advised, in shares of the cross-entropy; in place of the model's own for
chats, which it was most likely trained with, much better."""
NOISE = 0.9
"""A cross-entropy of so many times that of a uniform guess is that of a model that knows nothing."""
SAME = 1e-4
"""Nats a token below which two models say the same."""
UNKNOWN = 2.0
"""Nats a token above which a teacher has hardly been trained on such responses: one that has been is mostly below 1."""
FEW_STEPS = 30


@dataclass(frozen=True)
class Finding:
    """What is wrong, by a short name, in one sentence; what to do about it. ``grave``: the run would be wasted."""

    name: str
    text: str
    advice: str
    grave: bool = True


def of_settings(run: Run) -> Iterator[Finding]:
    """What is wrong before anything is read."""
    output = Path(run.output)
    if is_file(output / "run.yaml") and run.resume == "never" and not run.overwrite:
        yield Finding(
            "output", f"{output} already holds a run, and this one would not begin.",
            "output=ANOTHER, resume=auto to go on with it, or overwrite=true to delete it.",
        )  # fmt: skip
    if not run.data.test and run.data.test_size is None:
        yield Finding(
            "test", "No test rows: nothing will be scored at the end.",
            "data.test: {NAME: FILE}, or data.test_size=50 to hold rows out.", grave=False,
        )  # fmt: skip


def of_data(subject: Subject) -> Iterator[Finding]:
    """What is wrong with the rows."""
    run, rows = subject.run, subject.rows
    if subject.steps < FEW_STEPS:
        yield Finding(
            "steps", f"The run has {subject.steps} steps, which is hardly enough to learn anything.",
            "Raise train.epochs or train.steps, or lower train.batch_size.", grave=False,
        )  # fmt: skip
    if rows.train.lengths is not None:
        yield from _cut(subject, rows.train.lengths)
    yield from _ends(subject)
    yield from _too_long_to_write(subject)
    yield from _known_tests(subject)
    texts = [tuple(e.tokens) for e in rows.train.examples]
    repeated = 1 - len(set(texts)) / len(texts)
    if repeated > MANY:
        yield Finding(
            "repeated", f"{repeated:.0%} of the training rows are there more than once.",
            "Leave the repetitions out, unless they are meant as weights.", grave=False,
        )  # fmt: skip
    if run.data.prompt != CHAT and _has_chat_template(subject) and subject.asked:
        yield Finding(
            "template", f"The model has a chat template, and prompts are written by '{run.data.prompt}'.",
            "data.template=chat, if it was trained on chats.", grave=False,
        )  # fmt: skip


def of_models(subject: Subject) -> Iterator[Finding]:
    """What is wrong with the models, on rows that both have read."""
    run, models = subject.run, subject.models
    if not any(any(e.targets) for e in subject.validation):
        return
    student = measure(run, models, subject.validation)
    uniform = math.log(models.pair.num_tokens)
    noise = student["cross_entropy"] > NOISE * uniform
    method = run.method.model_dump()
    skewed = str(method.get("divergence", run.method.name)) in ("skew_kl", "skew_reverse_kl", "distillm2")
    alpha = 0.1 if method.get("alpha") is None else method["alpha"]
    if noise and skewed and alpha and run.student.path is None:
        yield Finding(
            "start", f"The student begins as noise ({student['cross_entropy']:.1f} nats a token), where a skewed "
            f"divergence is nearly flat: it cannot exceed {-math.log(alpha):.1f}.",
            "Fine-tune it first: method.name=sft for a few hundred steps, then student.path=THAT_RUN/student.",
            grave=False,
        )  # fmt: skip
    yield from _same_models(subject, student)
    yield from _template(subject)
    if isinstance(models.pair.teacher, LocalTeacher) and subject.method.reads_teacher:
        yield from _teacher(subject, student["cross_entropy"])


def _teacher(subject: Subject, student: float) -> Iterator[Finding]:
    run, teacher = subject.run, _cross_entropy(subject, subject.validation)
    path = (run.teacher.path if run.teacher is not None else None) or "TEACHER"
    learned = f"{run.output}-teacher"
    advice = (
        f"Let it learn them first: distillm train ... teacher=null student.path={path} method.name=sft optim.lr=1e-4 "
        f"output={learned}; then teacher.path={learned}/student."
    )
    if teacher >= student:
        yield Finding(
            "teacher", f"The teacher predicts the responses worse than the student does: {teacher:.2f} against "
            f"{student:.2f} nats a token. It has little to teach here.", advice,
        )  # fmt: skip
    elif teacher > UNKNOWN and not subject.asked:
        yield Finding(
            "teacher", f"The teacher does not know these responses well: {teacher:.2f} nats a token. A student that "
            "has been fine-tuned on them would have to unlearn them.", advice, grave=False,
        )  # fmt: skip


def of_cost(subject: Subject, cost: Cost) -> Iterator[Finding]:
    """What there is no room for."""
    run = subject.run
    if not cost.fits:
        smaller = "train.micro_batch_size=1" if run.train.micro_batch_size > 1 else "train.gradient_checkpointing=true"
        yield Finding(
            "memory", f"It needs about {size(cost.memory)}, and {size(cost.free_memory)} are free.",
            f"{smaller} (the result stays the same), student.lora={{}}, or a shorter data.max_length.",
        )  # fmt: skip
    if cost.disk > cost.free_disk:
        yield Finding(
            "disk", f"It needs about {size(cost.disk)} of disk for checkpoints and the student, and "
            f"{size(cost.free_disk)} are free.",
            "Another output=..., checkpoint.keep=1, or teacher.cache=off.",
        )  # fmt: skip


def _cut(subject: Subject, lengths: LengthReport) -> Iterator[Finding]:
    data = subject.run.data
    left_out = lengths.dropped + lengths.empty_responses
    cut = {
        "with a cut prompt": lengths.cut_prompts + lengths.shortened,
        "with a response cut short, which has no end to learn": lengths.cut_responses,
    }
    advice = "Look at these rows."
    if lengths.dropped:
        advice = f"data.max_prompt is {data.max_prompt}: raise it, or take a shorter template."
    advised = [("left out", left_out, advice)]
    if any(cut.values()):
        prompt, whole = _fitting(subject)
        advice = f"data.max_prompt={prompt} data.max_length={whole} would leave 98 of 100 rows whole."
        advised = [*((what, count, advice) for what, count in cut.items()), *advised]
    for what, count, advice in advised:
        if count:
            said = f"{count} of {lengths.rows} training rows are {what}."
            yield Finding("cut", said, advice, grave=count > MANY * lengths.rows)


def _fitting(subject: Subject) -> tuple[int, int]:
    """max_prompt and max_length that all but 2 of 100 training rows fit in."""
    data = subject.run.data
    source = placed(data, data.train, "train")
    rows = subject.read[source][: data.limit]
    examples = tokenised(_endless(data), source, rows, subject.models, lambda _: None).examples
    prompt = max(roomy([last_turn(e).start for e in examples]), eights(data.max_prompt))
    return prompt, max(roomy([len(e.tokens) for e in examples]), data.max_length, prompt + 8)


def _ends(subject: Subject) -> Iterator[Finding]:
    """Whether a response ends, once, and by a token at which models stop."""
    run, models = subject.run, subject.models
    whole = [e for e in subject.rows.train.examples if any(e.targets)]
    answered = whole or subject.train  # a few, which tell less
    ends = models.end_ids
    twice = sum(any(token in ends for token in last_turn(e).response[:-1]) for e in answered)
    end = models.tokenizer.convert_ids_to_tokens(end_of_response(run.data, models))
    if twice > MANY * len(answered):
        yield Finding(
            "end", f"{twice} of {len(answered)} responses hold an end token before their end.",
            f"Leave {end!r} out of the data's texts: it is put behind each response.",
        )  # fmt: skip
    lengths = subject.rows.train.lengths
    known = 0 if lengths is None else lengths.cut_responses
    endless = sum(truncated(last_turn(e), ends) for e in answered) - known
    if endless > MANY * len(answered):
        yield Finding(
            "end", f"{endless} of {len(answered)} responses do not end with an end token: the student would not learn "
            "to stop.",
            "Raise generation.max_new_tokens, where the teacher writes them; else look at the tokenizer's end token.",
            grave=bool(whole) or endless > len(answered) / 2,
        )  # fmt: skip
    if run.data.prompt == CHAT and (closing := _closing(subject)):
        yield Finding(
            "end", f"The chat template ends a turn by {closing!r}, at which neither model stops.",
            "Put that token into eos_token_id of the models' generation_config.json.",
        )  # fmt: skip


def _closing(subject: Subject) -> str | None:
    """What the chat template writes behind a response, if it is no end token of the models."""
    tokenizer = subject.models.tokenizer
    after = behind_response(tokenizer).strip()
    ids: list[int] = cast(Any, tokenizer)(after, add_special_tokens=False)["input_ids"]
    return after if after and not set(ids) & set(subject.models.end_ids) else None


def _too_long_to_write(subject: Subject) -> Iterator[Finding]:
    most = subject.run.generation.max_new_tokens
    lengths = [sum(last_turn(e).targets) for e in subject.rows.train.examples if any(e.targets)]
    longer = sum(length > most for length in lengths)
    if longer > MANY * max(len(lengths), 1):
        needed = eights(sorted(lengths)[math.ceil(0.95 * len(lengths)) - 1])
        yield Finding(
            "length", f"{longer} of {len(lengths)} responses of the data are longer than generation.max_new_tokens="
            f"{most}: what models write will be cut, and scored so.",
            f"generation.max_new_tokens={needed}", grave=longer > len(lengths) / 2,
        )  # fmt: skip


def _known_tests(subject: Subject) -> Iterator[Finding]:
    seen = {tuple(last_turn(e).prompt) for e in subject.rows.train.examples}
    sets = {f"test set {name}": rows for name, rows in subject.rows.tests.items()}
    for name, rows in {**sets, "validation": subject.rows.validation}.items():
        known = sum(tuple(last_turn(e).prompt) in seen for e in rows.examples)
        if known:
            share = known / len(rows.examples)
            yield Finding(
                "leak", f"{known} of the {len(rows.examples)} prompts of the {name} are among the training rows.",
                "Take them out of one of the two: scores on them say little.", grave=share > MANY,
            )  # fmt: skip


def _same_models(subject: Subject, student: dict[str, float]) -> Iterator[Finding]:
    privileged = any(e.teacher_context is not None for e in subject.validation)
    if student.get("divergence", 1.0) < SAME and not privileged and subject.run.method.name not in ("sft", "seqkd"):
        yield Finding(
            "same", "Teacher and student say the same of every token: there is nothing to learn.",
            "Give another teacher or student; self-distillation needs data.teacher_system or data.teacher_template.",
        )  # fmt: skip


def _has_chat_template(subject: Subject) -> bool:
    return subject.models.tokenizer.chat_template is not None


def _template(subject: Subject) -> Iterator[Finding]:
    """Whether the responses are more likely to a model that knows something when prompts are written otherwise."""
    run, data, spec = subject.run, subject.run.data, subject.run.data.spec
    knows = subject.models.teacher is not None or run.student.path is not None
    if (
        subject.asked
        or not knows
        or spec.conversation is not None
        or data.teacher_template
        or data.teacher_system
        or data.system
    ):
        return
    others = [name for name in spec.templates if name != data.prompt]
    others += [CHAT] if _has_chat_template(subject) and data.prompt != CHAT else []
    spelled = {data.prompt: _spelled(subject, data)}
    for name in others:
        with suppress(DistillmError):  # such as a chat template that does not work, which the run does not use
            spelled[name] = _spelled(subject, data.model_copy(update={"template": name}))
    common = set.intersection(*({e.id for e in rows} for rows in spelled.values()))
    if not common:
        return
    found = {n: _cross_entropy(subject, [e for e in rows if e.id in common]) for n, rows in spelled.items()}
    used, best = found[data.prompt], min(found, key=lambda name: found[name])
    if found[best] < (1 - (MUCH_BETTER if data.prompt == CHAT else BETTER)) * used:
        reader = "teacher" if subject.models.teacher is not None else "student"
        yield Finding(
            "template", f"To the {reader} the responses are likelier when prompts are written by '{best}': "
            f"{found[best]:.2f} against {used:.2f} nats a token.",
            f"data.template={best}",
        )  # fmt: skip


def _spelled(subject: Subject, data: Data) -> list[Example]:
    """The sampled rows, without the ends of their responses, behind whole prompts as ``data`` writes them; those that
    the models can read."""
    source = placed(data, data.validation or data.train, "validation" if data.validation else "train")
    rows = subject.read[source]
    sampled = [rows[int(example.id.rsplit(":", 1)[1])] for example in subject.validation]
    made = tokenised(_endless(data), source, sampled, subject.models, lambda _: None).examples
    prompts = {int(example.id.rsplit(":", 1)[1]): last_turn(example).prompt for example in made}
    models = (subject.models.student, subject.models.teacher)
    rooms = [getattr(model.config, "max_position_embeddings", None) for model in models if model is not None]
    room = min((room for room in rooms if isinstance(room, int)), default=10**6)
    respelled: list[Example] = []
    for i, example in enumerate(subject.validation):
        prompt, response = prompts.get(i, []), last_turn(example).response
        response = response[:-1] or response  # how a response ends depends on the template
        if prompt and len(prompt) + len(response) <= room:
            marks = [False] * len(prompt) + [True] * len(response)
            respelled.append(replace(example, tokens=prompt + response, targets=marks, teacher_context=None))
    return respelled


def _endless(data: Data) -> Data:
    """``data`` without limits of length."""
    return data.model_copy(update={"max_prompt": 10**6, "max_length": 2 * 10**6})


def _cross_entropy(subject: Subject, examples: Sequence[Example]) -> float:
    """Of the teacher, where it is here, else of the student: nats a token."""
    run, models = subject.run, subject.models
    found = teacher_cross_entropy(run, models, examples)
    if found is not None:
        return found
    alone = replace(models, pair=replace(models.pair, teacher=None, cache=None))  # one that is not here reads no more
    return measure(run, alone, examples)["cross_entropy"]
