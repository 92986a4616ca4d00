"""What every engine gives: a stream that is read blocking or async and cancelled from anywhere."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from lorica.errors import LoricaError
from lorica.serve.engine import End, Sampling, Stream, Token


def feed(stream: Stream, count: int, pause: float = 0.0) -> None:
    for i in range(count):
        time.sleep(pause)
        stream.put(Token(i, -0.5))
    stream.put(End("stop"))


def test_a_stream_is_read_blocking():
    stream = Stream(lambda: None)
    threading.Thread(target=feed, args=(stream, 5, 0.002)).start()
    tokens, end = stream.result()
    assert [token.id for token in tokens] == list(range(5)) and end == End("stop")
    assert list(stream) == []


def test_a_stream_is_read_by_many_coroutines_at_once():
    async def read(stream):
        return [item async for item in stream]

    async def main():
        streams = [Stream(lambda: None) for _ in range(8)]
        threads = [threading.Thread(target=feed, args=(stream, 20, 0.0005)) for stream in streams]
        for thread in threads:
            thread.start()
        return await asyncio.wait_for(asyncio.gather(*map(read, streams)), 10)

    for items in asyncio.run(main()):
        assert [item.id for item in items[:-1]] == list(range(20)) and items[-1] == End("stop")


def test_a_reader_whose_event_loop_is_gone_does_not_stop_the_engine():
    stream = Stream(lambda: None)

    async def first():
        return await anext(stream)

    stream.put(Token(1))
    assert asyncio.run(first()) == Token(1)
    stream.put(Token(2))
    stream.put(End("stop"))
    assert list(stream) == [Token(2), End("stop")]


def test_cancel_is_told_once_and_not_after_the_end():
    told = []
    stream = Stream(lambda: told.append(1))
    stream.cancel()
    stream.cancel()
    assert told == [1]
    stream.put(End("cancelled"))
    stream.put(Token(1, 0.0))
    assert list(stream) == [End("cancelled")]
    late = Stream(lambda: told.append(2))
    late.put(End("stop"))
    late.cancel()
    assert told == [1]


def test_settings_that_cannot_be_used_are_all_named():
    with pytest.raises(LoricaError) as fault:
        Sampling(max_tokens=0, temperature=-1, top_p=0, top_k=-2, logprobs=99)
    assert all(name in str(fault.value) for name in ("max_tokens", "temperature", "top_p", "top_k", "logprobs"))
