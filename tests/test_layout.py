"""Size of modules and functions, and what lies at the top of the package."""

import ast
import pathlib

import jaxreg

ROOT = pathlib.Path(jaxreg.__file__).parent
MODULE_LINES = 600
FUNCTION_LINES = 60  # besides the docstring
REASON = "# Long:"  # a comment in the function that says why it is not split


def functions(source: str):
    """Yields each function's name, its lines besides the docstring, and its text."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = lines[node.lineno - 1 : node.end_lineno]
            docstring = ast.get_docstring(node, clean=False)
            spent = len(docstring.splitlines()) if docstring else 0
            yield node.name, len(text) - spent, "\n".join(text)


def too_long(source: str) -> list[str]:
    return [
        f"{name}: {count} lines"
        for name, count, text in functions(source)
        if count > FUNCTION_LINES and REASON not in text
    ]


def test_modules_are_read_in_one_sitting():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in ROOT.rglob("*.py")
    }
    assert lengths
    assert {n: c for n, c in lengths.items() if c > MODULE_LINES} == {}


def test_functions_are_short_or_say_why_not():
    found = {
        str(path.relative_to(ROOT)): long
        for path in ROOT.rglob("*.py")
        if (long := too_long(path.read_text()))
    }
    assert found == {}


def test_a_long_function_is_reported_unless_it_says_why():
    body = "\n".join(f"    x = {i}" for i in range(FUNCTION_LINES + 5))
    assert too_long(f"def f():\n{body}\n") == [f"f: {FUNCTION_LINES + 6} lines"]
    assert too_long(f"def f():\n    {REASON} one table.\n{body}\n") == []
    assert too_long(f'def f():\n    """{body}"""\n') == []


def test_few_files_are_loose():
    assert sorted(path.name for path in ROOT.glob("*.py")) == [
        "__init__.py",
        "demo.py",
        "errors.py",
        "metrics.py",
        "settings.py",
        "typing.py",
    ]
