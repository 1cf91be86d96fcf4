"""Imported models against titans-pytorch's own parallel forward, every persistent parameter randomised."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.titans_export.importers.cases import (
    MEMORY_BASE,
    MEMORY_CASES,
    TRANSFORMER_BASE,
    TRANSFORMER_CASES,
)
from tests.titans_export.importers.library import (
    MEMORY,
    TRANSFORMER,
    imported,
    library_model,
    pair,
    parallel,
    sequence_for,
    streamed,
)
from titans_export.importers.titans_pytorch import stream
from titans_export.importers.titans_pytorch.association import Association
from titans_export.importers.titans_pytorch.neural_memory import NeuralMemoryModel

pytest.importorskip("titans_pytorch")

_LEAST = st.sampled_from([1, 99])  # all chunks' gradients at once, and chunk by chunk
_ODD_CUTS = [1, 5, 1, 1, 9, 3, 1]


def _agree(found: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize("case", MEMORY_CASES)
def test_a_memory_answers_as_in_the_library(case: str) -> None:
    theirs, ours = pair(MEMORY, MEMORY_BASE | MEMORY_CASES[case])
    sequence = sequence_for(ours, 2, 27)
    expected = parallel(theirs, sequence)
    _agree(streamed(ours, sequence, []), expected, 1e-9)
    _agree(streamed(ours, sequence, _ODD_CUTS), expected, 1e-9)


_MODELS = st.sampled_from(
    [MEMORY_CASES[name].get("model") for name in MEMORY_CASES if "model" in MEMORY_CASES[name]]
)


@st.composite
def _memories(draw: st.DrawFn) -> dict[str, Any]:
    """Any combination of options that the library itself accepts."""
    chunk = draw(st.sampled_from([1, 3, 4]))
    heads = draw(st.sampled_from([1, 2]))
    orders = draw(st.integers(1, 3))
    flag = st.booleans()
    combined = draw(flag) and orders > 1
    updates, lookahead = draw(st.integers(1, 2)), draw(flag)
    # With nothing to look ahead to gradients are zero, which the library limits to no number.
    limited = not (lookahead and chunk * updates == 1)
    return {
        "dim": 8 * heads,
        "dim_head": 8,
        "heads": heads,
        "chunk_size": chunk,
        "batch_size": draw(st.sampled_from([None, chunk, 2 * chunk])),
        "gated_transition": draw(flag),
        "model": draw(st.none() | _MODELS),
        "momentum": draw(flag) or combined,
        "momentum_order": orders,
        "learned_momentum_combine": combined,
        "learned_combine_include_zeroth": draw(flag),
        "spectral_norm_surprises": draw(flag),
        "max_grad_norm": draw(st.sampled_from([None, 0.3, 2.0])) if limited else None,
        "per_parameter_lr_modulation": draw(flag),
        "max_mem_layer_modulation": draw(st.sampled_from([1.0, 3.0])),
        "store_with_lookahead_value": lookahead,
        "default_step_transform_max_lr": draw(st.sampled_from([0.1, 1.0])),
        "qk_rmsnorm": draw(flag),
        "post_rmsnorm": draw(flag),
        "pre_rmsnorm": draw(flag),
        "attn_pool_chunks": draw(flag) and chunk > 1,
        "num_kv_per_token": updates,
        "qkv_receives_diff_views": draw(flag),
        "mem_model_norm_add_residual": draw(flag),
        "per_head_learned_parameters": draw(flag),
        "activation": draw(st.sampled_from([None, "SiLU", "GELU"])),
    }


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(_memories(), st.lists(st.integers(1, 9), max_size=6), st.integers(0, 99), _LEAST)
def test_any_combination_of_a_memorys_options_cut_anywhere(
    arguments: dict[str, Any], lengths: list[int], seed: int, least: int
) -> None:
    theirs, ours = pair(MEMORY, arguments, seed)
    # One token more than a batch of chunks: at its end the library's last row reads an older memory when
    # nothing follows, which no stream can know.
    sequence = sequence_for(ours, 1, 4 * arguments["chunk_size"] + 2, seed)
    with mock.patch.object(stream, "LEAST_TOGETHER", least):
        _agree(streamed(ours, sequence, lengths), parallel(theirs, sequence), 1e-9)


@pytest.mark.parametrize("case", TRANSFORMER_CASES)
def test_a_transformer_answers_as_in_the_library(case: str) -> None:
    arguments = TRANSFORMER_BASE | TRANSFORMER_CASES[case]
    theirs, ours = pair(TRANSFORMER, arguments)
    tokens = 77 if arguments["segment_len"] == 32 else 45
    sequence = sequence_for(ours, 2, tokens)
    whole = streamed(ours, sequence, [])
    # The library computes its residual streams in float32 whatever the weights are.
    _agree(whole, parallel(theirs, sequence), 1e-5)
    _agree(streamed(ours, sequence, [*_ODD_CUTS, 1, 11]), whole, 1e-9)


@st.composite
def _transformers(draw: st.DrawFn) -> dict[str, Any]:
    flag = st.booleans()
    segment, long_term = draw(st.sampled_from([(4, 0), (6, 2), (8, 0), (6, 3)]))
    window = segment + long_term
    chunk = draw(st.sampled_from([size for size in (1, 2, 3, 4, window) if window % size == 0]))
    return {
        "num_tokens": 11,
        "dim": 16,
        "depth": draw(st.integers(1, 3)),
        "segment_len": segment,
        "num_longterm_mem_tokens": long_term,
        "num_persist_mem_tokens": draw(st.integers(0, 3)),
        "neural_memory_segment_len": chunk,
        "neural_memory_batch_size": draw(st.sampled_from([None, 2 * chunk])),
        "neural_mem_gate_attn_output": draw(flag),
        "neural_memory_qkv_receives_diff_views": draw(flag),
        "neural_mem_weight_residual": draw(flag),
        "num_residual_streams": draw(st.sampled_from([1, 2, 4])),
        "sliding_window_attn": draw(flag),
        "neural_memory_layers": draw(st.sampled_from([None, [1], [2]])),
        "dim_head": 8,
        "heads": 2,
        "ff_mult": draw(st.sampled_from([4, 2, 2.5])),
        "neural_memory_model": draw(st.none() | _MODELS),
        "neural_memory_kwargs": draw(_kwargs(chunk)),
    }


@st.composite
def _kwargs(draw: st.DrawFn, chunk: int) -> dict[str, Any]:
    flag, orders = st.booleans(), draw(st.integers(1, 2))
    lookahead = draw(flag) and chunk > 1
    return {
        "heads": 2,
        "dim_head": 8,
        # Small steps: gradients at sums of memories would otherwise make float32 noise of the library's grow.
        "default_step_transform_max_lr": 0.1,
        "momentum": draw(flag) or orders > 1,
        "momentum_order": orders,
        "learned_momentum_combine": draw(flag) and orders > 1,
        "max_grad_norm": draw(st.sampled_from([None, 2.0])),
        "per_parameter_lr_modulation": draw(flag),
        "qk_rmsnorm": draw(flag),
        "post_rmsnorm": draw(flag),
        "attn_pool_chunks": draw(flag) and chunk > 1,
        "num_kv_per_token": draw(st.integers(1, 2)),
        "gated_transition": draw(flag),
        "per_head_learned_parameters": draw(flag),
        "store_with_lookahead_value": lookahead,
    }


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(_transformers(), st.lists(st.integers(1, 9), max_size=6), st.integers(0, 99), _LEAST)
def test_any_combination_of_a_transformers_options_cut_anywhere(
    arguments: dict[str, Any], lengths: list[int], seed: int, least: int
) -> None:
    theirs, ours = pair(TRANSFORMER, arguments, seed)
    sequence = sequence_for(ours, 1, 29, seed)
    with mock.patch.object(stream, "LEAST_TOGETHER", least):
        _agree(streamed(ours, sequence, lengths), parallel(theirs, sequence), 1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_aligned_chunks_chained_are_the_whole(gated: bool) -> None:
    arguments = MEMORY_BASE | {"chunk_size": 16, "batch_size": 16, "gated_transition": gated}
    theirs, ours = pair(MEMORY, arguments)
    # One more than three chunks: at the end of a batch of chunks the library reads the memory of before
    # the transition, if nothing follows.
    sequence = sequence_for(ours, 2, 49)
    _agree(streamed(ours, sequence, [16, 16]), parallel(theirs, sequence), 1e-9)


def test_unequal_parts_of_a_batch_of_chunks_are_the_whole() -> None:
    theirs, ours = pair(MEMORY, MEMORY_BASE | {"chunk_size": 16, "batch_size": 64})
    sequence = sequence_for(ours, 2, 112)
    _agree(streamed(ours, sequence, [16, 48, 48]), parallel(theirs, sequence), 1e-9)


@pytest.mark.parametrize("prompt", [0, 1, 7, 16])
def test_token_by_token_after_any_prompt_is_the_whole(prompt: int) -> None:
    theirs, ours = pair(MEMORY, MEMORY_BASE | {"chunk_size": 8, "batch_size": 16})
    sequence = sequence_for(ours, 2, 37)
    lengths = [*([prompt] if prompt else []), *[1] * (37 - prompt)]
    _agree(streamed(ours, sequence, lengths), parallel(theirs, sequence), 1e-9)


@pytest.mark.parametrize("prompt", [1, 5, 8, 13])
@pytest.mark.parametrize("sliding", [False, True])
def test_greedy_decoding_is_what_the_parallel_forward_would_choose(prompt: int, sliding: bool) -> None:
    """With persistent tokens, and prompts that end anywhere: there the library's own cache is wrong."""
    arguments = TRANSFORMER_BASE | {"num_longterm_mem_tokens": 2, "sliding_window_attn": sliding}
    theirs, ours = pair(TRANSFORMER, arguments)
    tokens = sequence_for(ours, 1, prompt)
    expected = tokens
    for _ in range(14):
        following = parallel(theirs, expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, following], dim=1)
    lengths = [prompt, *[1] * 14]
    chosen = streamed(ours, expected, lengths)[0, prompt - 1 : -1].argmax(-1)
    assert torch.equal(chosen, expected[0, prompt:])


def test_weights_in_float32_agree_to_float32() -> None:
    theirs = library_model(MEMORY, MEMORY_BASE)
    ours = imported(MEMORY_BASE, theirs.state_dict())
    sequence = sequence_for(ours, 2, 64)
    _agree(streamed(ours, sequence, [10, 1]), parallel(theirs, sequence), 1e-5)


@pytest.mark.parametrize("updates", [1, 2])
def test_losses_and_steps_are_those_of_return_surprises(updates: int) -> None:
    theirs, ours = pair(MEMORY, MEMORY_BASE | {"num_kv_per_token": updates})
    assert isinstance(ours, NeuralMemoryModel)
    sequence, dim = sequence_for(ours, 2, 16), 8
    with torch.no_grad():
        _, _, (losses, steps) = theirs(sequence, return_surprises=True)
        weights = [w.expand(2, *w.shape) for w in ours.memory.memory_model_parameters]
        key, value, step = ours.memory.taught(sequence)
        answers = ours.memory.network.read(tuple(weights), key)
        total, _, *rest = Association(ours)(sequence, *weights)
    assert losses.shape == steps.shape == (2, 2, 16 * updates)
    _agree((answers - value).square().mean(-1), losses, 1e-9)
    _agree(step, steps, 1e-9)
    # What a session reports is half the squared length, and the step on that: each of them over dim / 2.
    _agree(total, losses.sum((1, 2)) * dim / 2, 1e-9)
    _agree(rest[-1], steps.unflatten(-1, (16, updates)).mean(-1) * 2 / dim, 1e-9)
