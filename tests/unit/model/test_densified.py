"""Weights at hand in one dtype for a while: the same numbers, and nothing left behind."""

import pytest
import torch

from burnish.model.adapters import ADAPTERS, AdapterSpec, adapter_parameters, add_adapter, linear_layers
from burnish.model.checkpoint import load_model
from burnish.model.storage import densified, scratch_bytes
from tests.tiny import tiny_batch, tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.mark.parametrize("storage", ["nf4", "full", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_adapter_gives_the_same_bits_on_it(folder, storage, dtype):
    model, batch = load_model(folder, storage, dtype=dtype), tiny_batch((9, 5))
    for kind in ADAPTERS:
        add_adapter(model, kind, AdapterSpec(kind=kind, rank=2), torch.Generator().manual_seed(0))
        for parameter in adapter_parameters(model, kind).values():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    layers = linear_layers(model)
    kept = {path: layer.stored for path, layer in layers.items()}
    other = [layer for layer in layers.values() if next(layer.stored.parameters()).dtype != dtype]
    assert scratch_bytes(model, dtype) == sum(o * i for o, i in (layer.shape for layer in other)) * dtype.itemsize
    with torch.no_grad():
        expected = {adapter: model.logits(batch, adapter) for adapter in (None, *ADAPTERS)}
        with densified(model, dtype):
            assert scratch_bytes(model, dtype) == 0
            assert all((layer.stored is kept[path]) == (layer not in other) for path, layer in layers.items())
            for adapter, logits in expected.items():
                assert torch.equal(model.logits(batch, adapter), logits)
    assert all(layer.stored is kept[path] for path, layer in layers.items())


def test_what_was_stored_comes_back_after_an_error(folder):
    model = load_model(folder, "full")
    names = list(model.state_dict())
    with pytest.raises(RuntimeError, match="inside"), densified(model, torch.bfloat16):
        raise RuntimeError("inside")
    assert list(model.state_dict()) == names
    model.log_probs(tiny_batch((9, 5))).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    stored = [layer.stored for layer in linear_layers(model).values()]
    with densified(model, None):
        assert [layer.stored for layer in linear_layers(model).values()] == stored
