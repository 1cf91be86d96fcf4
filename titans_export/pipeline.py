"""Checkpoint to bundle: the main job, read top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch

from titans_converters.aot_inductor import check_compiler, write_aot_inductor
from titans_converters.gradients import gradient_graphs
from titans_converters.onnx.files import write_models
from titans_converters.onnx.lowering import lower
from titans_converters.onnx.quantize import BITS, FLOAT_PRODUCTS, QuantisedRows
from titans_converters.onnx.trace import trace
from titans_converters.onnx.unroll import unroll
from titans_converters.program import Program
from titans_converters.torchscript import write_torchscript
from titans_converters.twins import GradientTwin, gradient_twin
from titans_export import contents
from titans_export.editing import check_editing, read_editing
from titans_export.exportable import Exportable, load_exportable
from titans_export.goldens import Watch
from titans_export.training.checkpoint import round_to_half
from titans_runtime import bundle as bundles
from titans_runtime.backends import Arrays
from titans_runtime.errors import BundleError, UsageError
from titans_runtime.files import folder_beside, replace_folder, write_atomically
from titans_runtime.manifest import MAX_TOKENS, ONNX, LengthSpec
from titans_runtime.tensors import tensor_bytes
from titans_runtime.verify import VerificationReport, verify

_TOLERANCE = 1e-4
# Products of integers round activations to 8 bits, which the goldens of rounded weights do not; a model with
# another strength of editing than it was trained with lets that grow: `nano` to a fifth of its state.
_INTEGER_TOLERANCE = 0.25  # at least
TOKENS = 64
"""Of a call of an unrolled graph, where nothing else is asked for."""

_WRITERS = {"torchscript": write_torchscript, "aoti": write_aot_inductor}
Report = Callable[[str], None]
Progress = Callable[[], AbstractContextManager[Watch]]


def export_bundle(
    checkpoint: Path,
    bundle: Path,
    report: Report = lambda _: None,
    weights: str = "float32",
    formats: Sequence[str] = (),
    scan: str = "plugin",
    tokens: Sequence[int] = (TOKENS,),
    progress: Progress = lambda: nullcontext(lambda _: None),
) -> VerificationReport:
    """Export a checkpoint and verify the result against the PyTorch model's token loop.

    The bundle is built beside ``bundle`` and put in its place, in one step, once it has been verified.

    Args:
        checkpoint: folder with ``config.json`` and ``weights.safetensors``.
        bundle: folder to write. An intact older bundle there is replaced; anything else is refused.
        report: receives one line per step.
        weights: how matrices are stored. ``float32``; ``float16``, half of the size, all products in
            float32; ``int8`` or ``int4``, products of integers. The memory is float32 in all.
        scan: what stands for the memory, one of :data:`titans_converters.onnx.lowering.SCANS`.
        formats: in which to write every graph beside ONNX: ``torchscript``, ``aoti``.
        tokens: of the calls for which an ``unrolled`` bundle has graphs; it always has one for 1.
        progress: draws a bar of the reference's tokens: its context gives what moves the bar on.

    Returns:
        The checks of all formats, ONNX first.

    Raises:
        DataError: the checkpoint is damaged, or recommends an editor that does not fit the model.
        UsageError: ``bundle`` holds anything but an intact bundle, the vocabulary is not one of bytes, or
            the model's memory has no form ``scan``.
        CheckFailed: the exported graphs do not reproduce the model; nothing is written.
        EnvironmentProblem: the disk is full or cannot be written, or AOTInductor finds no C++ compiler; an
            older bundle is as it was.
    """
    _refuse_foreign_folder(bundle)
    model, editing = load_exportable(checkpoint), read_editing(checkpoint)
    lengths = _lengths(scan, weights, tokens)
    if "aoti" in formats:
        check_compiler()
    quantised = _round(model, weights)
    programs, recurrences = model.programs(scan, quantised is not None), model.recurrences()
    with folder_beside(bundle) as work:
        report("tracing the model and its gradient")
        traced = {program.name: trace(program, recurrences) for program in programs}
        gradients = gradient_graphs(
            _differentiable(model, traced["model"], scan, weights), editable_memories(model), report
        )
        graphs = _lowered(traced, scan, lengths, report) | gradients
        files = [*write_models(graphs, work, weights, quantised), *_write_learned_state(model, work)]
        twins: contents.Twins = {}
        wanted: list[Program | GradientTwin] = [
            *programs,
            *(gradient_twin(programs[0], name, graph) for name, graph in gradients.items()),
        ]
        for name in formats:
            report(f"writing {name}")
            twins[name] = _WRITERS[name](wanted, recurrences, work)
            files += twins[name].values()
        report("running the reference for the goldens")
        with progress() as watch:
            goldens = _of_graphs(model.goldens(watch), graphs)
        write_atomically(work / bundles.GOLDENS_NAME, tensor_bytes(goldens))
        files.append(bundles.GOLDENS_NAME)
        specs = {program.name: contents.graph(program, twins) for program in programs}
        specs |= {name: contents.gradient_graph(name, graph, twins) for name, graph in gradients.items()}
        specs["model"] = replace(specs["model"], lengths=lengths)
        manifest = partial(contents.manifest, model, specs, work, files, editing, weights, scan)
        check_editing(checkpoint, editing, manifest(_TOLERANCE))
        if quantised is not None:
            report("replaying the goldens with activations in float32")
            write_models(graphs, work, weights, quantised, FLOAT_PRODUCTS)
            _replay(work, manifest(_TOLERANCE))
            write_models(graphs, work, weights, quantised)
        report("replaying the goldens in ONNX Runtime")
        tolerance = _TOLERANCE if quantised is None else _moved_by_integers(work, manifest, report)
        result = _replay(work, manifest(tolerance))
        for name in formats:
            report(f"replaying the goldens in {name}")
            twin = verify(work, backend=name)
            twin.raise_if_failed()
            result = VerificationReport(result.checks + twin.checks, result.placements)
        replace_folder(bundle, work)
    return result


def _of_graphs(goldens: Arrays, graphs: Container[str]) -> Arrays:
    """Goldens without those of gradients that the bundle lacks, since an operator has no derivative."""
    return {
        name: array
        for name, array in goldens.items()
        if ".gradient." not in name or ".".join(name.split(".")[1:3]) in graphs
    }


def _replay(folder: Path, manifest: bundles.Manifest) -> VerificationReport:
    """Complete the bundle by its manifest, and refuse it if it does not reproduce its goldens."""
    bundles.write_manifest(folder, manifest)
    result = verify(folder)
    result.raise_if_failed()
    return result


def _lengths(scan: str, weights: str, tokens: Sequence[int]) -> tuple[LengthSpec, ...]:
    """The files of an unrolled model; the longest calls have the one that every bundle has."""
    if scan != "unrolled":
        return ()
    if weights in BITS:
        raise UsageError(
            f"--quantize {weights}: its products are an operator of ONNX Runtime's own, and an unrolled "
            "graph has standard ones only; use --weights float16, or another --scan"
        )
    for count in tokens:
        if not 1 <= count <= MAX_TOKENS:
            raise UsageError(f"--tokens {count}: must be 1 to {MAX_TOKENS}")
    most = max(tokens)
    return tuple(
        LengthSpec(count, ONNX, "model.onnx" if count == most else f"model.{count}.onnx")
        for count in sorted({1, *tokens})
    )


def _lowered(
    traced: Mapping[str, ir.Model], scan: str, lengths: Sequence[LengthSpec], report: Report
) -> dict[str, ir.Model]:
    """The graphs in the form ``scan``, by the names of their files."""
    graphs = {name: lower(graph, scan) for name, graph in traced.items()}
    for one in lengths:
        report(f"unrolling the model for {one.tokens} token{'s' * (one.tokens > 1)}")
        graphs[one.file.removesuffix(".onnx")] = unroll(traced["model"], one.tokens)
    return graphs


def _moved_by_integers(folder: Path, manifest: Callable[[float], bundles.Manifest], report: Report) -> float:
    """The tolerance of a bundle whose products are of integers: how far they move its goldens, and half more.

    That depends on the model, and is no question of right or wrong: the goldens have been replayed with
    activations in float32. Integers that move an output by more than its own size are refused all the same.
    """
    bundles.write_manifest(folder, manifest(1.0))
    moved = max(check.error / check.limit for check in verify(folder).checks if check.limit)
    report(f"integers move the goldens by up to {moved:.1%} of their size")
    return min(1.0, max(_INTEGER_TOLERANCE, 1.5 * moved))


def _differentiable(model: Exportable, traced: ir.Model, scan: str, weights: str) -> ir.Model:
    """The graph that gradients are taken of: ONNX Runtime's own operator has none."""
    if scan != "native":
        return traced
    return trace(model.programs(quantised=weights in BITS)[0], model.recurrences())


def _round(model: Exportable, weights: str) -> QuantisedRows | None:
    """Round matrices to what ``weights`` can hold; the codes, where those are integers."""
    if weights == "float16":
        round_to_half(model.module)
    if weights not in BITS:
        return None
    if not model.matrices():
        raise UsageError(
            f"--quantize {weights}: this model's products all stand within its recurrence, which stays "
            "float32; use --weights float16"
        )
    quantised = QuantisedRows(weights)
    with torch.no_grad():
        for matrix in model.matrices():
            matrix.copy_(torch.from_numpy(quantised.round(matrix.numpy())))
    return quantised


def _write_learned_state(model: Exportable, folder: Path) -> list[str]:
    """The memories that a stream begins with, where they are not zero."""
    learned = {name: tensor.detach().numpy() for name, tensor in model.learned_state().items()}
    if not learned:
        return []
    write_atomically(folder / bundles.INITIAL_NAME, tensor_bytes(learned))
    return [bundles.INITIAL_NAME]


def editable_memories(model: Exportable) -> list[str]:
    """State entries that gradients are taken by; the readout memory has a graph of its own."""
    return [name for name, entry in model.state().items() if entry.role == "memory" and name != "readout"]


def _refuse_foreign_folder(bundle: Path) -> None:
    """Only an empty folder or a bundle with nothing beside it may be replaced."""
    if bundle.is_file():
        raise UsageError(f"--out {bundle}: is a file; give a folder that does not exist yet")
    if bundle.resolve() == Path.cwd():
        raise UsageError(f"--out {bundle}: is the current folder; give a folder below it")
    if not bundle.is_dir() or not any(bundle.iterdir()):
        return
    if not (bundle / bundles.MANIFEST_NAME).exists():
        raise UsageError(f"--out {bundle}: holds files that are no bundle; give an empty or new folder")
    try:
        bundles.open_bundle(bundle)
    except BundleError as error:
        raise UsageError(
            f"--out {bundle}: is no intact bundle to replace ({error}); remove it first"
        ) from None
