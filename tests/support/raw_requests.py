"""Requests as a client of another kind may send them: whatever the fields hold, unjudged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loramux_protos.v1 import inference_pb2


def raw_request(text: str, options: Mapping[str, Any]) -> inference_pb2.GenerateRequest:
    """A request with options of `loramux.types.GenerateOptions`: all but `tools` and `return_token_ids`."""
    request = inference_pb2.GenerateRequest(text=text)
    parts = (request.sampling, request.stopping, request.response, request)
    for name, value in options.items():
        if name == "stop":
            request.stopping.stop_strings.extend(value)
        elif name == "stop_token_ids":
            request.stopping.stop_token_ids.extend(value)
        elif name == "logit_bias":
            for token, addend in value.items():
                request.sampling.logit_bias[token] = addend
        else:
            setattr(next(part for part in parts if name in part.DESCRIPTOR.fields_by_name), name, value)
    return request
