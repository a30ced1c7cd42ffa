# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportUnboundVariable=false, reportAttributeAccessIssue=false, reportArgumentType=false
"""Causal attention over ragged sequences on Hopper, forward and backward, which may read the prompt of another one.

Dao et al.'s FlashAttention: scores never leave the chip. A program has a block of queries and walks over keys, or has a
block of keys and walks over queries; `ops.blocks` lists the blocks, those with most work first. Scores are in base 2,
and so is what is kept of each row: the logarithm of its sum. There are no atomic additions: each row of a gradient is
summed by one program, in one order, so that the same batch always gives the same bits. Tiles reach into the next
sequence, times 0: what is not finite there spreads.

What a Hopper GPU wants (seen in what Triton 3.6 compiles; change the loops only with `ptxas -v` at hand, which says
when products are `serialized`): tiles come through tensor maps, so that loops hold no addresses; the left side of a
product whose other side waits in shared memory comes from registers; the last product of a turn of a loop is still
under way while the next turn begins, which ends where that turn first needs a product's result.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Launch(NamedTuple):
    """How a kernel is launched."""

    own: int
    """Rows that a program has."""
    walked: int
    """Rows that it meets at a time."""
    stages: int
    warps: int
    ahead: bool = False
    """Whether scores are made one block ahead: exponentials are then taken while a product is under way.

    There is no such kernel for the gradients of keys.
    """


# By channels, filled up to a power of two. At 128, of 21 launches on an H100 these were the fastest at every shape that
# was tried (LOG.md): a program of 4 warps with 64 rows leaves room for others, which fill each other's pauses.
FORWARD = {64: Launch(128, 64, 3, 4), 128: Launch(64, 64, 3, 4), 256: Launch(128, 64, 2, 8, True)}
QUERIES = {64: Launch(128, 64, 3, 8), 128: Launch(64, 64, 2, 4), 256: Launch(128, 32, 2, 8)}
KEYS = {64: Launch(128, 64, 3, 8), 128: Launch(64, 64, 2, 4), 256: Launch(64, 64, 2, 8)}
SECTION = 16 * 2**20
"""Programs go over heads in sections whose walked tensors take at most so many bytes: they are read from the cache."""

Tables = tuple[Tensor, Tensor, Tensor, int, int, int]
"""`ops.blocks.Tables`: blocks of queries, of keys, visits, how many sums a head has, rows of a block and of a visit."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, tables: Tables, scale: float, window: int, shared: bool
) -> tuple[Tensor, Tensor]:
    """(out [T, H, C], logarithms of sums in base 2 by head). window 0: none; shared: some sequences have a prefix."""
    (num_rows, heads, width), groups = q.shape, k.shape[1]
    queries, _, _, num_sums, block, _ = tables
    out = torch.empty((num_rows, heads, width), dtype=q.dtype, device=q.device)
    sums = torch.empty((heads, num_sums), dtype=torch.float32, device=q.device)
    if num_rows:
        pad, launch = _chosen(FORWARD, width)
        own, walked = min(launch.own, block), launch.walked
        tiles = len(queries) * (block // own)
        with _on(q):
            _forward[(tiles * heads,)](
                _map(q, own, pad), _map(k, walked, pad), _map(v, walked, pad), out, sums, queries, tiles,
                _section(k, groups) * (heads // groups), num_sums, scale * _LOG2_E,
                HEADS=heads, GROUP=heads // groups, WIDTH=width, PAD=pad, WINDOW=window, SHARED=shared, BLOCK=block,
                OWN=own, WALKED=walked, STAGES=launch.stages, AHEAD=launch.ahead, num_warps=launch.warps,
            )  # fmt: skip
    return out, sums


def backward(
    dout: Tensor, given: tuple[Tensor, Tensor, Tensor], out: Tensor, sums: Tensor, tables: Tables, scale: float,
    window: int, shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, the `given`, each contiguous."""
    q, k, v = given
    (num_rows, heads, width), groups = q.shape, k.shape[1]
    queries, keys, visits, _, block, visit = tables
    assert out.is_contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given)
    if not num_rows:
        return dq, dk, dv
    products = torch.empty(sums.shape, dtype=sums.dtype, device=sums.device)
    common = {"WIDTH": width, "WINDOW": window, "SHARED": shared, "BLOCK": block, "GROUP": heads // groups}
    scales = scale * _LOG2_E, scale
    with _on(q):
        pad, launch = _chosen(QUERIES, width)
        own, walked = min(launch.own, block), launch.walked
        tiles = len(queries) * (block // own)
        _gradient_of_queries[(tiles * heads,)](
            _map(q, own, pad), _map(k, walked, pad), _map(v, walked, pad), _map(dout, own, pad), out, sums, products,
            dq, queries, tiles, _section(k, groups) * (heads // groups), sums.shape[1], *scales,
            HEADS=heads, PAD=pad, OWN=own, WALKED=walked, STAGES=launch.stages, AHEAD=launch.ahead, **common,
            num_warps=launch.warps,
        )  # fmt: skip
        pad, launch = _chosen(KEYS, width)
        own, walked = min(launch.own, block), min(launch.walked, visit)
        tiles = len(keys) * (block // own)
        rows = [TensorDescriptor.from_tensor(x, [1, walked]) for x in (sums, products)]
        _gradient_of_keys[(tiles * groups,)](
            _map(q, walked, pad), _map(k, own, pad), _map(v, own, pad), _map(dout, walked, pad), *rows, dk, dv,
            keys, visits, tiles, _section(q, groups), *scales,
            GROUPS=groups, PAD=pad, VISIT=visit, OWN=own, WALKED=walked, STAGES=launch.stages, **common,
            num_warps=launch.warps,
        )  # fmt: skip
    return dq, dk, dv


_LOG2_E = 1.4426950408889634


def _chosen(launches: dict[int, Launch], width: int) -> tuple[int, Launch]:
    pad = max(16, 1 << (width - 1).bit_length())  # below 64 in tests alone
    return pad, launches[max(64, pad)]


def _map(x: Tensor, rows: int, pad: int) -> TensorDescriptor:
    """Tiles of some rows of one head of x [T, heads, C]; what is beyond its rows and channels is 0."""
    return TensorDescriptor.from_tensor(x.transpose(0, 1), [1, rows, pad])


def _section(tensor: Tensor, groups: int) -> int:
    """Key-value heads to a section; two tensors like this one are walked over."""
    size = 2 * len(tensor) * tensor.shape[1] // groups * tensor.shape[2] * tensor.itemsize
    return max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n * size <= SECTION))


def _on(x: Tensor) -> torch.cuda.device | nullcontext[None]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@triton.jit(do_not_specialize=["num_tiles", "section", "num_sums"])
def _forward(
    q, k, v, out, sums, blocks, num_tiles, section, num_sums, scale2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr, WINDOW: tl.constexpr,
    SHARED: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr, WALKED: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    head, tile = _share(num_tiles, section)
    first, end, start, prefix_start, prefix, summed = _queries(blocks, tile, BLOCK, OWN)
    if first >= end:
        return
    row = first + tl.arange(0, OWN)
    begin, stop, skipped = _walk(first, end, start, prefix, WINDOW, SHARED, OWN, WALKED)
    group = head // GROUP
    query = q.load([head, first, 0]).reshape([OWN, PAD])
    if AHEAD:
        at, _, _ = _keys(begin, skipped, start, end, prefix_start, prefix, SHARED, WALKED)
        s = tl.dot(query, k.load([group, at, 0]).reshape([WALKED, PAD]).T)
    top = tl.full([OWN], -1e30, tl.float32)  # finite: a row may see nothing of its first blocks
    total = tl.zeros([OWN], tl.float32)
    acc = tl.zeros([OWN, PAD], tl.float32)
    for number in tl.range(begin, stop, num_stages=STAGES):
        at, shift, limit = _keys(number, skipped, start, end, prefix_start, prefix, SHARED, WALKED)
        if not AHEAD:
            s = tl.dot(query, k.load([group, at, 0]).reshape([WALKED, PAD]).T)
        if _reaches_edge(first, at, shift, limit, WINDOW, OWN, WALKED):
            s = _hidden(s, row, at, shift, limit, WINDOW, WALKED)
        highest = tl.maximum(top, tl.max(s, axis=1) * scale2)
        p = tl.exp2(s * scale2 - highest[:, None])
        factor = tl.exp2(top - highest)
        total = total * factor + tl.sum(p, axis=1)
        top = highest
        if AHEAD:
            later = tl.minimum(number + 1, stop - 1)
            next_at, _, _ = _keys(later, skipped, start, end, prefix_start, prefix, SHARED, WALKED)
            s = tl.dot(query, k.load([group, next_at, 0]).reshape([WALKED, PAD]).T)
        value = v.load([group, at, 0]).reshape([WALKED, PAD])
        acc = tl.dot(p.to(value.dtype), value, acc * factor[:, None])
    total = tl.where(row < end, total, 1.0)  # rows beyond the sequence may see nothing
    place, mask = _rows_of(row, end, head, HEADS, WIDTH, PAD)
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
    tl.store(sums + head.to(tl.int64) * num_sums + summed + row, top + tl.log2(total), mask=row < end)


@triton.jit(do_not_specialize=["num_tiles", "section", "num_sums"])
def _gradient_of_queries(
    q, k, v, dout, out, sums, products, dq, blocks, num_tiles, section, num_sums, scale2, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr, WINDOW: tl.constexpr,
    SHARED: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr, WALKED: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Also writes, for the gradient of keys, the product of each row of out with its gradient."""
    head, tile = _share(num_tiles, section)
    first, end, start, prefix_start, prefix, summed = _queries(blocks, tile, BLOCK, OWN)
    if first >= end:
        return
    row = first + tl.arange(0, OWN)
    begin, stop, skipped = _walk(first, end, start, prefix, WINDOW, SHARED, OWN, WALKED)
    group = head // GROUP
    query = q.load([head, first, 0]).reshape([OWN, PAD])
    dresult = dout.load([head, first, 0]).reshape([OWN, PAD])
    place, mask = _rows_of(row, end, head, HEADS, WIDTH, PAD)
    result = tl.load(out + place, mask=mask, other=0.0)
    product = tl.sum(result.to(tl.float32) * dresult.to(tl.float32), axis=1)
    per_row = head.to(tl.int64) * num_sums + summed + row
    tl.store(products + per_row, product, mask=row < end)
    top = tl.load(sums + per_row, mask=row < end, other=float("inf"))
    if AHEAD:
        at, _, _ = _keys(begin, skipped, start, end, prefix_start, prefix, SHARED, WALKED)
        s = tl.dot(query, k.load([group, at, 0]).reshape([WALKED, PAD]).T)
    acc = tl.zeros([OWN, PAD], tl.float32)
    for number in tl.range(begin, stop, num_stages=STAGES):
        at, shift, limit = _keys(number, skipped, start, end, prefix_start, prefix, SHARED, WALKED)
        key = k.load([group, at, 0]).reshape([WALKED, PAD])
        if not AHEAD:
            s = tl.dot(query, key.T)
        if _reaches_edge(first, at, shift, limit, WINDOW, OWN, WALKED):
            s = _hidden(s, row, at, shift, limit, WINDOW, WALKED)
        p = tl.exp2(s * scale2 - top[:, None])
        value = v.load([group, at, 0]).reshape([WALKED, PAD])
        dp = tl.dot(dresult, value.T)
        ds = (p * (dp - product[:, None])).to(value.dtype)
        if AHEAD:
            later = tl.minimum(number + 1, stop - 1)
            next_at, _, _ = _keys(later, skipped, start, end, prefix_start, prefix, SHARED, WALKED)
            s = tl.dot(query, k.load([group, next_at, 0]).reshape([WALKED, PAD]).T)
        acc = tl.dot(ds, key, acc)
    tl.store(dq + place, (acc * scale).to(dq.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tiles", "section"])
def _gradient_of_keys(
    q, k, v, dout, sums, products, dk, dv, blocks, visits, num_tiles, section, scale2, scale,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr, WINDOW: tl.constexpr,
    SHARED: tl.constexpr, BLOCK: tl.constexpr, VISIT: tl.constexpr, OWN: tl.constexpr, WALKED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Scores stand on their side, keys by queries: what is summed over queries is a product's left side then."""
    PARTS: tl.constexpr = VISIT // WALKED
    group, tile = _share(num_tiles, section)
    entry = blocks + tile // (BLOCK // OWN) * 5
    first, end = tl.load(entry) + tile % (BLOCK // OWN) * OWN, tl.load(entry + 1)
    first_visit, last_visit, own_summed = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    if first >= end:
        return
    row = first + tl.arange(0, OWN)
    column = tl.arange(0, WALKED)
    key = k.load([group, first, 0]).reshape([OWN, PAD])
    value = v.load([group, first, 0]).reshape([OWN, PAD])
    last = end
    if WINDOW > 0:
        last = tl.minimum(end, first + OWN - 1 + WINDOW)
    num_own = tl.cdiv(last - first, WALKED)
    steps = num_own
    if SHARED:
        steps += (last_visit - first_visit) * PARTS
    dkey = tl.zeros([OWN, PAD], tl.float32)
    dvalue = tl.zeros([OWN, PAD], tl.float32)
    for number in tl.range(0, steps * GROUP, num_stages=STAGES):
        step, head = number, group
        if GROUP > 1:
            step, head = number % steps, group * GROUP + number // steps
        at, query_end, shift, limit, summed = first + step * WALKED, end, 0, end, own_summed
        if SHARED:  # noqa: SIM102 - the outer one is decided when this is compiled
            if step >= num_own:  # a sequence that reads these keys as a part of its prefix
                visit = visits + (first_visit + (step - num_own) // PARTS) * 5
                at = tl.load(visit) + (step - num_own) % PARTS * WALKED
                query_end, shift, limit = tl.load(visit + 1), tl.load(visit + 2), tl.load(visit + 3)
                summed = tl.load(visit + 4)
        query = q.load([head, at, 0]).reshape([WALKED, PAD])
        s = tl.dot(key, query.T)
        # Hidden everywhere: a branch around it makes ptxas wait after each product.
        lowest = tl.where(row < limit, row - shift - at, WALKED)
        seen = column[None, :] >= lowest[:, None]
        if WINDOW > 0:
            seen = seen & (column[None, :] < (row - shift - at + WINDOW)[:, None])
        exists = at + column < query_end  # sums beyond may never have been written
        top = tl.where(exists, sums.load([head, summed + at]).reshape([WALKED]), float("inf"))
        p = tl.exp2(tl.where(seen, s, float("-inf")) * scale2 - top[None, :])
        dresult = dout.load([head, at, 0]).reshape([WALKED, PAD])
        dvalue = tl.dot(p.to(dresult.dtype), dresult, dvalue)
        dp = tl.dot(value, dresult.T)
        product = tl.where(exists, products.load([head, summed + at]).reshape([WALKED]), 0.0)
        dkey = tl.dot((p * (dp - product[None, :])).to(query.dtype), query, dkey)
    place, mask = _rows_of(row, end, group, GROUPS, WIDTH, PAD)
    tl.store(dv + place, dvalue.to(dv.dtype.element_ty), mask=mask)
    tl.store(dk + place, (dkey * scale).to(dk.dtype.element_ty), mask=mask)


@triton.jit
def _share(num_tiles, section):
    """(head, tile) of this program: all tiles of the heads of a section, heads first, then the next section."""
    size = num_tiles * section
    number = tl.program_id(0)
    return number // size * section + number % section, number % size // section


@triton.jit
def _queries(blocks, tile, BLOCK: tl.constexpr, OWN: tl.constexpr):
    """Of a tile of queries: its first row, where its sequence ends and starts, its prefix's first row and length, what
    to add to a row for the place of its sum."""
    entry = blocks + tile // (BLOCK // OWN) * 6
    first = tl.load(entry) + tile % (BLOCK // OWN) * OWN
    prefix_start, prefix = tl.load(entry + 3), tl.load(entry + 4)
    return first, tl.load(entry + 1), tl.load(entry + 2), prefix_start, prefix, tl.load(entry + 5)


@triton.jit
def _walk(
    first, end, start, prefix, WINDOW: tl.constexpr, SHARED: tl.constexpr, OWN: tl.constexpr, WALKED: tl.constexpr
):
    """The blocks of keys that a tile of queries meets, from a number to another; the prefix has the first numbers."""
    begin, skipped = 0, 0
    if SHARED:
        skipped = tl.cdiv(prefix, WALKED)
    if WINDOW > 0:
        lowest = first - start - WINDOW + 1
        begin = tl.maximum(lowest, 0) // WALKED
        if SHARED:
            begin = tl.where(lowest < 0, tl.maximum(lowest + prefix, 0) // WALKED, skipped + begin)
    return begin, skipped + tl.cdiv(tl.minimum(first + OWN, end) - start, WALKED), skipped


@triton.jit
def _keys(number, skipped, start, end, prefix_start, prefix, SHARED: tl.constexpr, WALKED: tl.constexpr):
    """Of a block of keys: its first row, what to add to a query's row to count keys as it does, where they end."""
    at, shift, limit = start + (number - skipped) * WALKED, 0, end
    if SHARED:
        within = number < skipped
        at = tl.where(within, prefix_start + number * WALKED, at)
        shift = tl.where(within, prefix_start + prefix - start, 0)
        limit = tl.where(within, prefix_start + prefix, end)
    return at, shift, limit


@triton.jit
def _reaches_edge(first, at, shift, limit, WINDOW: tl.constexpr, OWN: tl.constexpr, WALKED: tl.constexpr):
    """Whether some query of the tile does not see some key of the block."""
    edge = at + WALKED > tl.minimum(first + shift + 1, limit)
    if WINDOW > 0:
        edge = edge | (first + OWN + shift - at > WINDOW)
    return edge


@triton.jit
def _hidden(s, row, at, shift, limit, WINDOW: tl.constexpr, WALKED: tl.constexpr):
    """The scores, and -inf where a query does not see a key."""
    column = tl.arange(0, WALKED)
    seen = column[None, :] <= (tl.minimum(row + shift, limit - 1) - at)[:, None]
    if WINDOW > 0:
        seen = seen & (column[None, :] > (row + shift - at - WINDOW)[:, None])
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _rows_of(row, end, head, HEADS: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr):
    """Where a head's rows are in [T, HEADS, WIDTH], and which of them exist."""
    channel = tl.arange(0, PAD)
    place = row[:, None].to(tl.int64) * (HEADS * WIDTH) + head * WIDTH + channel[None, :]
    return place, (row < end)[:, None] & (channel < WIDTH)[None, :]
