"""An unpickler of few opcodes and simple keys, for files that nobody vouches for.

It is the standard library's own one in Python, whose opcodes can be replaced. The one in C allocates its memo up to
the highest index that is named (five bytes ask for 64 GiB), and hashes whatever stands as a key: a tuple anew at each
use, part by part, so that forty tuples, each holding the one before twice, take hours.
"""

import io
import pickle
from collections.abc import Iterable
from typing import Any

_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.BINSTRING, pickle.SHORT_BINSTRING),
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.EMPTY_SET),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BINPERSID),
)
"""What pickles of protocol 2 and later have, but for numbers of more than 255 bytes and parts of other pickles."""

_LARGEST_KEY = 1 << 31
"""Numbers that are keys lie below: among larger ones, millions can be chosen that have one hash."""


class Inert:
    """Stands for an instance of a class: `args` of its constructor, `state` that a pickle sets. Equals itself only."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dispatch(dict[int, Any]):
    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"it has opcode {code:#04x}, which torch does not write")


class RestrictedUnpickler(pickle._Unpickler):
    """Of a subclass with `find_class`; time and memory are linear in the length of `data`.

    pickle.UnpicklingError for another opcode, for a key that is no string, small number or Inert, and for a state of
    anything but an Inert.
    """

    stack: list[Any]

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)
        super().__init__(self._data)

    def load(self) -> Any:
        """What `data` describes.

        The loop is here because the standard one reads each opcode and each operand through its frames, in Python: a
        third of its time. Where frames end says nothing of data that lie in memory as a whole.
        """
        read = self.read = self._data.read
        self.readline = self._data.readline
        self.metastack: list[list[Any]] = []
        self.stack, self.proto = [], 0
        self.append = self.stack.append
        dispatch = self.dispatch
        try:
            while code := read(1):
                dispatch[code[0]](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]  # typeshed leaves it out
            return stop.value
        raise pickle.UnpicklingError("it ends before its end")

    def _frame(self) -> None:
        self.read(8)

    def _popped(self) -> list[Any]:
        items: list[Any] = self.pop_mark()  # type: ignore[attr-defined]  # typeshed leaves it out
        return items

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key], [value])

    def _set_items(self) -> None:
        items = self._popped()
        self._update(items[::2], items[1::2])

    def _update(self, keys: list[Any], values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise pickle.UnpicklingError(f"it sets items of a {type(target).__name__}")
        _check_keys(keys)
        target.update(zip(keys, values, strict=True))

    def _add_items(self) -> None:
        items, target = self._popped(), self.stack[-1]
        if not isinstance(target, set):
            raise pickle.UnpicklingError(f"it adds items to a {type(target).__name__}")
        _check_keys(items)
        target.update(items)

    def _frozen_set(self) -> None:
        items = self._popped()
        _check_keys(items)
        self.stack.append(frozenset(items))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Inert):
            raise pickle.UnpicklingError(f"it sets the state of a {type(target).__name__}")
        target.__setstate__(state)

    dispatch = _Dispatch({code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES})
    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = _set_items
    dispatch[pickle.ADDITEMS[0]] = _add_items
    dispatch[pickle.FROZENSET[0]] = _frozen_set
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.FRAME[0]] = _frame


def _check_keys(keys: Iterable[Any]) -> None:
    for key in keys:
        kind = type(key)
        if kind is str or isinstance(key, Inert) or kind is bytes or key is None:
            continue
        if isinstance(key, int) and -_LARGEST_KEY <= key < _LARGEST_KEY:
            continue
        what = f"the number {key:.3g}" if isinstance(key, int) else f"a {kind.__name__}"
        raise pickle.UnpicklingError(f"a key or member is {what}: only names and small numbers are")
