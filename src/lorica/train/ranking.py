"""Which of several trainings to go on with: a table best first, a choice that is explained, pictures.

All members are measured on the same rows, so their differences are far surer than their losses: the interval of a
difference redraws rows for both at once.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica import __version__, evaluate
from lorica.errors import LoricaError
from lorica.files import write_atomic
from lorica.train import curve
from lorica.train.member import Member
from lorica.train.settings import TrainSettings

# A difference that is not sure and costs less than this share of what training gained is no reason to choose.
TIE = 0.05


@dataclass(frozen=True)
class Row:
    """What became of one member.

    Attributes:
        swept: its values of the settings in which the members differ.
        trainable: parameters.
        before, after, last: held-out loss of the base, at the best step and at the last measurement.
        best_step, steps, planned: the best update, updates made, updates intended.
        worse: how much its loss is above the best member's; None for that one and on other rows.
        fault: why it was taken out; empty if it was not.
    """

    name: str
    swept: Mapping[str, Any]
    lr: float
    trainable: int
    before: float | None
    after: float | None
    last: float | None
    best_step: int
    steps: int
    planned: int
    worse: evaluate.Difference | None = None
    fault: str = ""

    @property
    def stable(self) -> bool:
        """Whether it ran to where it is without a fault, and is better than the base now."""
        return not self.fault and self.last is not None and self.before is not None and self.last < self.before


def differing(members: Mapping[str, TrainSettings]) -> dict[str, dict[str, Any]]:
    """The settings in which members differ, with each member's values."""
    values = {name: {key: getattr(each, key) for key in _FIELDS} for name, each in members.items()}
    first = next(iter(values.values()))
    keys = [key for key in _FIELDS if any(each[key] != first[key] for each in values.values())]
    return {name: {key: each[key] for key in keys} for name, each in values.items()}


_FIELDS = [field.name for field in dataclasses.fields(TrainSettings)]


def ranked(members: Sequence[Member], given: Mapping[str, TrainSettings]) -> list[Row]:
    """The members, lowest held-out loss first; those that were taken out or never measured at the end."""

    def place(member: Member) -> tuple:
        loss = member.here.best
        known = loss is not None and math.isfinite(loss)
        return bool(member.fault), not known, loss if known else 0.0

    ordered = sorted(members, key=place)
    best, swept = ordered[0], differing(given)
    rows = []
    for member in ordered:
        here = member.here
        assert member.settings.lr is not None, "settings are resolved before a member"
        worse = None
        if (
            member is not best
            and here.best is not None
            and best.here.best is not None
            and member.rows
            and (member.data is best.data)
        ):
            (a, counts), (b, _) = (zip(*each.rows, strict=True) for each in (member, best))
            worse = evaluate.paired(a, b, counts, counts)
        rows.append(
            Row(
                name=member.name,
                swept=swept[member.name],
                lr=member.settings.lr,
                trainable=member.facts["trainable"],
                before=here.before,
                after=here.best,
                last=member.last,
                best_step=here.best_step,
                steps=here.step,
                planned=member.steps,
                worse=worse,
                fault=member.fault,
            )
        )
    return rows


def pick(rows: Sequence[Row]) -> tuple[str, str]:
    """The member to go on with and why; an empty name where none can be told.

    The lowest held-out loss among the stable ones; of those that are not surely worse, and by less than a twentieth
    of what training gained, the one with fewer parameters, then the one with the lower rate.
    """
    stable = [row for row in rows if row.stable and row.after is not None]
    if not stable:
        if all(row.before is None for row in rows):
            return "", "none can be told: nothing was held out to measure on"
        return "", "none can be told: no member is better than the base"
    best = stable[0]
    if len(stable) > 1 and any(row.worse is None for row in stable[1:]):
        return "", "none can be told: the members were measured on different rows"
    assert best.before is not None and best.after is not None
    gain = best.before - best.after
    ties = [best, *(row for row in stable[1:] if _tied(row, best, gain))]
    chosen = min(ties, key=lambda row: (row.trainable, row.lr))
    lowest = f"the lowest held-out loss, {best.after:.4f} (base {best.before:.4f})"
    if chosen is best:
        why = f"{lowest}, and nothing as good is smaller" if len(ties) > 1 else lowest
    else:
        virtue = "fewer parameters" if chosen.trainable < best.trainable else "the lower rate"
        why = f"{chosen.after:.4f}, within noise of {lowest}, that of {best.name}, with {virtue}"
    return chosen.name, why + _edge(chosen, rows)


def _tied(row: Row, best: Row, gain: float) -> bool:
    """Whether a member is as good as the best for all that is known."""
    assert row.after is not None and best.after is not None
    unsure = row.worse is not None and row.worse.low <= 0
    return unsure and row.after - best.after <= TIE * gain


def _edge(chosen: Row, rows: Sequence[Row]) -> str:
    """A warning where the best rate may lie beyond those that were tried."""
    rates = sorted({row.lr for row in rows})
    if len(rates) < 3 or chosen.lr not in (rates[0], rates[-1]):
        return ""
    return f"; {chosen.lr:g} is the {'lowest' if chosen.lr == rates[0] else 'highest'} rate tried, so look beyond it"


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table, its head first: best member on top."""
    found = [["member", "held out", "to the best", "95 %", "trained", "lr", "best step", ""]]
    for row in rows:
        worse = [f"{row.worse.mean:+.4f}", f"{row.worse.low:+.4f} to {row.worse.high:+.4f}"] if row.worse else ["", ""]
        loss = "-" if row.after is None else f"{row.after:.4f}"
        step = f"{row.best_step:,} of {row.planned:,}"
        found.append([row.name, loss, *worse, f"{row.trainable:,}", f"{row.lr:g}", step, _remark(row)])
    return found


def _remark(row: Row) -> str:
    if row.fault:
        return f"taken out: {row.fault.splitlines()[0].split(',')[0]}"
    if row.before is not None and not row.stable:
        return "not better than the base"
    return "" if row.steps == row.planned else f"ended after step {row.steps:,}"


def write(path: Path, rows: Sequence[Row], picked: str, why: str, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Write sweep.json, README.md and the pictures of a sweep; returns notes on what could not be.

    `facts` are the model, the data, the forecast (`Forecast.facts`), and seconds, tokens and peak memory as measured.
    """
    notes = []
    trained = [path / row.name for row in rows if row.steps]
    try:
        if trained:
            curve.draw(trained, path / "curves.png")
            draw(rows, path / "ranking.png")
    except LoricaError as missing:
        notes.append(f"no pictures: {missing}")
    about = {"kind": "sweep", "lorica": __version__} | dict(facts) | {"pick": picked, "why": why}
    about["members"] = [dataclasses.asdict(row) | {"path": row.name} for row in rows]
    for each, row in zip(about["members"], rows, strict=True):
        each["worse"] = row.worse._asdict() if row.worse else None
    write_atomic(path / "README.md", _page(path.name, rows, picked, why, _spent(facts), bool(trained) and not notes))
    write_atomic(path / "sweep.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return tuple(notes)


def _spent(facts: Mapping[str, Any]) -> str:
    """What the sweep took, and what was planned."""
    planned = f", {facts['predicted_bytes'] / 1e9:.1f} GB planned" if facts["predicted_bytes"] else ""
    peak = f"at most {facts['peak_rss_bytes'] / 1e9:.1f} GB of resident memory{planned}"
    return f"{facts['tokens']:,} tokens in {facts['seconds']:,.0f} s, {peak}."


def _page(name: str, rows: Sequence[Row], picked: str, why: str, spent: str, drawn: bool) -> str:
    head, *body = cells(rows)
    lines = ["| " + " | ".join(line) + " |" for line in (head, ["---", *["--:"] * (len(head) - 1)], *body)]
    chosen = f"`{picked}`: {why}." if picked else f"{why[:1].upper()}{why[1:]}."
    parts = [f"# {name}", f"{len(rows)} adapters trained in one pass on one base: {spent}", chosen, "\n".join(lines)]
    if drawn:
        parts += ["![held-out loss against the settings](ranking.png)", "![loss while training](curves.png)"]
    return "\n\n".join(parts) + "\n"


def draw(rows: Sequence[Row], out: Path) -> None:
    """Held-out loss against the setting that was swept, a line for each combination of the others."""
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise LoricaError('pictures need matplotlib: pip install "lorica[plot]"') from missing
    shown = [row for row in rows if row.after is not None and math.isfinite(row.after)]
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    key = _axis(rows)
    values = [row.swept.get(key, row.name) for row in shown]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    order: list[Any] = sorted(set(values)) if numbers else list(dict.fromkeys(map(str, values)))
    lines: dict[str, list[tuple[Any, float]]] = {}
    for row, value in zip(shown, values, strict=True):
        others = " ".join(f"{name}={_short(each)}" for name, each in row.swept.items() if name != key)
        label = others if key in row.swept else "held out"
        assert row.after is not None
        lines.setdefault(label, []).append((value if numbers else order.index(str(value)), row.after))
    for place, (label, points) in enumerate(lines.items()):
        points.sort()
        colour = curve.COLOURS[place % len(curve.COLOURS)]
        style = curve.STYLES[place // len(curve.COLOURS) % len(curve.STYLES)] if key in rows[0].swept else ""
        mark: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.8, "linestyle": style, "label": label}
        axes.plot(*zip(*points, strict=True), color=colour, **mark)
    if shown and shown[0].before is not None:
        axes.axhline(shown[0].before, color="#999999", linewidth=0.9, linestyle="--", label="base")
    if numbers and order and order[0] > 0 and order[-1] >= 4 * order[0]:
        axes.set_xscale("log")
    if order and (not numbers or len(order) <= 10):
        names = [_short(value) for value in order]
        slant: dict[str, Any] = {"rotation": 30, "ha": "right"} if sum(map(len, names)) > 60 else {}
        axes.set_xticks(order if numbers else range(len(order)), names, **slant)
        axes.minorticks_off()
    axes.set(xlabel=key, ylabel="held-out loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    if any(lines):
        axes.legend(frameon=False, fontsize=9 if len(lines) <= 6 else 7)
    picture = io.BytesIO()
    figure.savefig(picture, format=out.suffix[1:])
    write_atomic(out, picture.getvalue())


def _axis(rows: Sequence[Row]) -> str:
    """The setting along the axis: the rate, else the one with most values; the members where they are no grid."""
    keys = list(rows[0].swept)
    values = {key: len({str(row.swept[key]) for row in rows}) for key in keys}
    # In a grid the numbers of values multiply to that of the members.
    if not keys or math.prod(values.values()) > len(rows):
        return "member"
    return "lr" if "lr" in keys else max(keys, key=values.__getitem__)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
