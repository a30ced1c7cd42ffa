"""Kernels run in Triton's interpreter here, on the CPU; tests/gpu runs them compiled."""

import os
from typing import Any

import pytest

os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def scalars_count_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """`range` takes a scalar of a kernel: the interpreter of Triton 3.6 keeps it as an array that NumPy 2.4 refuses."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
