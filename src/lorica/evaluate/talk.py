"""A conversation with a model: what was said so far, and the next answer as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lorica import patch
from lorica.data import Record, prompt_ids
from lorica.errors import LoricaError
from lorica.evaluate.generation import stream

# A retry of the likeliest answer by the same model would repeat it.
RETRY_TEMPERATURE = 0.7


def toggle(model: Any) -> None:
    """Let the base answer instead of a model's adapter, or the adapter again. LoricaError where there is none."""
    there = patch.adapters(model)
    if not there:
        raise LoricaError("there is no adapter on this model; the base is all there is")
    patch.select(model, None if patch.active(model) else there[0])


@dataclass
class Talk:
    """A model, a tokenizer and the messages so far.

    `tries` counts the answers drawn for the last message; `answered` says whether the adapter gave the last of them.
    Without a chat template there is no conversation: each prompt is continued by itself, as plain text.
    """

    model: Any
    tok: Any
    system: str = ""
    max_new: int = 512
    temperature: float = 0.0
    seed: int = 0
    messages: list[dict[str, str]] = field(default_factory=list)
    tries: int = 0
    answered: bool | None = None

    @property
    def plain(self) -> bool:
        """Whether prompts are continued as they are, for want of a chat template."""
        return not self.tok.chat_template

    @property
    def hint(self) -> str:
        """What a person should know before the first message."""
        return "no chat template: each message is continued as plain text, by itself" if self.plain else ""

    @property
    def tuned(self) -> bool:
        """Whether an adapter answers, and not the base model."""
        return patch.active(self.model) is not None

    def toggle(self) -> None:
        """Let the base answer instead of the adapter, or the adapter again. LoricaError where there is no adapter."""
        toggle(self.model)

    def instruct(self, system: str) -> None:
        """Set the system prompt."""
        self.system = system

    def ask(self, text: str) -> Iterator[str]:
        """The answer to a message, in pieces. Both are remembered, the answer as far as it came when it is stopped."""
        self.tries = 0
        return self._answer([*self.messages, {"role": "user", "content": text}], self.temperature)

    def retry(self) -> Iterator[str]:
        """Another answer to the last message.

        The likeliest one where the last was not by the same model (after `toggle`), else one that is drawn.
        """
        if not self.messages:
            raise LoricaError("there is nothing to answer again yet")
        again = self.answered == self.tuned
        self.tries = self.tries + 1 if again else 0
        return self._answer(self.messages[:-1], self.temperature or (RETRY_TEMPERATURE if again else 0.0))

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.messages = []

    def row(self) -> dict[str, Any]:
        """The conversation as a row of training data. Plain continuations are a row of the last one."""
        if not self.messages:
            raise LoricaError("nothing was said yet, so there is nothing to save")
        if self.plain:
            asked, answered = self.messages[-2:]
            return {"prompt": asked["content"], "completion": answered["content"]}
        return {"messages": self._with_system(self.messages)}

    def _answer(self, messages: list[dict[str, str]], temperature: float) -> Iterator[str]:
        if self.plain:
            row = Record("pair", prompt=messages[-1]["content"], system=self.system)
        else:
            row = Record("chat", messages=self._with_system(messages))
        ids, _ = prompt_ids(row, self.tok)
        self.answered = self.tuned
        said, ended = "", False
        pieces = stream(
            self.model, self.tok, ids, max_new=self.max_new, temperature=temperature, seed=self.seed + self.tries
        )
        try:
            for piece in pieces:
                said += piece
                yield piece
            ended = True
        finally:
            pieces.close()  # type: ignore[attr-defined]
            if said or ended:
                self.messages = [*messages, {"role": "assistant", "content": said}]

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, *messages] if self.system else messages
