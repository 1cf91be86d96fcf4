"""The plugin's exact PTX against PyTorch on a GPU, and against the bytes that the rule must move.

    python -m benchmarks.tensorrt.run --heads 8 --width 64 --batch 1 8 --tokens 1 512

Every form is compared with the token loop in float64 before it is timed; what is off by more than 1e-4 is not
timed. Forms alternate, round by round; a row has the median of each form's time and of its ratio to eager.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import conclude
from benchmarks.tensorrt.launch import Launcher
from titans_converters.tensorrt.aot import KernelSizes, blocks_for, compile_kernel
from titans_export.memory import neural_memory, token_loop

Form = Callable[[], tuple[Tensor, ...]]
_TOLERANCE = 1e-4
_FLOAT = 4


def bytes_moved(batch: int, heads: int, tokens: int, width: int) -> int:
    """What any form must read and write: query, key, value, output; gates; memory and momentum, twice."""
    per_token = 4 * width + 3
    state = 4 * width * width
    return _FLOAT * batch * (heads * (tokens * per_token + state) + 1)


def make_inputs(batch: int, heads: int, tokens: int, width: int, device: str) -> list[Tensor]:
    """Inputs of the operator in its order, float32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    stream = (batch, heads, tokens)
    query, key = (torch.nn.functional.normalize(normal(*stream, width), dim=-1) for _ in range(2))
    gates = [-0.05 * normal(*stream).abs(), -normal(*stream).abs(), normal(*stream).sigmoid()]
    state = [0.1 * normal(batch, heads, width, width) for _ in range(2)]
    inputs = [query, key, normal(*stream, width), *gates, torch.ones(batch), *state]
    return [tensor.to(device).contiguous() for tensor in inputs]


def forms(inputs: list[Tensor], heads: int, width: int) -> dict[str, Form]:
    """Every way to compute the rule that is timed."""
    batch, _, tokens, _ = inputs[0].shape

    def eager() -> tuple[Tensor, ...]:
        return neural_memory(*inputs)

    compiled = torch.compile(neural_memory, dynamic=False)
    found: dict[str, Form] = {"eager": eager, "compile": lambda: compiled(*inputs)}
    found["cudagraph"] = _recorded(eager)
    for block in blocks_for(width):
        launcher = Launcher(compile_kernel(KernelSizes(heads, width, width, block)))
        found[f"plugin, {block} columns"] = _launched(launcher, inputs, batch, tokens)
    return found


def _launched(launcher: Launcher, inputs: list[Tensor], batch: int, tokens: int) -> Form:
    outputs = (torch.empty_like(inputs[2]), torch.empty_like(inputs[-2]), torch.empty_like(inputs[-1]))
    addresses = [tensor.data_ptr() for tensor in inputs], [tensor.data_ptr() for tensor in outputs]

    def launch() -> tuple[Tensor, ...]:
        stream = torch.cuda.current_stream().cuda_stream
        launcher(addresses[0], tokens, addresses[1], batch, stream)
        return outputs

    return launch


def _recorded(form: Form) -> Form:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            form()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = form()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay


def worst_error(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest difference of any output, over its largest magnitude."""
    pairs = zip(results, expected, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


def time_rounds(ways: dict[str, Form], rounds: int, calls: int) -> dict[str, list[float]]:
    """Microseconds a call, for every form in every round, by events on the GPU."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, form in ways.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            for _ in range(calls):
                form()
            end.record()
            end.synchronize()
            found[name].append(1000 * begin.elapsed_time(end) / calls)
    return found


def measure(
    batch: int, heads: int, tokens: int, width: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one case."""
    inputs = make_inputs(batch, heads, tokens, width, "cuda")
    expected = token_loop(*(tensor.double() for tensor in inputs))
    ways = forms(inputs, heads, width)
    errors = {name: worst_error(form(), expected) for name, form in ways.items()}
    sound = {name: form for name, form in ways.items() if errors[name] <= _TOLERANCE}
    times = time_rounds(sound, args.rounds, args.calls)
    moved = bytes_moved(batch, heads, tokens, width)
    case = {"batch": batch, "heads": heads, "tokens": tokens, "width": width, "bytes": moved}
    rows = []
    for name in ways:
        row = case | {"form": name, "error": errors[name]}
        if name in sound:
            median = statistics.median(times[name])
            ratios = [a / b for a, b in zip(times[name], times["eager"], strict=True)]
            row |= {"microseconds": median, "over_eager": statistics.median(ratios)}
            row |= {"gigabytes_per_second": moved / median / 1000}
        rows.append(row)
    return rows


def main() -> None:
    """Measure every case and print JSON lines."""
    parser = argparse.ArgumentParser(description="The plugin's kernel against PyTorch on this GPU.")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=50)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU that this PyTorch can use; run where there is one")
    torch.backends.cuda.matmul.allow_tf32 = False
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    print(json.dumps(machine))
    for batch in args.batch:
        for tokens in args.tokens:
            for row in measure(batch, args.heads, tokens, args.width, args):
                print(json.dumps(row))


if __name__ == "__main__":
    conclude(main)
