"""Shared prompts on the GPU: the kernel's mask where queries and keys differ in number, and compiled blocks."""

import pytest
import torch
import torch._dynamo.utils

from burnish.model.adapters import AdapterSpec, add_adapter
from burnish.model.checkpoint import load_model
from burnish.ops.attention import attention, packed_layout
from tests.tiny import Groups, tiny_folder, tiny_shared_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # Inductor and Triton warn about their own insides
]
GROUPS: Groups = [(100, (40, 70, 3)), (7, (200, 1)), (129, (129, 128)), (64, (64,)), (1, (2, 2))]
SHAPE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("window", [None, 1, 50])
def test_the_kernel_aligns_the_last_query_with_the_last_key(window, heads) -> None:
    whole, shared, source = tiny_shared_batch(GROUPS)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(len(shared.tokens), n, 64, generator=generator) for n in (heads[0], heads[1], heads[1])]
    weights = torch.randn(len(shared.scored), heads[0], 64, generator=generator)
    found: dict[str, list[torch.Tensor]] = {}
    for name, device, dtype in (
        ("kernel", "cuda", torch.bfloat16),
        ("plain", "cpu", torch.bfloat16),
        ("exact", "cpu", torch.float64),
    ):
        q, k, v = (x.to(device, dtype).requires_grad_() for x in given)
        if name == "kernel":
            batch = shared.to(device)
            out = attention(q, k, v, packed_layout(batch, padded=False), 0.125, window)
        else:
            batch = whole
            out = attention(q[source], k[source], v[source], packed_layout(whole, padded=True), 0.125, window)
        scored = out[batch.scored]
        (scored * weights.to(device, dtype)).sum().backward()
        found[name] = [x.detach().cpu().double() for x in (scored, q.grad, k.grad, v.grad) if x is not None]
    for ours, plain, exact in zip(found["kernel"], found["plain"], found["exact"], strict=True):
        assert (ours - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM"])
def test_log_probs_err_at_most_twice_as_much_as_without_sharing(tmp_path, architecture) -> None:
    overrides = {"sliding_window": 16} if architecture == "MistralForCausalLM" else {}
    folder = tiny_folder(tmp_path, architecture, **{**SHAPE, "head_dim": 32, **overrides})
    whole, shared, _ = tiny_shared_batch(GROUPS)
    exact_model = load_model(folder, "full", torch.device("cpu"), torch.float32)
    model = load_model(folder, "full", torch.device("cuda"), torch.bfloat16)
    found: list[list[torch.Tensor]] = []
    for each, batch in ((exact_model, whole), (model, whole.to("cuda")), (model, shared.to("cuda"))):
        each.zero_grad()
        log_probs = each.log_probs(batch)[batch.scored]
        log_probs.sum().backward()
        gradients = [p.grad.flatten() for p in each.parameters() if p.grad is not None]
        found.append([log_probs.detach().cpu(), torch.cat(gradients).cpu()])
    for exact, without, ours in zip(*found, strict=True):
        assert (ours - exact).norm() <= 2 * (without - exact).norm()


def test_compiled_blocks_are_compiled_once_for_all_batches(tmp_path) -> None:
    """One graph for batches with prefixes beside the one without, however their shapes and prefixes differ."""
    torch.compiler.reset()
    model = load_model(tiny_folder(tmp_path, **SHAPE), "bf16", torch.device("cuda"), torch.bfloat16)
    add_adapter(model, "policy", AdapterSpec("lora", 8), torch.Generator().manual_seed(0))
    model.compile_blocks()
    batches = [tiny_shared_batch([(100 + 3 * n, (40 + n, 70 + 2 * n)), (60, (50 + n, 9))], seed=n) for n in range(6)]
    errors: list[float] = []
    for number, (whole, shared, _) in enumerate(batches):
        values: list[torch.Tensor] = []
        for batch in (whole, shared):
            log_probs = model.log_probs(batch.to("cuda"), "policy")
            log_probs.sum().backward()
            values.append(log_probs.detach()[batch.scored.cuda()])
        errors.append((values[0] - values[1]).abs().max().item())
        if number == 2:  # each kind has been compiled, and then again for all sizes
            torch._dynamo.utils.counters.clear()
            compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert max(errors) < 0.2
