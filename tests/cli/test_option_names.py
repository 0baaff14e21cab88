"""Errors of the package name fields; options are the command line's own."""

import ast
import pathlib
import re

import jaxreg

PACKAGE = pathlib.Path(jaxreg.__file__).parent
OPTION = re.compile(r"(?<![\w-])--[a-z{]")
# A whole command that is quoted, as "jaxreg train --config configs/sam.py".
COMMAND = re.compile(r"jaxreg [a-z-]+ (?:[\w./-]+ )*$")


def options_in(source: str) -> list[str]:
    """Returns the strings that name an option, but for docstrings and commands."""
    tree = ast.parse(source)
    docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    ]
    return [
        text
        for text in texts
        for found in OPTION.finditer(text + "{" * text.endswith("--"))
        if not COMMAND.search(text[: found.start()])
    ]


def test_what_is_looked_for_is_found():
    source = '"""--doc"""\nx = f"give --io-lr {y}"\ny = "see jaxreg train --config c"\n'
    assert options_in(source) == ["give --io-lr "]
    assert options_in('x = f"--{name} is bad"') == ["--"]


def test_no_module_of_the_package_names_an_option():
    """The demonstration is part of the command line."""
    found = {
        path.relative_to(PACKAGE).as_posix(): named
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "cli"
        and path.name != "demo.py"
        and (named := options_in(path.read_text(encoding="utf-8")))
    }
    assert found == {}
