"""What no linter at hand says of the package."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "gmsa"
LONGEST = 80  # lines of a function


def test_no_function_is_too_long_to_be_read_at_once() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                found += [f"{path.name}: {node.name} has {lines} lines"] if lines > LONGEST else []
    assert found == []
