"""Recorded passes against the same passes launch by launch. In place of CUDA graphs, the steps are run again."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from burnish.model import graphed
from burnish.model.adapters import AdapterSpec, adapter_parameters, add_adapter
from burnish.model.checkpoint import load_model
from burnish.model.decoder import Decoder
from burnish.model.graphed import Graphs, host_bound
from burnish.model.shelf import NAMES, Plan, keep_everything, keep_inputs
from burnish.ops import attention
from burnish.ops.blocks import BLOCK_ROWS, Blocks
from burnish.types import Batch
from tests.tiny import Groups, tiny_batch, tiny_folder, tiny_shared_batch

SHAPE = {"num_attention_heads": 2, "num_key_value_heads": 1}
WHOLE = (11, 4, 10, 7)  # 32 tokens, which need no padding
GROUPS: Groups = ((5, (3, 4)), (7, (2, 6, 3)))  # 30 tokens and 49 keys
WHOLE_GROUPS: Groups = ((8, (4, 4)), (8, (4, 4)))  # 32 tokens and 48 keys, which need none


class Again:
    """In the place of `Recorder`: what it records is run again."""

    def __init__(self) -> None:
        self.pools = self.recorded = 0
        self.room = 1 << 40

    def new_pool(self) -> int:
        self.pools += 1
        return self.pools

    def aside(self) -> nullcontext[None]:
        return nullcontext()

    def record(self, step: Callable[[], None], pool: int) -> Callable[[], None]:
        assert pool <= self.pools
        self.recorded += 1
        step()
        return step

    def allocated(self) -> int:
        return 0

    reserved = allocated

    def free(self) -> int:
        return self.room


def by_starts(q: Tensor, k: Tensor, v: Tensor, layout: attention.Layout, scale: float, window: int | None) -> Tensor:
    """Attention that knows sequences by their starts alone, as FlashAttention does, and refuses what would harm that.

    The last query of a sequence reads up to its last key.
    """
    starts, key_starts = layout.starts, layout.starts if layout.keys is None else layout.keys.starts
    (lengths, sequence), (key_lengths, key_sequence) = (
        (part.diff(), torch.repeat_interleave(torch.arange(len(part) - 1), part.diff()))
        for part in (starts, key_starts)
    )
    assert len(starts) == len(key_starts)
    assert (starts[-1], key_starts[-1]) == (len(q), len(k))
    assert lengths.min() >= 0
    assert (key_lengths >= lengths).all()  # each query reads one key at least
    assert key_lengths.max() <= layout.longest
    ends = key_starts[1:][sequence] - starts[1:][sequence] + torch.arange(len(q))
    back = ends[:, None] - torch.arange(len(k))
    seen = (sequence[:, None] == key_sequence) & (back >= 0) & (back < (window or len(k)))
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True).transpose(0, 1)


@torch.enable_grad()
def by_starts_backward(dout, given, out, lse, layout, scale, window):
    leaves = [x.detach().requires_grad_() for x in given]
    return torch.autograd.grad(by_starts(*leaves, layout, scale, window), leaves, dout)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_flash_forward", lambda *given: (by_starts(*given), (torch.zeros(1, 1),)))
    monkeypatch.setattr(attention, "_flash_backward", by_starts_backward)
    monkeypatch.setattr(attention, "_has_hopper_kernels", lambda device: False)
    monkeypatch.setattr(attention, "_kernel_shares_heads", lambda: True)
    monkeypatch.setattr(Decoder, "_padded", lambda self: False)
    monkeypatch.setattr(graphed, "ROWS", 16)
    monkeypatch.setattr(graphed, "SEQUENCES", 4)


def by_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float, window: int | None) -> Tensor:
    """Attention that knows sequences by the blocks of queries alone, as our own kernels do; rows in no block stay 0."""
    seen, row = torch.zeros(len(q), len(q), dtype=torch.bool), torch.arange(len(q))
    for first, end, start, prefix_start, prefix, _ in blocks.tables().queries.tolist():
        for reader in range(first, min(end, first + BLOCK_ROWS)):
            own, before = (row >= start) & (row <= reader), (row >= prefix_start) & (row < prefix_start + prefix)
            seen[reader] = own | before
    assert window is None
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True).transpose(0, 1)
    return torch.where(seen.any(1)[:, None, None], out, 0)


@torch.enable_grad()
def by_blocks_backward(dout, given, out, sums, blocks, scale, window):
    leaves = [x.detach().requires_grad_() for x in given]
    return torch.autograd.grad(by_blocks(*leaves, blocks, scale, window), leaves, dout)


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared prompts are read where they stand."""
    monkeypatch.setattr(attention, "_wants_blocks", lambda device: True)
    monkeypatch.setattr(attention, "forward_by_blocks", lambda *given: (by_blocks(*given), (torch.zeros(1, 1),)))
    monkeypatch.setattr(attention, "backward_by_blocks", by_blocks_backward)
    monkeypatch.setattr(attention, "takes_blocks", lambda width: True)


@pytest.fixture
def model(tmp_path: Path) -> Decoder:
    return made(tmp_path)


def made(path: Path, storage: str = "nf4", architecture: str = "Qwen2ForCausalLM") -> Decoder:
    window = {"sliding_window": 6} if architecture == "MistralForCausalLM" else {}
    model = load_model(tiny_folder(path / "model", architecture, **SHAPE, **window), storage)
    generator = torch.Generator().manual_seed(0)
    for name in () if storage == "full" else ("a", "b"):
        add_adapter(model, name, AdapterSpec(rank=3, alpha=6.0, targets="all-linear"), generator)
        for parameter in adapter_parameters(model, name).values():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    assert model.fuse_blocks()
    return model


def use_graphs(model: Decoder) -> Again:
    assert model.fused is not None
    again = Again()
    model.fused.graphs = Graphs(model.fused.trunk, model.fused.host, again)  # type: ignore[arg-type]
    return again


def recordings(model: Decoder) -> dict[graphed.Key, graphed.Recording]:
    assert model.fused is not None
    assert model.fused.graphs is not None
    return model.fused.graphs._recordings


def key_of(model: Decoder, batch: Batch) -> graphed.Key:
    use_graphs(model)
    assert model.fused is not None
    assert model.fused.graphs is not None
    return model.fused.graphs._key(torch.zeros(len(batch.tokens), 32), model._packed(batch), None, None)


def run(model: Decoder, batch: Batch, adapter: str | None = "a") -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    hidden = model.hidden(batch, adapter)
    back(hidden)
    return hidden.detach(), taken(model)


def back(hidden: Tensor) -> None:
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=hidden.dtype)
    (hidden * weights).sum().backward()


def taken(model: Decoder) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(gradient, theirs[1][name]) for name, gradient in ours[1].items())


@pytest.mark.parametrize("plan", [keep_everything(2), keep_inputs(2)], ids=["keep", "least"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_a_replayed_pass_is_the_same_to_the_last_bit(tmp_path: Path, architecture: str, plan: Plan) -> None:
    model = made(tmp_path, architecture=architecture)
    model.plan = plan
    batches = [tiny_batch(lengths, seed=seed) for seed, lengths in enumerate((WHOLE, (32,), (1, 31), (30, 1, 1)))]
    expected = [run(model, batch) for batch in batches]
    again = use_graphs(model)
    for _ in range(2):
        for batch, wanted in zip(batches, expected, strict=True):
            assert_same(run(model, batch), wanted)
    assert (again.recorded, len(recordings(model))) == (4, 2)  # of sequences up to 16 and up to 64 tokens


def test_batches_of_any_number_of_tokens_share_recordings(model: Decoder) -> None:
    batches = [tiny_batch(lengths, seed=seed) for seed, lengths in enumerate(((9, 9), (13, 4), (7, 7, 7), (16, 15)))]
    expected = [run(model, batch) for batch in batches]
    again = use_graphs(model)
    for batch, (hidden, gradients) in [*zip(batches, expected, strict=True)] * 2:
        ours, found = run(model, batch)
        torch.testing.assert_close(ours, hidden, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max())
    assert again.recorded == 2
    assert [(key.tokens, key.sequences, key.longest) for key in recordings(model)] == [(32, 4, 16)]


@pytest.mark.parametrize(
    ("lengths", "padded"),
    [
        *[((3,), (16, 4, 16)), ((16, 1, 1), (32, 4, 16)), ((20, 4, 4, 4), (32, 4, 64)), ((20, 4, 4, 3), (32, 8, 64))],
        *[((200, 60), (320, 4, 256)), ((1,) * 65, (80, 128, 16))],
    ],
)
def test_what_a_batch_is_padded_to(model: Decoder, lengths: tuple[int, ...], padded: tuple[int, int, int]) -> None:
    key = key_of(model, tiny_batch(lengths))
    assert (key.tokens, key.sequences, key.longest, key.keys, key.even) == (*padded, 0, False)


@pytest.mark.parametrize(
    ("groups", "padded"),
    [
        (GROUPS, (32, 8, 32, 64)),
        (((6, (10, 10)), (3, (2, 1))), (32, 8, 32, 48)),  # of 32 tokens and 41 keys
        (((4, (4, 8)), (8, (8,))), (32, 4, 32, 48)),  # 36 keys
        (WHOLE_GROUPS, (32, 4, 32, 48)),
        (((30, (200, 3)),), (256, 4, 512, 320)),  # 233 and 263: 286 with those that the padding reads
    ],
)
def test_what_a_batch_with_shared_prompts_is_padded_to(
    model: Decoder, groups: Groups, padded: tuple[int, int, int, int]
) -> None:
    key = key_of(model, tiny_shared_batch(groups)[1])
    assert (key.tokens, key.sequences, key.longest, key.keys, key.even) == (*padded, False)


@pytest.mark.usefixtures("in_place")
def test_keys_that_nobody_copies_make_no_recordings_of_their_own(model: Decoder) -> None:
    """What counts are tokens and sequences."""
    many = (GROUPS, ((9, (3, 4)), (3, (2, 6, 3))), ((1, (20, 2, 2, 2, 3)),))
    keys = {key_of(model, tiny_shared_batch(groups)[1])._replace(factors=None) for groups in many}
    assert [(key.tokens, key.sequences, key.longest, key.shared, key.keys) for key in keys] == [(32, 8, 32, True, 0)]
    key = key_of(model, tiny_batch((5, 9)))
    assert (key.tokens, key.longest, key.shared) == (16, 16, False)


def test_where_padding_would_take_the_device_longer_than_the_host_it_is_less(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    for most in (320, 319):  # 260 tokens are padded to 320, or by a quarter of those steps to 272
        monkeypatch.setattr(graphed, "host_bound", lambda config, tokens, *_, most=most: tokens <= most)
        found.append(key_of(model, tiny_batch((200, 60))).tokens)
    assert found == [320, 272]


def test_even_batches_are_not_padded(model: Decoder) -> None:
    batch = tiny_batch((64,) * 3)
    expected = run(model, batch)
    use_graphs(model)
    for _ in range(3):
        assert_same(run(model, batch), expected)
    assert [(key.tokens, key.sequences, key.longest, key.even) for key in recordings(model)] == [(192, 3, 64, True)]


def test_what_a_pass_gave_is_not_touched_by_the_next(model: Decoder) -> None:
    batches = [tiny_batch(WHOLE, seed=seed) for seed in range(4)]
    expected = [run(model, batch) for batch in batches]
    copies = [(hidden.clone(), {name: g.clone() for name, g in gradients.items()}) for hidden, gradients in expected]
    use_graphs(model)
    found = [run(model, batch) for batch in batches]
    for ours, theirs in zip(found, copies, strict=True):
        assert_same(ours, theirs)


def test_gradients_add_up(model: Decoder) -> None:
    batches = [tiny_batch(WHOLE, seed=seed) for seed in range(5)]

    def summed() -> dict[str, Tensor]:
        model.zero_grad()
        for batch in batches:
            back(model.hidden(batch, "a"))
        return taken(model)

    expected = summed()
    use_graphs(model)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in summed().items())


def test_two_passes_at_once(model: Decoder) -> None:
    first, second = tiny_batch(WHOLE), tiny_batch(WHOLE, seed=1)

    def both(adapter: str) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        hidden, other = model.hidden(first, "a"), model.hidden(second, adapter)
        back(hidden)
        back(other)
        return torch.cat((hidden, other)).detach(), taken(model)

    expected = [both("a"), both("b")]
    again = use_graphs(model)
    for _ in range(3):
        assert_same(both("a"), expected[0])
    assert again.recorded == 2  # of two passes for one key the second is not replayed
    for _ in range(3):
        assert_same(both("b"), expected[1])
    assert again.recorded == 4
    lanes = {key.factors.name: recording.lane for key, recording in recordings(model).items() if key.factors}
    assert lanes["a"] is not lanes["b"]
    with torch.no_grad():  # its halves are not between
        for _ in range(2):
            hidden = model.hidden(first, "a")
    assert again.recorded == 5
    assert not lanes["a"].busy
    assert torch.equal(hidden, expected[0][0][: len(hidden)])


def test_a_pass_that_is_given_up_frees_its_lane(model: Decoder) -> None:
    batch = tiny_batch(WHOLE)
    expected = run(model, batch)
    use_graphs(model)
    hidden = [model.hidden(batch, "a") for _ in range(2)][1]
    (recording,) = recordings(model).values()
    assert recording.lane.busy
    del hidden
    assert not recording.lane.busy
    assert_same(run(model, batch), expected)


def test_a_second_backward_pass_is_refused(model: Decoder) -> None:
    use_graphs(model)
    total = [model.hidden(tiny_batch(WHOLE), "a").sum() for _ in range(2)][1]
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        total.backward()


def test_the_gradient_of_the_stream(model: Decoder) -> None:
    batch, fused = tiny_batch((9, 4)), model.fused
    assert fused is not None
    given = model._packed(batch)

    def gradient() -> Tensor:
        x = model.model.embed_tokens(batch.tokens, torch.float32).detach().requires_grad_()
        back(fused(x, given, "a", model.plan))
        assert x.grad is not None
        return x.grad

    expected = gradient()
    use_graphs(model)
    found = [gradient() for _ in range(3)]
    assert len(recordings(model)) == 1
    for ours in found:
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert torch.equal(found[1], found[2])


def test_training_goes_the_same_way(model: Decoder) -> None:
    start = {name: p.detach().clone() for name, p in adapter_parameters(model, "a").items()}

    def trained() -> list[Tensor]:
        for name, parameter in adapter_parameters(model, "a").items():
            parameter.data.copy_(start[name])
            torch.autograd.graph.increment_version(parameter)
        optimizer = torch.optim.AdamW(adapter_parameters(model, "a").values(), lr=1e-2)
        for seed in range(6):
            optimizer.zero_grad()
            model.score(tiny_batch(WHOLE, seed=seed), "a").log_probs.sum().neg().backward()
            optimizer.step()
        return [p.detach().clone() for p in adapter_parameters(model, "a").values()]

    expected = trained()
    again = use_graphs(model)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(trained(), expected, strict=True))
    assert again.recorded == 2


def test_passes_without_gradients(model: Decoder) -> None:
    batch = tiny_batch(WHOLE)
    expected, _ = run(model, batch)
    bare = model.hidden(batch).detach()
    again = use_graphs(model)
    with torch.inference_mode():
        inside = [model.hidden(batch, "a") for _ in range(3)][2]
    assert torch.equal(inside, expected)
    assert again.recorded == 1
    with torch.no_grad():
        outside, without = model.hidden(batch, "a"), [model.hidden(batch) for _ in range(2)][1]
    assert torch.equal(outside, expected)
    assert torch.equal(without, bare)
    assert again.recorded == 2


def test_recordings_are_few(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "MAX_RECORDINGS", 2)
    batches = [tiny_batch((tokens,), seed=tokens) for tokens in (16, 32, 48, 80)]
    expected = [run(model, batch) for batch in batches]
    monkeypatch.setattr(graphed, "MAX_ATTEMPTS", 3)
    again = use_graphs(model)

    def pass_over(*places: int) -> list[int]:
        for place in places:
            assert_same(run(model, batches[place]), expected[place])
        return [key.tokens for key in recordings(model)]

    assert pass_over(0, 0, 1, 1) == [16, 32]
    assert pass_over(0, 2, 2) == [16, 48]  # 32 was not used for longest
    assert pass_over(3, 3, 1) == [16, 48]  # no more are made
    assert again.recorded == 6


def test_what_is_never_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, model = made(tmp_path / "full", "full"), made(tmp_path)
    again = [use_graphs(part) for part in (full, model)]
    host = Plan((frozenset({*NAMES} - {"x"}), frozenset(NAMES)), (frozenset({"x"}), frozenset()))
    for _ in range(3):
        run(full, tiny_batch(WHOLE), None)
        model.plan = host
        run(model, tiny_batch(WHOLE))
        model.plan = keep_everything(2)
    monkeypatch.setattr(graphed, "HOST_SECONDS", 1e-12)
    for _ in range(3):
        run(model, tiny_batch(WHOLE))
    assert [part.recorded for part in again] == [0, 0]


def test_nothing_is_recorded_where_memory_is_short_until_it_is_released(model: Decoder) -> None:
    again, batch = use_graphs(model), tiny_batch(WHOLE)
    again.room = graphed.MARGIN - 1
    for _ in range(3):
        run(model, batch)
    again.room += 1
    run(model, batch)
    assert again.recorded == 0
    assert model.fused is not None
    model.fused.release()
    for _ in range(2):
        run(model, batch)
    assert again.recorded == 2
    model.new_cache(1, 8)
    assert not recordings(model)


def test_recordings_of_factors_that_were_replaced_are_dropped(model: Decoder) -> None:
    use_graphs(model)
    batch = tiny_batch(WHOLE)
    for _ in range(2):
        run(model, batch)
    (old,) = recordings(model)
    add_adapter(model, "c", AdapterSpec(rank=3), torch.Generator())
    for module in model.modules():
        if "a" in getattr(module, "adapters", {}):
            module.adapters["a"] = module.adapters["c"]  # type: ignore[union-attr]
    found = [run(model, batch) for _ in range(3)]
    (new,) = recordings(model)
    assert new.factors is not old.factors
    assert_same(found[2], found[0])


def test_where_the_host_is_slower(tmp_path: Path) -> None:
    def config(**sizes: int):
        folder = tiny_folder(tmp_path / str(sizes["hidden_size"]), "Qwen2ForCausalLM")
        return dataclasses.replace(load_model(folder, "fp32").config, **sizes)

    half = config(hidden_size=896, intermediate_size=4864, num_heads=14, num_kv_heads=2, head_dim=64)
    seven = config(hidden_size=4096, intermediate_size=11008, num_heads=32, num_kv_heads=32, head_dim=128)
    # A block of the first has 14.9 million weights: 2,048 tokens take 0.21 Tflop there and back, of 2.04 in 3.4 ms.
    assert host_bound(half, 2048, 2048, fp8=False)
    assert not host_bound(half, 32768, 2048, fp8=False)
    assert host_bound(half, 32768, 2048, fp8=True)
    assert not host_bound(seven, 8192, 2048, fp8=True)
    assert host_bound(seven, 1024, 1024, fp8=False)
    # Two pairs of 512 + 512 tokens with their prompts shared: 3.81 Tflop, of 4.08 in 8 bits.
    assert host_bound(seven, 3074, 1024, fp8=True)
    assert not host_bound(seven, 3074, 1024, fp8=False)


def test_a_batch_gives_the_same_numbers_before_it_is_recorded_and_after(model: Decoder) -> None:
    use_graphs(model)
    batch = tiny_batch((9, 8))  # 17 tokens: padded
    first = run(model, batch)
    for _ in range(3):
        assert_same(run(model, batch), first)
    assert recordings(model)


def shared(groups: Groups, seed: int = 0) -> Batch:
    return tiny_shared_batch(groups, seed)[1]


@pytest.mark.parametrize("plan", [keep_everything(2), keep_inputs(2)], ids=["keep", "least"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_shared_prompts_are_the_same_to_the_last_bit(tmp_path: Path, architecture: str, plan: Plan) -> None:
    model = made(tmp_path, architecture=architecture)
    model.plan = plan
    batches = [shared(WHOLE_GROUPS, seed) for seed in range(3)]
    expected = [run(model, batch) for batch in batches]
    again = use_graphs(model)
    for _ in range(2):
        for batch, wanted in zip(batches, expected, strict=True):
            assert_same(run(model, batch), wanted)
    assert (again.recorded, len(recordings(model))) == (2, 1)


MANY: tuple[Groups, ...] = (
    GROUPS,
    ((9, (1, 1, 1, 1)), (4, (2, 5))),  # 24 tokens and 57 keys
    ((6, (10, 10)), (3, (2, 1))),  # 32 and 41
    ((2, (3,)), (1, (4, 4)), (3, (1, 1, 1)), (2, (2, 2)), (1, (1, 1))),  # 29 tokens in more sequences than a bucket has
    ((16, (5, 5)), (2, (3,))),
    ((10, (2, 8)),),  # 20 and 30: 32 keys would leave 2 for 12 tokens of padding
)


def test_batches_that_share_prompts_in_any_way_are_the_same_before_and_after(model: Decoder) -> None:
    batches = [shared(groups, seed) for seed, groups in enumerate(MANY)]
    again = use_graphs(model)
    first = [run(model, batch) for batch in batches]
    for _ in range(2):
        for batch, wanted in zip(batches, first, strict=True):
            assert_same(run(model, batch), wanted)
    assert sorted((key.tokens, key.sequences, key.keys) for key in recordings(model)) == [
        *((32, 4, 48), (32, 8, 48), (32, 8, 64), (32, 16, 48)),
    ]
    assert again.recorded == 8


@pytest.mark.usefixtures("in_place")
def test_recordings_read_prompts_where_they_stand_in_each_batch(model: Decoder) -> None:
    batches = [*(shared(groups, seed) for seed, groups in enumerate(MANY)), tiny_batch((9, 8, 3, 2, 1))]
    launched = [run(model, batch) for batch in batches]
    again = use_graphs(model)
    first = [run(model, batch) for batch in batches]
    for ours, theirs in zip(first, launched, strict=True):
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    for _ in range(2):
        for batch, wanted in zip(batches, first, strict=True):
            assert_same(run(model, batch), wanted)
    assert sorted((key.tokens, key.sequences, key.shared, key.keys) for key in recordings(model)) == [
        *((32, 4, True, 0), (32, 8, False, 0), (32, 8, True, 0), (32, 16, True, 0)),
    ]
    assert again.recorded == 8


@pytest.mark.parametrize("way", ["copied", "in place"])
@pytest.mark.parametrize("groups", MANY)
def test_shared_prompts_have_the_gradients_of_autograd(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, groups: Groups, way: str, request: pytest.FixtureRequest
) -> None:
    if way == "in place":
        request.getfixturevalue("in_place")
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # norms and rotations go through fp32
    batch, model.dtype = shared(groups), torch.float64
    use_graphs(model)
    for _ in range(2):
        hidden, gradients = run(model, batch)
    assert len(recordings(model)) == 1
    monkeypatch.setattr(Decoder, "_padded", lambda self: True)
    model.fused = None
    expected, wanted = run(model, batch)
    torch.testing.assert_close(hidden, expected, rtol=1e-9, atol=1e-9)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6 * wanted[name].abs().max().item())


def test_batches_with_and_without_shared_prompts_take_turns(model: Decoder) -> None:
    batches = [shared(GROUPS), tiny_batch((9, 8, 3, 2, 1)), shared(GROUPS, 1), tiny_batch((64,) * 2)]
    use_graphs(model)
    first = [run(model, batch) for batch in batches]
    with torch.no_grad():
        bare = [model.hidden(batch) for batch in batches]
    for _ in range(3):
        for batch, wanted, without in zip(batches, first, bare, strict=True):
            assert_same(run(model, batch), wanted)
            with torch.no_grad():
                assert torch.equal(model.hidden(batch), without)
    assert sorted((key.keys, key.plan is not None) for key in recordings(model)) == [
        *((0, False), (0, False), (0, True), (0, True), (64, False), (64, True)),
    ]


def test_a_batch_has_the_same_numbers_with_gradients_and_without(model: Decoder) -> None:
    batch = shared(GROUPS)
    use_graphs(model)
    with_gradients = [run(model, batch)[0] for _ in range(3)]
    with torch.no_grad():
        without = [model.hidden(batch, "a") for _ in range(3)]
    assert all(torch.equal(hidden, with_gradients[0]) for hidden in (*with_gradients, *without))


def test_an_adapter_that_changes_between_the_halves_of_a_replay_is_refused(model: Decoder) -> None:
    batch = tiny_batch(WHOLE)
    use_graphs(model)
    for _ in range(2):
        run(model, batch)
    hidden = model.hidden(batch, "a")
    with torch.no_grad():
        for parameter in adapter_parameters(model, "a").values():
            parameter.mul_(2)
    model.prepare("a")
    with pytest.raises(RuntimeError, match="the adapter has changed"):
        back(hidden)


def test_a_model_that_does_not_train_on_recordings_is_not_padded_without_gradients_either(tmp_path: Path) -> None:
    """The first margin of DPO must be 0: policy and reference read alike."""
    batch = tiny_batch((9, 8))
    for storage, adapter, plan in (("full", None, None), ("nf4", "a", hosted())):
        model = made(tmp_path / storage, storage)
        use_graphs(model)
        model.plan = plan or model.plan
        with torch.no_grad():
            for _ in range(3):
                read = model.hidden(batch, adapter)
        assert torch.equal(read, run(model, batch, adapter)[0])
        assert not recordings(model)


def hosted() -> Plan:
    everything = frozenset(NAMES)
    return Plan((everything - {"x"}, everything), (frozenset({"x"}), frozenset()))


def test_after_a_release_recordings_are_made_again_if_they_were_worth_it(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphed, "MAX_ATTEMPTS", 1)
    recorder = use_graphs(model)
    batch, fused = tiny_batch(WHOLE), model.fused
    assert fused is not None
    for times, recorded in ((graphed.WORTH + 2, 1), (2, 2), (5, 2)):
        for _ in range(times):
            run(model, batch)
        assert recorder.recorded == 2 * recorded  # two halves each
        fused.release()
