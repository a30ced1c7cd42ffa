"""The comparison of FP8 with bf16: fair data, runs that differ in the maths alone, and honest arithmetic."""

import csv
import random
from pathlib import Path

import pytest
import torch

from benchmarks import safety
from benchmarks.safety import Entry, Measured
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.mesh import Mesh
from burnish.model.families import find_model, parse_config
from burnish.types import Sequence
from burnish.world import FAMILIES, SEEN, documents
from burnish.world.instructions import is_held_out


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(find_model("embedded"))


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and held-out data of a size for a test."""
    for name, value in (
        ("STEP_TOKENS", 128),
        ("PRETRAIN_STEP_TOKENS", 2048),
        ("PASS_TOKENS", 1024),
        ("SHARD", 4),
        ("SEEN_QUESTIONS", 1),
        ("UNSEEN_QUESTIONS", 2),
        ("WARM_UP", 1),
        ("TIMED", 1),
    ):
        monkeypatch.setattr(safety, name, value)
    general = safety.general_sequences

    def first(source: str, tokenizer: Tokenizer, template: ChatTemplate, longest: int) -> list[Sequence]:
        return general(source, tokenizer, template, longest)[:1]

    monkeypatch.setattr(safety, "general_sequences", first)


def answered(sequence: Sequence, tokenizer: Tokenizer) -> str:
    """The tokens that are trained."""
    return tokenizer.decode([id for id, weight in zip(sequence.ids, sequence.weights, strict=True) if weight])


@pytest.mark.usefixtures("little")
def test_data_is_the_same_again_and_made_of_shards() -> None:
    data, again = (safety.make_data(4000, 2, 1) for _ in range(2))
    assert (data.text.ids == again.text.ids).all()
    assert (data.questions.ids == again.questions.ids).all()
    shards = [safety.shard(seed, 4) for seed in range(3)]
    assert data.text.ids.tolist() == [id for shard in shards for id in shard.ids.tolist()]
    assert data.text.rows.tolist() == list(range(12))
    assert {name: len(rows) for name, rows in data.held_out.items() if name != "general"} == {"seen": 28, "unseen": 18}


def test_a_shard_holds_the_documents_of_its_seed(tokenizer: Tokenizer) -> None:
    corpus = safety.shard(3, 2)
    texts = [text for text, _ in zip(documents(3), range(2), strict=False)]
    end = next(iter(tokenizer.end_ids))
    assert [tokenizer.decode(sequence.ids[:-1]) for sequence in corpus] == texts
    assert {sequence.ids[-1] for sequence in corpus} == {end}
    assert all(sequence.weights == (0.0, *[1.0] * (len(sequence.ids) - 1)) for sequence in corpus)


@pytest.mark.parametrize("name", ["add", "spell", "kind", "story"])
def test_no_held_out_case_is_trained_on(name: str, tokenizer: Tokenizer) -> None:
    family, rng = FAMILIES[name], random.Random(0)
    held_out = {sequence.ids for sequence in safety.held_out_questions(name, 20, tokenizer)}
    trained = {sequence.ids for sequence in safety.training_questions(name, 200)}
    assert len(held_out) > 5
    assert len(trained) > 20
    assert not held_out & trained
    cases = [case for case in (family.draw(rng) for _ in range(300)) if is_held_out(family, case)]
    asked = [(wording.format(**case.slots), case.answer) for case in cases for wording in family.phrasings]
    assert not trained & {sequence.ids for sequence in safety.conversations(asked, tokenizer)}


def test_answers_are_what_is_learnt(tokenizer: Tokenizer) -> None:
    (one,) = safety.conversations([("What is 2 plus 2?", "4")], tokenizer)
    assert answered(one, tokenizer).replace(" ", "") == "4" + tokenizer.decode([one.ids[-1]]).replace(" ", "")


@pytest.mark.parametrize("size", safety.SIZES)
def test_models_have_widths_that_8_bit_matmuls_take(size: str) -> None:
    config = parse_config(safety.config_of(size))
    assert config.hidden_size == config.num_heads * config.head_dim
    assert not any(width % 64 for width in (config.hidden_size, config.intermediate_size, config.vocab_size))


def test_a_run_cut_short_ends_at_a_rate_of_nothing() -> None:
    whole, cut = ([safety.rate(step, steps) for step in range(steps)] for steps in (1000, 400))
    assert whole[:250] == cut[:250]
    assert cut[-1] < 0.02 * max(cut)


def test_what_fp8_changes_is_held_against_what_a_seed_changes() -> None:
    text = safety.comparison([(1.0, 1.01), (1.04, 1.03)])
    assert text.startswith("fp8 - bf16 +0.0100, -0.0100 (mean +0.0000); seeds differ by 0.0400 and 0.0200 in bf16")
    assert text.endswith("within the spread")
    assert safety.comparison([(1.0, 1.1), (1.01, 1.12)]).endswith("beyond the spread")


def test_the_table_compares_the_ends_of_runs_by_storage() -> None:
    def measured(storage: str, fp8: bool, seed: int, step: int, loss: float, reads: str) -> Measured:
        return Measured(Entry(storage, fp8, seed), step, reads, {"seen": loss}, {"seen": 0.5}, 1.0, 1.0)

    found = [
        measured("bf16", fp8, seed, step, loss, "fp8" if fp8 else "bf16")
        for fp8, seed, step, loss in [
            (False, 0, 0, 9.0),
            (False, 0, 8, 1.0),
            (True, 0, 8, 1.01),
            (False, 1, 8, 1.04),
            (True, 1, 8, 1.05),
        ]
    ]
    found += [measured("bf16", True, 0, 8, 5.0, "bf16"), measured("nf4", False, 0, 8, 2.0, "bf16")]
    lines = safety.table(found)
    assert len(lines) == 1 + 6 + 1
    assert "bf16 fp8 seed 0 | bf16 | 5.0000 | 0.5000" in lines
    assert lines[-1].startswith("bf16, seen: fp8 - bf16 +0.0100, +0.0100 (mean +0.0100)")
    assert safety.table([]) == ["run | read in | accuracy on seen"]


@pytest.mark.usefixtures("little")
def test_it_trains_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["params=tiny", "steps=3", "every=2", "seeds=1", "pretrain_tokens=6000", "workers=1", "commit=abc"]
    measured = safety.main(safety.read_words([*words, f"out={tmp_path / 'rows.csv'}"]))
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(measured) == 2 * 3 + 2 * 4  # FP8 runs are read once more, in bf16
    assert [(row["maths"], row["seed"], row["step"], row["reads"]) for row in rows[:8]] == [
        *(("bf16", "0", str(step), "bf16") for step in (0, 2, 3)),
        *(("fp8", "0", str(step), "fp8") for step in (0, 2, 3)),
        ("fp8", "0", "3", "bf16"),
        ("bf16", "0", "0", "bf16"),
    ]
    assert {row["storage"] for row in rows} == {"bf16", "nf4"}
    assert len({row["commit"] for row in rows} | {row["pretrain_tokens"] for row in rows}) == 2
    by_run = {(one.entry, one.step, one.reads): one.losses["seen"] for one in measured}
    start, end = (by_run[Entry("bf16", False, 0), step, "bf16"] for step in (0, 3))
    assert end < start  # it learns
    changed = by_run[Entry("bf16", True, 0), 0, "fp8"] - start
    assert 0 < abs(changed) < 0.1  # FP8 is other maths, of the same model
    assert "tokens a second" in capsys.readouterr().out


@pytest.mark.usefixtures("little")
def test_a_run_is_the_same_again(tmp_path: Path) -> None:
    data, mesh = safety.make_data(2000, 2, 1), Mesh(torch.device("cpu"))
    base, about = safety.pretrain(safety.WORDS | {"params": "tiny", "pretrain_tokens": "2000"}, data, tmp_path, mesh, 9)
    assert about["parameters"] == 213312
    first, again, other = (safety.tune(Entry("bf16", False, seed), base, data, mesh, (2, 2)) for seed in (0, 0, 1))
    assert [one.losses for one in first] == [one.losses for one in again]
    assert first[-1].losses != other[-1].losses
    assert first[0].losses == other[0].losses


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("param=tiny", r"did you mean params=\.\.\.\?$"),
        ("params=7b", "write one of tiny, 150m, 300m$"),
        ("steps=0", "must be a whole number above 0$"),
    ],
)
def test_a_word_that_is_not_known_is_named(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        safety.read_words([word])


def test_every_family_has_something_to_train_on() -> None:
    assert all(len(safety.training_questions(name, 10)) == 10 for name in SEEN)
