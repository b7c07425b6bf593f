"""The real process on the embedded base: rows 1, 2, 7 to 10, 12, 17 to 19, 23, 28, 37, 38 and 45 of the fault list."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from lorica import Client
from lorica.errors import AlreadyExists, DeadlineExceeded, InvalidArgument, NotFound, ResourceExhausted
from lorica.local_server import LocalServer
from lorica.retry import NO_RETRY

PROMPT = "The capital of"
GREEDY = {"temperature": 0.0, "seed": 1, "ignore_eos": True}


def _text(client: Client, adapter: str = "", max_tokens: int = 24) -> str:
    return client.generate(PROMPT, adapter=adapter, max_tokens=max_tokens, **GREEDY).choices[0].text


def _metric(server: LocalServer, name: str) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=5) as answer:
        families = parse_text(answer.read().decode())
        return {
            tuple(sample.labels.values()): sample.value
            for family in families
            for sample in family.samples
            if sample.name == name
        }


def _until_idle(server: LocalServer, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        running = _metric(server, "lorica_requests_running")[()]
        waiting = sum(_metric(server, "lorica_requests_waiting").values())
        if running + waiting + _metric(server, "lorica_kv_used_ratio")[()] == 0:
            return
        time.sleep(0.05)
    pytest.fail("requests, or their blocks, are still held")


def test_a_mixed_burst_gives_each_request_what_it_gives_alone(client: Client, adapter_dirs: dict[str, Path]) -> None:
    names = ["", *adapter_dirs]
    alone = {name: _text(client, name) for name in names}
    assert len(set(alone.values())) == len(names)
    with ThreadPoolExecutor(8) as pool:
        burst = names * 2
        assert list(pool.map(lambda name: _text(client, name), burst)) == [alone[name] for name in burst]


def test_row_01_02_garbage_size_and_unknown_methods(server: LocalServer, client: Client) -> None:
    with grpc.insecure_channel(server.address) as channel:
        method = "/lorica.v1.InferenceService/Generate"
        for path, payload, expected in (
            (method, b"\xff\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
            (method, b"\x0a\x02\xff\xfe", grpc.StatusCode.INVALID_ARGUMENT),
            (method, b"\x1a" + b"x" * (5 << 20), grpc.StatusCode.RESOURCE_EXHAUSTED),
            ("/lorica.v1.InferenceService/Nope", b"", grpc.StatusCode.UNIMPLEMENTED),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(path)(payload, timeout=20)
            assert caught.value.code() is expected
    assert client.is_healthy()


def test_row_07_08_09_fields(client: Client) -> None:
    vocabulary = client.model().limits.vocabulary
    context = client.model().limits.context_tokens
    for options in (
        {"temperature": float("nan")},
        {"n": 0},
        {"logprobs": 1_000_000},
        {"logit_bias": {vocabulary: 1.0}},
        {"stop": [""]},
        {"max_tokens": context},
    ):
        with pytest.raises(InvalidArgument):
            client.generate(PROMPT, **options)
    with pytest.raises(InvalidArgument):
        client.generate(token_ids=[vocabulary])
    with pytest.raises(InvalidArgument):
        client.generate(token_ids=[1] * context)
    rest = client.generate(token_ids=[5] * (context - 3), **GREEDY)
    assert rest.choices[0].finish.usage.completion == 3


def test_row_10_an_unknown_adapter_is_never_the_base(client: Client) -> None:
    for reference in ("nobody", "small@" + "0" * 12):
        with pytest.raises(NotFound):
            _text(client, reference)


def test_row_12_28_files_that_are_no_adapter_for_this_base(
    client: Client, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    config = (adapter_dirs["small"] / "adapter_config.json").read_bytes()
    weights = (adapter_dirs["small"] / "adapter_model.safetensors").read_bytes()
    cases = {
        "pickle": (config, b"\x80\x04\x95pickle"),
        "zip": (config, b"PK\x03\x04" + b"x" * 100),
        "gguf": (config, b"GGUF" + b"x" * 100),
        "truncated": (config, weights[:-10]),
        "header": (config, (1 << 63).to_bytes(8, "little") + b"{}"),
        "rank": (config.replace(b'"r": 4', b'"r": 5'), weights),
        "targets": (config.replace(b"q_proj", b"nowhere"), weights),
        "json": (b"{", weights),
    }
    for name, (config_bytes, weight_bytes) in cases.items():
        directory = tmp_path / name
        directory.mkdir()
        (directory / "adapter_config.json").write_bytes(config_bytes)
        (directory / "adapter_model.safetensors").write_bytes(weight_bytes)
        with pytest.raises(InvalidArgument):
            client.push(directory, name)
    assert {adapter.name for adapter in client.adapters()} == set(adapter_dirs)


def test_row_17_a_deadline_frees_everything(server: LocalServer, client: Client) -> None:
    with pytest.raises(DeadlineExceeded):
        client.generate(PROMPT, max_tokens=1500, timeout=0.1, **GREEDY)
    _until_idle(server)


def test_row_18_a_killed_client_frees_everything(server: LocalServer) -> None:
    code = (
        "import sys; from lorica import Client\n"
        "for part in Client(sys.argv[1]).stream('x', max_tokens=1500, temperature=0.0, ignore_eos=True):\n"
        "    print('part', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, server.address], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"part\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    _until_idle(server)


def test_row_19_overload_is_refused_with_a_retry(server: LocalServer) -> None:
    def one(_: int) -> str:
        with Client(server.address, retry=NO_RETRY) as own:
            try:
                _text(own, max_tokens=60)
            except ResourceExhausted as error:
                return "refused" if error.retry_after else "refused without a delay"
            return "done"

    with ThreadPoolExecutor(48) as pool:
        outcomes = list(pool.map(one, range(48)))
    assert outcomes.count("done") >= 16
    assert outcomes.count("refused") == len(outcomes) - outcomes.count("done") > 0
    _until_idle(server)


def test_row_23_a_duplicate_id(client: Client) -> None:
    stream = client.stream(PROMPT, max_tokens=1000, request_id="same", **GREEDY)
    next(stream)
    with pytest.raises(AlreadyExists):
        client.generate(PROMPT, request_id="same", max_tokens=1)
    assert client.abort("same")
    for _ in stream:
        pass
    assert client.generate(PROMPT, request_id="same", max_tokens=1, **GREEDY).choices[0].finish is not None


def test_row_37_38_upload_replace_and_delete_while_others_decode(client: Client, adapter_dirs: dict[str, Path]) -> None:
    alone = {name: _text(client, name, 80) for name in ("", "large")}
    client.push(adapter_dirs["large"], "moving")
    results: dict[str, str] = {}

    def run(adapter: str) -> None:
        results[adapter] = _text(client, adapter, 80)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("", "moving")]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    client.push(adapter_dirs["small"], "moving")
    client.push(adapter_dirs["mlp"], "hot")
    assert _text(client, "hot", 8) == _text(client, "mlp", 8)
    assert _text(client, "moving", 24) == _text(client, "small", 24)
    client.delete("moving")
    client.delete("hot")
    for thread in threads:
        thread.join()
    assert results[""] == alone[""]
    assert results["moving"] in (alone["large"], _text(client, "small", 80))  # by which version was there when it came
    with pytest.raises(NotFound):
        _text(client, "moving")


def test_row_45_metrics_parse_in_both_formats_while_busy(server: LocalServer, client: Client) -> None:
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(_text, client, "large", 100) for _ in range(4)]
        begun = time.monotonic()
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=5) as answer:
            names = {family.name for family in parse_text(answer.read().decode())}
        wanted = urllib.request.Request(
            f"http://{server.metrics_address}/metrics", headers={"Accept": "application/openmetrics-text"}
        )
        with urllib.request.urlopen(wanted, timeout=5) as answer:
            families = list(parse_openmetrics(answer.read().decode()))
        assert time.monotonic() - begun < 5.0
        for future in futures:
            future.result()
    assert {"lorica_requests", "lorica_adapters", "lorica_step_seconds", "lorica_lora_requests_info"} <= names
    assert sum(len(family.samples) for family in families) < 1000
    assert _metric(server, "lorica_adapters")[("resident",)] >= 1


def test_what_was_pushed_comes_back_and_is_listed(
    client: Client, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    client.pull("small", tmp_path / "back")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (adapter_dirs["small"] / file).read_bytes()
    listed = {adapter.name: adapter for adapter in client.adapters()}
    assert listed["large"].max_rank == 16
