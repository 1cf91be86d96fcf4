"""Every contestant is causal and of one size; the baselines' own mathematics against what defines them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from benchmarks.experiments.contestants import CONTESTANTS, entrants, mamba
from benchmarks.experiments.contestants.network import parameters
from benchmarks.experiments.contestants.s4d import DiagonalStateSpace
from benchmarks.experiments.contestants.titans import ScaledWrites, strengths
from benchmarks.experiments.tasks import EXPERIMENTS


@pytest.mark.parametrize("name", list(CONTESTANTS))
def test_no_answer_depends_on_what_comes_later(name: str) -> None:
    torch.manual_seed(0)
    network = CONTESTANTS[name].build(16).eval()
    tokens = torch.randint(0, 16, (2, 41))
    other = tokens.clone()
    other[:, 23:] = (other[:, 23:] + 1) % 16
    with torch.no_grad():
        one, two = network.features(tokens), network.features(other)
    assert torch.allclose(one[:, :23], two[:, :23], atol=1e-5)
    assert not torch.allclose(one[:, 23], two[:, 23], atol=1e-3)


@pytest.mark.parametrize("name", [name for name in CONTESTANTS if name != "transformer"])
def test_a_stream_goes_on_from_its_state(name: str) -> None:
    torch.manual_seed(0)
    network = CONTESTANTS[name].build(16).eval()
    tokens = torch.randint(0, 16, (2, 50))
    with torch.no_grad():
        first, state = network(tokens[:, :37], network.initial_state(2))
        second, _ = network(tokens[:, 37:], state)
        assert torch.allclose(torch.cat([first, second], dim=1), network.features(tokens), atol=1e-5)


def test_attention_carries_nothing() -> None:
    assert CONTESTANTS["transformer"].build(16).initial_state(2) == {}


def test_all_have_one_number_of_parameters() -> None:
    for tasks in EXPERIMENTS.values():
        counts = [parameters(contestant.build(tasks[0].vocab_size)) for contestant in CONTESTANTS.values()]
        assert max(counts) < 1.1 * min(counts)


def test_the_selective_scan_is_the_recurrence_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba, "_CHUNK", 3)  # states are handed over twice
    torch.manual_seed(0)
    double = {"dtype": torch.float64, "requires_grad": True}
    x, read, write = (torch.randn(2, 7, n, **double) for n in (3, 4, 4))
    step, rate = torch.rand(2, 7, 3, **double), (-torch.rand(3, 4, dtype=torch.float64)).requires_grad_()
    first = torch.randn(2, 4, 3, **double)
    state, outputs = first, []
    for t in range(7):
        decay = torch.exp(step[:, t, None] * rate.T)
        state = decay * state + (step * x)[:, t, None] * write[:, t, :, None]
        outputs.append((state * read[:, t, :, None]).sum(1))
    scanned, last = mamba.selective_scan(x, step, rate, write, read, first)
    assert torch.allclose(scanned, torch.stack(outputs, dim=1), rtol=1e-12)
    assert torch.allclose(last, state, rtol=1e-12)
    assert torch.autograd.gradcheck(mamba.selective_scan, (x, step, rate, write, read, first))


def test_the_convolution_of_s4d_is_its_recurrence() -> None:
    torch.manual_seed(0)
    layer = DiagonalStateSpace(3, 8).double()
    x = torch.randn(2, 20, 3, dtype=torch.float64)
    rate = torch.complex(-layer.log_decay.exp(), layer.frequency)
    moved = torch.exp(rate * layer.log_step.exp()[:, None])
    state = torch.zeros(2, 3, 4, dtype=torch.complex128)
    outputs = []
    for t in range(20):
        state = moved * state + (moved - 1) / rate * x[:, t, :, None]
        outputs.append(2 * (torch.view_as_complex(layer.mix) * state).sum(-1).real + layer.direct * x[:, t])
    expected = F.glu(layer.out_projection(F.gelu(torch.stack(outputs, dim=1))), dim=-1)
    mixed, after = layer(x, {"state": torch.zeros(2, 3, 4, 2, dtype=torch.float64)})
    assert torch.allclose(mixed, expected, rtol=1e-9)
    assert torch.allclose(torch.view_as_complex(after["state"]), state, rtol=1e-9)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_a_long_stream_is_cut_without_a_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = CONTESTANTS[name].build(16).eval()
    tokens = torch.randint(0, 16, (2, 50))
    with torch.no_grad():
        whole = network.features(tokens)
        monkeypatch.setattr("benchmarks.experiments.contestants.network.SEGMENT", 17)
        assert torch.allclose(network.features(tokens), whole, atol=1e-5)


@pytest.mark.parametrize(("noisy", "quiet"), [("titans-scaled", "titans-delta"), ("mamba-scaled", "mamba")])
def test_writes_are_scaled_as_much_as_is_said(noisy: str, quiet: str) -> None:
    torch.manual_seed(0)
    scaled, plain = (CONTESTANTS[name].build(16) for name in (noisy, quiet))
    plain.load_state_dict(scaled.state_dict())
    tokens = torch.randint(0, 16, (2, 20))
    expected = plain.features(tokens).detach()
    assert torch.equal(scaled.features(tokens), expected)  # before any training says how much
    apart = []
    for share in (0.0, 1e-3, 1.0):
        scaled.set_noise(share)
        torch.manual_seed(1)
        apart.append(float((scaled.features(tokens).detach() - expected).abs().max()))
    assert apart[0] == 0.0
    assert 0.0 < 30 * apart[1] < apart[2]


def test_the_factor_of_a_write_is_as_wide_as_it_says() -> None:
    torch.manual_seed(0)
    one = torch.ones(1, 1, 4_000, 1)
    zero, state = torch.zeros_like(one), torch.zeros(1, 1, 1, 1)
    # With one key, steps of one and the old content erased, every token reads what it wrote.
    rest = (zero[..., 0], torch.full_like(zero[..., 0], -torch.inf), one[..., 0], torch.ones(1), state, state)
    writes = ScaledWrites(2.4)
    writes.share = 0.5
    factors, _, _ = writes(one, one, one, *rest, tile=16)
    logarithms = factors.log()
    assert torch.allclose(logarithms.abs(), torch.tensor(1.2), atol=1e-4)
    assert 1_850 < int((logarithms > 0).sum()) < 2_150


def test_some_contestants_take_part_in_some_tasks_only() -> None:
    assert "titans-scaled" not in entrants("mqar")
    assert "titans-delta" not in entrants("mqar")
    for task in ("induction", "induction-long"):
        assert "titans-scaled" in entrants(task)
        assert not {"titans-delta", "mamba-scaled", "titans-untrained"} & set(entrants(task))
    assert len(entrants("mqar")) == 8


def test_strengths_are_for_all_layers_and_for_each() -> None:
    assert strengths(2, (0.5, 1.0)) == [(0.5, 0.5), (1, 1), (0.5, 0), (1, 0), (0, 0.5), (0, 1)]
