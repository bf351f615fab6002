"""A program that ranks execute under torchrun: exchange of weights in whole runs and in a user's own module."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from tiny_pretrain import config, leave, signalled_at
from tiny_replicas import Broken, fit

from thinrank.optim import AdamWConfig, GaLoreConfig
from thinrank.trainers import GossipConfig, GossipStrategy, NonFiniteGuard
from thinrank.trainers.pretrain import pretrain
from thinrank.trainers.strategies.world import gathered

SGD = {"optimizer": lambda module: torch.optim.SGD(module.parameters(), lr=0.1)}
PARTS = {"max_steps": 12, "batch_size": 8, "checkpoint_every": 5, "micro_batch_size": 2}
METHOD = GaLoreConfig(rank=4, svd="power", update_proj_gap=7, lr=0.01)
CHOCO = GossipConfig(check_every=4)
DCD = GossipConfig(scheme="dcd", compressor="uniform8", interval=2, check_every=2)


def interrupted(base, name, strategy, at, **settings):
    """A run that is told to stop after `at` steps, and goes on."""
    undo = signalled_at(at, rank=0, batch=8)  # ranks agree a step later
    pretrain(config(base, name, strategy=strategy, **settings))
    undo()
    return pretrain(config(base, name, strategy=strategy, **settings))["run"]


def main(base):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    settings = {"optimizer": METHOD, **PARTS}
    pretrain(config(base, "choco whole", strategy=CHOCO, **settings))
    goes_on = interrupted(base, "choco parts", CHOCO, 6, **settings)
    pretrain(config(base, "dcd whole", strategy=DCD, **settings))
    interrupted(base, "dcd parts", DCD, 6, **settings)  # between two exchanges
    local = GossipConfig(evaluate="local", topology="complete", scheme="dpsgd", scheme_options={"order": "then"})
    pretrain(config(base, "local", strategy=local, **settings))
    half = {**settings, "optimizer": AdamWConfig(lr=0.01, half_weights="master"), "precision": "bf16-true"}
    pretrain(config(base, "half", strategy=CHOCO, **half))

    undo = signalled_at(6, rank=0, batch=8)
    pretrain(config(base, "other", strategy=CHOCO, **settings))
    undo()
    dist.barrier()
    if rank == 0:  # what one process, and another exchange, will go on from
        shutil.copytree(Path(base) / "other", Path(base) / "alone")
    dist.barrier()
    pretrain(config(base, "other", strategy=GossipConfig(scheme="ecd"), **settings))

    parallel = {"rank": rank, "world": 2, "devices": 2}
    by_name = fit(SGD["optimizer"], **parallel, accumulate=2, strategy="thinrank_gossip")
    mean = GossipStrategy(topology="complete", scheme="dpsgd", scheme_options={"order": "then"})
    exact = fit(SGD["optimizer"], **parallel, accumulate=2, strategy=mean)
    guard = NonFiniteGuard()
    strategy = GossipStrategy(scheme="dcd", check_every=2)
    skipping = fit(SGD["optimizer"], **parallel, kind=Broken, callbacks=[guard], strategy=strategy)
    assert strategy.exchange is not None
    facts = {
        "resumed_from": goes_on["resumed_from"],
        "by name": type(by_name.trainer.strategy).__name__,
        "skipped": gathered(guard.skipped),
        "finite": gathered(all(bool(p.isfinite().all()) for p in skipping.parameters())),
        "repaired": gathered(strategy.exchange.measured()["repaired"]),
    }
    ends = gathered({name: p.detach() for name, p in by_name.state_dict().items()})
    if rank == 0:
        torch.save([ends, exact.state_dict()], Path(base) / "own.pt")
        (Path(base) / "result.json").write_text(json.dumps(facts))
    leave()


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == "2"
    main(sys.argv[1])
