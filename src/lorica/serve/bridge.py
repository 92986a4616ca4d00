"""The seam to transformers' continuous batching: everything that knows its insides is here.

transformers schedules requests, owns the paged cache and runs the loop. Put between:

- requests of one adapter lie side by side in a batch, and the layers are told whose rows are whose (`rows`);
- a prefix is shared only within one generation of one adapter: the digest is in its tokens (`_Cache`);
- attention goes request by request (`attention`), sampling by each request's settings (`sampling`);
- tokens go out as they are drawn; a request that ends, for whatever reason, ends its stream (`requests`);
- a loop that dies is built again, and what was under way goes on where it was (`_Manager`).

Tested on one minor of transformers; `open_engine` uses `plain` for others.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from lorica.serve import attention, memory, recorded
from lorica.serve.engine import EngineSettings, Sampling, Stream
from lorica.serve.leases import Lease
from lorica.serve.recorded import Recorder
from lorica.serve.requests import Request, Requests, capacity
from lorica.serve.rows import Layers
from lorica.serve.sampling import choose

MINOR = "5.23"
_SALT_BITS = 128
_log = logging.getLogger(__name__)


class Bridge:
    """An `engine.Engine` on transformers' continuous batching.

    Args:
        model: a causal language model; its layers are taken over from `start` to `stop`.
        layers: those layers; the store's payloads must come from them.
        ends: ids that end a text.
    """

    def __init__(
        self, model: Any, layers: Layers, settings: EngineSettings | None = None, ends: Sequence[int] = ()
    ) -> None:
        self.model = model
        self.layers = layers
        self.settings = settings or EngineSettings()
        self.kv_tokens, self.max_context = capacity(model, self.settings)
        self.requests = Requests(self, self.model.config.get_text_config().vocab_size, tuple(ends))
        self.keeps: bool = self.model._supports_logits_to_keep()
        self.steps = self.restarts = 0
        self.recorder: Recorder | None = None
        self.recording: Recorder | None = None  # the same, where it takes the step at hand
        self.kept: attention.Kept | None = None
        self._manager: _Manager | None = None
        self._undo = contextlib.ExitStack()

    def start(self) -> None:
        """See `engine.Engine`."""
        before = self.model.config._attn_implementation
        self._undo.callback(self.model.set_attn_implementation, before)
        self._undo.enter_context(self.layers.attached())
        self._undo.callback(self.layers.idle)
        self.requests.accepting = True
        self.build()

    def stop(self) -> None:
        """See `engine.Engine`."""
        self.requests.accepting = False
        if self._manager and self._manager.is_running():
            self._manager.stop(block=True, hard_stop=True)
        self._manager = None
        self.requests.close()
        self._undo.close()

    def submit(self, ids: Sequence[int], sampling: Sampling, lease: Lease | None, space: str = "") -> Stream:
        """See `engine.Engine`."""
        return self.requests.submit(ids, sampling, lease, space)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """See `engine.Engine`."""
        assert self._manager is not None
        with self._manager.pause():
            yield

    @property
    def alive(self) -> bool:
        """See `engine.Engine`."""
        return self.requests.accepting

    def facts(self) -> dict[str, Any]:
        """See `engine.FACTS`."""
        blocks, used = self.kv_tokens // self.settings.page, 0
        processor = self._manager and self._manager.batch_processor
        if processor:
            free = processor.cache.compute_free_capacity()
            kept = sum(len(each.ledger.cached_blocks) for each in processor.cache.cache_allocators.values())
            used = max(0, round(blocks * (1 - free)) - kept)
        counted = {"kv_blocks": blocks, "kv_blocks_used": used, "steps": self.steps, "restarts": self.restarts}
        return {"engine": "bridge", **counted, **self.requests.facts()}

    # What `requests` asks of a loop

    def build(self) -> None:
        """A new loop, with an empty cache."""
        self.model.set_attn_implementation("sdpa")  # the only one that the manager lets pass; no mask is made for ours
        settings = ContinuousBatchingConfig(
            page_size=self.settings.page,
            num_blocks=self.kv_tokens // self.settings.page,
            max_batch_tokens=max(self.settings.batch_tokens, self.settings.requests),
            max_requests_per_batch=self.settings.requests,
            max_blocks_per_request=0,
            max_memory_percent=1.0,
            allow_block_sharing=self.settings.prefix_cache,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        )
        plain = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        self._manager = _Manager(self, plain, settings)
        most = memory.kept(self.kv_tokens, self.model.device)
        self.kept = attention.Kept(most) if most else None
        attention.register(self.model)
        self._manager.start()

    def enter(self, request: Request) -> bool:
        """Hand a request to the loop; whether it was taken."""
        manager = self._manager
        return manager is not None and bool(
            manager.add_request(
                [*request.ids, *request.said],
                request_id=request.id,
                max_new_tokens=request.left,
                eos_token_id=[*request.ends] or -1,
            )
        )

    def leave(self, request: Request) -> None:
        """Take a request out of the loop."""
        if manager := self._manager:
            manager.cancel_request(request.id)


class _Manager(ContinuousBatchingManager):
    """transformers' loop with our parts in it."""

    def __init__(self, bridge: Bridge, plain: GenerationConfig, settings: ContinuousBatchingConfig) -> None:
        super().__init__(bridge.model, plain, settings)
        self._original_attn_impl = None  # it is the bridge that puts it back
        self.bridge = bridge
        self.output_router = _Router(bridge.requests)

    def _create_batch_processor(self):
        processor = super()._create_batch_processor()
        ours: list[tuple[Any, type]] = [
            (processor.cache, _Cache),
            (processor.scheduler, _Scheduler),
            (processor.model_runner, _Runner),
        ]
        for part, kind in ours:
            part.__class__, part.bridge = kind, self.bridge
        if recorded.pays(self.bridge.model):
            self.bridge.recorder = Recorder(self.bridge.model, self.bridge.layers, processor.cache, self.bridge.keeps)
        return processor

    def _handle_critical_error(self, error: Exception, batch_processor: Any) -> None:
        self.background_thread_status.record_fatal_error(error)
        self.background_thread_status.mark_as_stopped()
        self.batch_processor = None
        self.bridge.restarts += 1
        self.bridge.layers.idle()
        _log.error("the decoding loop died and is built again: %s", error)
        self.bridge.requests.restart(error)


class _Router(OutputRouter):
    """Sends what the loop says of a request to its stream."""

    def __init__(self, requests: Requests) -> None:
        super().__init__()
        self.requests = requests

    def deliver(self, output: GenerationOutput) -> None:
        if output.status == RequestStatus.FAILED and not self.requests.accepting:
            self.requests.end(output.request_id, "cancelled")
        elif output.status == RequestStatus.FAILED:
            self.requests.end(output.request_id, "error", output.error or "it failed")
        elif output.is_finished():
            self.requests.end(output.request_id)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)


class _Scheduler(FIFOScheduler):
    """First in, first out; side by side by adapter; says who was cancelled."""

    bridge: Bridge

    def schedule_batch(self, token_budget: int, cache_budget: int):
        found = super().schedule_batch(token_budget, cache_budget)
        batch = found[0]
        if batch:
            known = [self.bridge.requests.by_id[each.state.request_id] for each in batch]
            for request in known:
                request.state = "running"
            parts = [(request.rows, each.query_length) for request, each in zip(known, batch, strict=True)]
            self.bridge.layers.count(parts)
            begun = all(each.state.position_offset and each.has_new_token for each in batch)
            recorder = self.bridge.recorder
            self.bridge.recording = recorder if recorder and recorder.takes(parts, begun) else None
            if not self.bridge.recording:
                kept = [each.has_new_token for each in batch] if self.bridge.keeps else None
                plan = self.bridge.layers.plan(parts, kept)
                batch[:] = [batch[place] for place in plan.order]
                self.bridge.layers.work = plan.work
        return found

    def clear_cancelled_requests(self):
        asked = set(self._requests_to_cancel)
        states = super().clear_cancelled_requests()
        for id in asked:
            self.bridge.requests.end(id, "cancelled")
        return states


class _Cache(PagedAttentionCache):
    """Shares the blocks of a prefix only between requests of one generation of one adapter.

    Upstream's hash of a block knows its tokens and those before it, not the adapter, under which the same tokens have
    other keys. So the digest is written into the first tokens, above the bits that an id of the vocabulary needs.
    """

    bridge: Bridge

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        request = self.bridge.requests.by_id[request_id]
        found = super().search_prefix_match(request_id, _salted(prompt_ids, _salt(request), self.config.vocab_size))
        if not request.said:
            request.cached = found
        return found

    def mark_complete_blocks(self, state: Any, complete_blocks: dict[str, int]) -> None:
        request = self.bridge.requests.by_id.get(state.request_id)  # none where it has just failed
        if request and self.allow_block_sharing and complete_blocks and state.status != RequestStatus.FINISHED:
            tokens = _salted(state.initial_tokens + state.generated_tokens, _salt(request), self.config.vocab_size)
            for name, count in complete_blocks.items():
                self.cache_allocators[name].mark_complete_blocks(state.request_id, tokens, count)


def _salt(request: Request) -> str:
    """What its prompt's keys and values depend on beside the prompt, and whose they are; nothing for the base's own."""
    if not request.space:
        return request.digest
    return hashlib.sha256(f"{request.space} {request.digest}".encode()).hexdigest()


def _salted(ids: list[int], digest: str, vocab: int) -> list[int]:
    if not digest:
        return ids
    free = 31 - (vocab - 1).bit_length()  # ids are hashed as signed 32 bit numbers
    salt = int(digest, 16) % (1 << _SALT_BITS)
    places = -(-_SALT_BITS // free)
    return [id | (salt >> free * i) % (1 << free) << 31 - free for i, id in enumerate(ids[:places])] + ids[places:]


class _Runner(ModelRunner):
    """Runs the model on a batch and draws each request's token."""

    bridge: Bridge

    def compute_batch(self, model: nn.Module, batch_data: dict) -> None:
        batch = self.inputs_and_outputs.requests_in_batch  # type: ignore[union-attr]
        self.bridge.steps += 1
        recorder = self.bridge.recording
        logits = recorder(batch_data) if recorder else self._pass(model, batch_data, batch)
        requests = [self.bridge.requests.by_id[each.state.request_id] for each in batch if each.has_new_token]
        tokens = choose(logits.float(), [request.chooser for request in requests])
        ids = []
        for request, token in zip(requests, tokens, strict=True):
            ids.append(token.id if token else 0)
            self.bridge.requests.say(request, token)
        self.inputs_and_outputs.output_ids[0, : len(ids)] = torch.tensor(ids, dtype=torch.int32)

    def _pass(self, model: nn.Module, batch_data: dict, batch: Sequence[Any]) -> Tensor:
        """The logits of those that get a token."""
        starts = batch_data["cu_seq_lens_q"].tolist()
        ids = [each.state.request_id for each in batch]
        pieces = [attention.Piece(*ends, id) for ends, id in zip(itertools.pairwise(starts), ids, strict=True)]
        wanted = batch_data["logits_indices"][: sum(each.has_new_token for each in batch)]
        options: dict[str, Any] = {attention.KEYWORD: attention.Step(pieces, self.bridge.kept)}
        if self.bridge.keeps:
            options["logits_to_keep"] = wanted
        logits: Tensor = model(**batch_data, **options).logits[0]
        return logits if "logits_to_keep" in options else logits[wanted]
