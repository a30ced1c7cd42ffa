"""The embedded world: text, instructions and graders made from nothing but a seed. Imports no torch.

documents(seed)        plain text that a small base model learns from, endlessly
rows(split)            instruction rows (`train`, `held_out_seen`, `held_out_unseen`), plain rows (`general`), pairs of
                       answers (`preferences`, `preferences_held_out`) or questions (`prompts`)
check(task, reference, answer)    whether an answer is right
worth(task, reference, answer)    what it is worth: right beats wrong, concise beats rambling
general_text()         plain text on which forgetting is measured
"""

from typing import Any

from burnish.world.corpus import documents, general_documents, general_text
from burnish.world.family import Case, Family
from burnish.world.instructions import FAMILIES, INSTRUCTION_SPLITS, SEEN, UNSEEN, check, instruction_rows
from burnish.world.preferences import PREFERENCE_SPLITS, preference_rows, worth

SPLITS = (*INSTRUCTION_SPLITS, "general", *PREFERENCE_SPLITS)


def rows(split: str = "train") -> list[dict[str, Any]]:
    """The rows of one split of the embedded data, always the same.

    Raises ValueError for a split that does not exist.
    """
    if split == "general":
        return [{"text": text} for text in general_documents()]
    if split in PREFERENCE_SPLITS:
        return preference_rows(split)
    if split not in INSTRUCTION_SPLITS:
        raise ValueError(f"data.split: the embedded data has no split '{split}'; write one of {', '.join(SPLITS)}")
    return instruction_rows(split)


__all__ = [
    "FAMILIES",
    "SEEN",
    "SPLITS",
    "UNSEEN",
    "Case",
    "Family",
    "check",
    "documents",
    "general_documents",
    "general_text",
    "rows",
    "worth",
]
