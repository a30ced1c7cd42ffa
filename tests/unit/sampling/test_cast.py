"""Who takes part: which model and adapter each role is, what of it learns, and what must not stand in for another."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.config import build
from burnish.data.packing import collate
from burnish.engine.assemble import trained_parameters
from burnish.engine.mesh import Mesh
from burnish.engine.rewards import normaliser
from burnish.model.adapter_files import load_adapter
from burnish.model.adapters import adapter_names
from burnish.model.checkpoint import load_model
from burnish.recipes.ppo import Config
from burnish.sampling.cast import Cast, open_cast
from burnish.sampling.task import open_task
from burnish.types import Message, Prompt, Rollout, Sequence
from tests.letters import letters_folder, letters_world, policy_adapter, reward_adapter, settings

MESH = Mesh(torch.device("cpu"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = letters_world(tmp_path_factory.mktemp("letters"))
    policy_adapter(folder / "base", folder / "sft", dropout=0.5)
    reward_adapter(folder / "base", folder / "reward", dropout=0.5)
    return folder


def opened(world: Path, with_value: bool = True, **more: Any) -> Cast:
    return open_cast(open_task(build(Config, settings(world, world / "never", more))), MESH, with_value)


def batch_of(*ids: int) -> Any:
    return collate([Sequence(ids, (0.0, *(1.0,) * (len(ids) - 1)), 0)])


BATCH = batch_of(3, 1, 4, 1, 5)


@torch.no_grad()
def log_probs(role: Any) -> torch.Tensor:
    return role.log_probs(BATCH)


def test_from_an_adapter_all_roles_share_one_base(world: Path) -> None:
    found = opened(world, **{"from": str(world / "sft")}, reward={"path": str(world / "reward")})
    assert found.value is not None
    assert found.policy.model is found.reference.model is found.value.model
    assert adapter_names(found.policy.model) == ["policy", "reference", "reward", "value"]
    roles = (found.policy, found.reference, found.value)
    assert [role.adapter for role in roles] == ["policy", "reference", "value"]
    assert [role.head for role in roles] == [None, None, "value"]
    learns = {name for name, p in found.models.named_parameters() if p.requires_grad}
    named = {id(p): name for name, p in found.models.named_parameters()}
    own = trained_parameters(found.policy.model, found.policy.adapter) | found.value_parameters
    assert learns == {named[id(p)] for p in own.values()}
    assert {name.split(".adapters.")[1].split(".")[0] for name in learns if "adapters" in name} == {"policy", "value"}
    assert torch.equal(log_probs(found.policy), log_probs(found.reference))
    alone = load_model(world / "base", "bf16")
    load_adapter(alone, world / "sft", "given")
    alone.eval()
    with torch.no_grad():
        assert torch.equal(log_probs(found.reference), alone.log_probs(BATCH, "given"))
        assert not torch.equal(log_probs(found.reference), alone.log_probs(BATCH))


def test_a_fresh_adapter_is_held_near_the_base(world: Path) -> None:
    found = opened(world)
    assert found.reference.adapter is None
    assert found.reference.model is found.policy.model
    assert torch.equal(log_probs(found.policy), log_probs(found.reference))
    assert opened(world, with_value=False).value is None
    assert opened(world, with_value=False).value_parameters == {}


def test_full_weights_leave_the_other_roles_a_frozen_copy(world: Path) -> None:
    found = opened(world, model={"storage": "full"}, kl={"storage": "nf4"}, reward={"path": str(world / "reward")})
    assert found.value is not None
    assert found.policy.adapter is None
    assert found.policy.model is not found.reference.model is found.value.model
    assert adapter_names(found.policy.model) == []
    assert adapter_names(found.reference.model) == ["reward", "value"]
    assert all(p.requires_grad for p in found.policy.model.parameters())
    frozen = {name for name, p in found.reference.model.named_parameters() if not p.requires_grad}
    assert all("value" not in name for name in frozen)
    assert not {id(p) for p in found.policy.model.parameters()} & {id(p) for p in found.reference.model.parameters()}


def test_a_reward_adapter_on_weights_that_it_has_not_seen_is_told(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "reward"
    shutil.copytree(world / "reward", folder)
    about = json.loads((folder / "burnish.json").read_text())
    (folder / "burnish.json").write_text(json.dumps(about | {"storage": "nf4"}))
    for model, key in (({"storage": "bf16"}, "model"), ({"storage": "full"}, "kl")):
        opened(world, with_value=False, model=model, reward={"path": str(folder)})
        assert f"which it has not seen: {key}.storage=nf4 gives it those" in capsys.readouterr().err
    opened(world, with_value=False, model={"storage": "nf4"}, reward={"path": str(folder)})
    assert "NF4" not in capsys.readouterr().err


def test_every_role_reads_at_the_temperature_of_rollouts_without_dropout(world: Path) -> None:
    more = {"from": str(world / "sft"), "reward": {"path": str(world / "reward")}, "rollout": {"temperature": 0.6}}
    found = opened(world, **more)
    assert found.value is not None
    assert found.policy.temperature == found.reference.temperature == 0.6
    assert not any(module.training for module in found.models.modules())
    assert torch.equal(log_probs(found.policy), log_probs(found.policy))
    with torch.no_grad():
        logits = found.policy.model.logits(BATCH, "policy").double() / 0.6
        expected = logits.log_softmax(-1).gather(1, BATCH.targets[:, None])[:, 0]
    torch.testing.assert_close(log_probs(found.policy)[:-1].double(), expected[:-1], rtol=1e-5, atol=1e-5)


def test_the_value_model_says_the_normalised_reward(world: Path) -> None:
    found = opened(world, **{"from": str(world / "sft")}, reward={"path": str(world / "reward")})
    assert found.value is not None
    rollouts = [
        Rollout(Prompt((Message("user", "a"),)), (0, 4), ids, "", True, 0) for ids in ((1, 9), (2, 2, 3, 9), (7,))
    ]
    scores = found.reward.measure(rollouts)
    mean, deviation = normaliser(world / "reward")
    alone = load_model(world / "base", "bf16")
    load_adapter(alone, world / "reward", "given", head="given")
    alone.eval()
    for rollout, score in zip(rollouts, scores, strict=True):
        batch = batch_of(*rollout.prompt_ids, *rollout.answer_ids)
        with torch.no_grad():
            raw = float(alone.values(batch, "given", "given")[-1])
            assert score == pytest.approx((raw - mean) / deviation, abs=1e-5)
            assert float(found.value.values(batch)[-1]) == pytest.approx(score, abs=1e-5)
    assert (mean, deviation) == (0.3, 1.7)


def test_a_reward_adapter_for_another_base_is_refused(world: Path, tmp_path: Path) -> None:
    other = letters_folder(tmp_path / "other", seed=5)
    reward_adapter(other, tmp_path / "reward")
    with pytest.raises(ValueError, match=r"reward was trained on another base than the one in .*base"):
        opened(world, reward={"path": str(tmp_path / "reward")})


def test_a_reward_adapter_for_other_words_is_refused(world: Path, tmp_path: Path) -> None:
    other = letters_folder(tmp_path / "words")
    text = (other / "tokenizer.json").read_text().replace('"a":0,"b":1', '"b":0,"a":1').replace('"a": 0', '"a": 10')
    assert text != (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text)
    reward_adapter(world / "base", tmp_path / "reward", words=other)
    with pytest.raises(ValueError, match=r"was trained with another tokenizer than the one of .*base"):
        opened(world, reward={"path": str(tmp_path / "reward")})
    (other / "tokenizer.json").write_text((world / "base/tokenizer.json").read_text())
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }} ")
    reward_adapter(world / "base", tmp_path / "second", words=other)
    with pytest.raises(ValueError, match=r"another template than .*train it with the same model\.template"):
        opened(world, reward={"path": str(tmp_path / "second")})


def test_a_reward_model_of_its_own_may_have_other_words(world: Path, tmp_path: Path) -> None:
    """The answer's text is read with the reward model's tokenizer, so its ids may be others."""
    path = tmp_path / "reward"
    letters_folder(path, "LlamaForSequenceClassification", seed=3, num_labels=1)
    found = opened(world, reward={"path": str(path), "storage": "fp32"})
    assert adapter_names(found.policy.model) == ["policy", "value"]
    one = Rollout(Prompt((Message("user", "a"),)), (0,), (1, 9), "b", True, 0)
    (score,) = found.reward.measure([one])
    alone = load_model(path, "fp32", head="reward").eval()
    with torch.no_grad():
        assert score == pytest.approx(float(alone.values(batch_of(0, 1, 9), "reward")[-1]), abs=1e-6)
    assert json.loads((path / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
