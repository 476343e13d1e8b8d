"""PyTorch's older checkpoint files (before 1.6), read without running their pickle.

A pickle is a program and unpickling runs it. Here its instructions are only followed on paper:
containers, numbers and strings are built; of what it would call just tensors and ordered dicts
are understood, and whatever else it holds is refused. Nothing of PyTorch is imported.
"""

from __future__ import annotations

import io
import math
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_DTYPES = {
    "torch FloatStorage": "<f4",
    "torch DoubleStorage": "<f8",
    "torch HalfStorage": "<f2",
    "torch LongStorage": "<i8",
}
_MARK = object()
_LARGEST = 1 << 30  # elements of one storage


class NoStateDictError(ValueError):
    """A sound file of something else."""


class _Call(tuple):
    """What a pickle would call: function and arguments, not called."""


class _Storage(tuple):
    """A storage's type, key and number of elements."""


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict that `torch.save` wrote in the older layout.

    Returns:
      Arrays by the names PyTorch gives them, in their own dtypes.

    Raises:
      NoStateDictError: it holds more than tensors.
      ValueError: another layout, instructions that no state dict needs, or a truncated file.
    """
    try:
        # In memory: of a file, a read of as many bytes as a pickle claims is of that size.
        return _read(io.BytesIO(path.read_bytes()))
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as e:
        raise ValueError(f"its pickle is damaged ({e})") from None


def _read(file: io.BytesIO) -> dict[str, np.ndarray]:
    for _ in range(3):  # the magic number, the protocol, the machine it was written on
        _follow(file)
    state, keys = _follow(file), _follow(file)
    if not isinstance(state, dict) or not isinstance(keys, list):
        raise ValueError("no state dict")
    wanted: dict[str, _Storage] = {}
    for value in state.values():
        storage = _tensor(value)[0]
        wanted[storage[1]] = storage
    if sorted(keys) != sorted(wanted):
        raise ValueError("its storages are not those of its tensors")
    storages = {key: _read_storage(file, wanted[key]) for key in keys}
    return {str(name): _view(value, storages) for name, value in state.items()}


def _follow(file: io.BytesIO) -> Any:
    """What one pickle describes."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = max(i for i, item in enumerate(stack) if item is _MARK)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    argument: Any
    for code, argument, _ in pickletools.genops(file):
        name = code.name
        if name == "STOP":
            return stack.pop()
        if name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "GLOBAL"):
            stack.append(argument)
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[name])
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            empty = function == "collections OrderedDict" and arguments == ()
            stack.append({} if empty else _Call((function, arguments)))
        elif name == "BINPERSID":
            _, kind, key, _, count, _ = stack.pop()
            stack.append(_Storage((kind, key, count)))
        elif name in ("SETITEM", "SETITEMS"):
            items = since_mark() if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            items = since_mark() if name == "APPENDS" else [stack.pop()]
            stack[-1].extend(items)
        elif name == "BUILD":  # attributes of a dict: the modules' versions
            stack.pop()
        elif name != "PROTO":
            raise ValueError(f"its pickle holds {name}, which no state dict needs")
    raise ValueError("its pickle has no end")


def _tensor(value: Any) -> tuple[_Storage, int, tuple[int, ...], tuple[int, ...]]:
    """Storage, offset, shape and strides in elements."""
    if not isinstance(value, _Call) or value[0] != "torch._utils _rebuild_tensor_v2":
        raise NoStateDictError("it holds more than tensors")
    storage, offset, shape, strides = value[1][:4]
    whole = all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *strides))
    if not isinstance(storage, _Storage) or not whole or len(shape) != len(strides):
        raise ValueError("a tensor is damaged")
    return storage, offset, shape, strides


def _read_storage(file: io.BytesIO, storage: _Storage) -> np.ndarray:
    kind, key, count = storage
    if kind not in _DTYPES or not isinstance(count, int) or not 0 <= count <= _LARGEST:
        raise ValueError(f"storage {key} is {kind} of {count}")
    dtype = np.dtype(_DTYPES[kind])
    stated = int.from_bytes(file.read(8), "little")
    left = file.getbuffer().nbytes - file.tell()
    if stated != count or left < count * dtype.itemsize:
        raise ValueError(f"storage {key} is cut short")
    data = file.read(count * dtype.itemsize)
    return np.frombuffer(data, dtype)


def _view(value: Any, storages: dict[str, np.ndarray]) -> np.ndarray:
    storage, offset, shape, strides = _tensor(value)
    size = math.prod(list[int](shape))
    flat = storages[storage[1]]
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if size > len(flat) or (size and last >= len(flat)):
        raise ValueError("a tensor reaches beyond its storage")
    steps = [s * flat.itemsize for s in strides]
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps).copy()
