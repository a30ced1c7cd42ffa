import json
import warnings
from pathlib import Path

import pytest

from burnish.data.tokenizer import Tokenizer
from tests.tiny import tiny_tokenizer
from tests.unit.data.families import CHATML, chat_tokenizer

TEXTS = (
    "",
    "The cat sat on the mat.",
    "  two  spaces\n\n\nand lines\t",
    "héllo wörld, 日本語 🙂👩‍👩‍👧",
    "<s>What is<|im_end|> 3 plus</s> 4?",
    "\x00\x7f\u200b weird",
)


def transformers_tokenizer(folder: Path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("settings", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
def test_ids_are_those_of_transformers(tmp_path: Path, kind: str, settings: dict[str, bool]):
    folder = chat_tokenizer(tmp_path, None, kind, **settings)
    ours, theirs = Tokenizer.load(folder), transformers_tokenizer(folder)
    for text in TEXTS:
        plain = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == plain
        whole = theirs(text).input_ids
        assert ours.adds_bos == (len(whole) > len(plain))
        assert ours.encode(text, add_bos=True) == whole
        assert ours.decode(plain, keep_special=True) == theirs.decode(plain, skip_special_tokens=False)
        assert ours.decode(plain) == theirs.decode(plain, skip_special_tokens=True)
    assert ours.vocab_size == len(theirs)
    assert ours.special == theirs.special_tokens_map


def test_tokens_that_only_the_config_knows_get_the_ids_of_transformers(tmp_path: Path):
    listed = {"9001": {"content": "<|tool|>", "special": True}, "9000": {"content": "<note>", "special": False}}
    folder = chat_tokenizer(tmp_path, None, added_tokens_decoder=listed, pad_token="<pad>")
    ours, theirs = Tokenizer.load(folder), transformers_tokenizer(folder)
    for token in ("<|tool|>", "<note>", "<pad>"):
        assert ours.id_of(token) == theirs.convert_tokens_to_ids(token)
    text = "a <|tool|>b<note>c <pad>"
    assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids


def test_a_length_in_tokenizer_json_cuts_nothing(tmp_path: Path):
    folder = chat_tokenizer(tmp_path, None)
    tree = json.loads((folder / "tokenizer.json").read_text())
    whole = Tokenizer.load(folder).encode("The cat sat on the mat. " * 20)
    tree["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    assert len(whole) > 40
    assert Tokenizer.load(folder).encode("The cat sat on the mat. " * 20) == whole


def test_end_tokens_come_from_every_file_that_names_some(tmp_path: Path):
    folder = chat_tokenizer(tmp_path, None)
    (folder / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 7}}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.end_ids == {tokenizer.id_of("</s>"), 5, 6, 7}


def test_the_list_form_of_chat_templates(tmp_path: Path):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    assert Tokenizer.load(chat_tokenizer(tmp_path / "a", None, chat_template=named)).chat_template == "D"
    assert Tokenizer.load(chat_tokenizer(tmp_path / "b", None, chat_template="plain")).chat_template == "plain"
    assert Tokenizer.load(chat_tokenizer(tmp_path / "c", "file", chat_template="plain")).chat_template == "file"
    assert Tokenizer.load(chat_tokenizer(tmp_path / "d", None)).chat_template is None


def test_special_tokens_written_as_objects(tmp_path: Path):
    folder = chat_tokenizer(tmp_path, None, bos_token={"__type": "AddedToken", "content": "<|im_start|>"})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.special["bos_token"] == "<|im_start|>"
    assert tokenizer.bos_id == tokenizer.id_of("<|im_start|>")


def test_saved_files_load_to_the_same_tokenizer(tmp_path: Path):
    folder = chat_tokenizer(tmp_path / "from", None, chat_template=CHATML)
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(tmp_path / "same")
    again = Tokenizer.load(tmp_path / "same")
    assert again.chat_template == CHATML
    assert again.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])
    tokenizer.save(tmp_path / "other", template="{{ messages }}")
    assert Tokenizer.load(tmp_path / "other").chat_template == "{{ messages }}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert transformers_tokenizer(tmp_path / "other").chat_template == "{{ messages }}"
    assert json.loads((tmp_path / "other" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"


def test_the_fingerprint_follows_the_files(tmp_path: Path):
    first = Tokenizer.load(tiny_tokenizer(tmp_path / "a")).fingerprint
    assert first == Tokenizer.load(tiny_tokenizer(tmp_path / "b")).fingerprint
    (tmp_path / "b" / "chat_template.jinja").write_text("changed")
    assert first != Tokenizer.load(tmp_path / "b").fingerprint


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer.json"),
        ({"tokenizer.model": "x"}, "has tokenizer.model but no tokenizer.json; convert it once"),
        ({"tokenizer.json": "{"}, "tokenizer.json cannot be read as a tokenizer"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, files: dict[str, str], message: str):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


def test_broken_settings_are_named(tmp_path: Path):
    folder = chat_tokenizer(tmp_path, None)
    (folder / "tokenizer_config.json").write_text("{oops")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json cannot be read as JSON"):
        Tokenizer.load(folder)
    with pytest.raises(ValueError, match="there is no folder"):
        Tokenizer.load(tmp_path / "nowhere")


LISTED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]


def test_a_tool_template_is_the_one_transformers_takes_and_saves_with_the_rest(tmp_path: Path):
    listed = chat_tokenizer(tmp_path / "listed", None, chat_template=LISTED)
    hidden = chat_tokenizer(tmp_path / "hidden", "file", chat_template=LISTED)
    beside = chat_tokenizer(tmp_path / "beside", "file")
    (beside / "additional_chat_templates").mkdir()
    (beside / "additional_chat_templates" / "tool_use.jinja").write_text("tool file")
    expected = {listed: ("plain", "tools"), hidden: ("file", None), beside: ("file", "tool file")}
    for folder, templates in expected.items():
        Tokenizer.load(folder).save(folder / "copy")
        for place in (folder, folder / "copy"):
            ours, theirs = Tokenizer.load(place), transformers_tokenizer(place)
            assert (ours.chat_template, ours.tool_template) == templates
            assert theirs.get_chat_template() == templates[0]
            assert theirs.get_chat_template(tools=[{}]) == (templates[1] or templates[0])
        Tokenizer.load(folder).save(folder / "copy", template="mine")
        assert Tokenizer.load(folder / "copy").tool_template is None
        assert transformers_tokenizer(folder / "copy").get_chat_template(tools=[{}]) == "mine"
    before = Tokenizer.load(beside).fingerprint
    (beside / "additional_chat_templates" / "tool_use.jinja").write_text("another")
    assert Tokenizer.load(beside).fingerprint != before
