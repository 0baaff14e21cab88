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


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Runs of the same program find it compiled."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
