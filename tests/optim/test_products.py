"""Float32 products by oneDNN: where, how exactly, and what a step of a wide matrix copies."""

from __future__ import annotations

import pytest
import torch
from laws import seeded
from torch import nn
from torch.profiler import ProfilerActivity, profile

from thinrank.optim import Fira, GaLorePlus, Muon
from thinrank.optim.linalg import products
from thinrank.optim.linalg.products import ROUNDING, UNSET, fast_products, largest_error, pays, processor, product

CPU = torch.device("cpu")
SETTING = torch.backends.mkldnn.matmul
METHODS = {
    "galore_plus": lambda params: GaLorePlus(params, rank=8, density=0.05, warmup=0),
    "galore_plus/no entries": lambda params: GaLorePlus(params, rank=8, density=0.0),
    "fira": lambda params: Fira(params, rank=8, svd="power"),
    "muon": lambda params: Muon(params, lr=0.01),
}


@pytest.fixture(autouse=True)
def _as_it_was():
    """Every test finds torch's default and must leave it."""
    assert SETTING.fp32_precision == UNSET
    pays.cache_clear()
    yield
    pays.cache_clear()
    left, SETTING.fp32_precision = SETTING.fp32_precision, UNSET
    assert left == UNSET


@pytest.fixture
def switched(monkeypatch):
    """The switch is used, whatever this machine is."""
    monkeypatch.setattr(products, "pays", lambda: True)


def machine(monkeypatch, vendor: str = "AuthenticAMD", flags: str = "avx2 avx512f", error: float = 3e-7) -> None:
    monkeypatch.setattr(products, "processor", lambda: (vendor, frozenset(flags.split())))
    monkeypatch.setattr(products, "largest_error", lambda: error)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_it_pays_on_processors_for_which_mkl_is_slow(monkeypatch):
    machine(monkeypatch)
    assert pays()


@pytest.mark.parametrize(
    "other",
    [
        {"vendor": "GenuineIntel"},
        {"vendor": ""},
        {"flags": "avx512f amx_tile amx_bf16"},
        {"error": 4e-3},
        {"error": 3e-4},
        {"error": float("nan")},
    ],
    ids=["intel", "unknown", "amx", "bfloat16", "tf32", "no number"],
)
def test_it_does_not_pay_elsewhere(monkeypatch, other):
    machine(monkeypatch, **other)
    assert not pays()
    with fast_products(CPU):
        assert SETTING.fp32_precision == UNSET


@pytest.mark.parametrize("library", ["mkl", "mkldnn"])
def test_it_does_not_pay_where_torch_lacks_one_of_the_libraries(monkeypatch, library):
    machine(monkeypatch)
    monkeypatch.setattr(getattr(torch.backends, library), "is_available", lambda: False)
    assert not pays()


def test_products_are_tried_once_in_a_process_and_with_the_switch_on(monkeypatch):
    machine(monkeypatch)
    seen = []

    def look() -> float:
        seen.append(SETTING.fp32_precision)
        return 0.0

    monkeypatch.setattr(products, "largest_error", look)
    for _ in range(3):
        with fast_products(CPU):
            assert SETTING.fp32_precision == "bf16"
    assert seen == ["bf16"]


def test_a_processor_is_known_by_its_maker_and_its_instructions(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text(
        "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f\n\n"
        "processor\t: 1\nvendor_id\t: Other\nflags\t\t: amx_tile\n"
    )
    assert processor(str(file)) == ("AuthenticAMD", frozenset({"fpu", "avx2", "avx512f"}))
    assert processor(str(tmp_path / "missing")) == ("", frozenset())


def test_what_is_tried_tells_float32_from_less():
    assert largest_error() <= ROUNDING
    exact = torch.Tensor.__matmul__

    def coarse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return exact(a, b) if a.dtype == torch.float64 else exact(a.bfloat16().float(), b.bfloat16().float())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", coarse)
        assert largest_error() > 100 * ROUNDING


# --- the setting ------------------------------------------------------------------------------------------------------


def test_the_setting_is_put_back(switched):
    with fast_products(CPU):
        assert SETTING.fp32_precision == "bf16"
        with fast_products(CPU):
            assert SETTING.fp32_precision == "bf16"
        assert SETTING.fp32_precision == "bf16"
    assert SETTING.fp32_precision == UNSET
    with pytest.raises(RuntimeError, match="within"), fast_products(CPU):
        raise RuntimeError("within")
    assert SETTING.fp32_precision == UNSET
    assert torch.get_float32_matmul_precision() == "highest"  # torch's older setting has not noticed


@pytest.mark.parametrize("choice", ["ieee", "tf32", "bf16"])
def test_a_choice_of_the_user_stays(switched, choice):
    SETTING.fp32_precision = choice
    try:
        with fast_products(CPU):
            assert SETTING.fp32_precision == choice
        assert SETTING.fp32_precision == choice
    finally:
        SETTING.fp32_precision = UNSET


def test_a_choice_for_all_of_torch_stays(switched):
    torch.backends.fp32_precision = "ieee"
    try:
        with fast_products(CPU):
            assert SETTING.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = UNSET


def test_a_gpu_is_none_of_its_business(switched):
    with fast_products(torch.device("cuda")):
        assert SETTING.fp32_precision == UNSET


# --- the step ---------------------------------------------------------------------------------------------------------


def model(wide: bool) -> tuple[nn.Parameter, torch.Tensor]:
    weight, grad = seeded(160, 96, seed=1), seeded(160, 96, seed=2)
    return nn.Parameter((weight.mT if wide else weight).contiguous()), (grad.mT if wide else grad).contiguous()


def exact() -> bool:
    """Whether oneDNN's products are float32's here; not with AMX."""
    SETTING.fp32_precision = "bf16"
    try:
        return largest_error() <= ROUNDING
    finally:
        SETTING.fp32_precision = UNSET


def after(method: str, *, wide: bool, steps: int = 3) -> torch.Tensor:
    param, grad = model(wide)
    optimizer = METHODS[method]([param])
    for i in range(steps):
        param.grad = grad * (1.0 + i)
        optimizer.step()
    return param.detach().mT if wide else param.detach()


@pytest.mark.parametrize("method", list(METHODS))
def test_a_step_is_the_same_to_rounding(monkeypatch, method):
    results = {}
    for on, rule in ((False, lambda: False), (True, exact)):
        monkeypatch.setattr(products, "pays", rule)
        results[on] = after(method, wide=False)
    start = model(wide=False)[0].detach()
    moved = torch.linalg.norm(results[False] - start)
    assert torch.linalg.norm(results[True] - results[False]) <= 1e-4 * moved


@pytest.mark.parametrize("method", [name for name in METHODS if name != "muon"])  # whose scale is for the stored shape
def test_a_wide_matrix_is_stepped_as_its_transpose(monkeypatch, method):
    monkeypatch.setattr(products, "pays", exact)
    start = model(wide=False)[0].detach()
    tall, wide = after(method, wide=False), after(method, wide=True)
    assert torch.linalg.norm(wide - tall) <= 1e-4 * torch.linalg.norm(tall - start)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_step_uses_the_switch_and_puts_it_back(switched, method):
    param, grad = model(wide=True)
    optimizer = METHODS[method]([param])
    param.grad, seen = grad, []
    rule_of = type(optimizer).rules

    def rules(self, group, section=0, rank=None):
        rule, element = rule_of(self, group, section, rank)
        return (None if rule is None else Watched(rule)), element

    class Watched:
        def __init__(self, rule):
            self.rule = rule

        def update(self, *args):
            seen.append(SETTING.fp32_precision)
            return self.rule.update(*args)

        def __getattr__(self, name):
            return getattr(self.rule, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(optimizer), "rules", rules)

        def closure():
            seen.append(SETTING.fp32_precision)
            return 0.0

        optimizer.step(closure)
    assert seen == [UNSET, "bf16"]  # a closure's model is the user's affair


def test_gradients_taken_in_backward_use_it_too(switched, monkeypatch):
    param, grad = model(wide=True)
    optimizer = METHODS["galore_plus"]([param])
    optimizer.in_backward("project")
    seen, bmm = [], torch.bmm

    def watched(*args):
        seen.append(SETTING.fp32_precision)
        return bmm(*args)

    monkeypatch.setattr(torch, "bmm", watched)
    (param * grad).sum().backward()
    optimizer.step()
    assert set(seen) == {"bf16"}
    optimizer.in_backward("off")


@pytest.mark.parametrize("method", ["galore_plus", "galore_plus/no entries", "fira"])
@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
def test_no_step_copies_the_gradient(method, wide):
    param, grad = model(wide)
    optimizer = METHODS[method]([param])
    param.grad = grad
    SETTING.fp32_precision = "bf16"  # the user's choice here: oneDNN, whatever this machine is
    try:
        optimizer.step()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            optimizer.step()
    finally:
        SETTING.fp32_precision = UNSET
    events = seen.events()
    assert events is not None
    copies = [e.input_shapes[0] for e in events if e.name == "aten::copy_" and e.input_shapes]
    assert not [shape for shape in copies if sorted(shape[-2:]) == [96, 160]]


def test_a_product_is_the_operator_s():
    a, b = seeded(2, 5, 4), seeded(2, 4, 3, seed=1)
    torch.testing.assert_close(product(a, b), a @ b)
    torch.testing.assert_close(product(a[:1].mT.contiguous().mT, b[:1]), a[:1] @ b[:1])
    torch.testing.assert_close(product(a, b[0]), a @ b[0])
    torch.testing.assert_close(product(a[0], b[0]), a[0] @ b[0])
