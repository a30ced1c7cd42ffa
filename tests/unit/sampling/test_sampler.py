"""The sampler against the definition: each answer alone, with a full forward pass for every token."""

from types import SimpleNamespace

import pytest
import torch

from burnish.data.packing import collate
from burnish.data.tokenizer import Tokenizer
from burnish.model.adapters import AdapterSpec, adapter_parameters, add_adapter
from burnish.model.checkpoint import load_model
from burnish.model.decoder import Decoder
from burnish.sampling import sampler, writing
from burnish.sampling.sampler import NoRoomToWrite, Sampler, Sampling, generate
from burnish.sampling.slots import Slots
from burnish.sampling.streams import seed_of
from burnish.types import Sequence
from tests.tiny import tiny_folder

ENDS = frozenset(range(0, 320, 9))
"""One token in nine ends an answer: some answers are short, some long."""
LENGTHS = (7, 2, 19, 1, 30, 4, 12, 3, 25, 9, 5)
SEEDS = [seed_of(7, i) for i in range(len(LENGTHS))]
LAWS = {
    "greedy": Sampling(12, end_ids=ENDS),
    "drawn": Sampling(12, 1.0, end_ids=ENDS),
    "sharp": Sampling(9, 0.4, end_ids=ENDS),
    "cut": Sampling(12, 1.5, top_k=40, top_p=0.7, end_ids=ENDS),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def model(folder):
    model = load_model(folder, "fp32")
    add_adapter(model, "a", AdapterSpec(rank=2, dropout=0.5), torch.Generator().manual_seed(0))
    for parameter in adapter_parameters(model, "a").values():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 320, (length,), generator=generator).tolist() for length in LENGTHS]


def uniform(seed: int, place: int) -> float:
    """SplitMix64, in whole numbers of any size."""

    def mixed(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    return (mixed((mixed((seed * golden + 1) % 2**64) + (place + 1) * golden) % 2**64) >> 11) / 2**53


def choose(logits: torch.Tensor, sampling: Sampling, number: float) -> int:
    if not sampling.temperature:
        return int(logits.argmax())
    p = torch.softmax(logits.double() / sampling.temperature, 0).tolist()
    ranked = sorted(range(len(p)), key=lambda v: -p[v])[: sampling.top_k or len(p)]
    share, held, kept = sampling.top_p * sum(p[v] for v in ranked), 0.0, set()
    for v in ranked:
        if held < share:
            kept.add(v)
            held += p[v]
    passed = 0.0
    for v in sorted(kept):
        passed += p[v]
        if passed > number * held:
            return v
    raise AssertionError


@torch.no_grad()
def reference(model, prompt, seed, sampling, adapter=None):
    ids: list[int] = []
    model.eval()
    while len(ids) < sampling.max_tokens:
        row = [*prompt, *ids]
        logits = model.logits(collate([Sequence(tuple(row), (0.0,) * len(row), 0)]), adapter)[-1]
        ids.append(choose(logits, sampling, uniform(seed, len(ids))))
        if ids[-1] in sampling.end_ids:
            return tuple(ids), True
    return tuple(ids), False


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("adapter", [None, "a"])
def test_answers_are_those_of_a_full_forward_pass_per_token(model, prompts, law, adapter):
    sampling = LAWS[law]
    expected = [reference(model, p, seed, sampling, adapter) for p, seed in zip(prompts, SEEDS, strict=True)]
    assert len({len(ids) for ids, _ in expected}) > 3  # short and long ones: slots are refilled at different times
    for num_slots in (1, 3, 8, 64):
        assert Sampler(model, num_slots).write(prompts, sampling, adapter, SEEDS) == expected
    assert Sampler(model, 3, invariant=True).write(prompts, sampling, adapter, SEEDS) == expected


def test_order_company_and_budget_do_not_matter(model, prompts, monkeypatch):
    sampling = LAWS["drawn"]
    expected = Sampler(model, 4).write(prompts, sampling, None, SEEDS)
    order = [3, 9, 0, 10, 5, 1, 8, 2, 7, 6, 4]
    shuffled = Sampler(model, 4).write([prompts[i] for i in order], sampling, None, [SEEDS[i] for i in order])
    assert shuffled == [expected[i] for i in order]
    for i in (2, 5):
        assert Sampler(model, 4).write([prompts[i]], sampling, None, [SEEDS[i]]) == [expected[i]]
    monkeypatch.setattr(writing, "PREFILL_TOKENS", 10)
    monkeypatch.setattr(writing, "REFILL_SHARE", 1.0)
    assert Sampler(model, 4).write(prompts, sampling, None, SEEDS) == expected


def test_equal_prompts_are_answered_by_their_seeds(model, prompts):
    sampling, seeds = Sampling(10, 1.2, end_ids=ENDS), [seed_of(1, k) for k in range(9)]
    groups = [prompts[0]] * 4 + [prompts[4]] * 4 + [prompts[0]]
    found = Sampler(model, 8).write(groups, sampling, None, seeds)
    assert found == [Sampler(model, 1).write([p], sampling, None, [s])[0] for p, s in zip(groups, seeds, strict=True)]
    assert len(set(found)) == 9
    one_seed = Sampler(model, 8).write(groups, sampling, None, [seeds[0]] * 9)
    assert one_seed[0] == found[0]
    assert len(set(one_seed)) == 2


def test_a_finished_slot_is_given_the_next_prompt_at_once(model, prompts, monkeypatch):
    steps, reads = [], []
    decode, prefill = type(model).decode, type(model).prefill
    monkeypatch.setattr(
        type(model), "decode", lambda self, tokens, *a: steps.append(len(tokens)) or decode(self, tokens, *a)
    )
    monkeypatch.setattr(
        type(model), "prefill", lambda self, batch, *a: reads.append(len(batch.rows)) or prefill(self, batch, *a)
    )
    sampling = LAWS["drawn"]
    found = Sampler(model, 2).write(prompts, sampling, None, SEEDS)
    assert sum(reads) == len(prompts)
    assert reads[0] == 2
    assert max(reads[1:]) <= 2
    tokens = sum(len(one.ids) for one in found)
    # Both slots are busy but at the end, and one decodes what it takes: a token less than written, the first one.
    assert sum(steps) <= tokens - len(prompts) + sum(len(one.ids) == 1 for one in found) + sampling.max_tokens
    assert steps[-1] == 1


def test_dropout_is_off_and_the_mode_is_left_as_it_was(model, prompts):
    sampling = LAWS["drawn"]
    model.eval()
    expected = Sampler(model, 4).write(prompts, sampling, "a", SEEDS)
    assert not model.training
    model.train()
    assert Sampler(model, 4).write(prompts, sampling, "a", SEEDS) == expected
    assert all(module.training for module in model.modules())
    with pytest.raises(RuntimeError, match="broken"):
        Sampler(model, 4).write(prompts, Sampling(5, stop=("x",)), "a", SEEDS, broken)
    assert all(module.training for module in model.modules())
    assert expected != Sampler(model, 4).write(prompts, sampling, None, SEEDS)


def broken(ids):
    raise RuntimeError("broken")


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_model_whose_blocks_are_compiled_writes_the_same(folder, prompts):
    model = load_model(folder, "fp32")
    expected = Sampler(model, 4).write(prompts, LAWS["drawn"], None, SEEDS)
    model.compile_blocks(backend="aot_eager")
    assert Sampler(model, 4).write(prompts, LAWS["drawn"], None, SEEDS) == expected


def test_four_bit_weights_at_hand_in_full_change_no_answer(folder, prompts):
    model = load_model(folder, "nf4")
    add_adapter(model, "a", AdapterSpec(kind="dora", rank=2), torch.Generator().manual_seed(0))
    for adapter in (None, "a"):
        found = [Sampler(model, 4, dense=dense).write(prompts, LAWS["drawn"], adapter, SEEDS) for dense in (None, True)]
        assert found[0] == found[1]


@pytest.mark.parametrize("stop", [("e",), ("at", "ou"), ("never to be found",)])
def test_stop_strings_end_an_answer_where_they_are_completed(model, folder, prompts, stop):
    decode = Tokenizer.load(folder).decode
    free = Sampling(40, 1.0, end_ids=range(9))
    for one, found in zip(
        Sampler(model, 4).write(prompts, free, None, SEEDS),
        Sampler(model, 4).write(prompts, Sampling(40, 1.0, end_ids=range(9), stop=stop), None, SEEDS, decode),
        strict=True,
    ):
        lengths = [n for n in range(len(one.ids) + 1) if any(s in decode(list(one.ids[:n])) for s in stop)]
        assert found == ((one.ids[: lengths[0]], True) if lengths else one)


def test_an_answer_ends_with_its_end_token_or_at_its_limit(model, prompts):
    for limit in (1, 2, 12):
        found = Sampler(model, 4).write(prompts, Sampling(limit, 1.0, end_ids=ENDS), None, SEEDS)
        for one in found:
            assert one.ended == (one.ids[-1] in ENDS)
            assert not ENDS & set(one.ids[:-1])
            assert len(one.ids) == limit or one.ended
    assert {len(one.ids) for one in Sampler(model, 4).write(prompts, Sampling(6, 1.0), None, SEEDS)} == {6}
    assert Sampler(model, 4).write([], Sampling(6), None, []) == []


def test_prompts_must_leave_room_for_their_answers(model):
    sampler = Sampler(model, 2)
    too_long = (
        "^prompt 1: its 100 tokens and max_tokens=40 go beyond the 128 positions of the model: write max_tokens=28"
    )
    with pytest.raises(ValueError, match=too_long):
        sampler.write([[1], [1] * 100], Sampling(40), None, [0, 1])
    with pytest.raises(ValueError, match=r"its 128 tokens .*: leave it out, or use a model with more positions"):
        sampler.write([[1] * 128], Sampling(1), None, [0])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sampler.write([[1], []], Sampling(1), None, [0, 1])
    assert len(sampler.write([[1] * 88], Sampling(40), None, [0])[0].ids) == 40


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0: an answer has at least one token"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan must be 0"),
        ({"top_k": -1}, "top_k=-1 must be 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0"),
        ({"stop": ("a", "")}, "stop: an empty string"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_tokens": 5, **wrong})


@pytest.mark.parametrize("place", ["new_cache", "prefill", "decode"])
def test_memory_that_runs_out_is_told_with_what_it_was_for(model, prompts, monkeypatch, place):
    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Decoder, place, short)
    longest = max(map(len, prompts)) + 5
    training = model.training
    with pytest.raises(NoRoomToWrite) as told:
        Sampler(model, 2).write(prompts, Sampling(5, end_ids=(0,)), None, range(len(prompts)))
    assert str(told.value).startswith(
        f"out of memory while answers were written: 2 answers at once, of up to {longest} "
    )
    assert model.training == training


def test_an_error_that_is_no_lack_of_memory_stays_what_it_is(model, prompts, monkeypatch):
    def broken(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(Decoder, "decode", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        Sampler(model, 2).write(prompts, Sampling(5, end_ids=(0,)), None, range(len(prompts)))


def test_generate_gives_answers_without_their_end_and_stays_within_the_positions(model, prompts):
    asked = [*prompts, [5] * 120, [5] * 128, [5] * 200]
    expected = [reference(model, p, 0, LAWS["greedy"]) for p in prompts]
    found = generate(model, asked, 12, ENDS, num_slots=4)
    assert found[: len(prompts)] == [list(ids[:-1] if ended else ids) for ids, ended in expected]
    assert found[len(prompts)] == list(reference(model, [5] * 120, 0, Sampling(8, end_ids=ENDS))[0])[: len(found[11])]
    assert len(found[11]) <= 8
    assert found[12:] == [[], []]
    drawn = [generate(model, prompts, 12, ENDS, "a", 1.0, seed, slots) for seed, slots in ((1, 4), (1, 128), (2, 128))]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(("allowed", "wants"), [(1.0, True), (0.32, True), (0.3, False)])
def test_weights_are_turned_for_decoding_where_a_cap_leaves_room_for_them(monkeypatch, allowed, wants):
    """80 GB, of which 10 are held and 2 of these unused: weights of 13.5 GB want 16.875 free."""
    bytes_of = {"memory_reserved": 10e9, "memory_allocated": 8e9, "get_per_process_memory_fraction": allowed}
    for name, value in bytes_of.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70e9, 80e9))
    monkeypatch.setattr(sampler, "scratch_bytes", lambda *_: 13.5e9)
    on_card = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    assert Sampler(on_card, 1)._wants_scratch() == wants  # 0.32: 25.6 of 8 + 16.875 GB; 0.3: 24


def test_with_invariant_every_bit_is_the_same_whatever_is_written_beside(folder, prompts, monkeypatch):
    model = load_model(folder, "bf16", dtype=torch.bfloat16)
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
        sampler = Sampler(model, 5, invariant=True)
        sampler.write([prompts[i] for i in order], LAWS["drawn"], None, [SEEDS[i] for i in order])
        return {seed: torch.stack(found) for seed, found in rows.items()}

    whole = logits_of(range(len(prompts)))
    assert len(whole) == len(prompts)
    for order in (range(len(prompts))[::-1], [4], [2, 7, 1], [0, 5, 9, 3]):
        for seed, found in logits_of(order).items():
            assert torch.equal(found, whole[seed])
