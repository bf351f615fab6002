"""DeMo: momentum stays on its rank, and what moves fastest of it is shared (Peng, Quesnelle and Kingma 2024)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from thinrank.optim.gossip.compress import Codec, Dct
from thinrank.optim.gossip.compress.dct import DctCodec
from thinrank.optim.gossip.compress.sparse import VALUES, read_places, read_values, write_places
from thinrank.optim.gossip.mail import as_bytes
from thinrank.optim.gossip.rounds import Step
from thinrank.optim.gossip.schemes.alike import Alike
from thinrank.optim.gossip.schemes.base import Place, require

STEPS = ("sign", "mean")


class DeMo(Alike):
    """Δ ← β Δ + u,  T = the k largest coefficients of each chunk of Δ's cosine transform,  Δ ← Δ − T,  x ← x + step(G).

    G has at each place of a chunk the mean over those ranks that have sent a coefficient of that place. Weights are the
    same on all ranks; Δ is each one's own. A coefficient that one rank alone has sent counts as if all had: ranks must
    have data of one kind, or else find the minimum of none.

    u takes the place of −η g: the inner optimizer should be SGD without momentum and weight decay of its own, which is
    what Δ is for. In the paper x moves by η sign(G). A scheme is not told η; so without `lr` a tensor's signs are
    multiplied by the mean of its |G|, which moves it as far in sum and follows whatever schedule η has. Ours.

    All ranks take part, whatever the topology: n − 1 messages of each, so up to some 32 ranks. A rank with an update
    that is not finite sends none, and keeps its Δ.

    Args:
        decay: β, in [0, 1).
        step: `sign`, or `mean` for G itself.
        lr: η of `sign`; None: see above.
    """

    NAME = "demo"
    USUAL = "dct"

    def __init__(
        self, place: Place, codec: Codec, *, decay: float = 0.999, step: str = "sign", lr: float | None = None
    ) -> None:
        super().__init__(place, codec)
        require("decay", decay, lambda x: 0.0 <= x < 1.0, "in [0, 1)", "use 0.999")
        if step not in STEPS:
            raise ValueError(f"step must be {' or '.join(STEPS)}, got {step!r}: leave it out for the paper's sign")
        if lr is not None:
            require("lr", lr, lambda x: 0.0 < x < float("inf"), "above 0 and finite", "leave it out to follow updates")
        if not isinstance(codec, DctCodec):
            raise ValueError("demo shares coefficients of cosine transforms: use compressor=dct")
        self.decay, self.moves, self.lr = decay, step, lr
        self.sparse = codec
        self.whole = Dct(chunk=codec.chunk, k=codec.chunk**2, values="float32").bind(codec.shapes)
        self.sizes = [torch.Size(shape).numel() for shape in codec.shapes]
        chunks = [(part.rows * part.columns, part.keep) for part in codec.parts for _ in range(part.down * part.across)]
        sizes, keeps = (torch.tensor(column, dtype=torch.int64) for column in zip(*chunks, strict=True))
        starts = sizes.cumsum(0) - sizes
        self._starts = starts.repeat_interleave(keeps)  # where the chunk of each coefficient that is sent begins
        self._places = torch.arange(int(sizes.sum())) - starts.repeat_interleave(sizes)
        self._slow: Tensor | None = None  # Δ

    def start(self, weights: Tensor) -> None:
        self._slow = torch.zeros_like(weights)

    def _step(self, weights: Tensor, update: Tensor, good: bool) -> Step:
        assert self._slow is not None, "start comes before the first step"
        payload = torch.zeros(self.codec.nbytes, dtype=torch.uint8, device=weights.device)
        if good:
            slow = self._slow.mul(self.decay).add_(update)
            payload = self.codec.encode(slow, self.key())
            told = self.codec.decode(payload, self.key())
            self.tally.error.add(slow, told)
            self._slow = slow.sub_(told)
        payloads = yield from self.gathered(payload, good)
        return (yield from self.agreed(weights + self._stepped(self._mean(list(payloads.values()), weights.device))))

    def _mean(self, payloads: list[Tensor], device: torch.device) -> Tensor:
        """G, from every rank's coefficients, of which each place occurs once at most."""
        self._starts, self._places = self._starts.to(device), self._places.to(device)
        total = torch.zeros(self._places.numel(), device=device)
        count = torch.zeros_like(total)
        size = self.sparse.kept * VALUES[self.sparse.values].itemsize
        for payload in payloads:
            place = self._starts + read_places(payload[size:].clone())
            total[place] += read_values(payload[:size].clone(), self.sparse.values)
            count[place] += 1.0
        dense = torch.empty(self.whole.nbytes, dtype=torch.uint8, device=device)
        values, places = dense[: total.nbytes], dense[total.nbytes :]
        values.copy_(as_bytes(total.div_(count.clamp_(min=1.0))))
        write_places(self._places, places)
        return self.whole.decode(dense, 0)

    def _stepped(self, mean: Tensor) -> Tensor:
        if self.moves == "mean":
            return mean
        parts = [x.sign().mul_(x.abs().mean() if self.lr is None else self.lr) for x in mean.split(self.sizes)]
        return torch.cat(parts)

    def state(self) -> dict[str, Tensor]:
        return {} if self._slow is None else {"slow": self._slow}

    def load(self, state: Mapping[str, Tensor], steps: int) -> None:
        super().load(state, steps)
        self._slow = state.get("slow")
