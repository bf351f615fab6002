"""However an update is applied, the weight gets `keep·weight − step·update`."""

import pytest
import torch
from laws import seeded

from thinrank.optim.update import Columns, Entries, Update

LONG, SHORT, R = 9, 6, 3
COLUMNS = Columns(index=torch.tensor([[4, 0, 1], [2, 3, 5]]), short=SHORT)


def expected(update, weights, keep, step):
    """The definition, in float64."""
    basis = update.basis
    if isinstance(basis, Columns):
        basis = torch.eye(SHORT)[basis.index].mT
    full = update.direction.double() @ basis.double().mT
    if update.rest is not None:
        full = full + (1.0 if update.rows is None else update.rows.double()) * update.rest.double()
    return full, keep * weights.double() - step * full


@pytest.mark.parametrize("parts", ["factors", "rest", "rows", "columns"])
@pytest.mark.parametrize("keep", [1.0, 0.9])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16], ids=["fp32 factors", "bf16 factors"])
def test_every_way_of_applying_is_the_same(parts, keep, weight_dtype, factor_dtype):
    update = Update(
        seeded(2, LONG, R).to(factor_dtype),
        COLUMNS if parts == "columns" else seeded(2, SHORT, R, seed=1).to(factor_dtype),
        None if parts == "factors" else seeded(2, LONG, SHORT, seed=2),
        seeded(2, LONG, 1, seed=3).abs() if parts == "rows" else None,
    )
    for transposed in (False, True):
        stored = seeded(2, SHORT, LONG, seed=4) if transposed else seeded(2, LONG, SHORT, seed=4)
        stored = stored.to(weight_dtype)
        weights = stored.mT if transposed else stored
        full, wanted = expected(update, weights, keep, 0.1)
        update.apply_(weights.unbind(), keep=keep, step=0.1)
        # a bfloat16 has 8 bits; the product of bfloat16 factors is rounded to it before it is scaled by the step
        exact = weight_dtype is torch.float32 and factor_dtype is torch.float32
        rounding = 1e-6 if exact else 0.02
        torch.testing.assert_close(weights.double(), wanted, rtol=rounding, atol=rounding)
        torch.testing.assert_close(update.materialise().double(), full, rtol=rounding, atol=2 * rounding)
        assert update.materialise().dtype is torch.float32


def laid(values, layout):
    """`values` (long, short) in a larger piece of memory, and all of that memory."""
    long, short = values.shape
    memory = torch.full((3 + long * (short + 5),), 7.0, dtype=values.dtype)
    strides = {"rows": (short, 1), "columns": (1, long), "part": (short + 5, 1), "part of columns": (1, long + 2)}
    view = memory.as_strided((long, short), strides[layout], 3)
    view.copy_(values)
    return view, memory


LAYOUTS = ["rows", "columns", "part", "part of columns"]


@pytest.mark.parametrize("layouts", [*([one, one] for one in LAYOUTS), ["rows", "columns"]], ids="+".join)
@pytest.mark.parametrize("keep", [1.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_entries_take_the_place_of_the_rest_however_weights_lie(layouts, keep, dtype, index):
    """And nothing else of the memory that a weight is a part of is touched."""
    places = torch.tensor([[0, 5, 17, 18, 53], [1, 6, 12, 40, 52]])
    entries = Entries(index=places.to(index), values=seeded(2, 5, seed=3))
    update = Update(seeded(2, LONG, R), seeded(2, SHORT, R, seed=1), entries=entries)
    values = seeded(2, LONG, SHORT, seed=2).to(dtype)
    weights, memories = zip(*(laid(v, layout) for v, layout in zip(values, layouts, strict=True)), strict=True)
    outside = [int((memory == 7.0).sum()) for memory in memories]
    full, wanted = expected(update, values, keep, 0.1)
    for i in range(2):
        full[i].view(-1)[places[i]] = entries.values[i].double()
    wanted = keep * values.double() - 0.1 * full
    update.apply_(weights, keep=keep, step=0.1)
    rounding = 1e-6 if dtype is torch.float32 else 0.02
    torch.testing.assert_close(torch.stack(weights).double(), wanted, rtol=rounding, atol=rounding)
    torch.testing.assert_close(update.materialise().double(), full, rtol=1e-6, atol=1e-6)
    assert [int((memory == 7.0).sum()) for memory in memories] == outside
