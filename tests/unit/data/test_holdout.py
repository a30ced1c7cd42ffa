from itertools import pairwise

from burnish.data.holdout import choose_held_out, choose_prompts, prompt_key, to_prompt
from burnish.types import Example, Message, Prompt, Role

ROLES: tuple[Role, Role] = ("user", "assistant")


def conversation(number: int, rounds: int) -> Example:
    texts = [f"{role} {number}, {turn}" for turn in range(rounds) for role in ROLES]
    return Example(tuple(Message(ROLES[k % 2], text) for k, text in enumerate(texts)))


def test_no_piece_of_a_held_out_conversation_is_trained_on():
    examples = [conversation(number, rounds) for number in range(20) for rounds in (1, 2, 3)]
    chosen = choose_held_out(examples, 0.3, seed=0)
    assert len(chosen) == 18
    assert chosen == {3 * (place // 3) + k for place in chosen for k in range(3)}


def test_rows_ask_the_same_when_they_do_before_the_first_response():
    system, greeting = Message("system", "be"), Message("assistant", "hi")
    whole = conversation(1, 3)
    assert prompt_key(whole) == prompt_key(to_prompt(whole, None)) == prompt_key(Prompt(whole.messages[:1]))
    assert prompt_key(whole) == prompt_key(Prompt((greeting, *whole.messages[:1])))
    others = [conversation(2, 3), Example((system, *whole.messages)), Example((whole.messages[0], *whole.messages))]
    assert len({prompt_key(example) for example in (whole, *others)}) == 4


def test_the_order_of_prompts_is_not_that_of_rows_even_where_they_begin_alike():
    prompts = [to_prompt(conversation(1, rounds), None) for rounds in range(1, 9)]
    first = choose_prompts(prompts, 8, seed=0)
    assert choose_prompts(prompts[::-1], 8, seed=0) == first
    assert any(len(a.messages) > len(b.messages) for a, b in pairwise(first))
