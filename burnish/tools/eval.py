"""Measure a model on held-out rows: loss, perplexity, exact match by task, and the loss on general text."""

import json

from pydantic import Field

from burnish.config import Settings
from burnish.data.prepare import check_data
from burnish.engine.preflight import check_text
from burnish.engine.trained import check_trained
from burnish.settings import DataSettings, EvaluateSettings, TrainedModelSettings


class Config(Settings):
    """Which model, on which rows."""

    model: TrainedModelSettings = TrainedModelSettings.model_construct()
    data: DataSettings = DataSettings.model_construct()
    prompts: int = Field(default=0, ge=0, description="Rows to answer by generation and grade by exact match; 0: none.")
    max_tokens: int = Field(default=64, ge=1, description="The longest answer to a prompt, in tokens.")
    general: str | None = Field(default=None, description="A text file, or `embedded`, to measure the loss on as well.")
    microbatch_tokens: int = Field(
        default=4096, ge=2, description="Tokens per forward pass; the result does not depend on it."
    )


def main(config: Config, as_json: bool) -> None:
    """Prints the metrics, one a line."""
    check_trained(config.model)
    check_data(config.data)
    check_text(config.general)

    from burnish.data.prepare import prepare_evaluation
    from burnish.engine.trained import open_trained
    from burnish.evaluate.judge import Judge

    trained = open_trained(config.model)
    asked = EvaluateSettings(prompts=config.prompts, max_tokens=config.max_tokens, general=config.general)
    held_out, prompts = prepare_evaluation(config.data, trained.tokenizer, trained.template, config.prompts, seed=0)
    judge = Judge(
        trained.decoder,
        trained.adapter,
        trained.tokenizer,
        trained.template,
        held_out,
        prompts,
        asked,
        (config.data.max_length, max(config.microbatch_tokens, config.data.max_length)),
    )
    verdict = judge.verdict()
    if as_json:
        print(json.dumps(verdict, ensure_ascii=False))
        return
    for name, value in verdict["metrics"].items():
        print(f"{name:<28} {value:.6g}")
    for task, share in verdict.get("by_task", {}).items():
        print(f"  {task:<26} {share:.1%}")
