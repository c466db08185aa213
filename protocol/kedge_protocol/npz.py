"""The exceptions raised when damaged NumPy files are read: one tuple for every reader."""

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
