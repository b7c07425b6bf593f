"""The synchronous client against a fake server: answers, transfers, errors, retries."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from loramux import Client, errors
from loramux.retry import NO_RETRY, RetryPolicy
from loramux.types import TransferProgress
from support.fake_service import DIGEST, FakeServer


@pytest.fixture
def client(fake: FakeServer):
    with Client(fake.address, retry=RetryPolicy(first=0.01, longest=0.1)) as connected:
        yield connected


def test_the_public_api_loads_neither_torch_nor_the_servers() -> None:
    script = (
        "import sys, loramux; loramux.Client; loramux.AsyncClient;"
        "print([m for m in ('torch', 'loramux_server', 'loramux_adapters', 'loramux_trainer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_generate_returns_typed_values(client: Client) -> None:
    answer = client.generate("hello", request_id="r1", n=2, temperature=0.0, logprobs=1)
    assert answer.text == "base: hello"
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.prompt.request_id == "r1"
    assert answer.prompt.adapter_digest is None
    assert answer.choices[0].finish.reason == "stop"
    assert answer.choices[0].finish.stop_string == "\n"
    assert answer.choices[0].finish.usage.prompt == 5
    assert answer.choices[0].logprobs[0].alternatives[0].text == b"\xff"


def test_only_given_options_are_on_the_wire(client: Client, fake: FakeServer) -> None:
    client.generate(token_ids=[4, 5], temperature=0.0, stop="x", logit_bias={3: -1.0}, max_tokens=9, seed=0)
    request = fake.state.requests[-1]
    assert list(request.token_ids.ids) == [4, 5]
    assert request.sampling.HasField("temperature")
    assert request.sampling.HasField("seed")
    assert not request.sampling.HasField("top_p")
    assert not request.HasField("priority")
    assert list(request.stopping.stop_strings) == ["x"]
    assert dict(request.sampling.logit_bias) == {3: -1.0}
    assert not request.response.HasField("logprobs")


def test_chat_sends_messages(client: Client) -> None:
    answer = client.generate(messages=[{"role": "system", "content": "be"}, {"role": "user", "content": "kind"}])
    assert answer.text == "base: be kind"


@pytest.mark.parametrize("inputs", [{}, {"text": "a", "token_ids": [1]}])
def test_exactly_one_input(client: Client, inputs: dict[str, object]) -> None:
    with pytest.raises(errors.InvalidArgument, match="exactly one") as caught:
        client.generate(**inputs)
    assert caught.value.violations[0].field == "input"


def test_a_value_that_fits_no_field_is_refused_here(client: Client, fake: FakeServer) -> None:
    with pytest.raises(errors.InvalidArgument):
        client.generate("x", top_k=-1)
    with pytest.raises(errors.InvalidArgument):
        client.generate(token_ids=[2**32])
    with pytest.raises(TypeError, match="temprature"):
        client.generate("x", temprature=1.0)
    assert fake.state.requests == []


def test_stream_yields_parts_and_ends_with_finish(client: Client) -> None:
    parts = list(client.stream("a b c"))
    assert "".join(part.text for part in parts) == "a b c"
    assert parts[0].prompt is not None
    assert parts[1].prompt is None
    assert [part.finish is not None for part in parts] == [False, False, True]
    assert parts[-1].finish.reason == "length"


def test_closing_a_stream_cancels_the_call(client: Client, fake: FakeServer) -> None:
    stream = client.stream(" ".join(["word"] * 20000))
    next(stream)
    stream.close()
    assert fake.state.cancelled.wait(60)


def test_rich_details_become_attributes(client: Client) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        client.generate("x", n=5)
    error = caught.value
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert error.violations[0].field == "sampling.n"
    assert error.metadata == {"max_choices": "4"}
    assert str(error) == "sampling.n: must be at most 4"


def test_unknown_adapter_is_not_found_and_names_it(client: Client) -> None:
    with pytest.raises(errors.NotFound) as caught:
        client.generate("x", adapter="nobody")
    assert caught.value.resource == "nobody"


def test_retry_info_is_obeyed_even_for_generate(client: Client, fake: FakeServer) -> None:
    fake.state.faults.unavailable_calls = 2
    assert client.generate("x").text == "base: x"
    assert fake.state.calls == 3


def test_retries_are_bounded(client: Client, fake: FakeServer) -> None:
    fake.state.faults.unavailable_calls = 100
    with pytest.raises(errors.Unavailable) as caught:
        client.model()
    assert fake.state.calls == 4
    assert caught.value.retry_after == pytest.approx(0.01)


def test_a_timeout_bounds_all_tries(fake: FakeServer) -> None:
    fake.state.faults.unavailable_calls = 10**6
    for ask in (lambda: client.generate("x", timeout=0.3), lambda: list(client.stream("x", timeout=0.3))):
        started = time.monotonic()
        # The last try is refused, or cut in the middle.
        refused_or_cut = (errors.Unavailable, errors.DeadlineExceeded)
        with Client(fake.address, retry=RetryPolicy(attempts=10**6)) as client, pytest.raises(refused_or_cut):
            ask()
        assert time.monotonic() - started < 10
    assert fake.state.calls < 10**6


def test_only_an_update_that_adds_no_alias_is_repeated(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def unreachable(*_: object) -> None:
        calls.append(1)
        raise errors.Unavailable("no server")

    monkeypatch.setattr(client, "_once", unreachable)
    for changes, tries in (({"pinned": True}, 4), ({"add_aliases": ["prod"]}, 1)):
        calls.clear()
        with pytest.raises(errors.Unavailable):
            client.update("bot", **changes)
        assert len(calls) == tries


def test_a_long_retry_delay_is_told_not_waited_for(client: Client, fake: FakeServer) -> None:
    fake.state.faults.unavailable_calls, fake.state.faults.retry_after = 1, 30.0
    started = time.monotonic()
    with pytest.raises(errors.Unavailable):
        client.model()
    assert time.monotonic() - started < 25


def test_a_stream_that_began_is_not_repeated(client: Client, fake: FakeServer) -> None:
    fake.state.faults.fail_stream_after = 1
    parts = []
    with pytest.raises(errors.ServerFault, match="request abc"):
        parts.extend(client.stream("a b c"))
    assert fake.state.calls == 1


def test_a_stream_refused_at_its_start_is_repeated_when_asked(client: Client, fake: FakeServer) -> None:
    fake.state.faults.unavailable_calls = 1
    assert [part.text for part in client.stream("a b")] == ["a", " b"]


def test_no_server_says_how_to_start_one() -> None:
    with Client("127.0.0.1:1", retry=NO_RETRY) as client, pytest.raises(errors.Unavailable, match="loramux serve"):
        client.model()


def test_tokens_model_and_abort(client: Client) -> None:
    assert client.tokenize("ab") == (97, 98)
    assert client.detokenize((97, 98)) == "ab"
    model = client.model()
    assert (model.model_id, model.limits.context_tokens, model.chat_template_digest) == ("fake", 64, None)
    assert client.abort("running") is True
    assert client.abort("ended") is False


def test_push_sends_only_the_adapter(client: Client, fake: FakeServer, adapter_dir: Path) -> None:
    seen: list[TransferProgress] = []
    pushed = client.push(adapter_dir, "bot", labels={"team": "a"}, progress=seen.append)
    assert set(fake.state.files["bot"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert (
        fake.state.files["bot"]["adapter_model.safetensors"] == (adapter_dir / "adapter_model.safetensors").read_bytes()
    )
    assert pushed.left_out == ("README.md", "optimizer.pt")
    assert pushed.created
    assert pushed.resumed_bytes == 0
    assert seen[-1].done == seen[-1].total == pushed.sent_bytes
    assert not client.push(adapter_dir, "bot", labels={"team": "a"}).created


def test_a_push_sets_anew_when_the_adapter_ends(client: Client, fake: FakeServer, adapter_dir: Path) -> None:
    before = datetime.now(UTC)
    brief = client.push(adapter_dir, "bot", ttl=60, max_uses=2).adapter
    assert brief.expires is not None
    assert before + timedelta(seconds=59) < brief.expires < datetime.now(UTC) + timedelta(seconds=61)
    assert (brief.max_uses, brief.uses_left) == (2, 2)
    stays = client.push(adapter_dir, "bot").adapter
    assert (stays.expires, stays.max_uses, stays.uses_left) == (None, None, None)
    with pytest.raises(errors.InvalidArgument) as caught:
        client.push(adapter_dir, "bot", ttl=0, max_uses=0)
    assert [violation.field for violation in caught.value.violations] == ["ttl", "max_uses"]


def test_a_cut_push_resumes_by_itself(client: Client, fake: FakeServer, adapter_dir: Path) -> None:
    fake.state.faults.cut_upload_after = 600_000
    pushed = client.push(adapter_dir, "bot")
    assert pushed.resumed_bytes >= 600_000
    assert pushed.sent_bytes + pushed.resumed_bytes == sum(len(data) for data in fake.state.files["bot"].values())


def test_a_push_given_up_is_resumed_by_the_next_one(fake: FakeServer, adapter_dir: Path) -> None:
    fake.state.faults.cut_upload_after = 600_000
    with Client(fake.address, retry=NO_RETRY) as impatient, pytest.raises(errors.Unavailable):
        impatient.push(adapter_dir, "bot")
    with Client(fake.address) as client:
        [upload_id] = fake.state.uploads
        assert {entry.file: entry.received > 0 for entry in client.query_upload(upload_id)} == {
            "adapter_config.json": True,
            "adapter_model.safetensors": True,
        }
        assert client.push(adapter_dir, "bot").resumed_bytes >= 600_000


def test_a_file_that_vanishes_during_a_push_is_the_reason_given(client: Client, adapter_dir: Path) -> None:
    def vanish(_: TransferProgress) -> None:
        (adapter_dir / "adapter_model.safetensors").unlink(missing_ok=True)

    with pytest.raises(errors.LocalFilesError, match=r"cannot read .*adapter_model.safetensors"):
        client.push(adapter_dir, "bot", progress=vanish)


def test_changed_content_is_another_upload(fake: FakeServer, adapter_dir: Path) -> None:
    fake.state.faults.cut_upload_after = 600_000
    with Client(fake.address, retry=NO_RETRY) as client:
        with pytest.raises(errors.Unavailable):
            client.push(adapter_dir, "bot")
        (adapter_dir / "adapter_model.safetensors").write_bytes(b"something else")
        assert client.push(adapter_dir, "bot").resumed_bytes == 0


def test_pickles_are_never_sent(client: Client, fake: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(errors.LocalFilesError, match="pickle"):
        client.push(tmp_path, "bot")
    assert fake.state.calls == 0


def test_pull_gives_the_same_bytes(client: Client, adapter_dir: Path, tmp_path: Path) -> None:
    client.push(adapter_dir, "bot")
    pulled = client.pull("bot", tmp_path / "back")
    assert pulled.digest == DIGEST
    for entry in pulled.files:
        assert (tmp_path / "back" / entry.file).read_bytes() == (adapter_dir / entry.file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == sorted(f.file for f in pulled.files)
    client.pull("bot", tmp_path / "back", overwrite=True)


def test_a_pull_that_cannot_be_written_asks_nothing_of_the_server(
    client: Client, fake: FakeServer, adapter_dir: Path
) -> None:
    (adapter_dir / "file").write_text("in the way")
    with pytest.raises(errors.LocalFilesError) as caught:
        client.pull("bot", adapter_dir)
    files = "adapter_config.json, adapter_model.safetensors"
    remedy = "choose another directory, or replace them with overwrite=True"
    assert str(caught.value) == f"{adapter_dir} already holds {files}; {remedy}"
    with pytest.raises(errors.LocalFilesError, match="is not a directory"):
        client.pull("bot", adapter_dir / "file", overwrite=True)
    assert fake.state.calls == 0


def test_a_corrupt_download_leaves_nothing(client: Client, fake: FakeServer, adapter_dir: Path, tmp_path: Path) -> None:
    client.push(adapter_dir, "bot")
    fake.state.faults.corrupt_download = True
    with pytest.raises(errors.TransferError, match="sha256"):
        client.pull("bot", tmp_path / "back")
    assert list((tmp_path / "back").iterdir()) == []
    with pytest.raises(errors.TransferError, match="push the adapter again"):
        client.verify("bot")


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "adapter_config.json/../x", "a\x00b", ".bashrc"])
def test_a_server_cannot_choose_file_names(
    client: Client, fake: FakeServer, adapter_dir: Path, tmp_path: Path, name: str
) -> None:
    client.push(adapter_dir, "bot")
    fake.state.faults.download_name = name
    with pytest.raises(errors.TransferError, match="does not have"):
        client.pull("bot", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_listing_pages_through(client: Client, adapter_dir: Path) -> None:
    for number in range(5):
        client.push(adapter_dir, f"bot-{number}")
    assert [adapter.name for adapter in client.adapters(page_size=2)] == [f"bot-{number}" for number in range(5)]
    first = client.adapter("bot-0")
    assert (first.digest, first.residency.tier, first.base_fingerprint) == (DIGEST, "registered", None)


def test_update_changes_what_is_given(client: Client, adapter_dir: Path) -> None:
    client.push(adapter_dir, "bot")
    changed = client.update("bot", add_aliases=["prod"], set_labels={"a": "b"}, pinned=True)
    assert (changed.aliases, dict(changed.labels), changed.pinned) == (("prod",), {"a": "b"}, True)
    again = client.update("bot", remove_aliases=["prod"], merge=True)
    assert (again.aliases, again.pinned, again.residency.merged) == ((), True, "ready")
    client.delete("bot")
    with pytest.raises(errors.NotFound):
        client.delete("bot")


def test_health(client: Client, fake: FakeServer) -> None:
    client.wait_healthy(5)
    fake.set_serving(False)
    assert client.is_healthy() is False
    with pytest.raises(errors.Unavailable, match="NOT_SERVING"):
        client.wait_healthy(2, poll=0.05)


def test_what_was_answered_says_more_than_the_end_of_the_wait(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False])

    def is_healthy(**_: object) -> bool:
        for answer in answers:
            return answer
        raise errors.DeadlineExceeded("Deadline Exceeded")

    monkeypatch.setattr(client, "is_healthy", is_healthy)
    with pytest.raises(errors.Unavailable, match="NOT_SERVING"):
        client.wait_healthy(0.2, poll=0.01)
