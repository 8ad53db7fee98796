"""UTF-8 text files, plain, .gz or .zst, as lines or pieces of bounded size; damage is a DataError with its place."""

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from mswift.errors import DataError

_PIECE_BYTES = 1 << 18
_ZSTD_BYTES = (16, 1 << 10)  # taken at a time, fewer where they decompress to much: 4 bytes can stand for 128 KiB


@dataclass(frozen=True, slots=True)
class Line:
    """One line with its end, or why it is no text."""

    where: str
    text: str
    error: DataError | None = None
    number: int = 0
    """From 1, in its file."""
    end: int = 0
    """Bytes of the (uncompressed) file up to its end."""

    @property
    def blank(self) -> bool:
        """Whether there is nothing in it."""
        return self.error is None and not self.text.strip()

    def require(self) -> str:
        """The text; raises where there is none."""
        if self.error is not None:
            raise self.error
        return self.text


@dataclass(frozen=True, slots=True)
class LongText:
    """The text of a file, or of a portion of a plain one, that is not in memory."""

    path: Path
    start: int = 0
    """Bytes before it."""
    end: int | None = None
    """The byte behind it; None: up to the end of the file."""

    def pieces(self) -> Iterator[str]:
        """See `text_pieces`."""
        return text_pieces(self.path, self.start, self.end)

    def context(self, count: int) -> str:
        """At most so many characters before it."""
        return decoded(self.path, self.start - 4 * count, self.start)[0][-count:] if self.start else ""

    def read(self) -> str:
        """All of it."""
        return "".join(self.pieces())


def text_lines(path: Path, before: int = 0, offset: int = 0) -> Iterator[Line]:
    """Lines in order; one UTF-8 byte-order mark at the start is taken off. DataError: a damaged compressed file.

    Those behind `offset` bytes, which hold `before` lines, of a file that is not compressed.
    """
    with _opened(path) as stream:
        if offset:
            stream.seek(offset)
        for number, data in enumerate(stream, start=before + 1):
            offset += len(data)
            where = f"{path}, line {number}"
            if b"\0" in data:
                yield Line(where, "", _nul_error(path, where), number, offset)
                continue
            try:
                yield Line(where, data.decode("utf-8-sig" if number == 1 else "utf-8"), None, number, offset)
            except UnicodeDecodeError as error:
                reason = f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8"
                yield Line(where, "", DataError(reason), number, offset)


def text_pieces(path: Path, start: int = 0, end: int | None = None) -> Iterator[str]:
    """The text of a file in pieces of at most 256 KiB. DataError: no UTF-8 text, or a damaged compressed file.

    Of a file that is not compressed the bytes [start, end), between characters.
    """
    decoder = codecs.getincrementaldecoder("utf-8" if start else "utf-8-sig")()
    with _opened(path) as stream:
        if start:
            stream.seek(start)
        position = start
        while True:
            data = stream.read(_PIECE_BYTES if end is None else min(_PIECE_BYTES, end - position))
            if b"\0" in data:
                raise _nul_error(path, f"{path}, byte {position + data.index(0)}")
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                place = f"{path}, near byte {position + error.start}"
                raise DataError(f"{place}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
            if text:
                yield text
            if not data:
                return
            position += len(data)


def decoded(path: Path, start: int, end: int) -> tuple[str, int]:
    """The whole characters among the bytes [start, end) of a plain file, and the byte where they begin.

    UnicodeDecodeError where these are no UTF-8.
    """
    start = max(start, 0)
    with path.open("rb") as stream:
        stream.seek(start)
        data = stream.read(end - start)
    if start == 0 and data.startswith(codecs.BOM_UTF8):
        data, start = data[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
    cut = next((place for place, byte in enumerate(data[:4]) if start == 0 or byte & 0xC0 != 0x80), 0)
    return codecs.getincrementaldecoder("utf-8")().decode(data[cut:]), start + cut


def first_character(path: Path) -> str:
    """The first character that is no white space; "" in an empty file or one that does not begin as text."""
    try:
        return next((piece.lstrip()[0] for piece in text_pieces(path) if piece.strip()), "")
    except DataError:
        return ""  # said where the rows are read


def _nul_error(path: Path, where: str) -> DataError:
    return DataError(
        f"{where}: holds a NUL byte, so it is no UTF-8 text; if it is UTF-16: "
        f"iconv -f UTF-16 -t UTF-8 {path} > {path.stem}-utf8{path.suffix}"
    )


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The uncompressed bytes."""
    kind = path.suffix.lower()
    with path.open("rb") as raw:
        stream: Any = raw
        if kind == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif kind == ".zst":
            stream = io.BufferedReader(_ZstdReader(raw), _PIECE_BYTES)
        try:
            yield cast(IO[bytes], stream)
        except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
            name = "gzip" if kind == ".gz" else "zstd"
            raise DataError(f"{path}: damaged {name} file ({error}); write it again") from None


class _ZstdReader(io.RawIOBase):
    """Decompresses frame after frame; EOFError where the file ends within one (zstandard's own reader is silent)."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self._stream = stream
        self._frame: Any = None
        self._compressed, self._ready = b"", b""
        self._step = _ZSTD_BYTES[0]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._compressed or self._stream.read(self._step)
            if not data:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._ready = frame.decompress(data)
            self._compressed = frame.unused_data if frame.eof else b""
            self._frame = None if frame.eof else frame
            if len(self._ready) > _PIECE_BYTES:
                self._step = max(self._step // 2, _ZSTD_BYTES[0])
            elif len(self._ready) < _PIECE_BYTES // 4:
                self._step = min(self._step * 2, _ZSTD_BYTES[1])
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
