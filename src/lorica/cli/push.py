"""`lorica push X user/name`: an adapter to the model hub, with its card; lists every file first."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tyro

from lorica.cli.parse import Common

if TYPE_CHECKING:
    from lorica.hub import Package


@dataclass(kw_only=True)
class Settings(Common):
    """Put an adapter on the Hugging Face hub: the adapter, a card, the curve and the settings; never rows or paths.

    With -o DIR the files are only written there, to be looked at.
    """

    thing: tyro.conf.Positional[str]
    """A run (its best adapter), or an adapter folder."""
    repo: tyro.conf.Positional[str]
    """Where to: user/name."""
    base: str = ""
    """The base model's name on the hub, where the adapter names a folder or a file."""
    license: str = ""
    """The adapter's licence as the hub calls it: apache-2.0, mit, cc-by-4.0. Without it, the card names none."""
    private: bool = False
    """Readable for you alone; else for everybody."""
    update: bool = False
    """Add a version to a repository that is there."""
    yes: bool = False
    """Upload without asking."""


def plan(settings: Settings) -> None:
    """What would go up; without network or login."""
    from lorica import hub

    with hub.packed(settings.thing, settings.repo, base=settings.base, license=settings.license) as package:
        if not settings.json:
            _list(package, settings.private)


def run(settings: Settings) -> int | dict[str, Any]:
    """List, ask, upload."""
    from lorica import hub
    from lorica.cli.terminal import say
    from lorica.errors import LoricaError

    how: dict[str, Any] = {"base": settings.base, "license": settings.license, "out": settings.out or None}
    with hub.packed(settings.thing, settings.repo, **how) as package:
        if settings.out:
            if not settings.json:
                _list(package, settings.private)
                say(f"written to {settings.out}, not uploaded")
                say(f"next:  {_again(settings)}")
            return _plain(package) | {"written": settings.out} if settings.json else 0
        if not settings.json:
            _list(package, settings.private)
        user = hub.check_login()
        if not settings.yes and not _agreed(user, package.repo, settings):
            raise LoricaError("nothing was uploaded")
        url = hub.push(package, private=settings.private, update=settings.update)
    if settings.json:
        return _plain(package) | {"url": url}
    say(f"uploaded to {url}")
    say(f"next:  lorica chat {settings.repo}")
    return 0


def _list(package: Package, private: bool) -> None:
    from lorica.cli.terminal import say, size, table

    seen = "private" if private else "public"
    say(f"{package.repo}   {seen}   an adapter for {package.base}")
    table(("goes up", "size"), [(name, size(count)) for name, count in package.files.items()])
    say(f"{len(package.files)} files, {size(sum(package.files.values()))}")
    if package.stays:
        say(f"stays here: {', '.join(package.stays)}")


def _agreed(user: str, repo: str, settings: Settings) -> bool:
    from lorica.cli.terminal import console
    from lorica.errors import LoricaError

    if settings.json or not sys.stdin.isatty():
        raise LoricaError("nobody is here to be asked: add --yes to upload these files, or look with --dry-run")
    who = "you alone" if settings.private else "everybody"
    console.print(f"upload these as {user} to {repo}, for {who} to read? [y/N] ", end="", markup=False)
    return input().strip().lower() in ("y", "yes")


def _again(settings: Settings) -> str:
    words = ["lorica", "push", settings.thing, settings.repo]
    for name in ("base", "license"):
        if value := getattr(settings, name):
            words += [f"--{name}", value]
    return shlex.join(words + ["--private"] * settings.private)


def _plain(package: Package) -> dict[str, Any]:
    return {
        "repo": package.repo,
        "base": package.base,
        "files": dict(package.files),
        "bytes": sum(package.files.values()),
        "stays": list(package.stays),
    }
