"""What a run says before it begins: on what it trains what, by which rules, and what travels."""

from __future__ import annotations

from lightning.pytorch.loggers import TensorBoardLogger

from thinrank.optim.gossip.parts import expected, graph_of
from thinrank.optim.lowrank.remainder import leaves_remainder, remembers_untold
from thinrank.optim.messages import COARSE, UNUSED_FEEDBACK, whole_messages_because
from thinrank.optim.rule import MatrixRule, remembers
from thinrank.trainers.ending import say
from thinrank.trainers.parts import Parts
from thinrank.trainers.plan.precision import emulated
from thinrank.trainers.strategies import FSDP2Config, GossipConfig, ReplicatedConfig


def introduce(parts: Parts, *, cuda: bool) -> None:
    """What is about to be done, on the terminal and in TensorBoard."""
    world, plan, routing = parts.world, parts.plan, parts.routing
    if not world.main:
        return
    data = parts.data
    partly = routing.elements() != parts.parameters
    trained = f", of which {routing.elements():,} are trained" if partly else ""
    tokens = (
        f"{data.train_tokens:,} training tokens" if data.train_tokens is not None else "a stream of training tokens"
    )
    say(world, f"run folder  {parts.folder.path}")
    say(world, f"model       {parts.config.model.name}, {parts.parameters:,} parameters{trained}")
    say(world, f"data        {parts.config.data.name}, {tokens}, vocabulary {data.vocab_size:,}")
    say(
        world,
        f"steps       {plan.steps:,} of {plan.tokens_per_step:,} tokens "
        f"({world.size} × {plan.accumulate} × {plan.micro_batch} sequences)",
    )
    if parts.job.conversion is not None:
        say(world, parts.job.conversion.table())
    say(world, routing.table())
    if (exchange := _exchange(parts)) is not None:
        say(world, f"exchange    {exchange}")
    precision = parts.config.trainer.precision
    slow = (
        ", slow on this processor: trainer.precision=32-true is faster here" if emulated(precision, cuda=cuda) else ""
    )
    say(world, f"precision   {precision}{slow}")
    if (
        remembers_untold(parts.config.optimizer.matrix_rule())
        and getattr(parts.config.strategy, "messages", "") not in COARSE
    ):
        say(world, f"feedback    optimizer.sign_feedback {UNUSED_FEEDBACK}")
    if parts.resume is not None:
        done = "; nothing is left to do but the end" if parts.start >= plan.steps else ""
        say(world, f"resuming from step {parts.start:,} ({parts.resume.name}){done}")
    for logger in parts.trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("routing", f"```\n{routing.table()}\n```", parts.start)


def _exchange(parts: Parts) -> str | None:
    """What travels between the ranks at every step, in words."""
    strategy, rule = parts.config.strategy, parts.config.optimizer.matrix_rule()
    if isinstance(strategy, GossipConfig):
        graph, shapes = graph_of(strategy.made_topology(), parts.world.size), parts.routing.shapes()
        return expected(graph, strategy.scheme, strategy.made_compressor(), shapes, strategy.scheme_options).sentence
    if isinstance(strategy, FSDP2Config) and (parts.shards > 1 or strategy.messages == "auto"):
        near = f"rows of weights and gradients among {parts.shards} ranks"
        if rule is not None:
            near += "; sums for matrices that are stepped by rows; gradients and updates of those that have an owner"
        return near if strategy.messages == "full" else f"{near}; between {strategy.replicas} replicas {_afar(rule)}"
    if parts.world.size == 1 or not isinstance(strategy, ReplicatedConfig):
        return None
    if rule is None:
        return "whole gradients: this method has no subspace"
    if strategy.messages in COARSE and leaves_remainder(rule):
        return "coordinates and signs of matrices between renewals; gradients at renewals, and of everything else"
    cause = whole_messages_because(rule, apart=strategy.name == "thinrank_ddp")
    cause = "strategy.messages=full asks for it" if strategy.messages == "full" else cause
    if cause is not None:
        return f"whole gradients, because {cause}"
    if remembers(rule):
        return "small factors of updates of matrices, of which each rank remembers its own part; other gradients"
    return "coordinates of matrices between renewals; gradients at renewals, and of everything else"


def _afar(rule: MatrixRule | None) -> str:
    """What replicas of sharded models exchange."""
    cause = "this method has no subspace" if rule is None else whole_messages_because(rule, apart=False)
    if cause is not None:
        return f"whole gradients of pieces, because {cause}"
    return "coordinates of matrices that are stepped by rows; gradients of pieces at renewals, and of everything else"
