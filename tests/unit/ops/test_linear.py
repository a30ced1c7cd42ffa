"""A multiplication by a weight of another dtype: its value, its gradients, what it keeps."""

import pytest
import torch

from burnish.ops import linear


def operands(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 16, generator=generator).to(x_dtype).requires_grad_()
    return x, torch.randn(24, 16, generator=generator).to(weight_dtype)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients_equal_float64_arithmetic(
    x_dtype: torch.dtype, weight_dtype: torch.dtype, trained: bool
) -> None:
    x, weight = operands(x_dtype, weight_dtype)
    weight.requires_grad_(trained)
    y = linear.cast_linear(x, weight)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(x_dtype)
    y.backward(grad)
    assert y.dtype == x.dtype
    # The cast of an fp32 weight to bf16 is part of what is promised; everything after it is judged in float64.
    weight64, x64, grad64 = weight.detach().to(x_dtype).double(), x.detach().double(), grad.double()
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[x_dtype]
    torch.testing.assert_close(y.double(), x64 @ weight64.T, rtol=bound, atol=bound)
    torch.testing.assert_close(x.grad.double(), grad64 @ weight64, rtol=bound, atol=bound * 4)
    if trained:
        assert weight.grad.dtype == weight.dtype
        expected = grad64.flatten(0, 1).T @ x64.flatten(0, 1)
        torch.testing.assert_close(weight.grad.double(), expected, rtol=2**-7, atol=2**-5)
    else:
        assert weight.grad is None


@pytest.mark.parametrize("trained", [False, True])
def test_autograd_keeps_no_copy_of_the_weight(trained: bool) -> None:
    x, weight = operands(torch.bfloat16, torch.float32)
    weight.requires_grad_(trained)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear.cast_linear(x, weight).sum().backward()
    allowed = {weight.untyped_storage().data_ptr(), x.untyped_storage().data_ptr()}
    assert set(kept) == (allowed if trained else {weight.untyped_storage().data_ptr()})


def test_the_operators_keep_pytorchs_contract() -> None:
    x, weight = operands(torch.bfloat16, torch.float32)
    torch.library.opcheck(linear._cast_linear, (x, weight))
    torch.library.opcheck(linear._cast_linear, (x.detach(), weight.requires_grad_()))
    torch.library.opcheck(linear._backward_x, (torch.randn(3, 24).bfloat16(), weight.detach()))
