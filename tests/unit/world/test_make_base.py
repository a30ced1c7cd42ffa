"""The tokenizer and the untrained folder that scripts/make_base.py writes, judged by transformers."""

import importlib.util
import json
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from burnish.config import build
from burnish.recipes.sft import Config
from burnish.world import documents, rows
from burnish.world.lexicon import SPELLED, WORDS


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_base", Path(__file__).parents[3] / "scripts" / "make_base.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(script, tmp_path_factory):
    path = tmp_path_factory.mktemp("untrained")
    script.write_tokenizer(path)
    script.write_json(path / "config.json", script.CONFIG)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_transformers_reads_the_folder(script, folder, tokenizer):
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["LlamaForCausalLM"]
    assert len(tokenizer) == config.vocab_size == script.VOCABULARY
    assert tokenizer.eos_token_id == config.eos_token_id
    assert tokenizer.pad_token_id == config.pad_token_id
    assert tokenizer.chat_template == script.CHAT_TEMPLATE


def test_text_comes_back_unchanged(tokenizer):
    for text in (*islice(documents(9), 20), "Größe 12,5 — naïve ☃"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_digits_and_spelled_letters_are_single_tokens(tokenizer):
    assert tokenizer.tokenize(" 47 plus 205") == ["Ġ", "4", "7", "Ġplus", "Ġ", "2", "0", "5"]
    assert tokenizer.tokenize(" g a r d e n") == ["Ġg", "Ġa", "Ġr", "Ġd", "Ġe", "Ġn"]


def test_the_words_of_the_world_are_whole(tokenizer):
    for word in {*WORDS, *SPELLED}:
        assert len(tokenizer.tokenize(f" {word}")) == 1, word


def test_chat_template_sets_words_off_as_prose_does(tokenizer):
    chat = [{"role": "user", "content": "Spell cat."}, {"role": "assistant", "content": "c a t"}]
    asked = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert whole == "<|user|> Spell cat.<|assistant|> c a t<|end|>"
    assert whole.startswith(asked)
    assert tokenizer.tokenize(whole)[len(tokenizer.tokenize(asked)) :] == ["Ġc", "Ġa", "Ġt", "<|end|>"]


def test_chat_template_refuses_a_role_it_does_not_know(tokenizer):
    with pytest.raises(Exception, match="roles system, user and assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "4"}])


def test_training_rows_are_short(tokenizer):
    lengths = [len(ids) for ids in tokenizer([row["messages"][0]["content"] for row in rows("train")])["input_ids"]]
    assert sum(lengths) / len(lengths) < 30
    assert max(lengths) < 60


def test_corpus_and_settings_fit_the_recipe(script, folder, tmp_path):
    script.write_corpus(tmp_path / "corpus.jsonl", 30)
    texts = [json.loads(line)["text"] for line in (tmp_path / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    assert texts == list(islice(documents(0), 30))
    config = build(Config, script.training_settings(script.Config(out=str(tmp_path))))
    assert (config.model.init, config.model.storage, config.data.format) == ("random", "full", "text")
