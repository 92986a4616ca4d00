"""Numbers for Prometheus, under vLLM's names where it has one, so that its dashboards and the Kubernetes Gateway API's
inference extension (queue depth, use of the cache, adapters) work unchanged.

Besides: which adapters are in memory, idle ones too (`lora_adapter_loaded`), which vLLM's metrics do not show.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lorica.serve.admission import Admission
from lorica.serve.engine import Engine

if TYPE_CHECKING:
    from lorica.serve.store import Store

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """What one server counts, and what it reads off its engine, store and queue when it is asked."""

    def __init__(self, engine: Engine, store: Store, admission: Admission) -> None:
        self.registry = CollectorRegistry()
        self._reading = _Reading(engine, store, admission)
        self.registry.register(self._reading)
        names, registry = ["model_name"], self.registry
        self._first = Histogram(
            "vllm:time_to_first_token_seconds",
            "From the request to its first token.",
            names,
            buckets=_SECONDS,
            registry=registry,
        )
        self._next = Histogram(
            "vllm:inter_token_latency_seconds",
            "Between two tokens of an answer.",
            names,
            buckets=_SECONDS,
            registry=registry,
        )
        self._whole = Histogram(
            "vllm:e2e_request_latency_seconds",
            "From the request to its end.",
            names,
            buckets=_SECONDS,
            registry=registry,
        )
        self._prompt = Counter("vllm:prompt_tokens", "Tokens of prompts.", names, registry=registry)
        self._output = Counter("vllm:generation_tokens", "Tokens of answers.", names, registry=registry)
        self._success = Counter(
            "vllm:request_success", "Answers by why they ended.", [*names, "finished_reason"], registry=registry
        )
        self._tenants = Counter("lorica_tenant_tokens", "Tokens by key.", ["tenant", "kind"], registry=registry)
        self._refused = Counter(
            "lorica_requests_refused", "Requests without an answer, by status.", ["status"], registry=registry
        )
        self._draining = Gauge("lorica_draining", "1 while new requests are turned away.", registry=registry)

    def first_token(self, model: str, seconds: float) -> None:
        """A first token came."""
        self._first.labels(model).observe(seconds)

    def between_tokens(self, model: str) -> Callable[[float], None]:
        """What takes the seconds between a token and the one before it, for one answer."""
        return self._next.labels(model).observe

    def ended(self, model: str, tenant: str, counts: Any, seconds: float) -> None:
        """An answer is over, well or not."""
        self._whole.labels(model).observe(seconds)
        self._prompt.labels(model).inc(counts.prompt)
        self._output.labels(model).inc(counts.output)
        self._tenants.labels(tenant, "prompt").inc(counts.prompt)
        self._tenants.labels(tenant, "output").inc(counts.output)
        for reason, number in counts.finished.items():
            self._success.labels(model, reason).inc(number)

    def refuse(self, status: int) -> None:
        """A request got no answer."""
        self._refused.labels(str(status)).inc()

    def drain(self) -> None:
        """New requests are turned away from now on."""
        self._draining.set(1)

    async def text(self) -> bytes:
        """In Prometheus' text format. Of a thousand adapters that takes a second, so a thread writes it."""
        self._reading.look()
        return await asyncio.to_thread(generate_latest, self.registry)


class _Reading:
    """Read at each scrape."""

    def __init__(self, engine: Engine, store: Store, admission: Admission) -> None:
        self._engine, self._store, self._admission = engine, store, admission
        self._waiting, self._queued, self._reserved = 0, set[str](), 0

    def look(self) -> None:
        """Note what only the event loop may read."""
        waiting = self._admission.waiting
        self._waiting, self._queued = len(waiting), {turn.adapter for turn in waiting if turn.adapter}
        self._reserved = sum(turn.tokens for turn in self._admission.running)

    def describe(self) -> list[Metric]:
        """Nothing at registration: the engine may not run yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The families, with the values of now."""
        facts = self._engine.facts()
        running = set(facts["running_adapters"])
        queued = self._queued | set(facts["waiting_adapters"])
        yield _gauge("vllm:num_requests_running", "Requests in the batch.", facts["running"])
        yield _gauge("vllm:num_requests_waiting", "Requests not yet in it.", facts["waiting"] + self._waiting)
        share = facts["kv_blocks_used"] / max(1, facts["kv_blocks"])
        yield _gauge("vllm:kv_cache_usage_perc", "Share of the cache of keys and values in use, 0 to 1.", share)
        yield _gauge("lorica_kv_tokens_reserved", "Tokens that running requests may come to.", self._reserved)
        yield _gauge("lorica_kv_tokens", "Tokens that the cache holds.", self._engine.kv_tokens)
        yield _count(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", facts["prompt_tokens"]
        )
        yield _count("vllm:prefix_cache_hits", "Prompt tokens that came from it.", facts["cached_tokens"])
        yield _count("lorica_engine_steps", "Forward passes.", facts["steps"])
        yield _count("lorica_engine_restarts", "Times the engine's loop died and was built again.", facts["restarts"])
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests; the value is the time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        names = (str(self._admission.limits.running), ",".join(sorted(running)), ",".join(sorted(queued - running)))
        info.add_metric(names, time.time())
        yield info
        yield from self._adapters()

    def _adapters(self) -> Iterator[Metric]:
        loaded = GaugeMetricFamily(
            "lora_adapter_loaded",
            "1 for an adapter in memory, 0 for one on disk.",
            labels=["adapter_name", "level", "pinned"],
        )
        nbytes = GaugeMetricFamily("lorica_adapter_bytes", "Memory of an adapter.", labels=["adapter_name"])
        seconds = GaugeMetricFamily("lorica_adapter_load_seconds", "What its last load took.", labels=["adapter_name"])
        for each in self._store.status():
            if each.alias_of is None:
                here = each.state in ("resident", "pinned")
                pinned = str(each.state == "pinned").lower()
                loaded.add_metric([each.name, "memory" if here else "disk", pinned], float(here))
                if here:
                    nbytes.add_metric([each.name], each.nbytes)
                    seconds.add_metric([each.name], each.load_seconds)
        yield from (loaded, nbytes, seconds)
        yield _gauge("lorica_adapters_bytes", "Memory of all adapters.", self._store.nbytes)
        yield _count("lorica_adapter_loads", "Loads of adapters.", self._store.loads)
        yield _count("lorica_adapter_evictions", "Adapters that gave way to others.", self._store.evictions)


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(name, what, value=value)


def _count(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(name, what, value=value)
