"""Flag > file > default, and every fault of a command line and of its file in one message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import tyro

from lorica.cli.parse import Common, WrongUse, parse


@dataclass(kw_only=True)
class Settings(Common):
    """A command."""

    thing: tyro.conf.Positional[str]
    """What to do it to."""
    more: tyro.conf.Positional[tuple[str, ...]] = ()
    """Further things."""
    rank: Annotated[int, tyro.conf.arg(aliases=["-r"])] = 8
    """Rank."""
    lr: float | None = None
    """Rate."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How it falls."""
    targets: str = "all-linear"
    """Where."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Rates."""
    tied: bool = False
    """Both sides."""
    from_: Annotated[str, tyro.conf.arg(name="from")] = ""
    """Where to start."""


def read(*argv, file=None, tmp_path=None):
    if file is not None:
        (tmp_path / "recipe.toml").write_text(file)
        argv = (*argv, "-c", str(tmp_path / "recipe.toml"))
    return parse(Settings, argv, "lorica x")


def test_flags_in_every_spelling_are_read():
    settings, _ = read("a", "b", "c", "-r", "4", "--lr=1e-3", "--tied", "--from", "x", "--betas", "0.8,0.9")
    assert (settings.thing, settings.more, settings.rank, settings.lr) == ("a", ("b", "c"), 4, 1e-3)
    assert (settings.tied, settings.from_, settings.betas) == (True, "x", (0.8, 0.9))
    assert read("a", "--no-tied")[0].tied is False
    assert read("a", "--dry_run")[0].dry_run is True
    assert read("--rank", "4", "--", "-odd-name")[0].thing == "-odd-name"
    assert read("a", "--targets", "!o_proj,attention")[0].targets == "!o_proj,attention"
    assert read("a", "--lr", "none")[0].lr is None


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    settings, sources = read(
        "a", "--rank", "2", file='rank = 4\nlr = 1e-5\ntargets = ["q_proj", "v_proj"]', tmp_path=tmp_path
    )
    assert (settings.rank, settings.lr, settings.targets, settings.schedule) == (2, 1e-5, "q_proj,v_proj", "linear")
    assert (sources["rank"], sources["lr"], sources["schedule"]) == ("flag", "recipe.toml", "default")


def test_a_thing_may_stand_in_the_file(tmp_path):
    assert read(file='thing = "a"', tmp_path=tmp_path)[0].thing == "a"
    assert read("b", file='thing = "a"', tmp_path=tmp_path)[0].thing == "b"


def test_tables_of_a_file_are_records_and_no_settings(tmp_path):
    assert read("a", file='rank = 4\n[made]\nby = "x"', tmp_path=tmp_path)[0].rank == 4


def test_every_fault_is_in_one_message_with_the_nearest_name(tmp_path):
    file = 'rnak = 4\nlearning_rate = 1.0\nschedule = "cosin"\nbetas = 0.9\ntied = "yes"'
    with pytest.raises(WrongUse) as raised:
        read("--ranc", "4", "--lora_r=3", "--lr", "fast", file=file, tmp_path=tmp_path)
    told = str(raised.value)
    for part in (
        "unknown flag --ranc; did you mean --rank?",
        "unknown flag --lora-r; here it is --rank",
        "--lr is 'fast'; it must be a number",
        "unknown setting 'rnak'; did you mean rank?",
        "unknown setting 'learning_rate'; here it is lr",
        "schedule is 'cosin'; it must be linear, cosine; did you mean 'cosine'?",
        "betas is 0.9; it must be 2 values",
        "tied is 'yes'; it must be true or false",
        "THING is missing",
        "see lorica x --help",
    ):
        assert part in told, part


def test_a_flag_without_its_value_and_a_thing_too_many_are_told():
    @dataclass(kw_only=True)
    class One(Common):
        """A command with one thing."""

        thing: tyro.conf.Positional[str] = ""
        """It."""

    with pytest.raises(WrongUse, match="--out needs a value"):
        parse(One, ["a", "--out", "--json"], "lorica x")
    with pytest.raises(WrongUse, match="not understood: b c .this command takes THING."):
        parse(One, ["a", "b", "c"], "lorica x")


def test_numbers_are_not_taken_for_flags_and_not_bent():
    assert read("a", "--lr", "-1")[0].lr == -1.0
    for wrong in ("1.5", "x", "True"):
        with pytest.raises(WrongUse, match="it must be a whole number"):
            read("a", "--rank", wrong)


def test_a_file_that_is_no_toml_or_not_there_is_told(tmp_path):
    with pytest.raises(WrongUse, match="recipe.toml is not readable as TOML"):
        read("a", file="rank: 4", tmp_path=tmp_path)
    with pytest.raises(WrongUse, match="nowhere.toml cannot be read: No such file"):
        read("a", "-c", str(tmp_path / "nowhere.toml"))


def test_help_has_the_words_of_the_fields(capsys):
    with pytest.raises(SystemExit) as raised:
        read("--help")
    assert raised.value.code == 0
    told = capsys.readouterr().out
    assert "What to do it to." in told and "--schedule" in told and "-r" in told
