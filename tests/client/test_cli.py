"""The command line: what it prints, what its JSON holds, how it fails, and that light commands stay light."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from loramux.cli.checks import examine
from loramux.cli.connecting import StartRetryPolicy
from loramux.cli.main import app
from loramux.errors import ErrorDetails, Unavailable
from loramux.terminal.failures import CommandError, ExitCode, Failure, explain
from loramux.terminal.output import tell_failure
from loramux_adapters.errors import REFUSED
from loramux_protos.v1 import inference_pb2
from loramux_server.config import resolve_config
from support.fake_service import DIGEST, FakeServer

HEAVY = ("torch", "transformers", "grpc", "loramux_adapters.base.load", "peft")


def invoke(*arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=input)


def run_process(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loramux.cli.main", *arguments], capture_output=True, text=True, timeout=200, **options
    )


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    script = (
        "import sys, time\n"
        "from typer.testing import CliRunner\nfrom loramux.cli.main import app\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        f"print(result.exit_code, [m for m in {(*HEAVY, 'pydantic')!r} if m in sys.modules], time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    code, heavy, seconds = done.stdout.split()
    assert (code, heavy) == ("0", "[]")
    assert float(seconds) < 1.0  # of processor time: 0.25 on a quiet machine


@pytest.mark.parametrize(
    "arguments",
    [["config", "show", "--json"], ["config", "check"], ["serve", "--help"], ["bench", "--help"], ["demo", "--help"]],
)
def test_light_commands_do_not_import_torch(arguments: list[str], tmp_path: Path) -> None:
    if arguments[:2] == ["config", "check"]:
        arguments = [*arguments, "--listen=127.0.0.1:0", "--metrics-listen=none", f"--data-dir={tmp_path}"]
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom loramux.cli.main import app\n"
        f"result = CliRunner().invoke(app, {arguments!r})\n"
        "print(result.exit_code, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["0", "False"]


def test_exit_codes_are_documented_in_one_place_and_the_help_agrees() -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    table = page.partition("## Exit codes")[2].partition("\n## ")[0]
    codes = {code.value for code in ExitCode}
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]
    assert [row for row in rows if row.isdecimal()] == [str(code) for code in sorted(codes)]
    assert [row for row in rows if not row.isdecimal()] == ["128 + N"]  # of a second signal to `serve`
    help_page = " ".join(invoke("--help").stdout.split()).partition("Exit codes: ")[2]
    assert [int(part.split()[0]) for part in help_page.rstrip(".").split(", ")] == sorted(codes)
    assert REFUSED == ExitCode.REFUSED


def test_version() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("loramux ")


# Serving and configuration


def test_serve_refuses_a_bad_option_before_torch_and_says_what_to_do() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "loramux.cli.main", "serve", "--listen", "nowhere"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == ExitCode.USAGE
    assert "listen = 'nowhere' (flag --listen)" in done.stderr
    assert "127.0.0.1:50051" in done.stderr
    assert "Traceback" not in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "loramux_server.preflight" in imported
    assert "torch" not in imported


def test_serve_names_the_port_that_is_taken(fake: FakeServer) -> None:
    done = run_process("serve", "--listen", fake.address, "--metrics-listen", "none")
    assert done.returncode == ExitCode.USAGE
    assert fake.address in done.stderr
    assert "--listen" in done.stderr


def test_every_server_option_is_a_flag_with_its_help() -> None:
    from loramux_server.config import options

    text = " ".join(invoke("serve", "--help").stdout.split())
    for name in options():
        assert f"--{name.replace('_', '-')}"[:20] in text


def test_config_show_says_where_each_value_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "loramux.yaml"
    file.write_text("max_running: 7\nmax_queued: 8\nmax_rank: 32\n")
    monkeypatch.setenv("LORAMUX_MAX_QUEUED", "9")
    result = invoke("config", "show", "--config", str(file), "--max-rank", "64", "--no-prefix-cache", "--json")
    rows = {row["option"]: row for row in json.loads(result.stdout)}
    assert (rows["max_running"]["value"], rows["max_running"]["origin"]) == (7, f"file {file}")
    assert (rows["max_queued"]["value"], rows["max_queued"]["origin"]) == (9, "env LORAMUX_MAX_QUEUED")
    assert (rows["max_rank"]["value"], rows["max_rank"]["origin"]) == (64, "flag --max-rank")
    assert rows["prefix_cache"]["value"] is False
    assert rows["model"]["origin"] == "default"


def test_config_check_only_warns_of_an_address_in_use(fake: FakeServer, tmp_path: Path) -> None:
    arguments = ("config", "check", "--metrics-listen=none", f"--data-dir={tmp_path}")
    result = invoke(*arguments, f"--listen={fake.address}")
    assert result.exit_code == 0
    assert f"warning: listen: cannot listen on {fake.address}" in result.stderr
    assert invoke(*arguments, "--listen=no-such-host.invalid:1").exit_code == ExitCode.USAGE


def test_an_unknown_variable_is_told_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_MAX_RUNING", "9")
    monkeypatch.setenv("LORAMUX_SERVICE_HOST", "10.0.0.1")  # Kubernetes' own, beside a service named loramux
    monkeypatch.setenv("LORAMUX_ADDRESS", "127.0.0.1:1")
    result = invoke("config", "check", "--metrics-listen=none", "--listen=127.0.0.1:0", f"--data-dir={tmp_path}")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "warning: LORAMUX_MAX_RUNING is not an option and is ignored; did you mean LORAMUX_MAX_RUNNING?"
    ]


def test_config_init_writes_what_config_show_reads(tmp_path: Path) -> None:
    file = tmp_path / "loramux.yaml"
    assert invoke("config", "init", str(file)).exit_code == 0
    text = file.read_text()
    assert "# max_running: 64" in text
    assert f": {Path.home()}" not in text
    file.write_text(text.replace("# max_running: 64", "max_running: 65"))
    shown = {row["option"]: row for row in json.loads(invoke("config", "show", "-c", str(file), "--json").stdout)}
    assert shown["max_running"]["value"] == 65
    assert invoke("config", "init", str(file)).exit_code == ExitCode.REFUSED
    assert invoke("config", "init", str(file), "--force").exit_code == 0


# Talking to a server


def test_generate_streams_text(fake: FakeServer) -> None:
    result = invoke("generate", "one two", "--address", fake.address, "-t", "0", "--stop", "x", "--max-tokens", "5")
    assert result.exit_code == 0
    assert result.stdout == "one two\n"
    request = fake.state.requests[-1]
    assert request.stopping.max_tokens == 5
    assert request.sampling.temperature == 0
    assert not request.sampling.HasField("top_p")


def test_generate_reads_stdin_and_sends_chats(fake: FakeServer) -> None:
    result = invoke("generate", "--address", fake.address, "--system", "be kind", input="hello\n")
    assert result.stdout == "be kind hello\n"
    assert [m.role for m in fake.state.requests[-1].chat.messages] == ["system", "user"]


def test_generate_json_and_many_answers(fake: FakeServer) -> None:
    result = invoke("generate", "x", "-a", fake.address, "--json", "--logprobs", "1")
    answer = json.loads(result.stdout)
    assert answer["choices"][0]["text"] == "base: x"
    assert answer["choices"][0]["finish"]["usage"]["prompt"] == 1
    assert "--- 1" in invoke("generate", "x", "-a", fake.address, "-n", "2").stdout


def test_an_empty_answer_is_told_on_stderr_and_prints_nothing(fake: FakeServer) -> None:
    fake.state.faults.empty = True
    result = invoke("generate", "x", "-a", fake.address)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "the answer is empty: 0 tokens, finish reason stop\n"
    several = invoke("generate", "x", "-a", fake.address, "-n", "2")
    assert (several.exit_code, several.stdout) == (0, "--- 0\n--- 1\n")
    assert several.stderr.splitlines() == [f"answer {i} is empty: 0 tokens, finish reason stop" for i in range(2)]
    fake.state.faults.finish = inference_pb2.FINISH_REASON_ABORTED
    aborted = invoke("generate", "x", "-a", fake.address)
    assert (aborted.exit_code, aborted.stdout) == (ExitCode.UNAVAILABLE, "")
    assert "finish reason aborted" in aborted.stderr


@pytest.mark.parametrize("arguments", [[], ["--json"], ["-n", "2"]])
def test_an_aborted_answer_is_shown_and_has_its_code(fake: FakeServer, arguments: list[str]) -> None:
    fake.state.faults.finish = inference_pb2.FINISH_REASON_ABORTED
    result = invoke("generate", "one two", "-a", fake.address, *arguments)
    assert result.exit_code == ExitCode.UNAVAILABLE
    assert "one two" in result.stdout
    assert "aborted before its end" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate", "x", "--adapter", "nobody"], ExitCode.NOT_FOUND, "no adapter 'nobody'"),
        (["generate", "x", "-n", "5"], ExitCode.REFUSED, "sampling.n: must be at most 4"),
        (
            ["generate", "x", "-t", "-1", "--top-p", "5"],
            ExitCode.REFUSED,
            "temperature: -1 is out of range: must be from 0 to 100; 0 is greedy; top_p: 5 is out of range",
        ),
        (["adapters", "show", "nobody"], ExitCode.NOT_FOUND, "nobody"),
        (["adapters", "push", "/nowhere/at/all"], ExitCode.REFUSED, "not a directory"),
    ],
)
def test_expected_errors_are_words_and_codes(
    fake: FakeServer, arguments: list[str], code: ExitCode, words: str
) -> None:
    result = invoke(*arguments, "--address", fake.address)
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_no_server_is_unavailable_and_says_how_to_start_one() -> None:
    result = invoke("generate", "x", "--address", "127.0.0.1:1")
    assert result.exit_code == ExitCode.UNAVAILABLE
    assert result.stderr == "error: no server reachable at 127.0.0.1:1; start one with `loramux serve`\n"


def test_a_name_in_place_of_the_address_is_told_apart(fake: FakeServer) -> None:
    result = invoke("generate", "x", "-a", "shout")
    assert result.exit_code == ExitCode.USAGE
    assert "-A/--adapter" in result.stderr


def test_an_unknown_adapter_says_where_the_known_are(fake: FakeServer) -> None:
    assert "loramux adapters ls" in invoke("generate", "x", "-A", "nobody", "-a", fake.address).stderr


@pytest.mark.parametrize("words", [("generate", "one"), ("adapters", "pull", "bot", "OUT"), ("adapters", "ls")])
def test_commands_wait_for_a_server_that_warms_up(fake: FakeServer, tmp_path: Path, words: tuple[str, ...]) -> None:
    fake.state.files["bot"] = {"adapter_config.json": b"{}"}
    fake.state.faults.unavailable_calls, fake.state.faults.unavailable_reason = 2, "WARMING_UP"
    result = invoke(*(str(tmp_path / w) if w == "OUT" else w for w in words), "-a", fake.address)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("warming up; waiting up to 60 s") == 1


def test_patience_ends_and_is_for_warming_up_alone() -> None:
    warming = Unavailable("the server is warming up", ErrorDetails(reason="WARMING_UP"))
    assert StartRetryPolicy().pause(warming, 99, idempotent=False) == 0.5
    assert StartRetryPolicy(warm_up_seconds=0.0).pause(warming, 1, idempotent=True) is None
    assert StartRetryPolicy().pause(Unavailable("x", ErrorDetails(reason="DRAINING")), 99, idempotent=True) is None


def test_adapters_from_push_to_rm(fake: FakeServer, adapter_dir: Path, tmp_path: Path) -> None:
    def adapters(*arguments: str) -> Result:
        result = invoke("adapters", *arguments, "--address", fake.address)
        assert result.exit_code == 0, result.output
        return result

    assert "no adapters yet" in adapters("ls").stdout
    pushed = adapters("push", str(adapter_dir), "--label", "team=a")
    assert "support-bot@dddddddddddd published" in pushed.stdout
    assert "kept here: README.md, optimizer.pt" in pushed.stdout
    assert "had its content already" in adapters("push", str(adapter_dir), "--label", "team=a").stdout

    listed = json.loads(adapters("ls", "--json").stdout)
    assert [entry["name"] for entry in listed] == ["support-bot"]
    assert listed[0]["residency"]["tier"] == "registered"
    assert "support-bot" in adapters("ls").stdout
    assert json.loads(adapters("show", "support-bot", "--json").stdout)["digest"] == DIGEST
    assert "undeclared" in adapters("show", "support-bot").stdout

    assert "prod" in adapters("alias", "support-bot", "prod").stdout
    assert "no aliases" in adapters("alias", "support-bot", "prod", "--remove").stdout
    assert ": pinned" in adapters("pin", "support-bot").stdout
    assert "not pinned" in adapters("unpin", "support-bot").stdout
    assert "merged weights ready" in adapters("merge", "support-bot").stdout
    assert "merged weights none" in adapters("merge", "support-bot", "--off").stdout

    assert "verified" in adapters("verify", "support-bot", "--against", str(adapter_dir)).stdout
    (adapter_dir / "adapter_config.json").write_text("{}")
    differing = invoke(
        "adapters", "verify", "support-bot", "--against", str(adapter_dir), "--json", "--address", fake.address
    )
    assert differing.exit_code == ExitCode.NO
    assert json.loads(differing.stdout)["different"] == ["adapter_config.json"]

    adapters("pull", "support-bot", str(tmp_path / "back"))
    calls = fake.state.calls
    refused = invoke("adapters", "pull", "support-bot", str(tmp_path / "back"), "--address", fake.address)
    assert refused.exit_code == ExitCode.REFUSED
    assert refused.stderr == (
        f"error: {tmp_path / 'back'} already holds adapter_config.json, adapter_model.safetensors\n"
        "       choose another directory, or --force to replace them\n"
    )
    assert fake.state.calls == calls
    assert json.loads(adapters("pull", "support-bot", str(tmp_path / "back"), "--force", "--json").stdout)["files"]
    assert "removed support-bot" in adapters("rm", "support-bot").stdout


def test_a_version_is_printed_once(fake: FakeServer, tmp_path: Path) -> None:
    fake.state.files["bot@dddddddd"] = {"adapter_config.json": b"{}"}
    pulled = invoke("adapters", "pull", "bot@dddddddd", str(tmp_path / "bot"), "-a", fake.address)
    assert pulled.stdout.startswith("bot@dddddddddddd -> ")
    verified = invoke("adapters", "verify", "bot@dddddddd", "-a", fake.address)
    assert verified.stdout.startswith("bot@dddddddddddd verified")


def test_a_bad_label_is_a_usage_error(fake: FakeServer, adapter_dir: Path) -> None:
    result = invoke("adapters", "push", str(adapter_dir), "--label", "nonsense", "--address", fake.address)
    assert result.exit_code == ExitCode.USAGE
    assert "KEY=VALUE" in result.stderr


def test_health_is_an_exit_code(fake: FakeServer) -> None:
    assert invoke("health", "--address", fake.address).exit_code == ExitCode.OK
    fake.set_serving(False)
    assert invoke("health", "--address", fake.address).exit_code == ExitCode.NO
    assert invoke("health", "--address", "127.0.0.1:1").exit_code == ExitCode.UNAVAILABLE
    waited = invoke("health", "--address", fake.address, "--wait", "0.3")
    assert waited.exit_code == ExitCode.NO
    assert "NOT_SERVING after 0.3 s" in waited.stderr
    assert invoke("health", "--address", "127.0.0.1:1", "--wait", "0.3").exit_code == ExitCode.UNAVAILABLE


# Without a server


def test_doctor_reports_every_check(tmp_path: Path) -> None:
    result = invoke("doctor", "--json", "--data-dir", str(tmp_path), "--listen=127.0.0.1:0", "--metrics-listen=none")
    report = json.loads(result.stdout)
    found = {finding["check"]: finding for finding in report["findings"]}
    assert {"python", "serving", "processor", "device", "threads", "kernels package", "embedded base"} <= set(found)
    assert found["data directory"]["state"] in ("ok", "warn")
    assert report["machine"]["usable_cores"] >= 1
    assert report["ok"] == (result.exit_code == ExitCode.OK)


def test_doctor_names_the_compiler_and_leaves_no_trailing_blanks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    result = invoke("doctor", "--data-dir", str(tmp_path), "--listen=127.0.0.1:0", "--metrics-listen=none")
    assert "no C compiler: plain torch instead of native kernels" in result.stdout
    assert "absent, as it should be" in result.stdout
    assert all(line == line.rstrip() for line in result.stdout.splitlines())


def test_doctor_takes_the_client_alone_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux.cli.checks.find_version", lambda name: None)
    monkeypatch.setattr("loramux.cli.checks.find_spec", lambda name: None if name == "torch" else find_spec(name))
    config = resolve_config(flags={"data_dir": str(tmp_path), "listen": "127.0.0.1:0"}).config
    states = {finding.check: finding.state for finding in examine(config)}
    assert states["serving"] == "note"
    assert "device" not in states
    assert "fail" not in states.values()


def test_doctor_fails_on_what_must_change(tmp_path: Path) -> None:
    result = invoke("doctor", "--model", str(tmp_path / "missing"), "--data-dir", str(tmp_path))
    assert result.exit_code == ExitCode.NO
    assert "fail" in result.stdout
    assert "checkpoint directory" in " ".join(result.stdout.split())


def test_an_interruption_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    tell_failure(Failure("stopped after saving x; run again with --resume to continue", ExitCode.INTERRUPTED))
    assert capsys.readouterr().err.startswith("stopped after saving x")


def test_a_bug_keeps_its_traceback() -> None:
    assert explain(ZeroDivisionError()) is None
    assert explain(KeyboardInterrupt()).code == ExitCode.INTERRUPTED
    assert explain(CommandError("x", remedy="y")).remedy == "y"
    missing = explain(ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert missing is not None
    assert "pip install '.[" in missing.remedy
    assert explain(ModuleNotFoundError("x", name="elsewhere")) is None
