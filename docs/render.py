"""Run `lorica quickstart` and write what it prints, and its curve, into README: `python docs/render.py`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lorica", "quickstart", "-o", "runs/quickstart"]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            print(done.stdout)
            return done.returncode
        shutil.copy(Path(folder, "runs/quickstart/curve.png"), HERE / "quickstart.png")
    shown = f"```text\n$ lorica quickstart -o runs/quickstart\n{done.stdout.rstrip()}\n```"
    block = f"<!-- quickstart -->\n{shown}\n<!-- /quickstart -->"
    text = README.read_text()
    README.write_text(re.sub("<!-- quickstart -->.*<!-- /quickstart -->", lambda _: block, text, flags=re.DOTALL))
    print(done.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
