"""Measure a model on held-out rows: loss, perplexity, exact match by task, and the loss on general text."""

import json

from pydantic import Field

from burnish.config import DataSettings, EvaluateSettings, Settings, TrainedModelSettings
from burnish.data.prepare import check_data
from burnish.engine.trained import check_trained


class Config(Settings):
    """Which model, on which rows."""

    model: TrainedModelSettings = TrainedModelSettings.model_construct()
    data: DataSettings = DataSettings.model_construct()
    prompts: int = Field(default=0, ge=0, description="Rows to answer by generation and grade by exact match; 0: none.")
    general: str | None = Field(default=None, description="A text file, or `embedded`, to measure the loss on as well.")
    microbatch_tokens: int = Field(
        default=4096, ge=2, description="Tokens per forward pass; the result does not depend on it."
    )


def main(config: Config, as_json: bool) -> None:
    """Prints the metrics, one a line."""
    check_trained(config.model)
    check_data(config.data)

    from burnish.data.prepare import prepare
    from burnish.engine.trained import open_trained
    from burnish.evaluate.judge import Judge

    trained = open_trained(config.model)
    whole = EvaluateSettings(
        path=config.data.path if isinstance(config.data.path, str) else None, prompts=config.prompts
    )
    data = prepare(config.data, whole, trained.tokenizer, trained.template, seed=0)
    judge = Judge(
        trained.decoder,
        trained.adapter,
        trained.tokenizer,
        trained.template,
        data.held_out,
        data.prompts,
        config.general,
        config.microbatch_tokens,
    )
    verdict = judge.verdict()
    if as_json:
        print(json.dumps(verdict, ensure_ascii=False))
        return
    for name, value in verdict["metrics"].items():
        print(f"{name:<28} {value:.6g}")
    for task, share in verdict.get("by_task", {}).items():
        print(f"  {task:<26} {share:.1%}")
