"""Rows -> token ids with a loss mask, and a report of what the model will see.

The ranges of `mask` are characters; here they become tokens. A range starts where the tokens of everything before it
end, checked by tokenising that part by itself: it is exactly what the model is given when it generates. Where that
part has other tokens by itself than in the whole (a token would join both sides, or line breaks group otherwise), the
text is tokenised in parts, so that training sees what generation will; if that changes the text (some tokenizers add a
space to every part), the tokens from the first difference on count as learnt.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorica.data.mask import Piece, closers, pieces, shared
from lorica.data.records import Record
from lorica.data.shapes import shorten
from lorica.data.template import bos_ids, text_ids
from lorica.errors import LoricaError, all_faults

CHUNK = 1000


@dataclass(frozen=True)
class Example:
    """One training sequence. `loss[i]`: token i is to be predicted; never the first, which nothing precedes."""

    ids: list[int]
    loss: list[bool]
    where: str = ""

    @property
    def labels(self) -> int:
        """How many of its tokens are predicted. The first never is, whatever its mark."""
        return sum(self.loss[1:])

    @property
    def content(self) -> str:
        """All that a training sees of it."""
        return repr((self.ids, [int(flag) for flag in self.loss]))


@dataclass
class EncodeReport:
    """What became of the rows. Lengths are in tokens, before cutting; `tokens` and `learnt` count what is kept.

    `cut`: rows longer than `max_len`, cut on the right; `dropped`: such rows with nothing to learn left of the cut.
    `silent`: rows in which nothing is to be learnt. `joined`: texts with a boundary where tokens differ.
    `rewritten`: rows whose template rewrites earlier turns, so that they give several examples. `notes`: all in words.
    """

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    learnt: int = 0
    median: int = 0
    p95: int = 0
    longest: int = 0
    cut: int = 0
    dropped: int = 0
    silent: int = 0
    joined: int = 0
    rewritten: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def loss_share(self) -> float:
        """The share of the tokens that are to be predicted, 0 to 1."""
        return self.learnt / self.tokens if self.tokens else 0.0


@dataclass
class Encoded:
    """Examples in the order of their rows, and the report."""

    examples: list[Example]
    report: EncodeReport


def encode(rows: Sequence[Record], tok: Any, max_len: int = 2048) -> Encoded:
    """Tokenise rows of any kind for training. A row whose template rewrites history may give several examples.

    LoricaError, all rows at once, where the template refuses rows, and where nothing at all would be learnt.
    """
    if max_len < 2:
        raise LoricaError(f"the largest length is {max_len} tokens; it must be at least 2")
    closing = closers(tok)
    report = EncodeReport(rows=len(rows))
    texts: list[Piece] = []
    faults: list[str] = []
    for row in rows:
        try:
            found = pieces(row, tok, closing)
        except LoricaError as error:
            faults.append(str(error))
            continue
        report.silent += not found
        report.rewritten += len(found) > 1
        texts += found
    if faults:
        raise all_faults(f"{len(faults):,} of {len(rows):,} rows cannot be written for this model:", shorten(faults))
    whole = [example for some in _batches(texts) for example in _tokenised(some, tok, report)]
    examples = _shortened(whole, max_len, report)
    _describe(texts, whole, max_len, tok, report)
    report.examples, report.tokens = len(examples), sum(len(example.ids) for example in examples)
    report.learnt = sum(sum(example.loss) for example in examples)
    if not examples:
        raise _nothing_learnt(whole, tok, max_len, report)
    return Encoded(examples, report)


def marked(example: Example, tok: Any) -> list[tuple[str, bool]]:
    """The example as text in runs: `(text, learnt)`, alternating; joined they are the decoded whole."""
    runs, shown, place = [], "", 0
    for learnt, group in itertools.groupby(example.loss):
        place += len(list(group))
        text = tok.decode(example.ids[:place], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        runs.append((text[len(shown) :], learnt))
        shown = text
    return runs


def _batches(texts: list[Piece]) -> Iterator[list[Piece]]:
    return (texts[i : i + CHUNK] for i in range(0, len(texts), CHUNK))


def _tokenised(batch: list[Piece], tok: Any, report: EncodeReport) -> Iterator[Example]:
    """One example per piece. All texts, and all the parts of them before a boundary, are tokenised in two calls."""
    bos, eos = bos_ids(tok), tok.eos_token_id
    inner = [[cut for span in piece.spans for cut in span if cut < len(piece.text)] for piece in batch]
    bodies = text_ids([piece.text for piece in batch], tok)
    heads = iter(text_ids([piece.text[:cut] for piece, cuts in zip(batch, inner, strict=True) for cut in cuts], tok))
    for piece, body, cuts in zip(batch, bodies, inner, strict=True):
        ids, marks = _boundaries(piece.text, body, cuts, [next(heads) for _ in cuts], tok, report)
        at = {**dict(zip(cuts, marks, strict=True)), len(piece.text): len(ids)}
        loss = [False] * len(ids)
        for start, end in piece.spans:
            loss[at[start] : at[end]] = [True] * (at[end] - at[start])
        if piece.plain:
            closing = [eos] if eos is not None and ids[-1:] != [eos] else []
            ids, loss = bos + ids + closing, [False] * len(bos) + loss + [True] * len(closing)
        yield Example(ids, [False, *loss[1:]], piece.where)


def _boundaries(
    text: str, ids: list[int], cuts: list[int], heads: list[list[int]], tok: Any, report: EncodeReport
) -> tuple[list[int], list[int]]:
    """The ids of `text`, and how many of them stand before each of `cuts`; `heads` are the ids of `text[:cut]`."""
    if all(ids[: len(head)] == head for head in heads):
        return ids, [len(head) for head in heads]
    report.joined += 1
    parts = text_ids([text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])], tok)
    together = [token for part in parts for token in part]
    if tok.decode(together) == tok.decode(ids):
        return together, list(itertools.accumulate(len(part) for part in parts[:-1]))
    return ids, [shared(ids, head) for head in heads]


def _shortened(whole: list[Example], max_len: int, report: EncodeReport) -> list[Example]:
    kept = []
    for example in whole:
        short = Example(example.ids[:max_len], example.loss[:max_len], example.where)
        if any(short.loss):
            report.cut += len(example.ids) > max_len
            kept.append(short)
        elif any(example.loss):
            report.dropped += 1
        else:
            report.silent += 1
    return kept


def _describe(texts: list[Piece], whole: list[Example], max_len: int, tok: Any, report: EncodeReport) -> None:
    """Lengths, and in words what a person should know before training on this."""
    lengths = sorted(len(example.ids) for example in whole)
    if lengths:
        report.median, report.longest = lengths[len(lengths) // 2], lengths[-1]
        report.p95 = lengths[math.ceil(0.95 * len(lengths)) - 1]
    over = [example.where for example in whole if len(example.ids) > max_len]
    parted, unclosed = ([piece.where for piece in texts if getattr(piece, name)] for name in ("parted", "unclosed"))
    eos_missing = tok.eos_token_id is None and any(piece.plain for piece in texts)
    fate = f"{report.cut:,} cut on the right, {report.dropped:,} dropped (no answer left)"
    lines = (
        (over, f"over {max_len:,} tokens: {fate}"),
        (report.silent, f"{report.silent:,} with nothing to learn, left out"),
        (report.joined, f"{report.joined:,} in which tokens would join prompt and answer; tokenised apart"),
        (report.rewritten, f"{report.rewritten:,} of which the template rewrites earlier turns: several examples each"),
        (parted, f"{len(parted):,} in which an answer leaves the template's generation prompt; learnt from there on"),
        (unclosed, f"{len(unclosed):,} in which no special token closes an answer: the model is not taught to stop"),
        (eos_missing, "the tokenizer has no end token: the model is not taught to stop"),
    )
    for found, words in lines:
        if found:
            place = f" (first: {found[0]})" if isinstance(found, list) and found[0] else ""
            report.notes.append(words + place)


def _nothing_learnt(whole: list[Example], tok: Any, max_len: int, report: EncodeReport) -> LoricaError:
    faults = [f"{report.dropped:,} have no answer within the first {max_len:,} tokens"] if report.dropped else []
    faults += [f"{report.silent:,} have nothing to learn in them"] if report.silent else []
    if whole:
        text = tok.decode(whole[0].ids[:max_len])
        faults.append(f"the first, {whole[0].where}: {text[:300]!r}")
    if report.dropped:
        faults.append("raise --max-len, or shorten the prompts")
    return all_faults(f"none of the {report.rows:,} rows has a token to learn:", faults)
