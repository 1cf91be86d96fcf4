"""NVIDIA's parser and builder on one graph: ``rtx_process GRAPH PROFILE``, both files; prints JSON.

Without arguments: which standard operators the parser says it imports.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx
import tensorrt_rtx_bindings as trt


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps what is worse than a note."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.messages: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.messages.append(message)


def build(graph: bytes, profile: dict[str, list[list[int]]], log: Log) -> dict[str, object]:
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        return {"engine_bytes": 0, "messages": [*errors, *log.messages]}
    shapes = builder.create_optimization_profile()
    for name, sizes in profile.items():
        shapes.set_shape(name, *sizes)
    config = builder.create_builder_config()
    config.add_optimization_profile(shapes)
    engine = builder.build_serialized_network(network, config)
    return {
        "engine_bytes": 0 if engine is None else engine.nbytes,
        "layers": network.num_layers,
        "messages": log.messages,
    }


def supported(log: Log) -> list[str]:
    parser = trt.OnnxParser(trt.Builder(log).create_network(0), log)
    names = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    return sorted(name for name in names if parser.supports_operator(name))


def main() -> None:
    if len(sys.argv) == 1:
        print(json.dumps({"supported": supported(Log())}))
        return
    graph, profile = (Path(name) for name in sys.argv[1:])
    print(json.dumps(build(graph.read_bytes(), json.loads(profile.read_text()), Log())))


if __name__ == "__main__":
    main()
