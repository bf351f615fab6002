"""The same schemes on processes: to the bit what the simulator does, with the bytes that it counts."""

import pytest
import torch
import torch.distributed as dist
from simulated_ranks import SIZE, schemes, started, step_all, updates
from torch import nn

from thinrank.optim import build
from thinrank.optim.gossip.exchange import Gossip
from thinrank.optim.gossip.peers import Peers
from thinrank.optim.gossip.schemes import SCHEMES
from thinrank.optim.gossip.simulator import Simulator
from thinrank.optim.methods import AdamWConfig, GaLoreConfig

STEPS = 12
SHAPES = [(8, 10), (16,)]


def setting(name):
    kind = SCHEMES[name]
    return {"name": name, "graph": "ring", "codec": kind.USUAL, "shapes": SHAPES, "check_every": 5}


def graph(n):
    from thinrank.optim.gossip.topology import ring

    return ring(n)


def in_processes(names):
    rank, n = dist.get_rank(), dist.get_world_size()
    found = {}
    for name in names:
        side = schemes(**{**setting(name), "graph": graph(n)})[rank]
        peers = Peers()
        weights = started([side])[0]
        for step in range(STEPS):
            weights = peers.run(side.step(weights, updates(n, step)[rank]))
        found[name] = weights, peers.wire.egress
    return found


@pytest.mark.timeout(180)
@pytest.mark.parametrize("n", [2, 4])
def test_processes_do_what_the_simulator_does(ranks, n):
    answers = ranks(n).run(in_processes, [*SCHEMES])
    for name in SCHEMES:
        sides = schemes(**{**setting(name), "graph": graph(n)})
        weights, simulator = started(sides), Simulator(n)
        for step in range(STEPS):
            weights = step_all(simulator, sides, weights, updates(n, step))
        for rank, each in enumerate(answers):
            found, egress = each[name]
            torch.testing.assert_close(found, weights[rank], rtol=1e-6, atol=1e-7)  # means are made in other orders
            if name in ("dpsgd", "dcd", "ecd", "choco"):
                assert torch.equal(found, weights[rank]), name
            assert egress == pytest.approx(simulator.sent[rank], rel=1e-3), name


# --- a training loop --------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Tied weights, a frozen matrix, a batch norm."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.down = nn.Linear(16, 8)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(self.frozen(x + self.down(torch.relu(self.norm(self.up(x))))))


def batch(rank, step):
    generator = torch.Generator().manual_seed(97 * step + rank)
    return torch.randint(11, (16,), generator=generator), torch.randint(11, (16,), generator=generator)


def model_of(rank, dtype=torch.float32):
    torch.manual_seed(rank)  # ranks begin apart, and are made equal
    return Model().to(dtype)


def train(model, optimizer, exchange, steps, rank, nan_at=None):
    for step in steps:
        tokens, wanted = batch(rank, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).float(), wanted).backward()
        if nan_at == (rank, step):
            model.up.weight.grad.fill_(float("nan"))
        optimizer.step()
        exchange.step()


def trained(config=None, dtype=torch.float32, steps=20, nan_at=None, **options):
    rank = dist.get_rank()
    model = model_of(rank, dtype)
    optimizer = build(model, config) if config else torch.optim.SGD(model.parameters(), lr=0.1)
    exchange = Gossip(model, optimizer, **options)
    train(model, optimizer, exchange, range(steps), rank, nan_at)
    far = exchange.consensus()
    mean = exchange.average()
    own = {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    with exchange.averaged():
        inside = {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    after = {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return {"mean": mean, "own": own, "inside": inside, "after": after, "consensus": far, "wire": exchange.wire}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("overlap", [True, False])
def test_a_loop_of_ones_own(ranks, overlap):
    """Averages are the mean of what ranks have; ranks stay near, and are not the same."""
    answers = ranks(4).run(trained, scheme="choco", compressor="uniform8", overlap=overlap)
    means = {name: torch.stack([a["own"][name].double() for a in answers]).mean(0) for name in answers[0]["mean"]}
    for answer in answers:
        for name, value in answer["mean"].items():
            torch.testing.assert_close(value.double(), means[name].to(value.dtype).double(), rtol=1e-5, atol=1e-6)
            assert torch.equal(answer["inside"][name], value)
        assert all(torch.equal(answer["own"][name], value) for name, value in answer["after"].items())
        assert 1e-4 < answer["consensus"] < 0.3
    assert "frozen.weight" not in answers[0]["mean"]
    assert not torch.equal(answers[0]["own"]["up.weight"], answers[1]["own"]["up.weight"])
    assert torch.equal(answers[0]["own"]["frozen.weight"], answers[1]["own"]["frozen.weight"])


@pytest.mark.timeout(180)
def test_between_two_exchanges_the_average_is_of_what_ranks_have_now(ranks):
    """Of 20 steps the last exchange was in the 14th."""
    answers = ranks(2).run(trained, scheme="diloco", interval=7)
    for name in ("up.weight", "down.bias"):
        own = [answer["own"][name] for answer in answers]
        assert not torch.equal(*own)
        torch.testing.assert_close(answers[0]["mean"][name], (own[0] + own[1]) / 2)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("scheme", "compressor"), [("dpsgd", None), ("dcd", "uniform8"), ("choco", "uniform4")])
def test_overlapping_changes_nothing(ranks, scheme, compressor):
    both = [
        ranks(2).run(trained, scheme=scheme, compressor=compressor, overlap=overlap, check_every=4)
        for overlap in (True, False)
    ]
    for one, other in zip(*both, strict=True):
        assert all(torch.equal(one["own"][name], other["own"][name]) for name in one["own"])


@pytest.mark.timeout(180)
def test_sgd_on_a_complete_graph_is_one_process_with_all_data(ranks):
    """Of a model without batch norm's statistics the mean of gradients is the gradient of the mean."""
    answers = ranks(2).run(complete_sgd)
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(10):
        optimizer.zero_grad()
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(step))
        (sum(model(part).square().mean() for part in x) / 2).backward()
        optimizer.step()
    for answer in answers:
        torch.testing.assert_close(answer["weight"], model.weight.detach(), rtol=1e-5, atol=1e-6)


def complete_sgd():
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    exchange = Gossip(model, optimizer, topology="complete", scheme="dpsgd", order="then")
    for step in range(10):
        optimizer.zero_grad()
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(step))
        model(x[rank]).square().mean().backward()
        optimizer.step()
        exchange.step()
    return exchange.average()


HALVES = {
    "adamw": AdamWConfig(lr=1e-2),
    "galore": GaLoreConfig(lr=1e-2, rank=4, update_proj_gap=5),
    "master": AdamWConfig(lr=1e-2, half_weights="master"),
}


def in_half():
    found = {}
    for name, config in HALVES.items():
        wide = trained(config, scheme="choco", compressor="uniform8")
        half = trained(config, torch.bfloat16, scheme="choco", compressor="uniform8")
        found[name] = wide["mean"], half["mean"], half["own"]
    return found


@pytest.mark.timeout(180)
def test_16_bit_weights_have_float32_behind_them(ranks):
    """What is exchanged is finer than what 16 bits can hold; the weights are its rounding."""
    for rank, found in enumerate(ranks(2).run(in_half)):
        for name, (wide, half, own) in found.items():
            trained_ = [key for key in wide if own[key].is_floating_point() and "norm" not in key]
            assert all(own[key].dtype is torch.bfloat16 and half[key].dtype is torch.float32 for key in trained_)
            flat = [torch.cat([each[key].float().reshape(-1) for key in trained_]) for each in (half, wide)]
            assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < 0.1, (rank, name)
            assert any(not torch.equal(half[key], half[key].bfloat16().float()) for key in trained_)


@pytest.mark.timeout(180)
def test_a_gradient_that_is_not_finite_costs_its_rank_one_step(ranks):
    answers = ranks(2).run(trained, scheme="dcd", compressor="uniform8", nan_at=(1, 7), check_every=4)
    for answer in answers:
        assert all(bool(value.isfinite().all()) for value in answer["own"].values())


# --- memory -----------------------------------------------------------------------------------------------------------


def resumed(scheme, interval):
    rank = dist.get_rank()
    kept, ends = None, []
    for begin in (0, 11):
        model = model_of(rank)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        exchange = Gossip(model, optimizer, scheme=scheme, interval=interval, check_every=4)
        if kept is not None:
            states, exchanged = kept
            optimizer.load_state_dict(states)
            exchange.load_state_dict(exchanged)
        if begin == 0:
            train(model, optimizer, exchange, range(11), rank)
            exchange.finish()
            kept = torch.load(_saved(optimizer, exchange), weights_only=True)
        train(model, optimizer, exchange, range(11, 20), rank)
        exchange.finish()
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
    return ends


def _saved(optimizer, exchange):
    import io

    file = io.BytesIO()
    torch.save((optimizer.state_dict(), exchange.state_dict()), file)
    file.seek(0)
    return file


@pytest.mark.timeout(180)
@pytest.mark.parametrize("scheme", [*SCHEMES])
def test_it_goes_on_to_the_bit(ranks, scheme):
    for one, other in ranks(2).run(resumed, scheme, 2):
        assert all(torch.equal(one[name], other[name]) for name in one)


# --- bad input --------------------------------------------------------------------------------------------------------


def refused(options, by_rank=False):
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        Gossip(model, optimizer, **(options[rank] if by_rank else options))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"topology": [(0, 1), (2, 3)]}, "connected|reach"),
        ({"topology": {"name": "custom", "matrix": [[0.9] * 4] * 4}}, "sum"),
        ({"topology": "one_peer_exponential", "scheme": "dcd"}, "changes neighbours"),
        ({"topology": "exponential", "scheme": "dcd"}, "both directions"),
        ({"scheme": "dcd", "compressor": "uniform3", "strict": True}, "errs by .* ends at 0.25"),
        ({"scheme": "dcd", "compressor": "uniform5"}, "compressor must be one of"),
        ({"scheme": "dpsgd", "compressor": "uniform8"}, "sends weights themselves"),
        ({"scheme": "gossip"}, "scheme must be one of"),
        ({"topology": "mesh"}, "topology"),
        ({"interval": 0}, "interval"),
        ({"topology": {"name": "torus", "rows": 3}}, "rows|torus"),
    ],
)
def test_settings_that_do_not_go_together(ranks, options, words):
    import re

    for said in ranks(4).run(refused, options):
        assert said is not None
        assert re.search(words, said), said


def test_one_rank_with_another_setting_is_named(ranks):
    options = [{"scheme": "choco", "seed": 0}, {"scheme": "choco", "seed": 1}]
    first, second = ranks(2).run(refused, options, by_rank=True)
    assert "seed is 1 on rank 1 and 0 on rank 0" in first
    assert "seed is 0 on rank 0 and 1 on rank 1" in second


def test_what_is_trained_must_be_stepped():
    model = nn.Linear(SIZE, 4)
    from thinrank.optim.gossip.trained import trained_parameters

    with pytest.raises(ValueError, match=r"bias is trained and not in the optimizer"):
        trained_parameters(model, torch.optim.SGD([model.weight], lr=0.1))
