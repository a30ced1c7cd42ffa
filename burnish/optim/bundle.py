"""What one launch updates: parameters that are alike, the pieces of their moments, and the table of where all lies."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from burnish.optim import eight_bit
from burnish.optim.pages import CHUNK, MOMENTS, Piece, cut, places
from burnish.optim.update import Update, reference_update

State = Callable[[nn.Parameter], dict[str, Any]]
"""A parameter's state, with the count of its steps; made where there was none."""
Find = Callable[[nn.Parameter, Piece], Mapping[str, Tensor]]
"""The moments of a piece, flat, where they are when it is updated."""
ANYWHERE = range(-1, 2**31)
"""All pages, and what is in none."""


class _Place(NamedTuple):
    """What of a parameter's row is found once."""

    moments: list[tuple[int, ...]]
    """Of each piece, the addresses that its moments would have if they began with the tensor."""
    state: dict[str, Any]


class Bundle:
    """Parameters of one group, dtype and kind of state, and their moments cut into pages.

    Those of weights that are split over ranks lie in no page: their page is -1.
    """

    def __init__(
        self,
        group: dict[str, Any],
        parameters: list[nn.Parameter],
        numbers: list[int],
        eight: bool,
        kernel: bool,
        page: int,
        first_page: int,
    ) -> None:
        """`numbers` are those of the parameters in the optimizer; pages of `page` bytes begin with `first_page`."""
        self.group, self.parameters, self.numbers, self.eight, self.kernel = group, parameters, numbers, eight, kernel
        self.half = parameters[0].dtype == torch.bfloat16
        self.split = any(is_split(parameter) for parameter in parameters)
        counts = [local(parameter).numel() for parameter in parameters]
        self.pieces = [[Piece(-1, 0, 0, count)] for count in counts]
        self.sizes: list[int] = []
        """Of the pages."""
        if not self.split:
            self.pieces, self.sizes = cut(counts, eight, page, first_page)
        self._rows = list(accumulate((len(own) for own in self.pieces), initial=0))
        """Which row of the table is the first of each parameter; each piece has one."""
        pieces = [piece for own in self.pieces for piece in own]
        self._pages = [piece.page for piece in pieces]
        self._programs = list(accumulate((-(-(p.last - p.first) // CHUNK) for p in pieces), initial=0))
        self._layout: tuple[Tensor, Tensor] | None = None
        """What a table holds that no step changes."""
        self._places: list[_Place | None] = [None] * len(parameters)

    def forget_places(self) -> None:
        """Look again for where moments lie: they have been moved."""
        self._places = [None] * len(self.parameters)

    def rows_of(self, members: range) -> range:
        """The rows of these parameters."""
        return range(self._rows[members.start], self._rows[members.stop])

    def pages_of(self, rows: range) -> range:
        """The pages that they lie in."""
        return range(self._pages[rows.start], self._pages[rows.stop - 1] + 1) if rows else range(0)

    def programs(self, rows: range, pages: range = ANYWHERE) -> range:
        """Those of a launch that work on these rows, as far as they lie in these pages."""
        first = max(rows.start, bisect_left(self._pages, pages.start))
        last = min(rows.stop, bisect_left(self._pages, pages.stop))
        return range(self._programs[first], self._programs[max(first, last)])

    def launches(self, members: range, state_of: State, find: Find) -> Iterator["Launch"]:
        """A launch for each count of steps that parameters have taken: one, unless gradients were missing before."""
        rows: list[tuple[int, ...]] = []
        steps: list[int] = []
        taking: dict[int, list[dict[str, Any]]] = {}
        held: list[Tensor] = []
        missing = (0,) * (2 + len(MOMENTS[self.eight]))
        for i in members:
            parameter = self.parameters[i]
            gradient = parameter.grad
            if gradient is None:
                rows += [missing] * len(self.pieces[i])
                steps += [0] * len(self.pieces[i])
                continue
            if self.split:
                gradient = local(gradient)
            if not gradient.is_contiguous():
                gradient = gradient.contiguous()
                held.append(gradient)
            weight, address = (local(parameter) if self.split else parameter).data_ptr(), gradient.data_ptr()
            place = self._places[i] or self._find(i, state_of, find)
            step = place.state["step"] + 1
            for moments in place.moments:
                rows.append((weight, address, *moments))
                steps.append(step)
            taking.setdefault(step, []).append(place.state)
        span = self.rows_of(members)
        for step in sorted(taking):
            only = rows if len(set(steps)) == 1 else _only(rows, steps, step)
            yield Launch(self, step, self._table(only, span), span, taking[step], held)

    def _find(self, i: int, state_of: State, find: Find) -> _Place:
        parameter = self.parameters[i]
        # No moment is held while the next is asked for: its page may have to leave the device for that.
        addresses = [_addresses(find(parameter, piece), piece) for piece in self.pieces[i]]
        self._places[i] = place = _Place(addresses, state_of(parameter))
        return place

    def _table(self, addresses: Sequence[tuple[int, ...]], rows: range) -> Any:
        """The addresses on the device: one small copy, which the host does not wait for."""
        from burnish.kernels import adam

        device = self.parameters[0].device
        if self._layout is None:
            own = [len(pieces) for pieces in self.pieces]
            counts = [local(parameter).numel() for parameter in self.parameters]
            facts = torch.tensor(list(zip(counts, self.numbers, strict=True)), dtype=torch.int64)
            spans = [(piece.first, piece.last) for pieces in self.pieces for piece in pieces]
            facts = facts.repeat_interleave(torch.tensor(own), dim=0)
            self._layout = facts.to(device), adam.chunks_of(spans).to(device)
        found = torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type == "cuda")
        aligned = not bool((found & 15).any())
        on_device = found.to(device, non_blocking=True)
        return adam.Table(on_device, *self._layout, self.half, aligned, rows.start, self.programs(rows))


class Launch(NamedTuple):
    """Rows of a table that a kernel updates, the table on the device."""

    bundle: Bundle
    step: int
    table: Any
    rows: range
    states: list[dict[str, Any]]
    """Of the tensors that have a gradient."""
    held: list[Tensor]
    """Contiguous copies of gradients that were not: they must live until the launch."""

    @property
    def pages(self) -> range:
        """Where the moments lie, among others."""
        return self.bundle.pages_of(self.rows)

    def squares(self) -> Tensor:
        """Sums of squares over parts of the gradient."""
        from burnish.kernels import adam

        return adam.squares(self.table)

    def update(self, scale: Tensor | None, seed: int, pages: range = ANYWHERE) -> None:
        """Weights and moments after the step, those of which the moments lie in these pages."""
        from burnish.kernels import adam

        bundle, device = self.bundle, self.bundle.parameters[0].device
        scale = torch.ones((), device=device) if scale is None else scale
        maps: list[Tensor] = []
        if bundle.eight:
            maps = [eight_bit.signed_map(device), eight_bit.unsigned_map(device)]
            maps += [*eight_bit.search(device, True), *eight_bit.search(device, False)]
        numbers, table = Update.at(self.step, bundle.group), self.table
        if pages is not ANYWHERE:
            table = table._replace(programs=bundle.programs(self.rows, pages))
        adam.update(table, scale, numbers, seed, self.step, maps, eight_bit.LOWEST)


class Reference(NamedTuple):
    """Parameters of a bundle that are updated without a kernel."""

    bundle: Bundle
    members: Sequence[int]
    """Those that have a gradient."""
    states: list[dict[str, Any]]
    find: Find

    @property
    def pages(self) -> range:
        """As those of a `Launch`."""
        whole = range(self.members[0], self.members[-1] + 1) if self.members else range(0)
        return self.bundle.pages_of(self.bundle.rows_of(whole))

    def update(self, scale: Tensor | None, seed: int, pages: range = ANYWHERE) -> None:
        """As that of a `Launch`."""
        for i, piece, state in self._in(pages):
            parameter, step = self.bundle.parameters[i], state["step"] + 1
            gradient, part = parameter.grad, slice(piece.first, piece.last)
            assert gradient is not None
            weights, gradients = local(parameter).view(-1)[part], local(gradient).reshape(-1)[part]
            counter, update = (self.bundle.numbers[i], step), Update.at(step, self.bundle.group)
            moments = self.find(parameter, piece)
            reference_update(weights, gradients, moments, update, scale, seed, counter, piece.first)

    def _in(self, pages: range) -> Iterator[tuple[int, Piece, dict[str, Any]]]:
        for i, state in zip(self.members, self.states, strict=True):
            for piece in self.bundle.pieces[i]:
                if piece.page in pages:
                    yield i, piece, state


def is_split(tensor: Tensor) -> bool:
    """Whether this is a DTensor, split over ranks: only the engine speaks torch.distributed."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """This rank's part of a tensor that is split over ranks; any other tensor as it is."""
    return tensor.to_local() if is_split(tensor) else tensor


def _addresses(moments: Mapping[str, Tensor], piece: Piece) -> tuple[int, ...]:
    """Where the moments of a whole tensor would begin, of which these are a piece's."""
    return tuple(m.data_ptr() - places(name, piece.first) * m.element_size() for name, m in moments.items())


def _only(rows: Iterable[tuple[int, ...]], steps: Iterable[int], step: int) -> list[tuple[int, ...]]:
    return [row if taken == step else (0,) * len(row) for row, taken in zip(rows, steps, strict=True)]
