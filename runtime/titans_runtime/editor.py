"""What to learn at test time, and how: objective, optimizer and policy of a session's editor."""

from __future__ import annotations

import dataclasses
import json
import numbers
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast

from titans_runtime.errors import UsageError
from titans_runtime.optimizers import OPTIMIZERS, settings

if TYPE_CHECKING:
    from titans_runtime.manifest import Manifest

OBJECTIVES = ("readout", "prediction", "association")
"""Objectives of this project's models; a bundle may bring others, as graphs ``gradient.<objective>``."""

MAX_CHUNK = 1024
MAX_STEP = 1e6  # far beyond any use, and far from where float32 ends
_MAX_STEPS = 1000
_SHOWN = 60
READOUT_OPTIMIZERS = ("sgd", "adagrad")
_STEPS = {"prediction": 0.1, "association": 1e-4}
_STEPS_OF_OPTIMIZERS = {"titans": 1.0, "adam": 0.01, "muon": 0.01}
"""Of those whose steps are of a length of their own, whatever the objective."""

_LARGEST_MOMENTUM = {"adam": 0.9999, "muon": 0.9999}
"""Of optimizers that take running means: close to 1, a mean in float32 no longer takes anything in."""


@dataclass(frozen=True)
class Editor:
    """How a session edits its memory from the tokens that it sees: objective, optimizer and policy.

    Attributes:
        objective: ``readout`` edits the memory on the logits by the next-token loss; ``prediction`` the
            memories of all layers by the same loss through the whole network; ``association`` each
            layer's memory by ``½ ‖f_M(k) - v‖²``.
        step: step size ``θ`` on the summed loss of a chunk; for ``titans``, a factor on the model's own.
            By default, or for None: with ``sgd`` and ``adagrad`` 0.1 for ``prediction``, 1e-4 for
            ``association``, 1 for ``readout`` and the objectives of other bundles; with ``titans`` 1, with
            ``adam`` and ``muon`` 0.01.
        chunk: gradient period, in tokens: all gradients of a chunk are taken at the memory as it
            stood when the chunk began.
        optimizer: ``sgd`` is plain gradient descent. ``adagrad`` divides the step by
            ``√(1 + Σ g²)``; on the readout memory with one sum a row, so that rows that were written
            often move less (Duchi et al. 2011). ``titans`` is the memory's own rule with the model's own
            gates; ``adam`` and ``muon`` are what they are elsewhere.
        momentum: in place of the optimizer's own, or of the model's gate; 0 to 1, of ``adam`` and ``muon`` to
            0.9999.
        retention: what a step keeps of the memory, likewise. Of the readout memory, what is kept of the rows
            that a chunk's contexts pick, once a chunk: what was learnt of them last counts most.
        floor: least retention of a ``titans`` step.
        steps: steps on every chunk.
        memories: patterns, as ``layers.0.*``, of the memories to edit; empty for all.
        threshold: mean loss of a token, in nats, below which a chunk is not learnt from.
        clip: largest norm of a step's gradient; longer ones are shortened. 0 for no limit.
        budget: milliseconds of editing in one call, after which chunks are no longer learnt from;
            0 for no limit. What is learnt then depends on the machine.
        rollback: whether a step is taken back that is not finite or leaves its own chunk's loss higher than
            the step before it has; the steps before it are kept. Costs one more evaluation a chunk.
        replace: whether the step takes the place of what the model itself writes during the chunk;
            otherwise it moves the memory as it came in, and the chunk is run again over that.
        also: a second editor that works beside this one: one of the two edits ``readout``, the other the
            layers' memories. As text, it is read as :meth:`parse` reads it.

    Numbers may be NumPy's scalars; they are kept as Python's.
    """

    objective: str = "readout"
    step: float = cast("float", None)  # one is always set when an editor is made
    chunk: int = 4
    optimizer: str = "sgd"
    momentum: float | None = None
    retention: float | None = None
    floor: float = 0.0
    steps: int = 1
    memories: tuple[str, ...] = ()
    threshold: float = 0.0
    clip: float = 0.0
    budget: float = 0.0
    rollback: bool = False
    replace: bool = False
    also: Editor | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: a malformed objective, or a value outside its range.
        """
        for item in fields(self):
            object.__setattr__(self, item.name, _plain(getattr(self, item.name)))
        if not re.fullmatch(r"[a-z][a-z0-9_]*", str(self.objective)):
            raise UsageError(f"editor objective {self.objective!r}; known: {', '.join(OBJECTIVES)}")
        if self.optimizer not in tuple(OPTIMIZERS):  # of a list, too
            raise UsageError(f"editor optimizer {self.optimizer!r}; known: {', '.join(OPTIMIZERS)}")
        given: object = self.step
        if given is None:
            object.__setattr__(self, "step", _default_step(self.objective, self.optimizer))
        self._check_numbers()
        names: object = self.memories
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise UsageError(f"editor memories is {self.memories!r}; give a tuple of names or patterns")
        for name in ("rollback", "replace"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(f"editor {name} is {getattr(self, name)!r}; it must be true or false")
        self._check_decays()
        if self.is_readout:
            self._check_readout()
        self._check_second()

    def _check_numbers(self) -> None:
        ranges = {
            "step": (0, MAX_STEP),
            "threshold": (0, MAX_STEP),
            "clip": (0, MAX_STEP),
            "budget": (0, MAX_STEP),
            "momentum": (0, 1),
            "retention": (0, 1),
            "floor": (0, 1),
        }
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if value is None and name in ("momentum", "retention"):
                continue
            if type(value) not in (int, float) or not least <= value <= most:
                raise UsageError(f"editor {name} is {value!r}; it must be a number from {least} to {most:g}")
        for name, most in (("chunk", MAX_CHUNK), ("steps", _MAX_STEPS)):
            value = getattr(self, name)
            if not (type(value) is int and 1 <= value <= most):
                raise UsageError(f"editor {name} is {value!r}; it must be an integer from 1 to {most}")

    def _check_decays(self) -> None:
        for name in ("momentum", "retention", "floor"):
            unset = 0.0 if name == "floor" else None
            if getattr(self, name) != unset and name not in settings(self.optimizer):
                raise UsageError(f"editor {name}: the optimizer {self.optimizer} has none")
        most = _LARGEST_MOMENTUM.get(self.optimizer, 1)
        if self.momentum is not None and self.momentum > most:
            of = f"editor momentum is {self.momentum}; of {self.optimizer}"
            raise UsageError(f"{of} it must be a number from 0 to {most}")

    def _check_readout(self) -> None:
        if self.optimizer not in READOUT_OPTIMIZERS:
            raise UsageError(
                f"editor optimizer {self.optimizer!r}: the objective readout has sgd and adagrad"
            )
        for name in ("momentum", "memories", "replace"):
            if getattr(self, name):
                raise UsageError(f"editor {name}: the objective readout has none")

    def _check_second(self) -> None:
        given: object = self.also
        if isinstance(given, str):
            object.__setattr__(self, "also", Editor.parse(given))
        elif not (given is None or isinstance(given, Editor)):
            raise UsageError(
                f"editor also is {given!r}; give an Editor, or its text as in 'prediction:step=0.1'"
            )
        second = self.also
        if second is None:
            return
        if second.also is not None:
            raise UsageError(f"editor also is {second!r}; give one editor without a third")
        if second.is_readout == self.is_readout:
            raise UsageError("editor also: one of the two edits readout, the other the layers' memories")

    @property
    def is_readout(self) -> bool:
        """Whether the memory on the logits is edited; otherwise those of the layers."""
        return self.objective == "readout"

    @property
    def parts(self) -> tuple[Editor, ...]:
        """This editor by itself, and the one beside it."""
        return (self,) if self.also is None else (dataclasses.replace(self, also=None), self.also)

    @property
    def graph(self) -> str:
        """Name of the gradient graph that the objective calls."""
        return f"gradient.{self.objective}"

    def to_dict(self) -> dict[str, Any]:
        """The editor as plain JSON types, as manifests and memory files keep it.

        Settings that an editor may do without are left out where they have their defaults.
        """
        content = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name in _ALWAYS or getattr(self, item.name) != item.default
        }
        if self.memories:
            content["memories"] = list(self.memories)
        if self.also is not None:
            content["also"] = self.also.to_dict()
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Editor:
        """Read an editor from plain JSON types.

        Raises:
            UsageError: no object, an unknown field, or a value outside its range.
        """
        given: object = content
        if not isinstance(given, Mapping):
            raise UsageError(f"editor is {_shown(given)}; give an object with its fields, as to_dict() does")
        known = [item.name for item in fields(cls)]
        for name in content:
            if name not in known:
                raise UsageError(f"editor field {name!r} is unknown; known: {', '.join(known)}")
        content = dict(content)
        if content.get("step", 0) is None:
            raise UsageError(f"editor step is null; leave it out, or give a number from 0 to {MAX_STEP:g}")
        if isinstance(content.get("memories"), list):
            content["memories"] = tuple(content["memories"])
        if content.get("also") is not None:
            if not isinstance(content["also"], dict):
                raise UsageError(f"editor also is {content['also']!r}; it must be an object")
            content["also"] = cls.from_dict(content["also"])
        return cls(**content)

    @classmethod
    def parse(cls, text: str) -> Editor:
        """Read ``OBJECTIVE[:NAME=VALUE,…]``, or two of them joined by ``+``.

        For example ``readout:step=1,chunk=4``, or ``readout+prediction:optimizer=adam,memories=layers.0.*``.
        Several patterns of memories are joined by ``|``.

        Raises:
            UsageError: no text, or a malformed one; the message names the part.
        """
        given: object = text
        if not isinstance(given, str):
            raise UsageError(f"editor is {_shown(given)}; give a text, as in 'readout:step=1,chunk=4'")
        first, *rest = (_parsed(cls, part, text) for part in re.split(r"\+(?=[a-z])", text))
        if len(rest) > 1:
            raise UsageError(f"--editor {text}: two editors at most")
        return dataclasses.replace(first, also=rest[0]) if rest else first


def _shown(value: object) -> str:
    """As Python writes it, in a line of bearable length."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _default_step(objective: str, optimizer: str) -> float:
    return _STEPS_OF_OPTIMIZERS.get(optimizer, _STEPS.get(objective, 1.0))


def _plain(value: object) -> object:
    """A NumPy scalar as Python's number of its kind; all else as it is."""
    if type(value).__module__ != "numpy" or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


_ALWAYS = ("objective", "step", "chunk", "optimizer")
_READERS: dict[str, Callable[[str], Any]] = {
    "optimizer": str,
    "chunk": int,
    "steps": int,
    "memories": lambda text: tuple(text.split("|")),
    "rollback": lambda text: {"true": True, "false": False}[text],
    "replace": lambda text: {"true": True, "false": False}[text],
}
_EXPECTED = {
    "chunk": "an integer",
    "steps": "an integer",
    "rollback": "true or false",
    "replace": "true or false",
}
_SETTINGS = tuple(item.name for item in fields(Editor) if item.name not in ("objective", "also"))


def _parsed(cls: type[Editor], part: str, text: str) -> Editor:
    objective, _, settings = part.partition(":")
    content: dict[str, Any] = {"objective": objective}
    for setting in filter(None, settings.split(",")):
        name, equals, value = setting.partition("=")
        if name in content:
            raise UsageError(f"--editor {text}: {name} is given twice")
        if not equals:
            raise UsageError(f"--editor {text}: {setting!r} is not NAME=VALUE ({', '.join(_SETTINGS)})")
        if name not in _SETTINGS:
            raise UsageError(f"--editor {text}: {name!r} is unknown; known: {', '.join(_SETTINGS)}")
        try:
            content[name] = _READERS.get(name, float)(value)
        except (ValueError, KeyError):
            expected = _EXPECTED.get(name, "a number")
            raise UsageError(f"--editor {text}: {name} is {value!r}; it must be {expected}") from None
    return cls.from_dict(content)


def decays(editor: Editor) -> dict[str, float]:
    """Settings of an editor's optimizer, besides its step, that are not left to it."""
    given = {"momentum": editor.momentum, "retention": editor.retention, "floor": editor.floor or None}
    return {name: value for name, value in given.items() if value is not None}


def chosen_memories(editor: Editor, manifest: Manifest) -> tuple[str, ...]:
    """Names of the memories that an editor edits: those its graph differentiates by and its patterns fit.

    Raises:
        UsageError: there is no such graph, a pattern fits none, it has no gradients, or the optimizer
            cannot step a memory of such a shape.
    """
    if editor.graph not in manifest.graphs:
        known = [name.removeprefix("gradient.") for name in manifest.graphs if name.startswith("gradient.")]
        raise UsageError(
            f"the bundle cannot be edited by {editor.objective!r}; known: {', '.join(known) or 'nothing'}"
        )
    outputs = [tensor.name for tensor in manifest.graphs[editor.graph].outputs]
    found = [name.removeprefix("grad.") for name in outputs if name.startswith("grad.")]
    for pattern in editor.memories:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise UsageError(f"editor memories: {pattern!r} fits none of {', '.join(found)}")
    chosen = tuple(
        name for name in found if not editor.memories or any(fnmatchcase(name, p) for p in editor.memories)
    )
    if not chosen:
        raise UsageError(f"the bundle's graph {editor.graph} has no gradients")
    _check_shapes(editor, manifest, chosen)
    return chosen


def _check_shapes(editor: Editor, manifest: Manifest, chosen: tuple[str, ...]) -> None:
    """Matrices for an optimizer of matrices: a memory's first axis counts heads, or whatever has its own."""
    if not getattr(OPTIMIZERS[editor.optimizer], "needs_matrices", False):
        return
    for entry in manifest.state:
        if entry.name in chosen and len(entry.row_shape) < 3:
            shape = f"{entry.name} has shape {entry.row_shape}, no (heads, rows, columns)"
            raise UsageError(
                f"editor optimizer {editor.optimizer}: it takes matrices, and {shape}; "
                "choose another optimizer, or matrices by memories="
            )


def check_fits(editor: Editor, manifest: Manifest) -> None:
    """Whether a bundle can be edited as an editor asks; without loading anything.

    Raises:
        UsageError: the bundle has not what the editor, or the one beside it, edits.
    """
    for part in editor.parts:
        if not part.is_readout:
            chosen_memories(part, manifest)
        elif part.graph not in manifest.graphs or all(entry.name != "readout" for entry in manifest.state):
            raise UsageError("editor objective 'readout': the bundle has no readout memory to edit")


def specification(editor: dict[str, Any] | None) -> str:
    """An editor as the command line takes it: the converse of :meth:`Editor.parse`; None is ``none``."""
    if editor is None:
        return "none"
    settings = [
        f"{name}={json.dumps(value) if isinstance(value, bool) else value}"
        for name, value in editor.items()
        if name not in ("objective", "also", "memories")
    ]
    settings += [f"memories={'|'.join(editor['memories'])}"] if editor.get("memories") else []
    text = f"{editor['objective']}:{','.join(settings)}"
    return f"{text}+{specification(editor['also'])}" if editor.get("also") else text
