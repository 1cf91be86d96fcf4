"""The model on the buffers of one stream; calls are bound when first needed, and kept as they come again."""

from __future__ import annotations

from typing import Final

import numpy as np

from titans_runtime.backends import DTYPES, Array, Call, Graph
from titans_runtime.buffers import StateBuffers
from titans_runtime.manifest import MAX_TOKENS, Manifest
from titans_runtime.readout import Keys

SEGMENT: Final = MAX_TOKENS
"""Tokens that the model takes at once; longer input is cut. Bounds a call's memory, but for its result."""


class Forward:
    """Reads one set of the buffers and writes the other; which is which, the caller decides by swapping."""

    def __init__(self, graph: Graph, manifest: Manifest, buffers: StateBuffers, edit: Array) -> None:
        """Bind nothing yet.

        Args:
            graph: ``model``.
            manifest: of the bundle.
            buffers: the stream's state.
            edit: strength of the fused rule, ``(1, layers)`` float32; may be changed in place.
        """
        self._graph, self._manifest, self._buffers, self._edit = graph, manifest, buffers, edit
        outputs = {tensor.name: tensor for tensor in manifest.graphs["model"].outputs}
        keys = [name for name in ("readout_key", "readout_rows") if name in outputs]
        width, contexts = [int(outputs[name].shape[-1]) for name in keys] or (0, 0)
        self.key_shape = width, contexts
        self._token = empty_sequence(manifest, 1, 1)
        self._token_logits = np.empty((1, 1, manifest.width), np.float32)
        self._token_keys = Keys.empty(1, *self.key_shape)
        self._segment_keys: Keys | None = None
        self._token_calls: dict[tuple[int, bool], Call] = {}

    def run(self, ids: Array, logits: Array, keys: Keys | None) -> None:
        """Fill ``logits (T, V)`` and, where asked for, the readout keys, which :meth:`keys` has given."""
        if len(ids) == 1:
            self._token[0, 0] = ids[0]
            self._token_call(keys is not None).run()
            logits[:] = self._token_logits[0]
        else:
            self._bind(ids[None], logits[None], keys).run()

    def keys(self, tokens: int) -> Keys:
        """Room for the keys of a run; the next one takes the same."""
        if tokens == 1:
            return self._token_keys
        if self._segment_keys is None:  # kept: fresh memory for every segment costs time
            self._segment_keys = Keys.empty(SEGMENT, *self.key_shape)
        return self._segment_keys.part(slice(tokens))

    def unbind(self) -> None:
        """Let go of calls: the buffers have moved to other arrays."""
        self._token_calls.clear()

    def _token_call(self, with_keys: bool) -> Call:
        """The one-token call for the buffers as they stand."""
        which = (self._buffers.side, with_keys)
        if which not in self._token_calls:
            keys = self._token_keys if with_keys else None
            self._token_calls[which] = self._bind(self._token, self._token_logits, keys)
        return self._token_calls[which]

    def _bind(self, ids: Array, logits: Array, keys: Keys | None) -> Call:
        past, spare = self._buffers.past, self._buffers.spare
        wanted = {} if keys is None else {"readout_key": keys.dense[None], "readout_rows": keys.rows[None]}
        sequence, scores = self._manifest.sequence.name, self._manifest.scores.name
        return self._graph.bind(
            {sequence: ids, "edit": self._edit, **{f"past.{name}": past[name] for name in past}},
            {scores: logits, **wanted, **{f"present.{name}": spare[name] for name in spare}},
        )


def empty_sequence(manifest: Manifest, batch: int, tokens: int) -> Array:
    """Room for what the model takes: ids ``(batch, tokens)``, or vectors with one axis more."""
    spec = manifest.sequence
    width = [axis for axis in spec.shape if isinstance(axis, int)]
    return np.zeros((batch, tokens, *width), DTYPES[spec.dtype])
