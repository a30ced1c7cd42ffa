"""Settings: what is accepted, and the one line that says what is wrong with the rest."""

import pytest
import yaml

from burnish.config import ConfigError, Settings, build, fields, missing, parse, to_yaml
from burnish.settings import TrainingSettings, memory_bytes


def message(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(TrainingSettings, words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_words_override_the_file_and_keep_its_other_values(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optim: {lr: 0.5, clip: 2}\nrun:\n  steps: 7\n")
    config = parse(TrainingSettings, [str(path), "optim.lr=1e-4", "adapter.targets=[q_proj, v_proj]"])
    assert (config.optim.lr, config.optim.clip, config.run.steps) == (1e-4, 2, 7)
    assert config.adapter.targets == ("q_proj", "v_proj")


def test_the_written_config_reads_back_to_the_same_settings():
    config = parse(TrainingSettings, ["model.storage=nf4", "adapter.rank_pattern={q_proj: 4}", "run.steps=3"])
    assert build(TrainingSettings, yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("words", "storage", "kind", "lr"),
    [
        ([], "bf16", "lora", 2e-4),
        (["model.storage=full"], "full", "none", 2e-5),
        (["adapter.kind=none"], "full", "none", 2e-5),
        (["model.storage=full16"], "full16", "none", 2e-5),
        (["model.storage=nf4"], "nf4", "lora", 2e-4),
        (["adapter.kind=dora", "optim.lr=1"], "bf16", "dora", 1.0),
    ],
)
def test_storage_adapter_and_rate_are_resolved_together(words, storage, kind, lr):
    config = parse(TrainingSettings, words)
    assert (config.model.storage, config.adapter.kind, config.optim.lr) == (storage, kind, lr)


def test_unknown_key_names_the_nearest():
    assert message("optim.learning_rte=1") == "unknown key 'optim.learning_rte'; did you mean 'optim.lr'?"
    assert "did you mean 'optim.lr'?" in message("optm.lr=1")
    assert "did you mean 'model.storage'?" in message("model.storge=nf4")
    assert "did you mean 'run.steps'?" in message("run.step=10")


def test_a_choice_that_is_nearly_one_names_it():
    assert message("model.storage=ful6").endswith("bf16, fp32, nf4, not ful6; did you mean 'full16'?")
    assert message("save.trackers=wandbb").endswith("not wandbb; did you mean 'wandb'?")


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["--lr", "3"], "optim.lr=3"),
        (["--lr=3"], "optim.lr=3"),
        (["--optim.lr", "3"], "optim.lr=3"),
        (["--max-length", "512"], "data.max_length=512"),
        (["--lr", "run.steps=2"], "optim.lr=..."),
        (["--lr"], "optim.lr=..."),
        (["--zzz", "3"], "key=value"),
    ],
)
def test_words_with_dashes_say_how_they_are_written(words, written):
    first = words[0]
    assert message(*words) == f"'{first}' is neither key=value nor a .yaml file; settings are written as {written}"


def test_what_is_missing_names_the_nearest_of_its_sort(tmp_path):
    for name in ("mine", "other.d"):
        (tmp_path / name).mkdir()
    (tmp_path / "min.json").touch()
    (tmp_path / "rows.jsonl").touch()
    said = {
        ("folder", "min"): f"min; did you mean {tmp_path}/mine?",
        ("folder", "rows"): "rows",
        ("folder", "minx/a"): f"minx/a, nor a folder {tmp_path}/minx",
        ("file", "row.yaml"): f"row.yaml; did you mean {tmp_path}/rows.jsonl?",
        ("file", "othr.yaml"): "othr.yaml",
        ("file", "othr"): f"othr; did you mean {tmp_path}/other.d?",
    }
    for (kind, name), end in said.items():
        assert missing(kind, tmp_path / name) == f"there is no {kind} {tmp_path}/{end}"


def test_wrong_type_says_what_is_expected():
    assert message("optim.lr=fast").startswith("'optim.lr' should be float or none, not fast")
    assert message("run.steps=2.5").startswith("'run.steps' should be int or none, not 2.5")
    assert message("model.storage=nf5") == "'model.storage' is one of auto, full, full16, bf16, fp32, nf4, not nf5"
    assert message("model=3").startswith("'model' is a group of settings")
    assert message("optim.lr=-1").startswith("'optim.lr' should be")


def test_contradictions_say_how_to_resolve_them():
    assert "model.storage=full adapter.kind=none" in message("model.storage=nf4", "adapter.kind=none")
    assert "leave two things to train" in message("model.storage=full", "adapter.kind=lora")
    assert "run.microbatch_tokens=9000" in message("data.max_length=9000", "run.microbatch_tokens=10")


def test_words_and_files_that_are_neither(tmp_path):
    assert "neither key=value nor a .yaml file" in message("--lr")
    assert message(str(tmp_path / "no.yaml")).startswith("there is no file")
    path = tmp_path / "bad.yaml"
    path.write_text("a: [1")
    assert "is not YAML" in message(str(path))
    path.write_text("- 1\n")
    assert "must hold `key: value` lines" in message(str(path))


def test_settings_are_frozen():
    config = parse(TrainingSettings, [])
    with pytest.raises(ValueError, match="frozen"):
        config.run.steps = 3


def test_every_field_has_its_sentence_and_no_group_more_than_ten():
    groups: dict[str, int] = {}
    for key, _, _, sentence in fields(TrainingSettings):
        assert sentence.endswith("."), key
        groups[key.split(".")[0]] = groups.get(key.split(".")[0], 0) + 1
    assert max(groups.values()) <= 10


def test_files_come_first_wherever_they_stand(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optim: {lr: 0.5}\n")
    assert parse(TrainingSettings, ["optim.lr=0.25", str(path)]).optim.lr == 0.25


def test_a_list_that_yaml_cannot_read_is_not_taken_for_text():
    assert "put its items in quotes" in message("adapter.targets=[q_proj, what is 3 plus 4?]")
    assert parse(TrainingSettings, ["adapter.targets=.*[qv]_proj"]).adapter.targets == ".*[qv]_proj"


@pytest.mark.parametrize(
    "text", ["What is 3? # not a comment", "yes", "3:30", "Question: what?", "{a: 1}", "- x", "'quoted'"]
)
def test_text_stays_as_it_was_typed(text):
    from burnish.tools.generate import Config

    assert parse(Config, [f"prompt={text}"]).prompt == text.strip("'")
    assert parse(TrainingSettings, [f"run.folder={text}"]).run.folder == text.strip("'")


def test_lengths_that_are_not_given_follow_those_that_are():
    def lengths(*words):
        config = parse(TrainingSettings, words)
        return config.run.step_tokens, config.run.microbatch_tokens, config.data.max_length

    assert lengths() == (16384, 4096, 2048)
    assert lengths("run.step_tokens=1024") == (1024, 1024, 1024)
    assert lengths("data.max_length=8192") == (16384, 8192, 8192)
    assert "run.microbatch_tokens=128" in message("run.step_tokens=128", "run.microbatch_tokens=4096")


def test_a_choice_that_yaml_takes_for_a_truth_value_is_a_choice():
    assert [parse(TrainingSettings, [f"run.compile={word}"]).run.compile for word in ("on", "off", "auto")] == [
        "on",
        "off",
        "auto",
    ]


def test_a_list_of_one_needs_no_brackets():
    assert parse(TrainingSettings, ["save.trackers=tensorboard"]).save.trackers == ("tensorboard",)
    assert parse(TrainingSettings, ["save.trackers=none"]).save.trackers == ()


def test_a_setting_of_an_unknown_group_names_the_whole_setting(tmp_path):
    assert "unknown key 'opt.lr'; did you mean 'optim.lr'?" in message("opt.lr=1")
    assert message("data.path=").startswith("'data.path' should be")
    assert message("run.folder=").startswith("'run.folder' should be")
    (tmp_path / "empty.yaml").write_text("")
    assert "is empty" in message(str(tmp_path / "empty.yaml"))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["model.storage=full"], "run.dtype=fp8 multiplies with frozen weights, and model.storage=full trains them"),
        (["adapter.kind=dora"], "run.dtype=fp8 goes with LoRA without dropout, not with adapter.kind=dora"),
        (["adapter.dropout=0.1"], "adapter.dropout=0.1: leave it out"),
    ],
)
def test_8_bit_matmuls_are_refused_where_only_a_part_of_the_work_could_have_them(words, wanted):
    assert wanted in message("run.dtype=fp8", *words)


@pytest.mark.parametrize("amount", ["lots", "24", "0GB", "-1GB"])
def test_memory_is_an_amount(amount):
    assert f"run.memory={amount} is no amount: write auto, least, or an amount" in message(f"run.memory={amount}")


def test_amounts_of_memory_in_bytes():
    assert [memory_bytes(text) for text in ("24GB", "1.5 GiB", "300MB", "auto", "least")] == [
        24_000_000_000,
        1_610_612_736,
        300_000_000,
        None,
        None,
    ]


@pytest.mark.parametrize("later", ["0.2", "0.1"])
def test_a_setting_that_two_words_give_is_refused(later):
    said = f"'optim.lr' is given twice, as optim.lr=0.1 and as optim.lr={later}: leave one out"
    assert message("optim.lr=0.1", "run.steps=2", f"optim.lr={later}") == said


@pytest.mark.parametrize(
    ("words", "both"),
    [
        (("model.storage=nf4", "model={path: x, storage: full}"), "model.storage"),
        (("model={path: x, storage: full}", "model.storage=nf4"), "model.storage"),
        (("model={path: x}", "model={path: y}"), "model.path"),
        (("model.storage=nf4", "model=x"), "model"),
        (("adapter.rank_pattern={q_proj: 4}", "adapter.rank_pattern.k_proj=2"), "adapter.rank_pattern"),
        (("adapter.rank_pattern.k_proj=2", "adapter={rank_pattern: {q_proj: 4}}"), "adapter.rank_pattern"),
    ],
)
def test_a_setting_that_words_give_alone_and_in_its_group_is_refused(words, both):
    assert message(*words) == f"'{both}' is given twice, as {words[0]} and as {words[1]}: leave one out"


@pytest.mark.parametrize("order", [1, -1])
def test_a_group_in_one_word_is_its_settings_and_leaves_the_others_alone(tmp_path, order):
    path = tmp_path / "run.yaml"
    path.write_text("model: {revision: main}\nadapter: {alpha: 3, rank_pattern: {v_proj: 1}}\n")
    words = ["model.storage=nf4", "model={path: x}", "adapter={rank: 2, rank_pattern: {q_proj: 4}}"]
    config = parse(TrainingSettings, [str(path), *words[::order]])
    assert (config.model.storage, config.model.path, config.model.revision) == ("nf4", "x", "main")
    assert (config.adapter.rank, config.adapter.alpha) == (2, 3)
    assert config.adapter.rank_pattern == {"q_proj": 4}  # a setting of its own, which words replace


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run:\n  steps: 3\n  seed: 1\n  steps: 3\n", "'steps' is given twice, on lines 2 and 4"),
        ("run: {steps: 3}\n\n'run': {seed: 1}\n", "'run' is given twice, on lines 1 and 3"),
        ("optim: {lr: 1,\n  clip: 2}\nrun: {seed: 1, steps: 2, seed: 3}\n", "'seed' is given twice, on line 3"),
        ("data:\n  - a: 1\n    a: 2\n", "'a' is given twice, on lines 2 and 3"),
        ("run: {steps: 6}\nrun.steps: 7\n", "'run.steps' is given twice, in its group and dotted"),
    ],
)
def test_a_key_that_a_file_gives_twice_is_refused(tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert message(str(path)) == f"{path}: {said}: leave one out"


def test_a_file_may_name_settings_dotted_and_words_count_more(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optim: {clip: 2}\nrun.steps: 7\noptim.lr: 0.5\nrun: {seed: 3}\nmodel.path: x\n")
    config = parse(TrainingSettings, [str(path), "run.steps=8"])
    assert (config.optim.clip, config.optim.lr, config.run.steps, config.run.seed) == (2, 0.5, 8, 3)
    assert config.model.path == "x"


def test_a_file_that_names_a_part_of_a_setting_that_is_no_group_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run.steps: 7\nrun: 3\n")
    assert message(str(path)) == f"{path}: 'run.steps': 'run' already has a value of its own"


def test_a_mapping_in_a_word_gives_a_key_once():
    word = "adapter.rank_pattern={q_proj: 4, q_proj: 2}"
    assert message(word) == f"{word} gives 'q_proj' twice: leave one out"


def test_what_yaml_merges_into_a_mapping_may_be_given_again(tmp_path):
    """The settings are those that YAML's own loader reads, wherever a mapping that merges is itself merged."""
    path = tmp_path / "merged.yaml"
    path.write_text(
        "base: &a {lr: 0.25, clip: 2}\nmore: &b {weight_decay: 0.5}\ndeep: {deeper: &c {<<: *a, lr: 0.5}}\n"
        "optim:\n  <<: *c\n  <<: *b\n  clip: 3\nlist: {<<: [*a, *b], lr: 1}\nsame: *c\n"
    )
    tree = yaml.safe_load(path.read_text())
    assert tree["optim"] == {"lr": 0.5, "clip": 3, "weight_decay": 0.5}

    class Whatever(Settings, extra="allow"):
        pass

    assert parse(Whatever, [str(path)]).model_extra == tree
