"""The readout memory: a linear memory on the logits, edited by the prediction loss.

``R (Dr, vocab)`` starts at zero and adds ``R_tᵀ k_t`` to the logits. Once the next token is known,
the gradient of its cross-entropy is ``∂CE/∂R = k_t (softmax(logits_t) - onehot(x_{t+1}))ᵀ``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titans_export.config import BYTES, WORD_REACH, ModelConfig
from titans_export.layers import l2_normalise

_HASH_PRIME = 1_000_003
_HASH_BASE = 40_503
_LETTERS = frozenset(b"_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") | frozenset(
    range(128, 256)
)
"""Bytes of words: what names are made of, and all that is not ASCII."""


class ReadoutKey(nn.Module):
    """The key of the readout memory: whitened features beside hashed contexts.

    The hidden part is ``Σ^{-1/2} (h - μ)``, scaled to length 1, with ``μ`` and ``Σ`` of the features
    on training text: a gradient step in these coordinates is a natural-gradient step. The context
    parts are one-hot rows that name the last few tokens, or the last few words, so that what followed
    them can be stored exactly.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, config: ModelConfig) -> None:
        """Begin with the identity as whitening; training measures ``μ`` and ``Σ`` when it ends."""
        super().__init__()
        self.contexts = config.readout_contexts
        self.words = config.readout_words
        self.hashes = config.readout_hashes
        self.buckets = config.readout_buckets
        self.scale = config.readout_context_scale
        self.tail = config.context_tail
        self.register_buffer("mean", torch.zeros(config.d_model))
        self.register_buffer("whitening", torch.eye(config.d_model))

    def forward(self, features: Tensor, input_ids: Tensor, past_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Key of every position, and the tokens that the next call's contexts reach back to.

        Args:
            features: ``(B, T, d_model)``, what the head reads.
            input_ids: ``(B, T)`` int64.
            past_ids: ``(B, tail)`` int64, the tokens before.

        Returns:
            The hidden part ``(B, T, d_model)``; for each context the row of the memory that its one-hot
            part picks, ``(B, T, contexts)`` int64; and ``present_ids (B, tail)``.
        """
        hidden = l2_normalise((features - self.mean) @ self.whitening)
        window = torch.cat([past_ids, input_ids], dim=1)
        tokens = input_ids.shape[1]
        first = torch.tensor(
            [features.shape[-1] + index * self.buckets for index in range(self.hashes)],
            device=input_ids.device,
        )
        return hidden, first + self._hash(window, tokens), window[:, tokens:]

    def _hash(self, window: Tensor, tokens: int) -> Tensor:
        """Buckets of the last tokens at every position, for every context: ``(B, T, contexts)``.

        ``Σ_i (token_{t-i} + 1) baseⁱ mod prime``, for all contexts at once; the sums stay far below 2⁶³.
        """
        places = torch.arange(tokens, device=window.device)[:, None]
        recent = window[:, places + torch.arange(self.tail + 1, device=window.device)]  # (B, T, tail + 1)
        # Not a matrix product: on accelerators integers have none.
        code = ((recent + 1)[..., None] * self._powers(self.contexts, window.device)).sum(-2)
        if self.words:
            powers = self._powers((WORD_REACH,) * len(self.words), window.device)
            terms = (recent + 1)[..., None] * powers
            code = torch.cat([code, (terms * self._within_words(recent)).sum(-2)], dim=-1)
        return code % _HASH_PRIME % self.buckets

    def _powers(self, lengths: tuple[int, ...], device: torch.device) -> Tensor:
        """``baseⁱ mod prime`` for the token ``i`` places back; 0 beyond a context's length."""
        columns = [
            [pow(_HASH_BASE, i, _HASH_PRIME) if i < length else 0 for i in range(self.tail, -1, -1)]
            for length in lengths
        ]
        return torch.tensor(columns, device=device).t()

    def _within_words(self, recent: Tensor) -> Tensor:
        """1 for the bytes of the current word and of as many before it as a context has, else 0.

        A byte belongs to them when from itself on no more bytes stand between words than words are asked
        for. ``(B, T, tail + 1)`` int64 → ``(B, T, tail + 1, words)`` int64.
        """
        is_letter = torch.tensor([byte in _LETTERS for byte in range(BYTES)], device=recent.device)
        between = (~is_letter[recent]).to(torch.float32)
        size = self.tail + 1
        from_here_on = torch.ones(size, size, device=recent.device).tril()
        passed = between @ from_here_on  # small whole numbers, which float32 holds exactly
        allowed = torch.tensor([float(count) for count in self.words], device=recent.device)
        return (passed[..., None] <= allowed).to(torch.int64)


def read_logits(readout: Tensor, key: Tensor, rows: Tensor, scale: float) -> Tensor:
    """``Rᵀ k`` for keys of a dense part and of one-hot parts of length ``scale``.

    Args:
        readout: ``(B, Dr, V)``; the dense part's rows come first.
        key: ``(B, T, d)``, the dense part.
        rows: ``(B, T, contexts)`` int64, where the others' ones stand.
        scale: length of each of them.
    """
    batch, height, vocab = readout.shape
    first = torch.arange(batch, device=rows.device)[:, None, None] * height
    picked = readout.reshape(batch * height, vocab)[rows + first]
    dense: Tensor = key @ readout[:, : key.shape[-1]]
    return dense + scale * picked.sum(-2)


def readout_gradient(
    target_ids: Tensor, readout: Tensor, key: Tensor, rows: Tensor, base_logits: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, loss, and the gradient of the summed loss with respect to the readout memory.

    The memory is held at ``readout`` for all ``T`` positions (gradient period ``T``).

    Args:
        target_ids: ``(B, T)`` int64, the token that followed each position; negative where it is
            not known yet: such a position is scored and teaches nothing.
        readout: ``(B, Dr, V)``.
        key: ``(B, T, d)``, the key's dense part.
        rows: ``(B, T, contexts)`` int64, rows that the key's one-hot parts pick.
        base_logits: ``(B, T, V)``, logits without the readout's part.
        scale: length of each one-hot part.

    Returns:
        ``logits (B, T, V)``; ``loss (B, T)`` in nats (0 where the target is unknown); the gradient of the
        first ``d`` rows ``(B, d, V)``; and what every position adds to the gradient of each row that it
        picks, ``(B, T, V)``.
    """
    logits = base_logits + read_logits(readout, key, rows, scale)
    vocab = torch.arange(logits.shape[-1], device=logits.device)
    known = (target_ids >= 0).to(logits.dtype)
    one_hot = (target_ids[..., None] == vocab).to(logits.dtype)
    log_probability = logits.log_softmax(-1)
    loss = -(log_probability * one_hot).sum(-1)
    error = (log_probability.exp() - one_hot) * known[..., None]
    return logits, loss, key.transpose(-1, -2) @ error, scale * error
