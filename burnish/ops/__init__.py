"""Tensor maths: the reference in plain PyTorch, then the choice of kernel."""
