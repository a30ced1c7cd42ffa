"""Fails when the package outgrows its budget of size, or breaks a rule of structure that layers cannot express."""

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

FILE_LINES, FUNCTION_LINES, P90_FUNCTION_LINES, ARGUMENTS = 400, 80, 40, 8
FORBIDDEN_NAMES = {"utils.py", "common.py", "helpers.py", "base.py", "misc.py"}
RECIPE_FORBIDDEN = (".backward(", "optimizer.step(", "all_reduce", "clip_grad")
METHODS = {"sft", "dpo", "ppo", "grpo", "rloo", "reinforce", "reward"}
TORCH_FREE = {"config.py", "settings.py", "cli.py", "families.py", "preflight.py", "formats.py"}
LOSSES_MAY_IMPORT = ("burnish.losses", "burnish.ops.sequences", "burnish.types")


def main() -> None:
    """Prints every violation and exits with 1 when there is one."""
    problems: list[str] = []
    lengths: list[int] = []
    for path in sorted(Path("burnish").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        problems += file_problems(path, source)
        problems += import_problems(path, tree)
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            lengths.append(function.end_lineno - function.lineno + 1)
            if "kernels" not in path.parts:
                problems += function_problems(path, function)
    p90 = sorted(lengths)[int(0.9 * len(lengths))]
    if p90 > P90_FUNCTION_LINES:
        problems.append(f"nine of ten functions should have at most {P90_FUNCTION_LINES} lines, not {p90}")
    print("\n".join(problems) or f"structure kept: {len(lengths)} functions, nine of ten within {p90} lines")
    sys.exit(bool(problems))


def file_problems(path: Path, source: str) -> Iterator[str]:
    """What is wrong with a file as a whole."""
    if path.name in FORBIDDEN_NAMES:
        yield f"{path}: a file with this name has no subject; a function without a home is a missing noun"
    if (count := len(source.splitlines())) > FILE_LINES:
        yield f"{path}: {count} lines, over {FILE_LINES}"
    if "recipes" in path.parts:
        yield from (f"{path}: a recipe may not contain {word}" for word in RECIPE_FORBIDDEN if word in source)
    if path.name == "learner.py":
        words = {"".join(filter(str.isalpha, word)) for word in source.lower().split()}
        yield from (f"{path}: the learner names the method {name}" for name in sorted(METHODS & words))


def function_problems(path: Path, function: ast.FunctionDef) -> Iterator[str]:
    """What is wrong with a function's size."""
    length = function.end_lineno - function.lineno + 1
    given = function.args
    arguments = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in ("self", "cls")]
    if length > FUNCTION_LINES:
        yield f"{path}:{function.lineno}: {function.name} has {length} lines, over {FUNCTION_LINES}"
    if len(arguments) > ARGUMENTS:
        yield f"{path}:{function.lineno}: {function.name} has {len(arguments)} arguments, over {ARGUMENTS}"


def import_problems(path: Path, tree: ast.Module) -> Iterator[str]:
    """Imports that are allowed to some folders only, or only inside functions."""
    folder = path.parts[1]
    for name in imported(path, ast.walk(tree)):
        if within(name, "torch.distributed") and folder != "engine":
            yield f"{path}: torch.distributed is spoken in engine/ only"
        if within(name, "burnish.kernels") and folder not in ("ops", "optim", "kernels"):
            yield f"{path}: kernels are imported by ops/ and optim/ only"
        if within(name, "burnish") and folder == "losses" and not any(within(name, some) for some in LOSSES_MAY_IMPORT):
            yield f"{path}: a loss imports nothing of ours but {' and '.join(LOSSES_MAY_IMPORT)}, not {name}"
    if path.name in TORCH_FREE:
        for name in imported(path, run_on_import(tree)):
            if within(name, "torch"):
                yield f"{path}: {name} is imported at the top: errors come before torch loads, so a function imports it"


def imported(path: Path, nodes: Iterable[ast.AST]) -> Iterator[str]:
    """What these nodes import, and what of `torch` they reach by its full name: `from a import b` gives `a.b`."""
    for node in nodes:
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                start = [*path.with_suffix("").parts[: -node.level]] if node.level else []
                module = ".".join([*start, *filter(None, [node.module])])
                yield from (f"{module}.{alias.name}" for alias in node.names)
            case ast.Attribute(value=ast.Name(id="torch")):
                yield f"torch.{node.attr}"


def run_on_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: all but those in functions and under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                pass
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                for other in node.orelse:
                    yield other
                    yield from run_on_import(other)
            case _:
                yield node
                yield from run_on_import(node)


def within(name: str, package: str) -> bool:
    """Whether the dotted name is the package or something in it."""
    return f"{name}.".startswith(f"{package}.")


if __name__ == "__main__":
    main()
