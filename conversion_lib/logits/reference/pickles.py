"""Reads pickles of arrays, numbers, texts, lists and dictionaries without Python's unpickler.

MaxText keeps golden logits in pickles. Python's unpickler runs what a file names, and numpy's own `__setstate__` takes
a file's bytes for pointers. Here the file's opcodes only build plain values, and each array is made from its bytes.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from conversion_lib.core.tensors import Array

MARK = object()
VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
"""Opcodes whose argument is the value."""

CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: MARK,
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
KINDS = "biuf"
"""Kinds of numpy dtypes that an array may have: numbers."""

CODE = re.compile(f"[<>=|]?[{KINDS}][0-9]{{1,2}}")
"""numpy's code of such a dtype. It reads others as well, some of them as Python."""


class NotPlain(ValueError):
    """The pickle holds something else, or is damaged."""


@dataclass(frozen=True)
class _Name:
    """What a pickle names: a module's function or class. It is never looked up."""

    module: str
    name: str


@dataclass
class _Dtype:
    dtype: np.dtype[Any]


@dataclass
class PickledArray:
    """An array or scalar of a pickle. `array`: None until the pickle gives it its content."""

    array: Array | None = None


class _Machine:
    """What the opcodes build, on a stack. `memo` has what the pickle refers to again."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        for opcode, argument, _ in _opcodes(content):
            name = opcode.name
            if name in VALUES:
                self.stack.append(argument)
            elif name in CONSTANTS:
                self.stack.append(CONSTANTS[name]())
            elif name in TUPLES:
                self.stack.append(tuple(self.pop(TUPLES[name])))
            elif name == "STOP":
                return self.pop(1)[0]
            elif name not in ("PROTO", "FRAME"):
                step = STEPS.get(name)
                if step is None:
                    raise NotPlain(f"it has the opcode {name}, which arrays, numbers, texts, lists do not need")
                step(self, argument)
        raise NotPlain("it ends early")

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise NotPlain("it takes more values than it has")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def since_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is MARK:
                taken = self.stack[index + 1 :]
                del self.stack[index:]
                return taken
        raise NotPlain("it takes more values than it has")

    def top(self, kind: type[Any]) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise NotPlain(f"a {kind.__name__} was expected")
        return self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def make_dict(self, items: list[Any]) -> None:
        self.stack.append({})
        self.update(items)

    def update(self, items: list[Any]) -> None:
        found = self.top(dict)
        if len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
            raise NotPlain("a dictionary has keys that are not texts")
        found.update(zip(items[::2], items[1::2], strict=True))

    def put(self, index: int) -> None:
        self.memo[index] = self.top(object)

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise NotPlain("it refers to a value that it does not have")
        self.stack.append(self.memo[index])

    def named(self, module: Any, name: Any) -> None:
        self.stack.append(_Name(str(module), str(name)))

    def reduce(self) -> None:
        called, arguments = self.pop(2)
        self.stack.append(_called(called, arguments))

    def build(self) -> None:
        made, state = self.pop(2)
        if isinstance(made, _Dtype):
            made.dtype = _dtype(made.dtype.str[1:], state)
        elif isinstance(made, PickledArray):
            made.array = _array(state)
        else:
            raise NotPlain(f"it gives a {type(made).__name__} a state")
        self.stack.append(made)


STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "APPEND": lambda machine, _: machine.extend(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "DICT": lambda machine, _: machine.make_dict(machine.since_mark()),
    "LIST": lambda machine, _: machine.stack.append(machine.since_mark()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "SETITEM": lambda machine, _: machine.update(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.update(machine.since_mark()),
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": lambda machine, argument: machine.named(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.named(*machine.pop(2)),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
}


def load(content: bytes) -> Any:
    """Reads a pickle.

    Args:
        content: The file's content.

    Returns:
        Lists, tuples, dictionaries with texts as keys, texts, bytes, numbers, None, and PickledArray. A value that the
        pickle refers to several times is one object; a list may contain itself.

    Raises:
        NotPlain: It holds something else, or is damaged.
    """
    return _Machine().run(content)


def _opcodes(content: bytes) -> Iterator[tuple[Any, Any, int | None]]:
    try:
        yield from pickletools.genops(content)
    except (ValueError, IndexError, OverflowError, MemoryError) as error:
        raise NotPlain(str(error)) from None


def _called(called: Any, arguments: Any) -> Any:
    """What a pickle of numpy's or of bytes calls, done here; NotPlain for anything else."""
    if not isinstance(called, _Name) or not isinstance(arguments, tuple):
        raise NotPlain("it calls something that it does not name")
    module, name = called.module.replace("numpy.core.", "numpy._core."), called.name
    match (module, name), arguments:
        case ("_codecs", "encode"), (str(text), "latin1" | "latin-1"):
            return text.encode("latin-1", "strict")
        case ("numpy", "dtype"), (str(code), *_):
            return _Dtype(_dtype(code, None))
        case ("numpy._core.multiarray", "_reconstruct"), (_Name("numpy", "ndarray"), *_):
            return PickledArray()
        case ("numpy._core.multiarray", "scalar"), (_Dtype(dtype), bytes(data)):
            return PickledArray(_from_bytes(data, dtype, (), "C"))
        case ("numpy._core.numeric", "_frombuffer"), (bytes() | bytearray() as data, _Dtype(dtype), tuple(shape), _):
            order = arguments[3]
            return PickledArray(_from_bytes(bytes(data), dtype, shape, order))
    raise NotPlain(f"it names {called.module}.{called.name}: golden logits are arrays, and nothing else is loaded")


def _dtype(code: str, state: Any) -> np.dtype[Any]:
    """The dtype of a code such as `f4`, in the byte order of its state (None: as the code says)."""
    if not CODE.fullmatch(code):
        raise NotPlain(f"{code} is no dtype of numbers")
    try:
        dtype = np.dtype(code)
    except TypeError:
        raise NotPlain(f"{code} is no dtype of numbers") from None
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
    if order not in ("<", ">", "=", "|"):
        raise NotPlain("a dtype has no byte order")
    return dtype.newbyteorder(order)  # type: ignore[arg-type]


def _array(state: Any) -> Array:
    match state:
        case (int(), tuple(shape), _Dtype(dtype), fortran, bytes() | bytearray() as data):
            return _from_bytes(bytes(data), dtype, shape, "F" if fortran else "C")
        case (int(), tuple(shape), _Dtype(dtype), fortran, str(text)):  # protocol 2, written by Python 2
            return _from_bytes(text.encode("latin-1", "replace"), dtype, shape, "F" if fortran else "C")
    raise NotPlain("an array has no content of numbers")


def _from_bytes(data: bytes, dtype: np.dtype[Any], shape: tuple[Any, ...], order: Any) -> Array:
    """Raises NotPlain unless there are exactly as many bytes as the shape takes."""
    count = 1
    for extent in shape:
        if type(extent) is not int or not 0 <= extent <= len(data):
            raise NotPlain("an array's shape is not that of its bytes")
        count *= extent
        if count > len(data):
            raise NotPlain("an array's shape is not that of its bytes")
    if count * dtype.itemsize != len(data) or order not in ("C", "F"):
        raise NotPlain("an array's shape is not that of its bytes")
    return np.frombuffer(data, dtype).reshape(shape, order=order)
