"""Fails when the package outgrows its budget of size: what keeps it readable in an afternoon."""

import ast
import sys
from pathlib import Path

FILE_LINES, FUNCTION_LINES, P90_FUNCTION_LINES, ARGUMENTS = 400, 80, 40, 8
FORBIDDEN_NAMES = {"utils.py", "common.py", "helpers.py", "base.py", "misc.py"}
RECIPE_FORBIDDEN = (".backward(", "optimizer.step(", "all_reduce", "clip_grad")
LEARNER_FORBIDDEN = ("sft", "dpo", "ppo", "grpo", "reward")


def main() -> None:
    """Prints every violation and exits with 1 when there is one."""
    problems: list[str] = []
    lengths: list[int] = []
    for path in sorted(Path("burnish").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if path.name in FORBIDDEN_NAMES:
            problems.append(
                f"{path}: a file with this name has no subject; a function without a home is a missing noun"
            )
        if (count := len(source.splitlines())) > FILE_LINES:
            problems.append(f"{path}: {count} lines, over {FILE_LINES}")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                lengths.append(length)
                arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if length > FUNCTION_LINES and "kernels" not in path.parts:
                    problems.append(f"{path}:{node.lineno}: {node.name} has {length} lines, over {FUNCTION_LINES}")
                if len([a for a in arguments if a not in ("self", "cls")]) > ARGUMENTS and "kernels" not in path.parts:
                    problems.append(f"{path}:{node.lineno}: {node.name} has over {ARGUMENTS} arguments")
        if "recipes" in path.parts:
            problems += [f"{path}: a recipe may not contain {word}" for word in RECIPE_FORBIDDEN if word in source]
        if path.name == "learner.py":
            words = source.lower().replace(".", " ").split()
            problems += [f"{path}: the learner names the method {name}" for name in LEARNER_FORBIDDEN if name in words]
    p90 = sorted(lengths)[int(0.9 * len(lengths))]
    if p90 > P90_FUNCTION_LINES:
        problems.append(
            f"nine of ten functions should have at most {P90_FUNCTION_LINES} lines; the limit stands at {p90}"
        )
    print("\n".join(problems) or f"size budget kept: {len(lengths)} functions, nine of ten within {p90} lines")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
