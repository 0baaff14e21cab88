"""Shared by all tests: the golden arrays and the stand-in for torchvision."""

import gc
import json
import locale
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import types

import numpy as np
import pytest
import SimpleITK as sitk

# Before jax is imported: the grids are tiny, and compiling a network's gradient takes
# far longer than running it. XLA's older code generator takes half the time of its
# present one, and splitting a program among threads costs more than it gains. Numbers
# agree to rounding; what XLA_FLAGS says already comes last and counts.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
        os.environ.get("XLA_FLAGS", ""),
    ]
).strip()

# A program that several tests compile is compiled once: the processes of a run share a
# folder, those that the tests start as well.
STARTED_HERE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if STARTED_HERE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxreg-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

# Tracing makes millions of small objects, and a worker holds more of them with each
# file: looking through all for garbage at Python's own rate is a tenth of a run.
gc.set_threshold(100_000, 20, 100)

TESTS = pathlib.Path(__file__).parent
# Whole files go to the workers of a run. One that takes minutes starts early, or the
# others wait for it at the end. With --no-loadscope-reorder: xdist would start with the
# files of most tests, which are short ones.
LONGEST = (
    "models/test_gradicon.py",
    "test_notebooks.py",
    "test_pages.py",
    "models/test_promptreg.py",
    "experiments/test_run.py",
    "experiments/test_configs.py",
    "registration/optimization/test_network.py",
    "training/test_parallel.py",
    "registration/prealign/test_select.py",
    "cli/test_main.py",
    "cli/test_train.py",
    "experiments/test_sam.py",
    "training/test_traced.py",
    "training/test_train_step.py",
    "models/test_sam.py",
)

GOLDEN = pathlib.Path(os.environ.get("JAXREG_GOLDEN", TESTS / "golden"))


def pytest_collection_modifyitems(items):
    """Puts the longest files first; the order within a file stays."""
    place = {TESTS / name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_unconfigure():
    """Removes the compiled programs, where this process made their folder."""
    if STARTED_HERE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


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


@pytest.fixture(scope="session")
def on_devices():
    """Runs a program on simulated devices: on_devices(4, path, *arguments).

    Returns what the last line that it prints says in JSON.
    """

    def run(count: int, *command: str | os.PathLike[str]):
        flag = "--xla_force_host_platform_device_count"
        flags = re.sub(rf"{flag}=\d+", "", os.environ["XLA_FLAGS"])
        done = subprocess.run(
            [sys.executable, *command],
            env={
                **os.environ,
                "XLA_FLAGS": f"{flags} {flag}={count}",
                "JAX_PLATFORMS": "cpu",
            },
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def dicom_series():
    """Writes a series: dicom_series(folder, array), int16 D H W of 1.5 x 2 x 3 mm."""

    def write(folder: pathlib.Path, array: np.ndarray, intercept=-1024) -> None:
        # SimpleITK's writer of DICOM sets the process's locale to "C".
        before = locale.setlocale(locale.LC_ALL)
        folder.mkdir(exist_ok=True)
        for k, plane in enumerate(array):
            image = sitk.GetImageFromArray(plane)
            image.SetSpacing((1.5, 2.0))
            tags = {
                "0020|000e": "1.2.3.4", "0020|000d": "1.2.3", "0008|0060": "CT",
                "0020|0032": f"-10\\5\\{20 + 3 * k}", "0020|0037": "1\\0\\0\\0\\1\\0",
                "0020|0013": str(k), "0008|0018": f"1.2.3.4.{k + 1}",
                "0028|1052": str(intercept), "0028|1053": "1",
            }  # fmt: skip
            for key, value in tags.items():
                image.SetMetaData(key, value)
            writer = sitk.ImageFileWriter()
            writer.KeepOriginalImageUIDOn()
            writer.SetFileName(str(folder / f"{k}.dcm"))
            writer.Execute(image)
        locale.setlocale(locale.LC_ALL, before)

    return write
