"""Systems that take turns on one device: each is loaded once, into a process of its own, and works only when asked.

So A B A B costs one loading of each, a drift of the machine's clocks meets all of them alike, and what breaks one
leaves the others. Requests are lines of JSON; an answer is a line that begins with `MARK`, since libraries print what
they like. Imports no torch.
"""

import contextlib
import json
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MARK = "@turn "
PROGRESS = re.compile(r"(it/s|s/it)\S*$")
"""The end of a progress bar, which says nothing of why a system stopped."""


class Failed(RuntimeError):
    """A system could not be measured; the message says why in one line."""


class Worker:
    """A system in a process of its own. What it prints goes to the log."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str], cwd: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        cwd.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._file = log.open("a", buffering=1, encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._file,
            env=dict(env),
            cwd=cwd,
            encoding="utf-8",
            errors="replace",
        )
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def hear(self, seconds: float) -> dict[str, Any]:
        """Its next answer. Raises Failed when it ends, or says nothing for so long."""
        try:
            answer = self._answers.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            self.close()
            raise Failed(f"said nothing for {seconds:.0f} s; {self._last_line()}") from None
        if answer is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=15)  # it has closed its output: how it ends is worth a moment
            self.close()
            raise Failed(f"ended with exit status {self._process.returncode}; {self._last_line()}")
        return answer

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """What it answers to the request."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=15)
            self.close()
            raise Failed(f"is gone; {self._last_line()}") from None
        return self.hear(seconds)

    def close(self) -> None:
        """Ends the process at once: its answers are in, and a trainer that is told to stop takes its time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._listener.join(timeout=5)  # a process that it left behind may still hold its output open
        if not self._listener.is_alive():
            self._process.stdout.close()
            self._file.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                self._answers.put(json.loads(line.removeprefix(MARK)))
            else:
                self._file.write(line)
        self._answers.put(None)

    def _last_line(self) -> str:
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        said = (line for line in reversed(lines) if line and not PROGRESS.search(line))
        return next((f"its last words: {line[:300]}" for line in said), "it left no words")


class Clock:
    """How much of an allowance of seconds is left."""

    def __init__(self, allowance: float) -> None:
        self._end = time.monotonic() + allowance

    def left(self) -> float:
        """Seconds left; 0 when it is used up."""
        return max(self._end - time.monotonic(), 0.0)


def say(values: Mapping[str, Any]) -> None:
    """A worker's answer."""
    print(f"\n{MARK}{json.dumps(values)}", flush=True)


def listen() -> dict[str, Any] | None:
    """A worker's next request; None when there will be none."""
    line = sys.stdin.readline()
    return json.loads(line) if line.strip() else None


def median(values: Sequence[float]) -> float:
    """The middle one; of an even number, the upper of the two in the middle."""
    return sorted(values)[len(values) // 2]
