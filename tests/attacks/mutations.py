"""How a file is damaged: at random places, and at the places that mean something, by values that are trouble."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 2**64 - 1, -(2**63), 10**400, 1e300, -0.5, 1e-320, float("nan"),
    float("inf"), "", "x", "8", "../../x", "/etc/passwd", "a\x00b", "\x1b[31m", "\ud83d", "nul\n", "a" * 5000, [], [[]],
    [1], [None], ["q_proj"], {}, {"a": 1}, {"q_proj": 4}, {"q_proj": "x"}, {"(a|aa)+$b": 4}, {"(": 1}, "(a|aa)+$", "(",
    "(x+x+)+y", ".*.*.*.*.*.*.*=", {"": {}}, ["\x00"], [[[[1]]]], "#lora.A", "q_proj",
]  # fmt: skip
SIZES = [0, 1, 2, 3, 7, 8, 255, 2**16, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1]


def bytes_of(rng: random.Random, content: bytes) -> bytes:
    """Damage that knows nothing of the format."""
    made = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        place = rng.randrange(len(made)) if made else 0
        kind = rng.randrange(8)
        if kind == 0 and made:
            made[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del made[place:]
        elif kind == 2:
            made += rng.randbytes(rng.choice((1, 9, 300)))
        elif kind == 3:
            made[place : place + 8] = struct.pack("<Q", rng.choice(SIZES))
        elif kind == 4:
            made[place : place + 4] = struct.pack("<I", rng.choice(SIZES) & 0xFFFFFFFF)
        elif kind == 5:
            del made[place : place + rng.randrange(1, 20)]
        elif kind == 6:
            made[place:place] = made[rng.randrange(len(made) + 1) :][: rng.randrange(1, 40)]
        else:
            made[place : place + 4] = rng.randbytes(4)
    return bytes(made)


def tree(rng: random.Random, value: Any) -> Any:
    """A JSON value with one node, or a key, changed."""
    made = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        holders = [made]
        for each in holders:
            inner = each.values() if isinstance(each, dict) else each
            holders += [one for one in inner if isinstance(one, dict | list) and one]
        holder = rng.choice(holders)
        if not holder:
            continue
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            new = rng.choice(("x", "", "../../x", "a\x00", "a" * 3000, "lora_A", "__metadata__", "#lora.A", key + "2"))
            holder[new] = holder.pop(key)
        elif kind == 2 and isinstance(holder[key], int | float):
            holder[key] = rng.choice((holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2**40))
        else:
            holder[key] = copy.deepcopy(rng.choice(NASTY))
    return made


def json_text(rng: random.Random, value: Any) -> bytes:
    """A JSON value as text, mostly well written."""
    text = json.dumps(value)
    kind = rng.randrange(30)
    if kind == 0:
        text = text[:-1] + ', "r": 3, "r": 4}'
    elif kind == 1:
        depth = rng.choice((65, 990, 5000))
        text = "[" * depth + text + "]" * depth
    elif kind == 2:
        text = text[:1] + '"deep": ' + '{"a":' * 400 + "1" + "}" * 400 + "," + text[1:]
    elif kind == 3:
        text = "\ufeff" + text
    elif kind == 4:
        return text.encode("utf-16")
    return bytes_of(rng, text.encode()) if kind == 5 else text.encode()


def safetensors(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with its header changed, its numbers, or its bytes."""
    kind = rng.randrange(6)
    if kind == 0:
        return bytes_of(rng, content)
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    if kind == 1 and body:
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(body) // 4) * 4
            body[place : place + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), 1e38, 0.0, 1e-45)))
    elif kind == 2:
        name = rng.choice([key for key in header if key != "__metadata__"] or ["x"])
        about = header.setdefault(name, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
        about["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "x"))
    elif kind == 3:
        name = rng.choice([key for key in header if key != "__metadata__"] or ["x"])
        about = header.setdefault(name, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
        shape = about["shape"]
        about["shape"] = rng.choice((shape[::-1], [*shape, 1], [1, *shape], [0, rng.choice(SIZES)], shape[:1], [-1]))
    elif kind == 4 and "__metadata__" in header and "lorica" in header["__metadata__"]:
        ours = json.loads(header["__metadata__"]["lorica"])
        header["__metadata__"]["lorica"] = json_text(rng, tree(rng, ours)).decode(errors="replace")
    else:
        header = tree(rng, header)
    written = json.dumps(header).encode() if isinstance(header, dict) else b"[]"
    length = rng.choice(SIZES) if not rng.randrange(40) else len(written)
    return struct.pack("<Q", length) + written + bytes(body)


def gguf(rng: random.Random, content: bytes) -> bytes:
    """A GGUF file with one of the numbers in its header changed, or anything."""
    kind = rng.randrange(4)
    if kind == 0:
        return bytes_of(rng, content)
    made = bytearray(content)
    # Lengths, counts, types and sizes are the places where a small number stands in four or eight bytes.
    header = content[: content.rfind(b".lora_") + 100] if b".lora_" in content else content[:2000]
    places = [at for at in range(4, len(header) - 8) if header[at + 1 : at + 4] == b"\0\0\0" and header[at]]
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.choice(places)
        if kind == 1:
            made[at : at + 8] = struct.pack("<Q", rng.choice(SIZES))
        elif kind == 2:
            made[at : at + 4] = struct.pack("<I", rng.choice((*range(32), 2**31, 2**32 - 1)))
        else:
            made[at] = (made[at] + rng.choice((-1, 1, 2, 32))) % 256
    return bytes(made)


def table(rng: random.Random, content: bytes) -> bytes:
    """Lines of text with cells, separators and line ends changed."""
    lines = content.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        kind = rng.randrange(9)
        if kind == 0:
            lines[at] = bytes_of(rng, lines[at])
        elif kind == 1:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif kind == 2:
            lines[at] = lines[at].replace(b'"', rng.choice((b"'", b'""', b"", b'\\"')), rng.choice((1, 9)))
        elif kind == 3:
            lines[at] += rng.choice((b"\r", b"\0", b",", b"}", b"\xff\xfe", b"\xef\xbb\xbf", b"\\ud83d", b"\x1a"))
        elif kind == 4:
            nasty = json.dumps(rng.choice(NASTY)).encode()
            parts = lines[at].split(b": ")
            parts[rng.randrange(len(parts))] = nasty
            lines[at] = b": ".join(parts)
        elif kind == 5:
            lines[at] = b"[" * rng.choice((3, 70, 3000)) + lines[at]
        elif kind == 6:
            del lines[at]
            lines = lines or [b""]
        elif kind == 7:
            lines[0] = b"\xef\xbb\xbf" + lines[0]
        else:
            lines = [line + b"\r" for line in lines]
    return b"\n".join(lines)
