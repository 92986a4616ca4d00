"""A cached folder is made once, whole or not at all, however many processes come and whenever they are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from lorica import LoricaError
from lorica.models.cache import make_once

MAKER = """
import sys, time
from pathlib import Path
from lorica.models.cache import make_once

def make(folder):
    (folder / "part").write_text("half")
    Path(sys.argv[2]).open("a").write("started\\n")
    time.sleep(float(sys.argv[3]))
    (folder / "part").write_text("whole")

print((make_once(Path(sys.argv[1]), make) / "part").read_text())
"""


def maker(folder, log, seconds: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", MAKER, folder, log, str(seconds)], stdout=subprocess.PIPE, text=True)


def hidden(folder) -> list[str]:
    return [name for name in os.listdir(folder.parent) if name.startswith(".") and not name.endswith(".lock")]


def test_processes_that_come_together_make_it_once(tmp_path):
    both = [maker(tmp_path / "thing", tmp_path / "log", 0.5) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in both] == ["whole", "whole"]
    assert (tmp_path / "log").read_text() == "started\n"


def test_a_killed_process_leaves_no_folder_and_the_next_one_sweeps_and_makes_it(tmp_path):
    killed = maker(tmp_path / "thing", tmp_path / "log", 60)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert not (tmp_path / "thing").exists()
    assert len(hidden(tmp_path / "thing")) == 1
    (tmp_path / ".thing-2.abcdefgh").mkdir()  # another thing's, whose maker may be at work
    assert maker(tmp_path / "thing", tmp_path / "log", 0).communicate(timeout=60)[0].strip() == "whole"
    assert hidden(tmp_path / "thing") == [".thing-2.abcdefgh"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    with pytest.raises(LoricaError, match=f"{tmp_path} cannot be written to.*LORICA_CACHE"):
        make_once(tmp_path / "thing", refuse)


def test_a_fault_of_the_maker_passes_unchanged_and_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "part").write_text("half")
        raise LoricaError("no such thing")

    with pytest.raises(LoricaError, match="^no such thing$"):
        make_once(tmp_path / "thing", fail)
    assert not (tmp_path / "thing").exists() and hidden(tmp_path / "thing") == []
