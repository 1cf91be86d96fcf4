"""Constructor arguments of titans-pytorch's classes: read, checked, refused by name where there is no way."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass, field
from typing import Any, TypeVar

from titans_export.importers.titans_pytorch.arguments import (
    an_object,
    check_number,
    check_numbers,
    refuse_unknown,
    shown,
)
from titans_export.importers.titans_pytorch.networks import NETWORKS, Network, build
from titans_runtime.errors import UsageError

ACTIVATIONS = ("GELU", "ReLU", "SiLU", "Sigmoid", "Tanh")
"""Of ``torch.nn``, without arguments."""

_DEFAULT_MODEL = {"depth": 2, "expansion_factor": 4.0}
_NO_EFFECT = ("use_accelerated_scan", "init_adaptive_step_bias", "init_momentum_bias", "init_decay_bias")
_NO_EFFECT_TRANSFORMER = ("use_flex_attn", "neural_memory_add_value_residual")
_FUNCTIONS = ("store_memory_loss_fn", "adaptive_step_transform")
_NOT_STREAMED = "MemoryAttention"
_OPTIONAL = ("batch_size", "max_grad_norm", "neural_memory_segment_len", "neural_memory_batch_size")

_PADDED_BEFORE = 10_000
"""The library puts the padding of a sliding window at place -1e4, which a window so long reaches."""


@dataclass(frozen=True)
class MemoryOptions:
    """Arguments of ``NeuralMemory``, under the library's names; ``model`` is a specification.

    ``model`` is ``{"class": "MemoryMLP", "depth": 2, …}``; ``activation`` a name of ``torch.nn``.
    """

    dim: int
    dim_head: int
    heads: int = 1
    chunk_size: int = 1
    batch_size: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    default_step_transform_max_lr: float = 1.0
    per_parameter_lr_modulation: bool = False
    max_mem_layer_modulation: float = 1.0
    per_head_learned_parameters: bool = True
    attn_pool_chunks: bool = False
    momentum: bool = True
    momentum_order: int = 1
    learned_momentum_combine: bool = False
    learned_combine_include_zeroth: bool = False
    num_kv_per_token: int = 1
    qkv_receives_diff_views: bool = False
    pre_rmsnorm: bool = True
    post_rmsnorm: bool = False
    qk_rmsnorm: bool = False
    max_grad_norm: float | None = None
    activation: str | None = None
    accept_weight_residual: bool = False
    spectral_norm_surprises: bool = False
    gated_transition: bool = False
    mem_model_norm_add_residual: bool = True
    store_with_lookahead_value: bool = False

    @classmethod
    def read(cls, arguments: dict[str, Any], where: str = "NeuralMemory") -> MemoryOptions:
        """From the arguments that the library's constructor was given.

        Raises:
            UsageError: an argument is missing, unknown, of a wrong kind, or cannot be represented.
        """
        own = [entry.name for entry in dataclasses.fields(cls)]
        refuse_unknown(arguments, [*own, "default_model_kwargs", *_NO_EFFECT, *_FUNCTIONS], where)
        given = _without(arguments, _NO_EFFECT)
        _refuse_functions(given, _FUNCTIONS, where)
        if "dim" not in given:
            raise UsageError(f"{where}: the argument dim is missing")
        if given.get("dim_head") is None:
            given["dim_head"] = given["dim"]
        given["chunk_size"] = _chunk_size(given.get("chunk_size", 1), where)
        check_numbers(given, where, _OPTIONAL)
        default_model = an_object(given, "default_model_kwargs", where)
        default_model = _DEFAULT_MODEL if default_model is None else default_model
        given["model"] = _network(given.get("model"), default_model, given["dim_head"], where)
        given["activation"] = _activation(given.get("activation"), where)
        return _checked(MemoryOptions, given, where)

    def __post_init__(self) -> None:
        """Refuse what the library itself would.

        Raises:
            UsageError: names the argument.
        """
        where = "NeuralMemory"
        if self.heads == 1 and self.dim_head != self.dim:
            raise UsageError(
                f"{where}: with one head dim_head must be dim, {self.dim}; it is {self.dim_head}"
            )
        if self.batch_size is not None and self.batch_size % self.chunk_size:
            raise UsageError(
                f"{where}: batch_size is {self.batch_size}, no multiple of chunk_size {self.chunk_size}"
            )
        if self.learned_momentum_combine and not (self.momentum and self.momentum_order > 1):
            raise UsageError(f"{where}: learned_momentum_combine needs a momentum_order above 1")
        if self.attn_pool_chunks and self.chunk_size == 1:
            raise UsageError(f"{where}: attn_pool_chunks needs a chunk_size above 1")

    @property
    def network(self) -> Network:
        """The memory's network."""
        return build(self.model, self.mem_model_norm_add_residual)

    @property
    def orders(self) -> int:
        """Orders of momentum; 0 without."""
        return self.momentum_order if self.momentum else 0

    @property
    def combined(self) -> int:
        """Momenta that are mixed by learned weights; 0 where the last one is taken."""
        if not self.learned_momentum_combine:
            return 0
        return self.momentum_order + self.learned_combine_include_zeroth


@dataclass(frozen=True)
class TransformerOptions:
    """Arguments of ``MemoryAsContextTransformer``, under the library's names.

    ``memory`` holds those of its memories: the library's ``neural_memory_kwargs`` and what it sets itself.
    """

    num_tokens: int
    dim: int
    depth: int
    segment_len: int
    memory: MemoryOptions
    neural_memory_layers: tuple[int, ...]
    neural_mem_gate_attn_output: bool = False
    num_longterm_mem_tokens: int = 0
    num_persist_mem_tokens: int = 0
    neural_memory_qkv_receives_diff_views: bool = False
    dim_head: int = 64
    heads: int = 8
    ff_mult: float = 4
    num_residual_streams: int = 4
    sliding_window_attn: bool = False
    neural_mem_weight_residual: bool = False

    @classmethod
    def read(cls, arguments: dict[str, Any]) -> TransformerOptions:
        """From the arguments that the library's constructor was given.

        Raises:
            UsageError: an argument is missing, unknown, of a wrong kind, or cannot be represented.
        """
        where = "MemoryAsContextTransformer"
        own = [entry.name for entry in dataclasses.fields(cls) if entry.name != "memory"]
        known = [*own, *_OF_ITS_MEMORIES, *_NO_EFFECT_TRANSFORMER, "token_emb"]
        refuse_unknown(arguments, known, where)
        given = _without(arguments, _NO_EFFECT_TRANSFORMER)
        _refuse_functions(given, ("token_emb",), where)
        for name in ("num_tokens", "dim", "depth", "segment_len"):
            if name not in given:
                raise UsageError(f"{where}: the argument {name} is missing")
            check_number(name, given[name], where)
        check_numbers(given, where, _OPTIONAL)
        given["memory"] = _memories(given, where)
        given["neural_memory_layers"] = _layers(given.get("neural_memory_layers"), given["depth"], where)
        return _checked(TransformerOptions, given, where)

    def __post_init__(self) -> None:
        """Refuse what cannot be represented.

        Raises:
            UsageError: names the argument.
        """
        where = "MemoryAsContextTransformer"
        if self.window % self.memory.chunk_size:
            raise UsageError(
                f"{where}: neural_memory_segment_len is {self.memory.chunk_size}, which does not divide "
                f"segment_len + num_longterm_mem_tokens, {self.window}: such a model cannot be imported"
            )
        if self.sliding_window_attn and self.window >= _PADDED_BEFORE:
            raise UsageError(
                f"{where}: sliding_window_attn over segment_len + num_longterm_mem_tokens, {self.window}: "
                f"from {_PADDED_BEFORE} on the library attends to padding, and cannot be followed"
            )
        if self.dim_head % 2:
            raise UsageError(f"{where}: dim_head is {self.dim_head}; rotary positions need an even one")

    @property
    def window(self) -> int:
        """Places of a segment, its long-term tokens included."""
        return self.segment_len + self.num_longterm_mem_tokens

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """Layers with a memory, counted from 0."""
        return tuple(layer for layer in range(self.depth) if layer + 1 in self.neural_memory_layers)


_OF_ITS_MEMORIES = (
    "neural_memory_segment_len",
    "neural_memory_batch_size",
    "neural_memory_model",
    "neural_memory_kwargs",
)


def _memories(given: dict[str, Any], where: str) -> MemoryOptions:
    """Options of a transformer's memories, whose arguments are taken out of ``given``."""
    chunk = given.pop("neural_memory_segment_len", None)
    window = given["segment_len"] + given.get("num_longterm_mem_tokens", 0)
    own = {
        "dim": given["dim"],
        "chunk_size": window if chunk is None else chunk,
        "batch_size": given.pop("neural_memory_batch_size", None),
        "model": given.pop("neural_memory_model", None),
        "qkv_receives_diff_views": True,
    }
    kwargs = an_object(given, "neural_memory_kwargs", where) or {}
    twice = sorted(own.keys() & kwargs.keys()) + [n for n in ("accept_weight_residual",) if n in kwargs]
    if twice:
        raise UsageError(
            f"{where}: neural_memory_kwargs must not hold {twice[0]}, which the class sets itself"
        )
    return MemoryOptions.read(own | kwargs, f"{where}: neural_memory_kwargs")


def _layers(value: object, depth: int, where: str) -> tuple[int, ...]:
    """Layers with a memory, counted from 1; numbers beyond the last layer mean nothing to the library."""
    if value is None:
        return tuple(range(1, depth + 1))
    if not isinstance(value, list | tuple) or any(type(layer) is not int for layer in value):
        raise UsageError(
            f"{where}: neural_memory_layers is {shown(value)}; it must be a list of integers, counted from 1"
        )
    return tuple(value)


_Options = TypeVar("_Options", MemoryOptions, TransformerOptions)


def to_dict(options: MemoryOptions | TransformerOptions) -> dict[str, Any]:
    """The options as plain JSON types."""
    return dataclasses.asdict(options)


def from_dict(cls: type[_Options], content: dict[str, Any]) -> _Options:
    """The other way round.

    Raises:
        UsageError: a field is missing, unknown or of a wrong kind.
    """
    content = dict(content)
    if cls is TransformerOptions:
        content["memory"] = from_dict(MemoryOptions, an_object(content, "memory", cls.__name__) or {})
        content["neural_memory_layers"] = _layers(content.get("neural_memory_layers", ()), 0, cls.__name__)
    else:
        spec = an_object(content, "model", cls.__name__) or {}
        content["model"] = _network(spec, {}, content.get("dim_head", 0), cls.__name__)
    return _checked(cls, content, cls.__name__)


def _without(arguments: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """What changes nothing at inference is left out."""
    return {name: value for name, value in arguments.items() if name not in names}


def _refuse_functions(given: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    for name in names:
        if given.pop(name, None) is not None:
            raise UsageError(f"{where}: {name} is code of yours; a model with it cannot be imported")


def _chunk_size(value: object, where: str) -> int:
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if type(value) is not int:
        raise UsageError(
            f"{where}: chunk_size is {shown(value)}; it must be one integer, the same to read and to write"
        )
    return value


def _network(spec: object, default: dict[str, Any], dim: int, where: str) -> dict[str, Any]:
    """The full specification of a memory's network, arguments that were left out included."""
    if spec is None:
        spec = {"class": "MemoryMLP", **default}
    if isinstance(spec, str):
        spec = {"class": spec}
    if not isinstance(spec, dict) or not isinstance(spec.get("class"), str):
        raise UsageError(
            f'{where}: model is {shown(spec)}; give an object, as {{"class": "MemoryMLP", "depth": 2}}'
        )
    name = spec["class"]
    if name == _NOT_STREAMED:
        raise UsageError(
            f"{where}: model is {name}, which attends within its chunk: it cannot be run token by token, "
            "and so cannot be imported"
        )
    if name not in NETWORKS:
        raise UsageError(f"{where}: model is {shown(name)}; known: {', '.join(NETWORKS)}")
    full = {"dim": dim} | spec
    parameters = inspect.signature(NETWORKS[name]).parameters
    for argument in full.keys() - {"class"} - parameters.keys():
        raise UsageError(
            f"{where}: model: {name} has no argument {shown(argument)}; it has {', '.join(parameters)}"
        )
    for argument, parameter in parameters.items():
        if argument not in full and parameter.default is inspect.Parameter.empty:
            raise UsageError(f"{where}: model: {name} needs the argument {argument}")
        check_number(argument, full.setdefault(argument, parameter.default), f"{where}: model")
    if full["dim"] != dim:
        raise UsageError(f"{where}: model: dim is {full['dim']}; it must be dim_head, {dim}")
    return full


def _activation(value: object, where: str) -> str | None:
    if value is None:
        return None
    name = str(value).removeprefix("torch.").removeprefix("nn.").removesuffix("()")
    if name not in ACTIVATIONS:
        raise UsageError(
            f"{where}: activation is {shown(value)}; known: {', '.join(ACTIVATIONS)}, of torch.nn"
        )
    return name


_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
    "str | None": (str, type(None)),
    "dict[str, Any]": (dict,),
    "tuple[int, ...]": (tuple,),
    "MemoryOptions": (MemoryOptions,),
}


def _checked(cls: type[_Options], given: dict[str, Any], where: str) -> _Options:
    known = {entry.name: entry for entry in dataclasses.fields(cls)}
    refuse_unknown(given, known, where)
    check_numbers(given, where, _OPTIONAL)
    for name, value in given.items():
        kind = str(known[name].type)
        if type(value) not in _KINDS[kind]:
            raise UsageError(f"{where}: {name} is {shown(value)}; expected {kind}")
    for name, entry in known.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise UsageError(f"{where}: the argument {name} is missing")
    return cls(**given)
