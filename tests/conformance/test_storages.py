"""Every listed storage keeps the same promises."""

import pytest
import torch
from torch import nn

from burnish.model.storage import STORAGES

SHAPES = [(24, 40), (7, 9)]
DTYPES = [torch.float32, torch.bfloat16]
storages = pytest.mark.parametrize("storage", sorted(STORAGES))


def encode(storage: str, shape: tuple[int, int] = (24, 40), **options: bool) -> nn.Module:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    return STORAGES[storage].encode(weight, **options)


@storages
def test_dense_is_the_weight_as_near_as_the_storage_keeps_it(storage: str) -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)) * 0.1
    stored = encode(storage)
    assert stored.shape == (24, 40)
    # fp32 exact; bf16 half a unit in the last of 8 bits; NF4 half the widest gap between levels (0.152 of the largest).
    bounds = {"full": 0.0, "full16": 2**-8, "fp32": 0.0, "bf16": 2**-8, "nf4": 0.16}
    bound = bounds[storage] * weight.abs().max()
    assert (stored.dense(torch.float32) - weight).abs().max() <= bound
    assert torch.equal(stored.dense(torch.bfloat16), stored.dense(torch.float32).bfloat16())


@storages
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matmul_and_the_gradient_of_x_equal_float64_arithmetic(
    storage: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    stored = encode(storage, shape)
    x = torch.randn(3, 5, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = stored.matmul(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y.backward(grad)
    weight = stored.dense(dtype).detach().double()
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    assert y.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=bound, atol=bound)
    torch.testing.assert_close(x.grad.double(), grad.double() @ weight, rtol=bound, atol=bound)


@storages
def test_only_full_weights_train_in_their_own_dtype(storage: str) -> None:
    stored = encode(storage)
    trained = {parameter.dtype for parameter in stored.parameters() if parameter.requires_grad}
    assert trained == {"full": {torch.float32}, "full16": {torch.bfloat16}}.get(storage, set())
    x = torch.randn(3, 40).bfloat16().requires_grad_()
    stored.matmul(x).sum().backward()
    assert all(parameter.grad is not None for parameter in stored.parameters() if parameter.requires_grad)


@storages
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_dense_is_kept_for_the_backward_pass(storage: str, dtype: torch.dtype) -> None:
    stored = encode(storage, (64, 128))
    own = {parameter.untyped_storage().data_ptr() for parameter in stored.parameters()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(2, 128).to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stored.matmul(x).sum().backward()
    foreign = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own]
    assert all(tensor.data_ptr() == x.data_ptr() for tensor in foreign)


@storages
@pytest.mark.parametrize("double_quant", [True, False])
def test_its_state_dict_round_trips(storage: str, double_quant: bool) -> None:
    stored = encode(storage, double_quant=double_quant)
    other = STORAGES[storage].encode(torch.zeros(24, 40), double_quant=double_quant)
    other.load_state_dict(stored.state_dict())
    assert torch.equal(other.dense(torch.float32), stored.dense(torch.float32))


@storages
def test_no_cast_of_the_module_touches_what_it_keeps_in_other_numbers(storage: str) -> None:
    stored = encode(storage)
    before = stored.dense(torch.bfloat16).clone()
    assert torch.equal(stored.to(torch.bfloat16).dense(torch.bfloat16), before)


@storages
def test_compiled_it_gives_the_same(storage: str) -> None:
    stored = encode(storage)
    results = []
    for run in (stored.matmul, torch.compile(stored.matmul, backend="aot_eager", fullgraph=True)):
        x = torch.linspace(-1, 1, 120).view(3, 40).bfloat16().requires_grad_()
        y = run(x)
        y.float().square().sum().backward()
        results.append((y.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
