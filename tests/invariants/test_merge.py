"""A merged adapter equals the unmerged one: logits, loss, and the gradient that reaches the embeddings."""

from pathlib import Path

import pytest
import torch

from burnish.model.adapter_files import save_adapter
from burnish.model.adapters import ADAPTERS, AdapterSpec, adapter_parameters, add_adapter
from burnish.model.checkpoint import load_model
from burnish.model.decoder import Decoder
from burnish.serve.merge import merge
from tests.tiny import tiny_batch, tiny_folder

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM", "Gemma2ForCausalLM")


def loss_and_gradient(model: Decoder, adapter: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    embedding = model.model.embed_tokens.weight.requires_grad_()
    loss = -model.log_probs(tiny_batch([11, 7, 5]), adapter).sum()
    loss.backward()
    assert embedding.grad is not None
    return loss.detach(), embedding.grad


@pytest.mark.parametrize("kind", sorted(ADAPTERS))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_equals_unmerged(architecture: str, kind: str, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", architecture)
    unmerged = load_model(base, "fp32").eval()
    targets = ("qkv_proj", "down_proj") if architecture == "Phi3ForCausalLM" and kind == "ia3" else "auto"
    add_adapter(unmerged, "policy", AdapterSpec(kind, rank=4, targets=targets), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(unmerged, "policy").values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_adapter(unmerged, "policy", tmp_path / "adapter", base=str(base))
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", "fp32").eval()
    (loss, gradient), (merged_loss, merged_gradient) = (
        loss_and_gradient(unmerged, "policy"),
        loss_and_gradient(merged, None),
    )
    plain = load_model(base, "fp32").eval()
    assert abs(loss_and_gradient(plain, None)[0] - loss) > 0.01
    torch.testing.assert_close(merged_loss, loss, rtol=1e-5, atol=0)
    assert (merged_gradient - gradient).norm() < 1e-4 * gradient.norm()
