"""A causal language model's loss from its last hidden states: its own forward pass, with a loss where its logits were.

The pass goes through the modules' own calls, the model's, its body's and its output layer's, and only what two of them
do inside is exchanged while it lasts. So whatever hangs on the calls still runs: FSDP2 gathers the root's weights and
learns when backward begins, ZeRO-3 gathers the output layer's and lets go of them, adapters change what they change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thinrank.trainers.loss.linear import LogZ, linear_cross_entropy


class Unfit(ValueError):
    """Why the logits of a model cannot be left out."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """Where a model's logits come from: `softcap(scale · (W h + b))` of what its body gives.

    Attributes:
        model: the causal language model itself, inside of whatever is around it.
        body: the part of it that gives hidden states.
        layer: its output layer, a plain linear one, whose weight may be the embedding's.
        scale: of the logits.
        softcap: of the scaled logits; None: none.
    """

    model: nn.Module
    body: nn.Module
    layer: nn.Linear
    scale: float
    softcap: float | None


def head_of(network: nn.Module) -> Head:
    """Looks for the output layer, and asks the model's own forward pass what it does before and after it.

    Body and layer are exchanged for known numbers for that, so that nothing is computed and no weight is read.

    Raises:
        Unfit: with the cause, which ends a sentence "… cannot leave logits out: …".
    """
    model = next((each for each in network.modules() if _layer(each) is not None), None)
    if model is None:
        raise Unfit("the model has no get_output_embeddings() that says which its output layer is")
    layer = _layer(model)
    assert layer is not None
    if type(layer).forward is not nn.Linear.forward:
        raise Unfit(f"its output layer is a {type(layer).__name__}, which is more than a product with one weight")
    assert isinstance(layer, nn.Linear)
    config: Any = getattr(model, "config", None)
    divisor, factor = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
    scale = 1 / float(divisor) if divisor else float(factor) if factor else 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    causes = [f"{type(model).__name__} has no base_model that gives hidden states"]
    for body in _bodies(model):
        head = Head(model=model, body=body, layer=layer, scale=scale, softcap=softcap)
        try:
            _prove(head)
        except Unfit as error:
            causes.insert(0, str(error))
        else:
            return head
    raise Unfit(causes[0])


def _bodies(model: Any) -> list[nn.Module]:
    """What may give the states: all that is below the output layer, or (OPT) the decoder in it."""
    decoder = getattr(model, "get_decoder", None)
    found = (getattr(model, "base_model", None), decoder() if callable(decoder) else None)
    return [body for body in dict.fromkeys(found) if isinstance(body, nn.Module) and body is not model]


def head_loss(network: nn.Module, head: Head, input_ids: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Any]:
    """Loss and log Z of token ids (B, L) and labels (B, L), as `linear_cross_entropy` gives them with `options`.

    Args:
        network: what is called: the model of `head`, or what is around it.
        head: of `head_of(network)`.

    Raises:
        ValueError: as `linear_cross_entropy`.
    """

    def at_layer(hidden: Tensor) -> tuple[Tensor, ...]:
        layer = head.layer
        given = {"bias": layer.bias, "scale": head.scale, "softcap": head.softcap, **options}
        loss, log_z = linear_cross_entropy(hidden, layer.weight, labels, **given)
        return (loss, *(log_z or ()))  # tensors in a tuple are what hooks of frameworks know how to go through

    def whole(input_ids: Tensor | None = None, **_: Any) -> tuple[Tensor, ...]:
        return head.layer(head.body(input_ids=input_ids, use_cache=False).last_hidden_state)

    with _doing(head.model, whole), _doing(head.layer, at_layer):
        loss, *log_z = network(input_ids=input_ids, use_cache=False)
    return loss, LogZ(*log_z) if log_z else None


def _layer(module: nn.Module) -> nn.Module | None:
    getter = getattr(module, "get_output_embeddings", None)
    # an adapter's wrapper passes the question on to the model inside of it, which is a module of its own
    if not callable(getter) or getattr(getter, "__self__", module) is not module:
        return None
    found = getter()
    return found if isinstance(found, nn.Module) else None


@contextmanager
def _doing(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` does `forward` when it is called, hooks around it as ever."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class _States:
    """What a body returns, of whatever class: hidden states, and nothing else."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, key: Any) -> Any:
        return (self.last_hidden_state,)[key]


@torch.no_grad()
def _prove(head: Head) -> None:
    """Raises `Unfit` unless the model's logits are what `head` says."""
    layer, device = head.layer, head.layer.weight.device
    if device.type == "meta":
        device = torch.device("cpu")
    states = torch.linspace(-1, 1, 2 * layer.in_features, device=device).view(1, 2, -1).to(layer.weight.dtype)
    # as wide as logits come, so that a cap shows
    logits = torch.linspace(-60, 60, 2 * layer.out_features, device=device).view(1, 2, -1)
    seen: list[Tensor] = []

    def at_layer(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return logits.clone()

    kind = type(head.model).__name__
    with _doing(head.body, lambda *_, **__: _States(states)), _doing(layer, at_layer):
        try:
            ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
            found = head.model(input_ids=ids, use_cache=False).logits
        except Exception as error:  # whatever an architecture asks of its own parts: told, not hidden
            raise Unfit(f"{kind} does not only hand hidden states on ({type(error).__name__}: {error})") from error
    if len(seen) != 1 or seen[0].shape != states.shape or not torch.equal(seen[0], states):
        raise Unfit(f"{kind} changes hidden states between its body and its output layer")
    expected = logits * head.scale
    if head.softcap is not None:
        expected = head.softcap * torch.tanh(expected / head.softcap)
    eps = torch.finfo(found.dtype).eps
    if found.shape != expected.shape or not torch.allclose(found.float(), expected, rtol=8 * eps, atol=8 * eps):
        raise Unfit(f"{kind} does more to its logits than to scale and to cap them")
