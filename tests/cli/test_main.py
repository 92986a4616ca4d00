"""Exit codes, and who hears what."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorica import __version__
from lorica.cli import main as cli
from lorica.errors import LoricaError

SOURCE = Path(__file__).parent.parent.parent / "src"


@pytest.fixture
def plot(monkeypatch):
    """Let a command do what a test wants."""
    from lorica.cli import plot

    def set_run(run):
        monkeypatch.setattr(plot, "run", run)

    return set_run


def test_help_lists_every_command_and_examples(capsys):
    assert cli.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n  {verb} " in told for verb in cli.COMMANDS)
    assert "examples:" in told


def test_every_command_of_the_table_exists():
    for verb in cli.COMMANDS:
        assert (SOURCE / "lorica" / "cli" / f"{verb}.py").is_file(), verb


def test_the_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lorica {__version__}\n"


def test_no_command_and_an_unknown_one_are_wrong_use(capsys):
    assert cli.main([]) == 2
    assert cli.main(["trian"]) == 2
    assert "unknown command 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_wrong_flags_are_wrong_use_and_say_so_on_stderr(capsys):
    assert cli.main(["plot", "--bogus", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: unknown flag --bogus")


def test_a_user_s_fault_is_one_line_without_a_traceback(plot, capsys):
    def fail(settings):
        raise LoricaError("what, where, what to do")

    plot(fail)
    assert cli.main(["plot", "x"]) == 1
    assert capsys.readouterr().err == "error: what, where, what to do\n"


def test_a_fault_of_ours_is_told_apart_and_debug_shows_where(plot, capsys):
    def fail(settings):
        raise ZeroDivisionError("oh")

    plot(fail)
    assert cli.main(["plot", "x"]) == 1
    assert "ZeroDivisionError: oh" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        cli.main(["plot", "x", "--debug"])


def test_ctrl_c_is_130(plot):
    def stop(settings):
        raise KeyboardInterrupt

    plot(stop)
    assert cli.main(["plot", "x"]) == 130


def test_json_prints_the_result_as_one_object(plot, capsys):
    plot(lambda settings: {"a": 1})
    assert cli.main(["plot", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_dry_run_prints_each_value_and_its_source_and_does_nothing(plot, capsys, tmp_path):
    def fail(settings):
        raise AssertionError("it ran")

    plot(fail)
    (tmp_path / "my.toml").write_text("quiet = true")
    assert cli.main(["plot", "x", "--dry-run", "-c", str(tmp_path / "my.toml"), "-o", "y.png"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["out", "y.png", "flag"] in lines
    assert ["quiet", "True", "my.toml"] in lines
    assert ["json", "False", "default"] in lines


def test_a_reader_that_leaves_early_is_no_fault():
    command = f"{sys.executable} -m lorica --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=SOURCE, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
