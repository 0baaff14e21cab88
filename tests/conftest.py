"""Shared by all tests: the golden arrays and the stand-in for torchvision."""

import os
import pathlib
import sys
import types

import numpy as np
import pytest

# Before jax is imported: the grids are tiny, and compiling a network's gradient takes
# far longer than running it. Halves the compile time; numbers agree to rounding.
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_backend_optimization_level=0", os.environ.get("XLA_FLAGS", "")]
).strip()

GOLDEN = pathlib.Path(
    os.environ.get("JAXREG_GOLDEN", pathlib.Path(__file__).parent / "golden")
)


@pytest.fixture(scope="session")
def golden_path():
    """The folder of reference files; JAXREG_GOLDEN replaces it."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden():
    """Reads one file of reference arrays: golden("gradicon_losses")["lncc"]."""
    loaded = {}

    def read(name: str) -> dict[str, np.ndarray]:
        if name not in loaded:
            path = GOLDEN / f"{name}.npz"
            if not path.exists():
                pytest.skip(f"no {path.name} in {GOLDEN}")
            with np.load(path, allow_pickle=False) as arrays:
                loaded[name] = {key: arrays[key] for key in arrays.files}
        return loaded[name]

    return read


@pytest.fixture(scope="session")
def icon():
    """The icon_registration package, or a skip where it is not installed."""
    pytest.importorskip("torch")
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, AttributeError):
        # icon_registration imports it without using it; no CPU build of it may exist.
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = types.ModuleType("torchvision")
    return pytest.importorskip("icon_registration")


@pytest.fixture(scope="session")
def unigradicon(icon):
    """The unigradicon package, or a skip where it is not installed."""
    return pytest.importorskip("unigradicon")
