"""`lorica VERB THING [THING] [--flags]`: the table of commands, and what becomes of their errors."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from typing import Any

from lorica import __version__
from lorica.errors import LoricaError, nearest, visible

# Verb -> what it does. Its module is `lorica.cli.<verb>`; none is imported before it is asked for.
COMMANDS: dict[str, str] = {
    "quickstart": "fine-tune a real model and see that it worked, in minutes, on a CPU",
    "train": "fine-tune MODEL on DATA",
    "chat": "talk to a model, an adapter or a run; /base toggles the adapter",
    "generate": "answer many prompts: batched, order kept, resumable",
    "eval": "loss and exact match with confidence intervals, side by side",
    "merge": "fold an adapter into its model, verified",
    "compose": "add, subtract, weigh, truncate and merge adapters",
    "serve": "MODEL and many adapters through OpenAI's API, each adapter a model name",
    "convert": "an adapter for llama.cpp, vLLM, MLX, Ollama, loralib, ...: written, read back, compared",
    "show": "what is in this model, adapter, run, or folder of adapters",
    "plan": "will it fit, how long will it take",
    "data": "what the model will see of DATA, loss tokens marked",
    "plot": "curves of one or more runs",
    "push": "an adapter to the hub, with its card; lists every file first",
    "doctor": "this machine, this install",
}
_EXAMPLES = """examples:
  lorica quickstart
  lorica data support.jsonl -m smollm2-135m
  lorica train smollm2-135m support.jsonl -o runs/support
  lorica chat runs/support
  lorica eval runs/support test.jsonl --compare base"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (failed), 2 (wrong use), 130 (stopped by Ctrl-C)."""
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader has gone (| head): nothing is wrong, and Python's own flush at exit would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def usage() -> str:
    """The text of `lorica --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {verb:<{width}}  {what}" for verb, what in COMMANDS.items()]
    everywhere = "everywhere: -c FILE.toml  -o OUT  --json  -q  --dry-run  --debug; lorica COMMAND --help for the rest"
    return "\n".join(["usage: lorica COMMAND THING [THING] [--flags]", "", *lines, "", everywhere, "", _EXAMPLES])


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"lorica {__version__}")
        return 0
    verb, *rest = argv
    if verb not in COMMANDS:
        print(f"error: unknown command {verb!r}{nearest(verb, COMMANDS)}\nsee lorica --help", file=sys.stderr)
        return 2
    try:
        return _run(verb, rest)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as fault:
        if "--debug" in rest:
            raise
        print(f"error: {visible(_told(fault))}", file=sys.stderr)
        return 1


def _run(verb: str, argv: list[str]) -> int:
    from lorica.cli import parse

    module = importlib.import_module(f"lorica.cli.{verb}")
    try:
        settings, sources = parse.parse(module.Settings, argv, f"lorica {verb}")
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if settings.dry_run:
                _show_sources(settings, sources)
                if hasattr(module, "plan"):
                    module.plan(settings)
                return 0
            result: Any = module.run(settings)
    except parse.WrongUse as fault:
        print(f"error: {visible(str(fault))}", file=sys.stderr)
        return 2
    if isinstance(result, dict):
        if settings.json:
            import json

            print(json.dumps(result, indent=2))
        return 0
    return result or 0


def _show_sources(settings: Any, sources: dict[str, str]) -> None:
    values = {name: getattr(settings, name) for name in sources if name not in ("config", "dry_run", "debug")}
    if settings.json:
        import json

        print(json.dumps({name: {"value": value, "from": sources[name]} for name, value in values.items()}, indent=2))
        return
    shown = {name: "-" if value in (None, "", ()) else str(value) for name, value in values.items()}
    widths = [max(map(len, shown)), max(map(len, shown.values()))]
    for name, value in shown.items():
        print(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {sources[name]}")


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning) and not issubclass(category, (FutureWarning, DeprecationWarning)):
        print(f"warning: {visible(str(message))}", file=sys.stderr)


def _told(fault: Exception) -> str:
    if isinstance(fault, LoricaError):
        return str(fault)
    if isinstance(fault, OSError) and fault.strerror:
        return f"{fault.filename or ''}: {fault.strerror}".lstrip(": ")
    return f"{type(fault).__name__}: {fault}\nthis is not your fault: run it again with --debug and report what it says"
