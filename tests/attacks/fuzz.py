"""Reads many damaged files of every kind and counts what comes of each: a clear error, or content that is sound.

    python tests/attacks/fuzz.py --files 100000            # a table; exit status 1 on any crash, hang or excess
    python tests/attacks/fuzz.py --kind rows.csv --only 17 # one file again, with its traceback

File i of a kind follows from `--seed`, the kind and i alone. Workers are forked with all imports made; each is held to
512 MB above what it began with, each file to two seconds of its time, and one that dies is counted and replaced.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "tests" / "models")]
SECONDS, MEMORY = 2.0, 512 << 20


class Hang(BaseException):
    """A file took longer than it may."""


def one(bench: Any, seed: str) -> tuple[str, str]:
    """What came of a file: `error`, `accepted`, or `crash` or `hang` with what was seen."""
    from lorica import LoricaError

    path = bench.damaged(seed)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        bench.kind.read(path)
        return "accepted", ""
    except LoricaError as fault:
        return "error", "" if len(str(fault)) < 20_000 else "its message is too long"
    except Hang:
        return "hang", "".join(traceback.format_exc().splitlines(keepends=True)[-3:])
    except BaseException as fault:  # whatever a file brings about is what is looked for
        where = [f"{Path(each.filename).name}:{each.lineno}" for each in traceback.extract_tb(fault.__traceback__)]
        return "crash", f"{type(fault).__name__}: {str(fault)[:160]!r} at {' < '.join(where[:-5:-1])}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def work(name: str, files: range, seed: int, told: int, at: mmap.mmap) -> None:
    """In a worker: read each file and write what came of it as a line to `told`."""
    from attacks.kinds import KINDS, Bench

    def late(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, late)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, os.fdopen(told, "w") as out:
        bench = Bench(KINDS[name], Path(folder))
        one(bench, "warm")
        gc.collect()
        held = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY,) * 2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in files:
            at[:8] = struct.pack("<Q", number)
            began = time.process_time()
            came, why = one(bench, f"{seed}:{name}:{number}")
            print(json.dumps([number, came, why, time.process_time() - began]), file=out, flush=came == "crash")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps(["grown", grown * 1024]), file=out)


def watched(name: str, files: range, seed: int) -> dict[str, Any]:
    """Read `files` of a kind in workers, one after the other; the next takes over where one died."""
    found: dict[str, Any] = {"files": 0, "error": 0, "accepted": 0, "slowest": 0.0, "grown": 0, "faults": []}
    left = files
    while left:
        with mmap.mmap(-1, 8) as at:
            inlet, outlet = os.pipe()
            child = os.fork()
            if not child:
                os.close(inlet)
                try:
                    work(name, left, seed, outlet, at)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            os.close(outlet)
            with os.fdopen(inlet) as lines:
                for line in lines:
                    take(found, line)
            _, status = os.waitpid(child, 0)
            if not status:
                return found
            (number,) = struct.unpack("<Q", at[:8])
        found["faults"].append([number, "crash", f"the worker ended with status {status}"])
        left = range(number + 1, files.stop)
    return found


def take(found: dict[str, Any], line: str) -> None:
    """Add a line of a worker to what is known of its kind."""
    number, *rest = json.loads(line)
    if number == "grown":
        found["grown"] = max(found["grown"], rest[0])
        return
    came, why, seconds = rest
    found["files"] += 1
    found["slowest"] = max(found["slowest"], seconds)
    if came in ("error", "accepted"):
        found[came] += 1
    if why:
        found["faults"].append([number, came, why])


def main() -> int:
    """Run, print, and say by the exit status whether anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000, help="over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="", help="only this kind")
    parser.add_argument("--only", type=int, default=None, help="only this file of it, in this process")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()

    import torch

    from attacks.kinds import KINDS, Bench

    torch.set_num_threads(1)
    if asked.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(KINDS[asked.kind], Path(folder))
            path = bench.damaged(f"{asked.seed}:{asked.kind}:{asked.only}")
            print(repr((path / bench.kind.file).read_bytes()[:4000]))
            bench.kind.read(path)
        return 0
    kinds = {name: kind for name, kind in KINDS.items() if asked.kind in ("", name)}
    shares = sum(kind.share for kind in kinds.values())
    results: dict[str, dict[str, Any]] = {}
    head = ("files", "clear error", "accepted", "slowest ms", "memory MB", "faults")
    if not asked.json:
        print(f"{'kind':<18}" + "".join(f"{word:>12}" for word in head))
    for name, kind in kinds.items():
        began = time.perf_counter()
        found = watched(name, range(round(asked.files * kind.share / shares)), asked.seed)
        results[name] = found | {"seconds": round(time.perf_counter() - began, 1)}
        if not asked.json:
            numbers = (found["files"], found["error"], found["accepted"], round(found["slowest"] * 1e3))
            cells = (*numbers, round(found["grown"] / 1e6), len(found["faults"]))
            print(f"{name:<18}" + "".join(f"{cell:>12,}" for cell in cells), flush=True)
            seen: dict[str, int] = {}
            for number, came, why in found["faults"]:
                seen[why] = seen.get(why, 0) + 1
                if seen[why] == 1:
                    print(f"    {came} at --kind {name!r} --only {number}: {why}")
    faults = sum(len(found["faults"]) for found in results.values())
    large = [name for name, found in results.items() if found["grown"] > MEMORY]
    if asked.json:
        print(json.dumps({"seed": asked.seed, "kinds": results, "faults": faults, "over memory": large}, indent=2))
    else:
        total = sum(found["files"] for found in results.values())
        seconds = sum(found["seconds"] for found in results.values())
        print(f"{total:,} files in {seconds:,.0f} s, {faults} faults")
    return 1 if faults or large else 0


if __name__ == "__main__":
    sys.exit(main())
