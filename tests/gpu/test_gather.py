"""Rows of a table in pinned host memory, gathered by the device; and a decoder whose embedding lies there."""

import json
from pathlib import Path

import pytest
import torch

from burnish.model.checkpoint import init_model
from burnish.ops.gather import gather_rows
from tests.tiny import tiny_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]
CUDA = torch.device("cuda")


def test_rows_come_from_the_host_and_the_table_stays_there() -> None:
    table = torch.randn(32000, 4096, dtype=torch.bfloat16).pin_memory()
    places = torch.randint(32000, (8192,), device=CUDA)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = gather_rows(table, places)
    assert torch.cuda.max_memory_allocated() - before <= found.nbytes + 2**20
    assert torch.equal(found.cpu(), table[places.cpu()])
    clock = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    clock[0].record()
    gather_rows(table, places)
    clock[1].record()
    torch.cuda.synchronize()
    print(f"67 MB of rows over the bus: {clock[0].elapsed_time(clock[1]):.2f} ms")


def test_a_decoder_reads_its_embedding_from_the_host(tmp_path: Path) -> None:
    shape = {"vocab_size": 8000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    config = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "num_key_value_heads": 4, **shape}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = init_model(tmp_path, 0, "nf4", CUDA, torch.bfloat16)
    batch = tiny_batch([64, 33], vocab_size=8000).to(CUDA)
    with torch.no_grad():
        expected = model.hidden(batch)
        model.model.embed_tokens.to_host()
        assert model.device.type == "cuda"
        assert torch.equal(model.hidden(batch), expected)
