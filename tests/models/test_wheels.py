"""A wheel is fetched by pip, checked, and gives only what was asked of it; or an error that says what to do."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
from model_files import digest, pip_environment

from lorica import LoricaError
from lorica.models import fetch_wheel, wheels

MEMBERS = {"demo/data.json": b'{"a": 1}', "demo/other.json": b"{}", "demo/__init__.py": b"raise SystemExit('was run')"}


def left_in(folder) -> list[str]:
    return [path.name for path in folder.rglob("*") if not path.name.endswith(".lock")] if folder.exists() else []


def test_only_the_named_members_are_extracted(index, cache):
    sha = index.add("demo-set", "1.2", MEMBERS)
    folder = fetch_wheel("demo-set", "1.2", sha, {"demo/data.json": digest(MEMBERS["demo/data.json"])})
    assert folder == cache / "wheels" / "demo-set-1.2"
    assert sorted(left_in(folder)) == ["data.json", "demo"]
    assert (folder / "demo/data.json").read_bytes() == MEMBERS["demo/data.json"]


def test_the_second_call_does_not_ask_pip(index, monkeypatch):
    sha = index.add("demo-set", "1.2", MEMBERS)
    first = fetch_wheel("demo-set", "1.2", sha, {"demo/data.json": None})
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("pip was asked"))
    assert fetch_wheel("demo-set", "1.2", sha, {"demo/data.json": None}) == first


def test_progress_ends_at_the_size(index, tmp_path):
    sha = index.add("demo-set", "1.2", MEMBERS)
    seen = []
    fetch_wheel("demo-set", "1.2", sha, {"demo/data.json": None}, size=100, progress=lambda *a: seen.append(a))
    assert seen[-1] == ("fetching demo-set 1.2", 100, 100)
    assert all(done <= total for _, done, total in seen)


def test_another_wheel_of_the_same_name_is_not_used(index, cache):
    sha = index.add("demo-set", "1.2", MEMBERS)
    with pytest.raises(LoricaError, match=f"sha256 {sha}, expected {'0' * 64}.*or use the hub id a/b"):
        fetch_wheel("demo-set", "1.2", "0" * 64, {"demo/data.json": None}, instead="use the hub id a/b")
    assert left_in(cache / "wheels") == []


def test_all_members_that_differ_or_are_missing_are_in_one_error(index, cache):
    sha = index.add("demo-set", "1.2", MEMBERS)
    wanted = {"demo/data.json": "0" * 64, "demo/none.json": None, "demo/other.json": digest(b"{}")}
    with pytest.raises(LoricaError) as caught:
        fetch_wheel("demo-set", "1.2", sha, wanted)
    assert "demo/data.json: sha256" in str(caught.value) and "demo/none.json: not in the wheel" in str(caught.value)
    assert "other" not in str(caught.value)
    assert left_in(cache / "wheels") == []


def test_members_that_the_cache_lacks_are_named(index):
    sha = index.add("demo-set", "1.2", MEMBERS)
    folder = fetch_wheel("demo-set", "1.2", sha, {"demo/data.json": None})
    (folder / "demo/data.json").unlink()
    with pytest.raises(LoricaError, match="remove the folder and try again"):
        fetch_wheel("demo-set", "1.2", sha, {"demo/data.json": None})


def test_an_unknown_version_is_told_in_pips_words(index):
    index.add("demo-set", "1.2", MEMBERS)
    with pytest.raises(LoricaError, match="pip cannot fetch demo-set 9.9: No matching distribution"):
        fetch_wheel("demo-set", "9.9", "0" * 64, {"demo/data.json": None})


def test_without_network_the_error_says_so_and_what_to_use_instead(monkeypatch, cache):
    closed = "http://127.0.0.1:9/simple"
    pip_environment(monkeypatch, INDEX_URL=closed, RETRIES="1", NO_CACHE_DIR="1", DEFAULT_TIMEOUT="2")
    with pytest.raises(LoricaError, match="no network: .*or use the hub id a/b") as caught:
        fetch_wheel("demo-set", "1.2", "0" * 64, {"demo/data.json": None}, instead="use the hub id a/b")
    assert "127.0.0.1" not in str(caught.value)
    assert left_in(cache / "wheels") == []


def test_pips_words_are_told_without_addresses():
    said = "ERROR: 403 Client Error: Forbidden for url: https://user:secret@mirror.test/simple/demo-set/\n"
    assert "403 Client Error" in wheels._why(said, "demo-set", "1.2", "")
    assert "secret" not in wheels._why(said, "demo-set", "1.2", "")


def test_a_python_without_pip_is_told_how_to_get_it(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare/bin/python"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(LoricaError, match="has no pip.*python -m ensurepip --upgrade.*or use the hub id a/b"):
        fetch_wheel("demo-set", "1.2", "0" * 64, {"demo/data.json": None}, instead="use the hub id a/b")


def test_a_full_disk_under_pip_is_named(cache, monkeypatch):
    with pytest.raises(OSError) as caught:
        wheels._why("ERROR: Could not install packages: [Errno 28] No space left on device\n", "demo-set", "1.2", "")
    assert caught.value.errno == errno.ENOSPC


def test_a_full_disk_leaves_nothing_and_says_where(index, cache, monkeypatch):
    sha = index.add("demo-set", "1.2", MEMBERS)

    def full(wheel, members, folder):
        (folder / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wheels, "_extract", full)
    with pytest.raises(LoricaError, match=f"no space left on the disk of {cache}.*LORICA_CACHE"):
        fetch_wheel("demo-set", "1.2", sha, {"demo/data.json": None})
    assert left_in(cache / "wheels") == []


def test_an_interrupt_ends_pip_and_leaves_nothing(index, cache):
    sha = index.add("demo-set", "1.2", MEMBERS)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_wheel("demo-set", "1.2", sha, {"demo/data.json": None}, progress=interrupt)
    assert left_in(cache / "wheels") == []
