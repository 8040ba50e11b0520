"""One file as its difference to another: a zstd frame whose dictionary is the old content (``zstd-patch``).

What ``zstd --patch-from=OLD NEW`` makes, `rebuild` reads. A wrong base decodes to garbage without any error:
whoever calls `rebuild` has compared the base's digest before, and compares the result's afterwards.

Needs the package ``zstandard`` (``pip install "asyncsup[delta]"``); `available` says whether it is there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Final, NoReturn

from asyncsup.errors import PatchMalformedError

if TYPE_CHECKING:
    import zstandard

INSTALL: Final = 'pip install "asyncsup[delta]"'

CHUNK: Final = 1 << 20
_LEVEL: Final = 6
_MIN_LOG: Final = 17
_SMALLEST_WINDOW: Final = 1 << 20


@cache
def available() -> bool:
    """Whether deltas can be made and read here."""
    return importlib.util.find_spec("zstandard") is not None


def make(base: bytes, content: bytes) -> bytes:
    """What turns `base` into `content`; both are at most as large as the readers' limit allows.

    The tables have to span the old content: with zstd's usual ones nothing of it is found, and the delta is
    as large as the file.
    """
    import zstandard  # noqa: PLC0415 - an extra

    span = max(_MIN_LOG, max(len(base), len(content)).bit_length())
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, window_log=span, hash_log=span, chain_log=span
    )
    compressor = zstandard.ZstdCompressor(dict_data=_dictionary(base), compression_params=parameters)
    return compressor.compress(content)


def rebuild(delta: bytes | bytearray, base: bytes, size: int, *, largest: int) -> Iterator[memoryview]:
    """Yield the content that `delta` makes of `base`, never more than `size` bytes.

    Each view is valid until the next is asked for. Memory: the base, and a window of at most the next power
    of two above `largest`.

    Args:
        size: of the result, as the manifest says.
        largest: the limit for a base and a result.

    Raises:
        PatchMalformedError: ``delta.invalid``: it is no such frame, or makes less or more than `size` bytes.
    """
    import zstandard  # noqa: PLC0415 - an extra

    window = max(_SMALLEST_WINDOW, 1 << largest.bit_length())
    try:
        frame = zstandard.get_frame_parameters(delta)
        if frame.dict_id or frame.content_size != size or frame.window_size > window:
            _refuse(
                f"its frame says {frame.content_size} bytes, window {frame.window_size}, dictionary "
                f"{frame.dict_id}; expected are {size} bytes, a window of at most {window} and no number"
            )
        decompressor = zstandard.ZstdDecompressor(dict_data=_dictionary(base), max_window_size=window)
        buffer = memoryview(bytearray(min(CHUNK, size + 1)))
        produced = 0
        # A reader gives as much as it is asked for; an object that is fed gives all that its food makes.
        with decompressor.stream_reader(delta) as reader:
            while count := reader.readinto(buffer):
                produced += count
                if produced > size:
                    _refuse(f"it makes more than the {size} bytes it declares")
                yield buffer[:count]
    except zstandard.ZstdError as error:
        _refuse(str(error))
    if produced != size:
        _refuse(f"it makes {produced} bytes, and declares {size}")


def _dictionary(base: bytes) -> zstandard.ZstdCompressionDict:
    import zstandard  # noqa: PLC0415 - an extra

    # An empty dictionary is none at all to zstd; one byte that nothing refers to is the same.
    return zstandard.ZstdCompressionDict(base or b"\0", dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def _refuse(message: str) -> NoReturn:
    raise PatchMalformedError(f"cannot be applied: {message}", code="delta.invalid")
