import pytest

from burnish.data.repair import DROPS, REPAIRS, plain_text, repair
from burnish.types import Example, Message, Role, Text

CALL = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
SHORT: dict[str, Role] = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def example(*turns: str) -> Example:
    """Turns as "u:hello"; a weight may follow the role, as in "a0.5:hello"."""
    messages: list[Message] = []
    for turn in turns:
        head, _, content = turn.partition(":")
        messages.append(Message(SHORT[head[0]], content, float(head[1:]) if head[1:] else None))
    return Example(tuple(messages))


@pytest.mark.parametrize(
    ("turns", "expected", "rules"),
    [
        (["u:q", "a:r"], ["u:q", "a:r"], []),
        (["s:be", "u:q", "a:r", "u:q2", "a:r2"], ["s:be", "u:q", "a:r", "u:q2", "a:r2"], []),
        (["a:hi", "u:q", "a:r"], ["u:q", "a:r"], ["leading_assistant"]),
        (["s:be", "a:hi", "t:x", "u:q", "a:r"], ["s:be", "u:q", "a:r"], ["leading_assistant"]),
        (["u:q", "u:more", "a:r"], ["u:q\n\nmore", "a:r"], ["repeated_role"]),
        (["u:q", "a:r", "a:s"], ["u:q", "a:r\n\ns"], ["repeated_role"]),
        (["u:q", "a:r", "u:bye"], ["u:q", "a:r"], ["trailing_user"]),
        (["u:q", "a:r", "u: ", "a:s"], ["u:q", "a:r\n\ns"], ["empty_turn", "repeated_role"]),
        (["s:", "u:q", "a:r"], ["u:q", "a:r"], ["empty_turn"]),
        (["a: ", "u:q", "a:r"], ["u:q", "a:r"], ["empty_turn"]),
        (["u:q\ud83d", "a:r"], ["u:q\ufffd", "a:r"], ["broken_unicode"]),
        (["u:q", "t:", "a:r"], ["u:q", "t:", "a:r"], []),
        (["u:q", "t:1", "t:2", "a:r"], ["u:q", "t:1", "t:2", "a:r"], []),
    ],
)
def test_repairs(turns: list[str], expected: list[str], rules: list[str]):
    result = repair(example(*turns))
    assert result.example == example(*expected)
    assert list(result.rules) == rules
    assert set(rules) <= REPAIRS.keys()
    again = repair(example(*expected))
    assert (again.example, again.rules) == (result.example, ())


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (["u:q", "a: \n"], "empty_response"),
        (["u:q", "a:r", "u:q", "a:"], "empty_response"),
        (["u:q"], "no_response"),
        ([], "no_response"),
        (["s:be", "a:r"], "no_prompt"),
        (["u: ", "a:r"], "no_prompt"),
        (["u:q", "a0:r", "a1:s"], "mixed_weights"),
    ],
)
def test_drops(turns: list[str], reason: str):
    result = repair(example(*turns))
    assert (result.example, result.dropped) == (None, reason)
    assert reason in DROPS


def test_a_tool_call_is_no_empty_turn_and_is_not_joined():
    turns = (Message("user", "q"), Message("assistant", "", extra=CALL), Message("assistant", "r"))
    assert repair(Example(turns)).example == Example(turns)


def test_halves_of_surrogate_pairs_go_from_tool_calls_reasoning_and_tools_too():
    def row(mark: str) -> Example:
        call = {"function": {"name": "f", "arguments": {f"k{mark}": [f"v{mark}", 1, None]}}}
        extra = {"tool_calls": [call], "reasoning_content": f"so{mark}"}
        schema = {"type": "function", "function": {"name": "f", "description": f"does{mark}"}}
        return Example((Message("user", "q"), Message("assistant", "", extra=extra)), (schema,))

    result = repair(row("\ud83d"))
    assert (result.example, result.rules) == (row("\ufffd"), ("broken_unicode",))
    tools_only = Example(example("u:q", "a:r").messages, row("\udc00").tools)
    assert repair(tools_only).rules == ("broken_unicode",)
    assert repair(row("é")).rules == ()


def test_texts():
    assert repair(Text((("a", True),))).example == Text((("a", True),))
    assert repair(Text((("a\udc00", True),))).rules == ("broken_unicode",)
    assert repair(Text(((" ", True),))).dropped == "empty_text"
    assert repair(Text((("question", False), ("", True)))).dropped == "empty_response"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("<p>One</p><p>two<br>three</p>", "One\n\ntwo\nthree"),
        ('<div class="markdown prose"><p>Say <b>yes</b> &amp; <em>no</em>.</p></div>', "Say **yes** & *no*."),
        ("<ol><li>one</li><li>two</li></ol>", "1. one\n2. two"),
        ("<ul><li>one<ul><li>in</li></ul></li><li>two</li></ul>", "- one\n\n  - in\n\n- two"),
        ("<h2>Title</h2>\n<p>Use <code>a &lt; b</code></p>", "## Title\n\nUse `a < b`"),
        (
            "<p>Code:</p><pre><div>python<button>Copy code</button></div>"
            "<code>if a &lt; b:\n\n\n    <span>go</span>() \n</code></pre><p>Done.</p>",
            "Code:\n\n```python\nif a < b:\n\n\n    go() \n```\n\nDone.",
        ),
        ("<pre>plain  block\n  &lt;b&gt;</pre>", "```\nplain  block\n  <b>\n```"),
        ("3 &lt; 4 &amp;&amp; 5 &gt; 4&nbsp;!", "3 < 4 && 5 > 4 !"),
        ("it&#39;s &quot;so&quot;", 'it\'s "so"'),
        ("write `a &lt; b` and\n```\nc &amp; d\n```\n&lt;", "write `a &lt; b` and\n```\nc &amp; d\n```\n<"),
        ("In HTML you write &lt; for <", "In HTML you write &lt; for <"),
        ("What does <div> do?", "What does <div> do?"),
        ("if a<b and c>d", "if a<b and c>d"),
        ("AT&T; &copy; stays", "AT&T; &copy; stays"),
    ],
)
def test_html_of_web_exports(before: str, after: str):
    assert plain_text(before) == after
    assert plain_text(after) == after


def test_html_is_touched_in_web_exports_alone():
    turns = example("u:a &lt; b?", "a:<p>yes</p>")
    assert repair(turns).rules == ()
    result = repair(turns, exported=True)
    assert (result.example, result.rules) == (example("u:a < b?", "a:yes"), ("html_residue",))
    assert repair(example("u:q", "a:<p> </p>"), exported=True).dropped == "empty_response"
