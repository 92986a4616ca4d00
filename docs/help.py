"""Write docs/commands.md from what every command's --help prints: `python docs/help.py`."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "commands.md"
HEAD = """# Commands

Written by `python docs/help.py` from what `lorica COMMAND --help` prints.
"""


def page() -> str:
    """The whole page; at a fixed width and without colours, whatever the terminal."""
    from lorica.cli.main import COMMANDS

    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    parts = [HEAD, f"```text\n{_said(['--help'])}\n```"]
    parts += [f"## lorica {verb}\n\n```text\n{_said([verb, '--help'])}\n```" for verb in COMMANDS]
    return "\n".join([parts[0], "\n\n".join(parts[1:]), ""])


def _said(argv: list[str]) -> str:
    from lorica.cli.main import main

    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        main(argv)
    if not told.getvalue().strip():  # the fault is on stderr
        sys.exit(f"lorica {' '.join(argv)} printed nothing")
    return "\n".join(line.rstrip() for line in told.getvalue().strip().splitlines())


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.is_file() and PAGE.read_text() == text else "docs/commands.md is stale: python docs/help.py")
    PAGE.write_text(text)
