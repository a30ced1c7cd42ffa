"""Reward sources: what each gives, that an error is never a score, and what is said before torch is loaded."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from burnish.config import build
from burnish.sampling import reward_endpoint
from burnish.sampling.reward_endpoint import EndpointScorer
from burnish.sampling.reward_function import FunctionScorer, load_function
from burnish.sampling.scoring import RewardSource, check_reward, sample_of
from burnish.settings import RewardSettings
from burnish.types import Message, Prompt, Rollout


def rollout(answer: str, ended: bool = True, question: str = "Is it?") -> Rollout:
    prompt = Prompt((Message("system", "Be brief."), Message("user", question)), answer="yes", task="truth")
    return Rollout(prompt, (5, 6, 7), (8, 2), answer, ended, group=0)


def rollouts(count: int) -> list[Rollout]:
    return [rollout("a" * number) for number in range(1, count + 1)]


def settings(**given: Any) -> RewardSettings:
    return build(RewardSettings, given)


class Fixed:
    """A source that gives what it is told to."""

    name, problem = "reward.fixed", None

    def __init__(self, *scores: float | None) -> None:
        self.scores = scores

    def __call__(self, rollouts: Sequence[Rollout]) -> Sequence[float | None]:
        return self.scores


def source_file(folder: Path, text: str) -> str:
    (folder / "reward.py").write_text(text)
    return f"{folder / 'reward.py'}:score"


# What becomes of scores


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, [2.0, 3.0, None]),
        ({"missing_eos": "replace", "missing_eos_value": 1.5}, [2.0, -1.5, None]),
        ({"missing_eos": "subtract", "missing_eos_value": 0.5}, [2.0, 2.5, None]),
        ({"missing_eos": "mask"}, [2.0, None, None]),
        ({"clip": 1.0}, [1.0, 1.0, None]),
        (
            {"missing_eos": "subtract", "missing_eos_value": 9.0, "clip": 2.5},
            [2.0, -2.5, None],
        ),  # the rule, then the clip
        ({"missing_eos": "replace", "missing_eos_value": 4.0, "clip": 1.0}, [1.0, -1.0, None]),
    ],
)
def test_the_rule_for_missing_ends_comes_before_the_clip(rule: dict[str, Any], expected: list[float | None]) -> None:
    source = RewardSource(Fixed(2.0, 3.0, None), settings(**rule))
    assert source.score([rollout("a"), rollout("b", ended=False), rollout("c", ended=False)]) == expected
    assert (source.asked, source.failures) == (3, 1)  # an answer that a rule leaves out did not fail


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_score_that_is_not_finite_is_none_and_counted(bad: float, capsys: pytest.CaptureFixture[str]) -> None:
    source = RewardSource(Fixed(bad, 0.0), settings(clip=1.0))
    assert source.score(rollouts(2)) == [None, 0.0]
    assert source.failures == 1
    assert source.score(rollouts(2)) == [None, 0.0]
    told = capsys.readouterr().err
    assert told.count(f"reward.fixed gave the score {bad}; 1 of 2 answers are left out of this step") == 1


def test_a_step_without_a_single_score_stops() -> None:
    scorer = Fixed(None, NAN)
    with pytest.raises(
        ValueError, match=r"reward\.fixed scored none of the 2 answers of this step: reward\.fixed gave the"
    ):
        RewardSource(scorer, settings()).score(rollouts(2))
    assert RewardSource(Fixed(), settings()).score([]) == []


class TwoRanks:
    """A mesh whose other rank has scored two answers, or failed to."""

    is_main, world = True, 2

    def __init__(self, failed: int) -> None:
        self.failed = failed

    def collect(self, value: Any) -> list[Any]:
        return [value, (2, self.failed, "the other's problem" if self.failed else None)]


def test_ranks_stop_together_or_not_at_all() -> None:
    alive = RewardSource(Fixed(None), settings(), TwoRanks(1))  # type: ignore[arg-type]
    assert alive.score(rollouts(1)) == [None]
    assert (alive.asked, alive.failures) == (3, 2)
    with pytest.raises(ValueError, match="none of the 3 answers of this step: the other's problem"):
        RewardSource(Fixed(None), settings(), TwoRanks(2)).score(rollouts(1))  # type: ignore[arg-type]


def test_counts_go_on_where_they_were() -> None:
    source, again = RewardSource(Fixed(None, 1.0), settings()), RewardSource(Fixed(None, 1.0), settings())
    source.score(rollouts(2))
    again.restore(json.loads(json.dumps(source.state())))
    again.score(rollouts(2))
    assert again.state() == {"asked": 4, "failures": 2}


# A Python function


def test_a_function_sees_the_conversation_the_answer_and_what_to_compare_it_with(tmp_path: Path) -> None:
    text = "seen = []\ndef score(samples):\n    seen.extend(samples)\n    return [len(s['answer']) for s in samples]\n"
    scorer = FunctionScorer(source_file(tmp_path, text))
    assert scorer(rollouts(3)) == [1.0, 2.0, 3.0]
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it?"}]
    expected = {"messages": asked, "answer": "aaa", "reference": "yes", "task": "truth"}
    assert scorer.function.__globals__["seen"][-1] == expected == sample_of(rollouts(3)[-1])
    assert scorer([]) == []


@pytest.mark.parametrize(
    "given",
    [
        "[1, 2.5]",
        "(1, 2.5)",
        "(x for x in (1, 2.5))",
        "numpy.array([1, 2.5])",
        "[numpy.float32(1), 2.5]",
        "torch.tensor([1, 2.5])",
    ],
)
def test_a_function_may_give_any_list_of_numbers(tmp_path: Path, given: str) -> None:
    text = f"import numpy, torch\ndef score(samples):\n    return {given}\n"
    assert FunctionScorer(source_file(tmp_path, text))(rollouts(2)) == [1.0, 2.5]


def test_none_is_no_score_and_truth_is_one(tmp_path: Path) -> None:
    text = "def score(samples):\n    return [None, True, False]\n"
    assert FunctionScorer(source_file(tmp_path, text))(rollouts(3)) == [None, 1.0, 0.0]


def test_a_coroutine_function_is_awaited(tmp_path: Path) -> None:
    text = "import asyncio\nasync def score(samples):\n    await asyncio.sleep(0)\n    return [4 for _ in samples]\n"
    assert FunctionScorer(source_file(tmp_path, text))(rollouts(2)) == [4.0, 4.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[1.0]", "gave 1 scores for 2 samples: it must give one for each"),
        ("[1.0, '2']", "gave a score that is no number: '2' is no number"),
        ("[1.0, [2]]", r"gave a score that is no number: \[2\] is no number"),
        ("None", "gave a NoneType: it must give a list of 2 numbers"),
        ("{'a': 1, 'b': 2}", "gave a dict: it must give a list of 2 numbers"),
    ],
)
def test_a_function_that_gives_something_else_is_wrong(tmp_path: Path, given: str, message: str) -> None:
    setting = source_file(tmp_path, f"def score(samples):\n    return {given}\n")
    with pytest.raises(ValueError, match=rf"^reward\.function=.*reward\.py:score {message}"):
        FunctionScorer(setting)(rollouts(2))


def test_an_answer_on_which_a_function_raises_is_left_out_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "def score(samples):\n    return [inverse(len(s['answer']) - 2) for s in samples]\n\n"
    text += "def inverse(n):\n    return 1 / n\n"
    setting = source_file(tmp_path, text)
    source = RewardSource(FunctionScorer(setting), settings())
    assert source.score(rollouts(4)) == [-1.0, None, 1.0, 0.5]
    place = f"{tmp_path / 'reward.py'}:5"
    told = (
        f"reward.function={setting} raised ZeroDivisionError at {place}: division by zero; 1 of 4 answers are left out"
    )
    assert told in capsys.readouterr().err


def test_a_function_that_always_raises_stops_the_run(tmp_path: Path) -> None:
    setting = source_file(tmp_path, "def score(samples):\n    raise KeyError('gold')\n")
    with pytest.raises(ValueError, match=r"scored none of the 3 answers.*raised KeyError at .*reward\.py:2: 'gold'$"):
        RewardSource(FunctionScorer(setting), settings()).score(rollouts(3))


def test_loading_a_function_leaves_no_module_behind(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_reward.py").write_text("FACTOR = 3\n")
    (tmp_path / "late_neighbour.py").write_text("ONE = 1\n")
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport neighbour_of_reward\n"
        "@dataclass\nclass Weight:\n    value: float = 2.0\n"
        "def score(samples):\n    import late_neighbour\n"
        "    return [Weight().value * neighbour_of_reward.FACTOR * late_neighbour.ONE for _ in samples]\n"
    )
    paths = list(sys.path)
    before = set(sys.modules)
    scorer = FunctionScorer(source_file(tmp_path, text))
    assert set(sys.modules) - before == {"neighbour_of_reward"}
    assert scorer(rollouts(2)) == [6.0, 6.0]  # it may import a neighbour as late as that
    del sys.modules["neighbour_of_reward"], sys.modules["late_neighbour"]
    assert sys.path == paths


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_package\ndef score(samples): ...\n", r"reward\.py:1 raised ModuleNotFoundError: No module"),
        ("score = 3\n", r"score is no function of .*reward\.py"),
    ],
)
def test_a_file_that_cannot_run_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_function(source_file(tmp_path, text))


# An HTTP endpoint


@contextmanager
def endpoint(answer: Callable[[BaseHTTPRequestHandler, list[Any], int], Any]) -> Iterator[str]:
    """A server whose answers are `answer`(request, its samples, its number from 0): a status and a body, or None."""
    asked: list[int] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            samples = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["samples"]
            with lock:
                number = len(asked)
                asked.append(number)
            given = answer(self, samples, number)
            if given is not None:
                status, body = given
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score?model=a"
    finally:
        server.shutdown()
        server.server_close()


def lengths(samples: list[Any]) -> bytes:
    return json.dumps({"scores": [len(sample["answer"]) for sample in samples]}).encode()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(reward_endpoint.time, "sleep", waited.append)
    return waited


def test_an_endpoint_scores_in_order_whatever_order_it_answers_in() -> None:
    paths: list[str] = []

    def answer(request: BaseHTTPRequestHandler, samples: list[Any], number: int) -> Any:
        paths.append(request.path)
        if number == 0:
            threading.Event().wait(0.2)
        return 200, lengths(samples)

    with endpoint(answer) as url:
        given = rollouts(50)
        assert EndpointScorer(url, 5.0, 0)(given) == [float(number) for number in range(1, 51)]
    assert paths == ["/score?model=a"] * 4  # of at most 16 samples each


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_failure_that_may_pass_is_tried_again_after_doubling_waits(status: int, no_waiting: list[float]) -> None:
    with endpoint(lambda _, samples, number: (status, b"") if number < 3 else (200, lengths(samples))) as url:
        assert EndpointScorer(url, 5.0, 3)(rollouts(2)) == [1.0, 2.0]
    assert no_waiting == [0.5, 1.0, 2.0]


def test_a_request_that_is_refused_is_not_sent_again(no_waiting: list[float]) -> None:
    counts: list[int] = []

    def answer(_: Any, samples: list[Any], number: int) -> Any:
        counts.append(number)
        return 404, b"nothing here"

    with endpoint(answer) as url:
        scorer = EndpointScorer(url, 5.0, 3)
        assert scorer(rollouts(2)) == [None, None]
        assert scorer.problem == f"reward.url={url} answered HTTP 404 Not Found"
    assert (counts, no_waiting) == ([0], [])


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b'{"scores": [1.0]}', "gave 1 scores for 2 samples"),
        (b'{"scores": [1.0, "2"]}', "gave a score that is no number: '2' is no number"),
        (b'{"points": [1.0, 2.0]}', 'answered JSON without the list "scores"'),
        (b"[1.0, 2.0]", 'answered JSON without the list "scores"'),
        (b"<html>", "answered something else than JSON"),
    ],
)
def test_an_answer_that_makes_no_sense_is_no_score(body: bytes, problem: str) -> None:
    with endpoint(lambda *_: (200, body)) as url:
        scorer = EndpointScorer(url, 5.0, 2)
        assert scorer(rollouts(2)) == [None, None]
        assert scorer.problem is not None
        assert scorer.problem.startswith(f"reward.url={url} {problem}")


def test_null_and_nan_cost_one_score_each() -> None:
    with endpoint(lambda *_: (200, b'{"scores": [1.5, null, NaN, -Infinity]}')) as url:
        source = RewardSource(EndpointScorer(url, 5.0, 0), settings())
        assert source.score(rollouts(4)) == [1.5, None, None, None]
        assert source.failures == 3


def drop(request: BaseHTTPRequestHandler) -> None:
    request.close_connection = True
    request.connection.close()


def cut(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    request.wfile.write(b'{"scores": [1.0, 2.0]}')
    request.close_connection = True


@pytest.mark.parametrize("fault", [drop, cut])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_connection_that_breaks_is_made_again(fault: Callable[[BaseHTTPRequestHandler], None]) -> None:
    def answer(request: BaseHTTPRequestHandler, samples: list[Any], number: int) -> Any:
        return fault(request) if number < 2 else (200, lengths(samples))

    with endpoint(answer) as url:
        assert EndpointScorer(url, 5.0, 2)(rollouts(2)) == [1.0, 2.0]


def trickle(request: BaseHTTPRequestHandler) -> None:
    """A byte now and then, each well within the time-out."""
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    for _ in range(40):
        threading.Event().wait(0.05)
        request.wfile.write(b" ")


def silence(request: BaseHTTPRequestHandler) -> None:
    threading.Event().wait(2.0)


@pytest.mark.parametrize("slow", [silence, trickle])
def test_the_time_out_is_that_of_the_whole_request(slow: Callable[[BaseHTTPRequestHandler], None]) -> None:
    with endpoint(lambda request, *_: slow(request)) as url:
        scorer = EndpointScorer(url, 0.25, 1)
        began = time.perf_counter()
        assert scorer(rollouts(2)) == [None, None]
        assert 0.4 < time.perf_counter() - began < 1.5
        assert scorer.problem == f"reward.url={url} failed 2 times, the last with: timed out"


def test_one_request_that_fails_costs_its_own_answers_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(_: Any, samples: list[Any], number: int) -> Any:
        return (500, b"") if len(samples[0]["answer"]) == 1 else (200, lengths(samples))

    with endpoint(answer) as url:
        source = RewardSource(EndpointScorer(url, 5.0, 1), settings())
        assert source.score(rollouts(20)) == [None] * 16 + [17.0, 18.0, 19.0, 20.0]
        told = f"reward.url={url} failed 2 times, the last with: HTTP 500 Internal Server Error; 16 of 20 answers"
        assert told in capsys.readouterr().err


def test_an_endpoint_that_is_not_there_stops_the_run() -> None:
    with endpoint(lambda *_: None) as url:
        pass
    with pytest.raises(ValueError, match=r"reward\.url=http.*scored none of the 2 answers .*failed 2 times.*refused"):
        RewardSource(EndpointScorer(url, 5.0, 1), settings()).score(rollouts(2))


# Before torch is loaded


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"write reward\.path=RUN, reward\.function=FILE\.py:NAME or reward\.url="),
        ({"url": "localhost:8000"}, r"reward\.url=localhost:8000 is no address"),
        ({"url": "ftp://host/score"}, r"reward\.url=ftp://host/score is no address"),
        ({"url": "http:///score"}, "is no address"),
        ({"function": "reward.py"}, r"reward\.function=reward\.py: write FILE\.py:NAME"),
        ({"function": "reward.py:"}, r"write FILE\.py:NAME"),
        ({"function": "nowhere.py:score"}, r"nowhere\.py cannot be read: No such file"),
        ({"path": "nowhere"}, r"reward\.path: there is no folder nowhere"),
    ],
)
def test_a_source_that_cannot_work_is_said(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_reward(settings(**given))


def test_two_sources_are_one_too_many() -> None:
    with pytest.raises(ValueError, match=r"reward\.path and reward\.url are both given"):
        settings(path="a", url="http://b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(samples): ...\nclass Score: ...\n", r"does not define score; it has other$"),
        ("x = 1\n", "does not define score; it has no function at all"),
        ("def outer():\n    def score(samples): ...\n", "does not define score; it has outer"),
        ("def score(samples:\n", r"is not Python: line 1:"),
        ("from somewhere import *\n", None),
        ("from somewhere import judge as score\n", None),
        ("try:\n    from fast import score\nexcept ImportError:\n    def score(samples): ...\n", None),
        ("score = lambda samples: [0] * len(samples)\n", None),
        ("async def score(samples): ...\n", None),
    ],
)
def test_a_function_is_looked_for_without_running_its_file(tmp_path: Path, text: str, message: str | None) -> None:
    setting = source_file(tmp_path, text)
    if message is None:
        check_reward(settings(function=setting))
    else:
        with pytest.raises(ValueError, match=message):
            check_reward(settings(function=setting))


def test_checking_and_asking_functions_and_endpoints_takes_no_torch() -> None:
    modules = "burnish.sampling.scoring, burnish.sampling.reward_function, burnish.sampling.reward_endpoint"
    script = f"import sys, {modules}; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
