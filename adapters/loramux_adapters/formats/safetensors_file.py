"""One open safetensors file: its checked header, and its tensors one at a time.

Reads with plain file reads rather than a memory map: a file cut while it is read is an error here and
would be a SIGBUS there. Knows nothing of adapters beyond the file's name in errors.
"""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from loramux_adapters.errors import AdapterInvalid
from loramux_adapters.finite import is_finite
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.refusals import quote
from loramux_adapters.formats.safetensors_header import Header, TensorEntry, read_header

TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


class SafetensorsFile:
    """Context manager over one file. `header` is checked when the file is entered."""

    header: Header

    def __init__(self, path: Path, subject: str, limits: ReadLimits, *, integers: bool = False) -> None:
        """With `integers` its tensors may be of integers, too."""
        self._path = path
        self._integers = integers
        self._subject = subject
        self._limits = limits
        self._file: BufferedReader

    def __enter__(self) -> Self:
        """Raises AdapterInvalid for the header, OSError when the disk fails."""
        self._file = self._path.open("rb")
        try:
            status = os.fstat(self._file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AdapterInvalid(f"{self._subject} is not a regular file", subject=self._subject)
            self.header = read_header(self._file, status.st_size, self._subject, self._limits, integers=self._integers)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def read_bytes(self, entry: TensorEntry) -> bytearray:
        """The tensor's raw little-endian bytes."""
        data = bytearray(entry.nbytes)
        self._file.seek(entry.start)
        if self._file.readinto(data) != entry.nbytes:
            raise AdapterInvalid(
                f"{self._subject} ends inside tensor {quote(entry.name)}",
                subject=self._subject,
                remedy="upload it again",
            )
        return data

    def decode(self, entry: TensorEntry, data: bytearray) -> torch.Tensor:
        """The tensor over `data` (shared, not copied). Raises AdapterInvalid when a value is NaN or infinite."""
        dtype = TORCH_DTYPES[entry.dtype]
        tensor = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        if not is_finite(tensor):
            raise AdapterInvalid(
                f"{self._subject}: tensor {quote(entry.name)} holds NaN or infinite values",
                subject=f"{self._subject}: {quote(entry.name)}",
                remedy="the training run diverged: export an earlier checkpoint",
            )
        return tensor.reshape(entry.shape)
