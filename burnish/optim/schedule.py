"""Learning-rate schedules: pure functions from a step to a multiplier of the peak rate."""

import math
from collections.abc import Callable


def constant(progress: float, decay: float) -> float:
    """1 all along."""
    return 1.0


def linear(progress: float, decay: float) -> float:
    """A straight line from 1 to 0."""
    return 1.0 - progress


def cosine(progress: float, decay: float) -> float:
    """Half a cosine wave from 1 to 0 (Loshchilov and Hutter 2017, equation 5, without restarts)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def wsd(progress: float, decay: float) -> float:
    """1, then a straight line to 0 over the last `decay` of the steps (warm-up, stable, decay: Hu et al. 2024)."""
    return min(1.0, (1.0 - progress) / decay)


def multiplier(step: int, steps: int, shape: str, warmup: float, decay: float = 0.2) -> float:
    """What the peak learning rate is multiplied with at a step counted from 0.

    Warm-up rises in equal parts so that its first step already learns: (step + 1) / warmup_steps. After it, the shape
    runs over what is left and would reach its end one step after the last, so that no step is spent at a rate of 0.
    """
    warmup_steps = round(warmup * steps) if warmup < 1 else round(warmup)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return SHAPES[shape]((step - warmup_steps) / max(1, steps - warmup_steps), decay)


SHAPES: dict[str, Callable[[float, float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
}
