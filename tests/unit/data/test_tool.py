import json
from pathlib import Path
from typing import Any

import pytest

from burnish.config import build
from burnish.tools.data import ACTIONS, Config, main
from tests.tiny import tiny_tokenizer


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny_tokenizer(tmp_path / "model")
    (model / "config.json").write_text("{}")
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"r{k}", "weight": w}]}
        for k, w in enumerate((None, 0.5, None))
    ]
    rows.append({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": {"path": str(model)}, "data": {"path": str(tmp_path / "rows.jsonl")}, "evaluate": {"fraction": 0}}


def test_the_audit_for_people_and_for_programs(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    assert ACTIONS == ("audit", "preview")
    main(build(Config, settings), "audit", as_json=False)
    assert "4 in = 3 to train on + 0 held out + 1 dropped" in capsys.readouterr().out
    main(build(Config, settings), "audit", as_json=True)
    tree = json.loads(capsys.readouterr().out)
    assert (tree["rows_in"], tree["dropped"]["empty_response"]["rows"]) == (4, [3])


def test_the_preview_brackets_what_is_trained(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    main(build(Config, settings | {"rows": 2, "skip": 1}), "preview", as_json=False)
    told = capsys.readouterr().out
    assert "trained tokens are «like this»" in told
    assert "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«r1<|im_end|>»\n" in told
    assert "--- row 1: " in told
    assert "weights 0.5" in told
    assert "--- row 2: " in told
    assert "row 0" not in told


def test_the_preview_in_json(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    main(build(Config, settings | {"rows": 9}), "preview", as_json=True)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["row"] for row in rows] == [0, 1, 2]
    assert [part["weight"] for part in rows[1]["parts"]] == [0.0, 0.5, 0.0]
    assert rows[1]["parts"][1]["text"] == "r1<|im_end|>"


def test_the_preview_in_colour(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    main(build(Config, settings | {"rows": 1}), "preview", as_json=False)
    assert "\033[30;42mr0<|im_end|>\033[0m" in capsys.readouterr().out


def written(settings: dict[str, Any], rows: list[dict[str, Any]]) -> Config:
    path = Path(settings["data"]["path"])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build(Config, settings | {"rows": 1})


def test_compared_answers_are_audited_and_previewed(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    pairs = [{"prompt": f"hi {k}", "chosen": "yes", "rejected": "no"} for k in range(3)]
    main(written(settings, pairs), "audit", as_json=False)
    assert "pairs       3; better answers have" in capsys.readouterr().out
    main(written(settings, pairs), "audit", as_json=True)
    assert json.loads(capsys.readouterr().out)["answers"]["pairs"] == 3
    main(written(settings, pairs), "preview", as_json=False)
    told = capsys.readouterr().out
    assert "--- row 0, better: " in told
    assert "<|im_start|>assistant\n«yes<|im_end|>»" in told
    assert told.index("«yes") < told.index("--- row 0, worse: ") < told.index("«no<|im_end|>»")
    assert "row 1" not in told
    ranked = [{"prompt": "hi", "answers": ["c", "a", "b", "B"], "scores": [1, 3, 2, 2]}]
    main(written(settings, ranked), "preview", as_json=True)
    shown = json.loads(capsys.readouterr().out)["rows"]
    assert [row["answer"] for row in shown] == ["place 1", "place 2", "place 2", "place 3"]
    assert [row["parts"][1]["text"][0] for row in shown] == ["a", "b", "B", "c"]


def test_labels_and_prompts_are_previewed(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    judged = [{"prompt": f"hi {k}", "completion": f"r{k}", "label": k == 1} for k in range(3)]
    main(written(settings, judged), "preview", as_json=False)
    told = capsys.readouterr().out
    assert "--- row 0, unwanted: " in told
    assert "--- row 0, an answer to another prompt: " in told
    assert "row 1" not in told
    main(written(settings, [{"prompt": "hi", "answer": "yes"}]), "preview", as_json=False)
    assert "0 trained\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n\n" in capsys.readouterr().out + "\n"
