"""Post-training for language models: a base model and a data set in, an assistant out."""

import os

__version__ = "0.1.0"

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "expandable_segments:True")
"""What the environment has PyTorch's allocator do, unless it says something else of it: CUDA memory without gaps."""
if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
    os.environ.update([ALLOCATOR])  # PyTorch reads it when it puts a first tensor on a device
