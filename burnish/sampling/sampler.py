"""Generation with a cache: prompts in, the ids that the model writes after them out."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from burnish.data.packing import collate
from burnish.model.decoder import Decoder
from burnish.types import Sequence as TokenSequence


@torch.inference_mode()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    end_ids: Collection[int],
    adapter: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    num_slots: int = 128,
) -> list[list[int]]:
    """What the model writes after each prompt, without the end token, in the order of the prompts.

    At temperature 0 the most likely token is taken; above it tokens are drawn from softmax(logits / temperature), each
    prompt from a random stream of its own (seed, place in `prompts`), so that neighbours do not change what it draws.
    Prompts of similar length are decoded together, `num_slots` at a time, and a finished one leaves the others; an
    answer ends at one of `end_ids` or after `max_tokens`. Rounding that differs with the number of prompts decoded
    together can still change a token whose probability all but equals another's.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for begin in range(0, len(order), num_slots):
        members = order[begin : begin + num_slots]
        batch = collate([_unscored(prompts[i]) for i in members]).to(device)
        cache = model.new_cache(len(members), batch.longest + max_tokens)
        streams = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in members] if temperature else []
        logits = model.prefill(batch, cache, adapter)
        for _ in range(max_tokens):
            tokens = _choose(logits, temperature, streams)
            written = tokens.tolist()
            going = [slot for slot, token in enumerate(written) if token not in end_ids]
            for slot in going:
                answers[members[slot]].append(written[slot])
            if len(going) < len(members):
                kept = torch.tensor(going, dtype=torch.long, device=device)
                cache.keep(kept)
                tokens, members = tokens[kept], [members[slot] for slot in going]
                streams = [streams[slot] for slot in going] if streams else []
            if not going:
                break
            logits = model.decode(tokens, cache, adapter)
    return answers


def _unscored(ids: Sequence[int]) -> TokenSequence:
    return TokenSequence(tuple(ids), (0.0,) * len(ids), row=0)


def _choose(logits_SV: Tensor, temperature: float, streams: list[torch.Generator]) -> Tensor:
    if not temperature:
        return logits_SV.argmax(-1)
    probabilities = torch.softmax(logits_SV.double().cpu() / temperature, -1)
    drawn = [torch.multinomial(p, 1, generator=stream) for p, stream in zip(probabilities, streams, strict=True)]
    return torch.cat(drawn).to(logits_SV.device)
