"""Hidden units of recurrent layers are units."""

from __future__ import annotations

import pytest
import torch
from exact_cuts import check, theta_of
from torch import nn

import pyro_sbp as sbp
from pyro_sbp.gates.gated_network import GatedNetwork
from pyro_sbp.gates.probing import find_gates
from pyro_sbp.gates.surgery import shrink

SEQUENCES = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


class Classifier(nn.Module):
    """A dense layer, a recurrent one, and a head on its last outputs."""

    def __init__(self, kind: str = "LSTM", **options: bool | int) -> None:
        super().__init__()
        options = {"batch_first": True, **options}
        self.embed = nn.Linear(4, 6)
        self.rnn = getattr(nn, kind)(6, 8, **options)
        self.mid = nn.Linear(8 * (1 + self.rnn.bidirectional), 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        x = self.embed(x).relu()
        if not self.rnn.batch_first:
            x = x.transpose(0, 1)
        x = self.rnn(x)[0]
        return self.head(self.mid(x[:, -1] if self.rnn.batch_first else x[-1]).relu())


class StepByStep(nn.Module):
    """A cell that is called for every step."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell, self.head = getattr(nn, kind)(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        state = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Translator(nn.Module):
    """A decoder that starts in the last state of an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.LSTM(4, 8, batch_first=True), nn.LSTM(4, 8)
        self.decoder.batch_first = True
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        _, state = self.encoder(x)
        return self.head(self.decoder(x.flip(1), state)[0])


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        lengths = torch.tensor([5, 3], device="cpu")
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return self.head(self.rnn(packed)[1][-1])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2},
        {"bidirectional": True, "num_layers": 2, "batch_first": False, "bias": False},
    ],
    ids=["single", "stacked", "bidirectional"],
)
def test_hidden_units_are_cut(kind, options):
    torch.manual_seed(0)
    small = check(Classifier(kind, **options), SEQUENCES, embed=6, rnn=8, mid=7)
    assert (small.rnn.input_size, small.rnn.hidden_size) == (4, 5)
    assert small.mid.in_features == 5 * (1 + small.rnn.bidirectional)


def test_a_unit_without_noise_left_has_no_part_in_later_steps():
    """What a column of the recurrent weights would carry on is part of the masked network."""
    torch.manual_seed(0)
    net, x = Classifier().double(), SEQUENCES.double()
    gates = find_gates(net, SEQUENCES)
    theta = {"rnn": torch.ones(8).double()}
    theta["rnn"][3] = 0
    by_hand = Classifier().double()
    by_hand.load_state_dict(net.state_dict())
    with torch.no_grad():
        by_hand.rnn.weight_hh_l0[:, 3] = 0
        by_hand.mid.weight[:, 3] = 0
        torch.testing.assert_close(GatedNetwork(net, gates)(x, theta), by_hand(x))


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_are_cut(kind):
    torch.manual_seed(0)
    assert check(StepByStep(kind), SEQUENCES, cell=8).cell.hidden_size == 5


def test_a_decoder_that_starts_in_the_state_of_an_encoder_has_its_units():
    torch.manual_seed(0)
    small = check(Translator(), SEQUENCES, encoder=8)
    assert small.encoder.hidden_size == small.decoder.hidden_size == 5


def test_packed_sequences():
    torch.manual_seed(0)
    check(Packed(), SEQUENCES, rnn=8)


def test_macs_are_counted_and_units_have_their_share():
    torch.manual_seed(0)
    net, x = Classifier(), SEQUENCES[:1]
    gates = find_gates(net, x)
    theta = {gate.name: torch.ones(gate.size) for gate in gates}
    theta["rnn"][:3], theta["embed"][:2] = 0, 0
    small = shrink(net, gates, theta, x)
    steps = 5
    assert sbp.count_macs(small, x) == steps * (4 * 4 + 4 * 5 * (4 + 5)) + 5 * 7 + 7 * 3
    costs = sbp.UnitCosts(net, gates, x)
    assert costs.expected(theta) == pytest.approx(sbp.count_macs(small, x))


def cut_classifier():
    torch.manual_seed(0)
    net = Classifier(num_layers=2)
    gates = find_gates(net, SEQUENCES)
    return shrink(net, gates, {k: v.float() for k, v in theta_of(gates).items()}, SEQUENCES)


def test_a_cut_classifier_is_saved_and_loaded(tmp_path):
    small = cut_classifier()
    sbp.save(small, tmp_path / "s", constructor=Classifier, kwargs={"num_layers": 2})
    loaded = sbp.load(tmp_path / "s", constructor=Classifier)
    assert torch.equal(loaded(SEQUENCES), small(SEQUENCES))
    assert loaded.rnn.hidden_size == 5


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_a_cut_classifier_is_exported(tmp_path, format):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    assert sbp.export(cut_classifier(), tmp_path / f"s.{format}", (5, 4), format) < 1e-5


def test_noise_per_example_is_refused_by_name():
    net = Classifier()
    gates = find_gates(net, SEQUENCES)
    with pytest.raises(
        ValueError, match="recurrent layer 'rnn' can have only one theta for a batch"
    ):
        GatedNetwork(net, gates)(SEQUENCES, {"rnn": torch.rand(2, 8)})


@pytest.mark.parametrize("batch_first", [True, False])
def test_noise_per_example_on_the_input_of_a_recurrent_layer(batch_first):
    torch.manual_seed(0)
    net = Classifier(batch_first=batch_first)
    gates, theta = find_gates(net, SEQUENCES), torch.rand(2, 6)
    out = GatedNetwork(net, gates)(SEQUENCES, {"embed": theta})
    one = GatedNetwork(net, gates)(SEQUENCES[1:], {"embed": theta[1]})
    torch.testing.assert_close(out[1:], one)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_projected_state_is_refused_by_its_name():
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 8, proj_size=3, batch_first=True)
            self.mid, self.head = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.mid(self.rnn(x)[0]).relu())

    gates = find_gates(Projected(), SEQUENCES)
    assert [gate.name for gate in gates] == ["mid"]
    assert "proj_size" in gates.not_prunable["rnn"]
