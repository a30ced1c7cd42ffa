import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from burnish.data.files import data_files, digest, read_rows
from burnish.data.hub import is_hub_id, split_files


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


ROWS = [{"text": "één"}, {"text": "two"}]


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    paths = {
        write(tmp_path / "a.jsonl", "\ufeff" + lines.replace("\n", "\n\n", 1)): [":1", ":3"],
        write(tmp_path / "a.json", json.dumps(ROWS, indent=2)): ["[0]", "[1]"],
        write(tmp_path / "b.json", json.dumps({"version": 1, "data": ROWS})): ["[0]", "[1]"],
        write(tmp_path / "c.json", lines): [":1", ":2"],
        str(tmp_path / "a.parquet"): ["[0]", "[1]"],
        write(tmp_path / "a.txt", "één\n\n\n  \ntwo"): [":1", ":5"],
    }
    for path, places in paths.items():
        assert list(read_rows(path)) == [(path + place, row) for place, row in zip(places, ROWS, strict=True)]


def test_a_text_file_is_a_document_for_each_paragraph(tmp_path: Path):
    path = write(tmp_path / "a.txt", "\n\nfirst line\nsecond line\n\nnext\n")
    assert [row["text"] for _, row in read_rows(path)] == ["first line\nsecond line", "next"]


def test_several_files_are_joined_up_to_a_limit(tmp_path: Path):
    paths = tuple(write(tmp_path / f"{n}.jsonl", f'{{"text": "{n}a"}}\n{{"text": "{n}b"}}\n') for n in range(3))
    texts = [row["text"] for _, row in read_rows(paths)]
    assert texts == ["0a", "0b", "1a", "1b", "2a", "2b"]
    assert [row["text"] for _, row in read_rows(paths, limit=3)] == texts[:3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": }\n', r"a\.jsonl:2: not JSON \(Expecting value at column 10\)"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"a\.jsonl:2: a row is a JSON object {\.\.\.}, not a list"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"a\.jsonl:2: not UTF-8 text .* at byte 10 of it"),
        ("a.json", '[\n{"text": "a"},\n{"text"}\n]', r"a\.json: not JSON \(.* at line 3, column 8\)"),
        ("a.json", '{"text": "a"}', r"a\.json should hold a list of rows, or one object a line, not a single object"),
        ("a.json", '"text"', r"a\.json should hold a list of rows, not text"),
        ("a.json", '[{"text": "a"}, 3]', r"a\.json\[1\]: a row is a JSON object {\.\.\.}, not a number"),
        ("a.parquet", "not parquet", r"a\.parquet cannot be read as Parquet"),
        ("a.txt", b"caf\xe9\n", r"a\.txt is not UTF-8 text"),
        ("a.csv", "a,b\n", r"a\.csv: Burnish reads \.jsonl, .* files, not '\.csv'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: str | bytes, message: str):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(path))


def test_a_missing_file_names_the_nearest(tmp_path: Path):
    write(tmp_path / "train.jsonl", "")
    with pytest.raises(ValueError, match=r"there is no file .*trian\.jsonl; did you mean .*train\.jsonl\?"):
        data_files(str(tmp_path / "trian.jsonl"))
    with pytest.raises(ValueError, match=r"there is no file .*question\.jsonl$"):
        data_files(str(tmp_path / "question.jsonl"))  # the ending alone is no likeness
    with pytest.raises(ValueError, match=r"there is no file .*x\.jsonl, nor a folder .*nowhere"):
        data_files(str(tmp_path / "nowhere" / "x.jsonl"))


def test_a_folder_is_read_like_a_data_set_of_the_hub(tmp_path: Path):
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl"):
        write(tmp_path / "data" / name, json.dumps({"text": name}) + "\n")
    assert [row["text"] for _, row in read_rows(str(tmp_path), "train")] == ["train-0.jsonl", "train-1.jsonl"]
    assert [row["text"] for _, row in read_rows(str(tmp_path), "test")] == ["test.jsonl"]
    with pytest.raises(ValueError, match=r"has no split 'dev' \(splits there: test, train\): write data\.split=NAME"):
        list(read_rows(str(tmp_path), "dev"))


def test_which_files_of_a_data_set_hold_a_split():
    sharded = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-0.parquet"]
    assert split_files(sharded, "train", "x") == sharded[:2]
    assert split_files(["rows.json"], "train", "x") == ["rows.json"]
    assert split_files(["train/0.jsonl", "validation/0.jsonl"], "validation", "x") == ["validation/0.jsonl"]
    assert split_files(["en/custom.jsonl", "en/train.jsonl"], "custom", "x") == ["en/custom.jsonl"]
    with pytest.raises(ValueError, match=r"several subsets \(main, socratic\): write data\.path=o/gsm8k/SUBSET"):
        split_files(["main/train-0.parquet", "socratic/train-0.parquet"], "train", "o/gsm8k")
    with pytest.raises(ValueError, match="holds no file that Burnish reads"):
        split_files([], "train", "x")


def test_what_looks_like_a_hub_id():
    assert all(map(is_hub_id, ("openai/gsm8k", "tatsu-lab/alpaca", "openai/gsm8k/main")))
    assert not any(map(is_hub_id, ("gsm8k", "/data/x", "./a/b", "a/b/c/d", "../x/y")))


def test_the_hub_is_asked_for_the_files_of_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    files = {"main/train-0.jsonl": '{"text": "a"}\n', "main/test-0.jsonl": '{"text": "b"}\n', "README.md": ""}

    def listed(self: object, identity: str, repo_type: str) -> list[str]:
        if (identity, repo_type) != ("owner/name", "dataset"):
            raise OSError("401 nothing of that name")
        return list(files)

    def download(identity: str, file: str, repo_type: str) -> str:
        return write(tmp_path / file, files[file])

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert [row for _, row in read_rows("owner/name", "train")] == [{"text": "a"}]
    assert [row for _, row in read_rows("owner/name/main", "test")] == [{"text": "b"}]
    with pytest.raises(ValueError, match=r"no file or folder other/name, and the hub's data set .*: 401 nothing"):
        list(read_rows("other/name", "train"))


def test_the_digest_follows_the_bytes(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    first = digest(path, "train")
    assert digest(path, "train") == first
    write(tmp_path / "a.jsonl", '{"text": "b"}\n')
    assert digest(path, "train") != first


def test_nested_values_of_parquet_have_no_keys_of_other_rows(tmp_path: Path):
    rows = [{"a": {"city": "x"}, "b": [{"n": 1}], "c": None}, {"a": {"stock": "y"}, "b": [{"m": 2}], "c": "z"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [row for _, row in read_rows(str(tmp_path / "rows.parquet"), "train", None)] == rows


def test_a_key_that_stands_twice_and_a_packed_file_are_named(tmp_path: Path):
    path = write(tmp_path / "twice.jsonl", '{"text": "a"}\n{"text": "a", "text": "b"}\n')
    with pytest.raises(ValueError, match=r"twice\.jsonl:2: the key 'text' stands twice"):
        list(read_rows(path, "train", None))
    packed = write(tmp_path / "packed.jsonl", gzip.compress(b'{"text": "a"}\n'))
    with pytest.raises(ValueError, match="this is a gzip file; unpack it first"):
        list(read_rows(packed, "train", None))
