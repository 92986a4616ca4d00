"""`lorica plan --params paper`: the paper's parameter counts, each beside its formula and the injected model."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lorica.counts import Checked


def show(as_object: bool) -> int | dict[str, Any]:
    """Print the table and the reasons, or return all of it; 1 where a row and the code do not agree."""
    from lorica import counts
    from lorica.cli.terminal import say, table

    found, titles = counts.paper(), counts.titles()
    marks = Counter(each.mark for each in found)
    if as_object:
        return {"rows": [_plain(each, titles) for each in found], "marks": dict(marks)}
    reasons = list(dict.fromkeys(each.why for each in found if each.why))
    head = ("table", "method", "model", "settings", "printed", "formula", "counted", "mark", "why")
    table(head, [_row(each, titles, reasons) for each in found], left=4)
    say()
    for number, reason in enumerate(reasons, 1):
        say(f"{number:>3}  {reason}")
    cut = sum(each.mark == "ok" and each.digits == "cut" for each in found)
    methods = sorted({each.row.method for each in found if each.counted is None})
    say()
    say(f"by formula alone: {', '.join(methods)}")
    say(f"ok is to the printed digit; {cut} of them are cut off there and not rounded")
    say(", ".join(f"{marks[mark]} {mark}{'s' * (mark == 'misprint')}" for mark in _order(marks)))
    say("next:  lorica plan gpt3-175b --targets qv --rank 4")
    return 1 if marks["differs"] else 0


def _order(marks: Counter[str]) -> list[str]:
    return ["ok", "misprint", "nominal", *(["differs"] if marks["differs"] else [])]


def _row(each: Checked, titles: dict[str, str], reasons: list[str]) -> tuple[str, ...]:
    row = each.row
    counted = "by formula" if each.counted is None else f"{each.counted:,}"
    why = str(reasons.index(each.why) + 1) if each.why else ""
    model = titles[row.model]
    return row.table, row.method, model, row.settings, row.printed, f"{each.formula:,}", counted, each.mark, why


def _plain(each: Checked, titles: dict[str, str]) -> dict[str, Any]:
    row = each.row
    return {
        "table": row.table,
        "method": row.method,
        "model": titles[row.model],
        "settings": row.settings,
        "printed": row.printed,
        "formula": each.formula,
        "counted": each.counted,
        "digits": each.digits,
        "mark": each.mark,
        "why": each.why,
    }
