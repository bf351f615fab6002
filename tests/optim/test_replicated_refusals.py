"""What replicas refuse, and what they say of methods that need whole gradients."""

import logging

import pytest
import torch
import torch.distributed as dist
from cases import CONFIGS, small
from test_replicated import loss, mine, seeded_model
from torch import nn

from thinrank.optim import GaLore, build
from thinrank.optim.owned import own
from thinrank.optim.replicated import replicate


def refusals():
    """The sentence of every misuse, by name."""
    config = small("galore", svd="power")
    said = {}

    def note(name, function):
        try:
            function()
        except (RuntimeError, ValueError) as error:
            said[name] = str(error)

    def twice():
        model = nn.Linear(4, 4)
        optimizer = build(model, config)
        replicate(model, optimizer)
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()

    def after_the_norm():
        model = seeded_model()
        optimizer = build(model, config)
        replicate(model, optimizer, overlap=False)
        loss(model, 0, *mine()).backward()
        optimizer.gradient_norm()
        loss(model, 1, *mine()).backward()

    def other_models():
        model = nn.Linear(4, 4 + dist.get_rank(), bias=False)
        replicate(model, build(model, config))

    def other_names():
        model = nn.Sequential(*[nn.Linear(4, 4)] * (1 + dist.get_rank()), nn.ReLU())
        replicate(model, GaLore(model.named_parameters() if dist.get_rank() else model.parameters(), rank=2))

    def in_ddp():
        model = nn.Linear(4, 4)
        replicate(nn.parallel.DistributedDataParallel(model), build(model, config))

    def in_backward_after():
        optimizer = build(seeded_model(), config)
        optimizer.replicate()
        optimizer.in_backward("project")

    def in_backward_of_ddp():
        build(seeded_model(), config).in_backward("step")

    def ranks_by_gradients():
        build(seeded_model(), small("galore", rank_allocation="gradient")).replicate()

    def ranks_by_gradients_later():
        optimizer = build(seeded_model(), config)
        optimizer.replicate()
        optimizer.allocate_ranks("gradient")

    def sparse():
        model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 4))
        optimizer = build(model, config)
        replicate(model, optimizer)
        model(torch.arange(3)).sum().backward()

    def unfrozen():
        model = seeded_model()
        optimizer = GaLore(model.named_parameters(), rank=2)
        replicate(model, optimizer)
        model.frozen.requires_grad_(True)
        loss(model, 0, *mine()).backward()
        optimizer.step()

    def no_such_messages():
        build(seeded_model(), config).replicate(messages="ful")

    def never_is_none():
        build(seeded_model(), config).replicate(check_every=0)

    for function in (
        twice, after_the_norm, other_models, other_names, in_ddp, in_backward_after,
        in_backward_of_ddp, ranks_by_gradients, ranks_by_gradients_later, sparse,
        unfrozen, no_such_messages, never_is_none,
    ):  # fmt: skip
        note(function.__name__, function)
    return said


def test_misuse_is_answered_with_the_remedy(ranks):
    wanted = {
        "twice": "set optimizer.accumulating = True during every backward but the last",
        "after_the_norm": "set optimizer.accumulating = True during every backward but the last",
        "other_models": "weight differs between rank",
        "other_names": "differs between rank",
        "in_ddp": "give the module inside it",
        "in_backward_after": "use mode 'off'",
        "in_backward_of_ddp": "leave it 'off', and call replicate",
        "ranks_by_gradients": "use rank_allocation='weight'",
        "ranks_by_gradients_later": "use spectra='weight'",
        "sparse": "use sparse=False",
        "unfrozen": "frozen.weight has a gradient, and was frozen or not there",
        "no_such_messages": "did you mean 'full'?",
        "never_is_none": "check_every must be at least 1 step",
    }
    for said in ranks(2).run(refusals):
        assert said.keys() == wanted.keys()
        assert all(sentence in said[name] for name, sentence in wanted.items()), said


def replicas_in_backward():
    optimizer = build(seeded_model(), CONFIGS["galore/power"])
    optimizer.in_backward("step")
    try:
        optimizer.replicate()
    except ValueError as error:
        return str(error)
    return ""


def test_gradients_that_are_gone_do_not_meet(ranks):
    assert "use mode 'off'" in ranks(1).run(replicas_in_backward)[0]


def test_replicas_need_a_process_group():
    model = seeded_model()
    with pytest.raises(RuntimeError, match="init_process_group before"):
        replicate(model, build(model, small("galore")))


def told(config, join=replicate):
    with_log = []
    handler = logging.Handler()
    handler.emit = lambda record: with_log.append(record.getMessage())
    log = logging.getLogger("thinrank.optim.replicated")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    model = seeded_model()
    join(model, build(model, config))
    log.removeHandler(handler)
    return with_log


@pytest.mark.parametrize(
    ("config", "because"),
    [
        (small("fira"), "because its update is as large as the gradient"),
        (small("muon"), "because its step reads the gradient itself"),
        (small("dct_adamw", error_feedback="8bit", update_proj_gap=1), "set update_proj_gap above 1"),
        (small("dct_adamw", error_feedback="8bit"), None),
        (small("ldadam"), None),
        (small("galore", svd="power", update_proj_gap=1), "set update_proj_gap above 1"),
        (small("galore", svd="power", update_proj_gap=1, lazy_overlap=0.5), None),
        (small("galore", svd="power"), None),
        (small("adamw"), None),
    ],
    ids=str,
)
def test_a_method_that_needs_whole_gradients_says_why(ranks, config, because):
    said = ranks(2).run(told, config)[0]
    assert (because is None and not said) or (len(said) == 1 and because in said[0])


def test_owners_are_given_whole_gradients_where_replicas_remember_apart(ranks):
    (sentence,) = ranks(2).run(told, small("dion"), own)[0]
    assert "because its step reads the gradient itself" in sentence
