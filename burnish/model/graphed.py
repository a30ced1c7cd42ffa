"""CUDA graphs of the fused pass: where the host is slower than the device, a pass is recorded once, then replayed.

A recording is for one key: what a pass takes from the host. So that batches share keys, a ragged one is padded: with
one more sequence, of zeros, whose gradient is 0, so that it adds 0 to every sum; and with sequences of no tokens, whose
programs FlashAttention 2 ends before they read anything: `if (m_block * kBlockM >= binfo.actual_seqlen_q) return`, and
the same for keys in its backward pass. Where prompts are shared, that sequence reads all keys that are added, the last
token's each, and at least one for each of its tokens; where it has keys alone, the kernel that goes by keys ends too:
`if (m_block < m_block_min)`. The gradients of these keys are 0 and go to no token. Our own kernels on Hopper go by
tables whose sizes depend on the numbers of tokens and sequences alone (`ops/blocks.py`): blocks that do not exist end
at once, the added sequence reads only itself, and no key is copied or counted.

What waits between a recording's halves is in memory that all recordings of a lane share: one after the other they need
as much as the largest. A lane is taken from the forward half to the end of the backward half. Who comes in between
takes the next lane, memory that two passes at once would need in any case, or runs without a recording.
"""

import itertools
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from burnish.model.blocks import Pass
from burnish.model.factors import Factors
from burnish.model.families import DecoderConfig
from burnish.model.fused_pass import FusedPass, Trunk
from burnish.model.recorder import Flight, Gradients, Lane, Recorder
from burnish.model.shelf import HostMemory, Plan, Shelf
from burnish.ops.blocks import padded as padded_blocks
from burnish.ops.keys import padded

ROWS = 256
"""Tokens, and keys, are padded to a multiple of so many, or of an eighth of the next power of two."""
FINER = 4
"""Where the device would then take longer than the host, tokens are padded to a multiple of so much less."""
SEQUENCES = 8
"""Sequences are padded to a power of two, at least so many."""
MAX_RECORDINGS = 8
"""Kept at a time; the one not used for longest makes room."""
MAX_ATTEMPTS = 32
"""Recordings made before no more are: each takes the time of three or four passes, and batches may go on to differ."""
WORTH = 8
"""Replays that a recording must have served, on average, for more to be made after a release."""
LANES = 2
"""Passes between their halves at the same time, as the policy and the value model of PPO are."""
HOST_SECONDS = 3.4e-3
"""What the host takes to launch a block: 1.0 ms of it forward, 2.4 backward."""
RATE, FP8_RATE = 600e12, 1200e12
"""Operations a second on Hopper. A slower device gets recordings where it would not need them: no harm."""
MARGIN = 2**30
"""Bytes that stay free on the device when a recording has been made."""

_copy_all = torch._foreach_copy_  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


class Key(NamedTuple):
    """What a recorded pass is made for. Batches are padded to it."""

    tokens: int
    sequences: int
    longest: int
    """A bound on the longest sequence."""
    shared: bool
    """Whether sequences read prompts of others."""
    keys: int
    """How many are read and so copied then, all sequences together; 0 where prompts are read where they stand."""
    even: bool
    dtype: torch.dtype
    factors: Factors | None
    """By identity: the recording multiplies with these very copies."""
    wants_x: bool
    plan: Plan | None
    """None: there is no backward half."""


def host_bound(config: DecoderConfig, tokens: int, longest: int, fp8: bool) -> bool:
    """Whether the device is done with a block, forward and backward, before the host has launched it: a closed form.

    Device: 2 operations for each token and weight, and 4 for each query's channel and key, of which it sees half; the
    same again twice for the way back; all at 600e12 operations a second, twice that in 8 bits. A pass that goes forward
    alone is one among others of a step, which the host launches as well: so it goes by the same rule, and a batch has
    the same numbers with and without gradients.
    """
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    operations = tokens * (2 * weights + 2 * min(longest, tokens) * queries)
    return 3 * operations < HOST_SECONDS * (FP8_RATE if fp8 else RATE)


class Graphs:
    """The recordings of one model's passes."""

    def __init__(self, trunk: Trunk, host: HostMemory, recorder: Recorder) -> None:
        self._trunk, self._host, self._recorder = trunk, host, recorder
        self._attempts, self._replays = MAX_ATTEMPTS, 0
        self.release()

    def release(self) -> None:
        """Give back all memory, and begin anew: with all attempts again, if those so far were worth their time."""
        if self._replays >= WORTH * (MAX_ATTEMPTS - self._attempts):
            self._attempts, self._replays = MAX_ATTEMPTS, 0
        self._recordings: dict[Key, Recording] = {}
        self._gradients: dict[Factors, Gradients] = {}
        self._lanes = [Lane(self._recorder.new_pool()) for _ in range(LANES)]
        self._seen: set[int] = set()
        self._full = False
        """Whether memory did not suffice for a recording."""

    @property
    def count(self) -> int:
        """Passes that are recorded by now."""
        return len(self._recordings)

    def key(
        self,
        x: Float[Tensor, "T D"],
        given: Pass,
        factors: Factors | None,
        parameters: Sequence[nn.Parameter],
        plan: Plan,
        goes_back: bool,
    ) -> Key | None:
        """What the pass is padded to, recorded yet or not; None where it must run as it is.

        `parameters` are those that train; `goes_back`: the pass has a backward half.
        """
        if not self._takes(x, given, factors, parameters, plan):
            return None
        return self._key(x, given, factors, plan if goes_back else None)

    def __call__(
        self, key: Key, x_TD: Float[Tensor, "T D"], given: Pass, parameters: Sequence[nn.Parameter]
    ) -> Float[Tensor, "T D"] | None:
        """The hidden states, differentiable where there is a plan; None where no recording is free."""
        recording = self._recording(key, x_TD, given)
        if recording is None or recording.lane.busy:
            return None
        self._replays += 1
        if key.plan is None:
            with torch.no_grad():
                return recording.forward(x_TD, given)
        return cast(Tensor, _Replayed.apply(recording, given, x_TD, *parameters))

    def padded(self, key: Key, x_TD: Float[Tensor, "T D"], given: Pass) -> tuple[Float[Tensor, "P D"], Pass]:
        """A pass that is not recorded, with the rows that its recording has or would have.

        Matmuls of other sizes may add up in another order: the numbers of a batch must not depend on whether it has
        been recorded yet.
        """
        return F.pad(x_TD, (0, 0, 0, key.tokens - len(x_TD))), _padded(given, key)

    def _takes(
        self, x: Tensor, given: Pass, factors: Factors | None, parameters: Sequence[nn.Parameter], plan: Plan
    ) -> bool:
        """The same with gradients and without: a reference is padded as the policy is."""
        layout = given.layout
        assert layout is not None
        if layout.rows is not None or any(plan.host):  # copies to the host wait for events, which are made anew
            return False
        if not _are(parameters, factors) and (len(parameters) > 0 or x.requires_grad):
            return False  # gradients of base weights would be there twice
        return len(x) > 0 and host_bound(self._trunk.config, len(x), layout.longest, self._trunk.fp8)

    def _key(self, x: Tensor, given: Pass, factors: Factors | None, plan: Plan | None) -> Key:
        layout = given.layout
        assert layout is not None
        tokens, sequences, longest = len(x), len(layout.starts) - 1, layout.longest
        shared = layout.keys is not None
        by_blocks = layout.blocks_for(self._trunk.config.head_dim) is not None
        keys = 0 if layout.keys is None or by_blocks else len(layout.keys.position)
        if not layout.even:  # kernels for even batches take no padding
            step = _step(tokens)
            if not host_bound(self._trunk.config, _up(tokens, step), longest, self._trunk.fp8):
                step //= FINER
            more = _up(tokens, step) - tokens
            # By powers of four from that of the padding on: the kernels' programs beyond a sequence's end do nothing.
            # Blocks are as many for any lengths: of the longest only `host_bound` knows there.
            bound, more_keys = _power_of_two(tokens + more) if by_blocks else step, 0
            if keys > 0:
                step = _step(keys + more)
                bound, more_keys = 2 * step, _up(keys + more, step) - keys
                keys += more_keys
            while bound < longest:
                bound *= 4
            sequences = max(SEQUENCES, _power_of_two(sequences + (max(more, more_keys) > 0)))
            tokens, longest = tokens + more, bound
        wants_x = plan is not None and x.requires_grad
        return Key(tokens, sequences, longest, shared, keys, layout.even, x.dtype, factors, wants_x, plan)

    def _recording(self, key: Key, x: Tensor, given: Pass) -> "Recording | None":
        """That of the key, made when the key comes for the second time, if it can be."""
        recording = self._recordings.pop(key, None)
        if recording is None:
            known = hash(key) in self._seen
            self._seen.add(hash(key))
            lane = next((lane for lane in self._lanes if not lane.busy), None)
            if not known or lane is None or self._full or self._attempts == 0:
                return None
            self._attempts -= 1
            self._make_room(key)
            with torch.inference_mode(False), torch.no_grad():
                recording = self._record(key, lane, x, given)
            if recording is None:
                self._full = True
                return None
        self._recordings[key] = recording  # the last one used is the last one here
        return recording

    def _record(self, key: Key, lane: "Lane", x: Tensor, given: Pass) -> "Recording | None":
        """None where memory does not suffice: twice what waits between the halves, less what the lane has already."""
        recorder, gradients = self._recorder, None
        if key.plan is not None:
            assert key.factors is not None
            if key.factors not in self._gradients:
                self._gradients[key.factors] = Gradients(key.factors.parameters)
            gradients = self._gradients[key.factors]
        recording = Recording(key, (self._trunk, self._host, gradients), lane, x, given)
        with recorder.aside():
            before = recorder.allocated()
            recording.run_forward()
            waiting = recorder.allocated() - before
            recording.run_backward()
        if 2 * waiting + MARGIN - lane.size > recorder.free():
            return None
        before = recorder.reserved()
        recording.record(recorder)
        lane.size += recorder.reserved() - before
        return recording

    def _make_room(self, key: Key) -> None:
        """Drop recordings of factors that have been replaced, and the one not used for longest if there are many."""
        for other in list(self._recordings):
            theirs, ours = other.factors, key.factors
            if theirs is not None and ours is not None and theirs is not ours and theirs.name == ours.name:
                del self._recordings[other]
                self._gradients.pop(theirs, None)
        while len(self._recordings) >= MAX_RECORDINGS:
            del self._recordings[next(iter(self._recordings))]
        for lane in self._lanes:
            # A pool without a recording is given back: PyTorch takes its handle no more.
            if all(recording.lane is not lane for recording in self._recordings.values()):
                lane.pool, lane.size = self._recorder.new_pool(), 0


class Recording:
    """The buffers of a pass for one key, and its two halves over them."""

    def __init__(
        self, key: Key, parts: tuple[Trunk, HostMemory, Gradients | None], lane: Lane, x: Tensor, given: Pass
    ) -> None:
        self.key, self.lane = key, lane
        self._trunk, self._host, self._gradients = parts
        self._stream = x.new_zeros(key.tokens, x.shape[1])
        """x on the way in; on the way back its gradient."""
        self._hidden = torch.zeros_like(self._stream)
        """The hidden states on the way out; on the way back their gradient."""
        self._given = _padded(given, key)
        self._run: FusedPass | None = None
        self._replays: list[Callable[[], None]] = []
        self._fill(x, given)

    @property
    def generation(self) -> int:
        """That of the factors: how often they have changed."""
        return 0 if self.key.factors is None else self.key.factors.generation

    def record(self, recorder: Recorder) -> None:
        """Have both halves recorded; they have run before."""
        halves = (self.run_forward, self.run_backward)[: 1 if self.key.plan is None else 2]
        self._replays = [recorder.record(half, self.lane.pool) for half in halves]

    def run_forward(self) -> None:
        """The first half, launch by launch."""
        run = FusedPass(self._trunk, self._given, self.key.factors, self.key.dtype)
        if self.key.plan is not None:
            run.shelf, run.wants_x = Shelf(self.key.plan, self._host), self.key.wants_x
            self._run = run
        self._hidden.copy_(run.forward(self._stream))

    def run_backward(self) -> None:
        """The second half, launch by launch; nothing where there is none."""
        run, self._run = self._run, None
        if run is None:
            return
        assert self._gradients is not None
        dx = run.backward(self._hidden)
        if dx is not None:
            self._stream.copy_(dx)
        _copy_all(self._gradients.parts, [run.gradients.found[number] for number in self._gradients.ids])

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        """The hidden states, the caller's own."""
        self._fill(x, given)
        self._replays[0]()
        return self._hidden[: len(x)].clone()

    def backward(self, dh: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """The gradients of x and of the factors, the caller's own."""
        assert self._gradients is not None
        _lay(self._hidden, dh)
        self._replays[1]()
        return self._stream[: len(dh)].clone() if self.key.wants_x else None, self._gradients.copy()

    def _fill(self, x: Tensor, given: Pass) -> None:
        _lay(self._stream, x)
        new = _padded(given, self.key)
        for ours, theirs in zip(_tensors(self._given), _tensors(new), strict=True):
            ours.copy_(theirs)
        assert self._given.layout is not None
        assert new.layout is not None
        if self._given.layout.blocks is not None and new.layout.blocks is not None:
            self._given.layout.blocks.refill(new.layout.blocks)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: Recording, given: Pass, x: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.recording, ctx.flight, ctx.generation = recording, recording.lane.take(), recording.generation
        return recording.forward(x, given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        flight: Flight = ctx.flight
        if flight.landed:
            raise RuntimeError("a second backward pass: what the first one needed is not kept")
        recording: Recording = ctx.recording
        if recording.generation != ctx.generation:
            raise RuntimeError("the adapter has changed between a forward pass and its backward pass")
        dx, gradients = recording.backward(grads[0])
        flight.landed = True
        return None, None, dx, *gradients


def _padded(given: Pass, key: Key) -> Pass:
    """The same for a batch padded to the key, in memory of its own; beyond the batch any rotation will do."""
    layout = given.layout
    assert layout is not None
    tables = tuple(
        (F.pad(cos, (0, 0, 0, key.tokens - len(cos))), F.pad(sin, (0, 0, 0, key.tokens - len(sin))))
        for cos, sin in given.tables
    )
    starts = F.pad(layout.starts, (0, key.sequences + 1 - len(layout.starts)), value=key.tokens)
    keys = layout.keys and padded(layout.keys, key.sequences, key.keys, key.tokens) if key.keys > 0 else None
    blocks = layout.blocks and padded_blocks(layout.blocks, starts, key.tokens)
    return Pass(tables, layout._replace(starts=starts, longest=key.longest, keys=keys, blocks=blocks))


def _tensors(given: Pass) -> list[Tensor]:
    """All that a pass is given besides x and the blocks of attention."""
    assert given.layout is not None
    return [*itertools.chain(*given.tables), given.layout.starts, *(given.layout.keys or ())]


def _are(parameters: Sequence[nn.Parameter], factors: Factors | None) -> bool:
    """Whether these are the factors, all of one dtype."""
    if factors is None or len(parameters) != len(factors.parameters):
        return False
    return all(map(is_, parameters, factors.parameters)) and len({part.dtype for part in parameters}) == 1


def _lay(buffer: Tensor, rows: Tensor) -> None:
    """The rows, and zeros where there are none."""
    buffer[: len(rows)].copy_(rows)
    buffer[len(rows) :].zero_()


def _power_of_two(count: int) -> int:
    """The first that is not smaller."""
    return 1 << (count - 1).bit_length()


def _step(count: int) -> int:
    """What tokens or keys are padded to a multiple of."""
    return max(ROWS, _power_of_two(count) // 8)


def _up(count: int, step: int) -> int:
    """The first multiple that is not smaller."""
    return -(-count // step) * step
