"""The NF4 kernel against the reference, bit for bit, and the custom operator on a GPU."""

import pytest
import torch

from burnish.ops import nf4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # Inductor warns about its own insides when it is first imported
]
SHAPES = [(1, 1), (1, 64), (3, 5), (7, 9), (33, 70), (48, 80), (64, 64), (5, 4099), (257, 1030), (1024, 4096)]


def quantised(shape: tuple[int, int], double: bool) -> nf4.Quantised:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    return nf4.Quantised(*(part.cuda() for part in nf4.quantise(weight, double)))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN, so that a value the kernel does not write shows."""
    empty = torch.empty

    def poison(*size: object, **options: object) -> torch.Tensor:
        made = empty(*size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poison)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_equals_the_reference_bit_for_bit(shape: tuple[int, int], double: bool, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    parts = quantised(shape, double)
    dense = nf4.dequantise(*parts, shape, dtype)
    on_cpu = nf4.reference_dequantise(*(part.cpu() for part in parts), shape, dtype)
    assert torch.equal(dense.cpu(), on_cpu)
    assert torch.equal(dense, nf4.reference_dequantise(*parts, shape, dtype))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(4096, 11008), (1500, 4096)])
def test_real_weights_land_in_rows_of_a_larger_one(shape: tuple[int, int], double: bool) -> None:
    pytest.importorskip("triton")
    parts = nf4.quantise(torch.randn(shape, device="cuda") * 0.02, double)
    whole = torch.full((shape[0] + 2, shape[1]), float("nan"), dtype=torch.bfloat16, device="cuda")
    nf4.dequantise(*parts, shape, torch.bfloat16, out=whole[1:-1])
    assert torch.equal(whole[1:-1], nf4.reference_dequantise(*parts, shape, torch.bfloat16))
    assert bool(whole[[0, -1]].isnan().all())


def test_it_quantises_on_the_gpu_as_on_the_cpu() -> None:
    weight = torch.randn(257, 1030, generator=torch.Generator().manual_seed(0)) * 0.02
    here, there = nf4.quantise(weight), nf4.quantise(weight.cuda())
    assert torch.equal(here.codes, there.codes.cpu())
    dense = nf4.dequantise(*there, (257, 1030), torch.float32).cpu()
    # The mean of the scales is summed in another order, which can tip an 8-bit scale to its neighbour.
    torch.testing.assert_close(dense, nf4.dequantise(*here, (257, 1030), torch.float32), rtol=3e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_by_inductor_the_linear_and_its_gradient_are_the_same(dtype: torch.dtype) -> None:
    parts = quantised((96, 160), double=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        return nf4.nf4_linear(torch.relu(x), *parts, 96).float().square().sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        x = torch.linspace(-1, 1, 640, device="cuda").view(4, 160).to(dtype).requires_grad_()
        loss = run(x)
        loss.backward()
        results.append((loss.detach(), x.grad))
    bound = {torch.bfloat16: 2**-7, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(results[1], results[0], rtol=bound, atol=bound)


def test_a_layer_leaves_codes_behind_and_no_dense_weight() -> None:
    parts = quantised((2048, 2048), double=True)
    x = torch.randn(16, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    nf4.nf4_linear(x, *parts, 2048).sum().backward()
    before = torch.cuda.memory_allocated()
    y = nf4.nf4_linear(x, *parts, 2048)
    assert torch.cuda.memory_allocated() - before <= 2 * y.numel() * y.element_size()
