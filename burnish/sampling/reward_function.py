"""A Python function as a reward: FILE.py:NAME, from a list of samples to a list of numbers."""

import asyncio
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from burnish.sampling.scoring import as_score, sample_of
from burnish.types import Rollout

Function = Callable[[list[dict[str, Any]]], Any]


class FunctionScorer:
    """Asks the function about all answers at once and, when it raises, about each alone: one bad answer, one score.

    Raises ValueError when it gives another number of scores, or something that is no number: such a function is wrong.
    """

    def __init__(self, setting: str) -> None:
        self.name, self.problem = f"reward.function={setting}", None
        self.path = Path(setting.rpartition(":")[0])
        self.function = load_function(setting)

    problem: str | None

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """The function's scores; None for an answer on which it raises."""
        if not rollouts:
            return []
        try:
            return self._ask(rollouts)
        except _Raised as raised:
            self.problem = str(raised)
            if len(rollouts) == 1:
                return [None]
        return [score for rollout in rollouts for score in self([rollout])]

    def _ask(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        samples = [sample_of(rollout) for rollout in rollouts]
        try:
            with _neighbours_of(self.path.resolve()):
                given = self.function(samples)
                if inspect.isawaitable(given):
                    given = asyncio.run(_awaited(given))
        except Exception as error:  # whatever a user's function can raise
            raise _Raised(self._told(error)) from error
        return self._checked(given, len(samples))

    def _checked(self, given: Any, count: int) -> list[float | None]:
        if isinstance(given, str | bytes | dict) or not hasattr(given, "__iter__"):
            raise ValueError(f"{self.name} gave a {type(given).__name__}: it must give a list of {count} numbers")
        scores = list(cast(Sequence[Any], given))
        if len(scores) != count:
            raise ValueError(f"{self.name} gave {len(scores)} scores for {count} samples: it must give one for each")
        try:
            return [as_score(score) for score in scores]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.name} gave a score that is no number: {error}") from None

    def _told(self, error: Exception) -> str:
        """The exception, and the last line of the user's file that it came through."""
        file = str(self.path.resolve())
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        place = f" at {self.path}:{lines[-1]}" if lines else ""
        return f"{self.name} raised {type(error).__name__}{place}: {' '.join(str(error).split())}"


class _Raised(Exception):
    """The user's function raised; the message tells what and where."""


def load_function(setting: str) -> Function:
    """The function that FILE.py:NAME names. The file is run as a module that nobody else sees; it may import its
    neighbours. Raises ValueError when running it fails, and when NAME is no function.
    """
    path, _, name = setting.rpartition(":")
    file = Path(path).resolve()
    spec = importlib.util.spec_from_file_location(f"reward_function_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # while it runs: dataclasses look for the module that they are written in
    try:
        with _neighbours_of(file):
            spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file can raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        place = f"{path}:{lines[-1]}" if lines else path
        raise ValueError(f"reward.function={setting}: {place} raised {type(error).__name__}: {error}") from None
    finally:
        del sys.modules[spec.name]
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward.function={setting}: {name} is no function of {path}")
    return function


@contextmanager
def _neighbours_of(file: Path) -> Generator[None]:
    """What lies beside the file can be imported."""
    sys.path.insert(0, str(file.parent))
    try:
        yield
    finally:
        sys.path.remove(str(file.parent))


async def _awaited(given: Any) -> Any:
    return await given
