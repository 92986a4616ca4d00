"""A classifier or regressor asked one text at a time: what `Talk` is for language models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorica import patch
from lorica.errors import LoricaError
from lorica.evaluate.talk import toggle

BETWEEN = " ||| "
SHOWN = 5


@dataclass
class Judgement:
    """A model, and `say`: what it says of one text or a pair. `messages` are the last text and its answer."""

    model: Any
    say: Callable[[Sequence[str]], dict[str, Any]]
    messages: list[dict[str, str]] = field(default_factory=list)
    said: dict[str, Any] = field(default_factory=dict)

    hint = f"each line is judged by itself; the two texts of a pair with {BETWEEN!r} between them"

    @property
    def adapted(self) -> bool:
        """Whether there is an adapter, in use or not."""
        return bool(patch.adapters(self.model))

    @property
    def tuned(self) -> bool:
        """Whether an adapter answers, and not the base model."""
        return patch.active(self.model) is not None

    def toggle(self) -> None:
        """Let the base answer instead of the adapter, or the adapter again."""
        toggle(self.model)

    def instruct(self, system: str) -> None:
        """A classifier cannot be told anything."""
        if system:
            raise LoricaError("a model that judges texts takes no system prompt")

    def ask(self, text: str) -> Iterator[str]:
        """The label with the likeliest probabilities, or the score."""
        self.said = self.say(text.split(BETWEEN))
        self.messages = [{"role": "user", "content": text}, {"role": "assistant", "content": in_words(self.said)}]
        yield self.messages[-1]["content"]

    def retry(self) -> Iterator[str]:
        """The last text again, as after `toggle`."""
        if not self.messages:
            raise LoricaError("there is nothing to judge again yet")
        return self.ask(self.messages[0]["content"])

    def reset(self) -> None:
        """Forget the last text."""
        self.messages, self.said = [], {}

    def row(self) -> dict[str, Any]:
        """The last text and its answer as a row of training data."""
        if not self.messages:
            raise LoricaError("nothing was said yet, so there is nothing to save")
        texts = self.messages[0]["content"].split(BETWEEN)
        names = ("text",) if len(texts) == 1 else ("sentence1", "sentence2")
        found = {key: value for key, value in self.said.items() if key != "probabilities"}
        return dict(zip(names, texts, strict=False)) | found


def in_words(said: dict[str, Any]) -> str:
    """``positive   positive 0.981, negative 0.019``, the likeliest first; or the score."""
    if "score" in said:
        return f"{said['score']:.4g}"
    ranked = sorted(said["probabilities"].items(), key=lambda each: -each[1])
    shown = ", ".join(f"{name} {share:.3f}" for name, share in ranked[:SHOWN])
    return f"{said['label']}   {shown}" + (f", {len(ranked) - SHOWN} more" if len(ranked) > SHOWN else "")
