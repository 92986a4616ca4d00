"""Answers: batched greedy or sampled generation in order, and a stream for a person to read."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

from lorica.data import Record, encode
from lorica.errors import LoricaError
from lorica.evaluate.causal import evaluating, require
from lorica.insertion import asked


def stop_ids(model: Any, tok: Any) -> list[int]:
    """Ids that end an answer: the model's, the tokenizer's, and the one with which the chat template closes a turn."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {own} if isinstance(own, int) else set(own or ())
    return sorted(token for token in {*found, tok.eos_token_id, _turn_end(tok)} if token is not None)


@torch.no_grad()
def generate(
    model: Any,
    tok: Any,
    prompts: Sequence[list[int]],
    *,
    max_new: int = 128,
    batch: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Continue each prompt (token ids) until a stop token or `max_new` tokens; texts in the order of the prompts.

    Prompts of like length go together, padded on the left, and read as the active adapter is to (`insertion`).
    `temperature` 0 takes the likeliest token; above, tokens are sampled, the same ones for the same seed and batch.
    Special tokens are left out of the texts. An answer ends where the model's positions do; LoricaError for prompts
    that leave none. The model's mode is left as it was.
    """
    require(model)
    stops, pad = stop_ids(model, tok), _pad(model, tok)
    prompts = asked(model, [ids or [pad] for ids in prompts])
    rooms = _rooms(model, prompts, max_new)
    answers = [""] * len(prompts)
    done = 0
    with _ready(model, seed) as device:
        # A prompt near the model's last position shortens its own answer only: it shares no batch with one that is not.
        order = sorted(range(len(prompts)), key=lambda place: (-rooms[place], len(prompts[place])))
        for room, alike in itertools.groupby(order, key=rooms.__getitem__):
            model.generation_config = _config(model, tok, room, temperature)
            for places in _cut(list(alike), batch):
                inputs = left_padded([prompts[place] for place in places], pad, device)
                ids = model.generate(**inputs)
                for place, row in zip(places, ids[:, inputs["input_ids"].shape[1] :], strict=True):
                    answers[place] = _text(tok, list(_before(row.tolist(), stops)))
                done += len(places)
                if progress:
                    progress(done, len(prompts))
    return answers


def stream(
    model: Any, tok: Any, ids: list[int], *, max_new: int = 512, temperature: float = 0.0, seed: int = 0
) -> Iterator[str]:
    """Continue one prompt and yield its text in pieces as it comes; they join to the answer that `generate` gives.

    A piece never ends inside a character. Generation runs in a thread; closing the iterator early ends it after the
    token at hand.
    """
    require(model)
    stops, pad = stop_ids(model, tok), _pad(model, tok)
    (ids,) = asked(model, [ids or [pad]])
    (room,) = _rooms(model, [ids], max_new)
    tokens, stopped, failed = _Tokens(), threading.Event(), list[BaseException]()

    def work() -> None:
        try:
            with torch.no_grad(), _ready(model, seed) as device:
                model.generation_config = _config(model, tok, room, temperature)
                inputs = left_padded([ids], pad, device)
                rules = [lambda ids, scores: torch.full(ids.shape[:1], stopped.is_set(), device=ids.device)]
                model.generate(**inputs, streamer=tokens, stopping_criteria=rules)
        except BaseException as fault:
            failed.append(fault)
            tokens.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from _pieces(_before(tokens, stops), tok)
    finally:
        stopped.set()
        thread.join()
    if failed:
        raise failed[0]


class _Tokens(BaseStreamer):
    """What generate() hands out one by one, without the prompt, as an iterator for another thread."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.begun = False

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then one token at a time."""
        if self.begun:
            self.queue.put(int(value))
        self.begun = True

    def end(self) -> None:
        """No more will come."""
        self.queue.put(None)

    def __iter__(self) -> Iterator[int]:
        return iter(self.queue.get, None)


def _pieces(tokens: Iterable[int], tok: Any) -> Iterator[str]:
    """Text as its tokens come. All of it is decoded each time: a token's text depends on those before it."""
    ids: list[int] = []
    text = shown = ""
    for token in tokens:
        ids.append(token)
        text = _text(tok, ids)
        # A replacement character at the end is a character of which some bytes are still to come.
        if text != shown and not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    if text != shown:
        yield text[len(shown) :]


def _before(tokens: Iterable[int], stops: Sequence[int]) -> Iterator[int]:
    """Tokens up to a stop token; not every one of these is special, and thus left out of texts."""
    return itertools.takewhile(lambda token: token not in stops, tokens)


def _text(tok: Any, ids: list[int]) -> str:
    return tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@contextlib.contextmanager
def _ready(model: Any, seed: int) -> Iterator[torch.device]:
    """Evaluation mode and a random state of its own for the length of a block; the model's own config comes back."""
    recommended = model.generation_config
    try:
        with evaluating(model) as device, torch.random.fork_rng():
            torch.manual_seed(seed)
            yield device
    finally:
        model.generation_config = recommended


def _config(model: Any, tok: Any, max_new: int, temperature: float) -> GenerationConfig:
    """A whole config: generate() fills what is left open from the model's own, and a recommended penalty would creep
    into a greedy answer; so this takes the model's place."""
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    ends = {"eos_token_id": stop_ids(model, tok) or None, "pad_token_id": _pad(model, tok)}
    return GenerationConfig(max_new_tokens=max_new, **ends, **sampled)


def _turn_end(tok: Any) -> int | None:
    """The special token that closes an answer written through the chat template, if one does."""
    if not tok.chat_template:
        return None
    try:
        (example, *_) = encode([Record("pair", prompt="a", completion="b")], tok).examples
    except LoricaError:
        return None
    last = example.ids[-1]
    return last if last in tok.added_tokens_decoder or last in tok.all_special_ids else None


def _pad(model: Any, tok: Any) -> int:
    return tok.pad_token_id if tok.pad_token_id is not None else (stop_ids(model, tok) or [0])[0]


def _rooms(model: Any, prompts: Sequence[list[int]], max_new: int) -> list[int]:
    """For each prompt how many tokens its answer may have."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return [max_new] * len(prompts)
    rooms = [min(max_new, positions - len(ids)) for ids in prompts]
    if full := [ids for ids, room in zip(prompts, rooms, strict=True) if room < 1]:
        raise LoricaError(
            f"{len(full):,} of {len(prompts):,} prompts leave no room for an answer in the model's {positions:,}"
            f" positions; the longest has {max(map(len, full)):,} tokens"
        )
    return rooms


def _cut(places: list[int], size: int) -> Iterator[list[int]]:
    return (places[start : start + size] for start in range(0, len(places), size))


def left_padded(prompts: Sequence[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Prompts as the inputs of a model that continues them: `input_ids` and `attention_mask` ``[prompts, longest]``."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
