"""Which files of a data set belong to a split, and fetching them from the hub. Imports no torch."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

SPLITS = ("train", "test", "validation", "valid", "val", "dev")
"""The names that mark a file as belonging to a split."""
PLAIN_FOLDERS = ("", "data", "default", *SPLITS)
"""Folders that do not name a subset of the data set."""


def is_hub_id(name: str) -> bool:
    """Whether a name can be a hub data set: owner/name, or owner/name/subset."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name) is not None


def split_files(names: Sequence[str], split: str, source: str) -> list[str]:
    """Those of a data set's files that hold a split, in order.

    A file belongs to the split that its name or a folder names (`train-00000-of-00001.parquet`, `test/0.jsonl`); in a
    data set whose files name no split all of them are `train`. Raises ValueError when none belongs, or when they
    belong to several subsets.
    """
    by_split: dict[str | None, list[str]] = {}
    for name in sorted(names):
        by_split.setdefault(_split_of(name, split), []).append(name)
    if not names:
        raise ValueError(f"{source} holds no file that Burnish reads")
    chosen = by_split.get(split) or (by_split.get(None) if split == "train" else None)
    if not chosen:
        known = ", ".join(sorted(key for key in by_split if key)) or "none named"
        raise ValueError(f"{source} has no split '{split}' (splits there: {known}): write data.split=NAME")
    subsets = sorted({_subset_of(name, split) for name in chosen})
    if len(subsets) > 1:
        raise ValueError(f"{source} has several subsets ({', '.join(subsets)}): write data.path={source}/SUBSET")
    return chosen


def hub_files(name: str, split: str, kinds: Sequence[str]) -> list[Path]:
    """Local copies of the files that hold a split of a hub data set (from the hub's own cache when they are there).

    Raises ValueError when there is no such data set, or it cannot be reached.
    """
    import huggingface_hub  # 0.5 s to import, wanted by hub ids alone

    owner, repository, *subset = name.split("/")
    identity = f"{owner}/{repository}"
    try:
        listed = huggingface_hub.HfApi().list_repo_files(identity, repo_type="dataset")
    except Exception as error:  # requests' or httpx's errors, by version: all mean that it cannot be read
        raise ValueError(_unreachable(name, error)) from None
    usable = [file for file in listed if PurePosixPath(file).suffix in kinds]
    if subset:
        usable = [file for file in usable if file.startswith(f"{subset[0]}/")]
    chosen = split_files(usable, split, name)
    try:
        return [Path(huggingface_hub.hf_hub_download(identity, file, repo_type="dataset")) for file in chosen]
    except Exception as error:
        raise ValueError(_unreachable(name, error)) from None


def _unreachable(name: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"there is no file or folder {name}, and the hub's data set of that name cannot be read: {reason}"


def _split_of(name: str, wanted: str) -> str | None:
    path = PurePosixPath(name)
    words = [*path.parts[:-1], re.split(r"[-_.]", path.name)[0], path.stem]
    return next((split for split in (wanted, *SPLITS) if split in words), None)


def _subset_of(name: str, split: str) -> str:
    folder = name.split("/")[0] if "/" in name else ""
    return "" if folder in (*PLAIN_FOLDERS, split) else folder
