"""Makes damaged and hostile variants of a valid input: of its bytes, and, for JSON, of its values."""

from __future__ import annotations

import copy
import json
from random import Random

VALUES = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**30,
    1.5,
    float("inf"),
    float("nan"),
    "",
    "x",
    "\x1b]0;x\x07",
    "../../x",
    "\ud800",
    "9" * 5000,
    "(a+)+c",
    "re:(?!",
    [],
    {},
    [[]],
    [0, 10**12],
    {"": {}},
    [None],
]
BYTES = [
    b"\x00",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\\",
    b"\\ud800",
    b"\xc3\x28",
    b"\n",
    b",",
    b":",
    b"-",
    b"9" * 50,
]
BYTES += [b"[" * 500, b"{" * 200, b"*a", b"&a ", b"<<: ", b"!!int ", b"!!python/name:os.system ", b"1e999", b"NaN"]


def mutated(content: bytes, random: Random) -> bytes:
    """Returns a variant: of JSON either its values or its bytes are changed, of anything else its bytes."""
    if random.random() < 0.5:
        try:
            return _of_values(content, random)
        except (ValueError, RecursionError):
            pass
    return _of_bytes(content, random)


def _of_values(content: bytes, random: Random) -> bytes:
    value = json.loads(content)
    for _ in range(random.randint(1, 3)):
        value = _changed(value, random)
    return json.dumps(value).encode()


def _changed(value: object, random: Random) -> object:
    if isinstance(value, dict | list) and value and random.random() < 0.85:
        made = copy.copy(value)
        key = random.choice([*made] if isinstance(made, dict) else range(len(made)))
        action = random.random()
        if action < 0.1:
            del made[key]
        elif action < 0.2 and isinstance(made, dict):
            made[random.choice(["", "x", "\x1b[2J", "__metadata__", str(key) * 2])] = made[key]
        elif action < 0.25 and isinstance(made, list):
            made.extend(made * random.randint(1, 50))
        else:
            made[key] = _changed(made[key], random)
        return made
    if random.random() < 0.05:
        deep: object = value
        for _ in range(random.choice([5, 90, 150, 900])):
            deep = [deep]
        return deep
    return random.choice(VALUES)


def _of_bytes(content: bytes, random: Random) -> bytes:
    made = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 4, 16])):
        at, action = random.randint(0, len(made)), random.random()
        if action < 0.25 and at < len(made):
            made[at] = random.randrange(256)
        elif action < 0.45:
            made[at:at] = random.choice(BYTES)
        elif action < 0.6:
            del made[at : at + random.choice([1, 1, 8, 64])]
        elif action < 0.75 and made:
            other = random.randrange(len(made))
            made[at:at] = made[other : other + random.choice([1, 8, 64, 512])]
        elif action < 0.85:
            del made[at:]
        elif at < len(made):
            made[at] ^= 1 << random.randrange(8)
    return bytes(made)
