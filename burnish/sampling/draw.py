"""One token from each row of logits."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def most_likely(logits_SV: Float[Tensor, "S V"]) -> Int[Tensor, " S"]:
    """The token with the largest logit; of equals the first one, on a GPU any."""
    return logits_SV.argmax(-1)


def drawn(probabilities_SV: Float[Tensor, "S V"], uniforms_S: Float[Tensor, " S"]) -> Int[Tensor, " S"]:
    """The token at which the running sum of the probabilities passes the uniform number, times their sum."""
    sums_SV = probabilities_SV.cumsum(-1)
    # Rounding may take the product up to the sum itself, beyond which there is no token.
    below_S = torch.nextafter(sums_SV[:, -1], torch.zeros_like(uniforms_S))
    places_S = torch.searchsorted(sums_SV, torch.minimum(uniforms_S * sums_SV[:, -1], below_S)[:, None], right=True)
    return places_S[:, 0].clamp(max=sums_SV.shape[-1] - 1)  # NaN lies beyond all: the loss will say so


def probabilities(
    logits_SV: Float[Tensor, "S V"], temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Float[Tensor, "S V"]:
    """What is drawn from, in float64: softmax(logits / temperature), cut to `top_k` tokens and then to `top_p`.

    Top-k keeps the k most likely tokens (0: all), top-p of those the fewest, the most likely first, that hold the share
    `top_p` of what top-k left. Tokens that tie with the last one kept are kept. Rows do not add up to 1 after a cut.
    """
    scores_SV = logits_SV.double() / temperature
    if 0 < top_k < scores_SV.shape[-1]:
        least_S1 = scores_SV.topk(top_k, -1).values[:, -1:]
        scores_SV = scores_SV.masked_fill(scores_SV < least_S1, float("-inf"))
    p_SV = scores_SV.softmax(-1)
    if top_p >= 1:
        return p_SV
    sorted_SV = p_SV.sort(-1, descending=True).values
    before_SV = sorted_SV.cumsum(-1) - sorted_SV
    # The last token kept is the last before which less than `top_p` is held; the first one always is.
    last_S1 = (before_SV < top_p).sum(-1, keepdim=True).clamp(min=1) - 1
    return p_SV.masked_fill(p_SV < sorted_SV.gather(-1, last_S1), 0.0)
