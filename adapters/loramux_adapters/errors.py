"""What can be wrong with an adapter or a base. Each class says who must act; the server maps classes to status codes.

Torch-free and transport-free. `subject` names the thing (file, tensor, config key or adapter),
`remedy` says what the caller can do; both travel to the client.
"""

from __future__ import annotations

REFUSED = 3
"""The exit code of a program of this package that refuses, as of every command (docs/configuration.md)."""


class AdapterError(Exception):
    """Base of the family. `str(error)` is one sentence fit for a stranger: no paths, no internals."""

    def __init__(self, message: str, *, subject: str = "", remedy: str = "") -> None:
        super().__init__(message if not remedy else f"{message}; {remedy}")
        self.message = message
        self.subject = subject
        self.remedy = remedy


class AdapterInvalid(AdapterError):
    """The uploader must act: the files are malformed, unsafe or unsupported."""


class AdapterIncompatible(AdapterError):
    """The uploader must act: well-formed, but made for another base or over this server's limits."""


class CertificateRefused(AdapterError):
    """The uploader must act: what would be served is not what was trained, or the certificate is of something else."""


class AdapterNotFound(AdapterError):
    """The caller must act: no such adapter, name, alias, version or upload."""


class AdapterConflict(AdapterError):
    """The caller must act: the name or upload is in a state that forbids the call."""


class AdapterCorrupt(AdapterError):
    """The operator must act: stored bytes no longer match their digest; the adapter is quarantined."""


class UploadOffset(AdapterError):
    """The uploader must resume: the chunk does not start at `received` bytes of `subject`."""

    def __init__(self, message: str, *, received: int, subject: str = "", remedy: str = "") -> None:
        super().__init__(message, subject=subject, remedy=remedy)
        self.received = received


class QuotaExceeded(AdapterError):
    """The caller must free something first: count or bytes of adapters are at their limit."""


class StoreUnavailable(AdapterError):
    """The operator must act, the caller may retry: disk full, read-only, locked or failing."""


class StoreFull(StoreUnavailable):
    """The operator or the caller must free space: the disk of the store is full. Deleting adapters still works."""


class StoreCorrupt(AdapterError):
    """The operator must act: the catalog cannot be read; `remedy` holds the repair command."""


class PoolExhausted(AdapterError):
    """The operator must act: an adapter needs more device bytes than the whole budget."""


class BaseInvalid(Exception):
    """The operator must act: this directory cannot be a base. Before anything is loaded, so no caller ever sees it."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy
