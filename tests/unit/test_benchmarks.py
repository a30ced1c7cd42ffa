"""What the benchmark can be asked for: a misspelt word would have measured something else than it says."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "sft.py"
SPEC = importlib.util.spec_from_file_location("sft_benchmark", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
sft = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sft)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("storag=bf16", r"^storag=bf16 is not known: did you mean storage=\.\.\.\?$"),
        ("storage", r"^storage is not known: did you mean storage=\.\.\.\?$"),
        ("zzz=3", "^zzz=3 is not known: known are shape, storage, adapter, checkpointing, sequences, length, "),
        ("storage=nf5", "^storage=nf5 is not known: write one of full, bf16, fp32, nf4$"),
        ("adapter=lorra", "^adapter=lorra is not known: write one of none, lora, dora, ia3$"),
        ("shape=llama", "^shape=llama is not known: write one of llama-2-7b, llama-3.1-8b$"),
        ("checkpointing=yes", "^checkpointing=yes is not known: write one of true, false$"),
        ("length=-1", "^length=-1 must be a whole number above 0$"),
        ("sequences=0", "^sequences=0 must be a whole number above 0$"),
    ],
)
def test_a_word_that_is_not_known_is_named_with_the_nearest(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sft.read_words(["shape=llama-2-7b", word])


def test_words_are_read_and_the_others_have_their_defaults() -> None:
    asked = sft.read_words(["storage=bf16", "length=512", "note=a=b c"])
    assert asked == sft.WORDS | {"storage": "bf16", "length": "512", "note": "a=b c"}
    assert sft.read_words([]) == sft.WORDS
