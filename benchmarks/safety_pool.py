"""Jobs side by side, each in a process that does one after the other; what breaks one leaves the others.

The processes are spawned at once, so that what they import is there when the first job comes. Results arrive one by
one. No job is begun that the clock would cut off, by what the last one took; what still runs when the clock has run out
is ended. Imports no torch.
"""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from benchmarks.turns import Clock

J = TypeVar("J")
R = TypeVar("R")
RESULT, DONE, FAILED = "result", "done", "failed"
SLACK = 1.1
"""How much longer than the last one a job may take."""


class Pool(Generic[J, R]):
    """So many processes for one kind of work: a picklable function from a job to its results."""

    def __init__(self, work: Callable[[J], Iterable[R]], count: int) -> None:
        self._work = work
        self._workers = [_Worker(work) for _ in range(count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join()

    def results(self, jobs: Iterable[J], clock: Clock) -> Iterator[R]:
        """What the jobs give, in the order in which it comes. Says which of them failed, or did not run."""
        waiting, took = deque(jobs), 0.0
        while True:
            for worker in self._workers:
                if worker.job is None and waiting and clock.left() > SLACK * took:
                    worker.begin(waiting.popleft(), clock.left())
            busy = [worker for worker in self._workers if worker.job is not None]
            spoken = wait([worker.connection for worker in busy], timeout=clock.left()) if busy else []
            if not spoken:
                break
            for worker in busy:
                if worker.connection not in spoken:
                    continue
                kind, value = worker.hear()
                if kind == RESULT:
                    yield value
                    continue
                if kind == DONE:
                    took = worker.began - clock.left()
                else:
                    print(f"{worker.job} failed: {value}", flush=True)
                    if waiting:
                        self._replace(worker)
                worker.job = None
        self._tell(list(waiting), clock)

    def _replace(self, worker: "_Worker[J]") -> None:
        """Another process in place of one whose job failed: its device may be in no state to go on."""
        worker.stop()
        worker.join()
        self._workers[self._workers.index(worker)] = _Worker(self._work)

    def _tell(self, waiting: Sequence[J], clock: Clock) -> None:
        for worker in self._workers:
            if worker.job is not None:
                print(f"{worker.job} is cut off: no time is left", flush=True)
        for job in waiting:
            print(f"{job} is not run: {clock.left():.0f} s are left", flush=True)


class _Worker(Generic[J]):
    """One process, and the job that it is at."""

    def __init__(self, work: Callable[[J], Iterable[Any]]) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.job: J | None = None
        self.began = 0.0

    def begin(self, job: J, left: float) -> None:
        """Takes a job, when so much time is left."""
        self.job, self.began = job, left
        with suppress(BrokenPipeError):  # it is gone, as the next `hear` will say
            self.connection.send(job)

    def hear(self) -> tuple[str, Any]:
        """What it says next."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return FAILED, f"its process ended with exit status {self.process.exitcode}"

    def stop(self) -> None:
        """Has the process end: at once where it is at work, else by the end of what it listens to."""
        self.connection.close()
        if self.job is not None:
            self.process.terminate()

    def join(self) -> None:
        """Waits until it has ended, but not for long."""
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(work: Callable[[Any], Iterable[Any]], connection: Connection) -> None:
    """What a process does: jobs, until there are no more or one fails."""
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # nobody listens any more
        while True:
            job = connection.recv()
            try:
                for result in work(job):
                    connection.send((RESULT, result))
            except Exception as error:  # whatever it is: the others go on
                connection.send((FAILED, f"{type(error).__name__}: {error}"))
                return
            connection.send((DONE, None))
