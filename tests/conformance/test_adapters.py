"""Every listed adapter keeps the same promises over every listed storage."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from burnish.model.adapter_files import load_adapter, save_adapter
from burnish.model.adapters import (
    ADAPTERS,
    AdapterSpec,
    adapter_layers,
    adapter_parameters,
    add_adapter,
    copy_adapter,
    remove_adapter,
)
from burnish.model.linear import Linear
from burnish.model.storage import STORAGES

kinds = pytest.mark.parametrize("kind", sorted(ADAPTERS))
storages = pytest.mark.parametrize("storage", sorted(STORAGES))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


class Net(nn.Module):
    """Two layers of a decoder's names and of unequal sizes, biases included."""

    def __init__(self, storage: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def linear(outputs: int, inputs: int) -> Linear:
            weight, bias = (torch.randn(size, generator=generator) * 0.2 for size in ((outputs, inputs), (outputs,)))
            return Linear(STORAGES[storage].encode(weight), nn.Parameter(bias, requires_grad=False))

        self.k_proj, self.down_proj = linear(24, 40), linear(16, 24)

    def forward(self, x: torch.Tensor, adapter: str | None = None) -> torch.Tensor:
        return self.down_proj(torch.tanh(self.k_proj(x, adapter)), adapter)


def build(kind: str, storage: str = "fp32", disturb: bool = True, **options: object) -> Net:
    """A net with an adapter called `policy`; disturbed, as if it had been trained."""
    net = Net(storage)
    spec = AdapterSpec(kind=kind, rank=4, alpha=6.0, targets=("k_proj", "down_proj"), **options)
    add_adapter(net, "policy", spec, torch.Generator().manual_seed(1))
    if disturb:
        generator = torch.Generator().manual_seed(2)
        for parameter in adapter_parameters(net, "policy").values():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return net


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()


def merged(layer: Linear, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer with its adapter in its weight, in float64."""
    adapter = layer.adapters[name]
    weight = adapter.merge(layer.stored.dense(torch.float32).detach()).double()
    bias = adapter.merge_bias(layer.bias.detach()).double()
    return lambda x: x @ weight.T + bias


@kinds
@storages
@dtypes
def test_it_is_the_identity_at_the_start(kind: str, storage: str, dtype: torch.dtype) -> None:
    net = build(kind, storage, disturb=False)
    assert torch.equal(net(inputs(dtype), "policy"), net(inputs(dtype)))


@kinds
@storages
def test_the_merged_weight_does_what_the_forward_pass_does(kind: str, storage: str) -> None:
    net = build(kind, storage)
    for layer in (net.k_proj, net.down_proj):
        x = torch.randn(7, layer.shape[1], generator=torch.Generator().manual_seed(4))
        assert (layer(x, "policy") - layer(x)).abs().max() > 0.05
        torch.testing.assert_close(
            layer(x, "policy").double(), merged(layer, "policy")(x.double()), rtol=1e-5, atol=1e-5
        )


@kinds
@storages
@dtypes
def test_the_gradient_of_x_equals_float64_arithmetic(kind: str, storage: str, dtype: torch.dtype) -> None:
    net = build(kind, storage)
    x = inputs(dtype)
    y = net.k_proj(x, "policy")
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    y.backward(grad)
    assert y.dtype == dtype
    assert x.grad.dtype == dtype
    x64 = x.detach().double().requires_grad_()
    expected = merged(net.k_proj, "policy")(x64)
    expected.backward(grad.double())
    # Relative to the size of the whole: bf16 rounds every intermediate to 8 bits.
    bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for ours, theirs in ((y, expected), (x.grad, x64.grad)):
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()


@kinds
@storages
def test_only_its_own_parameters_train(kind: str, storage: str) -> None:
    net = build(kind, storage)
    add_adapter(net, "other", AdapterSpec(kind=kind, rank=2, targets=("k_proj",)))
    net(inputs(), "policy").square().sum().backward()
    own = adapter_parameters(net, "policy")
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in own.values())
    assert all(parameter.dtype == torch.float32 for parameter in own.values())
    others = {name: parameter for name, parameter in net.named_parameters() if name not in own}
    trained = {name for name, parameter in others.items() if parameter.grad is not None}
    assert trained == ({"k_proj.stored.weight", "down_proj.stored.weight"} if storage in ("full", "full16") else set())


@kinds
def test_its_gradients_equal_finite_differences(kind: str) -> None:
    """In float64, the direction of every parameter; DoRA's norm counts as a constant (its section 4.3)."""
    net = build(kind).double()
    x = inputs(torch.float64)
    net(x, "policy").square().sum().backward()
    for name, parameter in adapter_parameters(net, "policy").items():
        if kind == "dora" and not name.endswith("magnitude"):
            continue
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        losses = []
        for step in (1e-6, -1e-6):
            parameter.data += step * direction
            losses.append(net(x, "policy").square().sum().item())
            parameter.data -= step * direction
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-4)


@kinds
@storages
@dtypes
def test_checkpointing_changes_nothing(kind: str, storage: str, dtype: torch.dtype) -> None:
    gradients = []
    for recompute in (False, True):
        net = build(kind, storage, **({} if kind == "ia3" else {"dropout": 0.5}))
        x = inputs(dtype)
        torch.manual_seed(7)
        y = checkpoint(net, x, "policy", use_reentrant=False) if recompute else net(x, "policy")
        y.float().square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in adapter_parameters(net, "policy").values())])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*gradients, strict=True))


@kinds
def test_compiled_it_gives_the_same(kind: str) -> None:
    results = []
    for wrap in (lambda net: net, lambda net: torch.compile(net, backend="aot_eager", fullgraph=True)):
        net = build(kind, "nf4")
        x = inputs()
        wrap(net)(x, "policy").square().sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in adapter_parameters(net, "policy").values())])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-5, atol=1e-6)


@kinds
@storages
def test_no_fp32_copy_of_bf16_activations_is_kept(kind: str, storage: str) -> None:
    net = build(kind, storage)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(inputs(torch.bfloat16), "policy").sum().backward()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    made = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own]
    assert not [tensor.shape for tensor in made if tensor.dtype == torch.float32 and tensor.ndim > 1]
    weights = [(24, 40), (40, 24), (16, 24), (24, 16)]
    assert not [tensor.shape for tensor in made if tuple(tensor.shape) in weights], "a dense weight is kept"


@kinds
def test_another_adapter_or_none_is_not_disturbed(kind: str) -> None:
    net = build(kind)
    x = inputs()
    base, before = net(x), net(x, "policy")
    copy_adapter(net, "policy", "reference")
    assert torch.equal(net(x, "reference"), before)
    for parameter in adapter_parameters(net, "policy").values():
        parameter.data += 0.1
    assert torch.equal(net(x, "reference"), before)
    assert torch.equal(net(x), base)
    assert not torch.equal(net(x, "policy"), before)
    remove_adapter(net, "policy")
    assert torch.equal(net(x, "reference"), before)
    with pytest.raises(ValueError, match="no adapter 'policy'"):
        adapter_layers(net, "policy")


@kinds
@storages
def test_it_survives_its_files(kind: str, storage: str, tmp_path: Path) -> None:
    net = build(kind, storage)
    save_adapter(net, "policy", tmp_path / "saved", base="owner/base")
    fresh = Net(storage)
    torch.manual_seed(8)
    state = torch.get_rng_state()
    load_adapter(fresh, tmp_path / "saved", "again")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(fresh(inputs(), "again"), net(inputs(), "policy"))
    assert not any(parameter.requires_grad for parameter in adapter_parameters(fresh, "again").values())
