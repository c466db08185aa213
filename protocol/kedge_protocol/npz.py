"""What reading NumPy's files raises when their bytes are damaged: one tuple for every reader of them."""

from __future__ import annotations

import lzma
import struct
import tokenize
import zipfile
import zlib

# RuntimeError: a password, and as NotImplementedError an unknown compression. MemoryError, OverflowError: a shape
# beyond memory. TokenError, SyntaxError: an array's header, which NumPy reads as Python. The rest are zipfile's.
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    RuntimeError,
    MemoryError,
    OverflowError,
    SyntaxError,
    tokenize.TokenError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
