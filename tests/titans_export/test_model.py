"""The reference model: streams, batches, and the readout memory."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.titans_export.memory_inputs import relative_error
from titans_export.config import PRESETS, ModelConfig
from titans_export.memory import MemoryOutput, token_loop
from titans_export.memory.readout import ReadoutKey, readout_gradient
from titans_export.model import Rules, State, TitansModel, initial_state, state_schema
from titans_runtime.errors import DataError, UsageError

CONFIG = PRESETS["tiny"]


@pytest.fixture(scope="module")
def model() -> TitansModel:
    torch.manual_seed(0)
    return TitansModel(CONFIG).double().eval()


def _token_loop_rule(*inputs: torch.Tensor, tile: int) -> MemoryOutput:
    assert tile == CONFIG.tile
    return token_loop(*inputs)


def _ids(tokens: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CONFIG.vocab_size, (batch, tokens), generator=generator)


def _state(batch: int = 1) -> State:
    state = initial_state(CONFIG, batch, torch.float64)
    state["readout"] += 0.1 * torch.randn(state["readout"].shape, generator=torch.Generator().manual_seed(1))
    return state


def _edit(value: float, batch: int = 1) -> torch.Tensor:
    return torch.full((batch, CONFIG.layers), value, dtype=torch.float64)


@given(cuts=st.lists(st.integers(1, 39), max_size=4), edit=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_cuts_of_a_stream_change_nothing(model: TitansModel, cuts: list[int], edit: float) -> None:
    ids, state = _ids(40), _state()
    whole = model(ids, _edit(edit), state)
    logits, past = [], state
    edges = [0, *sorted(set(cuts)), 40]
    for start, end in itertools.pairwise(edges):
        part = model(ids[:, start:end], _edit(edit), past)
        logits.append(part.logits)
        past = past | part.state
    assert relative_error(torch.cat(logits, dim=1), whole.logits) <= 1e-12
    for name, tensor in whole.state.items():
        if tensor.is_floating_point():
            assert relative_error(past[name], tensor) <= 1e-12
        else:
            assert torch.equal(past[name], tensor)


@torch.no_grad()
def test_batch_rows_are_independent(model: TitansModel) -> None:
    ids, state = _ids(19, batch=3), _state(3)
    edit = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.3, 0.7]], dtype=torch.float64)
    together = model(ids, edit, state).logits
    for row in range(3):
        one = slice(row, row + 1)
        alone = model(ids[one], edit[one], {name: tensor[one] for name, tensor in state.items()}).logits
        assert relative_error(alone[0], together[row]) <= 1e-12


@torch.no_grad()
def test_every_memory_rule_gives_the_same_logits(model: TitansModel) -> None:
    slow = TitansModel(CONFIG, Rules(_token_loop_rule)).double()
    slow.load_state_dict(model.state_dict())
    single = TitansModel(CONFIG)
    single.load_state_dict(model.state_dict())
    ids, state = _ids(50), _state()
    expected = slow(ids, _edit(1.0), state).logits
    assert relative_error(model(ids, _edit(1.0), state).logits, expected) <= 1e-12
    state32 = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
    assert relative_error(single(ids, _edit(1.0).float(), state32).logits, expected) <= 1e-4


@torch.no_grad()
def test_later_tokens_change_no_earlier_logits(model: TitansModel) -> None:
    ids, state = _ids(30), _state()
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % CONFIG.vocab_size
    before, after = (model(x, _edit(1.0), state).logits for x in (ids, changed))
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


def test_readout_gradient_equals_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor([[3, 0, 7], [1, 1, -1]])
    key = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    rows = torch.tensor([[[5, 9], [7, 9], [5, 8]], [[6, 10], [6, 10], [6, 10]]])
    base = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    readout = torch.randn(2, 11, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    whole = torch.cat([key, torch.zeros(2, 3, 6, dtype=torch.float64)], dim=-1).scatter(2, rows, 0.7)
    logits = base + whole @ readout
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=-1, reduction="none"
    )
    (expected,) = torch.autograd.grad(losses.sum(), readout)
    scored, loss, first, parts = readout_gradient(targets, readout.detach(), key, rows, base, 0.7)
    gradient = torch.cat([first, torch.zeros(2, 6, 8, dtype=torch.float64)], dim=1)
    for context in range(2):
        gradient.scatter_add_(1, rows[..., context, None].expand(-1, -1, 8), parts)
    assert torch.allclose(scored, logits)
    assert torch.allclose(loss, losses.detach())
    assert torch.allclose(gradient, expected)
    assert loss[1, 2] == 0


@torch.no_grad()
def test_readout_key_tells_contexts_apart(model: TitansModel) -> None:
    """The one-hot part names the last tokens: equal for equal contexts, from whatever call they came."""
    ids = torch.tensor([[*range(5, 13), 1, 2, *range(5, 13)]])
    rows = model(ids, _edit(0.0), _state()).readout_rows[0]
    assert torch.equal(rows[7], rows[17])
    assert not torch.equal(rows[7], rows[8])
    first = CONFIG.d_model + CONFIG.readout_buckets * torch.arange(len(CONFIG.readout_contexts))
    assert ((rows >= first) & (rows < first + CONFIG.readout_buckets)).all()
    assert rows.max() < CONFIG.readout_height


WORDS = dataclasses.replace(CONFIG, readout_words=(0, 1))


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (b"-- sum", b"++ sum", (True, True)),  # the same word, after bytes that are none
        (b"to sum", b"at sum", (True, False)),
        (b"a.to sum", b"b-to sum", (True, True)),
        (b"sum", b"sun", (False, False)),
        (b"sum", b"_sum", (False, False)),
    ],
)
@torch.no_grad()
def test_contexts_of_words_begin_where_a_word_does(left: bytes, right: bytes, same: tuple[bool, ...]) -> None:
    key = ReadoutKey(dataclasses.replace(WORDS, readout_buckets=1_000_003))
    rows = [_rows(key, text)[0, -1, -2:] for text in (left, right)]
    assert tuple((rows[0] == rows[1]).tolist()) == same


@torch.no_grad()
def test_contexts_of_words_are_the_same_for_any_cut() -> None:
    key, text = ReadoutKey(WORDS), b"def long_name_of_a_function(argument): return argument + 1"
    whole = _rows(key, text)
    past = torch.zeros(1, key.tail, dtype=torch.int64)
    parts = []
    for part in (text[:7], text[7:8], text[8:]):
        _, rows, past = key(torch.zeros(1, len(part), CONFIG.d_model), torch.tensor([list(part)]), past)
        parts.append(rows)
    assert torch.equal(torch.cat(parts, dim=1), whole)
    first = CONFIG.d_model + CONFIG.readout_buckets * torch.arange(WORDS.readout_hashes)
    assert ((whole >= first) & (whole < first + CONFIG.readout_buckets)).all()
    assert whole.max() < WORDS.readout_height


def _rows(key: ReadoutKey, text: bytes) -> Tensor:
    past = torch.zeros(1, key.tail, dtype=torch.int64)
    rows: Tensor = key(torch.zeros(1, len(text), CONFIG.d_model), torch.tensor([list(text)]), past)[1]
    return rows


def test_state_schema_is_the_initial_state() -> None:
    state = initial_state(CONFIG, 3)
    assert {name: (tuple(t.shape[1:]), t.dtype) for name, t in state.items()} == {
        name: (entry.shape, entry.dtype) for name, entry in state_schema(CONFIG).items()
    }


def test_presets_have_the_sizes_they_claim() -> None:
    def parameters(name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in TitansModel(PRESETS[name]).parameters())

    assert 1_000_000 <= parameters("nano") <= 2_000_000
    assert parameters("base") == pytest.approx(28e6, rel=0.03)
    assert parameters("wide") == pytest.approx(165e6, rel=0.02)


def test_config_round_trip_and_refusals() -> None:
    assert ModelConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(DataError, match="unknown field 'depth'"):
        ModelConfig.from_dict({"depth": 2})
    with pytest.raises(DataError, match="layers is '2'; expected int"):
        ModelConfig.from_dict({"layers": "2"})
    with pytest.raises(UsageError, match="d_model is 0"):
        ModelConfig(d_model=0)
