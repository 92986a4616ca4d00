"""Importing costs little, needs little, and does nothing."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
EXTRAS = (
    "datasets", "pyarrow", "pandas", "matplotlib", "peft", "bitsandbytes", "hypothesis", "pytest", "scipy",
    "starlette", "uvicorn", "pydantic", "prometheus_client", "openai",
)  # fmt: skip


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SOURCE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_takes_under_0_3_seconds_of_cpu():
    taken = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "lorica", "--help"], capture_output=True, cwd=SOURCE, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) < 0.3


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["data", "--help"], ["quickstart", "--help"]])
def test_help_does_not_import_torch(arguments):
    code = f"""
import sys
from lorica.cli.main import main
try:
    main({arguments!r})
except SystemExit:
    pass
import json; print(json.dumps(sorted(set(sys.modules) & {{"torch", "transformers", "numpy"}})))
"""
    assert json.loads(python(code).splitlines()[-1]) == []


def test_every_module_imports_with_the_base_dependencies_only():
    code = f"""
import importlib, pkgutil
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def without(name, path=None, target=None):
    return None if name.split(".")[0] in {EXTRAS!r} else find(name, path, target)
PathFinder.find_spec = staticmethod(without)
import lorica
walk = pkgutil.walk_packages(lorica.__path__, "lorica.", onerror=lambda name: print("refused", name))
names = [found.name for found in walk if "__main__" not in found.name]
for name in names:
    if name not in ("lorica.serve.http", "lorica.kernels.jit"):  # Triton comes with a torch that has CUDA
        importlib.import_module(name)
print(len(names))
try:
    importlib.import_module("lorica.serve.http")
except lorica.LoricaError as fault:
    print(fault)
"""
    refused, count, told = python(code).splitlines()
    assert refused == "refused lorica.serve.http"  # the one package that is an extra as a whole
    assert int(count) > 40
    assert 'pip install "lorica[serve]"' in told


def test_importing_opens_no_connection_and_sets_up_no_logging():
    code = """
import logging, socket, warnings
def refused(*args, **kwargs):
    raise AssertionError("a connection was opened")
socket.socket.connect = refused
before = (list(logging.getLogger().handlers), logging.getLogger().level, list(warnings.filters))
import lorica
for name in lorica.__all__:
    getattr(lorica, name)
print((list(logging.getLogger().handlers), logging.getLogger().level) == before[:2])
"""
    assert python(code).strip() == "True"


def test_the_public_names_are_there():
    import lorica

    assert {"inject", "merge", "unmerge", "Adapter", "LoRA", "load", "train", "TrainSettings"} <= set(dir(lorica))
    assert all(getattr(lorica, name) is not None for name in lorica.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lorica.nothing
