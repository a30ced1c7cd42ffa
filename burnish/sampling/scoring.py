"""What answers are worth: a reward model, a Python function or an HTTP endpoint behind one method.

Imports no torch before `open_reward`, so that a reward that cannot work is an error at once.
"""

import ast
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from tqdm import tqdm

from burnish.data.templates import ChatTemplate
from burnish.data.tokenizer import Tokenizer
from burnish.engine.rewards import check_words, find_reward
from burnish.engine.trained import check_base
from burnish.settings import RewardSettings
from burnish.types import Rollout

if TYPE_CHECKING:
    from burnish.engine.mesh import Mesh
    from burnish.engine.roles import Role


class Scorer(Protocol):
    """One kind of source: gives a score for each answer, None or a number that is not finite where it has none."""

    name: str
    """The setting that it comes from, for messages."""
    problem: str | None
    """Why the last answer without a score has none."""

    def __call__(self, rollouts: Sequence[Rollout]) -> Sequence[float | None]:
        """The scores of the answers, in their order."""
        ...


class RewardSource:
    """Scores answers, then applies the rule for answers without an end and the clip of the settings.

    An answer whose score failed is worth None, never 0: it is left out and counted in `failures`. On several ranks the
    counts are those of all of them.
    """

    def __init__(self, scorer: Scorer, settings: RewardSettings, mesh: "Mesh | None" = None) -> None:
        self.scorer, self.settings, self.mesh = scorer, settings, mesh
        self.asked, self.failures = 0, 0
        self._told: set[str] = set()

    def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """What each answer is worth; None where the source failed or the settings leave it out.

        Every rank calls it. Raises ValueError when no answer of the step, on any rank, could be scored.
        """
        scores = self._ask(rollouts)
        self._count(len(scores), scores.count(None))
        return [self._settled(score, rollout.ended) for score, rollout in zip(scores, rollouts, strict=True)]

    def measure(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """The same for answers that nobody trains on: not counted, and no error when all of them fail."""
        scores = self._ask(rollouts)
        return [self._settled(score, rollout.ended) for score, rollout in zip(scores, rollouts, strict=True)]

    def state(self) -> dict[str, Any]:
        """The counts, as a JSON object."""
        return {"asked": self.asked, "failures": self.failures}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue the counts where `state` left them."""
        self.asked, self.failures = state["asked"], state["failures"]

    def _ask(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """What the source gives; None for what is not finite."""
        raw = self.scorer(rollouts)
        assert len(raw) == len(rollouts)
        for score in raw:
            if score is not None and not math.isfinite(score):
                self.scorer.problem = f"{self.scorer.name} gave the score {score}"
        return [None if score is None or not math.isfinite(score) else float(score) for score in raw]

    def _count(self, asked: int, failed: int) -> None:
        problem = self.scorer.problem if failed else None
        found = self.mesh.collect((asked, failed, problem)) if self.mesh else [(asked, failed, problem)]
        asked, failed = sum(count[0] for count in found), sum(count[1] for count in found)
        self.asked, self.failures = self.asked + asked, self.failures + failed
        problem = next((count[2] for count in found if count[2]), None)
        if asked and asked == failed:
            raise ValueError(f"{self.scorer.name} scored none of the {asked} answers of this step: {problem}")
        if problem and problem not in self._told and (self.mesh is None or self.mesh.is_main):
            self._told.add(problem)
            tqdm.write(f"warning: {problem}; {failed} of {asked} answers are left out of this step", file=sys.stderr)

    def _settled(self, score: float | None, ended: bool) -> float | None:
        """The score after the rule for answers that did not end by themselves, and the clip."""
        rule, value, clip = self.settings.missing_eos, self.settings.missing_eos_value, self.settings.clip
        if score is not None and not ended:
            score = {"none": score, "replace": -value, "subtract": score - value, "mask": None}[rule]
        return score if score is None or clip is None else min(max(score, -clip), clip)


def check_reward(settings: RewardSettings) -> None:
    """Raises ValueError unless the settings name one source, and what it names is there."""
    if settings.path is not None:
        find_reward(settings.path)
    elif settings.function is not None:
        check_function(settings.function)
    elif settings.url is not None:
        parts = urlsplit(settings.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"reward.url={settings.url} is no address: write http://HOST:PORT/PATH or https://...")
    else:
        raise ValueError("write reward.path=RUN, reward.function=FILE.py:NAME or reward.url=...: what answers earn")


def check_function(setting: str) -> None:
    """Raises ValueError unless FILE.py:NAME names a file that is Python and defines NAME; runs nothing of it."""
    path, _, name = setting.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ValueError(f"reward.function={setting}: write FILE.py:NAME, a Python file and a function in it")
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
    except OSError as error:
        raise ValueError(f"reward.function={setting}: {path} cannot be read: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        line = f" line {error.lineno}:" if isinstance(error, SyntaxError) else ""
        raise ValueError(f"reward.function={setting}: {path} is not Python:{line} {error}") from None
    names = set(_bound(tree.body))
    if name not in names and "*" not in names:
        defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        functions = sorted(name for name in defined if not name.startswith("_"))
        there = f"it has {', '.join(functions)}" if functions else "it has no function at all"
        raise ValueError(f"reward.function={setting}: {path} does not define {name}; {there}")


def shared_reward(settings: RewardSettings, base: Path) -> Path | None:
    """The reward adapter that shares this base with the policy; None for every other source.

    Raises ValueError for an adapter that was trained on another base.
    """
    stored = find_reward(settings.path) if settings.path is not None else None
    if stored is None or not stored.is_adapter:
        return None
    check_base(stored.folder, base)
    return stored.folder


def open_reward(
    settings: RewardSettings,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    role: "Role | None",
    mesh: "Mesh",
    microbatch_tokens: int,
) -> RewardSource:
    """The source that the settings name, ready on every rank; `check_reward` comes before.

    `role` is the reward adapter in the policy's model, where `shared_reward` names one: every answer is then scored as
    the token ids that it was written in, which tokenizer and template must have given in its training too.
    """
    if settings.function is not None:
        from burnish.sampling.reward_function import FunctionScorer

        return RewardSource(FunctionScorer(settings.function), settings, mesh)
    if settings.url is not None:
        from burnish.sampling.reward_endpoint import EndpointScorer

        return RewardSource(EndpointScorer(settings.url, settings.timeout, settings.retries), settings, mesh)
    from burnish.sampling.reward_model import AdapterScorer, open_model_scorer

    assert settings.path is not None
    stored = find_reward(settings.path)
    if not stored.is_adapter:
        scorer = open_model_scorer(stored.folder, settings.storage, mesh.device, microbatch_tokens)
        return RewardSource(scorer, settings, mesh)
    assert role is not None
    check_words(stored.folder, tokenizer, template)
    return RewardSource(AdapterScorer(stored.folder, role, mesh, microbatch_tokens), settings, mesh)


def sample_of(rollout: Rollout) -> dict[str, Any]:
    """An answer as functions and endpoints see it."""
    messages = [{"role": turn.role, "content": turn.content, **turn.extra} for turn in rollout.prompt.messages]
    prompt = rollout.prompt
    return {"messages": messages, "answer": rollout.answer, "reference": prompt.answer, "task": prompt.task}


def as_score(value: object) -> float | None:
    """A number as a score, None as None. Raises TypeError for anything else."""
    if value is None:
        return None
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"{value!r} is no number")
    return float(value)  # type: ignore[arg-type]  # it has __float__


def _bound(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The names that a file binds at its top level, within `if` and `try` too; `*` for those nobody can know."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        else:
            yield from _bound(ast.iter_child_nodes(node))
