"""A property of the whole road: what a client pulls is what was first pushed, byte for byte, whatever the files are."""

from __future__ import annotations

import asyncio
import json
import struct
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from loramux import AsyncClient
from loramux_adapters.base.load import LoadedBase
from loramux_adapters.formats import registry as formats
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.weights import AdapterWeights
from support.servers import Inside, served
from support.tiny import load_tiny
from support.tiny_adapters import CONFIG, WEIGHTS, tiny_tensors, write_files

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BASE: list[LoadedBase] = []


def base() -> LoadedBase:
    """Loaded once."""
    if not _BASE:
        _BASE.append(load_tiny())
    return _BASE[0]


@st.composite
def adapters(draw: st.DrawFn) -> dict[str, bytes]:
    """Files of an adapter that the embedded base accepts: other ranks, targets, dtypes, spellings and declarations."""
    rank = draw(st.sampled_from([1, 3, 8, 40]))
    targets = draw(st.lists(st.sampled_from(TARGETS), min_size=1, max_size=3, unique=True))
    layers = draw(st.lists(st.integers(0, 3), min_size=1, unique=True))
    dtype = draw(st.sampled_from(DTYPES))
    tensors = {
        name: tensor.to(dtype)
        for name, tensor in tiny_tensors(draw(st.integers(0, 1 << 20)), rank, targets, layers).items()
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": draw(st.sampled_from([1, rank, 2.5])),
              "target_modules": targets, "layers_to_transform": layers}  # fmt: skip
    config |= draw(st.sampled_from([{}, {"use_rslora": True}, {"lora_dropout": 0.1, "peft_version": "0.1"}]))
    metadata = draw(st.sampled_from([{}, {"format": "pt"}, {"loramux_base_fingerprint": base().spec.fingerprint}]))
    files = {
        CONFIG: json.dumps(config, indent=draw(st.sampled_from([None, 1, 4]))).encode()
        + draw(st.sampled_from([b"", b"\n"])),
        WEIGHTS: _spell(save(tensors, metadata), draw(st.booleans())),
    }
    for declaration in draw(st.sampled_from([(), ("loramux.json",), ("loramux.json", "lorica.json")])):
        files[declaration] = json.dumps({"loramux_base_fingerprint": base().spec.fingerprint}, indent=2).encode()
    return files


def _spell(file: bytes, indented: bool) -> bytes:
    """The same tensors under a header with blanks in it."""
    if not indented:
        return file
    (length,) = struct.unpack("<Q", file[:8])
    header = json.dumps(json.loads(file[8 : 8 + length]), indent=3).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + file[8 + length :]


def read(files: dict[str, Path], *, allow_base_mismatch: bool) -> AdapterWeights:
    """As the server's assembly does."""
    return formats.read(files, base().spec, ReadLimits(), allow_base_mismatch=allow_base_mismatch)


def pulled(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


async def _round_trip(root: Path, files: dict[str, bytes]) -> None:
    other = {**files, CONFIG: json.dumps({**json.loads(files[CONFIG]), "inference_mode": True}).encode()}
    first, again = write_files(root / "first", files), write_files(root / "again", other)
    for number in range(2):  # and over a restart
        async with served(root / "data", Inside(read=read)) as server, AsyncClient(server.app.address) as client:
            if number == 0:
                digest = (await client.push(first, "one", ttl=3600.0)).adapter.digest
                # Other bytes of the same content: one digest, and the first bytes stay.
                assert (await client.push(again, "two")).adapter.digest == digest
            for reference in ("one", "two", f"two@{digest[:8]}"):
                target = root / f"{number}-{reference}"
                assert (await client.pull(reference, target)).digest == digest
                assert pulled(target) == files


@settings(max_examples=12, deadline=None)
@given(adapters())
def test_what_is_pulled_is_what_was_first_pushed(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory(prefix="loramux-bytes-") as root:
        asyncio.run(_round_trip(Path(root), files))
