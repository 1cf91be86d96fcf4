"""A state dict of titans-pytorch: what it is of, and its tensors as ours. Every key is accounted for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from titans_export.importers.titans_pytorch.arguments import shown_key
from titans_export.importers.titans_pytorch.memory import LibraryMemory
from titans_export.importers.titans_pytorch.neural_memory import NeuralMemoryModel
from titans_export.importers.titans_pytorch.options import MemoryOptions, TransformerOptions
from titans_export.importers.titans_pytorch.residual import HyperConnection
from titans_export.importers.titans_pytorch.transformer import Layer, TransformerModel
from titans_runtime.errors import DataError

MEMORY, TRANSFORMER = "NeuralMemory", "MemoryAsContextTransformer"
LibraryModel = NeuralMemoryModel | TransformerModel

_MEMORY_KEY, _TRANSFORMER_KEY = "memory_model_parameters.0", "token_emb.weight"
_OF_TRANSFORMER = re.compile(r"(^|\.)layers\.\d+\.4$")
_PARALLEL, _COMPILED = "module.", "_orig_mod"
_SEQUENTIAL = (
    "retrieve_gate",
    "to_adaptive_step",
    "to_momentum",
    "to_decay_factor",
    "to_layer_modulation",
    "to_learned_momentum_combine",
    "to_learned_weight_residual_mix",
)


_Value = TypeVar("_Value")


def unwrapped(tensors: Mapping[str, _Value]) -> dict[str, _Value]:
    """Without what wrappers put into keys: data-parallel training before all, ``torch.compile`` anywhere."""
    plain = {_uncompiled(key): tensor for key, tensor in tensors.items()}
    if len(plain) < len(tensors):  # two keys in one: neither is to be lost in silence
        return dict(tensors)
    while plain and all(key.startswith(_PARALLEL) for key in plain):
        plain = {key.removeprefix(_PARALLEL): tensor for key, tensor in plain.items()}
    return plain


def _uncompiled(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != _COMPILED)


def has_model(keys: Iterable[str]) -> bool:
    """Whether a key that every model of one class has is there."""
    return not {_TRANSFORMER_KEY, _MEMORY_KEY}.isdisjoint(keys)


def prefix_of_model(keys: Iterable[str]) -> str | None:
    """What stands before the keys of a model in a dictionary, where they do not begin it."""
    names = list(keys)
    for own in (_TRANSFORMER_KEY, _MEMORY_KEY):
        for name in names:
            prefix = name.removesuffix(f".{own}")
            if prefix != name and not _OF_TRANSFORMER.search(prefix):
                return prefix
    return None


def recognised(keys: Iterable[str]) -> str:
    """The class that a state dict is of.

    Raises:
        DataError: of neither, or of a version of the library that is not known.
    """
    names = set(keys)
    if _TRANSFORMER_KEY in names and any(name.startswith("layers.0.5.") for name in names):
        old = any(name.endswith(".dynamic_alpha_fn") for name in names)
        if old and not any(name.endswith(".residual_scale") for name in names):
            raise DataError(
                "the checkpoint has hyper-connections of titans-pytorch before 0.5, with other mathematics; "
                "train it on with 0.5, or import a checkpoint of 0.5"
            )
        return TRANSFORMER
    if _MEMORY_KEY in names:
        return MEMORY
    example = ", ".join(map(shown_key, sorted(names)[:3])) or "nothing"
    raise DataError(
        f"the keys are neither those of {MEMORY} nor of {TRANSFORMER}; the file holds {example}, …"
    )


def load(model: LibraryModel, tensors: Mapping[str, Tensor]) -> None:
    """Fill ``model`` from a state dict of the library.

    Raises:
        DataError: a key is missing or left over, or a shape is not that which the arguments ask for.
    """
    reader = _Reader(tensors)
    with torch.no_grad():
        if isinstance(model, TransformerModel):
            _load_transformer(model, reader)
        else:
            _load_memory(model.memory, reader, "")
    reader.end()


class _Reader:
    """Takes tensors out by key; what was not taken is an error at the end."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._left = dict(tensors)

    def take(self, key: str, shape: Iterable[int]) -> Tensor:
        wanted = tuple(shape)
        if key not in self._left:
            raise DataError(f"{key} is missing from the checkpoint; the constructor arguments ask for it")
        tensor = self._left.pop(key)
        if tuple(tensor.shape) != wanted:
            raise DataError(
                f"{key} has shape {tuple(tensor.shape)}; the constructor arguments ask for {wanted}"
            )
        return tensor

    def has(self, key: str, shape: Iterable[int]) -> bool:
        """Whether a tensor is there, and of that shape."""
        return key in self._left and tuple(self._left[key].shape) == tuple(shape)

    def skip(self, key: str) -> None:
        """A tensor that the library stores and never uses."""
        self._left.pop(key, None)

    def end(self) -> None:
        if self._left:
            key = min(self._left)
            raise DataError(
                f"{shown_key(key)} belongs to no option that the constructor arguments switch on "
                f"({len(self._left)} such keys); give the arguments that the model was trained with"
            )


def _load_memory(memory: LibraryMemory, reader: _Reader, prefix: str) -> None:
    options = memory.options
    for name, parameter in memory.named_parameters():
        key = prefix + _library_key(name, activated=options.activation is not None)
        if name.startswith("memory_model_parameters"):
            # Shared weights are the same for every head; those of one head may be stored as the template's.
            alone = options.heads == 1 and reader.has(key, parameter.shape[1:])
            shared = alone or not options.per_head_learned_parameters
            parameter.copy_(reader.take(key, parameter.shape[1:] if shared else parameter.shape))
        elif parameter.dim() == 2 and name.endswith(".weight"):
            parameter.copy_(reader.take(key, reversed(parameter.shape)).t())
        else:
            parameter.copy_(reader.take(key, parameter.shape))
    for name in _template_names(options):
        reader.skip(f"{prefix}memory_model.{name}")


def _library_key(name: str, activated: bool) -> str:
    """Of a parameter of ours."""
    stem, _, rest = name.partition(".")
    if stem == "to_attn_logits":
        return f"reduce_to_chunk_rep.{name}"
    if stem in _SEQUENTIAL or (activated and stem in ("to_queries", "to_keys", "to_values")):
        return f"{stem}.0.{rest}"
    return name


def _template_names(options: MemoryOptions) -> list[str]:
    """Of ``memory_model``, a template whose weights are never used: those that count are the parameters."""
    inner = "model." if options.mem_model_norm_add_residual else ""
    outer = ["norm.gamma"] if options.mem_model_norm_add_residual else []
    depth, kind = options.model["depth"], options.model["class"]
    parts = {"MemoryMLP": 0, "FactorizedMemoryMLP": 2, "MemorySwiGluMLP": 2, "GatedResidualMemoryMLP": 3}[
        kind
    ]
    layers = range(depth)
    names = (
        [f"weights.{layer}.{i}" for layer in layers for i in range(parts)]
        if parts
        else [f"weights.{layer}" for layer in layers]
    )
    names += {"MemorySwiGluMLP": ["norm.gamma"], "GatedResidualMemoryMLP": ["final_proj"]}.get(kind, [])
    return [*outer, *(inner + name for name in names)]


def _load_transformer(model: TransformerModel, reader: _Reader) -> None:
    options = model.options
    dim = options.dim
    model.embedding.weight.copy_(reader.take("token_emb.weight", (options.num_tokens, dim)))
    model.long_term.copy_(reader.take("longterm_mems", model.long_term.shape))
    model.norm.weight.copy_(reader.take("norm.weight", (dim,)))
    _projection(model.to_logits, reader, "to_logits")
    if model.stream_embedding is not None:
        model.stream_embedding.copy_(reader.take("expand_streams.stream_embed", model.stream_embedding.shape))
    _load_positions(model, reader)
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        _load_layer(layer, reader, f"layers.{index}")


def _load_positions(model: TransformerModel, reader: _Reader) -> None:
    """The MLP of the chunk's number as it is; of the place within a chunk, its few answers."""
    from titans_export.importers.titans_pytorch.transformer import PositionMlp

    within = PositionMlp(model.options.dim).to(model.place_position)
    for prefix, mlp in (("0", model.chunk_position), ("1", within)):
        for position, projection in zip((0, 2, 4), (mlp.first, mlp.second, mlp.third), strict=True):
            _projection(projection, reader, f"axial_pos_emb.mlps.{prefix}.{position}")
    places = torch.arange(model.options.memory.chunk_size).to(model.place_position)
    model.place_position.copy_(within(places[:, None]))


def _load_layer(layer: Layer, reader: _Reader, prefix: str) -> None:
    for place, connection in enumerate(
        (layer.memory_connection, layer.attention_connection, layer.feed_forward_connection)
    ):
        if isinstance(connection, HyperConnection):
            _load_connection(connection, reader, f"{prefix}.{place}")
    if layer.selector is not None:
        layer.selector.norm.weight.copy_(
            reader.take(f"{prefix}.3.0.weight", layer.selector.norm.weight.shape)
        )
        _projection(layer.selector.weights, reader, f"{prefix}.3.1")
    if layer.memory is not None:
        _load_memory(layer.memory, reader, f"{prefix}.4.")
    _load_attention(layer, reader, f"{prefix}.5")
    feed_forward = layer.feed_forward
    feed_forward.norm.weight.copy_(reader.take(f"{prefix}.6.0.weight", feed_forward.norm.weight.shape))
    _projection(feed_forward.up, reader, f"{prefix}.6.1")
    _projection(feed_forward.down, reader, f"{prefix}.6.3")


def _load_attention(layer: Layer, reader: _Reader, prefix: str) -> None:
    """Rotary pairs stand side by side in the library, and half a head apart here."""
    attention = layer.attention
    heads, width = attention.options.heads, attention.options.dim_head
    order = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])
    attention.norm.weight.copy_(reader.take(f"{prefix}.norm.weight", attention.norm.weight.shape))
    attention.frequencies.copy_(reader.take(f"{prefix}.rotary_emb.freqs", attention.frequencies.shape))
    persistent = reader.take(f"{prefix}.persistent_memory", attention.persistent.shape)
    attention.persistent[0].copy_(persistent[0][..., order])
    attention.persistent[1].copy_(persistent[1])
    weight = reader.take(f"{prefix}.to_qkv.weight", reversed(attention.to_qkv.weight.shape)).t()
    turned, plain = weight.split([2 * heads * width, heads * width], dim=1)
    turned = turned.unflatten(1, (2 * heads, width))[:, :, order].flatten(1)
    attention.to_qkv.weight.copy_(torch.cat([turned, plain], dim=1))
    _projection(attention.to_out, reader, f"{prefix}.to_out")
    if attention.to_value_mix is not None:
        _projection(attention.to_value_mix, reader, f"{prefix}.to_learned_v_mix.0")


def _load_connection(connection: HyperConnection, reader: _Reader, prefix: str) -> None:
    """Norm and scales are multiplied into the weights."""
    dim, streams = connection.weight.shape[0], connection.streams

    def take(name: str, shape: tuple[int, ...]) -> Tensor:
        return reader.take(f"{prefix}.{name}", shape)

    alpha = take("dynamic_alpha_fn", (1, dim, streams + 1))[0]
    scales = torch.cat([take("pre_branch_scale", (1,)), take("residual_scale", (1,)).expand(streams)])
    columns, static = [alpha * scales], [take("static_alpha", (streams, streams + 1))]
    if connection.adds:
        columns.append(take("dynamic_beta_fn", (dim,))[:, None] * take("h_post_scale", ()))
        static.append(take("static_beta", (streams,))[:, None])
    gamma = take("norm.gamma", (dim,))[:, None] + 1.0
    connection.weight.copy_(torch.cat(columns, dim=1) * gamma * dim**0.5)
    connection.static.copy_(torch.cat(static, dim=1))


def _projection(projection: nn.Module, reader: _Reader, prefix: str) -> None:
    for name, parameter in projection.named_parameters():
        shape = parameter.shape if name == "bias" else torch.Size(reversed(parameter.shape))
        tensor = reader.take(f"{prefix}.{name}", shape)
        parameter.copy_(tensor if name == "bias" else tensor.t())


def build_model(kind: str, options: MemoryOptions | TransformerOptions) -> LibraryModel:
    """A model of the class ``kind``, its weights zero."""
    if isinstance(options, TransformerOptions):
        return TransformerModel(options)
    assert kind == MEMORY
    return NeuralMemoryModel(options)


def check_fit(kind: str, options: MemoryOptions | TransformerOptions, tensors: Mapping[str, Tensor]) -> None:
    """Whether keys and shapes are those that the arguments ask for, before memory is spent on a model.

    Raises:
        DataError: see :func:`load`.
    """
    shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    with torch.device("meta"):
        load(build_model(kind, options), shapes)
