"""A model's recurrences as programs: what stands between the loops of an exported graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from titans_converters import memory_op
from titans_converters.onnx.trace import loop_node
from titans_converters.program import Axes, LoopProgram, Program, RecurrenceProgram
from titans_export.config import ModelConfig
from titans_export.loops import LoopCore
from titans_export.memory import token_loop
from titans_export.memory.parts import TILE_PARTS, cut_from_start, tile_parts, tile_step
from titans_export.memory.segment import SegmentMemory
from titans_export.memory.tiles import TokenInputs
from titans_export.memory_layer import Rules
from titans_export.model import TitansModel
from titans_export.recurrence import (
    Core,
    Tensors,
    TileCore,
    TogetherCore,
    align,
    from_tiles,
    into_tiles,
    run_core,
)

# Example sizes for tracing: unlike each other and unlike any fixed size of a sensible model.
_BATCH, _TOKENS, _TILES = 11, 37, 13

REVEALED = "revealed"
"""Output of a recurrence that derives the memory's inputs within itself, for gradient graphs."""


def recurrence_programs(model: TitansModel) -> list[RecurrenceProgram]:
    """One for each kind of recurrence in the model; all its layers share it."""
    found: dict[str, tuple[Core, Tensors, Tensors, Tensors]] = {}

    def watch(
        core: Core, position: Tensor, tokens: Tensors, carry: Tensors, shared: Tensors
    ) -> tuple[Tensor, Tensors]:
        found[core.name] = (core, tokens, carry, shared)
        return run_core(core, position, tokens, carry, shared)

    copy = TitansModel(model.config, Rules(recurrence=watch)).eval()
    with torch.no_grad():
        copy.features(
            torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, model.config.layers), copy.initial_state(1)
        )
    exact = model.config.memory_form.exact and model.config.architecture != "mac"
    return [recurrence_program(*one) for one in found.values()] + [exact_program(model.config)] * exact


def recurrence_program(
    core: Core, tokens: Tensors, carry: Tensors, shared: Tensors, width: int | None = None
) -> RecurrenceProgram:
    """A recurrence, from examples of what :func:`titans_export.recurrence.run_core` is given.

    ``width``: of its output; default is that of the first of ``tokens``.
    """
    return _Parts(core, tokens, carry, shared, width).program()


def loop_program(core: LoopCore, tiles: Tensors, carry: Tensors, shared: Tensors) -> LoopProgram:
    """A loop, from examples of what :func:`titans_export.loops.run_loop` is given."""
    edit, *weights = shared
    batch: Axes = ("batch",)
    in_tiles: dict[str, Axes] = {f"tile_{i}": (*batch, *x.shape[2:]) for i, x in enumerate(tiles)}
    past: dict[str, Axes] = {f"past_{i}": (*batch, *x.shape[1:]) for i, x in enumerate(carry)}
    axes = in_tiles | past | {"edit": (*batch, *edit.shape[1:])}
    axes |= {f"weight_{i}": tuple(x.shape) for i, x in enumerate(weights)}
    outputs: dict[str, Axes] = {f"present_{i}": shape for i, shape in enumerate(past.values())}
    outputs |= {f"result_{i}": (*batch, *sizes) for i, sizes in enumerate(core.results)}
    examples = zip(axes, (*tiles, *carry, *shared), strict=True)
    inputs = {name: torch.zeros(_sizes(axes[name]), dtype=x.dtype) for name, x in examples}
    dtypes = {f"present_{i}": x.dtype for i, x in enumerate(carry)}

    def step(*given: Tensor) -> Tensors:
        tile, rest = given[: len(tiles)], given[len(tiles) :]
        present, results = core.step(tile, rest[: len(carry)], rest[len(carry) :])
        return *present, *results

    program = Program(f"{core.name}.step", _Function(step), inputs, axes, outputs, dtypes)
    return LoopProgram(core.name, tuple(in_tiles), tuple(past), program)


def exact_program(config: ModelConfig) -> RecurrenceProgram:
    """The operator ``titans::NeuralMemory`` in parts, for targets whose loops are not ONNX's."""
    heads, dim, tile = config.heads, config.head_dim, config.tile
    wide: Axes = ("batch", heads, "tokens", dim)
    gate: Axes = ("batch", heads, "tokens")
    matrix: Axes = ("batch", heads, dim, dim)
    tokens = dict(zip(memory_op.INPUTS[:6], (wide,) * 3 + (gate,) * 3, strict=True))
    carry = dict.fromkeys(memory_op.INPUTS[7:], matrix)
    present = dict.fromkeys(memory_op.OUTPUTS[1:], matrix)
    output, *_ = memory_op.OUTPUTS
    shapes = {"row": (tile, dim), "square": (tile, tile), "column": (dim, tile), "scalar": (1, 1)}
    parts: dict[str, Axes] = {name: ("batch", heads, *shapes[kind]) for name, kind in TILE_PARTS.items()}
    in_tiles: dict[str, Axes] = {f"tiles.{output}": ("tiles", *_with(wide, tokens=tile)), "query": wide}

    def one(*inputs: Tensor) -> Tensors:
        return token_loop(*inputs)

    def tiles(*inputs: Tensor) -> Tensors:
        return tile_parts(*inputs[:7], tile=tile)

    def rows(tiles: Tensor, query: Tensor) -> Tensors:
        return (from_tiles(tiles, cut_from_start(query, tile)),)

    def part(
        name: str, function: Callable[..., Tensors], axes: dict[str, Axes], outputs: dict[str, Axes]
    ) -> Program:
        inputs = {key: torch.zeros(_sizes(shape)) for key, shape in axes.items()}
        name = f"{memory_op.NAME}.{name}"
        return Program(name, _Function(function), inputs, axes, outputs, {"live": torch.bool})

    single = {key: _with(axes, tokens=1) for key, axes in tokens.items()}
    edit: dict[str, Axes] = {"edit": ("batch",)}
    return RecurrenceProgram(
        name=memory_op.NAME,
        tile=tile,
        tokens=tuple(tokens),
        carry=tuple(carry),
        output=output,
        apart=(),
        one=part("one", one, single | edit | carry, {output: _with(wide, tokens=1)} | present),
        tiles=part(
            "tiles",
            tiles,
            tokens | edit,
            {key: ("tiles", *axes) for key, axes in parts.items()} | {"live": ("tiles", "batch", tile)},
        ),
        step=part("step", tile_step, parts | carry, {output: _with(wide, tokens=tile)} | present),
        rows=part("rows", rows, in_tiles, {output: wide}),
    )


class _Parts:
    """The programs of one recurrence, from examples of what it is given."""

    def __init__(
        self, core: Core, tokens: Tensors, carry: Tensors, shared: Tensors, width: int | None
    ) -> None:
        self.core = core
        self.tokens = {
            f"token_{i}": ("batch", x.shape[1], "tokens", *x.shape[3:]) for i, x in enumerate(tokens)
        }
        self.carry = {f"past_{i}": ("batch", *x.shape[1:]) for i, x in enumerate(carry)}
        edit, *weights = shared
        self.shared: dict[str, Axes] = {"edit": ("batch", *edit.shape[1:])}
        self.shared |= {f"weight_{i}": tuple(x.shape) for i, x in enumerate(weights)}
        self.present = {f"present_{i}": axes for i, axes in enumerate(self.carry.values())}
        *lead, last = self.tokens["token_0"]
        self.output: Axes = (*lead, last if width is None else width)
        self.dtypes = {"position": torch.int64, "live": torch.bool}
        for side in ("past", "present"):
            self.dtypes |= {f"{side}_{i}": x.dtype for i, x in enumerate(carry)}
        self.outputs: dict[str, Axes] = {"output": self.output}
        if isinstance(core, SegmentMemory):  # the others are given key, value and gates from outside
            batch, heads, count, dim = self.output
            gates = 3 if core.form.momentum else 2
            self.outputs |= {REVEALED: (batch, heads, count, 2 * int(dim) + gates)}

    def program(self) -> RecurrenceProgram:
        return RecurrenceProgram(
            name=self.core.name,
            tile=self.core.tile,
            tokens=tuple(self.tokens),
            carry=tuple(self.carry),
            output="output",
            apart=self.core.apart,
            one=self._one(),
            tiles=self._tiles(),
            step=self._together(self.core) if isinstance(self.core, TogetherCore) else self._step(self.core),
            rows=self._rows(),
            revealed=REVEALED if REVEALED in self.outputs else None,
            together=isinstance(self.core, TogetherCore),
            loops=self._loops(self.core) if isinstance(self.core, TogetherCore) else (),
        )

    def _one(self) -> Program:
        def one(*inputs: Tensor) -> Tensors:
            position, tokens, carry, shared = self._unpack(inputs)
            place = position % self.core.tile
            if isinstance(self.core, SegmentMemory):
                return _revealing(*self.core.one_and_inputs(tokens, place, carry, shared))
            output, present = self.core.one(tokens, place, carry, shared)
            return output, *present

        tokens = {name: _with(axes, tokens=1) for name, axes in self.tokens.items()}
        outputs = {name: _with(axes, tokens=1) for name, axes in self._ordered().items()}
        return self._program("one", one, tokens, outputs)

    def _ordered(self) -> dict[str, Axes]:
        """Axes of the outputs: the read, the state, what is revealed."""
        return {"output": self.output} | self.present | self.outputs

    def _tiles(self) -> Program:
        def tiles(*inputs: Tensor) -> Tensors:
            position, tokens, _, _ = self._unpack(inputs)
            cut = align(position, tokens[0].shape[2], self.core.tile)
            return *(into_tiles(x, cut) for x in tokens), cut.live

        outputs: dict[str, Axes] = {name: ("tiles", *self._tile(axes)) for name, axes in self.tokens.items()}
        outputs["live"] = ("tiles", "batch", self.core.tile)
        return self._program("tiles", tiles, self.tokens, outputs)

    def _together(self, core: TogetherCore) -> Program:
        def together(*inputs: Tensor) -> Tensors:
            live, *rest = inputs
            _, tokens, carry, shared = self._unpack((live, *rest))
            output, present = core.together(tokens, live, carry, shared, loop_node)
            return output, *present

        outputs: dict[str, Axes] = {"output": ("tiles", *self._tile(self.output)), **self.present}
        return self._of("together", together, self._tiles_axes() | self.carry | self.shared, outputs)

    def _loops(self, core: TogetherCore) -> tuple[LoopProgram, ...]:
        """What is called for all tiles, from examples."""
        found: list[LoopProgram] = []

        def watch(core: LoopCore, tiles: Tensors, carry: Tensors, shared: Tensors) -> tuple[Tensors, Tensors]:
            found.append(loop_program(core, tiles, carry, shared))
            lead = tiles[0].shape[:2]
            return carry, tuple(tiles[0].new_zeros(*lead, *sizes) for sizes in core.results)

        inputs = self._examples(self._tiles_axes() | self.carry | self.shared)
        live, *rest = inputs.values()
        _, tokens, carry, shared = self._unpack((live, *rest))
        with torch.no_grad():
            core.together(tokens, live, carry, shared, watch)
        return tuple(found)

    def _tiles_axes(self) -> dict[str, Axes]:
        """Of what all tiles are given."""
        live: dict[str, Axes] = {"live": ("tiles", "batch", self.core.tile)}
        return live | {name: ("tiles", *self._tile(axes)) for name, axes in self.tokens.items()}

    def _step(self, core: TileCore) -> Program:
        def step(*inputs: Tensor) -> Tensors:
            live, *rest = inputs
            _, tokens, carry, shared = self._unpack((live, *rest))
            if isinstance(core, SegmentMemory):
                return _revealing(*core.step_and_inputs(tokens, live, carry, shared))
            output, present = core.step(tokens, live, carry, shared)
            return output, *present

        tokens = {name: self._tile(axes) for name, axes in self.tokens.items()}
        outputs = {name: self._tile(axes) for name, axes in self._ordered().items()}
        axes: dict[str, Axes] = {"live": ("batch", self.core.tile), **tokens, **self.carry, **self.shared}
        return self._of("step", step, axes, outputs)

    def _rows(self) -> Program:
        def rows(*inputs: Tensor) -> Tensors:
            *tiles, position, like = inputs
            cut = align(position, like.shape[2], self.core.tile)
            return tuple(from_tiles(x, cut) for x in tiles)

        axes: dict[str, Axes] = {
            f"tiles.{name}": ("tiles", *self._tile(shape)) for name, shape in self.outputs.items()
        }
        axes |= {"position": ("batch",), "token_0": self.tokens["token_0"]}
        return self._of("rows", rows, axes, self.outputs)

    def _tile(self, axes: Axes) -> Axes:
        return _with(axes, tokens=self.core.tile)

    def _unpack(self, inputs: Tensors) -> tuple[Tensor, Tensors, Tensors, Tensors]:
        tokens, carry = 1 + len(self.tokens), 1 + len(self.tokens) + len(self.carry)
        return inputs[0], inputs[1:tokens], inputs[tokens:carry], inputs[carry:]

    def _program(
        self,
        name: str,
        function: Callable[..., Tensors],
        tokens: dict[str, Axes],
        outputs: dict[str, Axes],
    ) -> Program:
        axes: dict[str, Axes] = {"position": ("batch",), **tokens, **self.carry, **self.shared}
        return self._of(name, function, axes, outputs)

    def _of(
        self, name: str, function: Callable[..., Tensors], axes: dict[str, Axes], outputs: dict[str, Axes]
    ) -> Program:
        full_name = f"{self.core.name}.{name}"
        return Program(full_name, _Function(function), self._examples(axes), axes, outputs, self.dtypes)

    def _examples(self, axes: dict[str, Axes]) -> dict[str, Tensor]:
        return {
            key: torch.zeros(_sizes(shape), dtype=self.dtypes.get(key, torch.float32))
            for key, shape in axes.items()
        }


def _revealing(output: Tensor, present: Tensors, inputs: TokenInputs) -> Tensors:
    """The read, the state, and ``[key | value | log retention | step | log momentum]``."""
    gates = [x[..., None] for x in (inputs.log_retention, inputs.step, inputs.log_momentum) if x is not None]
    return output, *present, torch.cat([inputs.key, inputs.value, *gates], dim=-1)


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Tensors]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensors:
        return self.function(*inputs)


def _sizes(axes: Axes) -> list[int]:
    free = {"batch": _BATCH, "tokens": _TOKENS, "tiles": _TILES}
    return [free[axis] if isinstance(axis, str) else axis for axis in axes]


def _with(axes: Axes, tokens: int) -> Axes:
    return tuple(tokens if axis == "tokens" else axis for axis in axes)
