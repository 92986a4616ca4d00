"""A conversation: what was said so far, and the next answer as it comes, from a model here or one behind a server."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lorica import patch
from lorica.data import Record, prompt_ids
from lorica.errors import LoricaError
from lorica.evaluate.generation import stream

# A retry of the likeliest answer by the same model would repeat it.
RETRY_TEMPERATURE = 0.7
Message = dict[str, str]


class Speaker(Protocol):
    """Who answers: a model with an adapter or without."""

    @property
    def plain(self) -> bool:
        """Whether prompts are continued as they are, for want of a chat template."""
        ...

    @property
    def adapted(self) -> bool:
        """Whether there is an adapter, in use or not."""
        ...

    @property
    def tuned(self) -> bool:
        """Whether an adapter answers, and not the base model."""
        ...

    def toggle(self) -> None:
        """Let the base answer instead of the adapter, or the adapter again. LoricaError where there is none."""
        ...

    def answer(
        self, messages: Sequence[Message], *, max_new: int, temperature: float, seed: int
    ) -> Generator[str, None, None]:
        """The next message in pieces; closing the generator stops it."""
        ...


@dataclass
class Here:
    """A model in this process."""

    model: Any
    tok: Any

    @property
    def plain(self) -> bool:
        return not self.tok.chat_template

    @property
    def adapted(self) -> bool:
        return bool(patch.adapters(self.model))

    @property
    def tuned(self) -> bool:
        return patch.active(self.model) is not None

    def toggle(self) -> None:
        toggle(self.model)

    def answer(
        self, messages: Sequence[Message], *, max_new: int, temperature: float, seed: int
    ) -> Generator[str, None, None]:
        if self.plain:
            system = messages[0]["content"] if messages[0]["role"] == "system" else ""
            row = Record("pair", prompt=messages[-1]["content"], system=system)
        else:
            row = Record("chat", messages=list(messages))
        ids, _ = prompt_ids(row, self.tok)
        yield from stream(self.model, self.tok, ids, max_new=max_new, temperature=temperature, seed=seed)


def toggle(model: Any) -> None:
    """Let the base answer instead of a model's adapter, or the adapter again. LoricaError where there is none."""
    there = patch.adapters(model)
    if not there:
        raise LoricaError("there is no adapter on this model; the base is all there is")
    patch.select(model, None if patch.active(model) else there[0])


@dataclass
class Talk:
    """Somebody who answers, and the messages so far.

    `tries` counts the answers drawn for the last message; `answered` says whether the adapter gave the last of them.
    Without a chat template there is no conversation: each prompt is continued by itself, as plain text.
    """

    speaker: Speaker
    system: str = ""
    max_new: int = 512
    temperature: float = 0.0
    seed: int = 0
    messages: list[Message] = field(default_factory=list)
    tries: int = 0
    answered: bool | None = None

    @property
    def plain(self) -> bool:
        """Whether prompts are continued as they are, for want of a chat template."""
        return self.speaker.plain

    @property
    def hint(self) -> str:
        """What a person should know before the first message."""
        return "no chat template: each message is continued as plain text, by itself" if self.plain else ""

    @property
    def adapted(self) -> bool:
        """Whether there is an adapter, in use or not."""
        return self.speaker.adapted

    @property
    def tuned(self) -> bool:
        """Whether an adapter answers, and not the base model."""
        return self.speaker.tuned

    def toggle(self) -> None:
        """Let the base answer instead of the adapter, or the adapter again. LoricaError where there is no adapter."""
        self.speaker.toggle()

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

    def _answer(self, messages: list[Message], temperature: float) -> Iterator[str]:
        self.answered = self.tuned
        said, ended = "", False
        pieces = self.speaker.answer(
            self._with_system(messages), max_new=self.max_new, temperature=temperature, seed=self.seed + self.tries
        )
        try:
            for piece in pieces:
                said += piece
                yield piece
            ended = True
        finally:
            pieces.close()
            if said or ended:
                self.messages = [*messages, {"role": "assistant", "content": said}]

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return [{"role": "system", "content": self.system}, *messages] if self.system else messages
