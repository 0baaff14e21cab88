"""Weights by name and by path, against a server that misbehaves in every way."""

import concurrent.futures
import dataclasses
import http.server
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import threading
import warnings

import jax
import numpy as np
import pytest

from jaxreg.data.network_grid import ResamplingRule
from jaxreg.errors import UserError
from jaxreg.io import files
from jaxreg.models import registry, sam
from jaxreg.models.gradicon import GradIcon, GradIconConfig
from jaxreg.models.promptreg import PromptReg, PromptRegConfig
from jaxreg.models.rdp import Rdp, RdpConfig
from jaxreg.models.unireg.released import UniRegRpn
from jaxreg.registration import conditioning
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import convert, download, listing, load, zoo
from jaxreg.weights.pytorch import gradicon, unireg_rpn
from jaxreg.weights.pytorch import sam as sam_lib
from jaxreg.weights.pytorch import state as state_lib
from jaxreg.weights.pytorch.promptreg import RDP

SMALL = {
    "channels_down": (2, 3, 5),
    "channels_up": (4, 3),
    "downsampled_steps": 1,
    "fullres_steps": 1,
}
ASSET = "small_weights/Step_2_final.trch"


def random_state(config=SMALL, seed=0):
    rng = np.random.default_rng(seed)
    return {
        entry.key: np.array(seed, np.int64)
        if entry.is_count
        else rng.normal(size=entry.torch_shape).astype(np.float32)
        for entry in gradicon.TABLE.entries(config)
    }


def write_trch(path, config=SMALL, seed=0):
    state_lib.write_state_dict(path, random_state(config, seed))
    return path


def assert_is_random_state(variables, seed=0):
    expected = gradicon.TABLE.to_variables(random_state(seed=seed))
    leaves, tree = jax.tree.flatten(expected)
    got, got_tree = jax.tree.flatten(variables)
    assert got_tree == tree
    for a, b in zip(got, leaves, strict=True):
        assert type(a) is np.ndarray
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def small(monkeypatch):
    """A small network under a name of its own."""
    pytest.importorskip("torch")
    card = dataclasses.replace(zoo.ZOO["unigradicon"], config=SMALL, asset=ASSET)
    monkeypatch.setitem(zoo.ZOO, "small", card)
    return card


class Server(http.server.ThreadingHTTPServer):
    """Answers /ASSET with `body` in the way of `behaviour`."""

    daemon_threads = True
    body = b""
    behaviour = "good"
    requests = 0
    release = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self.server.requests += 1
        body, behaviour = self.server.body, self.server.behaviour
        if behaviour == "missing" or self.path != f"/{ASSET}":
            self.send_error(404)
            return
        self.send_response(200)
        if behaviour != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if behaviour == "truncated":
            body = body[: len(body) // 2]
        elif behaviour == "corrupted":
            body = bytes(len(body))
        elif behaviour == "flipped":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        elif behaviour == "slow":
            self.wfile.write(body[:100])
            self.wfile.flush()
            self.server.release.wait(20)
            return
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    path = write_trch(tmp_path_factory.mktemp("server") / "weights.trch")
    server = Server(("127.0.0.1", 0), Handler)
    server.body = path.read_bytes()
    server.release = threading.Event()
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}
    )
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


def url(server):
    return f"http://127.0.0.1:{server.server_address[1]}"


# ---- by name ----


@pytest.mark.torch
@pytest.mark.parametrize("behaviour", ["good", "no length"])
def test_name_is_fetched_once_and_converted(small, server, tmp_path, behaviour):
    server.behaviour = behaviour
    cache = tmp_path / "not" / "yet"
    calls = []
    loaded = load.load(
        "small",
        cache_dir=cache,
        base_url=url(server) + "/",
        progress=lambda *call: calls.append(call),
    )
    assert_is_random_state(loaded.variables)
    assert loaded.name == "small"
    assert loaded.model == GradIcon(GradIconConfig(**SMALL))
    assert loaded.bundle.licence == small.licence
    size = len(server.body)
    assert calls[-1] == (size, size if behaviour == "good" else None)
    assert os.listdir(cache) == ["small"]

    again = load.load("small", cache_dir=cache, base_url="http://127.0.0.1:9")
    assert server.requests == 1
    assert_is_random_state(again.variables)
    assert again.model == loaded.model
    assert again.bundle.preprocessing == loaded.bundle.preprocessing


@pytest.mark.torch
def test_digest_of_the_first_fetch_is_recorded(small, server, tmp_path):
    load.load("small", cache_dir=tmp_path, base_url=url(server))
    description = json.loads((tmp_path / "small" / "jaxreg.json").read_text())
    body = tmp_path / "body"
    body.write_bytes(server.body)
    assert f"sha256 {files.sha256(body)} as first seen" in description["source"]
    assert url(server) in description["source"]


@pytest.mark.torch
def test_published_digest_is_checked(small, server, tmp_path, monkeypatch):
    card = dataclasses.replace(small, sha256="0" * 64)
    monkeypatch.setitem(zoo.ZOO, "small", card)
    with pytest.raises(UserError, match="expected 0000"):
        load.load("small", cache_dir=tmp_path, base_url=url(server))
    assert os.listdir(tmp_path) == []


@pytest.mark.torch
@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("missing", r"cannot be fetched \(HTTP 404"),
        ("truncated", r"cannot be fetched \(.*bytes"),
        ("corrupted", "not a PyTorch file"),
        ("flipped", "damaged"),
        ("slow", r"cannot be fetched \(.*timed out"),
    ],
)
def test_bad_answer_leaves_nothing_and_a_retry_works(
    small, server, tmp_path, behaviour, words
):
    server.behaviour = behaviour
    options = {"cache_dir": tmp_path, "base_url": url(server), "timeout_s": 0.5}
    with pytest.raises(UserError, match=words) as error:
        load.load("small", **options)
    assert f"{url(server)}/{ASSET}" in str(error.value)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []
    server.behaviour = "good"
    assert_is_random_state(load.load("small", **options).variables)
    assert os.listdir(tmp_path) == ["small"]


@pytest.mark.torch
@pytest.mark.parametrize("base_url", ["http://127.0.0.1:9", "nonsense", "x://y"])
def test_offline_says_what_to_download_and_where_to_put_it(
    small, tmp_path, monkeypatch, base_url
):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError) as error:
        load.load("small", cache_dir=tmp_path, base_url=base_url)
    by_hand = tmp_path / "small.trch"
    assert f"download {base_url}/{ASSET} and put it at {by_hand}" in str(error.value)
    assert "`io_target` displacement" in str(error.value)
    assert os.listdir(tmp_path) == []
    # Which then works.
    write_trch(by_hand, seed=4)
    loaded = load.load("small", cache_dir=tmp_path, base_url=base_url)
    assert_is_random_state(loaded.variables, seed=4)
    assert sorted(os.listdir(tmp_path)) == ["small", "small.trch"]
    assert "by hand" in loaded.bundle.source


@pytest.mark.torch
def test_bad_file_put_there_by_hand_is_named(small, tmp_path):
    (tmp_path / "small.trch").write_text("")
    with pytest.raises(UserError, match="small.trch is empty"):
        load.load("small", cache_dir=tmp_path)
    (tmp_path / "small.trch").write_text("<html>")
    with pytest.raises(UserError, match="not a PyTorch file") as error:
        load.load("small", cache_dir=tmp_path)
    assert str(tmp_path / "small.trch") in str(error.value)
    assert os.listdir(tmp_path) == ["small.trch"]


@pytest.mark.torch
def test_other_sizes_than_published_are_refused(small, tmp_path):
    write_trch(tmp_path / "small.trch", SMALL | {"fullres_steps": 0})
    with pytest.raises(UserError, match="'fullres_steps': 0.*uniGradICON has"):
        load.load("small", cache_dir=tmp_path)
    assert os.listdir(tmp_path) == ["small.trch"]


@pytest.mark.torch
def test_damaged_cache_says_what_to_remove(small, tmp_path):
    write_trch(tmp_path / "small.trch")
    load.load("small", cache_dir=tmp_path)
    (tmp_path / "small" / "variables" / "_METADATA").unlink()
    with pytest.raises(UserError, match="Remove .*small to fetch it anew"):
        load.load("small", cache_dir=tmp_path)


@pytest.mark.torch
def test_many_loads_at_once(small, server, tmp_path):
    options = {"cache_dir": tmp_path, "base_url": url(server)}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(load.load, "small", **options) for _ in range(8)]
        for loaded in running:
            assert_is_random_state(loaded.result(timeout=60).variables)
    assert os.listdir(tmp_path) == ["small"]


@pytest.mark.slow
@pytest.mark.torch
def test_two_processes_at_once(small, server, tmp_path):
    program = f"""
        import dataclasses
        from jaxreg.weights import load, zoo
        card = dataclasses.replace(
            zoo.ZOO["unigradicon"], config={SMALL!r}, asset={ASSET!r}
        )
        zoo.ZOO["small"] = card
        for _ in range(3):
            load.load("small", cache_dir={str(tmp_path)!r}, base_url={url(server)!r})
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    running = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert os.listdir(tmp_path) == ["small"]
    assert_is_random_state(load.load("small", cache_dir=tmp_path).variables)


@pytest.mark.torch
def test_fetching_and_converting_need_no_torch(small, server, tmp_path, monkeypatch):
    path = write_trch(tmp_path / "mine.trch", seed=2)
    monkeypatch.setitem(sys.modules, "torch", None)
    loaded = load.load("small", cache_dir=tmp_path / "cache", base_url=url(server))
    assert_is_random_state(loaded.variables)
    convert.convert(path, tmp_path / "mine")
    assert_is_random_state(load.load(tmp_path / "mine").variables, seed=2)
    with pytest.raises(UserError, match=r'pip install "jaxreg\[torch\]"'):
        convert.convert(tmp_path / "mine", tmp_path / "back.trch")


@pytest.mark.torch
def test_cache_that_cannot_be_made_is_answered(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="JAXREG_CACHE"):
        load.load("small", cache_dir=tmp_path / "file" / "cache")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXREG_CACHE", str(tmp_path))
    assert download.cache_dir() == tmp_path
    monkeypatch.setenv("JAXREG_CACHE", "")
    assert download.cache_dir().name == "jaxreg"


@pytest.mark.parametrize("name", ["unigradicn", "UniGradICON", "multigradicn"])
def test_unknown_name_is_answered_with_near_ones(name):
    with pytest.raises(UserError, match="did you mean .*gradicon.*expected one of"):
        load.load(name)
    with pytest.raises(UserError, match="no model 'xyz'; expected one of unigradicon"):
        load.load("xyz")


def test_cards_state_the_sizes_that_follow_from_their_config():
    for card in zoo.ZOO.values():
        entries = gradicon.TABLE.entries(card.config)
        trained = sum(int(np.prod(e.shape)) for e in entries if e.path[0] == "params")
        assert trained == card.parameters
        assert card.preprocessing["shape"] == [175, 175, 175]
        assert GradIconConfig(**card.config) == GradIconConfig()


def test_urls_are_those_of_the_release():
    url = "https://github.com/uncbiag/uniGradICON/releases/download"
    rows = {row.name: row for row in listing.describe(cache_dir="/nowhere")}
    for name in ("unigradicon", "multigradicon"):
        assert rows[name].location == (
            f"not downloaded: {url}/{name}_weights/Step_2_final.trch"
        )
        assert rows[name].grid == (175, 175, 175)
        assert rows[name].licence
        assert rows[name].coverage


@pytest.mark.torch
def test_describe_says_where_it_is(small, tmp_path):
    def location():
        rows = listing.describe(cache_dir=tmp_path)
        return next(row.location for row in rows if row.name == "small")

    assert location().startswith("not downloaded: https://")
    write_trch(tmp_path / "small.trch")
    assert location() == str(tmp_path / "small.trch")
    load.load("small", cache_dir=tmp_path)
    assert location() == str(tmp_path / "small")


# ---- by path ----


@pytest.mark.torch
def test_path_of_a_pytorch_file_and_of_a_checkpoint(tmp_path):
    pytest.importorskip("torch")
    path = write_trch(tmp_path / "mine.pth", seed=2)
    loaded = load.load(path)
    assert_is_random_state(loaded.variables, seed=2)
    assert loaded.model == GradIcon(GradIconConfig(**SMALL))
    assert loaded.name == str(path)
    convert.convert(path, tmp_path / "mine")
    again = load.load(tmp_path / "mine")
    assert_is_random_state(again.variables, seed=2)
    assert again.model == loaded.model
    assert again.bundle.source == loaded.bundle.source


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.trch", "does not exist"),
        ("none/best", "does not exist"),
        ("a" * 300, "does not exist"),
        ("a" * 300 + ".trch", "does not exist"),
        ("text.txt", "file of another kind"),
        ("folder", "no jaxreg.json"),
    ],
)
def test_bad_paths(tmp_path, name, words):
    (tmp_path / "text.txt").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=words) as error:
        load.load(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.torch
def test_another_architecture_is_refused(tmp_path):
    pytest.importorskip("torch")
    state = {"backbone.conv1.weight": np.zeros((4, 1, 3, 3, 3), np.float32)}
    state_lib.write_state_dict(tmp_path / "rdp.pth", state)
    with pytest.raises(UserError, match="expected the tensors of a uniGradICON"):
        load.load(tmp_path / "rdp.pth")
    with pytest.raises(UserError, match="backbone.conv1.weight"):
        convert.convert(tmp_path / "rdp.pth", tmp_path / "rdp")
    assert os.listdir(tmp_path) == ["rdp.pth"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "voxelmorph"}, "'voxelmorph' is not a kind of network"),
        ({"config": SMALL | {"downsampled_steps": 2}}, "missing: params/step_4"),
        ({"config": SMALL | {"depth": 2}}, "depth.*does not know"),
        ({"config": {}}, "fields"),
    ],
)
def test_checkpoints_that_contradict_themselves(tmp_path, changes, words):
    bundle = bundle_lib.Bundle(
        variables=gradicon.TABLE.to_variables(random_state()),
        model="gradicon",
        config=SMALL,
        preprocessing={},
        source="",
        licence="",
    )
    bundle = dataclasses.replace(bundle, **changes)
    bundle_lib.save_bundle(tmp_path / "odd", bundle)
    with pytest.raises(UserError, match=words):
        load.load(tmp_path / "odd")


@pytest.mark.parametrize(
    "config", [SMALL, SMALL | {"downsampled_steps": 2, "fullres_steps": 0}]
)
def test_converted_variables_are_those_the_model_expects(config):
    model = GradIcon(GradIconConfig(**config))
    expected = jax.eval_shape(lambda key: model.init(key), jax.random.key(0))
    variables = gradicon.TABLE.to_variables(random_state(config))
    shapes = jax.tree.map(lambda a: (a.shape, str(a.dtype)), variables)
    assert shapes == jax.tree.map(lambda a: (a.shape, str(a.dtype)), dict(expected))


# ---- convert ----


@pytest.mark.torch
def test_convert_there_and_back_is_exact(tmp_path):
    pytest.importorskip("torch")
    source = write_trch(tmp_path / "a.trch", seed=3)
    convert.convert(source, tmp_path / "b")
    convert.convert(tmp_path / "b", tmp_path / "c.pt", model="unigradicon")
    expected, got = random_state(seed=3), state_lib.read_state_dict(tmp_path / "c.pt")
    assert list(got) == list(expected)
    for key, array in expected.items():
        np.testing.assert_array_equal(got[key], array)
    assert sorted(os.listdir(tmp_path)) == ["a.trch", "b", "c.pt"]


@pytest.mark.torch
@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("a.trch", "z.pth", "both PyTorch files"),
        ("b", "z", "both checkpoint folders"),
        ("none", "z.pt", "none does not exist"),
        ("none.pt", "z", "none.pt does not exist"),
        ("text.txt", "z", "file of another kind"),
        ("a.trch", "none/z", "no folder"),
        ("b", "none/z.pt", "folder that does not exist"),
        ("a.trch", "full", "no jaxreg checkpoint"),
        ("a.trch", "text.txt", "no jaxreg checkpoint"),
        ("a.trch", "z.safetensors", "safetensors"),
        ("b", "dir.pt", "is a folder"),
        ("bad.trch", "z", "not a PyTorch file"),
        ("full", "z.pt", "no jaxreg.json"),
    ],
)
def test_convert_refuses_and_leaves_nothing(tmp_path, source, target, words):
    pytest.importorskip("torch")
    convert.convert(write_trch(tmp_path / "a.trch"), tmp_path / "b")
    (tmp_path / "bad.trch").write_text("bad")
    (tmp_path / "text.txt").write_text("")
    (tmp_path / "dir.pt").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=words):
        convert.convert(tmp_path / source, tmp_path / target)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.torch
def test_convert_refuses_other_models(tmp_path):
    pytest.importorskip("torch")
    source = write_trch(tmp_path / "a.trch")
    with pytest.raises(UserError, match="did you mean gradicon"):
        convert.convert(source, tmp_path / "z", model="gradicn")
    bundle = bundle_lib.Bundle({"params": {}}, "rdp", {}, {}, "", "")
    bundle_lib.save_bundle(tmp_path / "b", bundle)
    with pytest.raises(UserError, match="holds a rdp network"):
        convert.convert(tmp_path / "b", tmp_path / "z.pt", model="gradicon")
    assert sorted(os.listdir(tmp_path)) == ["a.trch", "b"]


# --- PromptReg ----------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.golden
def test_released_promptreg_goes_both_ways(golden, tmp_path):
    torch = pytest.importorskip("torch")
    g = golden("promptreg_small")
    state = {k.removeprefix("state/"): v for k, v in g.items() if "state/" in k}
    tensors = {k: torch.from_numpy(v) for k, v in state.items()}
    content = {"epoch": 3, "model_state_dict": tensors, "optimizer_state_dict": {}}
    torch.save(content, tmp_path / "released.pth")
    convert.convert(tmp_path / "released.pth", tmp_path / "weights")
    model = load.load(tmp_path / "weights")
    assert model.bundle.model == "promptreg"
    assert model.shape == tuple(g["inshape"])
    assert model.model.config.channels == g["channels"]
    assert model.model.config.tasks == g["task_total_number"]
    assert model.model.config.temperature == 0.5
    convert.convert(tmp_path / "weights", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model_state_dict"]
    for key, tensor in tensors.items():
        assert torch.equal(back[key], tensor), key
    assert {k.split(".")[-1] for k in set(back) - set(tensors)} == {"grid"}


@pytest.mark.torch
def test_rdp_goes_both_ways(tmp_path):
    torch = pytest.importorskip("torch")
    config = RdpConfig(channels=2)
    variables = jax.tree.map(np.asarray, Rdp(config).init(jax.random.key(3)))
    bundle = bundle_lib.Bundle(
        variables, "rdp", dataclasses.asdict(config), {"shape": [16, 24, 16]}, "", ""
    )
    bundle_lib.save_bundle(tmp_path / "rdp", bundle)
    convert.convert(tmp_path / "rdp", tmp_path / "rdp.pth")
    written = torch.load(tmp_path / "rdp.pth", weights_only=True)["model_state_dict"]
    assert not any(key.startswith("prompt_") for key in written)
    loaded = load.load(tmp_path / "rdp.pth")
    assert isinstance(loaded.model, Rdp) and loaded.model.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
    with pytest.raises(UserError, match="has no prompt bank; give `model` rdp"):
        convert.convert(tmp_path / "rdp.pth", tmp_path / "bank", model="promptreg")


@pytest.mark.torch
def test_forms_that_the_released_code_lacks_are_not_exported(tmp_path):
    pytest.importorskip("torch")
    config = PromptRegConfig(channels=2, tasks=2, readout="spatial", temperature=0.1)
    variables = PromptReg(config).init(jax.random.key(0), (16, 16, 16))
    bundle = bundle_lib.Bundle(
        jax.tree.map(np.asarray, variables),
        "promptreg",
        dataclasses.asdict(config),
        {"shape": [16, 16, 16], "tasks": ["brain", "hip"]},
        "",
        "",
    )
    bundle_lib.save_bundle(tmp_path / "spatial", bundle)
    loaded = load.load(tmp_path / "spatial")
    assert loaded.model == PromptReg(config) and loaded.task_names == ("brain", "hip")
    with pytest.raises(UserError, match=r"temperature 0\.1, readout spatial, which"):
        convert.convert(tmp_path / "spatial", tmp_path / "spatial.pth")
    assert not (tmp_path / "spatial.pth").exists()


# --- UniReg's released pyramid ------------------------------------------------------


@pytest.mark.torch
@pytest.mark.golden
@pytest.mark.parametrize("prefix", ["", "base_model.net."])
def test_released_unireg_goes_both_ways(golden, tmp_path, prefix):
    torch = pytest.importorskip("torch")
    g = golden("unireg_rpn_small")
    state = {k.removeprefix("state/"): v for k, v in g.items() if "state/" in k}
    tensors = {k: torch.from_numpy(v) for k, v in state.items()}
    wrapped = {prefix + key: tensor for key, tensor in tensors.items()}
    content = {"model_state_dict": wrapped, "arch": "unireg_rpn", "step": 3}
    torch.save(content, tmp_path / "released.pth")
    convert.convert(tmp_path / "released.pth", tmp_path / "weights")
    model = load.load(tmp_path / "weights")
    assert model.bundle.model == "unireg_rpn"
    config = registry.config_of("unireg_rpn", unireg_rpn.TABLE.read_config(state))
    assert model.model == UniRegRpn(config)
    assert len(model.task_names) in (0, config.regions)
    assert model.shape == (160, 192, 192) and model.ct_window == (-150, 250)
    convert.convert(tmp_path / "weights", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model_state_dict"]
    assert list(back) == list(state)
    for key, tensor in tensors.items():
        assert torch.equal(back[key], tensor), key


@pytest.mark.torch
@pytest.mark.golden
def test_regions_keep_their_names_through_pytorch(golden, tmp_path):
    """As the recipe trains them, into the release's order and back."""
    torch = pytest.importorskip("torch")
    g = golden("unireg_rpn_small")
    state = {k.removeprefix("state/"): v for k, v in g.items() if "state/" in k}
    recipe = ("cardiac", "liver", "head", "abdomen", "chest", "brain")
    released_order = ("chest", "abdomen", "head", "liver", "cardiac", "brain")
    # The golden file with its columns moved to where the recipe has these regions.
    moved = dict(state)
    for key in [k for k in state if k.endswith("controller.weight")]:
        column = {n: state[key][:, i - 6] for i, n in enumerate(released_order)}
        columns = np.stack([column[name] for name in recipe], axis=1)
        assert len({c.tobytes() for c in column.values()}) == 6
        moved[key] = np.concatenate([state[key][:, :-6], columns], axis=1)
    bundle = bundle_lib.Bundle(
        unireg_rpn.TABLE.to_variables(moved),
        "unireg_rpn",
        {
            **unireg_rpn.TABLE.read_config(moved),
            "tasks": [[i, "inter"] for i in range(6)],
        },
        {"regions": list(recipe), "tasks": list(recipe)},
        "",
        "",
    )
    bundle_lib.save_bundle(tmp_path / "trained", bundle)
    convert.convert(tmp_path / "trained", tmp_path / "out.pth")
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    assert content["regions"] == list(released_order)
    for key, array in state.items():
        found = content["model_state_dict"][key].numpy()
        np.testing.assert_array_equal(found, array, err_msg=key)
    convert.convert(tmp_path / "out.pth", tmp_path / "back")
    both = [load.load(tmp_path / name) for name in ("trained", "back")]
    for name in recipe:
        rows = []
        for model in both:
            place = model.bundle.preprocessing["regions"].index(name)
            kernel = model.variables["params"]["decoder_1"]["head"]["controller"]
            rows.append(kernel["kernel"][0, 0, 0, place - 6])
        np.testing.assert_array_equal(*rows, err_msg=name)
    # What the file cannot hold is told.
    rules = [{"network_window": None}] * 5 + [{"network_window": [0.0, 80.0]}]
    ruled = {**bundle.preprocessing, "task_rules": rules}
    for told, sentence in ((ruled, "rules for brain;"), ({}, "chest, .*names none")):
        bundle_lib.save_bundle(
            tmp_path / "told", dataclasses.replace(bundle, preprocessing=told)
        )
        with pytest.warns(UserWarning, match=sentence):
            convert.convert(tmp_path / "told", tmp_path / "told.pth")
    # A file whose columns are in an order of its own, by the names that it has.
    columns = {
        "model_state_dict": {k: torch.from_numpy(a) for k, a in moved.items()},
        "regions": list(recipe),
    }
    torch.save(columns, tmp_path / "own.pth")
    own = load.load(tmp_path / "own.pth")
    kept = load.load(tmp_path / "back")
    for name in recipe:
        assert (
            conditioning.condition(own, name).text
            == conditioning.condition(kept, name).text
        )
    jax.tree.map(np.testing.assert_array_equal, own.variables, kept.variables)
    for wrong in (recipe[:3], (*recipe, "hip"), ("hip", *recipe[1:]), ("a",) * 6):
        torch.save({**columns, "regions": list(wrong)}, tmp_path / "own.pth")
        with pytest.raises(UserError, match=r"own\.pth makes its heads for the reg"):
            load.load(tmp_path / "own.pth")
    other = {**bundle.preprocessing, "regions": ["hip", *recipe[1:]]}
    bundle_lib.save_bundle(
        tmp_path / "other", dataclasses.replace(bundle, preprocessing=other)
    )
    with pytest.raises(UserError, match="other makes its heads for the regions hip"):
        convert.convert(tmp_path / "other", tmp_path / "other.pth")
    assert not (tmp_path / "other.pth").exists()


@pytest.mark.torch
def test_prompts_keep_their_names_through_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    config = PromptRegConfig(channels=2, tasks=3)
    bundle = bundle_lib.Bundle(
        jax.tree.map(np.asarray, PromptReg(config).init(jax.random.key(0), (16,) * 3)),
        "promptreg",
        dataclasses.asdict(config),
        {"shape": [16, 16, 16], "tasks": ["hip", "brain", "heart"]},
        "",
        "",
    )
    bundle_lib.save_bundle(tmp_path / "trained", bundle)
    convert.convert(tmp_path / "trained", tmp_path / "out.pth")
    assert load.load(tmp_path / "out.pth").task_names == ("hip", "brain", "heart")
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    for wrong in (["hip"], ["hip", "brain", "heart", "knee"], ["hip", "hip", "heart"]):
        torch.save({**content, "tasks": wrong}, tmp_path / "out.pth")
        with pytest.raises(UserError, match=r"out\.pth names the prompts .* hold 3"):
            load.load(tmp_path / "out.pth")


@pytest.mark.torch
def test_export_says_what_a_pytorch_file_cannot(tmp_path):
    """The window and the quantiles of the training, where they are the user's own."""
    pytest.importorskip("torch")
    config = RdpConfig(channels=2)
    variables = jax.tree.map(np.asarray, Rdp(config).init(jax.random.key(0), (16,) * 3))
    released = RDP.preprocessing(variables)
    own = {**released, "ct_window": (-160, 240)}
    for name, preprocessing in (("own", own), ("as", released)):
        bundle = bundle_lib.Bundle(
            variables, "rdp", dataclasses.asdict(config), preprocessing, "", ""
        )
        bundle_lib.save_bundle(tmp_path / name, bundle)
    with pytest.warns(UserWarning) as said:
        convert.convert(tmp_path / "own", tmp_path / "own.pth")
    (sentence,) = [str(w.message) for w in said if "own.pth" in str(w.message)]
    assert r"ct_window [-1024.0, 1024.0] where it is [-160, 240]" in sentence
    assert "quantiles" not in sentence and "resize" not in sentence
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        convert.convert(tmp_path / "as", tmp_path / "as.pth")


# --- SAM ------------------------------------------------------------------------------


def test_sam_goes_both_ways_and_registers_nothing(tmp_path):
    config = sam.SamConfig(channels=(2, 3, 4, 5), embedding=6)
    variables = jax.tree.map(np.asarray, dict(sam.init(config, jax.random.key(0))))
    table = sam_lib.TABLE
    state = table.from_variables(variables)
    state_lib.write_state_dict(
        tmp_path / "sam.pth", state, wrapper=table.wrapper, beside=table.beside
    )
    convert.convert(tmp_path / "sam.pth", tmp_path / "sam")  # known by its names
    for path in ("sam.pth", "sam"):
        found = load.load_sam(tmp_path / path)
        assert found.config == config
        assert (found.spacing_mm, found.ct_window) == (2.0, (-1024.0, 3071.0))
        assert found.quantile_range is None
        jax.tree.map(np.testing.assert_array_equal, dict(found.variables), variables)
        with pytest.raises(UserError, match="pass it as `sam_weights`"):
            load.load(tmp_path / path)
    bundle = bundle_lib.load_bundle(tmp_path / "sam")
    assert bundle.preprocessing["ct_window"] == [-1024.0, 3071.0]
    other = dataclasses.replace(bundle, model="rdp")
    bundle_lib.save_bundle(tmp_path / "other", other)
    with pytest.raises(UserError, match="holds a rdp network, .* describes no places"):
        load.load_sam(tmp_path / "other")
    with pytest.raises(UserError, match="there are no SAM weights at"):
        load.load_sam(tmp_path / "absent")


@pytest.mark.parametrize(
    "trained",
    [
        sam.TrainedSam(sam.SamConfig(), {}),
        sam.TrainedSam(sam.SamConfig(), {}, 1.5, (-200.0, 300.0), (0.01, 0.98)),
    ],
    ids=["released", "trained on MR"],
)
def test_a_unireg_knows_the_scans_of_its_sam(trained, monkeypatch):
    monkeypatch.setattr(zoo, "config_of", lambda variables: trained.config)
    rule = json.loads(json.dumps(zoo.sam_rule(trained)))  # as a checkpoint stores it
    for stored in (rule, {}):
        bundle = bundle_lib.Bundle(
            {"sam": {}}, "unireg", {}, {"sam": stored}, "a test", "none"
        )
        model = zoo.LoadedModel("held", None, bundle.variables, bundle)  # pyright: ignore
        found = zoo.sam_of(model)
        assert found == (trained if stored else sam.TrainedSam(trained.config, {}))
    without = dataclasses.replace(model, variables={})
    assert zoo.sam_of(without) is None


@pytest.mark.torch
def test_a_pytorch_file_cannot_say_how_scans_lay(tmp_path):
    convert.convert(write_trch(tmp_path / "a.trch"), tmp_path / "checkpoint")
    bundle = bundle_lib.load_bundle(tmp_path / "checkpoint")
    assert "orientation" not in bundle.preprocessing
    said = {**bundle.preprocessing, "orientation": "LPS"}
    turned = dataclasses.replace(bundle, preprocessing=said)
    bundle_lib.save_bundle(tmp_path / "turned", turned)
    assert load.load(str(tmp_path / "turned")).orientation == "LPS"
    with pytest.warns(UserWarning, match='"orientation": "LPS"'):
        convert.convert(tmp_path / "turned", tmp_path / "b.trch")
    told = tmp_path / "turned" / "jaxreg.json"
    told.write_text(told.read_text().replace('"LPS"', '"LPX"'))
    with pytest.raises(UserError, match=r"turned says of .*orientation is .LPX"):
        load.load(tmp_path / "turned")


def test_published_gradicon_saw_every_orientation():
    assert {zoo.ZOO[n].preprocessing["orientation"] for n in zoo.ZOO} == {"any"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("orientation", "XYZ"), ("orientation", 5), ("ct_window", [1, 2, 3]),
        ("similarity_window", "a"), ("mri_quantiles", ["a", "b"]), ("shape", "16"),
        ("spacing_mm", "wide"), (zoo.VALIDATION_SCANS, 5),
    ],
)  # fmt: skip
def test_what_weights_say_by_hand_is_checked(field, value):
    """The command line asks users to add the orientation to the file."""
    rule = ResamplingRule("aligned", "ijk").to_dict()
    stated = {**rule, "ct_window": [-1024.0, 1024.0], field: value}
    bundle = bundle_lib.Bundle({}, "rdp", {}, stated, "", "")
    model = zoo.LoadedModel("mine", Rdp(RdpConfig()), {}, bundle)
    with pytest.raises(UserError, match=r"mine says of its preprocessing .*json"):
        load._check_stated(model)


# --- weights of older versions --------------------------------------------------------

STORED = pathlib.Path(__file__).parents[2] / "weights"


@pytest.mark.parametrize("name", sorted(p.parent.name for p in STORED.glob("*/*.json")))
def test_every_stored_checkpoint_loads(name):
    if name.endswith("sam"):
        assert load.load_sam(STORED / name).config.kind == "sam"
    else:
        loaded = load.load(STORED / name)
        assert loaded.model.config.kind == loaded.bundle.model


def test_a_checkpoint_with_former_names_is_read_and_written_with_the_present(tmp_path):
    stored = STORED / "hippocampus_gradicon"
    fields = json.loads((stored / "jaxreg.json").read_text())["config"]
    assert {"halvings", "refinements"} <= set(fields)  # as an older version wrote it
    loaded = load.load(stored)
    config = loaded.model.config
    steps = (config.downsampled_steps, config.fullres_steps)  # pyright: ignore
    assert steps == (fields["halvings"], fields["refinements"])
    bundle_lib.save_bundle(tmp_path / "again", loaded.bundle)
    again = json.loads((tmp_path / "again" / "jaxreg.json").read_text())["config"]
    assert "halvings" not in again and again["downsampled_steps"] == steps[0]
    assert load.load(tmp_path / "again").model == loaded.model
