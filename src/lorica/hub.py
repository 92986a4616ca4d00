"""An adapter on a model hub: a folder of exactly what goes up, checked for what must not, and the upload.

What goes up is the adapter in PEFT's layout, a card, the curve and the settings. What stays is everything that holds
rows of the data (samples, state, metrics), and every path of this machine: the base is named by its hub id, data by the
name of its file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorica import doors, inspect, tensorfiles
from lorica.adapter import Adapter
from lorica.errors import LoricaError, all_faults
from lorica.files import folder_atomic, sha256, write_atomic
from lorica.formats import pair
from lorica.formats.card import hub_card
from lorica.models import BUILTIN
from lorica.train import folder as runs

CARD, CURVE = "README.md", "curve.png"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
# A text of a row that is shorter may be in a card by chance.
_TELLING = 24
_NETWORK = {"httpx", "httpx2", "httpcore", "requests", "urllib3"}


@dataclass(frozen=True)
class Package:
    """A folder that is ready to go up.

    Attributes:
        repo: where to, ``user/name``.
        folder: holds these files and nothing else.
        base: hub id of the base model.
        files: bytes by name.
        stays: what lies beside the adapter here and does not go up.
    """

    repo: str
    folder: Path
    base: str
    files: Mapping[str, int]
    stays: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """Where the adapter lies, and its run: `settings` and the log's first and last events, empty where unknown."""

    adapter: Path
    run: Path | None
    settings: Mapping[str, Any]
    start: Mapping[str, Any]
    end: Mapping[str, Any]


@contextlib.contextmanager
def packed(
    thing: str | Path, repo: str, *, base: str = "", license: str = "", out: str | Path | None = None
) -> Iterator[Package]:
    """Make the folder that goes up; needs no network.

    Args:
        thing: a run (its best adapter), or an adapter folder; one inside a run takes that run's card.
        repo: ``user/name``.
        base: hub id of the base model; only needed where the adapter names a folder or a file.
        license: identifier as the hub knows it (`apache-2.0`), left out where it is not given.
        out: a new folder to keep it in; default one that is gone at the end of the block.

    Raises:
        LoricaError: every fault at once; also where a file would hold a path of this machine or text of a row.
    """
    source = _source(doors.place(thing))
    adapter = Adapter.load(source.adapter)
    named = adapter.meta.get("base_model") or str(source.settings.get("model", ""))
    faults = _faults(repo, base, named, license)
    if out is not None and Path(out).exists():
        faults.append(f"{out} is there already, and nothing is overwritten; give another folder")
    if faults:
        raise all_faults(f"{thing} cannot go to the hub yet:", faults)
    hub_id = base or (BUILTIN[named].hub_id if named in BUILTIN else named)
    with contextlib.ExitStack() as stack:
        if out is not None:
            place = stack.enter_context(folder_atomic(Path(out)))
        else:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorica-push-"))) / "package"
            place.mkdir()
        _fill(place, source, adapter, {"repo": repo, "model": hub_id, "named": named, "license": license})
        _check(place, source, named)
        files = {path.name: path.stat().st_size for path in sorted(place.iterdir())}
        yield Package(repo, place, hub_id, MappingProxyType(files), _stays(source, files))


def push(package: Package, *, private: bool = False, update: bool = False, api: Any = None) -> str:
    """Upload a package as one commit; returns its address.

    Args:
        private: make the repository readable for its owner only. One that is there keeps its visibility.
        update: add a version to a repository that is there.
        api: a `huggingface_hub.HfApi`.

    Raises:
        LoricaError: no token, no right to write there, the name is taken, no network: in words.
    """
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi(library_name="lorica")
    made = False
    try:
        api.create_repo(package.repo, private=private, exist_ok=update, repo_type="model")
        made = True
        api.upload_folder(
            repo_id=package.repo,
            folder_path=package.folder,
            allow_patterns=list(package.files),
            commit_message="Adapter and card",
            repo_type="model",
        )
    except Exception as fault:
        raise _in_words(fault, package.repo, made and not update) from fault
    return f"https://huggingface.co/{package.repo}"


def check_login(api: Any = None) -> str:
    """The user that the hub knows this machine's token as; LoricaError without one, or without a network."""
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi(library_name="lorica")
    try:
        return api.whoami()["name"]
    except Exception as fault:
        raise _in_words(fault, "", False) from fault


def _source(path: Path) -> _Source:
    if not path.is_dir():
        raise LoricaError(f"there is no folder {path} here; push takes a run or an adapter folder")
    choices = [path / name for name in ("", "best", "last")]
    adapter = next((choice for choice in choices if (choice / pair.CONFIG).is_file()), None)
    if adapter is None:
        what = "a whole model, and push is for adapters" if (path / "config.json").is_file() else "neither"
        raise LoricaError(f"push takes a run or an adapter folder; {path} is {what}")
    run = next((each for each in (adapter, adapter.parent) if (each / runs.SETTINGS).is_file()), None)
    if run is None or not (run / runs.METRICS).is_file():
        return _Source(adapter, None, {}, {}, {})
    log = runs.read_log(run / runs.METRICS)
    start = next((event for event in log if event["kind"] == "start"), {})
    end = next((event for event in log if event["kind"] == "end"), {})
    if not end and adapter.name == "best":
        raise LoricaError(f"the run {run} is not finished: lorica train --resume {run}, or push {run / 'last'}")
    return _Source(adapter, run, runs.read_settings(run), start, end)


def _faults(repo: str, base: str, named: str, license: str) -> list[str]:
    faults = []
    if not _ID.fullmatch(repo):
        faults.append(f"{repo!r} is no name on the hub; it must look like user/name")
    if base and not _ID.fullmatch(base):
        faults.append(f"--base {base!r} is no name on the hub; it must look like user/name")
    if not base and named not in BUILTIN and (not _ID.fullmatch(named) or Path(named).exists()):
        what = f"{Path(named).name}, a folder or file of this machine" if named else "nothing"
        faults.append(f"it names as its base model {what}; say which model of the hub that is: --base user/name")
    if license and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        faults.append(f"--license {license!r} is no identifier such as apache-2.0, mit or cc-by-4.0")
    return faults


def _fill(place: Path, source: _Source, adapter: Adapter, about: dict[str, str]) -> None:
    """Write every file; the card last, since it has the digests of the others."""
    meta = MappingProxyType(dict(adapter.meta) | {"base_model": about["model"]})
    dataclasses.replace(adapter, meta=meta).save(place / "adapter", _dtype(source.adapter))
    for path in (place / "adapter").iterdir():
        path.rename(place / path.name)
    (place / "adapter").rmdir()
    if source.run:
        settings = {key: value for key, value in source.settings.items() if not isinstance(value, dict)}
        made = {key: str(value) for key, value in source.settings.get("made", {}).items()}
        runs.write_settings(place, _without_paths(settings) | {"model": about["model"]}, made)
        if (source.run / CURVE).is_file() and _is_measured(source):
            shutil.copyfile(source.run / CURVE, place / CURVE)
    digests = {path.name: sha256(path) for path in sorted(place.iterdir())}
    write_atomic(place / CARD, hub_card(_facts(place, source, adapter, about), digests))


def _facts(place: Path, source: _Source, adapter: Adapter, about: dict[str, str]) -> dict[str, Any]:
    found = inspect.inspect(place)
    told: dict[str, Any] = {key: value for key, value in source.start.items() if key != "example"}
    if _is_measured(source):
        told |= {key: value for key, value in source.end.items() if key != "notes"}
    elif told:
        told["steps"] = max(told["steps"], source.end.get("steps", 0))
    if notes := told.get("notes"):
        told["notes"] = [f"{len(notes)} remarks on its rows are in the run's log, which is not here."]
    if told.get("data"):
        told["data"] = Path(told["data"]).name
    packing, alias = adapter.meta.get("quantize", ""), BUILTIN.get(about["named"])
    trained_on = [alias.title] if alias else []
    return told | {
        "repo": about["repo"],
        "model": about["model"],
        "license": about["license"],
        "method": found["method"],
        "detail": found.get("detail", ""),
        "unmergeable": found.get("unmergeable", ""),
        "rank": max(found.get("ranks", ()), default=0),
        "scales": found.get("scales", []),
        "targets_found": found["targets"],
        "trainable": found["parameters"],
        "task": adapter.meta.get("task_type", ""),
        "labels": told.get("labels") or dict.fromkeys(json.loads(adapter.meta.get("labels", "[]"))),
        "layout": _layout(place),
        "vllm_refuses": found["vllm"].get("refused", ""),
        "trained_on": ", ".join([*trained_on, *([f"packed as {packing}"] if packing else [])]),
        "sha256": found["sha256"],
    }


def _is_measured(source: _Source) -> bool:
    """Whether the run's results are those of this adapter: they belong to its best one."""
    return bool(source.end) and source.adapter.name == "best"


def _layout(folder: Path) -> str:
    return doors.json_object(folder / pair.CONFIG).get("peft_type", "")


def _dtype(folder: Path) -> str:
    """The number format that the adapter's file is in; fp32 where it has several."""
    path = folder / pair.TENSORS
    if not path.is_file():
        return "fp32"
    found = {about["dtype"] for about in tensorfiles.header(path).values()}
    return _DTYPES.get(found.pop(), "fp32") if len(found) == 1 else "fp32"


def _without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which whatever is a path is only a name."""
    return {
        key: _name(value) if key in ("data", "from") or _is_path(value) else value for key, value in settings.items()
    }


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and (
        value.startswith(("/", "~", "\\\\")) or re.match(r"[A-Za-z]:\\", value) is not None
    )


def _name(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) else value


def _check(place: Path, source: _Source, named: str) -> None:
    """No file may hold a path of this machine, or a text of a row that the run's logs know."""
    paths = [Path.home(), Path.cwd(), source.adapter.resolve(), *([source.run.resolve()] if source.run else [])]
    texts = {str(path) for path in paths} | {str(value) for value in (named, source.start.get("data"))}
    secrets = {text for text in texts if _is_path(text) and len(text) > 3}
    rows = [text for text, _ in source.start.get("example", {}).get("runs", [])]
    if source.run and (source.run / runs.SAMPLES).is_file():
        samples = runs.read_log(source.run / runs.SAMPLES)
        rows += [event[key] for event in samples for key in ("prompt", "reference", "text")]
    # Line by line, and as JSON and TOML write them, which spell line ends and quotes otherwise. What the settings put
    # around every row is no row.
    around = "\n".join(str(source.settings.get(key, "")) for key in ("system", "prompt", "completion"))
    lines = {line.strip() for text in rows for line in text.splitlines() if len(line.strip()) >= _TELLING}
    lines = {line for line in lines if line not in around}
    secrets |= lines | {json.dumps(line, ensure_ascii=False)[1:-1] for line in lines}
    faults = []
    for path in sorted(place.iterdir()):
        content = path.read_bytes()
        faults += [f"{path.name} holds {text[:60]!r}" for text in sorted(secrets) if text.encode() in content]
    if faults:
        raise all_faults("nothing was uploaded, since these would go public with it:", faults)


def _stays(source: _Source, files: Mapping[str, int]) -> tuple[str, ...]:
    beside = source.run or source.adapter
    gone = {*files, source.adapter.name} if source.run else set(files)
    return tuple(sorted(path.name + "/" * path.is_dir() for path in beside.iterdir() if path.name not in gone))


def _in_words(fault: Exception, repo: str, made: bool) -> Exception:
    """A fault of the hub's client as what to do about it; any other as it is."""
    status = getattr(getattr(fault, "response", None), "status_code", None)
    owner = repo.partition("/")[0]
    kind = type(fault).__name__
    again = f"; {repo} was made and is empty: run this again with --update" if made else ""
    if kind == "LocalTokenNotFoundError":
        return LoricaError("this machine has no token of the hub: log in with `hf auth login`, or set HF_TOKEN")
    if status == 401:
        return LoricaError("the hub does not take this machine's token: log in again with `hf auth login`" + again)
    if status == 403:
        return LoricaError(f"this token may not write to {owner}: take one with the write right, of a member" + again)
    if status == 409:
        return LoricaError(f"{repo} is there already: --update adds a version to it, or give another name")
    if status is not None:
        return LoricaError(f"the hub answered {status}: {str(fault).strip().splitlines()[0]}{again}")
    if kind == "OfflineModeIsEnabled":
        return LoricaError("HF_HUB_OFFLINE is set, so the hub's client opens no connection: unset it" + again)
    if isinstance(fault, ConnectionError | TimeoutError) or type(fault).__module__.partition(".")[0] in _NETWORK:
        return LoricaError(f"the hub cannot be reached ({kind}: {fault}); nothing is lost, try again{again}")
    return fault
