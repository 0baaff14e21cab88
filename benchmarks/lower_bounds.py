"""Whether the oldest versions that pyproject.toml allows still do the work.

    python benchmarks/lower_bounds.py
    python benchmarks/lower_bounds.py --folder oldest --extra torch tests/weights
    python benchmarks/lower_bounds.py --set jax=0.8.0 --set flax=0.12.1

Makes a virtual environment with every dependency of the package, and those of each
--extra and of the tests named in _TESTING, at exactly its lower bound, then runs a
smoke subset of the tests in it: two scans registered, steps of training, checkpoints,
PyTorch's files, scans and transforms read and written, and every page of the
documentation. --set tries another version of one package, to find where a bound must
lie. A bound that fails is raised in pyproject.toml; there is no second list.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile
import tomllib
import venv

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = (
    "tests/test_imports.py",
    "tests/test_pages.py",
    "tests/io/test_itk_images.py",
    "tests/io/test_transforms.py",
    "tests/io/test_volumes.py",
    "tests/registration/test_pair.py",
    "tests/registration/test_report.py",
    "tests/training/test_checkpoints.py",
    "tests/training/test_train_step.py",
    "tests/weights/pytorch/test_reader.py",
)
_TESTING = ("beartype", "chex", "hypothesis", "pytest")
_NAME = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*\])?\s*(?:>=|==)\s*([0-9.]+)$")


def lower_bounds(extras: list[str]) -> dict[str, str]:
    """Returns the oldest version that pyproject.toml allows, by name of package.

    Args:
      extras: optional dependencies to include, besides what runs the tests.

    Raises:
      SystemExit: a requirement is not of the form ``name>=version``.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    asked = [*project["dependencies"]]
    asked += [text for extra in extras for text in optional[extra]]
    found = {}
    for text in [*asked, *optional["test"]]:
        match = _NAME.match(text)
        if match is None:
            raise SystemExit(f"pyproject.toml: {text} states no lower bound")
        if text in asked or match[1] in _TESTING:
            found[match[1]] = match[2]
    return found


def main() -> int:
    """Installs, runs, and returns the tests' exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tests", nargs="*", default=SMOKE)
    parser.add_argument("--folder", help="of the environment, which is then kept")
    parser.add_argument("--extra", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VERSION")
    args = parser.parse_args()
    bounds = lower_bounds(args.extra)
    bounds.update(text.split("=", 1) for text in args.set)
    pins = [f"{name}=={number}" for name, number in sorted(bounds.items())]
    print(*pins, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(args.folder or temporary)
        venv.create(folder, with_pip=True)
        python = folder / "bin" / "python"
        for what in (pins, ["--no-deps", "--editable", str(ROOT)]):
            subprocess.run([python, "-m", "pip", "install", "-q", *what], check=True)
        command = [python, "-m", "pytest", "-q", "-m", "not slow", *args.tests]
        return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
