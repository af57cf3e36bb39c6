"""Loading real folders and files, building models from configurations, and shrinking."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from distillm.errors import ConfigError, ModelError
from distillm.models import (
    best_device,
    fingerprint,
    freeze,
    load_model,
    load_tokenizer,
    num_parameters,
    save_model,
)
from distillm.shrinking import shrink
from tiny import save, tiny_causal, tiny_config, tiny_seq2seq, tiny_tokenizer
from tiny_gguf import write_gguf

CAUSAL = ["llama", "qwen2", "gemma2", "cohere", "granite", "gpt2", "opt", "gpt_neox"]
SEQ2SEQ = ["bart", "marian", "t5"]


def test_generation_settings_that_contradict_each_other_do_not_keep_a_model_from_being_saved(tmp_path: Path) -> None:
    folder = save(tiny_causal(), tiny_tokenizer(), tmp_path / "a")
    (folder / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "bos_token_id": 3}')
    model = load_model(folder, device="cpu")
    model.generation_config.eos_token_id = [5, 6]
    save_model(model, load_tokenizer(folder), tmp_path / "b")
    kept = load_model(tmp_path / "b", device="cpu").generation_config
    assert (kept.bos_token_id, kept.eos_token_id, kept.temperature) == (3, [5, 6], None)


def tiny(kind: str, **changes: Any) -> Any:
    return tiny_seq2seq(kind, **changes) if kind in SEQ2SEQ else tiny_causal(kind, **changes)


def inputs_for(model: Any) -> dict[str, Tensor]:
    ids = torch.randint(2, 300, (3, 9), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, **({"decoder_input_ids": ids.flip(0)} if model.config.is_encoder_decoder else {})}


# ----------------------------------------------------------------------------------------------------------- loading


def test_folder_round_trip(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    save(model, tokenizer, tmp_path)
    ids = torch.arange(12)[None]
    again = load_model(tmp_path, device="cpu")
    assert not again.training
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert load_model(str(tmp_path), dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_encoder_decoder_folder_loads_as_one(tmp_path: Path) -> None:
    model = tiny("bart")
    save(model, None, tmp_path)
    again = load_model(tmp_path, device="cpu")
    inputs = inputs_for(model)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_seed_alone_decides_the_weights_of_a_new_model() -> None:
    state = torch.get_rng_state()
    one, same, other = (load_model(None, config=tiny_config(), device="cpu", seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_new_model_has_no_end_tokens_but_those_given() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = load_model(None, config={"model_type": "llama", **sizes, "vocab_size": 50}, device="cpu")
    assert model.config.eos_token_id is None
    assert model.generation_config.eos_token_id is None
    given = load_model(None, config={"model_type": "llama", **sizes, "vocab_size": 50, "eos_token_id": 7}, device="cpu")
    assert given.generation_config.eos_token_id == 7


@pytest.mark.parametrize("kind", CAUSAL + SEQ2SEQ)
@pytest.mark.parametrize("built", [True, False], ids=["built", "loaded"])
def test_dropout_takes_effect(kind: str, built: bool, tmp_path: Path) -> None:
    if built:
        model: Any = load_model(None, config=tiny_config(kind), dropout=0.5, device="cpu")
    else:
        save(tiny(kind), None, tmp_path)
        model = load_model(tmp_path, dropout=0.5, device="cpu")
    inputs = inputs_for(model)
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    probabilities = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    assert probabilities <= {0.5}


def test_dropout_zero_silences_a_model_that_has_some(tmp_path: Path) -> None:
    save(tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), None, tmp_path)
    ids = torch.arange(12)[None]
    left = load_model(tmp_path, device="cpu").train()
    assert not torch.equal(left(ids).logits, left(ids).logits)
    model = load_model(tmp_path, dropout=0.0, device="cpu").train()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_dropout_for_a_model_without_any_is_an_error() -> None:
    config = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 50, "state_size": 4}
    with pytest.raises(ConfigError, match="mamba model has no dropout"):
        load_model(None, config=config, dropout=0.1, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": None}, "either a path or a config"),
        ({"path": "x", "config": {"model_type": "llama"}}, "and not both"),
        ({"path": None, "config": {"hidden_size": 8}}, '"model_type"'),
        ({"path": None, "config": {"model_type": "lama"}}, "'lama' is unknown"),
        ({"path": None, "config": {"model_type": "llama", "hiden_size": 8}}, "did you mean 'hidden_size'"),
        ({"path": None, "config": {"model_type": "llama", "hidden_size": "big"}}, "hidden_size"),
        ({"path": None, "config": {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 7}}, "multiple"),
        ({"path": None, "config": tiny_config(), "dtype": "float23"}, "must be one of float32"),
        ({"path": None, "config": tiny_config(), "dropout": 1.0}, "below 1"),
        ({"path": None, "config": tiny_config(), "device": "abacus"}, "'abacus' cannot be used"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "there is no folder nowhere"),
        ("a/b/c", "there is no folder a/b/c"),
        ("/nowhere/at/all", "there is no folder /nowhere"),
        ("someone/no-such-model", "the hub cannot be reached"),
        ("/nowhere/model.gguf", "there is no folder /nowhere"),
    ],
)
def test_missing_models_are_one_line(load: Any, path: str, message: str) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(ModelError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_folder_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    save(tiny("llama"), None, tmp_path)
    with pytest.raises(ModelError, match=r"holds no tokenizer: copy tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_tokenizer_without_padding_pads_with_its_end_token(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    save(None, tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id == 1
    assert len(loaded) == len(tokenizer)
    tokenizer.eos_token = None
    save(None, tokenizer, tmp_path)
    with pytest.raises(ModelError, match="neither a padding nor an end token"):
        load_tokenizer(tmp_path)


def test_pickled_weights_are_refused_unless_trusted(tmp_path: Path) -> None:
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled .pytorch_model\.bin.*trust_remote_code"):
        load_model(tmp_path, device="cpu")
    trusted = load_model(tmp_path, device="cpu", trust_remote_code=True)
    assert torch.equal(trusted.lm_head.weight, model.lm_head.weight)


def test_damaged_weights_are_errors(tmp_path: Path) -> None:
    save(tiny("llama"), None, tmp_path)
    file = tmp_path / "model.safetensors"
    weights, whole = load_file(file), file.read_bytes()
    save_file({k: v for k, v in weights.items() if k != "model.norm.weight"}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors .*model\.norm\.weight"):
        load_model(tmp_path, device="cpu")
    save_file({**weights, "model.norm.weight": torch.zeros(3)}, file, {"format": "pt"})
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(tmp_path, device="cpu")
    file.write_bytes(whole[:5000])
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json' is not a valid JSON"):
        load_model(tmp_path, device="cpu")
    with pytest.raises(ModelError, match="is a file: give the folder"):
        load_model(file)


def test_freeze_and_count() -> None:
    model = tiny("qwen2").train()
    assert freeze(model) is model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    tied = tiny("gpt2")
    assert num_parameters(tied) == num_parameters(tied.transformer)
    assert best_device() in ("cuda", "mps", "cpu")


# -------------------------------------------------------------------------------------------------------------- GGUF


def test_gguf_file_loads_trains_and_saves_as_an_ordinary_folder(tmp_path: Path, capfd: Any) -> None:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    file = tmp_path / "tiny.gguf"
    write_gguf(model, tokenizer, file)
    loaded = load_model(file, device="cpu", dropout=0.25)
    words = load_tokenizer(file)
    assert "it/s" not in capfd.readouterr().err
    ids = torch.arange(12)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.config.attention_dropout == 0.25
    assert words("The fox reads.")["input_ids"] == tokenizer("The fox reads.")["input_ids"]
    assert (words.pad_token_id, words.eos_token_id) == (0, 1)

    loaded(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())
    save(loaded, words, tmp_path / "folder")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert torch.equal(again(ids).logits, loaded(ids).logits)
    assert torch.equal(load_model(tmp_path, gguf_file="tiny.gguf", device="cpu").lm_head.weight, loaded.lm_head.weight)


def test_bad_gguf_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_text("hello")
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match="not a GGUF file"):
            load(tmp_path / "x.gguf")
        with pytest.raises(ModelError, match=r"there is no file .*y\.gguf"):
            load(tmp_path, gguf_file="y.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModelError, match=r"pip install 'distillm\[gguf\]'"):
        load_model(tmp_path / "x.gguf")


# --------------------------------------------------------------------------------------------------------- shrinking


@pytest.mark.parametrize("kind", CAUSAL)
def test_all_layers_kept_is_the_teacher(kind: str) -> None:
    teacher = freeze(tiny(kind, layers=3))
    student = shrink(teacher, 3)
    inputs = inputs_for(teacher)
    assert torch.equal(student(**inputs).logits, teacher(**inputs).logits)
    assert all(p.requires_grad for p in student.parameters())
    pointers = {p.data_ptr() for p in teacher.parameters()}
    assert not any(p.data_ptr() in pointers for p in student.parameters())


@pytest.mark.parametrize("kind", CAUSAL)
def test_shrunk_student_is_an_ordinary_folder_with_the_layers_asked_for(kind: str, tmp_path: Path) -> None:
    teacher = tiny(kind, layers=5)
    teacher.generation_config.max_new_tokens = 17
    student = shrink(teacher, [1, 2, 4])
    assert student.config.num_hidden_layers == 3
    assert student.generation_config.max_new_tokens == 17
    save(student, None, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(2, 300, (2, 9))
    assert torch.equal(again(ids).logits, student(ids).logits)
    theirs, ours = layers_of(teacher), layers_of(student)
    for new, old in enumerate([1, 2, 4]):
        for a, b in zip(theirs[old].state_dict().values(), ours[new].state_dict().values(), strict=True):
            assert torch.equal(a, b)
    indices = [m.layer_idx for m in ours.modules() if getattr(m, "layer_idx", None) is not None]
    assert set(indices) <= {0, 1, 2}
    # The cache finds every layer's own place: one token at a time gives what all at once does.
    prompt, last = ids[:, :-1], ids[:, -1:]
    past = student(prompt, use_cache=True).past_key_values
    torch.testing.assert_close(student(last, past_key_values=past).logits, student(ids).logits[:, -1:])


def layers_of(model: Any) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def test_lists_by_layer_follow_the_layers() -> None:
    teacher = tiny("gemma2", layers=4)
    types = list(teacher.config.layer_types)
    assert len(set(types)) == 2
    assert shrink(teacher, [1, 3]).config.layer_types == [types[1], types[3]]
    assert teacher.config.layer_types == types


@pytest.mark.parametrize(
    ("number", "of", "kept"),
    [(1, 5, [0]), (2, 5, [0, 4]), (3, 5, [0, 2, 4]), (4, 5, [0, 1, 3, 4]), (5, 5, [0, 1, 2, 3, 4])],
)
def test_a_number_of_layers_is_spread_evenly(number: int, of: int, kept: list[int]) -> None:
    teacher = tiny("llama", layers=of)
    student = shrink(teacher, number)
    expected = shrink(teacher, kept)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("layers", [0, 3, -1, [], [2], [-1], [1, 0], [0, 0]])
def test_layers_that_do_not_exist_are_errors(layers: int | list[int]) -> None:
    with pytest.raises(ModelError, match=r"give 1 to 2|from 0 to 1"):
        shrink(tiny("llama"), layers)


def test_models_that_cannot_be_shrunk_say_so() -> None:
    with pytest.raises(ModelError, match="leave decoder_layers out"):
        shrink(tiny("llama"), 1, decoder_layers=1)
    teacher = copy.deepcopy(tiny("llama"))
    teacher.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="no list of 7 layers"):
        shrink(teacher, 2)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_an_encoder_decoder_is_shrunk_in_both_stacks(kind: str, tmp_path: Path) -> None:
    teacher = tiny(kind, layers=4)
    student = shrink(teacher, 3, decoder_layers=[0, 2])
    for part, kept in (("encoder", [0, 2, 3]), ("decoder", [0, 2])):
        stacks = [
            next(m for m in getattr(each, f"get_{part}")().modules() if isinstance(m, torch.nn.ModuleList))
            for each in (teacher, student)
        ]
        assert len(stacks[1]) == len(kept)
        for new, old in enumerate(kept):
            wanted = stacks[0][old].state_dict()
            for name, tensor in stacks[1][new].state_dict().items():
                assert torch.equal(tensor, wanted[name])
    save(student, None, tmp_path)
    again = dict(load_model(tmp_path, device="cpu").named_parameters())
    # Marian's positions are sinusoids that are not saved; this tiny model's are noise.
    assert all(torch.equal(again[n], p) for n, p in student.named_parameters() if "embed_positions" not in n)
    assert student.num_parameters() < teacher.num_parameters()


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_all_layers_of_an_encoder_decoder_are_the_teacher_itself(kind: str) -> None:
    teacher = tiny(kind, layers=2)
    ids = torch.arange(2, 8)[None]
    with torch.no_grad():
        one, other = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (teacher, shrink(teacher, 2)))
    assert torch.equal(one, other)


def test_a_fingerprint_tells_weights_apart_whatever_their_size():
    large = torch.nn.Module()
    large.register_buffer("table", torch.zeros(28_311_552, dtype=torch.int8))  # places that float32 rounds up
    first = fingerprint(large)
    large.get_buffer("table")[-1] = 1
    assert fingerprint(large) != first
    assert fingerprint(tiny_causal(seed=1)) == fingerprint(tiny_causal(seed=1))
    assert fingerprint(tiny_causal(seed=1)) != fingerprint(tiny_causal(seed=2))


def test_a_mistyped_path_is_not_sought_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="there is no folder runs/nope"):
        load_model("runs/nope", device="cpu")
