"""`lorica chat X`: talk to a model here or on a server; `/base` takes the adapter off and puts it on again."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lorica.cli.eval import trained_with
from lorica.cli.parse import Common, WrongUse

if TYPE_CHECKING:
    from lorica.evaluate import Judgement, Talk

HELP = {
    "/base": "let the base model answer instead of the adapter, or the adapter again",
    "/retry": "answer the last message again: by the other model after /base, else differently",
    "/system TEXT": "set the system prompt; without TEXT take it away",
    "/save FILE": "add the talk to FILE.jsonl as a row to train on",
    "/reset": "forget what was said",
    "/help": "this list (to send a message that starts with /, begin it with a space)",
    "/quit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}


@dataclass(kw_only=True)
class Settings(Common):
    """Talk to X; a classifier or regressor judges each line. Answers go to stdout, all else to stderr; where stdin is
    no terminal, each of its lines is a message. -o FILE adds the talk to FILE at the end, as a row to train on."""

    x: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="X")]
    """A model, an adapter or a run; or the address of a server (http://localhost:8000/v1), whose API key, if it wants
    one, is read from the environment variable LORICA_API_KEY."""
    model: str = ""
    """Which of a server's models. Default: its first adapter."""
    prompt: str = ""
    """Answer this one message and end."""
    system: str = ""
    """The system prompt. Default: the one that run X was trained with, if it is a run."""
    base: bool = False
    """Begin with the base model instead of the adapter."""
    max_new: int = 512
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest tokens; above, tokens are drawn."""
    seed: int = 0
    """Seed of the drawing."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the base: auto is bf16 where the device computes it natively, else fp32."""
    quantize: Literal["auto", "none", "nf4", "int8"] = "auto"
    """How the base's linear layers are kept: auto is as an adapter was trained."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""


def run(settings: Settings) -> int | dict[str, Any]:
    """Answer until there is nothing more to answer."""
    if settings.max_new < 1 or settings.temperature < 0:
        raise WrongUse("--max-new must be 1 or more, --temperature 0 or more")
    served = settings.x.startswith(("http://", "https://"))
    talk = (_served if served else _opened)(
        settings,
        system=settings.system or ("" if served else trained_with(settings.x).get("system", "")),
        max_new=settings.max_new,
        temperature=settings.temperature,
        seed=settings.seed,
    )
    if settings.base:
        talk.toggle()
    chat = _Chat(settings, talk)
    if settings.prompt:
        chat.answer(talk.ask(settings.prompt))
    else:
        chat.loop()
    if settings.out:
        chat.command(f"/save {settings.out}")
    if settings.json:
        return {"turns": chat.turns}
    if not served:
        follow = "DATA --compare base" if talk.adapted else "DATA"
        chat.note(f"next:  lorica eval {settings.x} {follow}")
    return 0


def _opened(settings: Settings, **how: Any) -> Talk | Judgement:
    from lorica import models
    from lorica.cli.terminal import progress
    from lorica.tasks import task_of

    if settings.model:
        raise WrongUse("--model is for the address of a server")
    with progress(settings.quiet or settings.json) as tell:
        kept = {"dtype": settings.dtype, "device": settings.device, "quantize": settings.quantize}
        opened = models.open_thing(settings.x, progress=tell, **kept)
    return task_of(opened.model).talk(opened.model, opened.tok, **how)


def _served(settings: Settings, **how: Any) -> Talk:
    from lorica.evaluate import Talk
    from lorica.serve.client import Remote

    return Talk(Remote(settings.x, settings.model), **how)


class _Chat:
    """The terminal's side of a talk."""

    def __init__(self, settings: Settings, talk: Talk | Judgement) -> None:
        self.settings, self.talk = settings, talk
        self.turns: list[dict[str, str]] = []
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()

    def loop(self) -> None:
        """Messages and commands until they end. What cannot be done is said, and the talk goes on."""
        from lorica.errors import LoricaError

        if self.talk.hint:
            self.note(self.talk.hint)
        self.note(f"{self.who()} answers; /help lists the commands")
        for line in self.messages():
            try:
                if line.startswith("/"):
                    if line.split()[0] in ("/quit", "/exit"):
                        return
                    self.command(line)
                elif line.strip():
                    self.answer(self.talk.ask(line.strip()))
            except LoricaError as fault:
                self.fault(str(fault))

    def messages(self) -> Iterator[str]:
        """Lines of stdin, asked for on a terminal."""
        if not self.interactive:
            yield from (line.rstrip("\n") for line in sys.stdin)
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() edits lines and recalls them once it is imported)
        while True:
            try:
                line = input("> ")
            except EOFError:
                print(file=sys.stderr)
                return
            yield line

    def command(self, line: str) -> None:
        """Do what a line that starts with a slash says."""
        from lorica.errors import nearest

        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/base":
            self.talk.toggle()
            self.note(f"{self.who()} answers")
        elif name == "/retry":
            self.answer(self.talk.retry())
        elif name == "/system":
            self.talk.instruct(rest)
            self.note("system prompt set" if rest else "no system prompt")
        elif name == "/save":
            self.save(rest)
        elif name == "/reset":
            self.talk.reset()
            self.note("forgotten")
        elif name == "/help":
            width = max(map(len, HELP))
            self.note("\n".join(f"{usage:<{width}}  {what}" for usage, what in HELP.items()))
        else:
            known = [usage.split()[0] for usage in HELP]
            self.fault(f"unknown command {name}{nearest(name, known).replace(chr(39), '')} (/help lists them)")

    def answer(self, pieces: Iterator[str]) -> None:
        """Print an answer as it comes, after the name of who gives it. Ctrl-C stops the answer alone."""
        by, said, begun = self.who(), "", False
        try:
            with contextlib.closing(pieces):  # type: ignore[type-var]
                for piece in itertools.chain(pieces, [""]):
                    if not begun and not self.settings.json:
                        self.note(f"{by}: ", end="")
                    begun, said = True, said + piece
                    self.show(piece)
        except KeyboardInterrupt:
            if not self.interactive or self.settings.prompt:
                raise
            self.note(" (stopped)", end="")
        if said or begun:
            self.show("\n")
            self.turns.append({"prompt": self.talk.messages[-2]["content"], "answer": said, "by": by})

    def show(self, text: str) -> None:
        """A part of an answer on stdout; on a terminal without what a terminal would obey."""
        if self.settings.json:
            return
        if sys.stdout.isatty():
            text = "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text)
        print(text, end="", flush=True)

    def save(self, name: str) -> None:
        """Add the talk to a file of rows."""
        from lorica.doors import place
        from lorica.errors import LoricaError
        from lorica.files import write_atomic

        if not name:
            raise LoricaError("/save needs the name of a file: /save talks.jsonl")
        path = place(name)
        path = path if path.suffix else path.with_suffix(".jsonl")
        before = path.read_bytes() if path.exists() else b""
        row = json.dumps(self.talk.row(), ensure_ascii=False).encode()
        write_atomic(path, before + (b"\n" if before and not before.endswith(b"\n") else b"") + row + b"\n")
        self.note(f"added to {path}: a row to train on")

    def who(self) -> str:
        """Who answers: an adapter, the model under it, or a model that has none."""
        return "tuned" if self.talk.tuned else "base" if self.talk.adapted else "model"

    def note(self, text: str, end: str = "\n") -> None:
        """What is not an answer, on stderr."""
        if not self.settings.quiet:
            print(text, end=end, file=sys.stderr, flush=True)

    def fault(self, text: str) -> None:
        """What went wrong, on stderr, quiet or not."""
        print(f"error: {text}", file=sys.stderr, flush=True)
