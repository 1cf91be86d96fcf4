"""Constructor arguments of titans-pytorch: one option, or a few, at a time."""

from __future__ import annotations

from typing import Any

MEMORY_BASE: dict[str, Any] = {"dim": 16, "dim_head": 8, "heads": 2, "chunk_size": 4}
MEMORY_CASES: dict[str, dict[str, Any]] = {
    "defaults": {"heads": 1, "dim_head": 16, "chunk_size": 1},
    "heads": {},
    "batch": {"batch_size": 8},
    "gated transition": {"batch_size": 8, "gated_transition": True},
    "no momentum": {"momentum": False},
    "momentum of order 2": {"momentum_order": 2},
    "combined momentum": {"momentum_order": 3, "learned_momentum_combine": True},
    "combined with surprise": {
        "momentum_order": 2,
        "learned_momentum_combine": True,
        "learned_combine_include_zeroth": True,
    },
    "spectral norm": {"spectral_norm_surprises": True},
    "spectral norm of small updates": {
        "spectral_norm_surprises": True,
        "default_step_transform_max_lr": 1e-8,
    },
    "gradient norm": {"max_grad_norm": 0.5},
    "steps per parameter": {"per_parameter_lr_modulation": True, "max_mem_layer_modulation": 5.0},
    "norms": {"qk_rmsnorm": True, "post_rmsnorm": True},
    "no norm": {"pre_rmsnorm": False},
    "attention pooling": {"attn_pool_chunks": True},
    "two updates": {"num_kv_per_token": 2},
    "lookahead": {"store_with_lookahead_value": True, "num_kv_per_token": 2},
    "activation": {"activation": "SiLU"},
    "no residual norm": {"mem_model_norm_add_residual": False},
    "one initial memory": {"per_head_learned_parameters": False},
    "three views": {"qkv_receives_diff_views": True},
    "largest step": {"default_step_transform_max_lr": 0.1},
    "one layer": {"model": {"class": "MemoryMLP", "depth": 1}},
    "three layers": {"model": {"class": "MemoryMLP", "depth": 3, "expansion_factor": 2.0}},
    "SwiGLU": {"model": {"class": "MemorySwiGluMLP", "depth": 2}},
    "gated residual": {"model": {"class": "GatedResidualMemoryMLP", "depth": 2}},
    "factorised": {"model": {"class": "FactorizedMemoryMLP", "depth": 2, "k": 4}},
}
"""By what is special; each on top of :data:`MEMORY_BASE`."""

_MEMORY = {"heads": 2, "dim_head": 8}
TRANSFORMER_BASE: dict[str, Any] = {
    "num_tokens": 32,
    "dim": 16,
    "depth": 2,
    "segment_len": 8,
    "dim_head": 8,
    "heads": 2,
    "num_persist_mem_tokens": 2,
    "neural_memory_kwargs": _MEMORY,
}
TRANSFORMER_CASES: dict[str, dict[str, Any]] = {
    "defaults": {"num_persist_mem_tokens": 0},
    "one stream": {"num_residual_streams": 1},
    "two streams": {"num_residual_streams": 2},
    "long-term tokens": {"num_longterm_mem_tokens": 2},
    "several chunks a segment": {"neural_memory_segment_len": 4, "num_longterm_mem_tokens": 4},
    "chunks across long-term tokens": {"num_longterm_mem_tokens": 2, "neural_memory_segment_len": 5},
    "sliding window": {"sliding_window_attn": True},
    "sliding window with long-term tokens": {
        "sliding_window_attn": True,
        "num_longterm_mem_tokens": 4,
        "neural_memory_segment_len": 3,
    },
    "gated attention": {"neural_mem_gate_attn_output": True},
    "gated attention, one stream": {"neural_mem_gate_attn_output": True, "num_residual_streams": 1},
    "weight residual": {
        "depth": 3,
        "neural_mem_weight_residual": True,
        "neural_memory_segment_len": 4,
        "neural_memory_batch_size": 16,
        "neural_memory_kwargs": _MEMORY | {"default_step_transform_max_lr": 0.1},
    },
    "some memories": {"depth": 3, "neural_memory_layers": [2]},
    "no memory": {"neural_memory_layers": []},
    "views of earlier layers": {"neural_memory_qkv_receives_diff_views": True},
    "the library's training script": {
        "dim": 32,
        "depth": 4,
        "segment_len": 32,
        "num_longterm_mem_tokens": 4,
        "neural_memory_segment_len": 4,
        "neural_memory_batch_size": 32,
        "neural_memory_layers": [2, 4],
        "sliding_window_attn": True,
        "neural_mem_weight_residual": True,
        "neural_memory_qkv_receives_diff_views": True,
        "neural_memory_kwargs": {
            "dim_head": 16,
            "heads": 2,
            "attn_pool_chunks": True,
            "qk_rmsnorm": True,
            "default_step_transform_max_lr": 0.1,
            "use_accelerated_scan": False,
            "per_parameter_lr_modulation": True,
            "spectral_norm_surprises": True,
        },
    },
}
"""By what is special; each on top of :data:`TRANSFORMER_BASE`."""
