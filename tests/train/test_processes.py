"""More than one process: the same command and steps, sharded or not, and a run that goes from two to one and back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import lorica
from lorica import Adapter, LoRA, LoricaError, TrainSettings
from lorica.train import folder, processes, state

SETTINGS = TrainSettings(
    steps=60, batch=4, lr=1e-3, eval_every=30, sample=0, held_out=0.2, save_every=0, dropout=0.2, rank=2, dtype="fp32"
)
FLAGS = {
    "--steps": "60", "--batch": "4", "--lr": "1e-3", "--eval-every": "30", "--sample": "0", "--held-out": "0.2",
    "--save-every": "0", "--dropout": "0.2", "--rank": "2", "--dtype": "fp32", "--device": "cpu",
}  # fmt: skip
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(command: list[str], **env: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | env
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], text=True, env=environment, start_new_session=True, **pipes)


def launch(*command: str, **env: str) -> subprocess.Popen[str]:
    """Two processes of a command, as torchrun starts them."""
    return start(["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port()}", *command], **env)


def said(process: subprocess.Popen[str]) -> str:
    """What a process that ends well printed."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    return out


def command(model_folder: Path, data_file: Path, out: Path, **changes: str) -> list[str]:
    flags = FLAGS | {f"--{name}": value for name, value in changes.items()}
    things = ["-m", "lorica", "train", str(model_folder), str(data_file), "-o", str(out)]
    return things + [part for flag in flags.items() for part in flag]


def until(process: subprocess.Popen[str], run: Path, steps: int) -> None:
    """Wait until a run has made some updates."""
    log = run / folder.METRICS
    while process.poll() is None and not (log.exists() and log.read_text().count('"kind": "step"') >= steps):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in folder.read_log(run / folder.METRICS) if event["kind"] == "step"]


def same(one: Path, other: Path, limit: float = 1e-5) -> None:
    """Two runs made the same updates and end with the same adapter, up to sums that were grouped otherwise."""
    assert losses(one) == pytest.approx(losses(other), rel=limit)
    a, b = (Adapter.load(run / "last").tensors for run in (one, other))
    far = torch.cat([(a[key] - b[key]).flatten() for key in b]).norm()
    assert far <= limit * torch.cat([tensor.flatten() for tensor in b.values()]).norm()


@pytest.fixture(scope="module")
def whole(fresh, tok, data_file, tmp_path_factory) -> Path:
    """What one process trains without a stop."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    lorica.train(fresh(), tok, data_file, SETTINGS, out=path)
    return path


def test_two_processes_train_what_one_trains_and_speak_once(model_folder, data_file, whole, tmp_path):
    told = said(launch(*command(model_folder, data_file, tmp_path / "two"), "--json"))
    assert json.loads(told)["steps"] == 60
    same(tmp_path / "two", whole)


@pytest.mark.slow
def test_sharded_over_two_processes_the_steps_are_those_of_one(model_folder, data_file, whole, tmp_path):
    told = said(launch(*command(model_folder, data_file, tmp_path / "two"), **FSDP2))
    assert told.count("next:") == 1
    same(tmp_path / "two", whole)


@pytest.mark.slow
def test_ctrl_c_stops_all_after_one_step_and_one_process_goes_on(fresh, tok, model_folder, data_file, whole, tmp_path):
    path = tmp_path / "cut"
    running = launch(*command(model_folder, data_file, path))
    until(running, path, 3)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to torchrun and to what it started
    _, err = running.communicate(timeout=60)
    assert running.returncode != 0
    assert err.count("continue with: lorica train --resume") == 1
    saved, _ = state.read(path)
    assert 3 <= saved.step == len(losses(path)) < 60
    lorica.train(fresh(), tok, data_file, resume=path)
    same(path, whole)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(model_folder, data_file, whole, tmp_path):
    path = tmp_path / "cut"
    running = start(command(model_folder, data_file, path))
    until(running, path, 3)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == 130
    said(launch("-m", "lorica", "train", "--resume", str(path)))
    same(path, whole)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(model_folder, data_file, tmp_path):
    path, here = tmp_path / "cut", {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    ranks = [here | {"RANK": str(k), "LOCAL_RANK": str(k)} for k in (0, 1)]
    both = [start(command(model_folder, data_file, path), **rank) for rank in ranks]
    until(both[0], path, 3)
    both[1].send_signal(signal.SIGTERM)
    told = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [130, 130]
    assert f"continue with: lorica train --resume {path}" in told[0][1]
    assert told[1] == ("", "")
    assert state.read(path)[0].step == len(losses(path)) < 60


@pytest.mark.slow
def test_a_sharded_base_keeps_its_dtype_and_one_process_goes_on(fresh, tok, rows, tmp_path):
    """With everything that reads weights elsewhere than in their layer: a tied head, checkpointing, samples."""
    path, script = tmp_path / "cut", tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import json, os, signal, sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            import lorica
            from lorica.train import Interrupted, processes
            from conftest import make_model, make_rows, make_tok
            from test_processes import TIED, tied

            def stop(event):
                if event["kind"] == "step" and event["step"] == 4:
                    os.kill(os.getpid(), signal.SIGTERM)

            with processes.joined("cpu"):
                model = tied(make_model())
                try:
                    lorica.train(model, make_tok(), make_rows(), TIED, out={str(path)!r}, report=stop)
                except Interrupted as stopped:
                    assert stopped.step == 4
                own = {{(type(p).__name__, str(p.dtype)) for p in lorica.trainable(model).values()}}
                rest = {{(type(p).__name__, str(p.dtype)) for p in model.parameters() if not p.requires_grad}}
                if os.environ["RANK"] == "0":
                    print(json.dumps([sorted(own), sorted(rest)]))
            """
        )
    )
    kinds = json.loads(said(launch(str(script), **FSDP2)))
    assert kinds == [[["Parameter", "torch.float32"]], [["DTensor", "torch.bfloat16"]]]
    Adapter.load(path / "last").apply(model := tied(fresh()))
    assert all(parameter.any() for parameter in lorica.trainable(model).values())
    lorica.train(tied(fresh()), tok, rows, resume=path)
    lorica.train(tied(fresh()), tok, rows, TIED, out=tmp_path / "whole")
    same(path, tmp_path / "whole", limit=0.02)  # bf16 keeps three digits


TIED = TrainSettings(
    steps=9, batch=4, lr=1e-2, eval_every=3, sample=1, sample_len=4, save_every=0, checkpointing="on", rank=2
)


def tied(model):
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model.bfloat16()


def test_a_gradient_that_one_process_has_counts_in_all(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, torch
            from lorica import TrainSettings
            from lorica.train.optimizer import Optimizer
            torch.distributed.init_process_group("gloo")
            rank = torch.distributed.get_rank()
            own = {name: torch.nn.Parameter(torch.full((3,), float(rank))) for name in ("both", "one", "none")}
            optimizer = Optimizer(own, TrainSettings(), processes=2)
            assert all(p.tolist() == [0.0] * 3 for p in own.values()), "the first one's weights"
            for step in range(2):
                optimizer.clear()
                (own["both"].sum() * (1 + rank)).backward()
                if rank == 1 and step == 0:
                    own["one"].sum().backward()
                norm = optimizer.clip(0.0)
                assert own["both"].grad.tolist() == [3.0] * 3
                assert own["one"].grad.tolist() == [1.0 - step] * 3
                assert own["none"].grad is None
                assert abs(float(norm) - (27 + 3 * (1 - step)) ** 0.5) < 1e-5
                optimizer.step(0.1)
            if rank == 0:
                print(own["both"].tolist(), own["one"].tolist())
            """
        )
    )
    told = said(launch(str(script)))
    both, one = json.loads("[" + told.replace("] [", "], [") + "]")
    assert both == pytest.approx([-0.2] * 3) and one[0] < -0.1


def test_what_cannot_be_sharded_is_refused(model, monkeypatch):
    lorica.inject(model, LoRA(r=2))
    accelerator = Accelerator(mixed_precision="no", device_placement=False)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(LoricaError, match="--fsdp_version 2"):
        processes.shard(model, accelerator)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setattr(lorica.patch, "packing", lambda model: "nf4")
    with pytest.raises(LoricaError, match="nf4"):
        processes.shard(model, accelerator)


def test_processes_that_read_different_things_are_told(monkeypatch):
    class Two:
        num_processes = 2

    said = [{"data": "a", "base": "c"}, {"data": "b", "base": "c"}]
    monkeypatch.setattr(processes, "gather_object", lambda mine: said)
    with pytest.raises(LoricaError, match="differ in data:"):
        processes.alike(Two(), **said[0])


def test_a_numbered_gpu_for_all_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LoricaError, match="give cuda, not cuda:1"), processes.joined("cuda:1"):
        pass
