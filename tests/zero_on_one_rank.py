"""A program: ten steps of every method under each stage of ZeRO, with one rank on a device, beside a process without.

    python tests/zero_on_one_rank.py cpu apart.json

What it writes: by stage and method, the norm of how far the weights are from those of the process without, in units of
how far these have moved; of all weights the largest.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed compiles a function of Muon's: half a minute of imports

import torch
import torch.distributed as dist
from test_gpu import batches, network, train

from thinrank.optim import METHODS, MethodConfig, build
from thinrank.trainers import zero

STEPS = 10


def under_zero(config: MethodConfig, stage: int, device: str) -> dict[str, torch.Tensor]:
    model = network(device)
    settings = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_optimization": {"stage": stage}}
    run = zero.initialize(model, build(model, config), settings)
    for x in batches(STEPS, device):
        with zero.quiet_deepspeed():
            run.engine.backward(run.engine(x).square().mean())
            run.engine.step()
    found = run.weights()
    run.release()
    return found


def apart(config: MethodConfig, stage: int, device: str) -> float:
    model = network(device)
    start = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    train(model, build(model, config), STEPS, device)
    found, distances = under_zero(config, stage, device), []
    for name, value in model.state_dict().items():
        alone = value.cpu()
        distances.append(float((found[name] - alone).norm() / (alone - start[name]).norm()))
    return max(distances)


def main(device: str, out: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        zero.load_deepspeed().utils.logging.logger.setLevel("ERROR")
        found = {
            f"{stage} {name}": apart(config(), stage, device) for stage in (1, 2, 3) for name, config in METHODS.items()
        }
        dist.destroy_process_group()
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
