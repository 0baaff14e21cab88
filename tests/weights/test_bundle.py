"""A checkpoint is whole or absent, and comes back exactly, in host memory."""

import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.errors import UserError
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights.bundle import Bundle, load_bundle, save_bundle


def bundle(value=1.5, **changes):
    variables = {
        "params": {
            "step_1": {
                "down_0": {
                    "kernel": np.arange(162, dtype=np.float32).reshape(3, 3, 3, 2, 3),
                    "bias": np.full(3, value, np.float32),
                }
            }
        },
        "batch_stats": {"step_1": {"norm_0": {"count": np.array(7, np.int32)}}},
    }
    fields = {
        "variables": variables,
        "model": "gradicon",
        "config": {"channels_down": [2, 3], "downsampled_steps": 1},
        "preprocessing": {"shape": [5, 6, 7], "window": [-1000.0, 1000.0]},
        "source": "somewhere; café",
        "licence": "Apache-2.0",
    }
    return Bundle(**(fields | changes))


def assert_same(got, expected):
    for field in dataclasses.fields(Bundle):
        if field.name != "variables":
            assert getattr(got, field.name) == getattr(expected, field.name)
    got_leaves, got_tree = jax.tree.flatten(got.variables)
    leaves, tree = jax.tree.flatten(expected.variables)
    assert got_tree == tree
    for a, b in zip(got_leaves, leaves, strict=True):
        assert type(a) is np.ndarray
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, np.asarray(b))


def test_round_trip_leaves_only_the_checkpoint(tmp_path):
    save_bundle(tmp_path / "best", bundle())
    assert_same(load_bundle(tmp_path / "best"), bundle())
    assert os.listdir(tmp_path) == ["best"]
    assert sorted(os.listdir(tmp_path / "best")) == ["jaxreg.json", "variables"]


def test_round_trip_of_device_arrays_and_types(tmp_path):
    variables = {
        "params": {
            "a": jnp.arange(6.0).reshape(2, 3),
            "b": jnp.ones(3, jnp.bfloat16),
            "c": np.float32(2.0) * np.ones(()),
        }
    }
    save_bundle(tmp_path / "c", bundle(variables=variables))
    loaded = load_bundle(tmp_path / "c").variables["params"]
    assert loaded["b"].dtype == jnp.bfloat16
    assert loaded["c"].shape == ()
    assert all(type(leaf) is np.ndarray for leaf in loaded.values())
    np.testing.assert_array_equal(loaded["a"], np.arange(6.0).reshape(2, 3))


def test_config_tuples_come_back_as_lists(tmp_path):
    save_bundle(tmp_path / "c", bundle(config={"channels_down": (2, 16)}))
    assert load_bundle(tmp_path / "c").config == {"channels_down": [2, 16]}


def test_what_json_cannot_hold_is_found_before_writing(tmp_path):
    with pytest.raises(TypeError):
        save_bundle(tmp_path / "c", bundle(config={"model": object()}))
    assert os.listdir(tmp_path) == []


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_bundle("here", bundle())
    assert_same(load_bundle("here"), bundle())


def test_loads_on_other_devices_than_it_was_saved_from(tmp_path):
    """Orbax itself, saving arrays that lie on four devices."""
    program = f"""
        import jax, jax.numpy as jnp, numpy as np, orbax.checkpoint as ocp
        mesh = jax.sharding.Mesh(np.array(jax.devices()), "x")
        spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        array = jax.device_put(jnp.arange(8.0), spec)
        assert len(array.sharding.device_set) == 4
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save({str(tmp_path / "four")!r}, {{"params": {{"a": array}}}})
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    environment = os.environ | flags | {"JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], check=True, env=environment
    )
    variables = {"params": {"a": np.arange(8, dtype=np.float32)}}
    save_bundle(tmp_path / "one", bundle(variables=variables))
    shutil.rmtree(tmp_path / "one" / "variables")
    (tmp_path / "four").rename(tmp_path / "one" / "variables")
    loaded = load_bundle(tmp_path / "one").variables
    assert type(loaded["params"]["a"]) is np.ndarray
    np.testing.assert_array_equal(loaded["params"]["a"], np.arange(8.0))


def test_replaces_an_older_checkpoint(tmp_path):
    save_bundle(tmp_path / "best", bundle(1.0))
    save_bundle(tmp_path / "best", bundle(2.0, source="new"))
    assert_same(load_bundle(tmp_path / "best"), bundle(2.0, source="new"))
    assert os.listdir(tmp_path) == ["best"]


def test_keeps_an_older_checkpoint_if_told_so(tmp_path):
    save_bundle(tmp_path / "best", bundle(1.0))
    save_bundle(tmp_path / "best", bundle(2.0), replace=False)
    assert_same(load_bundle(tmp_path / "best"), bundle(1.0))
    assert os.listdir(tmp_path) == ["best"]


def test_empty_folder_is_taken(tmp_path):
    (tmp_path / "best").mkdir()
    save_bundle(tmp_path / "best", bundle())
    assert_same(load_bundle(tmp_path / "best"), bundle())


def test_others_may_read_it_as_the_mask_says(tmp_path):
    save_bundle(tmp_path / "best", bundle())
    (tmp_path / "plain").mkdir()
    modes = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("best", "plain")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("existing", [False, True])
def test_failure_leaves_things_as_they_were(tmp_path, monkeypatch, existing):
    if existing:
        save_bundle(tmp_path / "best", bundle(1.0))

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bundle_lib.ocp.Checkpointer, "save", fail)
        with pytest.raises(UserError, match="No space left"):
            save_bundle(tmp_path / "best", bundle(2.0))
    assert os.listdir(tmp_path) == (["best"] if existing else [])
    if existing:
        assert_same(load_bundle(tmp_path / "best"), bundle(1.0))


def test_failure_of_the_last_step_brings_the_older_one_back(tmp_path, monkeypatch):
    save_bundle(tmp_path / "best", bundle(1.0))
    rename = bundle_lib.pathlib.Path.rename
    calls = []

    def fail_to_arrive(self, target):
        calls.append(self)
        if len(calls) == 3:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(bundle_lib.pathlib.Path, "rename", fail_to_arrive)
        with pytest.raises(UserError, match="Input/output"):
            # Renames: onto the older one (refused), it aside, ours in, it back.
            save_bundle(tmp_path / "best", bundle(2.0))
    assert len(calls) == 4
    assert os.listdir(tmp_path) == ["best"]
    assert_same(load_bundle(tmp_path / "best"), bundle(1.0))


def test_many_writers_at_once_leave_one_whole_checkpoint(tmp_path):
    threads = [
        threading.Thread(
            target=save_bundle,
            args=(tmp_path / "best", bundle(float(i))),
            kwargs={"replace": False},
        )
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.listdir(tmp_path) == ["best"]
    bias = load_bundle(tmp_path / "best").variables["params"]["step_1"]["down_0"][
        "bias"
    ]
    assert len(set(bias.tolist())) == 1


def test_nothing_of_others_is_replaced(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(UserError, match="no jaxreg checkpoint"):
            save_bundle(tmp_path / name, bundle())
    with pytest.raises(UserError, match="no folder"):
        save_bundle(tmp_path / "none" / "best", bundle())
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def _foreign(path):
    shutil.rmtree(path)
    with bundle_lib.ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, {"a": np.ones(2)})


def _become_file(path):
    shutil.rmtree(path)
    path.write_text("")


def _become_empty(path):
    shutil.rmtree(path)
    path.mkdir()


def _each(pattern, change):
    def damage(path):
        for file in (path / "variables").rglob(pattern):
            change(file)

    return damage


def _other_numbers(path):
    """The arrays of another checkpoint of the same structure."""
    save_bundle(path.with_name("other"), bundle(2.5))
    shutil.rmtree(path / "variables")
    (path.with_name("other") / "variables").rename(path / "variables")


def _describe(**changes):
    def damage(path):
        file = path / "jaxreg.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


DAMAGES = {
    "missing": shutil.rmtree,
    "file": _become_file,
    "empty folder": _become_empty,
    "foreign": _foreign,
    "no arrays": lambda path: shutil.rmtree(path / "variables"),
    "unfinished arrays": lambda path: (path / "variables").rename(
        path / "variables.orbax-checkpoint-tmp"
    ),
    "empty arrays": lambda path: _become_empty(path / "variables"),
    "no metadata": lambda path: (path / "variables" / "_METADATA").unlink(),
    "broken metadata": _each("_METADATA", lambda file: file.write_text("{")),
    "cut data": _each("d/*", lambda file: file.write_bytes(file.read_bytes()[:20])),
    "no data": _each("d/*", lambda file: file.unlink()),
    "no manifest": _each("manifest.ocdbt", lambda file: file.unlink()),
    "other numbers": _other_numbers,
    "broken JSON": lambda path: (path / "jaxreg.json").write_text('{"format": '),
    "other JSON": lambda path: (path / "jaxreg.json").write_text("[1, 2]"),
    "newer": _describe(version=99),
    "no config": _describe(config=None),
}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "does not exist"),
        ("file", "is a file"),
        ("empty folder", "no jaxreg.json"),
        ("foreign", "no jaxreg.json"),
        ("no arrays", "unfinished or damaged"),
        ("unfinished arrays", "unfinished or damaged"),
        ("empty arrays", "unfinished or damaged"),
        ("no metadata", "unfinished or damaged"),
        ("broken metadata", "unfinished or damaged"),
        ("cut data", "unfinished or damaged"),
        ("no data", "unfinished or damaged"),
        ("no manifest", "unfinished or damaged"),
        ("other numbers", "checksum"),
        ("broken JSON", "cannot be read as JSON"),
        ("other JSON", "does not describe"),
        ("newer", "version 99.*newer jaxreg"),
        ("no config", "usable config"),
    ],
)
def test_other_folders_are_refused_in_one_sentence(tmp_path, kind, words):
    path = tmp_path / "best"
    save_bundle(path, bundle())
    DAMAGES[kind](path)
    with pytest.raises(UserError, match=words) as error:
        load_bundle(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_saving_and_loading_print_nothing(tmp_path):
    program = f"""
        import numpy as np
        from jaxreg.weights.bundle import Bundle, load_bundle, save_bundle
        path = {str(tmp_path / "c")!r}
        variables = {{"params": {{"a": np.ones(2)}}}}
        save_bundle(path, Bundle(variables, "m", {{}}, {{}}, "", ""))
        load_bundle(path)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        check=True,
        capture_output=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert result.stdout == b""
    assert result.stderr == b""
