"""What a head reader returns must equal the model's own logits, whatever the architecture does to them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM

from distillm.errors import ModelError
from distillm.heads import head_of, packing
from distillm.models import load_model
from distillm.types import IGNORE, Batch, Head
from tiny import tiny_causal, tiny_seq2seq

CAUSAL = ["llama", "qwen2", "gemma2", "cohere", "granite", "gpt2", "opt", "gpt_neox"]
SEQ2SEQ = ["bart", "marian", "t5"]


def tiny(kind: str, **changes: Any) -> Any:
    return tiny_seq2seq(kind, **changes) if kind in SEQ2SEQ else tiny_causal(kind, **changes)


def batch_for(model: Any) -> Batch:
    """Three rows of 9, 6 and 4 tokens, padded on the right, with targets that start late."""
    ids = torch.randint(2, 300, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(9) < torch.tensor([[9], [6], [4]])).long()
    ids = ids * mask
    labels = torch.where((mask == 1) & (torch.arange(9) >= torch.tensor([[3], [2], [1]])), ids, IGNORE)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids.flip(0), "decoder_attention_mask": mask.flip(0)}
        labels = labels.flip(0)
    return Batch(inputs, labels)


def logits_of(head: Head) -> Tensor:
    if head.weight is None:
        return head.hidden
    z = head.scale * F.linear(head.hidden, head.weight, head.bias)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


@pytest.mark.parametrize("kind", CAUSAL + SEQ2SEQ)
def test_head_reproduces_the_models_own_logits_and_gradients(kind: str) -> None:
    model = tiny(kind)
    batch = batch_for(model)
    reader = head_of(model)
    assert reader.fused
    weights = torch.randn(int((batch.labels != IGNORE).sum()), 300, generator=torch.Generator().manual_seed(1))

    own = model(**batch.inputs).logits[batch.labels != IGNORE]
    (own * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fused = logits_of(reader(model, batch))
    (fused * weights).sum().backward()

    torch.testing.assert_close(fused, own)
    assert expected.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], atol=1e-5, rtol=1e-4)


def test_every_special_term_of_a_head_is_in_use() -> None:
    assert head_of(tiny("gemma2")).softcap == 0.5
    assert head_of(tiny("cohere")).scale == 0.0625
    assert head_of(tiny("granite")).scale == 1 / 8
    for kind in ("bart", "marian"):
        model = tiny(kind)
        reader = head_of(model)
        bias = reader(model, batch_for(model)).bias
        assert bias is not None
        assert bias.abs().min() > 0
        before = bias.clone()
        model.final_logits_bias = nn.Buffer(before[None] + 1)  # as `.to(device)` replaces it
        torch.testing.assert_close(reader(model, batch_for(model)).bias, before + 1)


def test_one_name_that_multiplies_in_one_model_and_divides_in_another() -> None:
    settings = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = {"model_type": "hyperclovax", **settings, "num_hidden_layers": 1, "vocab_size": 90, "logits_scaling": 4.0}
    assert head_of(load_model(None, config=config, device="cpu")).scale == 4.0


def test_linear_output_bias_is_part_of_the_head() -> None:
    model = tiny("llama")
    model.lm_head.bias = nn.Parameter(torch.randn(300))
    batch = batch_for(model)
    torch.testing.assert_close(
        logits_of(head_of(model)(model, batch)), model(**batch.inputs).logits[batch.labels != IGNORE]
    )


def test_padding_on_the_right_changes_no_row() -> None:
    for kind in ("gpt2", "opt", "llama"):
        model = tiny(kind)
        batch = batch_for(model)
        rows = head_of(model)(model, batch).hidden.split([int(n) for n in (batch.labels != IGNORE).sum(-1)])
        for i, length in enumerate((9, 6, 4)):
            alone = Batch(
                {"input_ids": batch.inputs["input_ids"][i : i + 1, :length]}, batch.labels[i : i + 1, :length]
            )
            torch.testing.assert_close(head_of(model)(model, alone).hidden, rows[i])


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_fused_reading_forms_logits_for_one_position_only(kind: str) -> None:
    model = tiny(kind)
    reader, batch, shapes = head_of(model), batch_for(model), []
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape)))
    reader(model, batch)
    assert shapes == [(3, 1, 300)]
    assert model(**batch.inputs).logits.shape == (3, 9, 300)  # and the hook is gone again


class Cubed(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + out.logits**3
        return out


class Capped(LlamaForCausalLM):
    """A cap the configuration does not know of, too wide to show on small logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = 300 * torch.tanh(out.logits / 300)
        return out


class Adapted(nn.Linear):
    """An output layer that does more than its weight says, though not yet: an adapter that starts at zero."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) + 0.0


def strange(kind: str) -> Any:
    model = tiny("llama")
    if kind == "adapted":
        head = Adapted(32, 300, bias=False)
        head.weight = model.lm_head.weight
        model.lm_head = head
    else:
        model.__class__ = {"cubed": Cubed, "capped": Capped}[kind]
    return model


@pytest.mark.parametrize("kind", ["cubed", "capped", "adapted"])
def test_strange_head_falls_back_to_its_own_logits_and_says_so(kind: str) -> None:
    model = strange(kind)
    batch = batch_for(model)
    with pytest.warns(UserWarning, match="formed in full"):
        reader = head_of(model)
    assert not reader.fused
    head = reader(model, batch)
    assert head.weight is None
    torch.testing.assert_close(head.hidden, model(**batch.inputs).logits[batch.labels != IGNORE])
    head.hidden.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_check_leaves_modes_and_generators_alone() -> None:
    model = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    head_of(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_reader_refuses_another_model() -> None:
    one, other = tiny("llama"), tiny("llama", seed=1)
    with pytest.raises(ModelError, match="another model"):
        head_of(one)(other, batch_for(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "bart"])
def test_check_passes_in_every_precision(kind: str, dtype: torch.dtype) -> None:
    model = tiny(kind).to(dtype)
    assert head_of(model).fused


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [kind for kind in CAUSAL if kind != "opt"])
def test_packed_rows_are_read_as_apart(kind: str, attention: str) -> None:
    if (kind, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no such attention for it")
    model = tiny(kind, attn_implementation=attention).double()
    batch, apart = batch_for(model), head_of(model)
    packed = packing(apart)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    weights = torch.randn(apart(model, batch).hidden.shape, generator=torch.Generator().manual_seed(1))
    for reader in (apart, packed):
        widths: list[Any] = []
        hook = model.get_input_embeddings().register_forward_hook(lambda _, args, __, w=widths: w.append(args[0].shape))
        hidden = reader(model, batch).hidden
        hook.remove()
        assert widths == [(1, 9 + 6 + 4) if reader.packed else (3, 9)]
        (hidden * weights).sum().backward()
        found.append((hidden, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    # Norms, rotary angles and eager attention's weights are float32 inside, whatever the model's type.
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6 if attention == "sdpa" else 1e-4)
    assert found[0][0].abs().max() > 0.1


def test_what_packed_rows_are_compared_with_can_fail() -> None:
    model = tiny("llama")
    reader, inner = head_of(model), model.model.forward
    model.model.forward = lambda position_ids=None, **given: inner(**given)  # positions that nobody reads
    with pytest.raises(ModelError, match="lets packed rows read each other"):
        packing(reader)


@pytest.mark.parametrize("kind", [*SEQ2SEQ, "opt", "bloom"])
def test_models_that_cannot_keep_packed_rows_apart_are_refused(kind: str) -> None:
    bloom = BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)
    model = BloomForCausalLM(bloom) if kind == "bloom" else tiny(kind)
    with pytest.raises(ModelError, match="leave packing out"):
        packing(head_of(model))
