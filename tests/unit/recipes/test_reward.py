"""`burnish reward` from rows to a model that scores: what does not change it, what it leaves, what is refused."""

import json
import random
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from burnish.cli import main
from burnish.config import build
from burnish.data.chat import encode_row
from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.mesh import Mesh
from burnish.engine.rewards import REWARD, find_reward, normaliser
from burnish.engine.roles import Role
from burnish.model.adapter_files import load_adapter
from burnish.model.checkpoint import load_model
from burnish.sampling.reward_model import last_values, open_model_scorer
from burnish.sampling.scoring import RewardSource, check_reward, open_reward, shared_reward
from burnish.settings import RewardSettings
from burnish.types import Example, Message, Prompt, Rollout
from tests.tiny import instead, tiny_data, tiny_folder

WORDS = ("cat", "house", "dog", "small", "mat", "time", "sea", "red")
TIMES = ("seconds", "tokens_per_second", "memory_bytes", "tokens", "num_tokens")
"""What two equal runs may differ in; a prompt that several answers share is fewer tokens."""
MESH = Mesh(torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, comparisons of two and of three answers, and the same as pairs."""
    folder = tmp_path_factory.mktemp("reward")
    tiny_folder(folder / "model")
    draw = random.Random(0)
    pairs: list[dict[str, Any]] = []
    ranked: list[dict[str, Any]] = []
    for number in range(40):
        answers = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 5))) + f" {k}" for k in range(3)]
        prompt = f"say {number}"
        ranked.append({"prompt": prompt, "answers": answers, "ranks": [1, 2, 3]})
        pairs += [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in combinations(answers, 2)]
    for name, rows in (("pairs", pairs), ("ranked", ranked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(base: Path, folder: Path, *more: str, data: str = "pairs") -> list[str]:
    """A small run, whose every step is one pass over all data."""
    shared = [f"model.path={base / 'model'}", f"data.path={base / data}.jsonl", f"run.folder={folder}"]
    shared += ["data.max_length=128", "run.microbatch_tokens=4096", "run.step_tokens=65536", "run.steps=3"]
    shared += ["optim.lr=0.01", "optim.warmup=0", "run.device=cpu", "save.trackers=[]", "save.every=0"]
    return instead(shared, *more)


def run(*arguments: Any, **keywords: Any) -> Path:
    given = words(*arguments, **keywords)
    assert main(["reward", *given]) == 0
    return Path(next(word for word in given if word.startswith("run.folder=")).removeprefix("run.folder="))


def curve(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def assert_same_curve(folder: Path, other: Path, tolerance: float) -> None:
    for ours, theirs in zip(curve(folder), curve(other), strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)


def ids_of(folder: Path, *chats: tuple[str, str]) -> list[list[int]]:
    """Conversations as a reward model reads them, up to the end token of the answer; found by hand."""
    tokenizer = Tokenizer.load(folder)
    text = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>"
    return [tokenizer.encode(text.format(*chat)) for chat in chats]


def test_conversations_are_read_up_to_the_end_token(base: Path) -> None:
    """What all tests here write by hand is what the data code makes of the template, less the line break it ends in."""
    tokenizer = Tokenizer.load(base / "model")
    chat = Example((Message("user", "say 1"), Message("assistant", "sea")))
    encoded = encode_row(chat, tokenizer, ChatTemplate.open("auto", tokenizer), "last_assistant")
    assert encoded.ids[:-1] == ids_of(base / "model", ("say 1", "sea"))[0]


# What does not change the result


def test_ranked_answers_are_their_pairs(base: Path, tmp_path: Path) -> None:
    """Three answers in one comparison of weight 1, against three pairs of weight 1 each: the same mean."""
    ranked, pairs = (run(base, tmp_path / name, "evaluate.fraction=0", data=name) for name in ("ranked", "pairs"))
    assert_same_curve(ranked, pairs, 2e-4)
    assert curve(ranked)[0]["loss"] > 0.5


def test_neither_micro_batches_nor_shared_prompts_change_it(base: Path, tmp_path: Path) -> None:
    whole = run(base, tmp_path / "whole", "evaluate.every=1", data="ranked")
    parts = run(base, tmp_path / "parts", "evaluate.every=1", "run.microbatch_tokens=192", data="ranked")
    apart = run(base, tmp_path / "apart", "evaluate.every=1", "share_prefix=false", data="ranked")
    assert len(curve(whole)) == 6
    assert_same_curve(parts, whole, 2e-4)
    assert_same_curve(apart, whole, 2e-4)
    lines = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]) for folder in (whole, apart)]
    assert lines[0]["tokens"] < 0.7 * lines[1]["tokens"]


@pytest.mark.parametrize("kind", [["adapter.dropout=0.2"], ["model.storage=full"]])
def test_a_run_that_is_continued_equals_one_that_was_not(base: Path, tmp_path: Path, kind: list[str]) -> None:
    more = ["run.steps=4", "save.every=2", "run.step_tokens=1024", "run.microbatch_tokens=512", *kind]
    whole = run(base, tmp_path / "whole", *more)
    parted = run(base, tmp_path / "parted", *more)
    shutil.rmtree(parted / "checkpoints/step-00000004")
    (parted / "after.json").unlink()
    run(base, parted, *more, "save.resume=true")
    assert curve(parted) == curve(whole)
    weights = "model/model.safetensors" if "model.storage=full" in kind else "adapter/adapter_model.safetensors"
    assert (parted / weights).read_bytes() == (whole / weights).read_bytes()
    assert normaliser((parted / weights).parent) == normaliser((whole / weights).parent)


# The method


def test_margins_count(base: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (base / "pairs.jsonl").read_text().splitlines()][:20]
    data = tmp_path / "margins.jsonl"
    data.write_text("".join(json.dumps(row | {"margin": 0.1 * k}) + "\n" for k, row in enumerate(rows)))
    folder = run(base, tmp_path / "run", f"data.path={data}", "optim.lr=0", "run.steps=1", "evaluate.fraction=0")
    model = load_model(base / "model", "bf16").eval()
    load_adapter(model, folder / "adapter", REWARD, head=REWARD)
    chats = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    scores = torch.tensor(last_values(Role(model, REWARD, REWARD), ids_of(base / "model", *chats), 4096)).double()
    difference = scores[::2] - scores[1::2]
    (line,) = curve(folder)
    losses = -torch.nn.functional.logsigmoid(difference - 0.1 * torch.arange(20))
    assert line["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert line["margin"] == pytest.approx(float(difference.mean()), rel=1e-4)
    assert line["accuracy"] == pytest.approx(float((difference > 0).double().mean()))


def test_it_starts_where_sft_ended_with_a_fresh_head(base: Path, tmp_path: Path) -> None:
    sft = [f"model.path={base / 'model'}", f"data.path={tiny_data(tmp_path / 'rows.jsonl')}", "data.max_length=128"]
    sft += [f"run.folder={tmp_path / 'sft'}", "run.steps=2", "run.device=cpu", "save.trackers=[]", "optim.lr=0.01"]
    assert main(["sft", *sft, "adapter.rank=4", "adapter.targets=[q_proj,lm_head]"]) == 0
    start = [f"from={tmp_path / 'sft'}", f"data.path={base / 'pairs'}.jsonl", f"run.folder={tmp_path / 'reward'}"]
    assert main(["reward", *start, "run.steps=1", "optim.lr=0", "run.device=cpu", "save.trackers=[]"]) == 0
    theirs, ours = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("sft", "reward"))
    trunk = {name: tensor for name, tensor in theirs.items() if "lm_head" not in name}
    assert trunk.keys() | {"base_model.model.score.weight"} == ours.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in trunk.items())
    assert ours["base_model.model.score.weight"].std() == pytest.approx(33**-0.5, rel=0.4)


def test_normalised_scores_of_preferred_answers_have_mean_0_and_deviation_1(base: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (base / "ranked.jsonl").read_text().splitlines()]
    for of, places in (("chosen", 1), ("all", 3)):
        folder = run(base, tmp_path / of, f"normalise={of}", "evaluate.fraction=0", data="ranked")
        model = load_model(base / "model", "bf16").eval()
        load_adapter(model, folder / "adapter", REWARD, head=REWARD)
        chats = [(row["prompt"], answer) for row in rows for answer in row["answers"][:places]]
        raw = last_values(Role(model, REWARD, REWARD), ids_of(base / "model", *chats), 4096)
        scores = torch.tensor([normaliser(folder / "adapter")(score) for score in raw])
        assert scores.mean() == pytest.approx(0.0, abs=1e-4)
        assert scores.std(correction=0) == pytest.approx(1.0, abs=1e-4)
    folder = run(base, tmp_path / "none", "normalise=none", data="ranked")
    assert normaliser(folder / "adapter") == (0.0, 1.0)


# What it leaves


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A reward adapter, and a reward model of its own."""
    folder = tmp_path_factory.mktemp("trained")
    kinds = {"adapter": ["model.storage=fp32", "adapter.rank=4"], "model": ["model.storage=full"]}
    return {kind: run(base, folder / kind, *more, data="ranked") / kind for kind, more in kinds.items()}


CHATS = [("say 1", "cat"), ("say 2", "the small red house"), ("what is it?", "it is a dog by the sea")]


def rollouts(folder: Path, ended: bool = True) -> list[Rollout]:
    """The chats as a policy would have written them."""
    found: list[Rollout] = []
    for group, ((question, answer), ids) in enumerate(zip(CHATS, ids_of(folder, *CHATS), strict=True)):
        prompt = Prompt((Message("user", question),))
        ids = ids if ended else ids[:-1]
        found.append(Rollout(prompt, tuple(ids[:5]), tuple(ids[5:]), answer, ended, group))
    return found


def raw_scores(folder: Path, base: Path) -> list[float]:
    """What transformers, with PEFT for the adapter, makes of the conversations, one at a time."""
    transformers.logging.set_verbosity_error()
    auto = transformers.AutoModelForSequenceClassification
    is_adapter = (folder / "adapter_config.json").exists()
    model = auto.from_pretrained(base / "model" if is_adapter else folder, num_labels=1, dtype=torch.float32)
    if is_adapter:
        model = peft.PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        rows = [torch.tensor([ids]) for ids in ids_of(base / "model", *CHATS)]
        return [float(model.eval()(input_ids=row).logits) for row in rows]


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_transformers_and_peft_give_the_scores_that_rewards_are_made_of(
    trained: dict[str, Path], base: Path, kind: str
) -> None:
    folder = trained[kind]
    settings = build(RewardSettings, {"path": str(folder.parent), "storage": "fp32"})
    check_reward(settings)
    tokenizer = Tokenizer.load(base / "model")
    template, role = ChatTemplate.open("auto", tokenizer), None
    shared = shared_reward(settings, base / "model")
    assert (shared is None) == (kind == "model")
    if shared is not None:
        model = load_model(base / "model", "fp32").eval()
        load_adapter(model, shared, REWARD, head=REWARD)
        role = Role(model, REWARD, REWARD)
    source = open_reward(settings, tokenizer, template, role, MESH, 64)
    expected = [normaliser(folder)(score) for score in raw_scores(folder, base)]
    assert source.score(rollouts(base / "model")) == pytest.approx(expected, abs=2e-4)
    assert source.score([]) == []
    assert max(expected) - min(expected) > 0.3


def test_a_model_of_its_own_reads_an_answer_that_was_cut_without_an_end(trained: dict[str, Path], base: Path) -> None:
    scorer = open_model_scorer(trained["model"], "fp32", torch.device("cpu"), 4096)
    cut = last_values(scorer.role, [ids[:-1] for ids in ids_of(base / "model", *CHATS)], 4096)
    assert scorer(rollouts(base / "model", ended=False)) == pytest.approx([scorer.normaliser(s) for s in cut], abs=1e-5)


def test_what_a_model_of_its_own_cannot_read_is_no_score(trained: dict[str, Path], base: Path) -> None:
    source = RewardSource(
        open_model_scorer(trained["model"], "fp32", torch.device("cpu"), 4096), build(RewardSettings, {})
    )
    long = rollouts(base / "model")
    long[1] = Rollout(long[1].prompt, (5,), (6,), "very long " * 200, True, 1)
    scores = source.score(long)
    assert [score is None for score in scores] == [False, True, False]
    assert "is made for 128 tokens, and a conversation has" in str(source.scorer.problem)


def test_scores_do_not_depend_on_the_company(trained: dict[str, Path], base: Path) -> None:
    scorer = open_model_scorer(trained["model"], "fp32", torch.device("cpu"), 16)
    many = rollouts(base / "model")
    alone = [score for rollout in many for score in scorer([rollout])]
    assert scorer(many[::-1])[::-1] == pytest.approx(alone, abs=1e-5)


# What is refused


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_reward_model_is_looked_for_before_torch(trained: dict[str, Path], base: Path, tmp_path: Path) -> None:
    assert find_reward(str(trained["adapter"].parent)).is_adapter
    assert find_reward(str(trained["adapter"])).folder == trained["adapter"]
    assert not find_reward(str(trained["model"].parent)).is_adapter
    with pytest.raises(
        ValueError, match=r"^reward\.path=.*: a LlamaForCausalLM writes text and has no head that scores"
    ):
        find_reward(str(base / "model"))
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"holds no reward model: name a run of `burnish reward`"):
        find_reward(str(tmp_path / "run"))
    (tmp_path / "run/config.yaml").write_text("{}")
    with pytest.raises(ValueError, match=r"is a run that has not finished"):
        find_reward(str(tmp_path / "run"))
    value = shutil.copytree(trained["adapter"], tmp_path / "value")
    (value / "burnish.json").write_text('{"kind": "value"}')
    with pytest.raises(ValueError, match=r"value is a value model: name the run of `burnish reward`"):
        find_reward(str(value))


def test_an_sft_run_is_no_reward(base: Path, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^reward\.path=.*is the adapter of a language model, without a head that sc"):
        check_reward(build(RewardSettings, {"path": str(tmp_path)}))


def test_a_reward_adapter_of_another_base_or_other_words_is_refused(
    trained: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    settings = build(RewardSettings, {"path": str(trained["adapter"].parent)})
    other = tiny_folder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"was trained on another base than the one in .*other"):
        shared_reward(settings, other)
    tokenizer = Tokenizer.load(base / "model")
    template = ChatTemplate.open("vicuna", tokenizer)
    model = load_model(base / "model", "fp32").eval()
    load_adapter(model, trained["adapter"], REWARD, head=REWARD)
    role = Role(model, REWARD, REWARD)
    with pytest.raises(
        ValueError, match=r"was trained with another template .* train it with the same model\.template"
    ):
        open_reward(settings, tokenizer, template, role, MESH, 4096)
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["merges"] = words["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(words))
    tokenizer = Tokenizer.load(other)
    with pytest.raises(ValueError, match=r"was trained with another tokenizer than the one of .*other"):
        open_reward(settings, tokenizer, ChatTemplate.open("auto", tokenizer), role, MESH, 4096)


def test_a_reward_model_is_not_trained_from_nor_asked_to_write(
    trained: dict[str, Path], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("adapter", "model"):
        more = [f"from={trained[kind].parent}", f"data.path={base / 'pairs'}.jsonl", f"run.folder={tmp_path / kind}"]
        assert main(["reward", *more]) == 1
        assert "writes no text" in told(capsys)
    assert main(["generate", f"model.adapter={trained['adapter'].parent}", "prompt=Hello"]) == 1
    assert "is the adapter of a reward model, which gives numbers and writes no text" in told(capsys)
    assert main(["generate", f"model.path={trained['model'].parent}", "prompt=Hello"]) == 1
    assert "a LlamaForSequenceClassification gives scores and writes no text" in told(capsys)


def test_a_damaged_normaliser_is_said(trained: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(trained["adapter"], tmp_path / "copy")
    (copy / "burnish.json").write_text('{"normaliser": {"mean": 1.0}}')
    with pytest.raises(ValueError, match=r"burnish\.json: `normaliser` is damaged"):
        normaliser(copy)


def test_a_warning_names_what_to_look_at(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In these data nothing but length decides."""
    rows = [{"prompt": f"say {k}", "chosen": "sea " * (2 + k % 3), "rejected": "sea"} for k in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(base, tmp_path / "run", f"data.path={tmp_path / 'rows.jsonl'}", "evaluate.fraction=0.2", "run.steps=10")
    assert "warning: longer answers score higher (correlation +" in capsys.readouterr().out
