"""Kernels run in Triton's interpreter here, on the CPU; tests/gpu runs them compiled."""

import os
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests here want the interpreter, which `tests/conftest.py` asks for where there is no GPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        for item in items:
            if item.path.parent.name == "kernels":
                item.add_marker(pytest.mark.skip(reason="on a GPU these tests need TRITON_INTERPRET=1"))


@pytest.fixture(autouse=True)
def scalars_count_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """`range` takes a scalar of a kernel: the interpreter of Triton 3.6 keeps it as an array that NumPy 2.4 refuses."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
