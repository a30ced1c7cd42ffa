"""Writes trl_losses.json: what TRL's own code makes of the log-probs in it, loss and gradient.

    pip install trl==1.16.0    # not a dependency of Burnish
    python tests/golden/trl_losses.py

TRL computes its losses in methods of its trainers. Each is run as it is, on a stand-in for the trainer that has the
settings it reads, and a stand-in for the model that answers with given log-probs, in float64.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import trl
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

BETA, SMOOTHING = 0.1, 0.1
PROMPT = 2
LENGTHS = ((3, 2), (1, 4), (5, 5), (2, 3))
"""Tokens of the chosen and of the rejected answer of each pair."""


class Given(torch.nn.Module):
    """Answers with the log-probs it was made with, whatever it is asked."""

    def __init__(self, log_probs: torch.Tensor) -> None:
        super().__init__()
        self.log_probs = log_probs

    def forward(self, **_):
        blank = torch.zeros_like(self.log_probs)
        return SimpleNamespace(log_probs=self.log_probs, entropy=blank, mean_logits=blank, is_top1=blank > 0)


def trainer(**settings):
    same = mock.Mock(side_effect=lambda x: x)
    accelerator = SimpleNamespace(gather=same, gather_for_metrics=same, device="cpu", reduce=lambda x, reduction: x)
    defaults = {
        "accelerator": accelerator,
        "aux_loss_enabled": False,
        "beta": BETA,
        "label_smoothing": SMOOTHING,
        "precompute_ref_logps": True,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**{**defaults, **settings})


def rows(answers: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [B, PROMPT + longest - 1] and the mask of answers [B, PROMPT + longest]."""
    longest = max(len(answer) for answer in answers)
    log_probs = [torch.nn.functional.pad(answer, (PROMPT - 1, longest - len(answer))) for answer in answers]
    mask = [[0] * PROMPT + [1] * len(answer) + [0] * (longest - len(answer)) for answer in answers]
    return torch.stack(log_probs), torch.tensor(mask)


def with_gradient(loss: torch.Tensor, answers: list[torch.Tensor]) -> dict:
    gradients = torch.autograd.grad(loss, answers, allow_unused=True, materialize_grads=True)
    return {"loss": loss.item(), "gradients": [gradient.tolist() for gradient in gradients]}


def dpo(name: str, policy: list[torch.Tensor], reference: list[torch.Tensor]) -> dict:
    log_probs, mask = rows(policy)
    sums = [answer.sum()[None] for answer in reference]
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": sums[0],
        "ref_rejected_logps": sums[1],
    }
    settings = trainer(
        loss_types=[name],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        model=SimpleNamespace(training=True),
    )
    return with_gradient(trl.DPOTrainer._compute_loss(settings, Given(log_probs), inputs, False), policy)


def cpo(name: str, policy: list[torch.Tensor], beta: float, gamma: float) -> dict:
    settings = trainer(loss_type=name, beta=beta, simpo_gamma=gamma, alpha=0.0, label_smoothing=0.0)
    size = (lambda answer: answer.mean()) if name == "simpo" else (lambda answer: answer.sum())
    losses = CPOTrainer.cpo_loss(settings, size(policy[0])[None], size(policy[1])[None])[0]
    return with_gradient(losses.mean(), policy)


def orpo(policy: list[torch.Tensor]) -> dict:
    """The term of the odds ratio alone: TRL's likelihood is over the prompt too."""
    with mock.patch.object(torch.Tensor, "float", lambda x: x):  # stay in float64
        losses = ORPOTrainer.odds_ratio_loss(trainer(), policy[0].mean()[None], policy[1].mean()[None])[0]
    return with_gradient(-losses.mean(), policy)


def kto(policy: list[torch.Tensor], reference: list[torch.Tensor], wanted: list[bool], kl: float) -> dict:
    log_probs, mask = rows(policy)
    settings = trainer(
        loss_type="kto",
        desirable_weight=1.0,
        undesirable_weight=1.5,
        calculate_KL=True,
        model=SimpleNamespace(training=True),
        _compute_kl_logps=lambda model, batch: torch.tensor([kl], dtype=torch.float64),
    )
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": torch.tensor(wanted),
        "ref_logps": torch.stack([answer.sum() for answer in reference]),
        "ref_KL_logps": torch.zeros(1, dtype=torch.float64),
    }
    return with_gradient(trl.KTOTrainer._compute_loss(settings, Given(log_probs), inputs, False), policy)


def reward(scores: torch.Tensor, margin: list[float], centering: float | None) -> dict:
    settings = trainer(model=SimpleNamespace(training=True), args=SimpleNamespace(center_rewards_coefficient=centering))
    inputs = {"attention_mask": torch.ones(1), "margin": torch.tensor(margin, dtype=torch.float64)}
    answer = SimpleNamespace(logits=scores[:, None])
    return with_gradient(trl.RewardTrainer.compute_loss(settings, lambda **_: answer, inputs), [scores])


def grpo(name: str, policy: list[torch.Tensor], old: list[torch.Tensor], reference: list[torch.Tensor]) -> dict:
    """All answers as one batch; advantages as in ADVANTAGES."""
    (new_log_probs, mask), (old_log_probs, _), (reference_log_probs, _) = rows(policy), rows(old), rows(reference)
    mask = mask[:, PROMPT:]
    columns = slice(PROMPT - 1, None)
    blank = torch.zeros_like(new_log_probs[:, columns])
    args = SimpleNamespace(delta=None, use_bias_correction_kl=True)
    settings = trainer(
        loss_type=name,
        args=args,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=8,
        _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=False),
        _get_per_token_logps_and_entropies=lambda *a, **k: (new_log_probs[:, columns], blank, None),
    )
    settings.accelerator.num_processes = 1
    inputs = {
        "prompt_ids": torch.ones(len(policy), PROMPT),
        "prompt_mask": torch.ones(len(policy), PROMPT),
        "completion_ids": torch.ones_like(mask),
        "completion_mask": mask,
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64),
        "old_per_token_logps": old_log_probs[:, columns],
        "ref_per_token_logps": reference_log_probs[:, columns],
        "num_items_in_batch": mask.sum(),
    }
    return with_gradient(trl.GRPOTrainer._compute_loss(settings, None, inputs), policy)


ADVANTAGES = [1.0, -0.5, 2.0, -1.5, 0.25, -1.25, 0.75, -0.75]
DPO_LOSSES = [
    "sigmoid",
    "robust",
    "ipo",
    "hinge",
    "exo_pair",
    "apo_zero",
    "apo_down",
    "sppo_hard",
    "sft",
    "sigmoid_norm",
]


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> torch.Tensor:
        """Log-probs that JSON holds exactly."""
        return -torch.randint(1, 256, (length,), generator=generator).double() / 64

    def near(answer: torch.Tensor) -> torch.Tensor:
        return (answer + torch.randint(-24, 25, answer.shape, generator=generator).double() / 64).clamp(max=-1 / 64)

    policy = [[draw(length).requires_grad_() for length in pair] for pair in LENGTHS]
    reference, old = ([[near(answer.detach()) for answer in pair] for pair in policy] for _ in range(2))
    flat = [[answer for pair in side for answer in pair] for side in (policy, old, reference)]
    scores = (draw(8) + 2).requires_grad_()
    wanted = [True, False] * len(LENGTHS)
    pairs = list(zip(policy, reference, strict=True))
    margins = [0.0, 0.5, 1.0, 2.0]
    out = {
        "about": f"Made by tests/golden/trl_losses.py with TRL {trl.__version__} and PyTorch {torch.__version__}.",
        "beta": BETA,
        "label_smoothing": SMOOTHING,
        "policy": [[answer.tolist() for answer in pair] for pair in policy],
        "reference": [[answer.tolist() for answer in pair] for pair in reference],
        "old": [[answer.tolist() for answer in pair] for pair in old],
        "advantages": ADVANTAGES,
        "scores": scores.tolist(),
        "margins": margins,
        "dpo": {name: [dpo(name, p, r) for p, r in pairs] for name in DPO_LOSSES},
        "simpo": {"beta": 2.0, "gamma": 1.0, "pairs": [cpo("simpo", p, 2.0, 1.0) for p in policy]},
        "cpo": [cpo("sigmoid", p, BETA, 0.0) for p in policy],
        "orpo": [orpo(p) for p in policy],
        "kto": {str(kl): kto(flat[0], flat[2], wanted, kl) for kl in (-0.5, 0.75)},
        "reward": {str(c): reward(scores, margins, c) for c in (None, 0.01)},
        "grpo": {name: grpo(name, *flat) for name in ("grpo", "dapo", "dr_grpo")},
    }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in out.items())
    Path(__file__).with_suffix(".json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
