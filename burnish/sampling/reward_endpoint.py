"""An HTTP endpoint as a reward: POST {"samples": [...]} gives {"scores": [...]}.

By the standard library's `http.client`: it is all that one POST takes, and its sockets are at hand, so that a request
has one deadline. Clients that take a time-out begin it anew with every byte that trickles in.
"""

import http.client
import json
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, cast
from urllib.parse import urlsplit

from burnish.sampling.scoring import as_score, sample_of
from burnish.types import Rollout

SAMPLES_PER_REQUEST, REQUESTS_AT_ONCE = 16, 8
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before a failed request is sent again; they double each time, without chance in them."""
PASSING = (408, 425, 429)
"""Of the statuses that blame the request, those that say to try again."""


class EndpointScorer:
    """Sends the answers in small requests, some at a time. A request that fails for good costs its answers' scores."""

    def __init__(self, url: str, timeout: float, retries: int) -> None:
        self.name, self.url, self.timeout, self.retries = f"reward.url={url}", urlsplit(url), timeout, retries
        self.problem: str | None = None

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """The endpoint's scores; None for the answers of a request that failed, and where it gave null."""
        samples = [sample_of(rollout) for rollout in rollouts]
        requests = [samples[i : i + SAMPLES_PER_REQUEST] for i in range(0, len(samples), SAMPLES_PER_REQUEST)]
        pool = ThreadPoolExecutor(REQUESTS_AT_ONCE)
        try:
            return list(chain.from_iterable(pool.map(self._ask, requests)))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, samples: list[dict[str, Any]]) -> list[float | None]:
        body = json.dumps({"samples": samples}).encode()
        for attempt in range(self.retries + 1):
            try:
                return _scores(self._post(body), len(samples))
            except _Final as error:
                self.problem = f"{self.name} {error}"
                break
            except (OSError, http.client.HTTPException) as error:
                told = str(error) or type(error).__name__
                self.problem = f"{self.name} failed {attempt + 1} times, the last with: {told}"
                if attempt < self.retries:
                    time.sleep(min(FIRST_WAIT * 2**attempt, LONGEST_WAIT))
        return [None] * len(samples)

    def _post(self, body: bytes) -> bytes:
        """What the endpoint answers within the time-out, connecting included. Raises OSError where to try again."""
        deadline = time.monotonic() + self.timeout
        assert self.url.hostname is not None
        if self.url.scheme == "https":
            secure = ssl.create_default_context()
            connection = http.client.HTTPSConnection(
                self.url.hostname, self.url.port, timeout=self.timeout, context=secure
            )
        else:
            connection = http.client.HTTPConnection(self.url.hostname, self.url.port, timeout=self.timeout)
        try:
            connection.connect()
            socket = connection.sock  # the connection forgets it once the answer begins
            path = (self.url.path or "/") + (f"?{self.url.query}" if self.url.query else "")
            socket.settimeout(_left(deadline))
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request("POST", path, body, headers)
            socket.settimeout(_left(deadline))
            response = connection.getresponse()
            parts: list[bytes] = []
            while True:
                socket.settimeout(_left(deadline))
                parts.append(response.read1(1 << 16))
                if not parts[-1]:
                    break
        finally:
            connection.close()
        if response.length:
            raise http.client.IncompleteRead(b"".join(parts), response.length)
        if response.status != 200:
            told = f"HTTP {response.status} {response.reason}"
            raise _Final(f"answered {told}") if _is_final(response.status) else OSError(told)
        return b"".join(parts)


class _Final(Exception):
    """The endpoint answered, and would answer the same again."""


def _is_final(status: int) -> bool:
    return status < 500 and status not in PASSING


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _scores(answer: bytes, count: int) -> list[float | None]:
    try:
        found = json.loads(answer)
    except ValueError as error:
        raise _Final(f"answered something else than JSON: {error}") from None
    scores = cast(dict[str, Any], found).get("scores") if isinstance(found, dict) else None
    if not isinstance(scores, list):
        raise _Final('answered JSON without the list "scores"')
    listed = cast(list[Any], scores)
    if len(listed) != count:
        raise _Final(f"gave {len(listed)} scores for {count} samples")
    try:
        return [as_score(score) for score in listed]
    except TypeError as error:
        raise _Final(f"gave a score that is no number: {error}") from None
