"""Every route, with an engine that says what it is told: what OpenAI's and vLLM's clients expect."""

from __future__ import annotations

import asyncio
import json

from lorica import __version__

from .asgi import Answered
from .conftest import put
from .loop import run_in_loop, until

HELLO = [{"role": "user", "content": "Hi"}]


def named(request):
    return f"{request.adapter or 'base'}!"


@run_in_loop
async def test_models_are_the_base_and_every_adapter(serve):
    client = serve(named).client()
    listed = (await client.get("/v1/models")).json
    assert listed["object"] == "list"
    base, a, b = listed["data"]
    assert (base["id"], base["parent"], base["root"]) == ("base", None, "base")
    assert (a["id"], a["parent"], a["object"], a["max_model_len"]) == ("a", "base", "model", 200)
    assert a["root"].endswith("adapters/a") and a["created"] > 0 and b["id"] == "b"
    assert (await client.get("/v1/models/a")).json == a
    assert (await client.get("/v1/models/base")).json == base


@run_in_loop
async def test_a_model_s_name_may_have_a_slash(serve, root):
    server = serve(named)
    server.store.load("acme/a", root / "a").release()
    client = server.client()
    assert (await client.get("/v1/models/acme/a")).json["id"] == "acme/a"
    assert (await client.get("/v1/models/acme/b")).status == 404


@run_in_loop
async def test_a_chat_is_answered_by_the_adapter_that_model_names(serve):
    server = serve(named)
    client = server.client()
    for model, by in (("a", "a"), ("base:b", "b"), ("base", None)):
        answer = await client.post("/v1/chat/completions", {"model": model, "messages": HELLO})
        assert answer.status == 200
        body = answer.json
        assert body["object"] == "chat.completion" and body["model"] == model and body["id"].startswith("chatcmpl-")
        (choice,) = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": f"{by or 'base'}!", "refusal": None}
        assert choice["finish_reason"] == "stop" and choice["index"] == 0
        assert server.engine.requests[-1].adapter == by
    assert server.engine.requests[-1].prompt == "<user>Hi<bot>"
    length = len("<user>Hi<bot>")
    assert body["usage"] == {
        "prompt_tokens": length,
        "completion_tokens": 5,
        "total_tokens": length + 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@run_in_loop
async def test_messages_may_be_parts_and_roles_of_newer_clients(serve):
    server = serve(named)
    messages = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": "Hello", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "Go on"},
    ]
    assert (await server.client().post("/v1/chat/completions", {"model": "a", "messages": messages})).status == 200
    assert server.engine.requests[0].prompt == "<system>Be brief<user>Hi<assistant>Hello<user>Go on<bot>"


@run_in_loop
async def test_an_adapter_is_asked_through_the_template_that_it_was_trained_with(serve, root):
    put(root / "own", chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    server = serve(named)
    for model in ("own", "a"):
        await server.client().post("/v1/chat/completions", {"model": model, "messages": HELLO})
    assert [request.prompt for request in server.engine.requests] == ["[Hi]", "<user>Hi<bot>"]


@run_in_loop
async def test_a_generation_that_an_alias_keeps_is_asked_through_its_own_template(serve, root):
    put(root / "own", chat_template="first")
    server = serve(named)
    client = server.client()
    await client.post("/v1/load_lora_adapter", {"lora_name": "own"})
    digest = server.store.find("own").digest
    await client.post("/v1/lora_alias", {"alias": "prod", "lora_name": f"own@{digest}"})
    put(root / "own", chat_template="second")
    await client.post("/v1/load_lora_adapter", {"lora_name": "own", "load_inplace": True})
    for model in ("prod", "own"):
        await client.post("/v1/chat/completions", {"model": model, "messages": HELLO})
    assert [request.prompt for request in server.engine.requests] == ["first", "second"]
    assert server.store.find("prod").digest == digest != server.store.find("own").digest


@run_in_loop
async def test_an_adapter_of_a_hub_is_asked_through_its_template_the_first_time_too(serve, tmp_path, monkeypatch):
    import huggingface_hub

    fetched = put(tmp_path / "hub", chat_template="of the hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda id, **_: str(fetched))
    server = serve(named, store={"named": {"far": "acme/far"}, "hub": ["acme/*"]})
    assert server.store.find("far").state == "on disk"
    for _ in range(2):
        await server.client().post("/v1/chat/completions", {"model": "far", "messages": HELLO})
    assert [request.prompt for request in server.engine.requests] == ["of the hub"] * 2
    assert server.store.find("far").leases == 0


@run_in_loop
async def test_a_chat_is_streamed_as_events(serve):
    client = serve(lambda request: "Grüß dich").client()
    body = {"model": "a", "messages": HELLO, "stream": True}
    answer = await client.post("/v1/chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = answer.events
    assert done == "[DONE]"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1 and not any("usage" in event for event in events)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Grüß dich"
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}


@run_in_loop
async def test_usage_is_streamed_last_where_it_is_asked_for(serve):
    client = serve(named).client()
    body = {"model": "a", "prompt": "abc", "stream": True, "stream_options": {"include_usage": True}}
    *events, last, done = (await client.post("/v1/completions", body)).events
    assert done == "[DONE]" and last["choices"] == []
    assert last["usage"]["prompt_tokens"] == 3 and last["usage"]["completion_tokens"] == 2
    assert all(event["usage"] is None for event in events)


@run_in_loop
async def test_pieces_come_as_tokens_do(serve):
    """Each piece leaves before the next token is there."""
    server = serve()
    got = Answered()
    body = {"model": "a", "prompt": "x", "stream": True, "max_tokens": 100}
    asking = asyncio.create_task(server.client().send("POST", "/v1/completions", body, into=got))
    await until(lambda: server.engine.requests)
    (request,) = server.engine.requests
    for word in ("one", " two", " three"):
        request.say(word)
        await until(lambda word=word: word.encode() in b"".join(got.pieces))
    request.end()
    await asking
    assert "".join(event["choices"][0]["text"] for event in got.events[:-1]) == "one two three"


@run_in_loop
async def test_prompts_are_texts_or_tokens_one_or_several(serve):
    server = serve(lambda request: request.prompt.upper())
    client = server.client()
    for prompt, said in (
        ("ab", ["AB"]),
        (["ab", "c"], ["AB", "C"]),
        ([97, 98], ["AB"]),
        ([[97], [98, 99]], ["A", "BC"]),
    ):
        body = (await client.post("/v1/completions", {"model": "base", "prompt": prompt})).json
        assert body["object"] == "text_completion"
        assert [choice["text"] for choice in body["choices"]] == said
        assert [choice["index"] for choice in body["choices"]] == list(range(len(said)))
    assert body["usage"]["prompt_tokens"] == 3


@run_in_loop
async def test_n_answers_have_indexes_and_seeds_of_their_own(serve):
    server = serve(lambda request: str(request.sampling.seed))
    body = {"model": "a", "prompt": ["x", "y"], "n": 2, "seed": 5, "stream": True}
    events = (await server.client().post("/v1/completions", body)).events[:-1]
    said: dict[int, str] = {}
    for event in events:
        (choice,) = event["choices"]
        said[choice["index"]] = said.get(choice["index"], "") + choice["text"]
    assert said == {0: "5", 1: "6", 2: "5", 3: "6"}


@run_in_loop
async def test_settings_of_sampling_reach_the_engine(serve):
    server = serve(named)
    client = server.client()
    asked = {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "seed": 3, "stop_token_ids": [7], "ignore_eos": True}
    await client.post("/v1/completions", {"model": "a", "prompt": "x", "max_tokens": 9, **asked})
    await client.post("/v1/completions", {"model": "a", "prompt": "x"})
    await client.post("/v1/chat/completions", {"model": "a", "messages": HELLO, "max_completion_tokens": 8})
    await client.post("/v1/chat/completions", {"model": "a", "messages": HELLO})
    first, text, chat, open_end = [request.sampling for request in server.engine.requests]
    assert (first.temperature, first.top_p, first.top_k, first.seed) == (0.5, 0.9, 4, 3)
    assert (first.stop_ids, first.ignore_eos, first.max_tokens, first.logprobs) == ((7,), True, 9, None)
    assert (text.temperature, text.top_p, text.top_k, text.max_tokens) == (1.0, 1.0, 0, 16)
    assert chat.max_tokens == 8
    assert open_end.max_tokens == 200 - len("<user>Hi<bot>")  # no more than the context


@run_in_loop
async def test_stop_strings_end_an_answer_across_tokens_and_are_not_shown(serve):
    server = serve(lambda request: "one END two")
    client = server.client()
    for stream in (False, True):
        body = {"model": "a", "prompt": "x", "max_tokens": 50, "stop": ["END", "\n"], "stream": stream}
        answer = await client.post("/v1/completions", body)
        choices = [event["choices"][0] for event in answer.events[:-1]] if stream else answer.json["choices"]
        assert "".join(choice["text"] for choice in choices) == "one "
        assert choices[-1]["finish_reason"] == "stop"
    assert answer.json["usage"]["completion_tokens"] == 7 if not stream else True


@run_in_loop
async def test_an_answer_that_stops_at_a_string_ends_in_the_engine(serve):
    server = serve()
    body = {"model": "a", "prompt": "x", "max_tokens": 100, "stop": "."}
    asking = asyncio.create_task(server.client().post("/v1/completions", body))
    await until(lambda: server.engine.requests)
    server.engine.requests[0].say("Yes. No")
    answer = await asking
    assert answer.json["choices"][0]["text"] == "Yes" and answer.json["choices"][0]["finish_reason"] == "stop"
    assert not server.engine.open and not server.service.admission.running


@run_in_loop
async def test_what_was_held_back_for_a_stop_string_comes_at_the_end(serve):
    client = serve(lambda request: "one EN").client()
    body = {"model": "a", "prompt": "x", "max_tokens": 50, "stop": ["END"], "logprobs": 0}
    (choice,) = (await client.post("/v1/completions", body)).json["choices"]
    assert choice["text"] == "one EN" and "".join(choice["logprobs"]["tokens"]) == "one EN"


@run_in_loop
async def test_an_answer_of_max_tokens_ends_by_length(serve):
    client = serve(lambda request: "x" * 100).client()
    body = (await client.post("/v1/completions", {"model": "a", "prompt": "x", "max_tokens": 5})).json
    assert body["choices"][0]["text"] == "xxxxx" and body["choices"][0]["finish_reason"] == "length"


@run_in_loop
async def test_logprobs_of_completions_have_openai_s_form(serve):
    client = serve(lambda request: "aü").client()
    body = (await client.post("/v1/completions", {"model": "a", "prompt": "x", "logprobs": 2})).json
    told = body["choices"][0]["logprobs"]
    assert told["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xbc"]
    assert told["token_logprobs"] == [-1.0, -1.0, -1.0]
    assert told["top_logprobs"][0] == {"a": -1.0, "b": -2.0}
    assert told["text_offset"] == [0, 1, 1]
    body = (await client.post("/v1/completions", {"model": "a", "prompt": "x"})).json
    assert body["choices"][0]["logprobs"] is None


@run_in_loop
async def test_logprobs_of_chats_have_openai_s_form(serve):
    client = serve(lambda request: "aü").client()
    asked = {"model": "a", "messages": HELLO, "logprobs": True, "top_logprobs": 1}
    told = (await client.post("/v1/chat/completions", asked)).json["choices"][0]["logprobs"]["content"]
    assert told[0] == {
        "token": "a",
        "logprob": -1.0,
        "bytes": [97],
        "top_logprobs": [{"token": "a", "logprob": -1.0, "bytes": [97]}],
    }
    assert bytes(each for token in told for each in token["bytes"]).decode() == "aü"
    events = (await client.post("/v1/chat/completions", asked | {"stream": True})).events[:-1]
    streamed = [token for event in events for token in (event["choices"][0]["logprobs"] or {}).get("content", [])]
    assert streamed == told


@run_in_loop
async def test_fields_that_change_nothing_are_accepted(serve):
    client = serve(named).client()
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "best_of": 1,
        "echo": False,
        "suffix": None,
        "tools": [],
        "response_format": {"type": "text"},
        "seed": None,
        "stop": None,
        "stream_options": None,
    }
    assert (await client.post("/v1/completions", {"model": "a", "prompt": "x", **harmless})).status == 200
    assert (await client.post("/v1/chat/completions", {"model": "a", "messages": HELLO, **harmless})).status == 200


@run_in_loop
async def test_adapters_are_loaded_and_unloaded_while_it_runs(serve, root):
    server = serve(named)
    client = server.client()
    put(root / ".new")
    (root / ".new").rename(root / "c")
    card = (await client.post("/v1/load_lora_adapter", {"lora_name": "d", "lora_path": str(root / "c")})).json
    assert card["id"] == "d" and card["parent"] == "base"
    again = await client.post("/v1/load_lora_adapter", {"lora_name": "d", "lora_path": str(root / "c")})
    assert again.status == 409 and "load_inplace" in again.json["error"]["message"]
    body = {"lora_name": "d", "lora_path": str(root / "a"), "load_inplace": True, "pinned": True}
    assert (await client.post("/load_lora_adapter", body)).json["root"].endswith("adapters/a")
    assert server.store.find("d").state == "pinned"
    assert (await client.post("/v1/unload_lora_adapter", {"lora_name": "d"})).status == 200
    asked = await client.post("/v1/completions", {"model": "d", "prompt": "x"})
    assert asked.status == 404 and asked.json["error"]["param"] == "model"
    assert "d" not in [card["id"] for card in (await client.get("/v1/models")).json["data"]]
    assert (await client.post("/unload_lora_adapter", {"lora_name": "nobody"})).status == 404


@run_in_loop
async def test_what_cannot_be_loaded_says_why(serve, root):
    client = serve(named).client()
    (put(root / "broken") / "adapter_config.json").write_text("bad")
    for body, status, told in (
        ({"lora_name": "x", "lora_path": str(root / "broken")}, 400, "it is damaged"),
        ({"lora_name": "x", "lora_path": str(root.parent)}, 400, "not inside"),
        ({"lora_name": "../x", "lora_path": str(root / "a")}, 400, "called"),
        ({"lora_name": "base", "lora_path": str(root / "a")}, 400, "base"),
        ({"lora_path": str(root / "a")}, 400, "lora_name is missing"),
        ({"lora_name": "nobody"}, 404, "nobody"),
        ({"lora_name": "new", "lora_path": "~nobody-here/x"}, 400, "no adapter folder"),
        ({"lora_name": "new", "lora_path": "x" * 5000}, 400, "no adapter folder"),
        ({"lora_name": "new", "lora_path": "a\0b"}, 400, "no adapter folder"),
    ):
        answer = await client.post("/v1/load_lora_adapter", body)
        assert answer.status == status and told in answer.json["error"]["message"], body


@run_in_loop
async def test_an_alias_is_switched_and_switched_back(serve):
    server = serve(named)
    client = server.client()

    async def says(model="prod"):
        return (await client.post("/v1/completions", {"model": model, "prompt": "x"})).json["choices"][0]["text"]

    assert (await client.post("/v1/lora_alias", {"alias": "prod", "lora_name": "a"})).json["before"] is None
    assert await says() == "a!"
    assert (await client.post("/v1/lora_alias", {"alias": "prod", "lora_name": "b"})).json["before"] == "a"
    assert await says() == "b!"
    cards = {card["id"]: card for card in (await client.get("/v1/models")).json["data"]}
    assert cards["prod"]["root"] == "b" and cards["prod"]["parent"] == "base"
    assert (await client.post("/v1/lora_alias", {"alias": "prod", "lora_name": None})).status == 200
    assert (await client.post("/v1/completions", {"model": "prod", "prompt": "x"})).status == 404
    assert (await client.post("/v1/lora_alias", {"alias": "base", "lora_name": "a"})).status == 409


@run_in_loop
async def test_health_and_version_are_told(serve):
    server = serve(named)
    client = server.client()
    assert (await client.get("/health")).json == {"status": "ok"}
    assert (await client.get("/version")).json == {"version": __version__}
    server.engine.stop()
    assert (await client.get("/health")).status == 503


@run_in_loop
async def test_metrics_are_those_that_gateways_and_dashboards_read(serve):
    server = serve(named, running=3)
    client = server.client()
    await client.post("/v1/completions", {"model": "a", "prompt": "xyz"})
    await client.post("/v1/completions", {"model": "nobody", "prompt": "xyz"})
    server.engine.answer = None
    asking = asyncio.create_task(client.post("/v1/completions", {"model": "b", "prompt": "x"}))
    await until(lambda: server.engine.open)
    told = (await client.get("/metrics")).body.decode()
    values = dict(line.rsplit(" ", 1) for line in told.splitlines() if not line.startswith("#"))
    assert values["vllm:num_requests_waiting"] == "0.0"
    assert values["vllm:num_requests_running"] == "1.0"
    assert values["vllm:kv_cache_usage_perc"] == "0.25"
    assert values['vllm:prompt_tokens_total{model_name="a"}'] == "3.0"
    assert values['vllm:generation_tokens_total{model_name="a"}'] == "2.0"
    assert values['vllm:time_to_first_token_seconds_count{model_name="a"}'] == "1.0"
    assert values['vllm:inter_token_latency_seconds_count{model_name="a"}'] == "1.0"
    assert values['vllm:e2e_request_latency_seconds_count{model_name="a"}'] == "1.0"
    assert values['vllm:request_success_total{finished_reason="stop",model_name="a"}'] == "1.0"
    assert values['lorica_requests_refused_total{status="404"}'] == "1.0"
    (info,) = [line for line in values if line.startswith("vllm:lora_requests_info")]
    assert 'max_lora="3"' in info and 'running_lora_adapters="b"' in info and 'waiting_lora_adapters=""' in info
    assert float(values[info]) > 1e9
    assert values['lora_adapter_loaded{adapter_name="a",level="memory",pinned="false"}'] == "1.0"
    server.engine.open[0].end()
    await asking


@run_in_loop
async def test_the_log_has_a_line_for_each_request_and_no_word_of_it(serve):
    server = serve(lambda request: "the answer")
    client = server.client()
    body = {"model": "a", "prompt": "my secret", "stream": True}
    answer = await client.post("/v1/completions", body, headers={"X-Request-Id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    await client.post("/v1/completions", {"model": "nobody", "prompt": "x"}, headers={"X-Request-Id": "bad id\n"})
    await client.get("/health")
    first, second = server.lines
    assert first | {"time": "", "ttft": 0, "seconds": 0} == {
        "time": "",
        "method": "POST",
        "path": "/v1/completions",
        "id": "abc-1",
        "tenant": "anybody",
        "model": "a",
        "status": 200,
        "prompt_tokens": 9,
        "output_tokens": 10,
        "ttft": 0,
        "seconds": 0,
    }
    assert second["status"] == 404 and second["id"] != "bad id\n"
    assert "secret" not in json.dumps(server.lines) and "answer" not in json.dumps(server.lines)
