"""Checkpoints: whole or not at all, the newest and the best kept, damage named."""

import pytest
import torch

from burnish.engine.checkpoints import load_checkpoint, newest_checkpoint, prune, save_checkpoint


def save(parent, step, eval_loss=None):
    folder = parent / f"step-{step:08d}"
    save_checkpoint(folder, {"weights": {"w": torch.full((3,), float(step))}}, {"step": step, "eval_loss": eval_loss})
    return folder


def test_round_trip(tmp_path):
    tensors, state = load_checkpoint(save(tmp_path, 5, 1.25))
    assert torch.equal(tensors["weights"]["w"], torch.full((3,), 5.0))
    assert state == {"step": 5, "eval_loss": 1.25}


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        save(tmp_path, step, loss)
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004", "step-00000005"]
    assert newest_checkpoint(tmp_path).name == "step-00000005"


def test_a_failed_save_leaves_the_earlier_checkpoint_and_no_remains(tmp_path, monkeypatch):
    good = save(tmp_path, 1)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("burnish.engine.checkpoints.save_file", full_disk)
    with pytest.raises(OSError, match=r"No space left on device.*last good checkpoint is .*step-00000001"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]


def test_a_failed_rewrite_keeps_what_was_there(tmp_path, monkeypatch):
    folder = save(tmp_path, 1)
    monkeypatch.setattr("burnish.files._sync", lambda path: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        save(tmp_path, 1)
    assert load_checkpoint(folder)[1]["step"] == 1


def test_a_damaged_checkpoint_is_named(tmp_path):
    folder = save(tmp_path, 1)
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"step-00000001 is damaged"):
        load_checkpoint(folder)
