"""`lorica push`: what is listed is what goes up, and no row, path or state with it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from model_files import llama, save

import lorica
from lorica import hub
from lorica.cli.main import main
from lorica.errors import LoricaError

ROWS = [{"prompt": f"what is the secret of person {n}", "completion": f"a blue elephant number {n}"} for n in range(20)]


class Hub:
    """Takes the place of `huggingface_hub.HfApi` and keeps what was sent."""

    def __init__(self, fail: Exception | None = None, at: str = "create_repo", there: tuple[str, ...] = ()) -> None:
        self.fail, self.at, self.there = fail, at, there
        self.made: list[tuple[str, bool]] = []
        self.files: dict[str, bytes] = {}

    def whoami(self):
        self._may_fail("whoami")
        return {"name": "me"}

    def create_repo(self, repo_id, *, private, exist_ok, repo_type):
        self._may_fail("create_repo")
        if repo_id in self.there and not exist_ok:
            raise Answer(409)
        self.made.append((repo_id, private))

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message, repo_type):
        self._may_fail("upload_folder")
        self.files = {str(path.relative_to(folder_path)): path.read_bytes() for path in Path(folder_path).rglob("*")}
        assert set(self.files) == set(allow_patterns)

    def _may_fail(self, step):
        if self.fail and self.at == step:
            raise self.fail


class Answer(huggingface_hub.errors.HfHubHTTPError):
    def __init__(self, status):
        Exception.__init__(self, f"{status} of the server")
        self.response = type("Response", (), {"status_code": status})()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base and a finished run on rows that are easily told."""
    folder = tmp_path_factory.mktemp("secretplace")
    save(folder / "base")
    (folder / "mydata.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    command = ["train", str(folder / "base"), str(folder / "mydata.jsonl"), "-o", str(folder / "run"), "-q",
               "--steps", "3", "--sample", "1", "--sample-len", "4"]  # fmt: skip
    assert main(command) == 0
    return folder


@pytest.fixture
def server(monkeypatch):
    """The hub that the command meets."""
    fake = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: fake)
    return fake


def push(place, *more, thing="run"):
    return main(["push", str(place / thing), "me/letters", "--base", "org/tiny", *more])


def test_what_is_listed_is_what_goes_up(place, server, capsys):
    assert push(place, "--yes") == 0
    told = capsys.readouterr().out.splitlines()
    listed = {line.split()[0] for line in told[2 : 2 + len(server.files)]}
    assert listed == set(server.files)
    assert listed >= {"README.md", "adapter_config.json", "adapter_model.safetensors", "run.toml"}
    assert any(line.startswith("stays here: last/, metrics.jsonl, samples.jsonl, state/") for line in told)
    assert server.made == [("me/letters", False)]
    assert told[-1] == "next:  lorica chat me/letters"


def test_no_byte_that_goes_up_holds_a_path_or_a_row(place, server):
    assert push(place, "--yes") == 0
    secrets = [str(Path.home()), str(place), "secretplace", str(Path.cwd()), "elephant", "secret of person"]
    secrets += [row[key] for row in ROWS for key in row]
    for name, content in server.files.items():
        for text in secrets:
            assert text.encode() not in content, f"{name} holds {text}"


def test_the_adapter_that_goes_up_is_the_best_one_and_names_the_base_of_the_hub(place, server, tmp_path):
    assert push(place, "--yes") == 0
    for name, content in server.files.items():
        (tmp_path / name).write_bytes(content)
    up, here = lorica.Adapter.load(tmp_path), lorica.Adapter.load(place / "run/best")
    assert up.sha256 == here.sha256
    assert up.meta["base_model"] == json.loads(server.files["adapter_config.json"])["base_model_name_or_path"]
    assert up.meta["base_model"] == "org/tiny"
    model = llama()
    up.apply(model)
    from lorica.inspect import inspect

    assert inspect(tmp_path)["kind"] == "adapter"


def test_a_half_precision_adapter_goes_up_as_it_is(place, server, tmp_path):
    lorica.Adapter.load(place / "run/best").save(tmp_path / "small", dtype="bf16")
    assert push(place, "--yes") == 0
    whole = len(server.files["adapter_model.safetensors"])
    assert main(["push", str(tmp_path / "small"), "me/small", "--base", "org/tiny", "--yes"]) == 0
    assert len(server.files["adapter_model.safetensors"]) < 0.8 * whole
    assert "No measurement is known" in server.files["README.md"].decode()


def test_a_dry_run_needs_no_network_and_no_login(place, monkeypatch, capsys):
    def none(**_):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "HfApi", none)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert push(place, "--dry-run") == 0
    assert "adapter_model.safetensors" in capsys.readouterr().out


def test_out_keeps_the_folder_and_uploads_nothing(place, server, tmp_path, capsys):
    assert push(place, "-o", str(tmp_path / "up"), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == {path.name: path.stat().st_size for path in (tmp_path / "up").iterdir()}
    assert not server.made
    assert push(place, "-o", str(tmp_path / "up")) == 1


@pytest.mark.parametrize("answer, goes", [("y", True), ("", False), ("no", False)])
def test_it_asks_first(place, server, monkeypatch, answer, goes):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda: answer)
    assert push(place) == (0 if goes else 1)
    assert bool(server.files) is goes


def test_without_anybody_to_ask_it_wants_yes(place, server, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert push(place) == 1
    assert "--yes" in capsys.readouterr().err
    assert not server.made


def test_private_is_private(place, server):
    assert push(place, "--yes", "--private") == 0
    assert server.made == [("me/letters", True)]


def test_a_name_that_is_taken_is_said_and_update_adds_to_it(place, server, capsys):
    server.there = ("me/letters",)
    assert push(place, "--yes") == 1
    assert "me/letters is there already: --update" in capsys.readouterr().err
    assert not server.files
    assert push(place, "--yes", "--update") == 0
    assert server.files


@pytest.mark.parametrize(
    "fault, at, words",
    [
        (huggingface_hub.errors.LocalTokenNotFoundError("x"), "whoami", "hf auth login"),
        (Answer(401), "whoami", "does not take this machine's token"),
        (ConnectionError("no route"), "whoami", "cannot be reached"),
        (huggingface_hub.errors.OfflineModeIsEnabled("x"), "whoami", "HF_HUB_OFFLINE"),
        (Answer(403), "create_repo", "may not write to me"),
        (Answer(500), "upload_folder", "me/letters was made and is empty: run this again with --update"),
        (ConnectionError("gone"), "upload_folder", "run this again with --update"),
    ],
)
def test_what_the_hub_says_no_to_is_told_in_words(place, server, capsys, fault, at, words):
    server.fail, server.at = fault, at
    assert push(place, "--yes") == 1
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told


def test_all_faults_come_at_once(place, capsys):
    assert main(["push", str(place / "run"), "letters", "--license", "Apache 2"]) == 1
    told = capsys.readouterr().err
    assert "'letters' is no name" in told and "--base user/name" in told and "apache-2.0" in told
    assert str(place / "base") not in told


def test_a_model_and_an_unfinished_run_are_refused(place, tmp_path, capsys):
    assert push(place, thing="base") == 1
    assert "a whole model" in capsys.readouterr().err
    shutil.copytree(place / "run", tmp_path / "half")
    log = (tmp_path / "half/metrics.jsonl").read_text().splitlines()
    (tmp_path / "half/metrics.jsonl").write_text("\n".join(log[:-1]) + "\n")
    assert push(tmp_path, thing="half") == 1
    assert "not finished" in capsys.readouterr().err


def test_a_system_message_of_the_settings_is_no_row(place, tmp_path, server):
    shutil.copytree(place / "run", tmp_path / "run")
    settings = (tmp_path / "run/run.toml").read_text()
    said = "you answer questions about secrets"
    (tmp_path / "run/run.toml").write_text(settings.replace('system = ""', f'system = "{said}"'))
    event = {"kind": "sample", "step": 1, "prompt": f"{said}\nand who?", "reference": "x", "text": "y"}
    (tmp_path / "run/samples.jsonl").write_text(json.dumps(event) + "\n")
    assert push(tmp_path, "--yes") == 0
    assert said.encode() in server.files["run.toml"]


@pytest.mark.parametrize("what", ["row", "path"])
def test_a_row_or_a_path_in_a_setting_stops_everything(place, tmp_path, server, capsys, what):
    shutil.copytree(place / "run", tmp_path / "run")
    settings = (tmp_path / "run/run.toml").read_text()
    sample = json.loads((place / "run/samples.jsonl").read_text().splitlines()[0])["prompt"]
    text = sample if what == "row" else f"read {Path.home()}/notes"
    (tmp_path / "run/run.toml").write_text(settings.replace('map = ""', f"map = {json.dumps(text)}"))
    assert push(tmp_path, "--yes") == 1
    assert "run.toml holds" in capsys.readouterr().err
    assert not server.made


def test_the_card_has_what_hubs_and_readers_look_for(place, server):
    assert push(place, "--yes", "--license", "mit") == 0
    text = server.files["README.md"].decode()
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "org/tiny" and data["license"] == "mit" and data["library_name"] == "peft"
    assert "base_model:adapter:org/tiny" in data["tags"] and data["pipeline_tag"] == "text-generation"
    for part in ("lorica chat me/letters", "PeftModel.from_pretrained", "vllm serve", "lorica convert", "llama-cli",
                 "held-out loss", "mydata.jsonl", "(curve.png)", "## Limits"):  # fmt: skip
        assert part in text, part
    assert lorica.Adapter.load(place / "run/best").sha256 in text


def test_the_last_adapter_does_not_borrow_the_results_of_the_best(place, server):
    assert push(place, "--yes", thing="run/last") == 0
    text = server.files["README.md"].decode()
    assert "No measurement is known" in text and "curve.png" not in server.files


def test_a_built_in_base_is_named_by_its_hub_id(place, tmp_path):
    import dataclasses

    adapter = lorica.Adapter.load(place / "run/best")
    named = dataclasses.replace(adapter, meta=dict(adapter.meta) | {"base_model": "smollm2-135m"})
    named.save(tmp_path / "a")
    with hub.packed(tmp_path / "a", "me/x") as package:
        assert package.base == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert "dequantised from Q4_1" in (package.folder / "README.md").read_text()
    assert not package.folder.exists()


def test_an_unknown_fault_of_the_client_stays_what_it_is(place):
    with hub.packed(place / "run", "me/x", base="org/tiny") as package:
        with pytest.raises(ZeroDivisionError):
            hub.push(package, api=Hub(ZeroDivisionError()))
        with pytest.raises(LoricaError, match="is there already"):
            hub.push(package, api=Hub(there=("me/x",)))
