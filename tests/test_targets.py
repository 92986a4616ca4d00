"""What a target specification means on models whose names differ, and what it says when it means nothing."""

from __future__ import annotations

import pytest
from torch import nn

import lorica
from lorica import LoRA, LoricaError
from lorica.targets import PRESETS, resolve
from tiny import bert, gpt2, llama, phi3, t5


def paths(model, spec):
    return [str(target) for target in resolve(model, spec)]


def tails(model, spec):
    return sorted({str(target).rsplit(".", 1)[-1] for target in resolve(model, spec)})


def test_presets_name_the_same_roles_on_every_family():
    assert tails(llama(), "attention") == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert tails(llama(), "mlp") == ["down_proj", "gate_proj", "up_proj"]
    assert tails(llama(), "qv") == tails(llama(), "paper") == ["q_proj", "v_proj"]
    assert tails(gpt2(), "attention") == ["c_attn", "c_proj"]
    assert all(".mlp." in path for path in paths(gpt2(), "mlp"))
    assert tails(gpt2(), "paper") == ["c_attn[q]", "c_attn[v]"]
    assert tails(phi3(), "paper") == ["qkv_proj[q]", "qkv_proj[v]"]
    assert tails(bert(), "qv") == ["query", "value"]
    assert all("attention" not in path for path in paths(bert(), "mlp"))
    assert tails(t5(), "qv") == ["q", "v"]
    assert tails(t5(), "mlp") == ["wi", "wo"]


def test_all_linear_leaves_the_output_head_out():
    for model in (llama(), gpt2(), t5()):
        assert not any("lm_head" in path for path in paths(model, "all-linear"))
    assert not any("cls" in path for path in paths(bert(), "all-linear"))
    assert len(paths(llama(), "all-linear")) == 14


def test_every_preset_is_described():
    assert set(PRESETS) == {"all-linear", "experts", "conv", "attention", "mlp", "qv", "paper"}
    assert all(PRESETS.values())


def test_names_globs_and_regexes_find_the_same_layers():
    wanted = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    for spec in ("q_proj", "self_attn.q_proj", "model.layers.*.q_proj", r"re:.*\.q_proj", ["q_proj"]):
        assert paths(llama(), spec) == wanted


def test_a_name_matches_whole_segments_only():
    with pytest.raises(LoricaError):
        resolve(llama(), "proj")


def test_layer_ranges_select_blocks():
    model = llama(layers=4)
    assert paths(model, "q_proj@1-2") == [f"model.layers.{n}.self_attn.q_proj" for n in (1, 2)]
    assert paths(model, "q_proj@2-") == [f"model.layers.{n}.self_attn.q_proj" for n in (2, 3)]
    assert paths(model, "q_proj@3") == ["model.layers.3.self_attn.q_proj"]
    assert len(paths(model, "all-linear@0-1")) == 14


def test_exclusions_win_wherever_they_stand():
    assert tails(llama(), "!o_proj, attention, !k_proj") == ["q_proj", "v_proj"]
    assert tails(gpt2(), "c_attn[q,k,v], !c_attn[k]") == ["c_attn[q]", "c_attn[v]"]
    assert tails(gpt2(), "c_attn, !c_attn[k]") == ["c_attn[q]", "c_attn[v]"]


def test_a_whole_layer_swallows_its_slices():
    assert tails(gpt2(), "c_attn[q], c_attn") == ["c_attn"]


def test_slices_of_grouped_queries_have_their_own_sizes():
    rows = {target.part: target.rows for target in resolve(phi3(), "qkv_proj[q,k,v]@0")}
    assert rows == {"q": (0, 32), "k": (32, 48), "v": (48, 64)}
    rows = {target.part: target.rows for target in resolve(phi3(), "gate_up_proj[gate,up]@0")}
    assert rows == {"gate": (0, 48), "up": (48, 96)}


def test_a_slice_changes_its_own_rows_only():
    import torch

    model = gpt2()
    layer = model.transformer.h[0].attn.c_attn
    x = torch.randn(5, 32)
    before = layer(x)
    lorica.inject(model, LoRA(r=2), "c_attn[v]")
    nn.init.normal_(layer.lorica.default.v.B)
    after = layer(x)
    assert torch.equal(after[:, :64], before[:, :64])
    assert not torch.equal(after[:, 64:], before[:, 64:])


def test_what_matches_nothing_is_an_error_that_lists_the_names():
    with pytest.raises(LoricaError) as raised:
        resolve(llama(), "query, q_proj, c_attn[q], !nothing, re:x, q_proj@7")
    for word in ("'query'", "'c_attn[q]'", "'!nothing'", "'re:x'", "'q_proj@7'", "q_proj x2", "down_proj x2"):
        assert word in str(raised.value)
    assert "'q_proj' " not in str(raised.value)


def test_unknown_slices_are_errors_that_list_the_known_ones():
    with pytest.raises(LoricaError, match="no slice z; it has: q, k, v"):
        resolve(gpt2(), "c_attn[z]")
    with pytest.raises(LoricaError, match="no slice q"):
        resolve(llama(), "o_proj[q]")


def test_only_exclusions_is_an_error():
    with pytest.raises(LoricaError, match="only exclusions"):
        resolve(llama(), "!q_proj")
    with pytest.raises(LoricaError, match="no target is left"):
        resolve(llama(), "q_proj, !q_proj")


def test_layers_that_are_never_called_are_refused_with_the_reason():
    attention = nn.MultiheadAttention(16, 2)
    with pytest.raises(LoricaError, match="nn.MultiheadAttention reads this weight itself"):
        lorica.inject(attention, LoRA(), "out_proj")
    block = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 1, enable_nested_tensor=False)
    with pytest.raises(LoricaError, match="linear1.*fast path") as raised:
        lorica.inject(block, LoRA(), "all-linear")
    assert "add '!layers.0.self_attn.out_proj' to leave it out" in str(raised.value)


def test_interleaved_projections_are_refused_as_slices():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(LoricaError, match="query_key_value.*interleaved"):
        resolve(GPTNeoXForCausalLM(config), "paper")
