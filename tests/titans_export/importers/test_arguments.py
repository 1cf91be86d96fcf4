"""Constructor arguments of titans-pytorch: what is refused, by name and limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.titans_export.importers.cases import MEMORY_BASE
from tests.titans_export.importers.importing import (
    TRANSFORMER_ARGUMENTS,
    Tensors,
    error_line,
    import_file,
)
from titans_export.importers.titans_pytorch.options import TransformerOptions

pytest.importorskip("titans_pytorch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"class": "MemoryAttention"}}, "MemoryAttention, which attends within its chunk"),
        ({"model": {"class": "MyMemory"}}, "model is 'MyMemory'; known: MemoryMLP, "),
        ({"model": {"class": "MemoryMLP", "width": 3}}, "MemoryMLP has no argument 'width'"),
        ({"store_memory_loss_fn": "mine"}, "store_memory_loss_fn is code of yours"),
        ({"adaptive_step_transform": "mine"}, "adaptive_step_transform is code of yours"),
        ({"chunk_size": [4, 8]}, "chunk_size is [4, 8]; it must be one integer"),
        ({"activation": "LeakyReLU"}, "activation is 'LeakyReLU'; known: GELU, "),
        ({"accept_weight_residual": True}, "accept_weight_residual needs another memory's weights"),
        ({"batch_size": 6}, "batch_size is 6, no multiple of chunk_size 4"),
        ({"attn_pool": True}, "unknown argument 'attn_pool'"),
        ({"momentum": "yes"}, "momentum is 'yes'; expected bool"),
        ({"heads": 0}, "heads is 0; it must be an integer from 1 to 4096"),
        ({"heads": 10**9}, "heads is 1000000000; it must be an integer from 1 to 4096"),
        ({"heads": True}, "heads is True; it must be an integer"),
        ({"dim": 2**40, "dim_head": 8}, "dim is 1099511627776; it must be an integer from 1 to 65536"),
        ({"dim_head": 0}, "dim_head is 0; it must be an integer from 1 to 65536"),
        ({"chunk_size": 0, "batch_size": 8}, "chunk_size is 0; it must be an integer from 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be an integer from 1"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0; it must be a number from 1e-30"),
        ({"default_step_transform_max_lr": 10**400}, "default_step_transform_max_lr is 1000"),
        ({"default_model_kwargs": 3}, "default_model_kwargs is 3; it must be an object"),
        ({"default_model_kwargs": {}}, "MemoryMLP needs the argument depth"),
        ({"model": {"class": ["x"]}}, "model is {'class': ['x']}; give an object, as"),
        ({"model": {"class": "MemoryMLP", "depth": 2.0}}, "model: depth is 2.0; it must be an integer"),
        ({"model": {"class": "MemoryMLP", "depth": 10**9}}, "model: depth is 1000000000; it must be an"),
        (
            {"model": {"class": "MemoryMLP", "depth": 2, "expansion_factor": 0}},
            "expansion_factor is 0; it must",
        ),
        (
            {"version": "0.3.20"},
            "version is '0.3.20'; known for a NeuralMemory: 0.3.25, 0.4.0 to 0.4.25, 0.5.0, 0.5.1, ",
        ),
        ({"version": ["0.5.5"]}, "version is ['0.5.5']; known for a NeuralMemory: "),
        ({"class": ["x"]}, "class is ['x'], but"),
        ({"class": "MemoryAsContextTransformer"}, "class is 'MemoryAsContextTransformer', but"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(
    memory: Tensors,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
) -> None:
    code, out = import_file(tmp_path, memory, MEMORY_BASE | change)
    assert code == 2
    assert message in error_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "0.4.2"}, "version is '0.4.2'; known for a MemoryAsContextTransformer: 0.5.0, 0.5.1, "),
        ({"hyper_connections": "0.3.11"}, "hyper_connections is '0.3.11'; known: 0.3.12, "),
        ({"hyper_connections": ["0.4.0"]}, "hyper_connections is ['0.4.0']; known: 0.3.12, "),
        (
            {"hyper_connections": "0.3.16"},
            "hyper_connections is '0.3.16', but the file's have the form of 0.4",
        ),
        ({"token_emb": "mine"}, "token_emb is code of yours"),
        ({"neural_memory_segment_len": 3}, "neural_memory_segment_len is 3, which does not divide"),
        ({"neural_memory_model": {"class": "MemoryAttention"}}, "MemoryAttention, which attends"),
        (
            {"neural_memory_kwargs": {"chunk_size": 4}},
            "must not hold chunk_size, which the class sets itself",
        ),
        ({"num_tokens": None}, "num_tokens is None; it must be an integer"),
        ({"dim_head": 7}, "dim_head is 7; rotary positions need an even one"),
        (
            {"sliding_window_attn": True, "segment_len": 9998},
            "sliding_window_attn over segment_len + num_longterm_mem_tokens, 10000: from 10000 on",
        ),
        ({"memory": {"dim": 16}}, "unknown argument 'memory'; known: num_tokens, "),
        ({"neural_memory_segment_len": 0}, "neural_memory_segment_len is 0; it must be an integer from 1"),
        ({"num_longterm_mem_tokens": None}, "num_longterm_mem_tokens is None; it must be an integer from 0"),
        ({"num_longterm_mem_tokens": "2"}, "num_longterm_mem_tokens is '2'; it must be an integer from 0"),
        ({"num_longterm_mem_tokens": -1}, "num_longterm_mem_tokens is -1; it must be an integer from 0"),
        ({"num_persist_mem_tokens": -2}, "num_persist_mem_tokens is -2; it must be an integer from 0"),
        ({"neural_memory_layers": 1}, "neural_memory_layers is 1; it must be a list of integers"),
        ({"neural_memory_layers": "12"}, "neural_memory_layers is '12'; it must be a list of integers"),
        ({"neural_memory_kwargs": 0}, "neural_memory_kwargs is 0; it must be an object"),
        ({"ff_mult": -4}, "ff_mult is -4; it must be a number from 0.001 to 64"),
        ({"depth": 2.0}, "depth is 2.0; it must be an integer"),
        ({"depth": 10**9}, "depth is 1000000000; it must be an integer from 1 to 1024"),
    ],
)
def test_what_a_transformer_cannot_be_is_refused_by_name(
    transformer: Tensors,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
) -> None:
    code, out = import_file(tmp_path, transformer, TRANSFORMER_ARGUMENTS | change)
    assert code == 2
    assert message in error_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize("name", ["num_tokens", "dim", "depth", "segment_len"])
def test_what_every_transformer_needs_is_said_to_be_missing(
    transformer: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    given = {argument: value for argument, value in TRANSFORMER_ARGUMENTS.items() if argument != name}
    assert import_file(tmp_path, transformer, given)[0] == 2
    assert f"MemoryAsContextTransformer: the argument {name} is missing" in error_line(capsys)


def test_a_window_may_be_long_where_it_does_not_slide_or_reach_padding() -> None:
    base = TRANSFORMER_ARGUMENTS | {"segment_len": 9997, "sliding_window_attn": True}
    assert TransformerOptions.read(base).window == 9999
    assert TransformerOptions.read(base | {"segment_len": 20_000, "sliding_window_attn": False})


def test_arguments_must_be_there(memory: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = import_file(tmp_path, memory, None)
    assert code == 3
    assert "write the arguments that the model was built with as JSON there" in error_line(capsys)
    (tmp_path / "elsewhere.json").write_text(json.dumps(MEMORY_BASE), encoding="utf-8")
    code, _ = import_file(tmp_path, memory, None, "--config", str(tmp_path / "elsewhere.json"))
    assert code == 0


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"dim": 16, "dim": 8}', b"[1]", b"{", b"\xff\xfe", b" " * (4 * 2**20 + 1)]
)
def test_arguments_that_are_no_object_are_a_line(
    memory: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "model.json").write_bytes(content)
    code, out = import_file(tmp_path, memory, None)
    assert code == 3
    assert f"{tmp_path}/model.json: must hold the constructor's arguments as a JSON object (" in error_line(
        capsys
    )
    assert not out.exists()
