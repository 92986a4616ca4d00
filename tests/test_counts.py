"""The paper's parameter counts: printed, by formula, and on injected models without weights."""

from __future__ import annotations

import pytest
import torch

import lorica
from lorica import LoRA, counts
from tiny import gpt2

# Worked out by hand from the shapes: d, L of RoBERTa 768, 12 and 1024, 24; DeBERTa 1536, 48; GPT-2 1024, 24 and 1280,
# 36; GPT-3 12288, 96.
BY_HAND = {
    ("2", "roberta-base", "lora", "r = 8 on q,v"): 294_912,
    ("2", "roberta-large", "lora", "r = 8 on q,v"): 786_432,
    ("2", "deberta-xxl", "lora", "r = 16 on q,v"): 4_718_592,
    ("2", "roberta-large", "adapter-p", "r = 16"): 811_392,
    ("3", "gpt2-medium", "full", ""): 354_823_168,
    ("3", "gpt2-large", "full", ""): 774_030_080,
    ("3", "gpt2-medium", "top2", ""): 25_192_448,
    ("3", "gpt2-medium", "lora", "r = 4 on q,v"): 393_216,
    ("3", "gpt2-large", "lora", "r = 4 on q,v"): 737_280,
    ("3", "gpt2-medium", "adapter-l", "r = 224"): 11_089_152,
    ("4", "gpt3-175b", "adapter-h", "r = 1"): 7_078_080,
    ("4", "gpt3-175b", "bitfit", ""): 12_988_416,
    ("15", "gpt3-175b", "lora", "r = 8 on q,v"): 37_748_736,
    ("15", "gpt3-175b", "lora", "r = 64 on q,v"): 301_989_888,
    ("15", "gpt3-175b", "preembed", "lp = 512, li = 8"): 6_389_760,
    ("15", "gpt3-175b", "lora+prelayer", "r = 8 on q,v; lp = 8, li = 4"): 51_904_512,
}


@pytest.fixture(scope="module")
def found():
    return counts.paper()


def find(found, table, model, method, settings):
    rows = [c for c in found if (c.row.table, c.row.model, c.row.method, c.row.settings)
            == (table, model, method, settings)]  # fmt: skip
    assert len({c.formula for c in rows}) == 1, rows
    return rows[0]


def test_every_number_is_right_or_declared_wrong(found):
    assert {c.mark for c in found} == {"ok", "misprint", "nominal"}
    assert all(c.why for c in found if c.mark != "ok")
    assert all(c.digits for c in found if c.mark == "ok")
    assert not any(c.digits for c in found if c.mark == "misprint")


def test_every_column_of_the_paper_is_there(found):
    lengths = {"2": 14, "3": 12, "4": 8, "5": 7, "10": 1, "13": 11, "14": 11, "15": 30, "D.4": 2, "code": 1}
    assert {table: sum(c.row.table == table for c in found) for table in lengths} == lengths
    assert len(found) == sum(lengths.values())


@pytest.mark.parametrize("row", BY_HAND, ids=str)
def test_formulas_give_what_the_hand_gives(found, row):
    assert find(found, *row).formula == BY_HAND[row]


def test_injected_models_have_what_the_formulas_say(found):
    counted = [c for c in found if c.counted is not None]
    injected = {"full", "top2", "bitfit", "lora", "preembed", "prelayer", "lora+preembed", "lora+prelayer"}
    assert {c.row.method for c in counted} >= injected
    assert all(c.counted == c.formula for c in counted)
    assert all(c.counted is not None for c in found if c.row.method in injected and not c.row.share)


def test_known_misprints_are_marked_with_the_right_value(found):
    wrong = {(c.row.table, c.row.method, c.row.printed): c.formula for c in found if c.mark == "misprint"}
    assert wrong["D.4", "lora", "37.7M"] == 18_874_368
    assert wrong["10", "lora", "4.7M"] == 2_359_296
    assert wrong["4", "bitfit", "14.2M"] == 12_988_416
    assert wrong["3", "adapter-h", "11.09M"] == 11_064_576
    assert wrong["15", "prelayer", "76.1M"] == 75_497_472
    assert {row.printed for row in (c.row for c in found) if row.nominal} >= {"0.35M", "0.77M", "125.0M"}


@pytest.mark.parametrize(
    "printed, value, how",
    [("37.7M", 37_748_736, "rounded"), ("301.9M", 301_989_888, "cut"), (".4M", 491_520, "cut"),
     ("603.8M", 603_979_776, ""), ("175B", 174_604_259_328, "rounded"), ("175,255.8M", 175_255_750_000, "rounded"),
     ("4.7M", 4_750_001, "cut"), ("4.7M", 4_649_999, "")],
)  # fmt: skip
def test_printed_digits_are_the_values_rounded_or_cut_off(printed, value, how):
    assert counts.digits(printed, value) == how


@pytest.mark.parametrize(
    "row",
    [
        counts.Row("x", "gpt2-medium", "lora", "0.40M", r=4, on="q,v"),  # not what r = 4 gives
        counts.Row("x", "gpt2-medium", "lora", "0.39M", r=4, on="q,v", misprint="size"),  # no misprint at all
    ],
)
def test_a_wrong_entry_of_the_table_is_told(row):
    built = {"gpt2-medium": counts._on_no_device("gpt2-medium")}
    assert counts._check(row, {"size": "because"}, built).mark == "differs"


def test_a_method_that_trains_something_else_than_its_formula_is_told(monkeypatch):
    row = counts.Row("x", "gpt2-medium", "lora", "0.39M", r=4, on="q,v")
    monkeypatch.setitem(counts.COUNTERS, "lora", lambda model, row: counts.counted(model, LoRA(r=4), "c_attn[q]"))
    assert counts._check(row, {}, {"gpt2-medium": counts._on_no_device("gpt2-medium")}).mark == "differs"


def test_counting_takes_no_memory_and_leaves_the_model_as_it_was():
    model = counts._on_no_device("gpt3-175b")
    before = {name: type(layer) for name, layer in model.named_modules()}
    assert counts.counted(model, LoRA(r=64), "c_attn[q,k,v],attn.c_proj") == 603_979_776
    assert {name: type(layer) for name, layer in model.named_modules()} == before
    assert all(parameter.is_meta for parameter in model.parameters())


def test_counting_without_weights_is_counting_with_them():
    with torch.device("meta"):
        empty = type(gpt2())(gpt2().config)
    for method in (LoRA(r=3), LoRA(r=3, bias="all")):
        full = gpt2()
        lorica.inject(full, method, "c_attn[q,v]")
        assert counts.counted(empty, method, "c_attn[q,v]") == lorica.count(full).trainable
