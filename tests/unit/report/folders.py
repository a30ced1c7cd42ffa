"""Folders as finished runs leave them, written without training anything."""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from burnish import world
from burnish.config import build, to_yaml
from burnish.data.audit import Audit, Finding, HeldOut, Lengths
from burnish.settings import TrainingSettings

SEEN, UNSEEN = world.SEEN, world.UNSEEN
METHODS: dict[str, dict[str, Any]] = {
    "full": {
        "method": "Full fine-tuning",
        "storage": "full",
        "kind": "none",
        "trainable": 3_412_224,
        "final": 0.41,
        "skill": 0.86,
    },
    "lora": {"method": "LoRA", "storage": "bf16", "kind": "lora", "trainable": 184_320, "final": 0.47, "skill": 0.82},
    "qlora": {"method": "QLoRA", "storage": "nf4", "kind": "lora", "trainable": 184_320, "final": 0.49, "skill": 0.8},
}
LATER: dict[str, dict[str, Any]] = {
    "dpo": {"method": "LoRA + DPO", "learned": {"eval_reward": 0.912, "eval_kl": 3.21, "eval_win_rate": 0.63}},
    "reward": {"method": "LoRA + reward model", "learned": {}},
    "ppo": {"method": "LoRA + PPO", "learned": {"eval_reward": 0.93, "eval_kl": 1.24, "eval_win_rate": 0.615}},
}
"""Runs that go on from `lora` and learn from preferences."""
NASTY = '<script>alert("x")</script><img src="http://example.invalid/x.png">'


def finished_run(folder: Path, kind: str = "lora", steps: int = 120, every: int = 20, **row: Any) -> Path:
    """A finished run of one of METHODS; `row` replaces values of its row of results."""
    about = METHODS[kind]
    rng = random.Random(kind)
    folder.mkdir(parents=True)
    before = {"eval_loss": 3.214, "eval_general_loss": 2.103, "eval_exact_match": 0.006}
    before |= {"eval_exact_match_seen": 0.008, "eval_exact_match_unseen": 0.0}
    skill = about["skill"]
    after = {"eval_loss": about["final"] + 0.06, "eval_general_loss": 2.103 + (0.21 if kind == "full" else 0.06)}
    after |= {"eval_exact_match": 0.78 * skill, "eval_exact_match_seen": skill, "eval_exact_match_unseen": 0.55 * skill}
    result: dict[str, Any] = {
        "method": about["method"],
        "trainable_parameters": about["trainable"],
        "total_parameters": 3_412_224 + (about["trainable"] if about["kind"] != "none" else 0),
        "peak_memory_bytes": {"full": 141_000_000, "lora": 96_500_000, "qlora": 91_200_000}[kind],
        "seconds": {"full": 44.1, "lora": 38.6, "qlora": 52.3}[kind],
        "metrics": after,
        "before": before,
        "run": folder.name,
    }
    (folder / "results.json").write_text(json.dumps([result | row]))
    settings = {
        "model": {"path": "embedded", "storage": about["storage"]},
        "adapter": {"kind": about["kind"]},
        "data": {"path": "embedded", "max_length": 512},
        "run": {"folder": str(folder), "steps": steps},
    }
    (folder / "config.yaml").write_text(to_yaml(build(TrainingSettings, settings)))
    place = {
        "burnish": "0.1.0",
        "python": "3.11.2",
        "packages": {"torch": "2.13.0"},
        "device": "cpu (2 threads)",
        "cuda": None,
    }
    (folder / "environment.json").write_text(json.dumps(place | {"command": ["demo"]}))
    (folder / "audit.json").write_text(json.dumps(audit().as_dict()))
    lines = [_line(step, steps, about["final"], every, rng) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "before.json").write_text(json.dumps(_verdict(before, 0.01, random.Random(0))))
    (folder / "after.json").write_text(json.dumps(_verdict(after, skill, rng)))
    return folder


def later_run(folder: Path, kind: str, steps: int = 60) -> Path:
    """A finished run of one of LATER, beside that of `lora` in the same folder."""
    rng, about = random.Random(kind), LATER[kind]
    finished_run(folder, "lora", steps, run=folder.name, method=about["method"])
    (row,) = json.loads((folder / "results.json").read_text())
    shared = {name: value for name, value in row["metrics"].items() if name != "eval_loss"}
    start, end = (
        {"eval_reward": 0.844, "eval_kl": 0.0, "eval_win_rate": 0.5, "eval_answer_tokens": 7.5},
        about["learned"],
    )
    pairs = {"eval_accuracy": 0.93, "eval_loss": 0.21, "eval_margin": 2.4, "eval_length_correlation": -0.31}
    if kind == "reward":
        row |= {"before": {"eval_accuracy": 0.49, "eval_loss": 0.71}, "metrics": pairs}
    else:
        row |= {"before": shared | start, "metrics": shared | start | end | (pairs if kind == "dpo" else {})}
        row["scorer"] = "the embedded world"
    (folder / "results.json").write_text(json.dumps([row]))
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"from": str(folder.parent / "lora")}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [(_policy_line if kind == "ppo" else _pairs_line)(step, steps, rng) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, metrics in (("before", row["before"]), ("after", row["metrics"])):
        verdict = _verdict(metrics, 0.8, rng) if kind != "reward" else {"metrics": metrics, "samples": []}
        for sample in verdict["samples"]:
            sample["reward"] = 1.0 if sample["correct"] else -0.25
        (folder / f"{name}.json").write_text(json.dumps(verdict))
    return folder


def bare_run(folder: Path, **row: Any) -> Path:
    """A run that left nothing but its row and its settings."""
    folder.mkdir(parents=True)
    bare = {"method": "LoRA", "trainable_parameters": 10, "total_parameters": 1000, "peak_memory_bytes": 2048}
    (folder / "results.json").write_text(
        json.dumps([bare | {"seconds": 1.0, "metrics": {}, "before": {}, "run": folder.name} | row])
    )
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"path": "embedded"}}))
    return folder


def audit() -> Audit:
    """An account of data in which something of everything happened."""
    return Audit(
        source="embedded",
        format="messages",
        reading="read as OpenAI messages: every row has `messages`",
        template="chat_template.jinja of the tokenizer",
        train_on="all_assistant",
        rows_in=1713,
        rows_out=1620,
        dropped={"empty response": Finding(3, (4, 9, 77), ("a.jsonl:5", "a.jsonl:10", "a.jsonl:78"), NASTY)},
        repaired={"leading assistant turn": Finding(1, (12,), ("a.jsonl:13",), "Hello! How can I help?")},
        duplicates=Finding(2, (40, 41), ("a.jsonl:41", "a.jsonl:42")),
        split=Finding(0, (), ()),
        lengths=Lengths(
            1620,
            61_344,
            18_208,
            11,
            183,
            37.9,
            ((16, 88), (32, 702), (64, 655), (128, 160), (256, 15)),
            2048,
            30,
            0.998,
        ),
        responses=1620,
        ended=1620,
        end_tokens=("<|im_end|>",),
        held_out=HeldOut(how="5% of these rows", rows=90, sequences=90, tokens=3400, trained=1010, prompts=90),
        notes=("The template prints no end token after tool messages; one is added.",),
    )


def _line(step: int, steps: int, final: float, every: int, rng: random.Random) -> dict[str, Any]:
    shape = math.exp(-6 * step / steps)
    loss = final + (3.2 - final) * shape + rng.gauss(0, 0.08) * (0.3 + shape)
    line: dict[str, Any] = {"step": step, "loss": loss, "grad_norm": 0.6 + 2.5 * shape + abs(rng.gauss(0, 0.15))}
    line |= {"learning_rate": 4e-3 * min(step / 12, (steps - step) / (steps - 12)), "num_tokens": 2048 * step}
    line |= {"mean_token_accuracy": 1 - 0.9 * loss / 3.3, "tokens_per_second": 5200 + rng.gauss(0, 180)}
    line |= {"memory_bytes": 412_000_000, "seconds": 0.4 * step}
    if step % every == 0:
        line |= {
            "eval_loss": final + 0.06 + (3.2 - final) * shape,
            "eval_perplexity": 2.0,
            "eval_general_loss": 2.103 + 0.1 * step / steps,
        }
    return line


def _pairs_line(step: int, steps: int, rng: random.Random) -> dict[str, Any]:
    margin = 3 * step / steps + rng.gauss(0, 0.2)
    line: dict[str, Any] = {"step": step, "loss": math.log1p(math.exp(-margin)), "margin": margin, "tokens": 1024.0}
    line |= {"accuracy": min(1.0, 0.6 + 0.4 * step / steps), "chosen_reward": margin / 4, "rejected_reward": -margin}
    return line | {"grad_norm": 1.0, "learning_rate": 3e-4, "tokens_per_second": 4000.0, "num_tokens": 1024 * step}


def _policy_line(step: int, steps: int, rng: random.Random) -> dict[str, Any]:
    far = step / steps
    line: dict[str, Any] = {"step": step, "loss": rng.gauss(0, 0.02), "tokens": 900.0, "num_tokens": 900 * step}
    line |= {"reward": 2 * far + rng.gauss(0, 0.15), "kl": 6 * far**2, "entropy": 0.4 - 0.2 * far, "eos_rate": 0.97}
    line |= {"clip_fraction": 0.02, "explained_variance": 0.7 * far, "answer_tokens": 8 - far, "beta": 0.05}
    line |= {"value_loss": 0.3 - 0.2 * far, "ratio": 1.0, "learning_rate": 1e-4, "tokens_per_second": 700.0}
    if step % 10 == 0:
        line |= {
            "eval_reward": 0.84 + 0.3 * far - 0.25 * far**2,
            "eval_kl": 5 * far**2,
            "eval_win_rate": 0.5 + 0.1 * far,
        }
    return line


def _verdict(metrics: dict[str, float], skill: float, rng: random.Random) -> dict[str, Any]:
    share = {
        task: min(1.0, max(0.0, round(rng.gauss(skill, 0.1) * (0.55 if task in UNSEEN else 1), 2)))
        for task in SEEN + UNSEEN
    }
    share = share if skill > 0.1 else dict.fromkeys(share, 0.0) | {"add": 0.1}
    wrong = "the the cat is a the word cat the mat and the"
    samples = [
        _sample("reverse", "Write the word lantern backwards.", "nretnal", "nretnal" if skill > 0.1 else wrong),
        _sample("add", "What is 38 plus 47?", "85", "85" if skill > 0.81 else "75" if skill > 0.1 else ""),
        _sample(
            "story_who",
            "Read the story.\n\nMira took the red kite to the hill. Ben stayed at home.\n\nWho went to the hill?",
            "Mira",
            "Mira" if skill > 0.1 else wrong,
        ),
        _sample(
            "sort",
            f"Sort these words: pear, apple, {NASTY}, fig",
            "apple, fig, pear",
            "apple, fig, pear" if skill > 0.1 else "pear " * 30,
        ),
    ]
    samples += [
        _sample(
            "count_letters",
            f"How many letters has the word {'kettle' * n}?",
            str(6 * n),
            str(6 * n) if rng.random() < skill else str(6 * n + 1),
        )
        for n in range(1, 21)
    ]
    return {"metrics": metrics, "by_task": share, "samples": samples}


def _sample(task: str, prompt: str, reference: str, answer: str) -> dict[str, Any]:
    return {"task": task, "prompt": prompt, "reference": reference, "answer": answer, "correct": answer == reference}
