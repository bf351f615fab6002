"""The loss from hidden states: every way to compute it gives what logits and torch's cross entropy give."""

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thinrank.trainers.loss import backends
from thinrank.trainers.loss.backends import Job, Unable
from thinrank.trainers.loss.chunked import Form, chunk_for, chunked
from thinrank.trainers.loss.linear import linear_cross_entropy

TOKENS, VOCABULARY, WIDTH = 11, 30, 8
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cap": {"softcap": 3.0},
    "z": {"z_loss": 1e-2},
    "all": {"scale": 0.5, "softcap": 2.0, "z_loss": 0.1},
}


def numbers(dtype=torch.float64, tokens=TOKENS, vocabulary=VOCABULARY, ignored=(3, 7)) -> tuple[Tensor, ...]:
    """Hidden states, weight, bias, labels."""
    draw = torch.Generator().manual_seed(0)
    shapes = (tokens, WIDTH), (vocabulary, WIDTH), (vocabulary,)
    floats = (torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)
    labels = torch.randint(vocabulary, (tokens,), generator=draw)
    labels[[place for place in ignored if place < tokens]] = -100
    return *floats, labels


def reference(hidden, weight, bias, labels, scale=1.0, softcap=None, z_loss=0.0) -> Tensor:
    """The loss of every token, as it is written down."""
    logits = scale * (hidden @ weight.T + bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_z = logits.exp().sum(-1).log()
    chosen = logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return (log_z - chosen + z_loss * log_z**2) * (labels != -100)


def reduced(losses: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """Of each token with a weight of its own, so that gradients of tokens cannot be mistaken for one another's."""
    if reduction == "none":
        return (losses * torch.arange(1, len(losses) + 1) / 7).sum()
    return losses.sum() * 1.5 / ((labels != -100).sum() if reduction == "mean" else 1)


def given(backend, dtype, reduction, form, **sizes):
    hidden, weight, bias, labels = numbers(dtype, **sizes)
    chunk = 4 if backend == "chunked" else None
    loss, _ = linear_cross_entropy(
        hidden, weight, labels, bias=bias, backend=backend, reduction=reduction, chunk=chunk, **form
    )
    loss = reduced(loss, labels, reduction) if reduction == "none" else loss * 1.5
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize(
    ("backend", "form"),
    [*(("chunked", form) for form in FORMS), *(("dense", form) for form in ("plain", "all")), ("torch", "plain")],
)
def test_loss_and_gradients(backend, form, reduction):
    if backend == "torch" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch 2.13 is the first to have it")
    labels = numbers()[-1]
    # of products over 8 and sums over 30 terms of about 1
    allowed = {torch.float64: 1e-12} | {low: 16 * torch.finfo(low).eps for low in (torch.float32, torch.bfloat16)}
    for dtype, rounding in allowed.items():
        hidden, weight, bias = (each.detach().double().requires_grad_() for each in numbers(dtype)[:3])
        loss = reduced(reference(hidden, weight, bias, labels, **FORMS[form]), labels, reduction)
        exact = loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))
        for found, expected in zip(given(backend, dtype, reduction, FORMS[form]), exact, strict=True):
            assert (found.double() - expected).norm() <= rounding * expected.norm()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradients_are_those_of_finite_differences(reduction):
    """A second backward pass computes them again, which is what this test asks for as well."""
    hidden, weight, bias, labels = numbers(tokens=5, vocabulary=6)

    def loss(*floats):
        options = {"scale": 0.5, "softcap": 2.0, "z_loss": 0.1, "backend": "chunked", "chunk": 2}
        return linear_cross_entropy(
            floats[0], floats[1], labels, bias=floats[2], reduction=reduction, statistics=False, **options
        )[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "chunk"), [(1, 30, 4), (5, 30, 64), (5, 2, 3), (6, 30, 3), (5, 30, None)]
)
def test_sizes_at_the_edges(tokens, vocabulary, chunk):
    hidden, weight, _, labels = numbers(tokens=tokens, vocabulary=vocabulary, ignored=())
    found, _ = linear_cross_entropy(hidden, weight, labels, backend="chunked", chunk=chunk)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    assert torch.allclose(found, expected, rtol=1e-12)
    for mine, theirs in zip(*(torch.autograd.grad(each, (hidden, weight)) for each in (found, expected)), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_without_a_label_there_is_neither_loss_nor_gradient(backend):
    hidden, weight, _, labels = numbers(ignored=range(TOKENS))
    for reduction in ("sum", "mean", "none"):
        loss, log_z = linear_cross_entropy(hidden, weight, labels, backend=backend, reduction=reduction, z_loss=0.1)
        assert not any(grad.any() for grad in torch.autograd.grad(loss.sum(), (hidden, weight)))
        assert not loss.any()
        assert log_z is not None
        assert (float(log_z.mean), float(log_z.max)) == (0.0, -torch.inf)


def test_a_mean_may_be_over_labels_elsewhere():
    hidden, weight, _, labels = numbers()
    total, _ = linear_cross_entropy(hidden, weight, labels)
    assert linear_cross_entropy(hidden, weight, labels, reduction="mean", count=5)[0] == total / 5


@pytest.mark.parametrize("backend", ["dense", "chunked", "torch"])
def test_log_z_is_that_of_the_tokens_with_a_label(backend):
    hidden, weight, bias, labels = numbers()
    _, found = linear_cross_entropy(hidden, weight, labels, bias=bias, backend=backend)
    log_z = (hidden @ weight.T + bias).logsumexp(-1)[labels != -100].float()
    assert found is not None
    assert not any(each.requires_grad for each in found)
    for mine, theirs in zip(found, (log_z.mean(), log_z.max(), log_z.square().mean()), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-6)


def test_a_tied_weight_has_both_its_gradients():
    _, weight, _, labels = numbers(ignored=())
    ids = torch.arange(TOKENS)
    loss, _ = linear_cross_entropy(F.embedding(ids, weight), weight, labels, backend="chunked", chunk=3)
    expected = F.cross_entropy(F.embedding(ids, weight) @ weight.T, labels, reduction="sum")
    assert torch.allclose(*(torch.autograd.grad(each, weight)[0] for each in (loss, expected)), rtol=1e-12, atol=1e-12)


def test_gradients_of_micro_batches_add_up_and_may_be_taken_once_more():
    hidden, weight, _, labels = numbers()
    for part in (slice(0, 6), slice(6, None)):
        linear_cross_entropy(hidden[part], weight, labels[part], backend="chunked", chunk=4)[0].backward()
    whole, _ = linear_cross_entropy(hidden, weight, labels, backend="chunked")
    first = torch.autograd.grad(whole * 0.5, weight, retain_graph=True)[0].clone()
    assert weight.grad is not None
    assert torch.allclose(first, weight.grad * 0.5, rtol=1e-12, atol=1e-12)
    assert torch.allclose(torch.autograd.grad(whole * 2, weight)[0], first * 4, rtol=1e-12, atol=1e-12)


def test_what_needs_no_gradient_costs_none(monkeypatch):
    """Neither a frozen weight's gradient nor, in evaluation, anybody's is made, and nothing is kept."""
    made = []
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda self, *a, **k: made.append(self.shape) or self)
    hidden, weight, _, labels = numbers()
    linear_cross_entropy(hidden, weight.detach(), labels, backend="chunked")[0].backward()
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, labels, backend="chunked")
    assert loss.grad_fn is None
    assert made == []
    linear_cross_entropy(hidden, weight, labels, backend="chunked")
    assert made == [weight.shape]


def test_autocast_does_not_lower_what_is_summed_up():
    """On a CPU all products stay float32, and so does a gradient whose terms bfloat16 would lose."""
    hidden, weight, _, labels = numbers(torch.float32)
    exact = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, backend="chunked")[0], (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, labels, backend="chunked")
    assert loss.dtype == torch.float32
    assert all(torch.equal(*each) for each in zip(torch.autograd.grad(loss, (hidden, weight)), exact, strict=True))


def test_no_tensor_is_as_large_as_all_logits():
    """The largest that is there is a chunk's, and there is never more than one of them."""
    from thinrank.trainers.plan.live import Live

    tokens, vocabulary = 256, 1000
    hidden, weight, _, labels = numbers(torch.float32, tokens, vocabulary)
    live = Live([hidden, weight, labels], device="cpu")
    before = live.now
    with live:
        linear_cross_entropy(hidden, weight, labels, backend="chunked", chunk=32, statistics=False)[0].backward()
    chunk, gradients = 4 * 32 * vocabulary, 4 * (weight.numel() + hidden.numel())
    assert live.peak - before < gradients + 1.1 * chunk < 4 * tokens * vocabulary / 3


def test_chunks_follow_the_larger_of_gradient_and_states():
    assert chunk_for(4096, 128_000, 4096) == 2048
    assert chunk_for(4096, 1024, 192) == 256
    assert chunk_for(100, 256_000, 64) == 64
    assert chunk_for(3, 256_000, 64) == 3


# ---- who computes it


def job(**changes) -> Job:
    form = {key: changes.pop(key) for key in ("z_loss", "softcap", "lower") if key in changes}
    return Job(**({"form": Form(**{"lower": torch.bfloat16, **form}), "device": "cuda"} | changes))


class Liger:
    """Takes what Liger's class takes, and does what it says."""

    def __init__(self, ignore_index=-100, lse_square_scale=0.0, reduction="mean", softcap=None, accum_dtype=None):
        self.options = {"ignore_index": ignore_index, "z_loss": lse_square_scale, "softcap": softcap}
        self.options["reduction"] = reduction
        assert accum_dtype is torch.float32

    def __call__(self, lin_weight, _input, target, bias=None):
        options = {"bias": bias, "backend": "dense", "statistics": False, **self.options}
        return linear_cross_entropy(_input, lin_weight, target, **options)[0]


def cce(e, c, targets, bias=None, ignore_index=-100, softcap=None, reduction="mean", filter_c_grad=True, impl="cce"):
    assert impl == "cce_kahan_full_c"
    options = {"ignore_index": ignore_index, "reduction": reduction, "softcap": softcap}
    return linear_cross_entropy(e, c, targets, bias=bias, backend="dense", statistics=False, **options)[0]


def older_cce(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, impl="cce"):
    assert impl == "cce_exact"
    return cce(e, c, targets, None, ignore_index, softcap, reduction, impl="cce_kahan_full_c")


@pytest.fixture
def installed(monkeypatch):
    """Puts functions in the place of the libraries, which need a GPU."""

    def install(**found):
        for name, function in found.items():
            module, attribute, _ = backends._KERNELS[name]
            names = module.split(".")
            for depth in range(1, len(names) + 1):
                monkeypatch.setitem(sys.modules, ".".join(names[:depth]), types.ModuleType(".".join(names[:depth])))
            setattr(sys.modules[module], attribute, function)

    for name in ("cut_cross_entropy", "liger_kernel"):
        monkeypatch.setitem(sys.modules, name, None)
    return install


def test_what_auto_takes(installed):
    assert backends.choose(job(device="cpu")) == "chunked"
    assert backends.choose(job()) == "chunked"
    if hasattr(F, "linear_cross_entropy"):
        assert backends.choose(job(lower=None)) == "torch"
    installed(liger=Liger)
    assert backends.choose(job()) == "liger"
    assert backends.choose(job(each=True)) == "chunked"
    installed(cce=cce)
    assert backends.choose(job()) == "cce"
    assert backends.choose(job(z_loss=1e-4)) == "liger"
    installed(cce=older_cce)
    assert backends.choose(job(bias=True)) == "liger"


@pytest.mark.parametrize("form", [{}, {"softcap": 3.0}, {"scale": 0.5}, {"z_loss": 0.1}], ids=str)
@pytest.mark.parametrize(("name", "function"), [("cce", cce), ("cce", older_cce), ("liger", Liger)])
def test_kernels_are_given_what_they_take(installed, monkeypatch, name, function, form):
    installed(**{name: function})
    monkeypatch.setattr(backends, "_unfit_kernel", lambda *_: None)  # this machine has no GPU
    if name == "cce" and "z_loss" in form:
        return
    hidden, weight, bias, labels = numbers(torch.float32)
    options = {"bias": None if function is older_cce else bias, "reduction": "mean", **form}
    found, expected = (
        linear_cross_entropy(hidden, weight, labels, backend=backend, **options)[0] for backend in (name, "chunked")
    )
    assert torch.allclose(found, expected, rtol=1e-6)
    for mine, theirs in zip(*(torch.autograd.grad(each, (hidden, weight)) for each in (found, expected)), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("cce", {"device": "cpu"}, "cross_entropy=cce needs a CUDA device, got cpu: use chunked"),
        ("cce", {}, r"needs cut_cross_entropy, which cannot be imported: pip install .*, or use chunked"),
        ("cce", {"z_loss": 1e-4}, "knows no z-loss: use chunked"),
        ("liger", {}, "needs liger_kernel, which cannot be imported"),
        ("torch", {"softcap": 30.0}, "knows no cap of logits: use chunked"),
        ("torch", {"z_loss": 1e-4}, "knows no z-loss"),
        ("torch", {}, "(gives the loss itself in bfloat16|needs torch 2.13)"),
    ],
)
def test_who_is_asked_for_and_cannot_says_why(installed, name, asked, said):
    with pytest.raises(Unable, match=said):
        backends.require(name, job(**asked))


def test_a_version_that_lacks_something_says_what(installed):
    installed(cce=older_cce, liger=Liger)
    with pytest.raises(Unable, match="has no bias in the installed version of linear_cross_entropy: update it"):
        backends.require("cce", job(bias=True))
    with pytest.raises(Unable, match="computes in 16 bits alone"):
        backends.require("cce", job(lower=None))


def test_torch_may_not_compute_all_logits_after_all(monkeypatch):
    """It only warns where its chunks cannot do something, and does the opposite of what was asked for."""
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch 2.13 is the first to have it")
    hidden, weight, _, labels = numbers()
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    with pytest.raises(Unable, match="computes all logits where it is traced or compiled"):
        linear_cross_entropy(hidden, weight, labels, backend="torch")
    with pytest.raises(UserWarning, match="``options`` ignored"):
        backends.CALLS["torch"](hidden, weight, None, labels, job(lower=None), None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reduction": "max"}, "reduction must be one of sum, mean, none, got 'max'"),
        ({"backend": "triton"}, "backend must be one of auto, dense, chunked, torch, cce, liger, got 'triton'"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"count": 3}, "count is what reduction='mean' divides by, got reduction='sum'"),
        ({"softcap": 0.0}, "softcap must be above 0, got 0.0"),
        ({"z_loss": -1.0}, "z_loss must be at least 0, got -1.0"),
        ({"labels": torch.zeros(TOKENS, dtype=torch.int32)}, "labels must be int64"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"must go together, got \(11, 8\), \(30, 8\) and \(3,\)"),
        ({"bias": torch.zeros(3)}, r"bias must be \(30,\), got \(3,\)"),
    ],
)
def test_bad_values_are_refused(changes, said):
    hidden, weight, _, labels = numbers()
    with pytest.raises(ValueError, match=said):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "labels": labels, **changes})


def test_products_of_16_bits_are_summed_up_in_float32(monkeypatch):
    """What runs on CUDA, with a product in its place that a CPU has; a weight's gradient that bfloat16 would stop."""
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    hidden, weight, _, labels = numbers(torch.bfloat16, tokens=64)
    form = Form(chunk=4, lower=torch.bfloat16)
    loss, _ = chunked(hidden, weight, None, labels, form, each=False)
    low = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    exact = F.cross_entropy(low[0] @ low[1].T, labels, reduction="sum")
    assert torch.allclose(loss.double(), exact, rtol=1e-6)
    grads = torch.autograd.grad(loss, (hidden, weight))
    for mine, theirs in zip(grads, torch.autograd.grad(exact, low), strict=True):
        assert (mine.double() - theirs).norm() < 4 * torch.finfo(torch.bfloat16).eps * theirs.norm()


def test_modules_give_their_weight():
    layer = nn.Linear(WIDTH, VOCABULARY)
    hidden, _, _, labels = numbers(torch.float32)
    linear_cross_entropy(hidden, layer.weight, labels, bias=layer.bias, backend="chunked")[0].backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
