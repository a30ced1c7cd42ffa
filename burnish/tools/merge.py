"""Merge an adapter into its base, shard by shard, and report the error of the merged logits."""

import json
from typing import Literal

from pydantic import Field

from burnish.config import Settings
from burnish.engine.trained import check_base, check_trained, find_adapter, find_base, tell_storage
from burnish.settings import TrainedModelSettings


class Config(Settings):
    """What is merged into what, and where it goes."""

    model: TrainedModelSettings = TrainedModelSettings.model_construct()
    out: str = Field(description="The folder to write: a model in Hugging Face layout.")
    onto: Literal["weights", "nf4"] = Field(
        default="weights",
        description="The base's 16-bit weights, or what they become through NF4: what a QLoRA adapter was trained on.",
    )


def main(config: Config, as_json: bool) -> None:
    """Writes the merged model and prints the report."""
    if config.model.adapter is None:
        raise ValueError("write model.adapter=DIR: the adapter to merge")
    check_trained(config.model)

    from burnish.serve.merge import merge

    base, adapter = find_base(config.model), find_adapter(config.model.adapter)
    check_base(adapter, base)
    tell_storage(adapter, base, config.onto, "onto")
    report = merge(base, adapter, config.out, onto=config.onto)
    if as_json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        print(f"{name:<28} {value}")
