"""A progress bar for work that counts what is done. Imports no torch."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(what: str) -> Generator[Callable[[int, int], None]]:
    """A function to call with (done, total), which draws a bar on stderr; it is gone when the work is done."""
    with tqdm(desc=what, leave=False, delay=0.5) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
