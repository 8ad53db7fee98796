"""A look at the opcodes of a pickle before it is loaded: what torch never writes could exhaust the memory.

CPython's unpickler allocates its memo up to the highest index that is named, so that five bytes ask for 64 GiB.
"""

import pickle
import re
import struct

_PLAIN = rb"[(012N\]ea}udsblQR)t\x81\x85-\x89\x8f-\x91\x93\x94\x97\x98]"
_RUN = re.compile(
    rb"(?:" + _PLAIN + rb"|[Khq\x80].|M..|[Jj]....|r...\x00|G.{8}|\x95.{8}|c[^\n]{0,200}\n[^\n]{0,200}\n)*", re.DOTALL
)
_COUNTED = {
    **dict.fromkeys(b"U\x8a\x8cC", ("<B", 1)),
    **dict.fromkeys(b"TXB\x8b", ("<I", 4)),
    **dict.fromkeys(b"\x8d\x8e", ("<Q", 8)),
}
_STOP = ord(".")


def scan(data: bytes) -> None:
    """pickle.UnpicklingError for opcodes outside those of torch's pickles, a memo of more than 16 million entries,
    or strings beyond the end.
    """
    position = 0
    while True:
        match = _RUN.match(data, position)
        assert match is not None  # an empty run always matches
        position = match.end()
        if position >= len(data):
            raise pickle.UnpicklingError("it ends before its end")
        code = data[position]
        if code == _STOP:
            return
        if code not in _COUNTED:
            raise pickle.UnpicklingError(f"it has opcode {code:#04x} at byte {position}, which torch does not write")
        layout, size = _COUNTED[code]
        if position + 1 + size > len(data):
            raise pickle.UnpicklingError("it ends before its end")
        (length,) = struct.unpack_from(layout, data, position + 1)
        position += 1 + size + length
