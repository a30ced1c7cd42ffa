"""Held-out loss: exact per token, whatever the size of the evaluation batches."""

import math
from collections.abc import Sequence

import torch

from burnish.data.packing import collate, pack
from burnish.engine.room import Room
from burnish.losses.likelihood import cross_entropy
from burnish.model.decoder import Decoder
from burnish.types import Sequence as TokenSequence


@torch.no_grad()
def held_out_loss(
    model: Decoder,
    sequences: Sequence[TokenSequence],
    adapter: str | None,
    microbatch_tokens: int,
    room: Room | None = None,
) -> dict[str, float]:
    """Mean loss, perplexity and accuracy over all weighted tokens: sums over batches, divided once.

    Batches that memory does not suffice for are divided: see `room`.
    """
    loss, correct, total = 0.0, 0.0, 0.0
    training = model.training
    model.eval()
    packs = pack([len(s.ids) for s in sequences], microbatch_tokens)
    batches = (collate([sequences[i] for i in members]).to(model.device) for members in packs)
    for batch, scores in (room or Room()).each(batches, lambda batch: model.score(batch, adapter)):
        summed, metrics = cross_entropy(scores.log_probs.double(), batch.weights.double(), scores.correct)
        loss, correct = loss + summed.item(), correct + metrics["mean_token_accuracy"].item()
        total += batch.total_weight
    model.train(training)
    if not total:
        raise ValueError("the held-out rows have no token to score")
    mean = loss / total
    perplexity = math.exp(min(mean, 700.0))
    return {"loss": mean, "perplexity": perplexity, "mean_token_accuracy": correct / total, "num_tokens": total}
