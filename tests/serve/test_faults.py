"""What goes wrong: bad requests, bad keys, floods, slow readers, those who leave, an engine that fails, a server that
stops. Each ends in an error that says what it is, and in nothing left behind."""

from __future__ import annotations

import asyncio
import random

import pytest

from .asgi import Answered
from .conftest import put
from .loop import run_in_loop, until

HELLO = [{"role": "user", "content": "Hi"}]
KEYS = """
[support]
key = "sk-support-0123456789"
models = ["a*"]
concurrency = 2
[sales]
key = "sk-sales-0123456789"
rate = 2
[ops]
key = "sk-ops-0123456789"
admin = true
"""


def named(request):
    return f"{request.adapter or 'base'}!"


def clean(server) -> bool:
    """Whether nothing is left of any request."""
    queue = server.service.admission
    leases = sum(each.leases for each in server.store.status())
    return not (server.engine.open or queue.running or queue.waiting or leases or server.app.inside)


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"prompt": "x"}, "model", "model is missing"),
        ({"model": "a"}, "prompt", "prompt is missing"),
        ({"model": "a", "prompt": []}, "prompt", "not empty"),
        ({"model": "a", "prompt": ""}, "prompt", "empty"),
        ({"model": "a", "prompt": [[]]}, "prompt", "not empty"),
        ({"model": "a", "prompt": [-1]}, "prompt", "token ids"),
        ({"model": "a", "prompt": [True]}, "prompt", "token ids"),
        ({"model": "a", "prompt": ["x", 1]}, "prompt", "token ids"),
        ({"model": "a", "prompt": "x", "echo": True}, "echo", "echo is not supported"),
        ({"model": "a", "prompt": "x", "best_of": 3}, "best_of", "best_of is not supported"),
        ({"model": "a", "prompt": "x", "suffix": "y"}, "suffix", "suffix is not supported"),
        ({"model": "a", "prompt": "x", "logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"model": "a", "prompt": "x", "temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"model": "a", "prompt": "x", "temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"model": "a", "prompt": "x", "temperature": "1"}, "temperature", "number"),
        ({"model": "a", "prompt": "x", "top_p": 0}, "top_p", "greater than 0"),
        ({"model": "a", "prompt": "x", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"model": "a", "prompt": "x", "max_tokens": 2.5}, "max_tokens", "integer"),
        ({"model": "a", "prompt": "x", "n": 1000}, "n", "less than or equal to 128"),
        ({"model": "a", "prompt": "x", "logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"model": "a", "prompt": "x", "stop": [""]}, "stop.0", "at least 1 character"),
        ({"model": "a", "prompt": "x", "stop": ["x"] * 17}, "stop", "at most 16"),
        ({"model": "a", "prompt": "x", "stream_options": {"a": 1}}, "stream_options.a", "not a field"),
        ({"model": "a", "prompt": "x", "max_tokens": 200}, "max_tokens", "context is 200 tokens"),
        ({"model": "a", "prompt": "x" * 200}, "prompt", "context is 200 tokens"),
    ],
)
def test_a_completion_that_cannot_be_understood_is_refused_by_the_name_of_the_field(serve, body, param, told):
    server = serve(named)
    answer = asyncio.run(server.client().post("/v1/completions", body))
    error = answer.json["error"]
    assert (answer.status, error["type"], error["code"], error["param"]) == (400, "BadRequestError", 400, param)
    assert told in error["message"]
    assert not server.engine.requests


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "type text"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"messages": HELLO, "prompt": "x"}, "prompt", "not a field"),
    ],
)
def test_a_chat_that_cannot_be_understood_is_refused_by_the_name_of_the_field(serve, body, param, told):
    answer = asyncio.run(serve(named).client().post("/v1/chat/completions", {"model": "a"} | body))
    assert (answer.status, answer.json["error"]["param"]) == (400, param)
    assert told in answer.json["error"]["message"]


@run_in_loop
async def test_all_faults_of_a_request_are_told_at_once(serve):
    answer = await serve(named).client().post("/v1/completions", {"prompt": "x", "echo": True, "top_p": 2})
    message = answer.json["error"]["message"]
    assert all(name in message for name in ("echo", "model is missing", "top_p"))


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"model": NaN}', b"[" * 10000, b"\xff"])
def test_what_is_no_json_object_is_refused(serve, body):
    answer = asyncio.run(serve(named).client().send("POST", "/v1/completions", body))
    assert answer.status == 400 and answer.json["error"]["type"] == "BadRequestError"


@run_in_loop
async def test_paths_methods_and_kinds_of_body_that_are_not_known_have_openai_s_form_too(serve):
    client = serve(named, settings={"body_bytes": 100}).client()
    for status, answer in (
        (404, await client.get("/v1/nothing")),
        (405, await client.get("/v1/completions")),
        (415, await client.send("POST", "/v1/completions", {}, headers={"content-type": "text/plain"})),
        (413, await client.post("/v1/completions", {"model": "a", "prompt": "x" * 100})),
    ):
        assert answer.status == status and answer.json["error"]["code"] == status


@run_in_loop
async def test_text_that_can_never_fit_is_refused_before_it_is_encoded(serve, monkeypatch):
    server = serve(lambda request: "x")
    long = "x" * (32 * server.service.context + 1)
    monkeypatch.setattr(server.service, "_in_thread", None)
    for path, body, field in (
        ("/v1/completions", {"prompt": long}, "prompt"),
        ("/v1/completions", {"prompt": ["x", long]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long[:4000]}] * 2}, "messages"),
    ):
        answer = await server.client().post(path, {"model": "a", **body})
        assert answer.status == 400 and answer.json["error"]["param"] == field
        assert "characters; this model's context of 200 tokens" in answer.json["error"]["message"]


@run_in_loop
async def test_a_body_that_does_not_come_is_not_waited_for(serve, monkeypatch):
    from lorica.serve.http import routes

    client = serve(named).client()
    monkeypatch.setattr(routes, "_BODY_SECONDS", 0.01)
    for how in ({}, {"hang_up_after": 0}):  # one who is silent, and one who leaves
        assert (await client.send("POST", "/v1/completions", b"{", whole=False, **how)).status == 408


@run_in_loop
async def test_an_unknown_model_is_404_with_the_nearest_one(serve, root):
    put(root / "support")
    client = serve(named).client()
    for path, body in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": HELLO})):
        answer = await client.post(f"/v1/{path}", {"model": "suport", **body})
        assert answer.json == {
            "error": {
                "message": "the model 'suport' does not exist here; did you mean 'support'?",
                "type": "NotFoundError",
                "param": "model",
                "code": 404,
            }
        }
    assert (await client.get("/v1/models/suport")).status == 404


@run_in_loop
async def test_without_a_chat_template_chats_are_refused_and_completions_answered(serve, tok):
    server = serve(named)
    tok_without = type(tok)(tokenizer_object=tok.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    server.service.tok = tok_without
    answer = await server.client().post("/v1/chat/completions", {"model": "a", "messages": HELLO})
    assert answer.status == 400 and "/v1/completions" in answer.json["error"]["message"]
    assert (await server.client().post("/v1/completions", {"model": "a", "prompt": "x"})).status == 200


@run_in_loop
async def test_keys_open_what_they_are_for_and_nothing_else(serve):
    server = serve(named, keys=KEYS)
    ask = {"model": "a", "prompt": "x"}
    nobody, wrong = server.client(), server.client("sk-unknown-0123456789")
    for client in (nobody, wrong):
        answer = await client.post("/v1/completions", ask)
        assert answer.status == 401 and answer.json["error"]["type"] == "AuthenticationError"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/v1/models")).status == 401
        assert (await client.get("/health")).status == 200
    support, ops = server.client("sk-support-0123456789"), server.client("sk-ops-0123456789")
    assert (await support.post("/v1/completions", ask)).status == 200
    for hidden in ("b", "base", "nobody"):  # what there is besides is not told
        answer = await support.post("/v1/completions", {**ask, "model": hidden})
        assert answer.status == 403 and answer.json["error"]["type"] == "PermissionDeniedError"
    assert [card["id"] for card in (await support.get("/v1/models")).json["data"]] == ["a"]
    for path in ("load_lora_adapter", "unload_lora_adapter", "lora_alias"):
        assert (await support.post(f"/v1/{path}", {"lora_name": "a", "alias": "x"})).status == 403
    assert (await ops.post("/v1/unload_lora_adapter", {"lora_name": "a"})).status == 200


@run_in_loop
async def test_a_key_keeps_to_its_rate(serve):
    client = serve(named, keys=KEYS).client("sk-sales-0123456789")
    answers = [await client.post("/v1/completions", {"model": "a", "prompt": "x"}) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert 0 < int(answers[-1].headers["retry-after"]) <= 30
    assert answers[-1].json["error"]["type"] == "RateLimitError"
    counted = (await client.get("/metrics")).body.decode()  # what was not let in is not counted as served
    assert 'vllm:prompt_tokens_total{model_name="a"} 2.0' in counted


@run_in_loop
async def test_a_key_s_prompts_are_cached_in_a_space_of_its_own(serve):
    server = serve(named, keys=KEYS)
    for key in ("sk-ops-0123456789", "sk-support-0123456789"):
        assert (await server.client(key).post("/v1/completions", {"model": "a", "prompt": "x"})).status == 200
    assert [request.space for request in server.engine.requests] == ["ops", "support"]


@run_in_loop
async def test_one_key_s_flood_keeps_no_other_waiting_for_long(serve):
    server = serve(keys=KEYS, kv_tokens=40, running=2, waiting=20)
    order = []

    async def ask(key, name):
        answer = await server.client(key).post("/v1/completions", {"model": "a", "prompt": "x", "max_tokens": 9})
        order.append((name, answer.status))

    flood = [asyncio.create_task(ask("sk-ops-0123456789", "flood")) for _ in range(60)]
    await until(lambda: len(server.engine.open) == 2 and len(order) == 60 - 22)
    assert order == [("flood", 429)] * 38
    other = [asyncio.create_task(ask("sk-support-0123456789", "other")) for _ in range(3)]
    await until(lambda: len(server.service.admission.waiting) == 20 and len(order) == 41)
    order.clear()
    while any(not task.done() for task in [*flood, *other]):
        await until(lambda: server.engine.open or all(task.done() for task in [*flood, *other]))
        if server.engine.open:
            server.engine.open[0].say("yes")
            server.engine.open[0].end()
            await asyncio.sleep(0)
    places = [place for place, (name, status) in enumerate(order) if name == "other" and status == 200]
    assert len(places) == 3 and places[-1] < 10
    assert clean(server)


@run_in_loop
async def test_who_leaves_ends_the_request_wherever_it_is(serve):
    """While it waits, while it is answered whole, and in the middle of a stream."""
    server = serve(running=1)
    client = server.client()
    ask = {"model": "a", "prompt": "x", "max_tokens": 50}
    got = Answered()
    stream = asyncio.create_task(client.post("/v1/completions", ask | {"stream": True}, hang_up_after=2, into=got))
    await until(lambda: server.engine.open)
    await client.post("/v1/completions", ask, hang_up_after=0)  # waits behind the stream
    assert not server.service.admission.waiting
    server.engine.open[0].say("a")
    await until(lambda: got.pieces)
    server.engine.open[0].say("b")
    await stream
    await until(lambda: clean(server))
    await client.post("/v1/completions", ask, hang_up_after=0)
    assert clean(server)
    assert [line["status"] for line in server.lines] == [499, 499, 499]


@run_in_loop
async def test_a_slow_reader_keeps_neither_the_engine_nor_anyone_else(serve):
    server = serve(running=1)
    client, reading, got = server.client(), asyncio.Event(), Answered()
    ask = {"model": "a", "prompt": "x", "max_tokens": 50, "stream": True}
    slow = asyncio.create_task(client.post("/v1/completions", ask, reading=reading, into=got))
    await until(lambda: server.engine.open)
    server.engine.open[0].say("all of it")
    server.engine.open[0].end()
    await until(lambda: not server.service.admission.running)  # the turn is over, though nothing was read
    server.engine.answer = named
    assert (await client.post("/v1/completions", {"model": "b", "prompt": "x"})).json["choices"][0]["text"] == "b!"
    reading.set()
    await slow
    assert "".join(event["choices"][0]["text"] for event in got.events[:-1]) == "all of it"
    assert len(got.events) < 9  # what waited was joined


@run_in_loop
async def test_a_request_that_takes_too_long_is_ended(serve):
    server = serve(settings={"timeout": 0.05})
    client = server.client()
    ask = {"model": "a", "prompt": "x", "max_tokens": 50}
    assert (await client.post("/v1/completions", ask)).status == 504
    asking = asyncio.create_task(client.post("/v1/completions", ask | {"stream": True}))
    await until(lambda: server.engine.open)
    server.engine.open[0].say("a")
    *_, last = (await asking).events
    assert last["error"]["type"] == "TimeoutError"
    assert clean(server)
    assert [line["status"] for line in server.lines] == [504, 504]


@run_in_loop
async def test_who_reads_nothing_of_a_whole_answer_is_let_go_when_the_time_is_up(serve):
    server = serve(named, settings={"timeout": 0.05})
    answer = await server.client().post("/v1/completions", {"model": "a", "prompt": "x"}, reading=asyncio.Event())
    assert answer.pieces == []
    assert clean(server)
    assert server.lines[-1]["status"] == 504


@run_in_loop
async def test_a_dead_engine_is_503(serve):
    server = serve(named)
    server.engine.stop()
    answer = await server.client().post("/v1/completions", {"model": "a", "prompt": "x"})
    assert answer.status == 503 and "not running" in answer.json["error"]["message"]


@run_in_loop
async def test_what_the_engine_fails_at_is_an_error_before_and_in_a_stream(serve):
    server = serve()
    client = server.client()
    ask = {"model": "a", "prompt": "x", "stream": True}
    for said in ("", "ab"):
        asking = asyncio.create_task(client.post("/v1/completions", ask))
        await until(lambda: server.engine.open)
        server.engine.open[0].say(said)
        await asyncio.sleep(0.01)
        server.engine.open[0].end("error", error="out of memory")
        answer = await asking
        assert answer.status == (200 if said else 500)
        assert (answer.events[-1] if said else answer.json)["error"]["message"] == "out of memory"
        assert b"[DONE]" not in answer.body
    assert clean(server)


@run_in_loop
async def test_one_bad_choice_ends_the_others(serve):
    server = serve()
    asking = asyncio.create_task(server.client().post("/v1/completions", {"model": "a", "prompt": "x", "n": 3}))
    await until(lambda: len(server.engine.open) == 3)
    server.engine.open[1].end("error", error="no")
    assert (await asking).status == 500
    assert clean(server)


@run_in_loop
async def test_a_fault_of_ours_is_500_in_openai_s_form_and_heard_of(serve):
    server = serve(named)
    server.engine.submit = lambda *_: 1 / 0
    got = Answered()
    with pytest.raises(ZeroDivisionError):
        await server.client().send("POST", "/v1/completions", {"model": "a", "prompt": "x"}, into=got)
    assert got.status == 500 and got.json["error"]["type"] == "InternalServerError"
    assert not server.service.admission.running


@run_in_loop
async def test_a_server_that_stops_turns_new_requests_away_and_finishes_the_others(serve):
    server = serve()
    client = server.client()
    asking = asyncio.create_task(client.post("/v1/completions", {"model": "a", "prompt": "x"}))
    await until(lambda: server.engine.open)
    server.service.draining = True
    answer = await client.post("/v1/completions", {"model": "a", "prompt": "x"})
    assert answer.status == 503 and "retry-after" in answer.headers
    assert (await client.get("/health")).status == 503
    server.engine.open[0].say("done")
    server.engine.open[0].end()
    assert (await asking).json["choices"][0]["text"] == "done"


@run_in_loop
async def test_running_requests_keep_an_adapter_that_is_unloaded(serve):
    server = serve()
    client = server.client()
    asking = asyncio.create_task(client.post("/v1/completions", {"model": "a", "prompt": "x"}))
    await until(lambda: server.engine.open)
    assert (await client.post("/v1/unload_lora_adapter", {"lora_name": "a"})).status == 200
    assert (await client.post("/v1/completions", {"model": "a", "prompt": "x"})).status == 404
    server.engine.open[0].say("a!")
    server.engine.open[0].end()
    assert (await asking).json["choices"][0]["text"] == "a!"


@run_in_loop
async def test_a_storm_of_good_bad_leaving_and_slow_requests_ends_clean_with_right_answers(serve):
    server = serve(keys=KEYS, kv_tokens=400, running=8, waiting=64)
    server.engine.answer = lambda request: f"{request.adapter}:{request.prompt}"
    random_, wrong = random.Random(0), []

    async def one(number):
        key = random_.choice(["sk-ops-0123456789", "sk-support-0123456789", "sk-bad"])
        model = random_.choice(["a", "b", "nobody"])
        prompt = "x" * random_.choice([1, 30, 500]) + str(number)
        how = random_.choice([{}, {}, {"hang_up_after": random_.randint(0, 3)}])
        stream = random_.random() < 0.5
        ask = {"model": model, "prompt": prompt, "max_tokens": 60, "stream": stream}
        await asyncio.sleep(random_.random() * 0.2)
        answer = await server.client(key).post("/v1/completions", ask, **how)
        if how or answer.status != 200:
            return answer.status
        said = "".join(each["choices"][0]["text"] for each in (answer.events[:-1] if stream else [answer.json]))
        if said != f"{model}:{prompt}":
            wrong.append((model, prompt, said))
        return 200

    statuses = await asyncio.gather(*(one(number) for number in range(600)))
    assert not wrong
    assert {200, 400, 401, 403, 404} <= set(statuses) <= {0, 200, 400, 401, 403, 404, 429}
    await until(lambda: clean(server))
    assert len(server.lines) == 600
