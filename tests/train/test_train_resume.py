"""Law 6: a run that was stopped, asked or not, ends with the bytes of one that was not."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
import torch

import lorica
from lorica import LoRA, LoricaError
from lorica.train import Interrupted, folder, sitting, state


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """A picture takes as long as all the rest of these runs."""
    monkeypatch.setattr("lorica.train.curve.draw", lambda runs, out: None)


class Crash(Exception):
    """Stands for a power cut."""


def crash_at(count):
    """A report that raises at the count-th event."""
    seen = 0

    def report(event):
        nonlocal seen
        seen += 1
        if seen == count:
            raise Crash

    return report


def outcome(path):
    """All that a run leaves, times aside: adapters to the byte, logs without what the clock says."""
    clock = {"elapsed", "seconds", "memory", "run", "peak_rss_bytes", "peak_bytes", "predicted_bytes"}
    clock |= {"predicted_seconds", "available_bytes"}
    logs = {
        name: [
            {key: value for key, value in event.items() if key not in clock}
            for event in folder.read_log(path / name)
        ]
        for name in (folder.METRICS, folder.SAMPLES)
    }  # fmt: skip
    files = {name: (path / name).read_bytes() for name in ADAPTERS}
    return files, logs


ADAPTERS = [
    f"{which}/{name}" for which in ("best", "last") for name in ("adapter_model.safetensors", "adapter_config.json")
]


@pytest.fixture(scope="module")
def settings(brief):
    # Dropout draws random numbers, and so high a rate makes a best that is not the last.
    return dataclasses.replace(brief, dropout=0.2, held_out=0.2, lr=0.3, schedule="constant")


@pytest.fixture(scope="module")
def whole(fresh, tok, rows, settings, tmp_path_factory):
    """An uninterrupted run's outcome."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert lorica.train(fresh(), tok, rows, settings, out=path).best_step < settings.steps
    return outcome(path)


@pytest.mark.parametrize("event", [1, 2, 3, 4, 5, 7, 9, 12, 15, 17, 18])
def test_a_crash_at_any_event_changes_nothing_in_the_end(fresh, tok, rows, settings, whole, tmp_path, event):
    path = tmp_path / "cut"
    with pytest.raises(Crash):
        lorica.train(fresh(), tok, rows, settings, out=path, report=crash_at(event))
    lorica.train(fresh(), tok, rows, resume=path)
    assert outcome(path) == whole


@pytest.mark.parametrize("save", [1, 2, 4, 6, 7, 9])
def test_a_crash_between_the_state_and_the_adapters_changes_nothing(
    fresh, tok, rows, settings, whole, tmp_path, monkeypatch, save
):
    path, write, count = tmp_path / "cut", sitting.state.write, 0

    def write_and_crash(*given):
        nonlocal count
        count += 1
        write(*given)
        if count == save:
            raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(sitting.state, "write", write_and_crash)
        with pytest.raises(Crash):
            lorica.train(fresh(), tok, rows, settings, out=path)
    lorica.train(fresh(), tok, rows, resume=path)
    assert outcome(path) == whole


def test_many_crashes_in_one_run_change_nothing(fresh, tok, rows, settings, whole, tmp_path):
    path = tmp_path / "cut"
    with pytest.raises(Crash):
        lorica.train(fresh(), tok, rows, settings, out=path, report=crash_at(6))
    for _ in range(3):
        with pytest.raises(Crash):
            lorica.train(fresh(), tok, rows, resume=path, report=crash_at(4))
    lorica.train(fresh(), tok, rows, resume=path)
    assert outcome(path) == whole


def test_saving_seldom_gives_the_same_run(fresh, tok, rows, settings, whole, tmp_path):
    path = tmp_path / "cut"
    with pytest.raises(Crash):
        lorica.train(fresh(), tok, rows, dataclasses.replace(settings, save_every=1e9), out=path, report=crash_at(12))
    assert state.read(path)[0].step == 3
    lorica.train(fresh(), tok, rows, resume=path)
    assert outcome(path) == whole


@pytest.mark.parametrize("method", [{"dora": True, "lr_ratio": 16.0}, {"init": "pissa"}, {"init": "gradient"}], ids=str)
def test_variants_resume_to_the_bit(fresh, tok, rows, settings, tmp_path, method):
    chosen = dataclasses.replace(settings, lr=1e-3, **method)
    lorica.train(fresh(), tok, rows, chosen, out=tmp_path / "whole")
    with pytest.raises(Crash):
        lorica.train(fresh(), tok, rows, chosen, out=tmp_path / "a", report=crash_at(9))
    lorica.train(fresh(), tok, rows, resume=tmp_path / "a")
    assert outcome(tmp_path / "a") == outcome(tmp_path / "whole")


def test_a_run_without_held_out_rows_resumes_too(fresh, tok, rows, settings, tmp_path):
    settings = dataclasses.replace(settings, held_out=0.0)
    lorica.train(fresh(), tok, rows, settings, out=tmp_path / "whole")
    with pytest.raises(Crash):
        lorica.train(fresh(), tok, rows, settings, out=tmp_path / "cut", report=crash_at(6))
    run = lorica.train(fresh(), tok, rows, resume=tmp_path / "cut")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert (run.before, run.after, run.best_step) == (None, None, 9)


def test_parameters_below_fp32_resume_with_their_masters(fresh, tok, rows, settings, tmp_path):
    settings = dataclasses.replace(settings, modules_to_save="lm_head", lr=1e-3)
    lorica.train(fresh().bfloat16(), tok, rows, settings, out=tmp_path / "whole")
    with pytest.raises(Crash):
        lorica.train(fresh().bfloat16(), tok, rows, settings, out=tmp_path / "cut", report=crash_at(8))
    lorica.train(fresh().bfloat16(), tok, rows, resume=tmp_path / "cut")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_update_saves_and_says_how_to_go_on(fresh, tok, rows, settings, whole, tmp_path, number):
    def report(event):
        if event["kind"] == "step" and event["step"] == 4:
            os.kill(os.getpid(), number)

    path, handler = tmp_path / "cut", signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"after step 4.*lorica train --resume {path}"):
        lorica.train(fresh(), tok, rows, dataclasses.replace(settings, save_every=1e9), out=path, report=report)
    assert signal.getsignal(number) is handler
    assert state.read(path)[0].step == 4
    lorica.train(fresh(), tok, rows, resume=path)
    assert outcome(path) == whole


def test_a_second_ctrl_c_ends_at_once(fresh, tok, rows, settings, tmp_path):
    def report(event):
        if event["kind"] == "step" and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stopped:
        lorica.train(fresh(), tok, rows, settings, out=tmp_path / "cut", report=report)
    assert not isinstance(stopped.value, Interrupted)
    assert state.read(tmp_path / "cut")[0].step == 3


def test_a_finished_run_says_so(fresh, tok, rows, brief, tmp_path):
    lorica.train(fresh(), tok, rows, brief, out=tmp_path / "run")
    with pytest.raises(LoricaError, match=r"finished.*--from"):
        lorica.train(fresh(), tok, rows, resume=tmp_path / "run")


def test_other_data_or_another_base_is_refused(fresh, tok, rows, brief, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(Crash):
        lorica.train(fresh(), tok, rows, brief, out=path, report=crash_at(5))
    with pytest.raises(LoricaError, match=r"examples.*changed"):
        lorica.train(fresh(), tok, rows[:-1], resume=path)
    other = fresh()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    with pytest.raises(LoricaError, match="weights of the base model changed"):
        lorica.train(other, tok, rows, resume=path)
    lorica.train(fresh(), tok, rows, resume=path)


def test_the_state_of_another_adapter_is_refused_with_all_differences(fresh, tok, rows, brief, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(Crash):
        lorica.train(fresh(), tok, rows, brief, out=path, report=crash_at(5))
    text = (path / "run.toml").read_text()
    (path / "run.toml").write_text(text.replace("rank = 2", "rank = 3"))
    with pytest.raises(LoricaError, match=r"(?s)shape .*saved \(2, 16\), model \(3, 16\)"):
        lorica.train(fresh(), tok, rows, resume=path)


def test_a_resume_takes_no_settings_and_no_folder(model, tok, rows, brief, tmp_path):
    with pytest.raises(LoricaError, match="neither settings nor out"):
        lorica.train(model, tok, rows, brief, resume=tmp_path)


def test_a_damaged_state_is_told(fresh, tok, rows, brief, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(Crash):
        lorica.train(fresh(), tok, rows, brief, out=path, report=crash_at(5))
    (path / state.FILE).write_bytes(b"no tensors")
    with pytest.raises(LoricaError, match="damaged"):
        lorica.train(fresh(), tok, rows, resume=path)


def test_an_early_stop_that_was_reached_is_not_passed_on_resume(fresh, tok, rows, brief, tmp_path, monkeypatch):
    settings = dataclasses.replace(
        brief, steps=60, batch=8, rank=8, lr=0.03, schedule="constant", early_stop=2, held_out=0.2
    )
    whole = lorica.train(fresh(), tok, rows, settings, out=tmp_path / "whole")
    assert whole.steps < 60
    with monkeypatch.context() as patched:
        patched.setattr("lorica.train.run._finish", lambda sitting: (_ for _ in ()).throw(Crash()))
        with pytest.raises(Crash):
            lorica.train(fresh(), tok, rows, settings, out=tmp_path / "cut")
    resumed = lorica.train(fresh(), tok, rows, resume=tmp_path / "cut")
    assert (resumed.steps, resumed.best_step) == (whole.steps, whole.best_step)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_an_adapter_that_was_on_the_model_resumes(fresh, tok, rows, brief, tmp_path):
    def ready():
        model = fresh()
        lorica.inject(model, LoRA(r=3, alpha=5), targets="q_proj,down_proj")
        return model

    lorica.train(ready(), tok, rows, brief_of(brief), out=tmp_path / "whole")
    with pytest.raises(Crash):
        lorica.train(ready(), tok, rows, brief_of(brief), out=tmp_path / "cut", report=crash_at(7))
    # The settings of the run are enough to make the adapter again.
    lorica.train(fresh(), tok, rows, resume=tmp_path / "cut")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def brief_of(brief):
    return dataclasses.replace(brief, rank=8)
