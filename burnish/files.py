"""Folders that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path


@contextlib.contextmanager
def written_aside(final: Path) -> Generator[Path]:
    """A folder to write into; it takes the name `final`, replacing what was there, once all of it is on disk.

    When the work in the `with` block fails, or the process dies, what stood at `final` before is still there untouched
    (a process that dies in the instant of replacing leaves the old folder beside it, named `.old-...`).
    """
    aside = final.parent / f".new-{final.name}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    except OSError as error:
        raise OSError(f"{final} cannot be made: {error.strerror}") from None
    try:
        yield aside
        for path in sorted(aside.rglob("*")):
            _sync(path)
        _sync(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    replaced = final.parent / f".old-{final.name}"
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
