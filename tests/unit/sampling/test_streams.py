"""Random numbers by seed and place."""

import itertools

import torch

from burnish.sampling.streams import GOLDEN, as_int64, hashed, seed_of, uniforms

NUM = 4096


def grid(seeds: int, places: int) -> torch.Tensor:
    """The first numbers of the streams of neighbouring seeds, a row a seed."""
    s, p = torch.meshgrid(torch.arange(seeds), torch.arange(places), indexing="ij")
    return uniforms(s.reshape(-1), p.reshape(-1)).view(seeds, places)


def test_the_hash_is_splitmix64():
    # The first outputs for the seed 1234567, from the tests that go with the published C code.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = torch.tensor([as_int64(1234567 + GOLDEN * (n + 1)) for n in range(4)])
    assert [number % 2**64 for number in hashed(states).tolist()] == published


def test_a_number_depends_on_its_seed_and_place_alone():
    seeds, places = torch.tensor([5, 2**63 - 1, -7, 0, 5]), torch.tensor([0, 3, 100_000, 0, 1])
    together = uniforms(seeds, places)
    alone = [uniforms(seeds[i : i + 1], places[i : i + 1]) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))
    assert together.dtype == torch.float64
    assert len(set(together.tolist())) == 5


def test_numbers_fill_the_unit_interval_evenly():
    numbers = grid(64, NUM // 8).reshape(-1)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, 64, 0, 1)
    expected = numbers.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 103.4  # chi-square with 63 degrees, 1 in 1,000


def test_neighbours_are_not_correlated():
    numbers = grid(9, NUM) - 0.5
    bound = 4.5 / 12 / NUM**0.5  # 4.5 deviations of the mean of products
    for a, b in itertools.combinations(range(9), 2):  # neighbouring seeds, at the same place and one place apart
        assert abs((numbers[a] * numbers[b]).mean()) < bound
        assert abs((numbers[a, 1:] * numbers[b, :-1]).mean()) < bound
    for row in numbers:  # neighbouring places
        assert abs((row[1:] * row[:-1]).mean()) < bound
    assert len(set(grid(300, 300).reshape(-1).tolist())) == 90_000


def test_one_seed_of_several_numbers():
    made = [seed_of(*numbers) for numbers in itertools.product(range(8), repeat=3)]
    made += [seed_of(1), seed_of(1, 2), seed_of(2, 1), seed_of(0), seed_of(0, 0), seed_of(-1), seed_of(2**63)]
    assert len(set(made)) == 8**3 + 7
    assert all(0 <= seed < 2**63 for seed in made)
    assert seed_of(3, 4) == seed_of(3, 4)
