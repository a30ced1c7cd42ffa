"""Kernels run in Triton's interpreter here, on the CPU; tests/gpu runs them compiled."""

import os

os.environ["TRITON_INTERPRET"] = "1"
