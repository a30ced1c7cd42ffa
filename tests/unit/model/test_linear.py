import pytest
import torch
from torch import Tensor, nn

from burnish.model.linear import Linear
from burnish.model.storage import STORAGES


class Doubling(nn.Module):
    """An adapter that shows what it was given."""

    def __init__(self, scales_bias: bool) -> None:
        super().__init__()
        self.scales_bias = scales_bias

    def forward(self, x: Tensor, y: Tensor, stored: nn.Module) -> Tensor:
        return 2 * y


def layer(scales_bias: bool = False) -> Linear:
    torch.manual_seed(0)
    linear = Linear(STORAGES["fp32"].encode(torch.randn(3, 4)), nn.Parameter(torch.randn(3)))
    linear.adapters["twice"] = Doubling(scales_bias)
    return linear


def test_without_an_adapter_it_is_a_linear_layer() -> None:
    linear, x = layer(), torch.randn(5, 4)
    expected = nn.functional.linear(x, linear.weight.dense(torch.float32), linear.bias)
    torch.testing.assert_close(linear(x), expected)
    torch.testing.assert_close(linear(x, "unknown here"), expected)
    assert linear.shape == (3, 4)


@pytest.mark.parametrize("scales_bias", [False, True])
def test_the_bias_is_scaled_only_by_adapters_that_ask_for_it(scales_bias: bool) -> None:
    linear, x = layer(scales_bias), torch.randn(5, 4)
    product = x @ linear.weight.dense(torch.float32).T
    expected = 2 * (product + linear.bias) if scales_bias else 2 * product + linear.bias
    torch.testing.assert_close(linear(x, "twice"), expected)


def test_the_output_has_the_dtype_of_the_input() -> None:
    assert layer()(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
