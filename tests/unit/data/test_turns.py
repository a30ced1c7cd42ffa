import pytest

from burnish.data.turns import conversation_of, dialogue_of, sharegpt_messages
from burnish.types import Message

CALL = '{"name": "add", "arguments": {"a": 3}}'


@pytest.mark.parametrize("name", ["function_call", " Function_Call\n"])
@pytest.mark.parametrize(("turn", "weight"), [({}, None), ({"weight": 0}, 0.0), ({"weight": 0.5}, 0.5)])
def test_a_function_call_of_sharegpt_is_a_call_and_keeps_its_weight(
    name: str, turn: dict[str, float], weight: float | None
):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
    expected = Message("assistant", "", weight, {"tool_calls": [call]})
    assert sharegpt_messages([{"from": name, "value": CALL, **turn}]) == (expected,)


def test_a_function_call_with_a_weight_below_zero_is_refused():
    with pytest.raises(ValueError, match="turn 0: `weight` should be a number of at least 0, not -1"):
        sharegpt_messages([{"from": "function_call", "value": CALL, "weight": -1}])


def test_a_dialogue_that_is_one_text():
    text = "\n\nHuman: Say Assistant: twice.\n\nPlease.\n\nAssistant: No.\n\nHuman:Why?\n\nAssistant:"
    assert dialogue_of(text) == (
        Message("user", "Say Assistant: twice.\n\nPlease."),
        Message("assistant", "No."),
        Message("user", "Why?"),
        Message("assistant", ""),
    )
    assert dialogue_of("Human: a") == (Message("user", "a"),)
    assert dialogue_of("A Human: a") is dialogue_of("Assistant: a") is None


def test_turns_in_any_spelling():
    expected = (Message("user", "a"),)
    for value in (
        [{"role": "user", "content": "a"}],
        {"role": "human", "content": "a"},
        [{"from": "user", "value": "a"}],
    ):
        assert conversation_of(value, "chosen") == expected
    assert conversation_of("plain", "chosen") is None
    assert conversation_of([], "chosen") == ()
    with pytest.raises(ValueError, match="`chosen` should be text or a list of messages, not a number"):
        conversation_of(3, "chosen")
    with pytest.raises(ValueError, match="`chosen` turn 0 has no `value`"):
        conversation_of([{"from": "user"}], "chosen")
