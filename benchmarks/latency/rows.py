"""The rows of the table: what is run, and what must come out."""

from __future__ import annotations

from dataclasses import dataclass

_MODELS = "eager,compile,torchscript,aoti,openvino-torch,naive"
_OPENVINO = ("openvino, unrolled", "openvino-torch")


@dataclass(frozen=True)
class Target:
    """What a row must reach: the best of some backends over this runtime, on a case of some kind.

    Attributes:
        what: in words.
        backends: of which the fastest counts.
        least: ratio of its time to ours that must be reached.
        kinds: of the runs that count.
    """

    what: str
    backends: tuple[str, ...]
    least: float
    kinds: tuple[str, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class Row:
    """One command.

    Attributes:
        options: of ``titans bench``.
        targets: what must come out.
        variant: the export that is the reference.
        beside: other exports of the same model, each behind the backend that runs it, if it is another one.
    """

    options: tuple[str, ...]
    targets: tuple[Target, ...] = ()
    variant: str = "float32"
    beside: tuple[str, ...] = ()


ROWS = {
    "decode": Row(
        ("-p", "0", "-n", "64", "--backend", f"{_MODELS},roofline"),
        (
            Target("decode: eager", ("eager",), 2.5),
            Target(
                "decode: best of compile, TorchScript, AOTInductor", ("compile", "torchscript", "aoti"), 1.5
            ),
            Target("decode: OpenVINO", _OPENVINO, 1.1),
            Target("decode: one sweep over weights and state", ("roofline",), 0.85),
        ),
        beside=("openvino:unrolled",),
    ),
    "prefill": Row(
        ("-p", "2048", "-n", "0", "--backend", f"{_MODELS},roofline"),
        (
            Target("prefill: eager, tiles", ("eager",), 2.5),
            Target(
                "prefill: best of compile, AOTInductor, OpenVINO",
                ("compile", "aoti", *_OPENVINO),
                1.1,
            ),
        ),
        beside=("openvino:unrolled",),
    ),
    "prefill-loop": Row(
        ("-p", "2048", "-n", "0", "--backend", "eager-loop"),
        (Target("prefill: eager, token loop", ("eager-loop",), 15),),
    ),
    "batch": Row(
        ("-p", "0", "-n", "8", "-b", "16", "-e", "0", "--backend", "singles"),
        (Target("16 sessions one by one / in a batch", ("singles",), 4),),
    ),
    "open-readout": Row(
        ("-p", "513", "-n", "0", "-e", "0", "--editor", "readout:step=0.5,chunk=64", "--backend", "autograd"),
        (Target("open editor, readout: PyTorch autograd", ("autograd",), 2),),
    ),
    "int8": Row(
        ("-p", "512", "-n", "64", "--tolerance", "0.3"),
        (Target("decode, weights in int8: float32", ("float32",), 2, ("decode",)),),
        "int8",
        ("float32",),
    ),
    "int4": Row(("-p", "512", "-n", "64", "-e", "0", "--tolerance", "0.6"), (), "int4", ("float32",)),
    "scan": Row(("-p", "512", "-n", "64"), (), beside=("scan",)),
    "native": Row(("-p", "512", "-n", "64", "-e", "0"), (), beside=("native",)),
    "editing": Row(("-p", "512", "-n", "64", "-e", "0,1")),
    "eager": Row(
        ("-p", "512", "-n", "64", "-e", "0,1", "--backend", "eager"),
        (
            Target("decode: eager alone", ("eager",), 2.5, ("decode",)),
            Target("prefill of 512: eager alone, tiles", ("eager",), 2.5, ("prefill",)),
        ),
    ),
}
"""By name. ``summary`` compares the strengths of ``editing``; ``native`` is for models without momentum."""

LIBRARY = {
    "memory": {
        ("prefill", "titans-pytorch"): Target(
            "NeuralMemory, prefill: titans-pytorch", ("titans-pytorch",), 3
        ),
        ("decode", "titans-pytorch"): Target(
            "NeuralMemory, one token: titans-pytorch", ("titans-pytorch",), 8
        ),
    },
    "mac": {
        ("prefill", "titans-pytorch"): Target(
            "MAC transformer, prefill: titans-pytorch", ("titans-pytorch",), 3
        ),
        ("decode", "titans-pytorch, cache"): Target(
            "MAC transformer, decode: titans-pytorch with its cache", ("titans-pytorch, cache",), 6
        ),
        ("decode", "titans-pytorch, sample's default"): Target(
            "MAC transformer, decode: titans-pytorch's default", ("titans-pytorch, sample's default",), 50
        ),
    },
}
"""What ``titans_pytorch`` must reach, by kind of model, of run, and backend."""
