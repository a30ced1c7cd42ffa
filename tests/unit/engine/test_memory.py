"""The count of live tensor bytes on the CPU, against sums done by hand."""

import torch

from burnish.engine.memory import measured_peak

CPU = torch.device("cpu")
KIB = 1024


def test_freed_tensors_do_not_add_up():
    with measured_peak(CPU, []) as peak:
        for _ in range(50):
            x = torch.zeros(256)  # 1 KiB; the old one lives until the new one has its name
            del x
    assert peak.bytes == KIB


def test_what_was_held_before_counts_and_views_do_not():
    weight = torch.ones(256, 4)
    with measured_peak(CPU, [weight]) as peak:
        view = weight.view(4, 256)
        doubled = view * 2
        del doubled
    assert peak.bytes == 4 * KIB + 4 * KIB


def test_saved_activations_and_gradients_count():
    weight = torch.ones(256, 256, requires_grad=True)  # 256 KiB
    x = torch.ones(1, 256)
    with measured_peak(CPU, [weight, x]) as peak:
        y = torch.exp(x @ weight)  # the product is freed at once, exp keeps its 1 KiB output
        y.sum().backward()
    assert 2 * 256 * KIB <= peak.bytes <= 2 * 256 * KIB + 16 * KIB
