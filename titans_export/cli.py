"""The commands that need PyTorch: train, init, import, export, demo. ``titans`` finds them by entry point."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_export.config import BYTES, PRESETS, ModelConfig, overridden
from titans_runtime.backends.choose import check_threads
from titans_runtime.errors import UsageError
from titans_runtime.manifest import FORMATS as TWINS

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Any]

_MOST = 10**9  # steps, or bytes of a step
_MOST_SEED = 2**63 - 1
FORMATS = ("onnx", *TWINS, "tensorrt")

# torch is imported by the handlers, not here: `titans --help` must answer at once.


def register(subparsers: Subparsers) -> None:
    """Add this package's commands to the ``titans`` command line."""
    _add_train(subparsers)
    _add_init(subparsers)
    _add_import(subparsers)
    _add_export(subparsers)
    _add_engine(subparsers)
    _add_demo(subparsers)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="CHECKPOINT")
    parser.add_argument("--force", action="store_true", help="replace the checkpoint that --out holds")


def _add_train(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("train", help="train a model on text; resumes where it was killed")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files or folders; 'stdlib' is the standard library's sources",
    )
    _add_checkpoint(parser)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="nano")
    _add_overrides(parser)
    parser.add_argument(
        "--edit", type=float, default=0.0, help="edit strength while training, 0..1 (default 0)"
    )
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--segment", type=int, default=512, help="bytes per row and step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--save-every", type=int, default=100, help="steps between resumable states")
    parser.add_argument("--validate-every", type=int, default=500)
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs a C++ compiler)")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 products")
    parser.set_defaults(handler=_train)


def _train(args: argparse.Namespace) -> int:
    for name in ("steps", "batch", "segment", "save_every", "validate_every"):
        _check_number(args, name, 1, _MOST)
    _check_number(args, "seed", 0, _MOST_SEED)
    check_threads(args.threads)
    if not 0 < args.learning_rate < math.inf:
        raise UsageError(f"--learning-rate {args.learning_rate}: must be a positive number")
    if not 0 <= args.edit <= 1:
        raise UsageError(f"--edit {args.edit}: must lie between 0 and 1")
    model = _config(args)
    import torch

    from titans_export.training.checkpoint import refuse_replacing
    from titans_export.training.data import load_corpus
    from titans_export.training.loop import TrainingConfig, train
    from titans_runtime.progress import progress_bar

    refuse_replacing(args.out, args.force, resumes=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    config = TrainingConfig(
        edit=args.edit,
        steps=args.steps,
        batch=args.batch,
        segment=args.segment,
        learning_rate=args.learning_rate,
        seed=args.seed,
        save_every=args.save_every,
        validate_every=args.validate_every,
        mixed_precision=not args.float32,
        compiled=args.compile,
    )
    train(
        model,
        config,
        load_corpus(args.data),
        args.out,
        command=shlex.join(["titans", *sys.argv[1:]]),
        progress=lambda steps: progress_bar(steps, description="training", unit="step"),
        report=_note,
    )
    print(args.out)
    return 0


def _check_number(args: argparse.Namespace, name: str, least: int, most: int) -> None:
    value, option = getattr(args, name), name.replace("_", "-")
    if not least <= value <= most:
        what = f"{least} or more" if value < least else f"{most} or less"
        raise UsageError(f"--{option} {value}: must be {what}")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="change fields of the preset's config, as in: --set momentum=false period=16",
    )


def _config(args: argparse.Namespace) -> ModelConfig:
    """The config that ``--preset`` and ``--set`` ask for, of a model that reads text."""
    config = overridden(PRESETS[args.preset], args.set)
    if config.vocab_size != BYTES:
        raise UsageError(
            f"--set vocab_size={config.vocab_size}: text is bytes, so it must be {BYTES}; leave it out"
        )
    return config


def _add_init(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("init", help="write a checkpoint with random weights, for latency work")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="base")
    _add_overrides(parser)
    parser.add_argument("--seed", type=int, default=0)
    _add_checkpoint(parser)
    parser.set_defaults(handler=_init)


def _init(args: argparse.Namespace) -> int:
    _check_number(args, "seed", 0, _MOST_SEED)
    config = _config(args)
    import torch

    from titans_export.model import TitansModel
    from titans_export.training.checkpoint import PROGRESS_FILE, forget, refuse_replacing, save_checkpoint

    refuse_replacing(args.out, args.force)
    torch.manual_seed(args.seed)
    model = TitansModel(config)
    forget(args.out, PROGRESS_FILE)
    save_checkpoint(model, args.out)
    print(args.out)
    return 0


def _add_import(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("import", help="turn another library's checkpoint into one of ours")
    parser.add_argument("library", choices=("titans-pytorch",))
    parser.add_argument("file", type=Path, metavar="FILE", help="a state dict: torch.save or safetensors")
    _add_checkpoint(parser)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="JSON",
        help="the arguments that the model was built with (default: FILE with the ending .json)",
    )
    parser.add_argument(
        "--tokenizer", choices=("ids", "bytes"), help="what a token id stands for (default: ids)"
    )
    parser.add_argument(
        "--entry",
        metavar="NAME",
        help="what holds the state dict, in a file of several things: an entry, one within another after "
        "a dot, or what stands before the keys",
    )
    parser.set_defaults(handler=_import)


def _import(args: argparse.Namespace) -> int:
    from titans_export.importers.titans_pytorch.checkpoint import import_checkpoint

    found = import_checkpoint(args.file, args.out, args.config, args.tokenizer, args.entry, args.force)
    _note(f"{found.kind}: {found.tensors} tensors, all accounted for; {found.parameters:,} parameters")
    for note in found.notes:
        _note(f"note: {note}")
    print(args.out)
    return 0


def _add_export(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("export", help="turn a checkpoint into a verified bundle")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument(
        "--weights",
        choices=("float32", "float16"),
        default="float32",
        help="dtype in which matrices are stored; products and the memory are float32 either way",
    )
    parser.add_argument(
        "--format",
        default="onnx",
        metavar="NAMES",
        help="onnx, which every bundle holds (default); onnx,torchscript writes every graph as TorchScript, "
        "too; onnx,aoti compiles every graph by AOTInductor for this kind of processor; onnx,tensorrt builds "
        "an engine for this GPU as well",
    )
    parser.add_argument(
        "--triton-repository",
        type=Path,
        default=None,
        metavar="DIR",
        help="also write the model into a model repository of the Triton Inference Server",
    )
    parser.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="store matrices as integers, and multiply as such; never the memory, gates or norms",
    )
    parser.add_argument(
        "--scan",
        choices=("plugin", "scan", "unrolled", "native"),
        default="plugin",
        help="the memory as an operator with a function as its body; as that body, without functions; "
        "unrolled for given numbers of tokens, without control flow; or as onnxruntime's LinearAttention, "
        "for a matrix without momentum",
    )
    parser.add_argument(
        "--tokens",
        metavar="N,…",
        help="of the calls that --scan unrolled has graphs for, beside 1 (default 64); other input is cut",
    )
    parser.set_defaults(handler=_export)


def _export(args: argparse.Namespace) -> int:
    formats, weights = _formats(args.format), args.quantize or args.weights
    if args.quantize and args.weights != "float32":
        raise UsageError(f"--quantize {args.quantize}: replaces --weights {args.weights}; give one of them")
    others = [name for name in formats if name != "onnx"]
    if others and (args.quantize or args.scan == "native"):
        raise UsageError(
            f"--format {others[0]}: has no operators of ONNX Runtime; drop --quantize and --scan native"
        )
    if args.scan == "unrolled" and ("tensorrt" in formats or args.triton_repository):
        what = "--format tensorrt" if "tensorrt" in formats else "--triton-repository"
        raise UsageError(f"{what}: needs one graph for any number of tokens; drop --scan unrolled")
    tokens = _tokens(args.tokens, args.scan)
    from titans_export.pipeline import TOKENS, export_bundle
    from titans_runtime.progress import progress_counter

    if "tensorrt" in formats:  # what is missing is said before minutes of work
        from titans_converters.tensorrt.builder import require_tensorrt

        require_tensorrt()
    twins = [name for name in TWINS if name in formats]
    result = export_bundle(
        args.checkpoint,
        args.out,
        report=_note,
        weights=weights,
        formats=twins,
        scan=args.scan,
        tokens=tokens or (TOKENS,),
        progress=lambda: progress_counter(None, "reference", " tokens"),
    )
    print("\n".join(result.lines()))
    print(args.out)
    if args.triton_repository is not None:
        from titans_converters.inference_server import write_repository
        from titans_runtime.bundle import open_bundle

        print(write_repository(open_bundle(args.out), args.triton_repository))
    if "tensorrt" in formats:
        from titans_converters.tensorrt.builder import build_engine
        from titans_runtime.bundle import open_bundle

        print(build_engine(open_bundle(args.out), report=_note).path)
    return 0


def _formats(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in FORMATS:
            raise UsageError(f"--format {name}: unknown; there are {', '.join(FORMATS)}")
    return names


def _tokens(text: str | None, scan: str) -> list[int]:
    if text is None:
        return []
    if scan != "unrolled":
        raise UsageError(f"--tokens {text}: the form {scan} takes any number; give it with --scan unrolled")
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--tokens {text}: expected whole numbers separated by commas") from None


def _add_engine(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "engine", help="build a bundle's TensorRT engine for this GPU, or say what TensorRT would make of it"
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--check",
        action="store_true",
        help="build nothing: say node by node what TensorRT takes; needs neither TensorRT nor a GPU",
    )
    parser.add_argument(
        "--max-batch", type=int, default=8, metavar="N", help="streams in one call (default 8)"
    )
    parser.add_argument(
        "--tf32", action="store_true", help="round products to TF32: faster, and about 1e-3 off the goldens"
    )
    parser.add_argument("--rebuild", action="store_true", help="build even where the cache has it")
    parser.set_defaults(handler=_engine)


def _engine(args: argparse.Namespace) -> int:
    from titans_converters.tensorrt.builder import build_engine, load_model
    from titans_converters.tensorrt.check import check
    from titans_runtime.bundle import open_bundle

    bundle = open_bundle(args.bundle)
    if args.check:
        report = check(load_model(bundle, weights=False))
        print("\n".join(report.lines()))
        return 0 if report.passed else 1
    engine = build_engine(bundle, args.max_batch, args.tf32, args.rebuild, _note)
    _note(f"{engine.plugins} memory layers as plugins, {engine.bodies} through their function bodies")
    print(engine.path)
    return 0


def _add_demo(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "demo", help="export the shipped model and watch it learn, in a process without PyTorch"
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/nano"))
    parser.add_argument("--log", type=Path, default=Path("benchmarks/data/dpkg.log"), metavar="FILE")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="FOLDER")
    parser.set_defaults(handler=_demo)


def _demo(args: argparse.Namespace) -> int:
    from titans_export.demo import run_demo

    run_demo(args.checkpoint, args.log, args.out)
    return 0


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
