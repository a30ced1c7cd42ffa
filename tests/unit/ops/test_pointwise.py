import math

import pytest
import torch

from burnish.ops.pointwise import gated, rms_norm, soft_cap


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    out = rms_norm(x, torch.tensor([1.0, 2.0]), eps=1e-6)
    root = math.sqrt(12.5)
    torch.testing.assert_close(out, torch.tensor([[3 / root, 8 / root], [0.0, 0.0]]))


def test_gemma_stores_the_weight_minus_one() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6, offset=1.0), rms_norm(x, weight + 1, 1e-6))


def test_norms_of_bf16_are_computed_in_fp32() -> None:
    x = torch.full((1, 4096), 300.0, dtype=torch.bfloat16)  # its sum of squares would lose most of its terms in bf16
    out = rms_norm(x, torch.ones(4096), eps=1e-6)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.ones_like(out))


@pytest.mark.parametrize("value", [-3.0, -0.5, 0.0, 0.7, 4.0])
def test_gates_are_silu_and_the_tanh_approximation_of_gelu(value: float) -> None:
    gate, up = torch.tensor([value]), torch.tensor([2.0])
    silu = 2 * value / (1 + math.exp(-value))
    gelu = value * (1 + math.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))
    assert gated(gate, up, "silu").item() == pytest.approx(silu, abs=1e-6)
    assert gated(gate, up, "gelu_tanh").item() == pytest.approx(gelu, abs=1e-6)


def test_soft_cap_bounds_and_leaves_small_numbers() -> None:
    x = torch.tensor([-1000.0, -0.01, 0.0, 0.01, 1000.0])
    torch.testing.assert_close(soft_cap(x, 30.0), torch.tensor([-30.0, -0.01, 0.0, 0.01, 30.0]), rtol=1e-6, atol=1e-6)
    assert soft_cap(x, None) is x
