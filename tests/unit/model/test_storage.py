"""The bitsandbytes layout of a quantised layer, both ways."""

from pathlib import Path
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish.model.storage import NF4

NAME = "model.layers.0.self_attn.q_proj"
KEY = f"{NAME}.weight"


def weight() -> torch.Tensor:
    """A whole number of blocks to a row: bitsandbytes 0.50.2 dequantises 48 x 80 wrongly on a CPU with AVX-512."""
    return (torch.randn(30, 128, generator=torch.Generator().manual_seed(0)) * 0.05).bfloat16()


def theirs(double_quant: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors that bitsandbytes saves for the layer, and what they stand for."""
    codes, state = bnb.quantize_4bit(weight(), quant_type="nf4", compress_statistics=double_quant)
    tensors = {KEY: codes} | {f"{KEY}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return tensors, bnb.dequantize_4bit(codes, state)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_layer_of_bitsandbytes_is_read_and_written_bit_for_bit(double_quant: bool, tmp_path: Path) -> None:
    tensors, dense = theirs(double_quant)
    save_file(tensors, tmp_path / "layer.safetensors")
    stored = NF4.from_bitsandbytes(NAME, load_file(tmp_path / "layer.safetensors"))
    assert stored.shape == (30, 128)
    assert torch.equal(stored.dense(torch.bfloat16), dense)
    written = stored.to_bitsandbytes(NAME)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert written[key].dtype == tensor.dtype, key
        assert written[key].shape == tensor.shape, key
        assert torch.equal(written[key], tensor), key


@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_reads_what_we_write(double_quant: bool) -> None:
    stored = NF4.encode(weight(), double_quant)
    tensors = stored.to_bitsandbytes(NAME)
    state = {key.removeprefix(f"{KEY}."): tensor for key, tensor in tensors.items() if key != KEY}
    parameter = bitsandbytes.nn.Params4bit.from_prequantized(tensors[KEY], state, device="cpu")
    dense = bnb.dequantize_4bit(parameter.data, parameter.quant_state)
    assert torch.equal(dense, stored.dense(torch.bfloat16))


def test_codes_packed_as_another_dtype_are_read() -> None:
    tensors, dense = theirs(double_quant=True)
    tensors[KEY] = tensors[KEY].view(-1).view(torch.bfloat16).unsqueeze(1)
    assert torch.equal(NF4.from_bitsandbytes(NAME, tensors).dense(torch.bfloat16), dense)


STATE = f"{KEY}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(STATE), f"{STATE} is missing"),
        (lambda tensors: tensors.pop(f"{KEY}.absmax"), f"{KEY}.absmax is missing"),
        (
            lambda tensors: tensors.update({KEY: tensors[KEY][1:]}),
            f"{KEY} holds 1919 bytes where its shape asks for 1920",
        ),
        (lambda tensors: tensors[f"{KEY}.quant_map"].mul_(2), f"{KEY}.quant_map is another table"),
        (lambda tensors: tensors[STATE].fill_(0), f"{STATE} is not JSON"),
        (lambda tensors: state_with(tensors, b'"nf4"', b'"fp4"'), f"{STATE} has quant_type=fp4; only quant_type=nf4"),
        (lambda tensors: state_with(tensors, b": 64,", b": 32,"), f"{STATE} has blocksize=32; only blocksize=64"),
        (lambda tensors: state_with(tensors, b"[30, 128]", b"[3840]"), f"{STATE} gives the shape"),
    ],
)
def test_a_layer_that_is_damaged_or_of_another_format_is_named(change: Any, message: str) -> None:
    tensors, _ = theirs(double_quant=True)
    change(tensors)
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        NF4.from_bitsandbytes(NAME, tensors)


def state_with(tensors: dict[str, torch.Tensor], old: bytes, new: bytes) -> None:
    text = bytes(tensors[STATE].tolist())
    assert old in text
    tensors[STATE] = torch.tensor(list(text.replace(old, new)), dtype=torch.uint8)


def test_its_size_is_that_of_the_paper() -> None:
    stored = NF4.encode(torch.randn(256, 1024))
    bits = 8 * sum(parameter.numel() * parameter.element_size() for parameter in stored.parameters())
    assert bits / (256 * 1024) == pytest.approx(4.127, abs=5e-4)
