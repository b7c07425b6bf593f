"""Safetensors files that lie: each refused quickly, in flat memory; nothing read differently from the library."""

import json
import resource
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from loramux_adapters.errors import AdapterError, AdapterIncompatible, AdapterInvalid
from loramux_adapters.formats.limits import ReadLimits
from loramux_adapters.formats.safetensors_file import SafetensorsFile
from support.timing import processor_seconds

NAME = "adapter_model.safetensors"
VALID = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.weight": torch.arange(4, dtype=torch.bfloat16),
    "c": torch.ones((2, 2), dtype=torch.float16),
}


def build(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read_all(path: Path, limits: ReadLimits | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with SafetensorsFile(path, NAME, limits or ReadLimits()) as file:
        tensors = {name: file.decode(each, file.read_bytes(each)) for name, each in file.header.tensors.items()}
        return tensors, dict(file.header.metadata)


def test_a_valid_file_reads_as_the_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(save(VALID, metadata={"format": "pt", "note": "\U0001f600 é"}))
    tensors, metadata = read_all(path)
    assert metadata == {"format": "pt", "note": "\U0001f600 é"}
    assert tensors.keys() == VALID.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == VALID[name].dtype
        assert torch.equal(tensor, VALID[name])


def test_zero_sized_tensors_and_padding_are_valid(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(
        build(json.dumps({"z": entry([0, 3], [0, 0]), "s": entry([], [0, 4])}).encode() + b"   ", b"\0" * 4)
    )
    tensors, _ = read_all(path)
    assert tensors["z"].shape == (0, 3)
    assert tensors["s"].shape == ()


ONE = json.dumps(entry([1], [0, 4])).encode()
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "seven bytes": (b"\0" * 7, "not a safetensors file"),
    "header of 2^63": (build(b"{}", length=1 << 63), "header claims 9223372036854775808 bytes"),
    "header of 200 MB": (build(b"{}", length=200_000_000), "header claims 200000000 bytes"),
    "header cut short": (build({"t": entry([1], [0, 4])}, length=500), "header claims 500 bytes"),
    "not JSON": (build(b"{" + b"x" * 100), "not JSON"),
    "not an object": (build(b"[]"), "header is not JSON"),
    "not UTF-8": (build(b'{"\xff": 1}'), "not UTF-8"),
    "NaN in the header": (build(b'{"t": NaN}'), "NaN, which is not JSON"),
    "digits": (build(b'{"t": ' + b"9" * 5_000 + b"}"), "too many digits"),
    "minus zero": (build(b'{"t":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), "integer -0"),
    "deep nesting": (build(b'{"t":' + b"[" * 2_000_000), "nested too deeply"),
    "nesting of twenty": (build(b'{"t":' + b"[" * 20 + b"]" * 20 + b"}"), "nested deeper than 16"),
    "duplicate name": (build(b'{"t": %b, "t": %b}' % (ONE, ONE), b"\0" * 4), "has the key 't' twice"),
    "duplicate field": (
        build(b'{"t": {"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        "'dtype' twice",
    ),
    "unknown dtype": (build({"t": entry([1], [0, 4], "F33")}, b"\0" * 4), "dtype 'F33' is not F32"),
    "integer dtype": (build({"t": entry([1], [0, 4], "I32")}, b"\0" * 4), "dtype 'I32' is not F32"),
    "float64": (build({"t": entry([1], [0, 8], "F64")}, b"\0" * 8), "cast it before saving"),
    "dtype is a list": (build({"t": entry([1], [0, 4], ["F32"])}, b"\0" * 4), "is not F32"),
    "shape overflow": (build({"t": entry([1 << 40, 1 << 40], [0, 4])}, b"\0" * 4), "data_offsets give 4"),
    "shape over 2^64": (build({"t": entry([1 << 70], [0, 4])}, b"\0" * 4), "shape"),
    "shape wraps to fit": (build({"t": entry([1 << 32, 1 << 32], [0, 0])}), "data_offsets give 0"),
    "many dimensions": (build({"t": entry([1] * 200_000, [0, 4])}, b"\0" * 4), "at most 8 sizes"),
    "negative size": (build({"t": entry([-1], [0, 4])}, b"\0" * 4), "shape"),
    "size is true": (build({"t": entry([True], [0, 4])}, b"\0" * 4), "shape"),
    "size is 1.0": (build({"t": entry([1.0], [0, 4])}, b"\0" * 4), "shape"),
    "negative offset": (build({"t": entry([1], [-4, 0])}, b"\0" * 4), "data_offsets"),
    "offsets reversed": (build({"t": entry([1], [4, 0])}, b"\0" * 4), "are not a range"),
    "three offsets": (build({"t": entry([1], [0, 4, 8])}, b"\0" * 4), "are not a range"),
    "size lie": (build({"t": entry([2], [0, 4])}, b"\0" * 4), "needs 8 bytes, data_offsets give 4"),
    "overlap": (build({"t": entry([1], [0, 4]), "u": entry([1], [0, 4])}, b"\0" * 4), "overlaps"),
    "hole": (build({"t": entry([1], [0, 4]), "u": entry([1], [8, 12])}, b"\0" * 12), "leaves a hole"),
    "hole at the start": (build({"t": entry([1], [4, 8])}, b"\0" * 8), "leaves a hole"),
    "trailing bytes": (build({"t": entry([1], [0, 4])}, b"\0" * 5), "1 bytes after the last tensor"),
    "data cut short": (build({"t": entry([1], [0, 4])}, b"\0" * 3), "ends at byte"),
    "extra field": (build({"t": entry([1], [0, 4]) | {"x": 1}}, b"\0" * 4), "nothing else"),
    "missing field": (build({"t": {"dtype": "F32", "shape": [1]}}, b"\0" * 4), "must hold dtype, shape"),
    "entry is a list": (build({"t": [1]}, b"\0" * 4), "must hold dtype, shape"),
    "metadata number": (build({"__metadata__": {"a": 1}}), "strings only"),
    "metadata list": (build({"__metadata__": []}), "strings only"),
    "half a surrogate": (
        build(b'{"\\ud800": %b}' % ONE, b"\0" * 4),
        "surrogate",
    ),
    "half a surrogate in metadata": (build(b'{"__metadata__": {"a": "\\udc00"}}'), "surrogate"),
    "NaN": (build({"t": entry([2], [0, 8])}, struct.pack("<2f", 1.0, float("nan"))), "NaN or infinite"),
    "Inf": (build({"t": entry([2], [0, 8])}, struct.pack("<2f", float("-inf"), 1.0)), "NaN or infinite"),
    "NaN in bfloat16": (build({"t": entry([1], [0, 2], "BF16")}, b"\xc0\x7f"), "'t' holds NaN"),
    "Inf in float16": (build({"t": entry([1], [0, 2], "F16")}, b"\x00\x7c"), "'t' holds NaN or infinite"),
    "zip": (b"PK\x03\x04" + b"\0" * 200, "looks like a zip archive"),
    "pickle": (b"\x80\x02}q\x00(X\x01\x00" + b"\0" * 200, "looks like a Python pickle"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 200, "looks like a GGUF model"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    "HTML": (b"<!DOCTYPE html><html></html>", "HTML page"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_lies_are_refused_in_time(case: str, tmp_path: Path) -> None:
    content, words = REFUSED[case]
    path = tmp_path / NAME
    path.write_bytes(content)
    with processor_seconds() as spent, pytest.raises(AdapterInvalid) as refusal:
        read_all(path)
    assert spent.seconds < 0.05
    assert words in str(refusal.value)
    assert NAME in refusal.value.subject
    assert refusal.value.remedy
    assert len(str(refusal.value)) < 500


def test_a_header_of_88_megabytes_costs_nothing(tmp_path: Path) -> None:
    """330,000 tensors, which cost the library 570 MB: refused by its length, before it is read."""
    path = tmp_path / NAME
    one = b'"%b":%b,' % (b"x" * 205, ONE)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2 + len(one) * 330_000) + b"{" + one * 330_000 + b"}")
    assert path.stat().st_size > 80_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    with processor_seconds() as spent, pytest.raises(AdapterInvalid, match="header claims"):
        read_all(path)
    assert spent.seconds < 0.05
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 10  # KiB


def test_too_many_short_names_are_counted_before_they_are_parsed(tmp_path: Path) -> None:
    path = tmp_path / NAME
    entries = ",".join(f'"{i:x}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' for i in range(200_000))
    path.write_bytes(build(f"{{{entries}}}".encode()))
    with processor_seconds() as spent, pytest.raises(AdapterInvalid, match="more than 65536 tensors"):
        read_all(path)
    assert spent.seconds < 0.05


def test_a_file_over_the_byte_limit_is_incompatible(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(save(VALID))
    with pytest.raises(AdapterIncompatible, match="at most 100"):
        read_all(path, ReadLimits(max_bytes=100))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="not a regular file"):
        read_all(Path("/dev/null"))


HEADER_BYTES = int.from_bytes(save(VALID)[:8], "little")
MUTATION = st.one_of(
    st.tuples(st.just("set"), st.integers(0, len(save(VALID)) - 1), st.integers(0, 255)),
    # most of what matters is in the header's punctuation and digits
    st.tuples(st.just("set"), st.integers(8, 7 + HEADER_BYTES), st.sampled_from(b'0123456789"[]{},:- F\\eE.')),
    st.tuples(st.just("delete"), st.integers(0, len(save(VALID)) - 1), st.integers(1, 9)),
    st.tuples(st.just("insert"), st.integers(0, len(save(VALID)) - 1), st.integers(0, 255)),
)


def mutate(data: bytes, mutations: list[tuple[str, int, int]], *, mend_length: bool) -> bytes:
    changed = bytearray(data)
    for kind, at, value in mutations:
        if kind == "set":
            changed[min(at, len(changed) - 1)] = value
        elif kind == "delete":
            del changed[at : at + value]
        else:
            changed.insert(at, value)
    if mend_length:
        changed[:8] = struct.pack("<Q", max(0, HEADER_BYTES + len(changed) - len(data)))
    return bytes(changed)


@settings(max_examples=300, deadline=None)
@given(mutations=st.lists(MUTATION, min_size=1, max_size=4), mend_length=st.booleans())
def test_a_mutated_file_is_refused_or_reads_as_the_library_reads_it(
    mutations: list[tuple[str, int, int]], mend_length: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = mutate(save(VALID, metadata={"format": "pt"}), mutations, mend_length=mend_length)
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(data)
    try:
        tensors, metadata = read_all(path)
    except AdapterError:
        return
    with safetensors.safe_open(path, "pt") as file:
        assert set(tensors) == set(file.keys())
        assert metadata == (file.metadata() or {})
        for name, tensor in tensors.items():
            expected = file.get_tensor(name)
            assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
            assert torch.equal(tensor, expected)
