"""The settings: their check, the rules for what is left open, and that reading them costs no torch."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import subprocess
import sys

import pytest

from lorica import TrainSettings
from lorica.train.settings import default_lr, measured_every, number_of_steps, rate


def test_settings_can_be_read_without_torch():
    code = "import sys, lorica.train.settings; sys.exit('torch' in sys.modules or 'accelerate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_train_is_there_as_soon_as_lorica_is_imported():
    code = "import sys, lorica; sys.exit(not callable(lorica.train))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_defaults_have_no_fault():
    assert TrainSettings().check() == []


def test_every_fault_is_told_at_once():
    bad = TrainSettings(
        rank=0,
        lr=-1.0,
        batch=0,
        warmup=1.0,
        epochs=1,
        steps=5,
        ranks="q_proj",
        token_rows="a",
        betas=(0.9, 1.0),
        max_len=1,
    )
    faults = "\n".join(bad.check())
    for name in ("rank", "lr", "batch", "warmup", "epochs", "ranks", "token_rows", "betas", "max_len"):
        assert name in faults
    assert len(bad.check()) == 9


def test_early_stop_without_held_out_rows_is_a_fault():
    assert "held_out" in TrainSettings(early_stop=2, held_out=0.0).check()[0]


def test_every_setting_has_a_help_text():
    (made,) = [node for node in ast.parse(inspect.getsource(TrainSettings)).body if isinstance(node, ast.ClassDef)]
    body = made.body
    described = {
        node.target.id
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }
    assert described == {field.name for field in dataclasses.fields(TrainSettings)}


@pytest.mark.parametrize(("width", "lr"), [(2000, 5e-4), (4096, 2.9e-4), (576, 1.3e-3), (64, 2e-3)])
def test_the_rate_follows_the_width_and_is_capped(width, lr):
    assert default_lr(width) == lr


def test_the_rate_rises_then_falls_and_is_never_zero():
    rates = [rate(step, 100, 1.0, "linear", 0.1) for step in range(1, 101)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.02


def test_the_schedules_differ_as_they_are_called():
    middle = {name: rate(51, 100, 1.0, name, 0.0) for name in ("linear", "cosine", "constant")}
    assert middle == {"linear": 0.5, "cosine": pytest.approx(0.5), "constant": 1.0}
    assert rate(26, 100, 1.0, "cosine", 0.0) == pytest.approx(0.8536, abs=1e-4)


def test_steps_follow_from_epochs_with_the_short_batch_kept():
    assert number_of_steps(TrainSettings(batch=8), 20) == 6
    assert number_of_steps(TrainSettings(batch=8, epochs=0.5), 20) == 2
    assert number_of_steps(TrainSettings(steps=7), 20) == 7


def test_a_run_is_measured_about_ten_times():
    assert measured_every(TrainSettings(), 143) == 15
    assert measured_every(TrainSettings(), 3) == 1
    assert measured_every(TrainSettings(eval_every=4), 143) == 4
