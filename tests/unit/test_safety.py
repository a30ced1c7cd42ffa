"""The comparison of FP8 with bf16: fair data, runs that differ in the maths alone, and rows that say so."""

import csv
import random
from pathlib import Path

import pytest
import torch

from benchmarks import safety, safety_data, safety_run
from benchmarks.safety_data import SCALES, Data
from benchmarks.safety_run import Course, Entry
from burnish.data.tokenizer import Tokenizer
from burnish.engine.assemble import open_model
from burnish.engine.mesh import Mesh
from burnish.engine.start import Start
from burnish.evaluate.likelihood import held_out_loss
from burnish.model.families import find_model, parse_config
from burnish.ops import fp8
from burnish.settings import AdapterSettings, ModelSettings
from burnish.types import Sequence
from burnish.world import FAMILIES, SEEN, documents
from burnish.world.instructions import is_held_out

TINY = SCALES["tiny"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(find_model("embedded"))


@pytest.fixture(scope="module")
def data() -> Data:
    return safety_data.make_data(TINY, 2000, 2, 1)


@pytest.fixture(scope="module")
def course(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Course:
    """A base that knows nothing, and two steps from it."""
    course = Course(tmp_path_factory.mktemp("course"), "tiny", 2, 1)
    assert safety_run.pretrain(course, data, 2000, 9.0)["parameters"] == 213312
    return course


@pytest.fixture(autouse=True)
def _untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "FAST_ACCUMULATION", fp8.FAST_ACCUMULATION)  # runs have processes of their own, else


def answered(sequence: Sequence, tokenizer: Tokenizer) -> str:
    """The tokens that are trained."""
    return tokenizer.decode([id for id, weight in zip(sequence.ids, sequence.weights, strict=True) if weight])


def test_data_is_the_same_again_and_made_of_shards() -> None:
    data, again = (safety_data.make_data(TINY, 4000, 2, 1) for _ in range(2))
    assert (data.text.ids == again.text.ids).all()
    assert (data.questions.ids == again.questions.ids).all()
    shards = [safety_data.shard(seed, 4) for seed in range(3)]
    assert data.text.ids.tolist() == [id for shard in shards for id in shard.ids.tolist()]
    assert data.text.rows.tolist() == list(range(12))
    assert {name: len(rows) for name, rows in data.held_out.items()} == {"seen": 28, "unseen": 18, "general": 1}


def test_a_shard_holds_the_documents_of_its_seed(tokenizer: Tokenizer) -> None:
    corpus = safety_data.shard(3, 2)
    texts = [text for text, _ in zip(documents(3), range(2), strict=False)]
    end = next(iter(tokenizer.end_ids))
    assert [tokenizer.decode(sequence.ids[:-1]) for sequence in corpus] == texts
    assert {sequence.ids[-1] for sequence in corpus} == {end}
    assert all(sequence.weights == (0.0, *[1.0] * (len(sequence.ids) - 1)) for sequence in corpus)


@pytest.mark.parametrize("name", ["add", "spell", "kind", "story"])
def test_no_held_out_case_is_trained_on(name: str, tokenizer: Tokenizer) -> None:
    family, rng = FAMILIES[name], random.Random(0)
    held_out = {sequence.ids for sequence in safety_data.held_out_questions(name, 20, tokenizer)}
    trained = {sequence.ids for sequence in safety_data.training_questions(name, 200)}
    assert len(held_out) > 5
    assert len(trained) > 20
    assert not held_out & trained
    cases = [case for case in (family.draw(rng) for _ in range(300)) if is_held_out(family, case)]
    asked = [(wording.format(**case.slots), case.answer) for case in cases for wording in family.phrasings]
    assert not trained & {sequence.ids for sequence in safety_data.conversations(asked, tokenizer)}


def test_answers_are_what_is_learnt(tokenizer: Tokenizer) -> None:
    (one,) = safety_data.conversations([("What is 2 plus 2?", "4")], tokenizer)
    assert answered(one, tokenizer).replace(" ", "") == "4" + tokenizer.decode([one.ids[-1]]).replace(" ", "")


@pytest.mark.parametrize("size", SCALES)
def test_models_have_widths_that_8_bit_matmuls_take(size: str) -> None:
    config = parse_config(safety_data.config_of(SCALES[size]))
    assert config.hidden_size == config.num_heads * config.head_dim
    assert not any(width % 64 for width in (config.hidden_size, config.intermediate_size, config.vocab_size))


def test_a_run_cut_short_ends_at_a_rate_of_nothing() -> None:
    whole, cut = ([safety_run.rate(step, steps) for step in range(steps)] for steps in (1000, 400))
    assert whole[:250] == cut[:250]
    assert cut[-1] < 0.02 * max(cut)


def test_a_run_is_the_same_again(course: Course) -> None:
    first, again, other = (list(safety_run.tune(Entry("bf16", "bf16", seed), course)) for seed in (0, 0, 1))
    assert [one.held_out for one in first] == [one.held_out for one in again]
    assert first[2].held_out != other[2].held_out
    assert first[0].held_out == other[0].held_out
    assert first[2].held_out["seen"].loss < first[1].held_out["seen"].loss < first[0].held_out["seen"].loss


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_runs_of_a_seed_differ_by_their_maths_alone(storage: str, course: Course) -> None:
    exact, fast, slow = (
        {(one.step, one.reads): one for one in safety_run.tune(Entry(storage, maths, 0), course)}
        for maths in safety_run.MATHS
    )
    assert [*exact] == [(0, "bf16"), (1, "bf16"), (2, "bf16"), (2, "fp8"), (2, "fp8-slow")]
    assert [*slow] == [(0, "fp8-slow"), (1, "fp8-slow"), (2, "bf16"), (2, "fp8-slow")]
    assert all(one.end == (step == 2) for (step, _), one in exact.items())
    # A CPU adds up in one way only, and rounds in 8 bits like a GPU: this much of the loss, on the same weights.
    assert fast[2, "bf16"].held_out == slow[2, "bf16"].held_out
    before = [runs[0, maths].held_out["seen"].loss for maths, runs in (("bf16", exact), ("fp8", fast))]
    assert 0 < abs(before[1] / before[0] - 1) < 1e-3
    assert 0 < abs(fast[2, "bf16"].held_out["seen"].loss / exact[2, "bf16"].held_out["seen"].loss - 1) < 1e-3
    gradients = exact[2, "fp8"].gradients
    assert gradients is not None
    assert 0.005 < gradients.error < 0.15 < gradients.noise < 1.5
    assert gradients.shared < gradients.error
    assert exact[2, "bf16"].gradients is fast[2, "fp8"].gradients is None


def test_what_is_read_is_the_loss_of_each_token_and_question(course: Course, data: Data) -> None:
    mesh = Mesh(torch.device("cpu"))
    path = str(course.folder / "base")
    settings, run = ModelSettings(path=path, storage="fp32"), safety_run.run_settings(mesh)
    model, _ = open_model(Start(course.folder / "base"), settings, AdapterSettings(kind="none"), run, mesh)
    rows = data.held_out["unseen"]
    parts = safety_run.held_out_batches({"unseen": rows}, TINY._replace(pass_tokens=100), mesh.device)["unseen"]
    assert len(parts) > 2
    found, wanted = safety_run.read(model, None, parts), held_out_loss(model, rows, None, 1024)
    assert found.loss == pytest.approx(wanted["loss"], rel=1e-5)
    assert found.accuracy == pytest.approx(wanted["mean_token_accuracy"])
    alone = [held_out_loss(model, [row], None, 1024)["loss"] for row in rows]
    assert found.questions == pytest.approx(alone, rel=1e-5)


def test_how_far_gradients_move() -> None:
    random_BN = torch.randn(8, 20_000, generator=torch.Generator().manual_seed(0)).double()
    exact_BN = 3.0 + 4.0 * random_BN  # a norm of 5, of which batches do not share 4
    own_BN = torch.randn(8, 20_000, generator=torch.Generator().manual_seed(1)).double()
    found = safety_run.moved(exact_BN, exact_BN + 0.3 * own_BN + 0.4)
    assert found == pytest.approx((0.1, 0.08, 0.8), rel=0.02)
    assert safety_run.moved(exact_BN, exact_BN + 0.5 * own_BN).shared < 0.01


def test_slow_and_fast_accumulation_are_asked_of_the_matmuls(course: Course) -> None:
    for maths, fast in (("fp8-slow", False), ("fp8", True)):
        model, _ = safety_run.open_run(Entry("nf4", maths, 0), course.folder / "base", Mesh(torch.device("cpu")))
        assert fp8.FAST_ACCUMULATION is fast
        assert model.fused is not None
        assert model.fused.trunk.fp8


def test_it_trains_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["params=tiny", "steps=2", "every=2", "seeds=1", "pretrain_tokens=6000", "at_once=1", "commit=abc"]
    measured = safety.main(safety.read_words([*words, f"out={tmp_path / 'rows.csv'}"]))
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["storage"], row["maths"], row["step"], row["reads"]) for row in rows] == [
        (storage, maths, step, reads)
        for storage, maths in safety.KINDS
        for step, reads in [
            ("0", maths),
            *(("2", reads) for reads in (("bf16", "fp8", "fp8-slow") if maths == "bf16" else ("bf16", maths))),
        ]
    ]
    assert len(rows) == len(measured)
    assert {(row["commit"], row["lr"], row["step_tokens"]) for row in rows} == {("abc", "0.0002", "128")}
    last = measured[3]
    assert rows[3]["unseen_loss"] == f"{last.held_out['unseen'].loss:.5f}"
    assert last.gradients is not None
    assert rows[3]["gradient_noise"] == f"{last.gradients.noise:.5f}"
    said = capsys.readouterr().out
    assert "tokens a second" in said
    assert "failed" not in said


def test_the_committed_rows_have_the_columns_that_new_ones_have() -> None:
    with Path(safety.WORDS["out"]).open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == safety.COLUMNS
    assert all(len(row) == len(header) for row in rows)


def test_seeds_come_one_after_the_other() -> None:
    entries = list(safety.entries(3))
    assert [entry.seed for entry in entries] == [seed for seed in range(3) for _ in safety.KINDS]
    assert entries[:3] == [Entry("bf16", maths, 0) for maths in safety_run.MATHS]


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
    assert all(len(safety_data.training_questions(name, 10)) == 10 for name in SEEN)
