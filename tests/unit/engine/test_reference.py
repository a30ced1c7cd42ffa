"""Log-probs of a frozen reference: the same whether asked at once or found again, and found only where they belong."""

import dataclasses

import pytest
import torch

from burnish.config import build
from burnish.data.comparing import ComparisonStream, collate_comparisons
from burnish.data.comparisons import Comparisons
from burnish.engine.assemble import open_model, reference_role
from burnish.engine.mesh import Mesh
from burnish.engine.reference import about_model, ask_about_all, asked, looked_up, no_reference, remembered
from burnish.engine.roles import Role
from burnish.engine.start import Start
from burnish.model.adapter_files import save_adapter
from burnish.model.adapters import AdapterSpec, adapter_parameters, add_adapter
from burnish.model.checkpoint import load_model, save_model
from burnish.settings import ModelSettings, RunSettings, TrainingSettings
from burnish.types import Comparison, Sequence
from tests.tiny import tiny_folder

MESH = Mesh(torch.device("cpu"))


def comparisons(count: int = 12, seed: int = 0) -> Comparisons:
    """Pairs of random answers to random prompts; every third has three answers."""
    generator = torch.Generator().manual_seed(seed)
    units: list[Comparison] = []
    for row in range(count):
        prompt = draw(generator, 3 + row % 5)
        answers = [draw(generator, 2 + (row + k) % 7) for k in range(3 if row % 3 == 0 else 2)]
        weights = (0.0,) * len(prompt)
        both = [Sequence(prompt + answer, weights + (1.0,) * len(answer), row) for answer in answers]
        units.append(Comparison(tuple(both), ((0, 1, 0.0),)))
    return Comparisons.of(units)


def draw(generator: torch.Generator, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 320, (length,), generator=generator).tolist())


@pytest.fixture(scope="module")
def role(tmp_path_factory) -> Role:
    return Role(load_model(tiny_folder(tmp_path_factory.mktemp("model"))), None)


def test_what_is_found_again_is_what_was_said(role: Role) -> None:
    data = comparisons()
    streams = [ComparisonStream(data, 40, 2, seed=0, share_prefix=shares) for shares in (True, False)]
    known = ask_about_all(role, streams[:1], MESH)
    assert len(known) == len(data.sequences)
    same, other = asked(role, MESH), looked_up(known, MESH)
    for step in range(streams[0].steps_in(1)):
        for batch in streams[0].step(step):  # the very batches that were asked about
            assert torch.equal(same(batch).reference_log_probs, other(batch).reference_log_probs)
    for batch in (*streams[1].step(5), collate_comparisons(data[2:9]), collate_comparisons(data[:3], False)):
        torch.testing.assert_close(same(batch).reference_log_probs, other(batch).reference_log_probs)
        assert (other(batch).reference_log_probs != 0).equal(batch.weights != 0)


def test_losses_without_a_reference_get_none() -> None:
    batch = collate_comparisons(comparisons(2)[:])
    assert no_reference(MESH)(batch).reference_log_probs is None


def test_what_was_said_is_remembered(role: Role, tmp_path) -> None:
    data, held_out = comparisons(), comparisons(4, seed=1)
    calls: list[int] = []

    def recall(about: dict[str, str], *parts: Comparisons):
        def ask():
            calls.append(len(parts))
            return ask_about_all(role, [ComparisonStream(part, 40, 1, seed=0) for part in parts], MESH)

        return remembered(parts, about, ask, MESH, tmp_path)

    first = recall({"base": "a"}, data, held_out)
    again = recall({"base": "a"}, held_out, data)  # in whatever order
    assert len(calls) == 1
    assert first.keys() == again.keys()
    assert all((first[name] == again[name]).all() for name in first)
    recall({"base": "b"}, data, held_out)
    recall({"base": "a"}, data)
    assert len(calls) == 3
    weighted = [  # which tokens are scored counts, how much they weigh does not
        dataclasses.replace(unit, sequences=tuple(scaled(s, factor) for s in unit.sequences))
        for factor in (0.5, 0.0)
        for unit in data[:]
    ]
    recall({"base": "a"}, Comparisons.of(weighted[: len(data)]))
    assert len(calls) == 3
    recall({"base": "a"}, Comparisons.of(weighted[len(data) :]))
    assert len(calls) == 4
    for damage in (b"", b"nonsense", None):
        for path in tmp_path.iterdir():
            kept = path.read_bytes()
            path.write_bytes(kept[:-5] + b"12345" if damage is None else damage)
        mended = recall({"base": "a"}, data, held_out)
        assert all((first[name] == mended[name]).all() for name in first)
    assert len(calls) == 7
    assert not list(tmp_path.glob(".new-*"))


def scaled(sequence: Sequence, factor: float) -> Sequence:
    """Its weights multiplied, but for the last one's."""
    *weights, last = sequence.weights
    return dataclasses.replace(sequence, weights=(*(weight * factor for weight in weights), last))


def test_a_folder_that_cannot_be_written_is_done_without(role: Role, tmp_path, capsys) -> None:
    data = comparisons(3)
    (tmp_path / "file").write_text("in the way")

    def ask():
        return ask_about_all(role, [ComparisonStream(data, 40, 1, seed=0)], MESH)

    assert remembered([data], {}, ask, MESH, tmp_path / "file" / "folder").keys() == ask().keys()
    assert "could not be kept" in capsys.readouterr().out


def test_a_model_is_known_by_what_decides_its_log_probs(tmp_path) -> None:
    base = tiny_folder(tmp_path / "model")
    model = load_model(base)
    add_adapter(model, "a", AdapterSpec("lora", 4), torch.Generator().manual_seed(0))
    save_adapter(model, "a", tmp_path / "a", str(base), base)
    torch.nn.init.ones_(next(iter(adapter_parameters(model, "a").values())))
    save_adapter(model, "a", tmp_path / "b", str(base), base)
    save_model(model, tmp_path / "moved", base)  # the same weights elsewhere
    other = tiny_folder(tmp_path / "other", seed=1)

    def about(base, adapter=None, dtype=torch.float32, seed=0, run_dtype="auto", **model):
        settings = ModelSettings(**{"path": str(base), "storage": "bf16", **model})
        run = RunSettings(seed=seed, dtype=run_dtype)
        return about_model(Start(base, adapter), settings, run, dtype, torch.device("cpu"))

    first = about(base)
    assert about(tmp_path / "moved") == first
    assert about(base, seed=1) == first
    assert about(base, double_quant=False) == first
    different = [
        about(other),
        about(base, tmp_path / "a"),
        about(base, tmp_path / "b"),
        about(base, dtype=torch.bfloat16),
        about(base, run_dtype="fp8"),
        about(base, storage="nf4"),
        about(base, storage="nf4", double_quant=False),
        about(base, init="random"),
        about(base, init="random", seed=1),
    ]
    assert all(one != two for k, one in enumerate([first, *different]) for two in different[k:])


def test_an_adapter_that_was_trained_with_dropout_has_none_as_the_reference(tmp_path) -> None:
    base = tiny_folder(tmp_path / "model")
    model = load_model(base)
    add_adapter(model, "a", AdapterSpec("dora", 4, dropout=0.5), torch.Generator().manual_seed(0))
    for parameter in adapter_parameters(model, "a").values():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    save_adapter(model, "a", tmp_path / "a", str(base), base)
    tree = {"model": {"path": str(base)}, "adapter": {"kind": "dora", "rank": 4, "dropout": 0.25}}
    settings = build(TrainingSettings, tree)
    decoder, name = open_model(Start(base, tmp_path / "a"), settings.model, settings.adapter, settings.run, MESH)
    batch = collate_comparisons(comparisons(3)[:])
    reference, policy = reference_role(decoder), Role(decoder, name)
    assert decoder.training
    assert torch.equal(reference.log_probs(batch), reference.log_probs(batch))
    assert not torch.equal(policy.log_probs(batch), policy.log_probs(batch))
    decoder.eval()
    assert torch.equal(reference.log_probs(batch), policy.log_probs(batch))
