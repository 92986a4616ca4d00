"""Bodies as OpenAI writes them: requests that are understood whole or refused by the name of the field, and errors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import from_json

from lorica.errors import nearest

ERRORS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}
# Fields that change nothing about an answer here.
_FIELDS = 64  # of a body: more than any request has
IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
}
# Fields of which only the value that changes nothing is understood; many clients send it.
NEUTRAL: dict[str, Sequence[Any]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "min_p": (0,),
    "min_tokens": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class Refused(Exception):
    """A request that is not answered: an HTTP status and the error that goes with it."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI and vLLM write it."""
        kind = ERRORS.get(self.status, "InternalServerError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> Any:
    """One prompt or several, each a text or token ids -> a list of them."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(each, str) for each in value):
            return value
        if _is_ids(value):
            return [value]
        if all(map(_is_ids, value)):
            return value
    raise ValueError("it must be a text, token ids, or a list of texts or of token ids, and not empty")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int and each >= 0 for each in value)


def _content(value: Any) -> Any:
    """A message's content as one text; parts of other kinds are refused."""
    if not isinstance(value, list):
        return value
    kinds = {part.get("type") if isinstance(part, dict) else None for part in value}
    if kinds - {"text"} or not all(isinstance(part.get("text"), str) for part in value):
        raise ValueError("only parts of type text are understood")
    return "".join(part["text"] for part in value)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """How a stream ends. Obfuscation, which pads events to hide their lengths, is not done."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_content)] = ""
    name: str | None = None
    tool_call_id: str | None = None


class _Request(_Strict):
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    seed: int | None = Field(None, ge=-(2**62), lt=2**62)
    n: int = Field(1, ge=1, le=128)
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], BeforeValidator(_listed)] = Field(
        default=[], max_length=16
    )
    stop_token_ids: list[int] = Field(default=[], max_length=64)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


class TextRequest(_Request):
    """Body of /v1/completions."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts)]
    logprobs: int | None = Field(None, ge=0, le=20)


class ChatRequest(_Request):
    """Body of /v1/chat/completions."""

    # One fault is enough of a long list.
    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


class LoadRequest(_Strict):
    """Body of /v1/load_lora_adapter: vLLM's, and SGLang's `pinned`. Without a path a known name is read again."""

    lora_name: str
    lora_path: str | None = None
    load_inplace: bool = False
    pinned: bool = False


class UnloadRequest(_Strict):
    """Body of /v1/unload_lora_adapter. vLLM's `lora_int_id` is its own affair."""

    lora_name: str
    lora_int_id: int | None = None


class AliasRequest(_Strict):
    """Body of /v1/lora_alias: `alias` stands for `lora_name` (or `name@digest`) from now on; null forgets it."""

    alias: str
    lora_name: str | None = None


R = TypeVar("R", bound=BaseModel)


def parse(kind: type[R], body: bytes) -> R:
    """A request from JSON. `Refused` with the names of all fields that are wrong or not understood."""
    try:
        found = from_json(body, allow_inf_nan=False)
    except ValueError as fault:
        raise Refused(400, f"the body is not JSON: {fault}") from fault
    if not isinstance(found, dict):
        raise Refused(400, "the body must be a JSON object")
    if len(found) > _FIELDS:
        raise Refused(400, f"the body has {len(found):,} fields, of which this server understands few")
    values = {key: value for key, value in _given(found).items() if key not in IGNORED or key in kind.model_fields}
    faults: dict[str, str] = {}
    for key in values.keys() - kind.model_fields.keys():
        if key not in NEUTRAL:
            faults[key] = f"is not a field that this server understands{nearest(key, kind.model_fields)}"
        elif values[key] not in NEUTRAL[key]:
            faults[key] = f"is not supported by this server: leave it away, or give {json.dumps(NEUTRAL[key][0])}"
        del values[key]
    try:
        parsed = kind.model_validate(values)
    except ValidationError as wrong:
        for error in wrong.errors(include_url=False):
            place = ".".join(map(str, error["loc"]))
            faults.setdefault(place, _told(error))
    if faults:
        told = "; ".join(f"{place} {fault}" for place, fault in sorted(faults.items()))
        raise Refused(400, told, param=min(faults))
    return parsed


def _told(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "is not a field that this server understands"
    if error["type"] == "missing":
        return "is missing"
    return str(error["msg"]).removeprefix("Value error, ").replace("Input should", "should")


def _given(value: Any) -> Any:
    """Without what is null, which means that it was not given."""
    if isinstance(value, dict):
        return {key: _given(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_given(each) for each in value]
    return value


def nats(value: float | None) -> float:
    """A log-probability that JSON can hold; OpenAI's number for what is next to impossible."""
    return value if value is not None and math.isfinite(value) else -9999.0
