"""A recurrence as tensors in lists: where the loops of PyTorch's formats find what a part asks for.

TorchScript reads annotations of attributes, which must not be strings: nothing from ``__future__`` here.
"""

from torch import nn

from titans_converters.program import LoopProgram, RecurrenceProgram


class Places(nn.Module):
    """Names of tensors as places in lists.

    A loop is given all inputs of the recurrence, in order, and puts out the read, the state, and what is
    revealed, if that is wanted.
    """

    apart: list[int]

    def __init__(self, recurrence: RecurrenceProgram, reveal: bool = False) -> None:
        """``reveal``: whether to put out what it reveals, after the state."""
        super().__init__()
        inputs, tiles = list(recurrence.one.inputs), list(recurrence.tiles.output_axes)
        self.reveal = reveal and recurrence.revealed is not None
        self.tile = recurrence.tile
        self.apart = list(recurrence.apart)
        self.position = inputs.index("position") if recurrence.apart else -1
        self.live = tiles.index("live")
        self.counted = inputs.index(recurrence.tokens[0])
        self.streams = [inputs.index(name) for name in recurrence.tokens]
        self.carry = [inputs.index(name) for name in recurrence.carry]
        self.tile_inputs = [inputs.index(name) for name in recurrence.tiles.inputs]
        self.step_inputs = [
            _place(name, tiles, list(recurrence.carry), inputs) for name in recurrence.step.inputs
        ]
        results, streamed = list(recurrence.step.output_axes), list(recurrence.rows.output_axes)
        self.streamed = [results.index(name) for name in streamed]
        self.carried = [i for i in range(len(results)) if i not in self.streamed]
        self.put_out = [
            i
            for i, name in enumerate(recurrence.one.output_axes)
            if self.reveal or name != recurrence.revealed
        ]
        self.row_inputs = [
            _place(name, [f"tiles.{name}" for name in streamed], inputs) for name in recurrence.rows.inputs
        ]


class LoopPlaces(nn.Module):
    """The same for a loop over tiles, which is given all inputs and puts out the state, then its results."""

    streamed: list[int]

    def __init__(self, loop: LoopProgram) -> None:
        """Read the names."""
        super().__init__()
        inputs = list(loop.step.inputs)
        self.tiles = [inputs.index(name) for name in loop.tiles]
        self.carry = [inputs.index(name) for name in loop.carry]
        self.step_inputs = [_place(name, list(loop.tiles), list(loop.carry), inputs) for name in inputs]
        self.carried = list(range(len(loop.carry)))
        self.streamed = list(range(len(loop.carry), len(loop.step.output_axes)))


def _place(name: str, *lists: list[str]) -> int:
    """Where ``name`` first stands in the lists, one after the other."""
    return [known for names in lists for known in names].index(name)
