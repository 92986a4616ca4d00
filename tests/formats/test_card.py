"""The README of an adapter: metadata that parses, and no claim that was not measured."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from lorica.formats.card import card, hub_card

ADAPTER = {
    "repo": "me/mine", "model": "org/base", "license": "", "method": "lora", "rank": 12, "scales": [2.0],
    "targets_found": "q_proj x2", "trainable": 1234, "task": "CAUSAL_LM", "layout": "LORA", "vllm_refuses": "",
    "trained_on": "", "sha256": "f" * 64,
}  # fmt: skip
RUN = {
    "model": "org/base", "run": "0001-x", "data": "rows.jsonl", "train": 9, "held_out": 3, "held_out_all": 3,
    "notes": ["one row was cut"], "method": "lora", "rank": 8, "alpha": 16.0, "scale": 2.0, "targets": "qv",
    "layers": 4, "trainable": 64, "share": 0.1, "parameters": 640, "steps": 5, "batch": 2, "lr": 1e-3,
    "schedule": "linear", "dtype": "fp32", "seed": 0, "best_step": 4, "before": 2.0, "after": 1.5, "seconds": 3.0,
    "peak_rss_bytes": 10**9,
}  # fmt: skip


def test_the_metadata_names_base_library_task_and_tags():
    data = ModelCard(hub_card(ADAPTER, {})).data.to_dict()
    assert data["base_model"] == "org/base" and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "text-generation"
    assert set(data["tags"]) == {"lora", "lorica", "base_model:adapter:org/base"}


@pytest.mark.parametrize("license", ["", "apache-2.0"])
def test_a_licence_is_named_only_where_it_is_known(license):
    data = ModelCard(hub_card(ADAPTER | {"license": license}, {})).data.to_dict()
    assert data.get("license", "") == license


@pytest.mark.parametrize("base", ["0rg/1e5", "org/base: x", "no", "9/8"])
def test_a_strange_name_is_still_text_in_the_metadata(base):
    assert ModelCard(hub_card(ADAPTER | {"model": base}, {})).data.to_dict()["base_model"] == base


def test_an_adapter_without_a_run_claims_no_result():
    text = hub_card(ADAPTER, {"adapter_model.safetensors": "a" * 64})
    assert "No measurement is known" in text and "## Data" not in text
    assert "`adapter_model.safetensors` | `" + "a" * 64 in text


def test_four_libraries_are_shown_and_vllm_gets_a_rank_it_takes():
    text = hub_card(ADAPTER, {})
    for part in ("lorica chat me/mine", "PeftModel", "vllm serve", "--max-lora-rank 16", "llama-cli", "ollama"):
        assert part in text


def test_what_vllm_would_misread_is_said_and_not_shown():
    text = hub_card(ADAPTER | {"vllm_refuses": "it trains biases"}, {})
    assert "vllm serve" not in text and "it trains biases" in text and "lorica merge" in text


def test_a_method_that_peft_does_not_know_is_not_given_to_it():
    own = {"layout": "", "method": "adapter-h", "detail": "bottleneck 64", "unmergeable": "it is not linear"}
    text = hub_card(ADAPTER | own, {})
    assert "PeftModel" not in text and "A `adapter-h` adapter" in text and "lorica chat" in text
    assert "adapter-h: bottleneck 64" in text and "cannot be merged, since it is not linear" in text


def test_what_the_base_was_while_training_is_a_limit():
    assert "While training, the base was packed as nf4" in hub_card(ADAPTER | {"trained_on": "packed as nf4"}, {})


def test_the_card_of_a_run_shows_before_and_after_and_how_to_use_it():
    text = card(RUN | {"curve": True})
    for part in ("2.0000", "1.5000", "(curve.png)", "one row was cut", "--lora-modules mine=best", "lorica convert ."):
        assert part in text
    assert ModelCard(text).data.to_dict()["base_model"] == "org/base"


def test_the_card_of_a_run_on_a_folder_names_no_base_of_the_hub():
    assert "base_model" not in ModelCard(card(RUN | {"model": "/x/base"})).data.to_dict()


def test_the_curve_is_only_shown_where_it_lies_beside():
    assert "curve.png" not in hub_card(ADAPTER | RUN, {})
    assert "![loss while training](curve.png)" in hub_card(ADAPTER | RUN, {"curve.png": "b" * 64})


def test_a_dora_adapter_is_called_so_and_nobody_is_sent_to_vllm():
    text = card(RUN | {"method": "dora"})
    assert "A DoRA adapter" in text and "take the merged model only" in text and "vllm serve" not in text
