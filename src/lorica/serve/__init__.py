"""Serving: one base, many adapters, mixed in one batch.

engine.py     what an engine takes and gives: Sampling, Stream of Token and End, the Engine protocol
store.py      adapters by name: loaded when asked for, evicted by bytes, reloaded, aliased
leases.py     one load of one adapter, and the right to use it
names.py      what a name stands for: an adapter's files and generations, or another name
places.py     where adapters lie, and what may be read
rows.py       the adapters' products at every layer for the token rows of one step
stack.py      an adapter as they take it, and several of one shape
ragged.py     several of many ranks
reading.py    an adapter's files made that, or why they cannot be
staging.py    from host memory to the device, beside the steps
requests.py   requests from submit to end, whatever loop runs them
bridge.py     the seam to transformers' continuous batching
recorded.py   its steps as CUDA graphs
attention.py  attention over its paged cache
sampling.py   from logits to tokens
plain.py      a slower engine for what the bridge cannot serve
check.py      what an engine shows before it serves
text.py       tokens to text as it comes, up to stop strings
keys.py       who may ask for what
admission.py  who begins next
memory.py     what serving takes, from shapes
client.py     a model behind a server, to talk to
http/         OpenAI's API; the extra `serve`

layers = Layers(model)
store = Store(layers.read, root)
engine, note = open_engine(model, layers)
for item in engine.submit(ids, Sampling(max_tokens=64), store.lease("sql")): ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from lorica.serve.engine import Engine, EngineSettings
    from lorica.serve.rows import Layers


def open_engine(
    model: nn.Module, layers: Layers, settings: EngineSettings | None = None, ends: Sequence[int] = ()
) -> tuple[Engine, str]:
    """The best engine that can serve a model exactly, started and checked; and why it is the slower one, if it is.

    Args:
        layers: of this model, which the store's payloads come from (`Layers.read`). Where they are `deterministic`,
            every request is computed by itself, so that nothing else is in its bits; the slower engine does that.
        ends: ids that end a text, such as the tokenizer's and the generation config's.
    """
    from lorica.serve import check
    from lorica.serve.plain import Plain

    model.eval()
    own = check.model_is_its_own(model, [1, 2, 3])
    reason = "every request is computed by itself, without batches (--deterministic)"
    if not layers.deterministic:
        try:
            return _batching(model, layers, settings, ends, own), ""
        except Exception as fault:  # whatever a changed library throws, there is another way
            reason = f"continuous batching is not used: {fault}"
    engine = Plain(model, layers, settings, ends)
    engine.start()
    own(engine)
    return engine, reason


def _batching(
    model: nn.Module,
    layers: Layers,
    settings: EngineSettings | None,
    ends: Sequence[int],
    own: Callable[[Engine], None],
) -> Engine:
    """The bridge, started and checked."""
    import transformers

    from lorica.serve import check
    from lorica.serve.bridge import MINOR, Bridge

    if not transformers.__version__.startswith(f"{MINOR}."):
        raise RuntimeError(f"it was tested with transformers {MINOR}, this is {transformers.__version__}")
    check.adapters_are_exact(Bridge, model.device)  # type: ignore[arg-type]
    engine = Bridge(model, layers, settings, ends)
    engine.start()
    try:
        own(engine)
    except BaseException:
        engine.stop()
        raise
    return engine
