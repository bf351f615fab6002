"""The ways to exchange weights, by the name that a configuration uses."""

from thinrank.optim.gossip.schemes.base import Place, Scheme, Tally
from thinrank.optim.gossip.schemes.copies import CHOCO, DCD, ECD
from thinrank.optim.gossip.schemes.demo import DeMo
from thinrank.optim.gossip.schemes.outer import DiLoCo, SparseLoCo
from thinrank.optim.gossip.schemes.plain import DPSGD
from thinrank.optim.gossip.schemes.power import PowerGossip
from thinrank.optim.gossip.schemes.quantised import AllReduce
from thinrank.optim.gossip.schemes.squeeze import DeepSqueeze

_CLASSES: tuple[type[Scheme], ...] = (
    DPSGD,
    DCD,
    ECD,
    CHOCO,
    DeepSqueeze,
    PowerGossip,
    DiLoCo,
    SparseLoCo,
    DeMo,
    AllReduce,
)
SCHEMES: dict[str, type[Scheme]] = {each.NAME: each for each in _CLASSES}


def scheme_class(name: str) -> type[Scheme]:
    """The class of that name, or a ValueError that names all."""
    if name not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {name!r}: choose one of them")
    return SCHEMES[name]


__all__ = [
    "CHOCO",
    "DCD",
    "DPSGD",
    "ECD",
    "SCHEMES",
    "AllReduce",
    "DeMo",
    "DeepSqueeze",
    "DiLoCo",
    "Place",
    "PowerGossip",
    "Scheme",
    "SparseLoCo",
    "Tally",
    "scheme_class",
]
