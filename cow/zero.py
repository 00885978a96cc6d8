"""Is a buffer all zeros?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PROBE = 4096
_BLOCK = 1 << 20


def is_zero(buffer: Buffer) -> bool:
    """Whether every byte of `buffer` is zero; true for an empty one.

    Any length, alignment and item type; the buffer must be C-contiguous. Runs at memory speed, stops at the
    first block that is not zero, and releases the GIL for all but tiny buffers.
    """
    view = memoryview(buffer)
    if not view.nbytes:
        return True
    data = np.frombuffer(view, np.uint8)
    # Data that is not zero mostly shows it early: look at a page before streaming through the rest.
    if data[:_PROBE].any():
        return False
    start = -(-min(_PROBE, len(data)) // 8) * 8
    words_end = len(data) & ~7
    if words_end > start:
        words = data[start:words_end].view(np.uint64)
        step = _BLOCK // 8
        for position in range(0, len(words), step):
            if np.bitwise_or.reduce(words[position : position + step]):
                return False
    return not data[words_end:].any()
