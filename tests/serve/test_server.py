"""A listening process, asked over loopback by OpenAI's own client: nothing in it is changed for us."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from lorica.errors import LoricaError
from lorica.evaluate import Talk
from lorica.serve.admission import Limits
from lorica.serve.client import Remote
from lorica.serve.http import server
from lorica.serve.http.routes import app
from lorica.serve.http.service import Service, ServiceSettings
from lorica.serve.keys import Keys
from lorica.serve.store import Store

from .conftest import put, read
from .fake import Fake, Request, make_tok

ADMIN, USER = "sk-admin-0123456789", "sk-user-0123456789"
HELLO: Any = [{"role": "user", "content": "Hi"}]


class Ticking(Fake):
    """Says its adapter's name, then counts, a token every few milliseconds, from a thread of its own."""

    max_context = 2000

    def submit(self, prompt, sampling, lease, space=""):
        stream = super().submit(prompt, sampling, lease, space)
        threading.Thread(target=self._tick, args=(self.requests[-1],), daemon=True).start()
        return stream

    def _tick(self, request: Request) -> None:
        for letter in f"{request.adapter or 'base'}: Grüße " + "x" * 2000:
            time.sleep(0.005)
            if request.stream.ended:
                return
            request.say(letter)


def listening(root: Path, keys: str, sock: socket.socket, drain: float) -> None:
    """The whole of a server's process."""
    engine = Ticking(kv_tokens=100_000)
    store = Store(read, root, reserved=["base"])
    (root.parent / "keys.toml").write_text(keys)
    found = Keys.read(root.parent / "keys.toml") if keys else None
    service = Service(engine, store, make_tok(), ServiceSettings("base"), Limits(100_000), keys=found)
    os._exit(server.run(app(service), service, sock, drain=drain))


@pytest.fixture
def start(tmp_path):
    """Start a server in a process: `(process, address)`."""
    made = []

    def begin(keys: str = "", drain: float = 20.0):
        for name in ("a", "b"):
            put(tmp_path / "adapters" / name)
        sock = server.listen("127.0.0.1", 0)
        address = sock.getsockname()
        process = multiprocessing.get_context("fork").Process(
            target=listening, args=(tmp_path / "adapters", keys, sock, drain)
        )
        process.start()
        sock.close()
        made.append(process)
        for _ in range(500):
            try:
                if get(address, "/health").status == 200:
                    return process, address
            except OSError:
                time.sleep(0.01)
        raise AssertionError("it does not listen")

    yield begin
    for process in made:
        process.kill()
        process.join()


def get(address, path):
    connection = http.client.HTTPConnection(*address, timeout=10)
    connection.request("GET", path)
    return connection.getresponse()


def client(address, key=ADMIN, **how):
    return openai.OpenAI(base_url=f"http://{address[0]}:{address[1]}/v1", api_key=key, max_retries=0, **how)


def test_openai_s_client_works_unchanged(start, tmp_path):
    _, address = start(f'[ops]\nkey = "{ADMIN}"\nadmin = true\n[user]\nkey = "{USER}"\nmodels = ["a"]\n')
    ai = client(address)
    assert [model.id for model in ai.models.list()] == ["base", "a", "b"]
    assert ai.models.retrieve("b").id == "b"

    chat = ai.chat.completions.create(model="a", messages=HELLO, max_tokens=9, seed=1, user="u", temperature=0)
    assert chat.choices[0].message.content == "a: Grüß"
    assert chat.choices[0].finish_reason == "length" and chat.usage.completion_tokens == 9
    text = ai.completions.create(model="b", prompt="x", max_tokens=3, logprobs=1)
    assert text.choices[0].text == "b: " and text.choices[0].logprobs.tokens == ["b", ":", " "]

    stream = ai.chat.completions.create(
        model="base:a", messages=HELLO, stream=True, stop=["xx"], stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "a: Grüße "
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.prompt_tokens == len("<user>Hi<bot>")

    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ai.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.BadRequestError, match="best_of"):
        ai.completions.create(model="a", prompt="x", best_of=2)
    with pytest.raises(openai.AuthenticationError):
        client(address, "sk-wrong-0123456789").models.list()
    with pytest.raises(openai.PermissionDeniedError):
        client(address, USER).completions.create(model="b", prompt="x")

    put(tmp_path / "adapters" / "c")
    body = {"lora_name": "new", "lora_path": str(tmp_path / "adapters" / "c")}
    assert ai.post("/load_lora_adapter", body=body, cast_to=object)["id"] == "new"
    assert ai.completions.create(model="new", prompt="x", max_tokens=3).choices[0].text == "new"
    ai.post("/unload_lora_adapter", body={"lora_name": "new"}, cast_to=object)
    with pytest.raises(openai.NotFoundError):
        ai.completions.create(model="new", prompt="x")


def test_talking_to_a_server_is_like_talking_to_a_model(start):
    _, address = start()
    url = f"http://{address[0]}:{address[1]}"
    talk = Talk(Remote(url), max_new=3)
    assert talk.tuned and "".join(talk.ask("Hi")) == "a: "
    talk.toggle()
    assert not talk.tuned and "".join(talk.retry()) == "bas"
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]
    assert "".join(Talk(Remote(f"{url}/v1", "b"), max_new=2).ask("Hi")) == "b:"
    assert not Remote(url, "base").adapted
    with pytest.raises(LoricaError, match="has no model 'c'.*base, a, b"):
        Remote(url, "c")
    with pytest.raises(LoricaError, match="there is no /v2/models here"):
        Remote(f"{url}/v2")
    with pytest.raises(LoricaError, match="context is 2,000"):
        list(Talk(Remote(url), max_new=3000).ask("Hi"))
    with pytest.raises(LoricaError, match="cannot be reached"):
        Remote("http://127.0.0.1:9")


def test_hanging_up_frees_the_engine(start):
    _, address = start()
    with client(address).chat.completions.create(model="a", messages=HELLO, stream=True) as stream:
        next(iter(stream))
    deadline = time.monotonic() + 10
    while "vllm:num_requests_running 0.0" not in get(address, "/metrics").read().decode():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_first_signal_drains_and_the_process_ends_with_0(start):
    process, address = start()
    stream = client(address).completions.create(model="a", prompt="x", max_tokens=150, stream=True)
    pieces = [next(iter(stream)).choices[0].text]
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.1)
    assert get(address, "/health").status == 503
    with pytest.raises(openai.InternalServerError) as refused:
        client(address).completions.create(model="a", prompt="x")
    assert refused.value.status_code == 503
    pieces += [chunk.choices[0].text for chunk in stream]
    assert len("".join(pieces).encode()) == 150
    process.join(10)
    assert process.exitcode == 0


def test_what_is_not_done_when_draining_ends_is_cut_off_and_the_process_ends_with_0(start):
    process, address = start(drain=0.2)
    stream = client(address).completions.create(model="a", prompt="x", max_tokens=1900, stream=True)
    next(iter(stream))
    os.kill(process.pid, signal.SIGTERM)
    with pytest.raises((openai.APIError, httpx2.HTTPError)):
        list(stream)
    process.join(10)
    assert process.exitcode == 0


def test_a_second_signal_ends_it_at_once(start):
    process, address = start()
    stream = client(address).completions.create(model="a", prompt="x", max_tokens=1900, stream=True)
    next(iter(stream))
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    process.join(3)
    assert process.exitcode == server.FORCED


def test_readers_who_do_not_read_keep_nobody_waiting(start):
    _, address = start()
    body = json.dumps({"model": "a", "prompt": "x", "n": 2, "max_tokens": 1500, "stream": True, "logprobs": 5}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    slow = []
    for _ in range(3):
        sock = socket.create_connection(address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(head % len(body) + body)
        slow.append(sock)
    assert client(address).completions.create(model="b", prompt="x", max_tokens=3).choices[0].text == "b: "
    assert "vllm:num_requests_running 6.0" in get(address, "/metrics").read().decode()
    for sock in slow:
        sock.close()


def test_a_port_in_use_is_told():
    with server.listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(LoricaError, match="cannot listen on"):
            server.listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)]
)
def test_who_can_reach_an_address_is_known(host, local):
    assert server.is_local(host) is local
