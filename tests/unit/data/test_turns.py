import pytest

from burnish.data.turns import sharegpt_messages
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
