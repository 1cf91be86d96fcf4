"""Constructor arguments of titans-pytorch's classes: read, checked, refused by name where there is no way."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass, field
from typing import Any, TypeVar

from titans_export.importers.titans_pytorch.networks import NETWORKS, Network, build
from titans_runtime.errors import UsageError

ACTIVATIONS = ("GELU", "ReLU", "SiLU", "Sigmoid", "Tanh")
"""Of ``torch.nn``, without arguments."""

_DEFAULT_MODEL = {"depth": 2, "expansion_factor": 4.0}
_NO_EFFECT = ("use_accelerated_scan", "init_adaptive_step_bias", "init_momentum_bias", "init_decay_bias")
_NO_EFFECT_TRANSFORMER = ("use_flex_attn", "neural_memory_add_value_residual")
_FUNCTIONS = ("store_memory_loss_fn", "adaptive_step_transform")
_NOT_STREAMED = "MemoryAttention"


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
        given = _without(arguments, _NO_EFFECT)
        _refuse_functions(given, _FUNCTIONS, where)
        if "dim" not in given:
            raise UsageError(f"{where}: the argument dim is missing")
        given["dim_head"] = given.get("dim_head") or given["dim"]
        given["chunk_size"] = _chunk_size(given.get("chunk_size", 1), where)
        default_model = given.pop("default_model_kwargs", None) or _DEFAULT_MODEL
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
        if self.batch_size is not None and (self.batch_size < 1 or self.batch_size % self.chunk_size):
            raise UsageError(
                f"{where}: batch_size is {self.batch_size}, no multiple of chunk_size {self.chunk_size}"
            )
        if self.learned_momentum_combine and not (self.momentum and self.momentum_order > 1):
            raise UsageError(f"{where}: learned_momentum_combine needs a momentum_order above 1")
        if self.attn_pool_chunks and self.chunk_size == 1:
            raise UsageError(f"{where}: attn_pool_chunks needs a chunk_size above 1")
        for name in ("dim", "dim_head", "heads", "chunk_size", "momentum_order", "num_kv_per_token"):
            if getattr(self, name) < 1:
                raise UsageError(f"{where}: {name} is {getattr(self, name)}; it must be 1 or more")

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
        given = _without(arguments, _NO_EFFECT_TRANSFORMER)
        _refuse_functions(given, ("token_emb",), where)
        for name in ("num_tokens", "dim", "depth", "segment_len"):
            if type(given.get(name)) is not int or given[name] < 1:
                raise UsageError(f"{where}: {name} is {given.get(name)!r}; it must be an integer, 1 or more")
        window = given["segment_len"] + given.get("num_longterm_mem_tokens", 0)
        kwargs = given.pop("neural_memory_kwargs", None) or {}
        if not isinstance(kwargs, dict):
            raise UsageError(f"{where}: neural_memory_kwargs is {kwargs!r}; it must be an object")
        own = {
            "dim": given["dim"],
            "chunk_size": given.pop("neural_memory_segment_len", None) or window,
            "batch_size": given.pop("neural_memory_batch_size", None),
            "model": given.pop("neural_memory_model", None),
            "qkv_receives_diff_views": True,
        }
        twice = sorted(own.keys() & kwargs.keys()) + [n for n in ("accept_weight_residual",) if n in kwargs]
        if twice:
            raise UsageError(
                f"{where}: neural_memory_kwargs must not hold {twice[0]}, which the class sets itself"
            )
        given["memory"] = MemoryOptions.read(own | kwargs, f"{where}: neural_memory_kwargs")
        layers = given.get("neural_memory_layers")
        given["neural_memory_layers"] = tuple(range(1, given["depth"] + 1) if layers is None else layers)
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
        if any(type(layer) is not int for layer in self.neural_memory_layers):
            raise UsageError(f"{where}: neural_memory_layers must be integers, counted from 1")
        if self.dim_head % 2:
            raise UsageError(f"{where}: dim_head is {self.dim_head}; rotary positions need an even one")
        for name in ("dim_head", "heads", "num_residual_streams"):
            if getattr(self, name) < 1:
                raise UsageError(f"{where}: {name} is {getattr(self, name)}; it must be 1 or more")

    @property
    def window(self) -> int:
        """Places of a segment, its long-term tokens included."""
        return self.segment_len + self.num_longterm_mem_tokens

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """Layers with a memory, counted from 0."""
        return tuple(layer for layer in range(self.depth) if layer + 1 in self.neural_memory_layers)


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
        content["memory"] = from_dict(MemoryOptions, content.get("memory", {}))
        content["neural_memory_layers"] = tuple(content.get("neural_memory_layers", ()))
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
            f"{where}: chunk_size is {value!r}; it must be one integer, the same to read and to write"
        )
    return value


def _network(spec: object, default: dict[str, Any], dim: int, where: str) -> dict[str, Any]:
    """The full specification of a memory's network, arguments that were left out included."""
    if spec is None:
        spec = {"class": "MemoryMLP", **default}
    if isinstance(spec, str):
        spec = {"class": spec}
    if not isinstance(spec, dict) or "class" not in spec:
        raise UsageError(
            f'{where}: model is {spec!r}; give an object, as {{"class": "MemoryMLP", "depth": 2}}'
        )
    name = spec["class"]
    if name == _NOT_STREAMED:
        raise UsageError(
            f"{where}: model is {name}, which attends within its chunk: it cannot be run token by token, "
            "and so cannot be imported"
        )
    if name not in NETWORKS:
        raise UsageError(f"{where}: model is {name!r}; known: {', '.join(NETWORKS)}")
    full = {"dim": dim} | spec
    parameters = inspect.signature(NETWORKS[name]).parameters
    for argument in full.keys() - {"class"} - parameters.keys():
        raise UsageError(
            f"{where}: model: {name} has no argument {argument!r}; it has {', '.join(parameters)}"
        )
    for argument, parameter in parameters.items():
        if argument not in full and parameter.default is inspect.Parameter.empty:
            raise UsageError(f"{where}: model: {name} needs the argument {argument}")
        value = full.setdefault(argument, parameter.default)
        if type(value) not in (int, float) or value <= 0:
            raise UsageError(f"{where}: model: {argument} is {value!r}; it must be a positive number")
    if full["dim"] != dim:
        raise UsageError(f"{where}: model: dim is {full['dim']}; it must be dim_head, {dim}")
    return full


def _activation(value: object, where: str) -> str | None:
    if value is None:
        return None
    name = str(value).removeprefix("torch.").removeprefix("nn.").removesuffix("()")
    if name not in ACTIVATIONS:
        raise UsageError(f"{where}: activation is {value!r}; known: {', '.join(ACTIVATIONS)}, of torch.nn")
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
    for name, value in given.items():
        if name not in known:
            raise UsageError(f"{where}: unknown argument {name!r}; known: {', '.join(known)}")
        kind = str(known[name].type)
        if type(value) not in _KINDS[kind]:
            raise UsageError(f"{where}: {name} is {value!r}; expected {kind}")
    for name, entry in known.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise UsageError(f"{where}: the argument {name} is missing")
    return cls(**given)
