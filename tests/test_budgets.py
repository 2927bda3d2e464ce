"""Limits of size, so that what grows too large is noticed when it does.

A package's limit counts lines of code: no blank lines, comments or docstrings. Raise one only together
with the capability that needs it, and name that in the commit.
"""

import ast
import io
import tokenize
from pathlib import Path

import pytest

import megadistill

PACKAGE = Path(megadistill.__file__).parent
MOST_LINES = 400
"""Of a module, all counted."""
MOST_FUNCTION_LINES = 60
BUDGETS = {
    "": 2010,
    "algorithms": 1030,
    "cli": 520,
    "config": 1275,
    "convert": 1141,
    "data": 1170,
    "evaluate": 3060,
    "head": 1260,
    "inference": 620,
    "launch": 3030,
    "losses": 210,
    "megatron": 1762,
    "prepare": 490,
    "publish": 118,
    "recipes": 120,
    "refine": 1560,
    "report": 880,
    "rollout": 1050,
}
"""Package -> most lines of code; "" are the modules beside the packages."""
NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


def code_lines(text: str) -> int:
    """Lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        for child in getattr(node, "body", []) if isinstance(node, ast.stmt | ast.mod) else []:
            if is_text(child):
                lines.difference_update(range(child.lineno, child.end_lineno + 1))
    return len(lines)


def is_text(node: ast.stmt) -> bool:
    """Whether a statement is a docstring, of whatever stands before it."""
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def modules(package: str) -> list[Path]:
    return sorted((PACKAGE / package).rglob("*.py") if package else PACKAGE.glob("*.py"))


@pytest.mark.parametrize("package", BUDGETS)
def test_a_package_fits_its_budget(package: str) -> None:
    total = sum(code_lines(module.read_text(encoding="utf-8")) for module in modules(package))
    assert 0 < total <= BUDGETS[package]


def test_every_package_has_a_budget() -> None:
    packages = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*/*.py")}
    assert packages == BUDGETS.keys() - {""}


@pytest.mark.parametrize(
    "module", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_a_module_and_its_functions_fit_their_budget(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MOST_FUNCTION_LINES, node.name


def test_code_is_counted_without_blanks_comments_and_docstrings() -> None:
    text = '"""Doc.\n\nMore."""\n\nx = 1  # one\n"""Of x."""\n# no\ny = """a\nb"""\n'
    assert code_lines(text) == 3
