"""Answers: batched greedy or sampled generation in order, and a stream for a person to read."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, TextIteratorStreamer

# Names under which templates close a turn; a model that was tuned through one must stop there.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>")


def stop_ids(model: Any, tok: Any) -> list[int]:
    """Ids that end an answer: the model's, the tokenizer's, and the ends of turn that the chat template writes."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {own} if isinstance(own, int) else set(own or ())
    found.add(tok.eos_token_id)
    template = tok.chat_template if isinstance(tok.chat_template, str) else json.dumps(tok.chat_template or "")
    vocabulary = tok.get_vocab()
    found |= {vocabulary[word] for word in _TURN_ENDS if word in template and word in vocabulary}
    return sorted(token for token in found if token is not None)


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

    Prompts of like length go together, padded on the left. `temperature` 0 takes the likeliest token; above, tokens are
    sampled, the same ones for the same seed and batch. Special tokens are left out of the texts.
    """
    answers = [""] * len(prompts)
    done = 0
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    with _ready(model, _config(model, tok, max_new, temperature), seed):
        for start in range(0, len(order), batch):
            places = order[start : start + batch]
            inputs = _left_padded([prompts[place] for place in places], _pad(model, tok), model.device)
            ids = model.generate(**inputs)
            for place, row in zip(places, ids[:, inputs["input_ids"].shape[1] :], strict=True):
                answers[place] = tok.decode(row, skip_special_tokens=True)
            done += len(places)
            if progress:
                progress(done, len(prompts))
    return answers


def stream(
    model: Any, tok: Any, ids: list[int], *, max_new: int = 512, temperature: float = 0.0, seed: int = 0
) -> Iterator[str]:
    """Continue one prompt and yield its text in pieces as it comes; they join to the whole answer.

    Generation runs in a thread. Closing the iterator early ends it after the token at hand.
    """
    streamer = TextIteratorStreamer(tok, skip_prompt=True, skip_special_tokens=True)
    stopped = threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad(), _ready(model, _config(model, tok, max_new, temperature), seed):
                inputs = _left_padded([ids], _pad(model, tok), model.device)
                rules = [lambda ids, scores: torch.full(ids.shape[:1], stopped.is_set(), device=ids.device)]
                model.generate(**inputs, streamer=streamer, stopping_criteria=rules)
        except BaseException as fault:
            failed.append(fault)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stopped.set()
        thread.join()
    if failed:
        raise failed[0]


@contextlib.contextmanager
def _ready(model: Any, config: GenerationConfig, seed: int) -> Iterator[None]:
    """Evaluation mode, a random state of its own, and `config` alone, for the length of a block."""
    training, recommended = model.training, model.generation_config
    # generate() fills what a config leaves open from the model's own: a recommended penalty would creep into a greedy
    # answer.
    model.eval().generation_config = config
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        model.generation_config = recommended
        model.train(training)


def _config(model: Any, tok: Any, max_new: int, temperature: float) -> GenerationConfig:
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    own = model.generation_config
    ends = {"eos_token_id": stop_ids(model, tok), "pad_token_id": _pad(model, tok)}
    starts = {"bos_token_id": own.bos_token_id, "decoder_start_token_id": own.decoder_start_token_id}
    return GenerationConfig(max_new_tokens=max_new, **ends, **starts, **sampled)


def _pad(model: Any, tok: Any) -> int:
    return tok.pad_token_id if tok.pad_token_id is not None else (stop_ids(model, tok) or [0])[0]


def _left_padded(prompts: Sequence[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
