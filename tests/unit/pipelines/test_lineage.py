"""What goes into a stage, told apart by content."""

from pathlib import Path

import pytest

from burnish.pipelines import lineage
from burnish.pipelines.lineage import contents, differences, fingerprint, left, read_lineage, write_lineage


def test_a_fingerprint_is_of_names_and_bytes_not_of_the_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"12345")
    before = fingerprint(tmp_path / "a")
    assert before == fingerprint(tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("no part of the model")
    (tmp_path / "b" / ".cache").mkdir()
    (tmp_path / "b" / ".cache" / "x.json").write_text("{}")
    assert fingerprint(tmp_path / "b") == before
    (tmp_path / "b" / "model.safetensors").write_bytes(b"12346")
    assert fingerprint(tmp_path / "b") != before
    (tmp_path / "a" / "config.json").rename(tmp_path / "a" / "other.json")
    assert fingerprint(tmp_path / "a") != before


def test_of_a_run_what_it_trained_counts(tmp_path: Path) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"1")
    before = fingerprint(tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text("[]")
    assert fingerprint(tmp_path / "run") == before
    assert left(tmp_path / "run") == {"adapter": {"bytes": 1, "fingerprint": fingerprint(tmp_path / "run" / "adapter")}}


@pytest.mark.parametrize("changed", [0, 700_000, 10_000_000 - 1])
def test_large_weights_are_read_in_samples_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: int
) -> None:
    monkeypatch.setattr(lineage, "LARGE", 1_000_000)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(10_000_000))
    before = fingerprint(file)
    fine_tuned = bytearray(10_000_000)
    for place in (changed, *range(65_000, 10_000_000, 65_000)):  # training changes weights everywhere
        fine_tuned[place] = 1
    file.write_bytes(fine_tuned)
    assert fingerprint(file) != before
    file.write_bytes(bytes(10_000_001))
    assert fingerprint(file) != before


def test_files_are_looked_for_where_settings_name_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "more.jsonl", "rewards.py", "cosine"):
        (tmp_path / name).write_text(name)
    settings = {
        "data.path": ["rows.jsonl", "more.jsonl"],
        "reward.function": "rewards.py:score",
        "optim.schedule": "cosine",
        "evaluate.path": None,
        "stages.reward.function": None,
        "model.path": "owner/name",
        "data.split": "train",
    }
    found = contents(settings, {})
    assert found.keys() == {"data.path", "reward.function"}
    assert found["data.path"] == f"{fingerprint(Path('rows.jsonl'))} {fingerprint(Path('more.jsonl'))}"
    embedded = contents({"data.path": "embedded", "model.path": "embedded"}, {})
    assert len(set(embedded.values())) == 2


def test_differences_are_told_in_words() -> None:
    before = {"recipe": "dpo", "beta": 0.1, "content of data.path": "a", "stage from=sft": "k", "gone": 1}
    now = {"recipe": "dpo", "beta": 0.2, "content of data.path": "b", "stage from=sft": "l", "new": None}
    assert differences(before, now) == [
        "beta (0.1 before, 0.2 now)",
        "the content of data.path",
        "stage from=sft",
        "gone (1 before, not given now)",
        "new (not given before, null now)",
    ]
    assert differences(before, before) == []


def test_a_lineage_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_lineage(tmp_path / "none") == {}
    write_lineage(tmp_path / "new", {"sft": {"key": "k"}})
    assert read_lineage(tmp_path / "new") == {"sft": {"key": "k"}}
    (tmp_path / "new" / "lineage.json").write_text("[]")
    with pytest.raises(ValueError, match=r"lineage\.json cannot be read"):
        read_lineage(tmp_path / "new")
