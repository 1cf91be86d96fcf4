"""The command ``titans``: parsing, errors and exit codes. ``commands.py`` does the work.

Exit codes: 0 done, 1 a check failed, 2 usage, 3 bad bundle, state or data, 4 environment or provider.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from titans_runtime.errors import EnvironmentProblem, TitansError, UsageError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Any]

_EXPORT_COMMANDS = {
    "train": "train a model",
    "init": "write a checkpoint with random weights",
    "import": "turn another library's checkpoint into one of ours",
    "export": "turn a checkpoint into a bundle",
    "engine": "build a TensorRT engine of a bundle",
    "demo": "watch the shipped model learn",
}
_INTERRUPTED = 130
_NO_MEMORY = "can't allocate memory"
"""What PyTorch's allocator raises a ``RuntimeError`` with."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. A user's mistake is one or two lines on stderr."""
    _print_any_text()
    try:
        parser = _parser()
        args = parser.parse_args(arguments)
        if not hasattr(args, "handler"):
            parser.print_help()
            return 0
        code: int = args.handler(args)
        sys.stdout.flush()
    except TitansError as error:
        print(f"titans: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("titans: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, which is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _NO_MEMORY not in str(error):
            raise
        print("titans: out of memory; free some, or use a smaller model or file", file=sys.stderr)
        return EnvironmentProblem.exit_code
    except OSError as error:  # no permission, a name too long, a disk that is full
        print(f"titans: {error.filename or 'input or output'}: {error.strerror}", file=sys.stderr)
        return EnvironmentProblem.exit_code
    return code


def _print_any_text() -> None:
    """Let a terminal that cannot show a character show a question mark, in place of a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class _Parser(argparse.ArgumentParser):
    """Argument errors in the project's form."""

    def error(self, message: str) -> NoReturn:
        print(f"titans: {message}\ntitans: see '{self.prog} --help'", file=sys.stderr)
        raise SystemExit(UsageError.exit_code)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="titans", description="Run, edit and inspect exported models that learn at test time."
    )
    parser.add_argument("--version", action="version", version=f"titans {version('titans-runtime')}")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    _add_verify(commands)
    _add_inspect(commands)
    _add_run(commands)
    _add_generate(commands)
    _add_bench(commands)
    _add_serve(commands)
    registered = list(entry_points(group="titans_runtime.commands"))
    for point in registered:
        point.load()(commands)
    if not registered:
        _add_missing(commands)
    return parser


def _add_verify(commands: Subparsers) -> None:
    parser = commands.add_parser("verify", help="replay a bundle's goldens on this machine")
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--atol", action="append", default=[], metavar="[OUTPUT:]VALUE", help="absolute tolerance"
    )
    parser.add_argument("--rtol", type=float, default=None, help="relative to the largest expected value")
    parser.add_argument("--json", action="store_true")
    _add_machine(parser)
    parser.set_defaults(handler=_lazily("verify"))


def _add_inspect(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "inspect", help="describe a bundle or a memory file, or compare two memories; loads no weights"
    )
    parser.add_argument("path", type=Path, metavar="BUNDLE|MEMORY")
    parser.add_argument("other", type=Path, nargs="?", default=None, metavar="MEMORY", help="to compare with")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(handler=_lazily("inspect"))


def _add_run(commands: Subparsers) -> None:
    parser = commands.add_parser("run", help="score a file in bits per byte, learning as it streams")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("file", metavar="FILE", help="any file; - is standard input")
    _add_editing(parser)
    _add_machine(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--report", type=Path, default=None, metavar="PAGE.html", help="write what editing did as a page"
    )
    parser.add_argument(
        "--log", type=Path, default=None, metavar="FILE", help="write every lesson as a line of JSON"
    )
    parser.set_defaults(handler=_lazily("run"))


def _add_generate(commands: Subparsers) -> None:
    parser = commands.add_parser("generate", help="continue a text")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", default="", metavar="TEXT")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=0, metavar="K")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--learn", action="store_true", help="learn from the generated text, too")
    _add_editing(parser)
    _add_machine(parser)
    parser.set_defaults(handler=_lazily("generate"))


def _add_bench(commands: Subparsers) -> None:
    from titans_runtime.bench.options import add_options

    parser = commands.add_parser("bench", help="time backends side by side on the same weights and tokens")
    add_options(parser)
    parser.set_defaults(handler=_lazily("bench"))


def _add_serve(commands: Subparsers) -> None:
    from titans_runtime.serving.command import add_options

    parser = commands.add_parser(
        "serve", help="serve completions and memories over HTTP, with a page to watch"
    )
    add_options(parser)
    parser.set_defaults(handler=_lazily("serve"))


def _add_editing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prepare",
        default=None,
        metavar="FILE",
        help="learn from a file before the first output, as the editor does; - is standard input",
    )
    parser.add_argument(
        "--passes", type=int, default=None, metavar="N", help="over the file of --prepare; default: 1"
    )
    parser.add_argument(
        "--no-edit", action="store_true", help="no editing at all; default: as the manifest recommends"
    )
    parser.add_argument("--edit", type=float, default=None, metavar="0..1", help="strength of the fused rule")
    parser.add_argument(
        "--editor", default=None, metavar="SPEC", help="for example readout:step=1,chunk=4; or none"
    )
    parser.add_argument(
        "--state-in", type=Path, default=None, metavar="MEMORY", help="continue from a memory file"
    )
    parser.add_argument(
        "--state-out", type=Path, default=None, metavar="MEMORY", help="save the memory when done"
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        default="onnxruntime",
        metavar="NAME",
        help="onnxruntime; torchscript or aoti, of a bundle exported in that format; "
        "tensorrt: see 'titans engine'",
    )
    parser.add_argument("--threads", type=int, default=None, metavar="N")
    parser.add_argument(
        "--provider",
        action="append",
        default=None,
        metavar="NAME",
        help="ONNX Runtime execution provider; may be given several times",
    )


def _add_missing(commands: Subparsers) -> None:
    """Without titans-export its commands are still known, and say what brings them."""
    for name, purpose in _EXPORT_COMMANDS.items():
        parser = commands.add_parser(name, help=f"{purpose} (needs titans-export)", add_help=False)
        parser.add_argument("rest", nargs=argparse.REMAINDER)
        parser.set_defaults(handler=_missing, command=name)
        parser.prefix_chars = "\0"  # every argument is part of the rest


def _missing(args: argparse.Namespace) -> int:
    raise UsageError(f"'titans {args.command}' comes with titans-export; pip install titans-export")


class _lazily:  # noqa: N801 - reads as what it does
    """A handler that imports the working code only when it is called: ``--help`` stays quick."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, args: argparse.Namespace) -> int:
        from titans_runtime import commands

        code: int = getattr(commands, self._name)(args)
        return code


if __name__ == "__main__":
    raise SystemExit(main())
