"""What the benches print keeps its contract, and the floor is the formula."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module", autouse=True)
def bench():
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


def work():
    rows = [[list(range(60)), 30], [list(range(64)), 32]]
    sizes = {"blocks": 106_168_320, "head": 28_311_552, "attention": 17_280, "lora": 2_442_240}
    return {"rows": rows, "batches": [[0, 1]], "warm": 0, "sizes": sizes, "batch": 2, "model": "m"}


def test_the_floor_of_the_small_model_is_that_of_the_design():
    from train import floor

    found = floor(work())
    assert found["labelled"] == pytest.approx(0.5)
    assert found["flop_per_token"] == pytest.approx(
        4 * 106_168_320 + 2 * 28_311_552 + 7 * 62.06 * 17_280 + 6 * 2_442_240, rel=1e-3
    )


def test_ratios_are_of_medians_and_a_peers_best_is_not_its_default():
    import argparse

    from train import report

    def runs(*speeds, peak=2e9):
        return [
            {"tokens_per_second": s, "peak_bytes": peak, "losses": [1.0], "total_seconds": 1.0, "sha256": ""}
            for s in speeds
        ]

    found = {
        "lorica_fp32": runs(100, 300, 290, peak=1e9),
        "peft_fp32": runs(100, 145, 150),
        "trl_default": runs(200, 200, 200),
        "trl_fp32": runs(100, 100, 100),
        "unsloth_default": [{"skipped": "no such library"}],
        "gemm_fp32": [{"flops": 200e9}, {"flops": 250e9}, {"flops": 210e9}],
    }
    options = argparse.Namespace(workload="e2e", model="m", repeats=3, steps=1, warm=0)
    told = report(options, work(), found)
    assert told["ratios"]["lorica_fp32 / peft_fp32"] == 2.0
    assert told["ratios"]["memory lorica_fp32 / peft_fp32"] == 0.5
    assert told["ratios"]["lorica_best / trl_default"] == pytest.approx(1.45)
    assert told["ratios"]["lorica_best / trl_best"] == pytest.approx(2.9)
    assert "lorica_best / unsloth_default" not in told["ratios"]
    assert told["results"]["unsloth_default"] == {"skipped": "no such library"}
    assert told["ratios"]["floor fp32"] == pytest.approx(290 * told["floor"]["flop_per_token"] / 210e9)
    assert set(told) >= {"settings", "machine", "results", "ratios", "targets", "floor"}


def test_a_variant_is_judged_beside_lora_and_reported_at_its_best_rate():
    import argparse

    from variants import report

    def told(*best):
        return {"best": list(best), "losses": {"1 seed 0": 2.0}, "peak_bytes": 1e9, "base": 3.0}

    options = argparse.Namespace(model="m", steps=1, batch=1, held=1, seeds=2)
    found = report(options, {"lora": told(1.5, 1.7), "dora": told(1.4), "pissa": {"skipped": "no"}})
    assert found["ratios"] == {"dora less lora, nats": pytest.approx(-0.2)}
    assert found["results"]["lora"]["median"] == pytest.approx(1.6) and found["results"]["lora"]["repeats"] == 2
    assert found["results"]["pissa"] == {"skipped": "no"}
    assert set(found) >= {"settings", "machine", "results", "ratios", "targets", "floor"}


def test_a_variant_is_shown_beside_lora_at_the_best_rate_of_each():
    from render import rates

    losses = {"0.33 seed 0": 1.5, "1 seed 0": 1.2, "3 seed 0": 1.3, "1 seed 1": 1.4}
    row = {"mean": 1.3, "min": 1.2, "max": 1.4, "default_lr": 1e-3, "losses": losses, "base": 3.0}
    settings = {"factors": [0.33, 1.0, 3.0], "model": "m", "steps": 2, "batch": 4, "r": 8, "held": 3, "seeds": 2}
    results = {"lora": row, "dora": row | {"mean": 1.25}}
    lines = rates({"settings": settings, "results": results, "machine": {"date": "2026-11-25"}})
    assert lines[0] == ("| variant | default rate | 0.33 times | 1 times | 3 times | best, all seeds | less LoRA |")
    assert lines[3] == "| dora | 0.001 | 1.500 | 1.200 | 1.300 | 1.250 (1.200 to 1.400) | -0.050 |"
    assert lines[-1].startswith(
        "m, 2 updates of 4 E2E rows, r=8, nats per token on 3 held-out rows, 2 seeds; the base 3"
    )


def test_a_token_that_is_not_the_likeliest_is_listed_with_what_it_lacks():
    from serve_parts.exact import Job, _not_likeliest

    from tiny import llama

    model, ids = llama(), [5, 6, 7]
    said = []
    for _ in range(3):
        said.append(int(model(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax()))
    right = Job("a", ids, said, "", 0, False)
    with torch.no_grad():
        assert _not_likeliest(model, right) == []
        second = int(model(input_ids=torch.tensor([ids + said[:1]])).logits[0, -1].topk(2).indices[1])
        (found,) = _not_likeliest(model, Job("a", ids, [said[0], second], "", 0, False))
    assert found["place"] == 1 and found["behind"] == pytest.approx(found["apart"]) and found["behind"] > 0


def test_a_report_is_rendered_with_other_units_targets_and_notes():
    from measure import summary
    from render import section

    machine = {"date": "2026-01-01", "cores": 2, "cpu": "c", "capabilities": [], "versions": {"torch": "2"}}
    results = {"base": summary([1.0, 3.0]), "soak": summary([5.0]) | {"unit": "requests/s"}, "x": {"skipped": "why"}}
    told = section(
        {
            "bench": "serve",
            "settings": {"repeats": 3},
            "machine": machine,
            "results": results,
            "ratios": {"merged / base": 1.013, "soak: wrong answers": 0.0},
            "targets": {"merged / base": ("<=", 1.01), "soak: wrong answers": ("<=", 0.0)},
            "notes": ["soak: nothing wrong"],
        }
    )
    assert "| base | 2.0 | 1.0 to 3.0 | 2 |  |" in told and "| soak | 5.0 requests/s | 5.0 to 5.0 | 1 |  |" in told
    assert "| merged / base | 1.013 | <= 1.01 | short |" in told
    assert "| soak: wrong answers | 0.000 | <= 0 | reached |" in told
    assert told[-2] == "- soak: nothing wrong"
