"""The certificate's file: what goes in comes out, and whatever else is refused in one sentence."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters.adapter_files import CERTIFICATE_FILE
from loramux_adapters.certificate.document import TOLERANCES, Arithmetic, Certificate, Probe, parse
from loramux_adapters.certificate.probes import drawn_tokens, probe_tokens
from loramux_adapters.errors import AdapterInvalid, CertificateRefused

PROBE = Probe((5, 6, 7), (1.5, 2.0), ((1, 2), (3, 4)), ((-0.5, -1.5), (-0.25, -2.0)))
CERTIFICATE = Certificate(
    "a" * 64, "b" * 64, "", Arithmetic("cpu", "float32", "float32"), {"torch": "2.13.0"}, (PROBE,)
)


def test_what_is_written_is_read() -> None:
    assert parse(CERTIFICATE.to_json()) == CERTIFICATE


def test_the_tolerance_is_that_of_the_coarsest_arithmetic() -> None:
    rounded = replace(CERTIFICATE, computed=Arithmetic("cpu", "float32", "bfloat16"))
    assert CERTIFICATE.tolerance_on("float32") == TOLERANCES["float32"]
    assert CERTIFICATE.tolerance_on("bfloat16") == TOLERANCES["bfloat16"]
    assert rounded.tolerance_on("float32") == TOLERANCES["bfloat16"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda values: values.update(adapter="c" * 64), "its seal does not fit"),
        (lambda values: values.update(version=2), "has version 2, this program knows 1"),
        (lambda values: values.pop("version"), "has version None"),
        (lambda values: values.update(seal=1), "its seal does not fit"),
    ],
)
def test_what_was_changed_by_accident_is_found(change: Callable[[dict[str, Any]], object], says: str) -> None:
    values = json.loads(CERTIFICATE.to_json())
    change(values)
    with pytest.raises(CertificateRefused, match=says):
        parse(json.dumps(values).encode())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tolerance": {**TOLERANCES, "float32": 1.0}}, "states another tolerance than its version has"),
        ({"tolerance": {}}, "states another tolerance"),
        ({"probes": ()}, "has 0 probes"),
        ({"probes": (PROBE,) * 9}, "has 9 probes"),
        ({"probes": (replace(PROBE, tokens=(5, 6)),)}, "probe 0 has no prediction after each token but the last"),
        ({"probes": (replace(PROBE, deviations=(1.0,)),)}, "probe 0 has no prediction"),
        ({"probes": (replace(PROBE, deviations=(1.0, 0.0)),)}, "a deviation that is not above 0"),
        ({"probes": (replace(PROBE, top_tokens=((1, 1), (3, 4))),)}, "no list of distinct tokens"),
        ({"probes": (replace(PROBE, top_log_probs=((-0.5,), (-1.0, -2.0))),)}, "no list of distinct tokens"),
        ({"probes": (replace(PROBE, top_log_probs=((0.5, -1.0), (-1.0, -2.0))),)}, "a log-probability above 0"),
        ({"probes": (replace(PROBE, tokens=(5, -6, 7)),)}, "a negative token id"),
        ({"computed": Arithmetic("cpu", "int8", "float32")}, "computed.compute_dtype: must be one of"),  # type: ignore[arg-type]
        ({"adapter": 5}, "is malformed: adapter"),
    ],
)  # fmt: skip
def test_what_its_maker_wrote_wrongly_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CertificateRefused, match=says) as refused:
        parse(replace(CERTIFICATE, **changes).to_json())
    assert refused.value.subject == CERTIFICATE_FILE
    assert CERTIFICATE_FILE in str(refused.value)


def test_a_key_that_nobody_knows_is_not_dropped() -> None:
    values = {**json.loads(CERTIFICATE.to_json()), "more": 1}
    with pytest.raises(CertificateRefused, match="is malformed: more"):
        parse(sealed(values))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda values: values.update(version=True), "version: must be a whole number, not True"),
        (lambda values: values.update(version=1.0), "version: must be a whole number, not 1.0"),
        (lambda values: values["probes"][0]["tokens"].__setitem__(0, "5"), r"tokens\[0\]: must be a whole number"),
        (lambda values: values["probes"][0]["tokens"].__setitem__(0, 5.0), r"tokens\[0\]: must be a whole number"),
        (lambda values: values["probes"][0]["top_tokens"][0].__setitem__(0, True), r"top_tokens\[0\]\[0\]: must be"),
        (lambda values: values["probes"][0]["deviations"].__setitem__(0, "1.5"), r"deviations\[0\]: must be a number"),
        (lambda values: values["probes"][0]["top_log_probs"][0].__setitem__(0, "-1"), "must be a number, not '-1'"),
        (lambda values: values["tolerance"].update(float32="1e-3"), "tolerance.float32: must be a number"),
    ],
)
def test_a_number_is_a_number(change: Callable[[dict[str, Any]], object], says: str) -> None:
    """No text, no flag, and no fraction where numbers are whole."""
    values = json.loads(CERTIFICATE.to_json())
    change(values)
    with pytest.raises(CertificateRefused, match=says):
        parse(sealed(values))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda values: values.update({f"key-{i}": 1 for i in range(9999)}), "has 10007 keys in one object"),
        (lambda values: values.update(versions={f"key-{i}": 1 for i in range(65)}), "has 65 keys in one object"),
        (lambda values: values["probes"][0].update({f"key-{i}": 1 for i in range(65)}), "has 69 keys in one object"),
        (lambda values: values.update(probes=[[]] * 9999), r"malformed: probes\[0\]: must be a mapping of [a-z_, ]+;"),
        (lambda values: values["probes"][0].update(tokens=["x"] * 9999), r"tokens\[0\]: must be a whole [^:]+$"),
        (lambda values: values["probes"][0].update(top_tokens=[["x"] * 99] * 99), r"top_tokens\[0\]\[0\]: [^:]+$"),
    ],
)  # fmt: skip
def test_of_very_many_mistakes_the_first_is_told(change: Callable[[dict[str, Any]], object], says: str) -> None:
    """All of them took a server's processor for many seconds."""
    values = json.loads(CERTIFICATE.to_json())
    change(values)
    with pytest.raises(CertificateRefused, match=says):
        parse(sealed(values))


@pytest.mark.parametrize("version", [[1] * 50_000, 10**4000])
def test_a_long_version_is_quoted_in_short(version: object) -> None:
    values = {**json.loads(CERTIFICATE.to_json()), "version": version}
    with pytest.raises(CertificateRefused, match="has version") as refused:
        parse(sealed(values))
    assert len(str(refused.value)) < 400


def sealed(values: dict[str, Any]) -> bytes:
    """As somebody who knows the format would forge it."""
    values = {key: value for key, value in values.items() if key != "seal"}
    said = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({**values, "seal": hashlib.sha256(said).hexdigest()}).encode()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_bytes_from_strangers_are_read_or_refused(data: st.DataObject) -> None:
    """A value of the file replaced by any JSON value, sealed or not, or bytes replaced."""
    values = json.loads(CERTIFICATE.to_json())
    values.pop("seal")
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    )
    where: Any = values
    key: Any = data.draw(st.sampled_from(sorted(values)))
    while isinstance(where[key], (dict, list)) and where[key] and data.draw(st.booleans()):
        where = where[key]
        key = data.draw(st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where))))
    where[key] = data.draw(anything)
    content = bytearray(sealed(values))
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = parse(bytes(content))
    except (CertificateRefused, AdapterInvalid):
        return
    assert parse(found.to_json()) == found


def test_probes_follow_from_the_adapter_alone() -> None:
    first, second = (drawn_tokens(digest * 64, 100, 50) for digest in "ab")
    assert first == drawn_tokens("a" * 64, 100, 50)
    assert first != second
    assert [len(probe) for probe in first] == [24, 24]
    assert len({token for probe in first for token in probe}) > 24
    assert max(token for probe in (*first, *second) for token in probe) < 100
    assert [len(probe) for probe in drawn_tokens("a" * 64, 100, 10)] == [10, 10]


def test_the_end_of_a_conversation_is_asked_where_there_is_one() -> None:
    drawn = drawn_tokens("a" * 64, 100, 50)
    assert probe_tokens("a" * 64, 100, 50, None) == drawn
    assert probe_tokens("a" * 64, 100, 50, [1]) == drawn
    assert probe_tokens("a" * 64, 100, 50, range(80)) == (*drawn, tuple(range(30, 80)))
