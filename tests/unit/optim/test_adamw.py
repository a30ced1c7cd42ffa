"""AdamW against the update written out in float64 and against bitsandbytes, and its state as named tensors."""

import math
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor, nn

from burnish.engine.checkpoints import load_checkpoint, save_checkpoint
from burnish.optim import eight_bit
from burnish.optim.adamw import AdamW, adamw, optimizer_tensors, restore_optimizer, state_bytes

LR, BETAS, EPS, DECAY = 0.01, (0.9, 0.99), 1e-8, 0.1
KINDS = ["adamw", "adamw8bit"]
DTYPES = [torch.float32, torch.bfloat16]
BIG = (70, 90)  # 6,300 values: in 8 bits, the last block incomplete
Parameters = dict[str, nn.Parameter]


def parameters(dtype: torch.dtype = torch.float32, matrix: tuple[int, int] = (4, 3)) -> Parameters:
    generator = torch.Generator().manual_seed(0)
    drawn = {"w": torch.randn(matrix, generator=generator), "b": torch.randn(3, generator=generator)}
    return {name: nn.Parameter(tensor.to(dtype)) for name, tensor in drawn.items()}


def give_gradients(parameters: Parameters, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def ours(parameters: Parameters, eight: bool = False, decay: float = DECAY) -> AdamW:
    matrices, others = [p for p in parameters.values() if p.ndim == 2], [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others}]
    return AdamW(groups, LR, BETAS, EPS, eight, 0)


def exact(parameters: Parameters, steps: int) -> dict[str, Tensor]:
    """The weights after so many steps in float64, by the paper's algorithm 2."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        x = parameter.detach().double()
        m, v = torch.zeros_like(x), torch.zeros_like(x)
        for step in range(1, steps + 1):
            give_gradients(parameters, step)
            g = parameter.grad.double()
            m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
            update = (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS)
            x = x * (1 - LR * (DECAY if name == "w" else 0.0)) - LR * update
        found[name] = x
    return found


@pytest.mark.parametrize("make", [lambda p: adamw(p, LR, BETAS, EPS, DECAY), ours], ids=["torch's", "ours"])
def test_update_is_the_papers_and_only_matrices_decay(make) -> None:
    expected, trained = exact(parameters(), 5), parameters()
    optimizer = make(trained)
    for step in range(1, 6):
        give_gradients(trained, step)
        optimizer.step()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_what_torch_can_do_is_left_to_torch() -> None:
    assert isinstance(adamw(parameters(), LR, BETAS, EPS, DECAY), torch.optim.AdamW)
    assert isinstance(adamw(parameters(torch.bfloat16), LR, BETAS, EPS, DECAY), AdamW)
    assert isinstance(adamw(parameters(), LR, BETAS, EPS, DECAY, "adamw8bit"), AdamW)


@pytest.mark.parametrize("largest", [0.0, 0.5, 100.0])
def test_clipping_is_that_of_torch_whether_it_bites_or_not(largest: float) -> None:
    first, second = parameters(), parameters()
    theirs, mine = torch.optim.SGD(first.values()), ours(second)
    reference = adamw(first, LR, BETAS, EPS, DECAY)
    for step in range(3):
        give_gradients(first, step)
        give_gradients(second, step)
        expected = nn.utils.clip_grad_norm_(first.values(), largest or math.inf)
        torch.testing.assert_close(mine.clip(largest), expected)
        reference.step()
        mine.step()
        theirs.zero_grad()
        mine.zero_grad()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=1e-7)


def test_the_norm_of_bf16_gradients_is_no_bf16_number() -> None:
    trained = parameters(torch.bfloat16, BIG)
    give_gradients(trained, 0)
    expected = math.sqrt(sum(p.grad.double().square().sum().item() for p in trained.values()))
    assert ours(trained).clip(1.0).item() == pytest.approx(expected, rel=1e-6)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    trained = parameters()
    optimizer = ours(trained)
    give_gradients(trained, 0)
    trained["b"].grad = None
    before = trained["b"].detach().clone()
    optimizer.clip(1.0)
    optimizer.step()
    assert torch.equal(trained["b"], before)
    assert set(optimizer_tensors(optimizer, trained)) == {"w.step", "w.exp_avg", "w.exp_avg_sq"}


def test_forgotten_gradients_take_their_clipping_with_them() -> None:
    whole, parted = parameters(), parameters()
    first, second = ours(whole), ours(parted)
    give_gradients(parted, 7)
    second.clip(0.001)
    second.zero_grad()
    give_gradients(whole, 0)
    give_gradients(parted, 0)
    first.step()
    second.step()
    assert all(torch.equal(whole[name], parted[name]) for name in whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_restored_from_a_checkpoint_it_continues_bit_for_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    whole, parted = parameters(dtype, BIG), parameters(dtype, BIG)
    first, second = (adamw(p, LR, BETAS, EPS, DECAY, kind, 5) for p in (whole, parted))
    for step in range(6):
        if step == 3:
            groups = {"weights": parted, "optimizer": optimizer_tensors(second, parted)}
            save_checkpoint(tmp_path / "step-3", groups, {})
            stored, _ = load_checkpoint(tmp_path / "step-3")
            parted = {name: nn.Parameter(stored["weights"][name]) for name in whole}
            second = adamw(parted, LR, BETAS, EPS, DECAY, kind, 5)
            restore_optimizer(second, parted, stored["optimizer"])
        for trained, optimizer in ((whole, first), (parted, second)):
            give_gradients(trained, step)
            optimizer.step()
    assert all(torch.equal(whole[name], parted[name]) for name in whole)
    states = optimizer_tensors(first, whole), optimizer_tensors(second, parted)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_both_kinds_of_fp32_state_have_the_same_names_and_dtypes() -> None:
    trained = parameters()
    optimizers = ours(trained), adamw(trained, LR, BETAS, EPS, DECAY)
    give_gradients(trained, 0)
    for optimizer in optimizers:
        optimizer.step()
    mine, theirs = (
        {name: (tensor.shape, tensor.dtype) for name, tensor in optimizer_tensors(optimizer, trained).items()}
        for optimizer in optimizers
    )
    assert mine == theirs


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_8_bit_step_is_that_of_bitsandbytes(dtype: torch.dtype) -> None:
    """Each step starts from the same state; theirs is on the CPU, with its own search for the nearest level."""
    trained = parameters(dtype, BIG)
    optimizer, p = ours(trained, eight=True), trained["w"].detach().clone()
    maps = bnb.create_dynamic_map(signed=True), bnb.create_dynamic_map(signed=False)
    codes = [torch.zeros(BIG, dtype=torch.uint8) for _ in maps]
    absmax = [torch.zeros(-(-p.numel() // 256)) for _ in maps]
    for step in range(1, 8):
        give_gradients(trained, step)
        gradient = trained["w"].grad.clone()
        optimizer.step()
        numbers = (*BETAS, 0.0, 0.0, EPS, step, LR)
        bnb.optimizer_update_8bit_blockwise(
            "adam", gradient, p, *codes, *numbers, *maps, *absmax, weight_decay=DECAY, gnorm_scale=1.0
        )
        state, half = optimizer.tensors_of(trained["w"]), dtype == torch.bfloat16
        # bf16 weights are rounded by chance here and to the nearest there: a unit in the last place at most.
        torch.testing.assert_close(trained["w"].data, p, rtol=2**-7 if half else 1e-6, atol=1e-6)
        for i in (0, 1):
            torch.testing.assert_close(state[f"absmax{i + 1}"], absmax[i], rtol=1e-6, atol=0)
            mine = state[f"state{i + 1}"].int()
            other = (mine - codes[i].int()).abs()
            # Their CPU backend cuts [-1, 1] into 65,536 bins: below 1e-4 of the largest, several levels share one.
            real = (maps[i][mine] - maps[i][codes[i].int()]).abs() > 2**-15
            assert bool((other[real] == 1).all())
            assert real.float().mean() < 0.02  # as much as a bin is of the gap between levels there
            codes[i].copy_(state[f"state{i + 1}"])
            absmax[i].copy_(state[f"absmax{i + 1}"])
        p.copy_(trained["w"].data)


def test_8_bit_states_are_bitsandbytes_two_bytes_a_weight() -> None:
    trained = parameters(matrix=BIG)
    optimizer = ours(trained, eight=True)
    give_gradients(trained, 0)
    optimizer.step()
    state = optimizer_tensors(optimizer, trained)
    assert {name.removeprefix("w.") for name in state if name[0] == "w"} == {
        *("step", "state1", "state2", "absmax1", "absmax2")
    }
    assert sum(t.nbytes for name, t in state.items() if name[0] == "w") == 4 + 2 * 6300 + 2 * 4 * 25
    assert {name for name in state if name[0] == "b"} == {"b.step", "b.exp_avg", "b.exp_avg_sq"}


def test_with_8_bits_the_way_is_nearly_that_of_32() -> None:
    fine, coarse = parameters(matrix=BIG), parameters(matrix=BIG)
    target = torch.randn(BIG, generator=torch.Generator().manual_seed(9))
    optimizers = ours(fine, decay=0.0), ours(coarse, eight=True, decay=0.0)
    start = fine["w"].detach().clone()
    for _ in range(100):
        for trained, optimizer in zip((fine, coarse), optimizers, strict=True):
            trained["w"].grad = trained["w"].detach() - target
            optimizer.step()
    way = (fine["w"] - start).norm()
    assert (fine["w"] - coarse["w"]).norm() < 0.05 * way


def test_a_gradient_that_stays_away_causes_no_leap() -> None:
    """The second moment of a value far below its block's largest is below the first level: 0 would make no root."""
    trained = {"w": nn.Parameter(torch.zeros(64, 64))}
    optimizer = ours(trained, eight=True)
    first = torch.full((64, 64), 1e-4)
    first[:, 0] = 1.0
    for step in range(5):
        trained["w"].grad = first if step == 0 else torch.zeros(64, 64)
        optimizer.step()
    assert trained["w"].abs().max() < 5 * LR


def test_levels_are_those_of_bitsandbytes_and_every_value_gets_the_nearest() -> None:
    for signed, levels in ((True, eight_bit.signed_map), (False, eight_bit.unsigned_map)):
        map_ = levels(torch.device("cpu"))
        assert torch.equal(map_, bnb.create_dynamic_map(signed=signed))
        values = torch.randn(3 * 256 + 5, generator=torch.Generator().manual_seed(1)) ** 3
        values = values if signed else values.abs()
        codes, absmax = eight_bit.quantise(values, map_)
        scale = absmax.double().repeat_interleave(256)[: len(values)]
        distance = (values.double()[:, None] - map_.double() * scale[:, None]).abs()
        chosen = distance.gather(1, codes.long()[:, None])[:, 0]
        near = chosen <= distance.min(dim=1).values + 1e-7 * scale
        assert bool((near | ((codes == 1) & (not signed))).all())
        torch.testing.assert_close(
            eight_bit.dequantise(codes, absmax, map_).double(), map_.double()[codes.int()] * scale
        )


def test_a_block_of_zeros_stays_zero() -> None:
    for levels in (eight_bit.signed_map, eight_bit.unsigned_map):
        map_ = levels(torch.device("cpu"))
        codes, absmax = eight_bit.quantise(torch.zeros(300), map_)
        assert torch.equal(eight_bit.dequantise(codes, absmax, map_), torch.zeros(300))


class Split(nn.Parameter):
    """A weight that is split over ranks, to the optimizer."""

    def to_local(self) -> Tensor:
        return self.data


def test_split_weights_keep_their_states_in_one_piece_where_they_are() -> None:
    whole, split = parameters(torch.bfloat16, BIG), parameters(torch.bfloat16, BIG)
    split = {name: Split(parameter.data) for name, parameter in split.items()}
    first, second = ours(whole), adamw(split, LR, BETAS, EPS, DECAY)
    assert isinstance(second, AdamW)
    for step in range(2):
        for trained, optimizer in ((whole, first), (split, second)):
            give_gradients(trained, step)
            optimizer.step()
        restore_optimizer(second, split, optimizer_tensors(second, split))
    assert all(torch.equal(whole[name], split[name].data) for name in whole)
    assert (second.held(), second.evict(10**9)) == (0, 0)
    assert state_bytes(second) == 8 * (6300 + 3)


def test_8_bit_states_of_split_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"write optim\.kind=adamw"):
        adamw({"w": Split(torch.zeros(2, 2))}, LR, BETAS, EPS, DECAY, "adamw8bit")


@pytest.mark.parametrize(("kind", "other"), [("adamw", "adamw8bit"), ("adamw8bit", "adamw")])
def test_states_of_another_kind_are_refused(kind: str, other: str) -> None:
    trained = parameters(torch.float32, BIG)
    optimizer = adamw(trained, LR, BETAS, EPS, DECAY, kind)
    give_gradients(trained, 0)
    optimizer.step()
    stored = optimizer_tensors(optimizer, trained)
    with pytest.raises(ValueError, match=r"another optim\.kind"):
        restore_optimizer(adamw(trained, LR, BETAS, EPS, DECAY, other), trained, stored)


def test_what_torch_would_do_wrong_with_its_states_is_refused() -> None:
    trained = parameters()
    optimizer = ours(trained)
    with pytest.raises(NotImplementedError, match="make a new optimizer of all groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    with pytest.raises(NotImplementedError, match=r"burnish\.optim\.adamw\.optimizer_tensors"):
        optimizer.state_dict()
    with pytest.raises(NotImplementedError, match=r"burnish\.optim\.adamw\.restore_optimizer"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})


def test_clipping_nothing_is_a_norm_of_0() -> None:
    assert ours(parameters()).clip(1.0) == 0
