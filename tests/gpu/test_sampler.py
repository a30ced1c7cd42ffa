"""The sampler on a CUDA device: graphs, refilled slots and weights at hand in full change no token."""

import pytest
import torch

from burnish.model.adapters import AdapterSpec, adapter_parameters, add_adapter
from burnish.model.checkpoint import load_model
from burnish.sampling.graphs import Graphs
from burnish.sampling.sampler import Sampler, Sampling
from burnish.sampling.slots import Slots
from burnish.sampling.streams import seed_of, uniforms
from tests.tiny import tiny_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]
SHAPE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "max_position_embeddings": 1024}
FAMILIES = {
    "LlamaForCausalLM": {"num_key_value_heads": 2},
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 16},
    "Gemma2ForCausalLM": {"num_key_value_heads": 2, "head_dim": 32},
    "SmolLM3ForCausalLM": {"num_key_value_heads": 4},
}
ENDS = range(0, 320, 40)
LENGTHS = (7, 120, 19, 1, 230, 4, 12, 3, 25, 9, 5, 300, 40, 41, 8, 2, 2, 60, 11, 90)
SEEDS = [seed_of(7, i) for i in range(len(LENGTHS))]
DRAWN = Sampling(150, 1.0, end_ids=ENDS)
CUT = Sampling(150, 0.8, top_k=50, top_p=0.9, end_ids=ENDS)


def opened(path, architecture="LlamaForCausalLM", storage="bf16", dtype=torch.bfloat16):
    folder = tiny_folder(path, architecture, **SHAPE, **FAMILIES[architecture])
    model = load_model(folder, storage, torch.device("cuda"), dtype)
    for kind in ("lora", "dora"):
        add_adapter(model, kind, AdapterSpec(kind=kind, rank=4, dropout=0.1), torch.Generator().manual_seed(0))
        for parameter in adapter_parameters(model, kind).values():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
            parameter.data.add_(noise.to(parameter.device))
    return model


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 320, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture
def replays(monkeypatch):
    """How often a step was asked for with each key."""
    counts: dict[object, int] = {}
    run = Graphs.run

    def counted(self, key, step):
        counts[key] = counts.get(key, 0) + 1
        run(self, key, step)

    monkeypatch.setattr(Graphs, "run", counted)
    return counts


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("sampling", [Sampling(150, end_ids=ENDS), DRAWN, CUT], ids=["greedy", "drawn", "cut"])
def test_graphs_write_the_same_tokens(tmp_path, prompts, replays, architecture, sampling):
    model = opened(tmp_path, architecture)
    eager = Sampler(model, 8, graphs=False).write(prompts, sampling, "lora", SEEDS)
    assert not replays
    if sampling.temperature:  # a random model's most likely tokens seldom end an answer
        assert len({len(one.ids) for one in eager}) > 1
    assert Sampler(model, 8).write(prompts, sampling, "lora", SEEDS) == eager
    assert len(replays) > 3
    assert max(replays.values()) > 20
    assert len({slots for slots, _ in replays}) > 1 or not sampling.temperature


@pytest.mark.parametrize("storage", ["nf4", "full"])
@pytest.mark.parametrize("adapter", [None, "lora", "dora"])
def test_weights_at_hand_in_full_change_no_token(tmp_path, prompts, storage, adapter):
    model = opened(tmp_path, storage=storage)
    for graphs in (False, True):
        found = [
            Sampler(model, 8, graphs=graphs, dense=dense).write(prompts, DRAWN, adapter, SEEDS)
            for dense in (False, True, None)
        ]
        assert found[0] == found[1] == found[2]


def test_slots_order_and_company_do_not_matter(tmp_path, prompts):
    model = opened(tmp_path, storage="fp32", dtype=torch.float32)
    expected = Sampler(model, 64).write(prompts, DRAWN, "lora", SEEDS)
    for num_slots in (1, 3, 8):
        assert Sampler(model, num_slots).write(prompts, DRAWN, "lora", SEEDS) == expected
    order = list(range(len(prompts)))[::-1]
    found = Sampler(model, 8).write([prompts[i] for i in order], DRAWN, "lora", [SEEDS[i] for i in order])
    assert found == expected[::-1]
    groups = Sampler(model, 8).write([prompts[4]] * 6, DRAWN, "lora", SEEDS[:6])
    assert groups == [Sampler(model, 1).write([prompts[4]], DRAWN, "lora", [seed])[0] for seed in SEEDS[:6]]


def test_it_writes_what_the_cpu_writes(tmp_path, prompts):
    model = opened(tmp_path, storage="fp32", dtype=torch.float32)
    found = Sampler(model, 8).write(prompts, DRAWN, "lora", SEEDS)
    assert found == Sampler(model.cpu(), 8).write(prompts, DRAWN, "lora", SEEDS)
    seeds, places = torch.arange(1000) * 2**40, torch.arange(1000)
    assert torch.equal(uniforms(seeds.cuda(), places.cuda()).cpu(), uniforms(seeds, places))


def test_with_invariant_every_bit_is_the_same_whatever_is_written_beside(tmp_path, prompts, monkeypatch):
    model = opened(tmp_path)
    rows: dict[int, list[torch.Tensor]] = {}
    take = Slots.take

    def recorded(self, slots, logits):
        part = self.table[slots]
        for going, seed, row in zip(part[:, 4].tolist(), part[:, 1].tolist(), logits, strict=True):
            if going:
                rows.setdefault(seed, []).append(row.clone())
        take(self, slots, logits)

    monkeypatch.setattr(Slots, "take", recorded)

    def logits_of(order):
        rows.clear()
        sampler = Sampler(model, 8, invariant=True, graphs=False)
        sampler.write([prompts[i] for i in order], DRAWN, "lora", [SEEDS[i] for i in order])
        return {seed: torch.stack(found) for seed, found in rows.items()}

    whole = logits_of(range(len(prompts)))
    for order in (range(len(prompts))[::-1], [11, 4], [11, 7, 1]):  # with the longest, so that slots have one size
        for seed, found in logits_of(order).items():
            assert torch.equal(found, whole[seed])


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_a_call_leaves_no_memory_in_use(tmp_path, prompts, storage):
    model = opened(tmp_path, storage=storage)
    sampler = Sampler(model, 8, dense=True)
    sampler.write(prompts, DRAWN, "lora", SEEDS)
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        sampler.write(prompts, DRAWN, "lora", SEEDS)
    assert torch.cuda.memory_allocated() <= before


def test_training_goes_on_between_calls(tmp_path, prompts):
    model = opened(tmp_path, storage="nf4")
    sampler = Sampler(model, 8)
    before = sampler.write(prompts, DRAWN, "lora", SEEDS)
    with torch.no_grad():
        for parameter in adapter_parameters(model, "lora").values():
            parameter.mul_(1.5)
    after = sampler.write(prompts, DRAWN, "lora", SEEDS)
    assert after != before
    assert after == Sampler(model, 8, graphs=False).write(prompts, DRAWN, "lora", SEEDS)
