"""A client that nobody here wrote: `buf curl` learns the services by reflection, generates, and gets a rich error."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path

import pytest

from support.servers import Served, prompt_request, served

pytestmark = pytest.mark.asyncio
BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf") or ""


async def _curl(server: Served, *arguments: str, data: object = None) -> tuple[int, str, str]:
    command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments]
    if data is not None:
        command += ["-d", json.dumps(data)]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, out.decode(), err.decode()


@pytest.mark.skipif(not BUF, reason="buf-bin is not installed")
async def test_buf_curl_lists_generates_streams_and_gets_a_rich_error(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        url = f"http://{server.app.address}"
        code, out, err = await _curl(server, "--list-services", url)
        assert code == 0, err
        assert {"loramux.v1.InferenceService", "loramux.v1.AdapterService", "grpc.health.v1.Health"} <= set(out.split())
        expected = (await server.inference.Generate(prompt_request("Hello", 4))).choices[0].text
        request = {
            "text": "Hello",
            "sampling": {"temperature": 0, "seed": "7"},
            "stopping": {"maxTokens": 4, "ignoreEos": True},
        }
        code, out, err = await _curl(server, f"{url}/loramux.v1.InferenceService/Generate", data=request)
        assert code == 0, err
        assert json.loads(out)["choices"][0]["text"] == expected
        code, out, err = await _curl(server, f"{url}/loramux.v1.InferenceService/GenerateStream", data=request)
        assert code == 0, err
        assert "FINISH_REASON_LENGTH" in out
        request["adapter"] = "nobody"
        code, out, err = await _curl(server, f"{url}/loramux.v1.InferenceService/Generate", data=request)
        assert code != 0
        error = json.loads(err)
        assert error["code"] == "not_found"
        kinds = {detail["type"] for detail in error["details"]}
        assert {"google.rpc.ErrorInfo", "google.rpc.ResourceInfo"} <= kinds
