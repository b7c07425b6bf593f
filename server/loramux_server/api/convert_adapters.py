"""Protobuf messages of AdapterService to and from the store's records.

Says nothing about whether a value is acceptable: `validate` and the store do.
"""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from loramux_adapters.certificate.replay import Replay
from loramux_adapters.store.records import (
    UNKNOWN_BASE,
    AdapterRecord,
    AdapterUpdate,
    FileEntry,
    Health,
    Lifetime,
    ReplayRecord,
    UploadManifest,
    UploadProgress,
)
from loramux_protos.v1 import adapters_pb2
from loramux_server.api.ports import AdapterState

_TIERS = {
    "registered": adapters_pb2.TIER_REGISTERED,
    "loaded": adapters_pb2.TIER_LOADED,
    "resident": adapters_pb2.TIER_RESIDENT,
}
_MERGED = {
    "none": adapters_pb2.MERGED_STATE_NONE,
    "building": adapters_pb2.MERGED_STATE_BUILDING,
    "ready": adapters_pb2.MERGED_STATE_READY,
    "refused": adapters_pb2.MERGED_STATE_REFUSED,
}
_HEALTH = {Health.OK: adapters_pb2.ADAPTER_HEALTH_OK, Health.CORRUPT: adapters_pb2.ADAPTER_HEALTH_CORRUPT}


def read_manifest(begin: adapters_pb2.UploadBegin) -> UploadManifest:
    """What an upload says it will be."""
    return UploadManifest(
        name=begin.name,
        files=tuple(FileEntry(entry.file, entry.size, entry.sha256) for entry in begin.manifest),
        labels=dict(begin.labels),
        allow_base_mismatch=begin.allow_base_mismatch,
        ttl_seconds=begin.ttl_seconds if begin.HasField("ttl_seconds") else None,
        max_uses=begin.max_uses if begin.HasField("max_uses") else None,
        if_version=begin.if_version if begin.HasField("if_version") else None,
    )


def read_update(request: adapters_pb2.UpdateAdapterRequest) -> AdapterUpdate:
    """What a caller wants changed."""
    return AdapterUpdate(
        pinned=request.pinned if request.HasField("pinned") else None,
        merge=request.merge if request.HasField("merge") else None,
        add_aliases=tuple(request.add_aliases),
        remove_aliases=tuple(request.remove_aliases),
        set_labels=dict(request.set_labels),
        remove_labels=tuple(request.remove_labels),
        version=request.version,
        if_version=request.if_version,
    )


def write_progress(progress: UploadProgress) -> adapters_pb2.QueryUploadResponse:
    """How far an upload has come."""
    return adapters_pb2.QueryUploadResponse(
        files=[
            adapters_pb2.FileProgress(file=entry.file, received=entry.received, size=entry.size)
            for entry in progress.files
        ]
    )


def write_adapter(record: AdapterRecord, state: AdapterState, base: str) -> adapters_pb2.Adapter:
    """A name, the version it points at, and where that version is now, on a server with the base `base`."""
    spec = record.spec
    residency = adapters_pb2.Residency(
        tier=_TIERS[state.tier],
        leases=state.leases,
        merged=_MERGED[state.merged],
        merged_reason=state.reason,
        host_bytes=state.host_bytes,
        merged_certificate=_write_replay(state.merged_replay),
    )
    if state.slot is not None:
        residency.slot = state.slot
    lifetime = record.lifetime or Lifetime(None, None, None)
    return adapters_pb2.Adapter(
        name=record.id.name,
        digest=record.digest,
        kind=spec.kind,
        base_fingerprint=spec.base_fingerprint or "",
        base_mismatch=spec.base_mismatch,
        max_rank=spec.max_rank,
        targets=spec.targets,
        size_bytes=spec.nbytes,
        labels=record.labels,
        aliases=record.aliases,
        pinned=record.pinned,
        created=_timestamp(record.created),
        updated=_timestamp(record.updated),
        health=_HEALTH[record.health],
        residency=residency,
        merge=record.merge,
        accepted_bases=() if UNKNOWN_BASE in record.bases else sorted(record.bases),
        expires=None if lifetime.expires is None else _timestamp(lifetime.expires),
        max_uses=lifetime.max_uses,
        uses_left=lifetime.uses_left,
        vocabulary=spec.vocabulary,
        text_files=[name for name, _ in spec.text_files],
        versions=record.versions,
        certificate=_write_replay(record.replays.get(base)),
    )


def write_entries(digest: str, entries: tuple[FileEntry, ...]) -> adapters_pb2.DownloadAdapterResponse:
    """The first message of a download."""
    files = [adapters_pb2.FileEntry(file=entry.file, size=entry.size, sha256=entry.sha256) for entry in entries]
    return adapters_pb2.DownloadAdapterResponse(manifest=adapters_pb2.DownloadManifest(digest=digest, files=files))


def write_chunk(file: str, offset: int, data: bytes) -> adapters_pb2.DownloadAdapterResponse:
    """Some bytes of a download."""
    return adapters_pb2.DownloadAdapterResponse(chunk=adapters_pb2.UploadChunk(file=file, offset=offset, data=data))


def _write_replay(replay: Replay | ReplayRecord | None) -> adapters_pb2.CertificateReplay | None:
    if replay is None:
        return None
    return adapters_pb2.CertificateReplay(
        difference=replay.difference,
        divergence=replay.divergence,
        tolerance=replay.tolerance,
        compute_dtype=replay.dtype,
    )


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp
