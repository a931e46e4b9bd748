"""A pickle read as data: nothing that it names is imported, looked up or called.

A pickle is a program for a small stack machine. Python's own loader imports what it names
(``GLOBAL``), calls that (``REDUCE``, ``NEWOBJ``) and sets attributes of what comes out
(``BUILD``), which is how a checkpoint from a stranger runs what the stranger wrote. The machine
in here has the same instructions, but names stay text and calls make stand-ins; see
:mod:`know_cli.checkpoints.pickle_names`. Python's :mod:`pickletools` only splits the bytes into
instructions.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, cast

from know_cli.checkpoints.pickle_names import (
    Opaque,
    PickledTensor,
    PickleError,
    Storage,
    called,
    key_of,
    named,
    storage_of,
)

#: Longest pickle that is read. The data of tensors are not in it, but those of numpy arrays are.
MAX_PICKLE_BYTES = 1 << 28
# A checkpoint of 150,000 tensors with its optimizer's state has about twenty million; each can
# take a hundred bytes of memory.
_MAX_INSTRUCTIONS = 40_000_000
_MAX_LINE = 1 << 16


def unpickle(file: BinaryIO, size: int, storages: dict[str, Storage] | None = None) -> Any:
    """Read one pickle; the file is left behind its last byte.

    Args:
        file: at the pickle's first byte.
        size: number of bytes that are left in the file.
        storages: is given every storage that the pickle refers to, by its key, the first of each.

    Returns:
        Plain values, and the stand-ins of :mod:`~know_cli.checkpoints.pickle_names`.

    Raises:
        ForbiddenError: it names something that is not on the list.
        PickleError: it is damaged, too long, or no pickle.
    """
    machine = _Machine({} if storages is None else storages)
    source = cast(BinaryIO, _Source(file, min(size, MAX_PICKLE_BYTES)))
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(source)):
            if number > _MAX_INSTRUCTIONS:
                raise PickleError(f"has more than the {_MAX_INSTRUCTIONS} steps that are read")
            step = _STEPS.get(opcode.name)
            if step is None:
                raise PickleError(f"is damaged: no pickle of torch.save has {opcode.name}")
            step(machine, argument)
        return machine.stack.pop()
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        # The instructions of a damaged pickle do not fit what is on the stack.
        text = " ".join(str(error).split())[:200]
        raise PickleError(f"is damaged, or no checkpoint ({text})") from error


class _Source:
    """A file that is read no further than it goes, whatever a pickle says, and in short lines."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size

    def read(self, count: int) -> bytes:
        data = self._file.read(min(count, self._left))
        self._left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self._file.readline(min(_MAX_LINE, self._left))
        self._left -= len(data)
        return data


class _Machine:
    """The stack above the last mark, those below the marks, and what was kept by number."""

    def __init__(self, storages: dict[str, Storage]) -> None:
        self.storages = storages
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.kept: dict[int, Any] = {}

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[Any]:
        """Take what is above the last mark, and the mark."""
        below, items = self.below.pop(), self.stack
        self.stack = below
        return items


_Step = Callable[[_Machine, Any], None]


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _push_new(make: Callable[[], Any]) -> _Step:
    return lambda machine, _: machine.stack.append(make())


def _push_python_2_text(machine: _Machine, text: str) -> None:
    # Bytes in Python 2, mostly names; read as PyTorch reads them.
    machine.stack.append(text.encode("latin-1").decode("utf-8", "surrogateescape"))


def _push_since_mark(make: Callable[[list[Any]], Any]) -> _Step:
    def step(machine: _Machine, _: Any) -> None:
        items = machine.to_mark()
        machine.stack.append(make(items))

    return step


def _push_tuple(count: int) -> _Step:
    def step(machine: _Machine, _: Any) -> None:
        items = machine.stack[-count:]
        if len(items) < count:
            raise PickleError("is damaged: there is nothing to make a tuple of")
        machine.stack[-count:] = [tuple(items)]

    return step


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return {key_of(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _set_items(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if isinstance(target, dict):
        target.update(_pairs(items))
    elif not isinstance(target, Opaque):
        raise PickleError("is damaged: it sets a key of what is no dict")


def _append(machine: _Machine, items: Iterable[Any]) -> None:
    target = machine.stack[-1]
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Opaque):
        raise PickleError("is damaged: it appends to what is no list")


def _pop(machine: _Machine, _: Any) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.to_mark()


def _pop_to_mark(machine: _Machine, _: Any) -> None:
    machine.to_mark()


def _duplicate(machine: _Machine, _: Any) -> None:
    machine.stack.append(machine.stack[-1])


def _keep(machine: _Machine, number: int | None) -> None:
    machine.kept[len(machine.kept) if number is None else number] = machine.stack[-1]


def _recall(machine: _Machine, number: int) -> None:
    machine.stack.append(machine.kept[number])


def _set_item(machine: _Machine, _: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _set_items(machine, [key, value])


def _set_items_since_mark(machine: _Machine, _: Any) -> None:
    items = machine.to_mark()
    _set_items(machine, items)


def _append_one(machine: _Machine, _: Any) -> None:
    item = machine.stack.pop()
    _append(machine, [item])


def _append_since_mark(machine: _Machine, _: Any) -> None:
    items = machine.to_mark()
    _append(machine, items)


def _name(machine: _Machine, both: str) -> None:
    module, _, name = both.partition(" ")
    machine.stack.append(named(module, name))


def _name_from_stack(machine: _Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(named(module, name))


def _call(machine: _Machine, _: Any) -> None:
    arguments, name = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(called(name, arguments))


def _call_with_keywords(machine: _Machine, _: Any) -> None:
    machine.stack.pop()  # no stand-in takes any
    _call(machine, _)


def _set_state(machine: _Machine, _: Any) -> None:
    machine.stack.pop()
    if not isinstance(machine.stack[-1], (dict, list, Opaque, PickledTensor)):
        raise PickleError("is damaged: it sets the state of what has none")


def _refer(machine: _Machine, _: Any) -> None:
    storage = storage_of(machine.stack.pop())
    machine.storages.setdefault(storage.key, storage)
    machine.stack.append(storage)


_LITERALS = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE BINUNICODE BINUNICODE8 "
    "SHORT_BINUNICODE BINBYTES BINBYTES8 SHORT_BINBYTES BYTEARRAY8"
)
# What is not here is refused: extensions of the format, buffers outside of the file, and the
# instances of Python 2's old classes.
_STEPS: Mapping[str, _Step] = {
    **dict.fromkeys(_LITERALS.split(), _push),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _push_python_2_text),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, argument: None),
    "NONE": _push_new(lambda: None),
    "NEWTRUE": _push_new(lambda: True),
    "NEWFALSE": _push_new(lambda: False),
    "EMPTY_LIST": _push_new(list),
    "EMPTY_TUPLE": _push_new(tuple),
    "EMPTY_DICT": _push_new(dict),
    "EMPTY_SET": _push_new(list),
    "LIST": _push_since_mark(list),
    "TUPLE": _push_since_mark(tuple),
    "FROZENSET": _push_since_mark(tuple),
    "DICT": _push_since_mark(_pairs),
    "TUPLE1": _push_tuple(1),
    "TUPLE2": _push_tuple(2),
    "TUPLE3": _push_tuple(3),
    "MARK": lambda machine, _: machine.mark(),
    "POP": _pop,
    "POP_MARK": _pop_to_mark,
    "DUP": _duplicate,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _keep),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _recall),
    "APPEND": _append_one,
    "APPENDS": _append_since_mark,
    "ADDITEMS": _append_since_mark,
    "SETITEM": _set_item,
    "SETITEMS": _set_items_since_mark,
    "GLOBAL": _name,
    "STACK_GLOBAL": _name_from_stack,
    "REDUCE": _call,
    "NEWOBJ": _call,
    "NEWOBJ_EX": _call_with_keywords,
    "BUILD": _set_state,
    "BINPERSID": _refer,
}
