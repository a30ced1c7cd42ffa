"""AdamW against the update written out in float64, and its state as named tensors."""

import torch
from torch import nn

from burnish.optim.adamw import adamw, optimizer_tensors, restore_optimizer

LR, BETAS, EPS, DECAY = 0.01, (0.9, 0.99), 1e-8, 0.1


def parameters():
    torch.manual_seed(0)
    return {"w": nn.Parameter(torch.randn(4, 3)), "b": nn.Parameter(torch.randn(3))}


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return {"w": torch.randn(4, 3, generator=generator), "b": torch.randn(3, generator=generator)}


def test_update_is_the_papers_and_only_matrices_decay():
    ours = parameters()
    expected = {name: p.detach().double() for name, p in parameters().items()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in expected.items()}
    optimizer = adamw(ours, LR, BETAS, EPS, DECAY)
    for step in range(1, 6):
        for name, gradient in gradients(step).items():
            ours[name].grad = gradient
            m, v = moments[name]
            g = gradient.double()
            m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
            moments[name] = m, v
            update = (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS)
            decay = DECAY if name == "w" else 0.0
            expected[name] = expected[name] * (1 - LR * decay) - LR * update
        optimizer.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_restored_state_continues_bit_for_bit():
    whole, parted = parameters(), parameters()
    first, second = adamw(whole, LR, BETAS, EPS, DECAY), adamw(parted, LR, BETAS, EPS, DECAY)
    for step in range(6):
        if step == 3:
            stored = {name: tensor.clone() for name, tensor in optimizer_tensors(second, parted).items()}
            second = adamw(parted, LR, BETAS, EPS, DECAY)
            restore_optimizer(second, parted, stored)
        for name, gradient in gradients(step).items():
            whole[name].grad, parted[name].grad = gradient.clone(), gradient.clone()
        first.step()
        second.step()
    assert all(torch.equal(whole[name], parted[name]) for name in whole)
