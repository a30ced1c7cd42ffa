"""The kernels to e4m3 against the reference byte for byte, and Hopper's 8-bit products against float64."""

import pytest
import torch

from burnish.ops import fp8, nf4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a CUDA device that multiplies e4m3 numbers",
    ),
]
SHAPES = [(16, 16), (48, 80), (144, 208), (80, 192), (1040, 4096), (4096, 11008)]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def equal(here: torch.Tensor, there: torch.Tensor) -> bool:
    return torch.equal(here.view(torch.uint8), there.view(torch.uint8))


def restored(x8: fp8.Quantised) -> torch.Tensor:
    return x8.values.double() * x8.scale.double().unsqueeze(1)


def relative(made: torch.Tensor, true: torch.Tensor) -> float:
    return float((made.double() - true).norm() / true.norm())


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, so that a value the kernel does not write shows."""
    empty = torch.empty

    def poison(*size: object, **options: object) -> torch.Tensor:
        made = empty(*size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poison)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (17, 80), (300, 4096), (1000, 22016), (5, 59136)])
def test_rows_are_quantised_as_the_reference_does(rows: int, width: int, weighted: bool, dtype: torch.dtype) -> None:
    x = normal(rows, width, dtype=dtype)
    x[0, 3] = 100
    x[-1] = 0
    w_scale = normal(width, dtype=torch.float32).abs() + 0.1 if weighted else None
    made = fp8.quantise_rows(x, w_scale)
    # On the CPU, where a division by 448 is one: on a GPU PyTorch multiplies by 1 / 448.
    expected = fp8.quantise_rows(x.cpu(), None if w_scale is None else w_scale.cpu())
    assert torch.equal(made.scale.cpu(), expected.scale)
    assert equal(made.values.cpu(), expected.values)


def test_rows_of_8192_tokens_have_the_error_of_e4m3() -> None:
    x = normal(8192, 4096)
    assert relative(restored(fp8.quantise_rows(x)), x.double()) == pytest.approx(0.0265, rel=0.03)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_dense_weight_becomes_the_references_bytes(shape: tuple[int, int], transposed: bool) -> None:
    w = normal(*shape)
    scale = fp8.weight_scale(w)
    assert equal(fp8.dense_to_fp8(w, scale, transposed), fp8.dense_to_fp8(w.float(), scale, transposed))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_becomes_the_references_bytes(shape: tuple[int, int], transposed: bool, double: bool) -> None:
    parts = nf4.quantise(normal(*shape) * 0.02, double)
    scale = fp8.nf4_weight_scale(*parts, shape)
    dense = nf4.reference_dequantise(*parts, shape, torch.float32)
    assert equal(fp8.nf4_to_fp8(*parts, shape, scale, transposed), fp8.dense_to_fp8(dense, scale, transposed))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("storage", ["nf4", "dense"])
def test_part_of_a_larger_buffer_is_written_and_nothing_else(transposed: bool, storage: str) -> None:
    shape = (256, 192)
    w = normal(*shape) * 0.02
    parts, scale = nf4.quantise(w), fp8.weight_scale(w)
    whole = torch.full((192, 288) if transposed else (288, 192), 0x7F, dtype=torch.uint8, device="cuda").view(fp8.FP8)
    before, piece, after = whole.split([16, 256, 16], dim=1 if transposed else 0)
    if storage == "nf4":
        fp8.nf4_to_fp8(*parts, shape, scale, transposed, out=piece)
        assert equal(piece, fp8.nf4_to_fp8(*parts, shape, scale, transposed))
    else:
        fp8.dense_to_fp8(w, scale, transposed, out=piece)
        assert equal(piece, fp8.dense_to_fp8(w, scale, transposed))
    assert bool((before.view(torch.uint8) == 0x7F).all())
    assert bool((after.view(torch.uint8) == 0x7F).all())


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 64, 32), (300, 4096, 4096), (8192, 4096, 11008)])
def test_the_product_is_that_of_the_restored_matrices(
    tokens: int, outputs: int, inputs: int, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "FAST_ACCUMULATION", fast)
    x8, w = fp8.quantise_rows(normal(tokens, inputs)), normal(outputs, inputs, seed=1) * 0.02
    w_scale = fp8.weight_scale(w)
    w8 = fp8.dense_to_fp8(w, w_scale, transposed=False)
    true = restored(x8) @ (w8.double() * w_scale.double().unsqueeze(1)).T
    found = relative(fp8.scaled_matmul(x8, w8, w_scale), true)
    # Rounding to bf16 is what any product costs; short accumulators must stay well under the 3.7 % of the two factors.
    assert found < (0.01 if fast else 2 * relative(true.bfloat16(), true))
    unscaled = fp8.scaled_matmul(x8, w8)
    assert relative(unscaled, restored(x8) @ w8.double().T) < 0.01


def test_the_gradient_goes_through_the_transposed_weight() -> None:
    dy, w = normal(300, 1024), normal(1024, 512, seed=1) * 0.02
    w_scale = fp8.weight_scale(w)
    w8_IO = fp8.dense_to_fp8(w, w_scale, transposed=True)
    dx = fp8.scaled_matmul(fp8.quantise_rows(dy, w_scale), w8_IO)
    assert relative(dx, dy.double() @ w.double()) == pytest.approx(2**0.5 * 0.0265, rel=0.1)
