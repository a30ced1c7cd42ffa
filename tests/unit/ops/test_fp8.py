"""8-bit rows and weights against arithmetic in float64, and what scales promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.ops import fp8, nf4

E4M3_NOISE = 0.0265  # the relative RMS error of e4m3 on Gaussian values: three bits of mantissa


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def restored(x8: fp8.Quantised) -> torch.Tensor:
    return x8.values.double() * x8.scale.double().unsqueeze(1)


def relative(made: torch.Tensor, true: torch.Tensor) -> float:
    return float((made.double() - true.double()).norm() / true.double().norm())


def test_the_error_of_gaussian_rows_is_that_of_three_bits_of_mantissa() -> None:
    x = normal(64, 1024) * torch.logspace(-6, 6, 64).unsqueeze(1)
    error = (restored(fp8.quantise_rows(x)) - x).norm(dim=1) / x.norm(dim=1)
    torch.testing.assert_close(error.mean().item(), E4M3_NOISE, rtol=0.03, atol=0)
    assert error.max() < 0.03


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 5), width=st.integers(1, 70), exponent=st.integers(-25, 30), seed=st.integers(0, 2**16))
def test_each_value_is_the_nearest_and_the_largest_is_448(rows: int, width: int, exponent: int, seed: int) -> None:
    x = normal(rows, width, seed=seed) * 10.0**exponent
    x8 = fp8.quantise_rows(x)
    levels = torch.arange(256, dtype=torch.uint8).view(fp8.FP8).double()
    levels = levels[levels.isfinite()]
    unit = x.double() / x8.scale.double().unsqueeze(1)
    nearest = (unit.unsqueeze(-1) - levels).abs().amin(-1)
    assert bool(((x8.values.double() - unit).abs() <= nearest + 448 * 2**-22).all())
    assert torch.equal(x8.values.double().abs().amax(1), torch.full((rows,), 448.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_of_zeros_stays_zero_and_has_scale_1(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 16, dtype=dtype)
    x[1, 5] = -2
    x[2] = 1e-36
    x8 = fp8.quantise_rows(x)
    assert x8.scale.tolist() == [1.0, pytest.approx(2 / 448), 1.0]
    assert x8.values[1, 5] == -448
    assert not restored(x8)[[0, 2]].any()


def test_a_value_that_is_not_finite_shows() -> None:
    x = normal(2, 16)
    x[0, 3] = float("nan")
    assert fp8.quantise_rows(x).values[0].isnan().any()
    assert not fp8.quantise_rows(x).values[1].isnan().any()


def test_the_scale_of_a_weight_goes_into_the_gradient_before_it_is_quantised() -> None:
    dy, w_scale = normal(6, 48), normal(48).abs() + 0.01
    both, ours = fp8.quantise_rows(dy * w_scale), fp8.quantise_rows(dy, w_scale)
    assert torch.equal(ours.values, both.values)
    assert torch.equal(ours.scale, both.scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_restored_matrices(dtype: torch.dtype) -> None:
    x8, w = fp8.quantise_rows(normal(5, 64)), normal(32, 64, seed=1)
    w_scale = fp8.weight_scale(w)
    w8 = fp8.dense_to_fp8(w, w_scale, transposed=False)
    y = fp8.scaled_matmul(x8, w8, w_scale, dtype)
    assert y.dtype == dtype
    true = restored(x8) @ (w8.double() * w_scale.double().unsqueeze(1)).T
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    assert relative(y, true) < bound
    unscaled = fp8.scaled_matmul(x8, w8, None, torch.float64)
    torch.testing.assert_close(unscaled, restored(x8) @ w8.double().T)


def test_one_weight_serves_both_passes_within_the_noise_of_8_bits() -> None:
    x, dy, w = normal(32, 512), normal(32, 256, seed=1), normal(256, 512, seed=2) * 0.02
    w_scale = fp8.weight_scale(w)
    forth = fp8.scaled_matmul(fp8.quantise_rows(x), fp8.dense_to_fp8(w, w_scale, False), w_scale, torch.float32)
    back = fp8.scaled_matmul(fp8.quantise_rows(dy, w_scale), fp8.dense_to_fp8(w, w_scale, True), None, torch.float32)
    # Two factors of independent error: √2 of one.
    assert relative(forth, x @ w.T) == pytest.approx(2**0.5 * E4M3_NOISE, rel=0.1)
    assert relative(back, dy @ w) == pytest.approx(2**0.5 * E4M3_NOISE, rel=0.1)


def test_the_scale_of_a_weight_is_its_largest_magnitude_over_448() -> None:
    w = torch.tensor([[1.0, -896.0], [0.0, 0.0], [448.0, 3.0]])
    assert fp8.weight_scale(w).tolist() == [2.0, 1.0, 1.0]


@pytest.mark.parametrize("shape", [(16, 32), (48, 80)])
def test_the_transposed_weight_holds_the_same_bytes_and_goes_where_it_is_told(shape: tuple[int, int]) -> None:
    w = normal(*shape)
    w_scale = fp8.weight_scale(w)
    straight = fp8.dense_to_fp8(w, w_scale, transposed=False)
    assert relative(straight.double() * w_scale.unsqueeze(1), w) < 0.03
    whole = torch.zeros(shape[1] + 2, shape[0]).to(fp8.FP8)
    turned = fp8.dense_to_fp8(w, w_scale, transposed=True, out=whole[1:-1])
    assert turned.data_ptr() == whole[1:].data_ptr()
    assert torch.equal(whole[1:-1].float().T, straight.float())
    assert not whole.float()[[0, -1]].any()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(8, 128), (48, 80), (6, 64)])
def test_nf4_is_quantised_as_the_dense_weight_that_it_stands_for(shape: tuple[int, int], double: bool) -> None:
    w = normal(*shape) * 0.02
    w[1] = 0
    parts = nf4.quantise(w, double)
    dense = nf4.dequantise(*parts, shape, torch.float32)
    w_scale = fp8.nf4_weight_scale(*parts, shape)
    full = dense.abs().amax(1) > 0
    torch.testing.assert_close(w_scale[full], fp8.weight_scale(dense)[full], rtol=0, atol=0)
    for transposed in (False, True):
        made = fp8.nf4_to_fp8(*parts, shape, w_scale, transposed)
        expected = fp8.dense_to_fp8(dense, w_scale, transposed)
        assert torch.equal(made.float(), expected.float())


def test_transposed_weights_lie_side_by_side_in_one() -> None:
    above, below = normal(32, 64), normal(16, 64, seed=1)
    scale = fp8.weight_scale(torch.cat([above, below]))
    both = torch.empty(64, 48, dtype=fp8.FP8)
    fp8.dense_to_fp8(above, scale[:32], True, out=both[:, :32])
    fp8.nf4_to_fp8(*nf4.quantise(below), (16, 64), scale[32:], True, out=both[:, 32:])
    assert torch.equal(both[:, :32].float(), fp8.dense_to_fp8(above, scale[:32], True).float())
    restored = nf4.dequantise(*nf4.quantise(below), (16, 64), torch.float32)
    assert torch.equal(both[:, 32:].float(), fp8.dense_to_fp8(restored, scale[32:], True).float())
