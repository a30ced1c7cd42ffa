"""Parameters that share one block of memory."""

from pathlib import Path

import pytest
import torch

from burnish.model.checkpoint import load_model
from burnish.model.linear import Linear
from burnish.model.storage import lay_in_one_piece
from tests.tiny import tiny_folder


@pytest.mark.parametrize("storage", ["full", "full16", "bf16", "nf4"])
def test_a_block_lies_in_one_piece_and_says_what_it_said(tmp_path: Path, storage: str) -> None:
    folder = tiny_folder(tmp_path, "Qwen2ForCausalLM")
    model = load_model(folder, storage)
    for block in model.model.layers:
        parameters = list(block.parameters())
        assert len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == 1
        assert sum(parameter.nbytes for parameter in parameters) <= parameters[0].untyped_storage().nbytes()
        before = [(parameter.detach().clone(), parameter.requires_grad) for parameter in parameters]
        lay_in_one_piece(block)
        for parameter, (values, trained) in zip(block.parameters(), before, strict=True):
            assert torch.equal(parameter, values)
            assert parameter.requires_grad == trained == storage.startswith("full")
            assert parameter.data_ptr() % 16 == 0


def test_weights_that_read_the_same_input_lie_end_to_end_whatever_biases_lie_between() -> None:
    layers = torch.nn.Module()
    layers.first, layers.second = (
        Linear(torch.nn.Linear(32, rows, bias=False), torch.nn.Parameter(torch.zeros(rows))) for rows in (64, 48)
    )
    lay_in_one_piece(layers)
    first, second = layers.first.stored.weight, layers.second.stored.weight
    assert second.data_ptr() == first.data_ptr() + first.nbytes
    assert layers.first.bias.data_ptr() >= second.data_ptr() + second.nbytes


def test_an_outline_has_nothing_to_move() -> None:
    layer = torch.nn.Linear(3, 5, device="meta")
    lay_in_one_piece(layer)
    assert layer.weight.is_meta
