"""The recipes: each names its paper, has its numbers, and dry-runs."""

import dataclasses
import functools
import pathlib
import re
import types

import jax
import pytest

from jaxreg.cli import main
from jaxreg.data import network_grid
from jaxreg.errors import UserError
from jaxreg.experiments import config, files, overrides
from jaxreg.experiments import dry_run as dry_run_lib
from jaxreg.models.gradicon import GradIcon
from jaxreg.models.rdp import RdpConfig
from jaxreg.models.sam import HU_RANGE

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.py"))
NAMES = [path.stem for path in FILES]
FULL_SIZE = ("finetune", "multigradicon", "unigradicon")
PARAMETERS = 70_680_916
"""Of the released weights: 71 tensors of four U-Nets without running statistics."""


def load(name):
    return files.load(CONFIGS / f"{name}.py")


def test_the_recipes_that_were_asked_for_are_there():
    asked = {"unigradicon", "multigradicon", "finetune", "hippocampus_gradicon", "demo"}
    assert asked <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_names_itself_its_paper_and_its_command(name):
    chosen = files.load_any(CONFIGS / f"{name}.py")
    text = (CONFIGS / f"{name}.py").read_text()
    doc = text.split('"""')[1]
    assert chosen.name == name
    assert f"python train.py --config configs/{name}.py" in doc
    # Authors, title, venue with its year, and for a method its section.
    assert re.search(r"et al\., .+ 20\d\d", chosen.paper)
    if name != "demo":
        assert "section" in chosen.paper
        title = chosen.paper.split(", ")[1]
        assert title.split(" ")[0] in doc


def test_unigradicon_has_the_papers_numbers():
    chosen = load("unigradicon")
    first, second = config.stages(chosen)
    assert [(stage.epochs, changed.model.fullres_steps) for stage, changed in
            (first, second)] == [(800, 0), (200, 1)]  # fmt: skip
    for _, stage in (first, second):
        assert stage.model.downsampled_steps == 2
        assert stage.loading.shape == (175, 175, 175)
        assert stage.loading.ct_window == (-1000, 1000)
        assert stage.objective.similarity == "lncc"
        assert dict(stage.objective.similarity_options) == {"sigma": 5}
        assert stage.objective.inverse_consistency_weight == 1.5
        assert stage.objective.stride == 2 and stage.objective.outside == "zeros"
        assert stage.optimizer.name == "adam"
        assert stage.optimizer.learning_rate == 5e-5
        assert stage.optimizer.schedule == "constant"
        assert (stage.optimizer.warm_up, stage.optimizer.clip) == (0, 0)
        assert stage.optimizer.weight_decay == 0
        # Four on each of four GPUs, batch statistics on each alone.
        assert (stage.train.batch, stage.train.replicas) == (16, 4)
        assert stage.data.pairs_per_epoch == 4000
        assert stage.augment.noise == 0.05
        assert stage.augment.permute and stage.augment.flip
        assert not stage.augment.aligned
    tasks = chosen.data.tasks
    assert [task.dataset for task in tasks] == ["copdgene", "oai", "hcp", "abdomen"]
    assert [task.pairing for task in tasks] == ["intra", None, None, None]
    assert [task.distinct for task in tasks] == [True, False, False, False]
    assert chosen.data.schedule == "per_dataset"
    assert chosen.loading.mask_inputs
    assert chosen.loop.validate_every == 20
    # Training pairs validate in the original, so every subject trains.
    assert chosen.data.holdout is None


def test_multigradicon_has_the_papers_numbers():
    chosen = load("multigradicon")
    assert [stage.epochs for stage in chosen.stages] == [800, 200, 100]
    fullres_steps = [
        changed.model.fullres_steps for _, changed in config.stages(chosen)
    ]
    assert fullres_steps == [0, 1, 1]
    assert chosen.objective.similarity == "lncc2"
    assert dict(chosen.objective.similarity_options) == {"sigma": 5}
    assert chosen.objective.inverse_consistency_weight == 1.5
    assert chosen.optimizer.learning_rate == 5e-5
    assert chosen.loading.shape == (175, 175, 175)
    assert (chosen.train.batch, chosen.train.replicas) == (16, 4)
    assert chosen.data.schedule == "weighted"
    assert chosen.data.pairs_per_epoch == 4000
    assert chosen.data.holdout is None
    tasks = {task.dataset: task for task in chosen.data.tasks}
    # The spec's table. Dataset: modalities with inverted CT, regions, share in per
    # cent, what the similarity compares, who is paired.
    table = {
        "copdgene": (1, 1, 2.12, "B", "intra"),
        "brats": (4, 1, 21.27, "F", "intra"),
        "abdomen": (2, 1, 6.38, "F", "inter"),
        "hcp": (2, 1, 6.38, "F", "inter"),
        "abcd_dti": (2, 1, 6.38, "F", "inter"),
        "oai": (2, 1, 6.38, "B", "inter"),
        "mrct": (3, 1, 12.76, "B", "inter"),
        "ukb": (2, 6, 38.29, "F", "inter"),
    }
    assert list(tasks) == list(table)
    assert [f"{name}.csv" for name in table] == list(chosen.data.manifests)
    total = sum(task.weight for task in tasks.values())
    for name, (modalities, regions, share, randomise, pairing) in table.items():
        task = tasks[name]
        assert task.weight == regions * modalities * (modalities + 1) / 2, name
        assert 100 * task.weight / total == pytest.approx(share, abs=0.02), name
        assert (task.randomise, task.pairing) == (randomise, pairing), name
        assert task.invert_ct == (name in ("abdomen", "mrct")), name
        # Inter pairs are two draws of their own: n scans give n^2 pairs.
        assert task.distinct == (pairing == "intra"), name


def test_multigradicon_is_trained_further_with_regions_alike():
    _, further = config.stages(load("multigradicon"))[-1]
    tasks = {task.dataset: task for task in further.data.tasks}
    total = sum(task.weight for task in tasks.values())
    shares = {name: 100 * task.weight / total for name, task in tasks.items()}
    # The spec's list. Dataset: share in per cent, what the similarity compares, who is
    # paired. ThoraxCBCT has 42^2 pairs of 42 scans; ABCD here has structural scans too,
    # which its first two stages have not, and no randomisation.
    table = {
        "pancreas": (6.25, "B", "intra"),
        "thorax_cbct": (8.33, "B", "inter"),
        "abcd": (8.33, "B", "inter"),
        "copdgene": (8.33, "B", "intra"),
        "brats": (8.33, "F", "intra"),
        "abdomen": (6.25, "F", "inter"),
        "hcp": (8.33, "F", "inter"),
        "oai": (12.5, "B", "inter"),
        "mrct": (6.25, "B", "inter"),
        "ukb": (27.08, "F", "inter"),
    }
    assert list(tasks) == list(table)
    for name, (share, randomise, pairing) in table.items():
        assert shares[name] == pytest.approx(share, abs=0.01), name
        assert (tasks[name].randomise, tasks[name].pairing) == (randomise, pairing)
        assert tasks[name].distinct == (pairing == "intra"), name
    # Two sets of ABCD are two files.
    first = load("multigradicon").data.manifests
    assert "abcd_dti.csv" in first and "abcd.csv" not in first
    assert not any(task.invert_ct for task in tasks.values())
    assert [f"{name}.csv" for name in tasks] == list(further.data.manifests)
    assert further.loading.mask_inputs
    assert further.optimizer.learning_rate == 5e-5
    assert further.optimizer.schedule == "constant"


def test_promptreg_has_the_papers_numbers():
    chosen = load("promptreg")
    assert chosen.loading.shape == (160, 160, 160)
    assert chosen.loading.placement == network_grid.ResamplingRule("aligned", "ijk")
    assert chosen.loading.ct_window == (-1000.0, 1000.0)
    assert chosen.loading.quantile_range is None  # the minimum to the 0.99 quantile
    objective = chosen.objective
    assert (objective.similarity, objective.directions) == ("mind", "forward")
    assert objective.similarity_options == () and chosen.augment is None
    weights = ("inverse_consistency_weight", "smoothness_weight",
               "orthogonality_weight", "task_weight")  # fmt: skip
    assert [getattr(objective, name) for name in weights] == [0, 0.1, 0.001, 0.001]
    rule = chosen.optimizer
    assert (rule.name, rule.learning_rate) == ("amsgrad", 1e-4)
    assert (rule.schedule, rule.power, rule.final) == ("polynomial", 0.9, 0.0)
    assert chosen.train.batch == 1 and chosen.stages[0].epochs == 300
    assert chosen.data.pairs_per_epoch == 100 * 5
    assert chosen.model.channels == 16 and chosen.model.temperature == 0.1


def test_rdp_is_promptreg_without_prompts():
    whole, without = load("promptreg"), load("rdp")
    objective = without.objective
    assert objective.orthogonality_weight == objective.task_weight == 0
    same = dataclasses.replace(
        without, name=whole.name, model=whole.model, objective=whole.objective
    )
    assert same == whole
    assert isinstance(without.model, RdpConfig)


def test_unireg_has_the_papers_numbers():
    chosen = load("unireg")
    tasks = {t.dataset: (t.pairing, t.smoothness) for t in chosen.data.tasks}
    assert tasks == {
        "headneck": ("inter", 0.05), "chest": ("inter", 1.0),
        "abdomen": ("inter", 0.1), "liver": ("intra", 10.0),
    }  # fmt: skip
    assert chosen.data.schedule == "per_dataset"
    assert chosen.loading.shape == (160, 192, 192)
    assert chosen.loading.placement == network_grid.ResamplingRule(
        "pad_crop", "spl", 2.0
    )
    assert chosen.model.backbone_window == (-800.0, 400.0)
    assert chosen.loading.ct_window == chosen.model.window == HU_RANGE
    objective, rule = chosen.objective, chosen.optimizer
    assert (objective.similarity, objective.directions) == ("ncc", "forward")
    assert (objective.smoothness_weight, objective.dice_weight) == (1.0, 1.0)
    assert (rule.name, rule.learning_rate, rule.momentum) == ("sgd", 5e-5, 0.99)
    steps = chosen.stages[0].epochs * chosen.data.pairs_per_epoch
    assert (steps, chosen.train.batch) == (120_000, 1)


def test_unireg_rpn_has_the_releases_numbers():
    chosen = load("unireg_rpn")
    static, dynamic = (during for _, during in config.stages(chosen))
    assert (static.model.head, dynamic.model.head) == ("static", "dynamic")
    lasting = [stage.epochs * chosen.data.pairs_per_epoch for stage in chosen.stages]
    assert lasting == [80_000, 150_000] and chosen.train.batch == 1
    rules = [(s.optimizer.learning_rate, s.optimizer.clip) for s in (static, dynamic)]
    assert rules == [(1e-4, 0.0), (1e-5, 1.0)]
    kept = [
        t.dataset for t in static.data.tasks if t.dataset not in static.data.exclude
    ]
    assert kept == ["brain"] and not dynamic.data.exclude
    tasks = {t.dataset: (t.weight, t.pairing, t.smoothness) for t in chosen.data.tasks}
    assert tasks == {
        "acdc": (4, "intra", 0.5), "liver": (2, "intra", 10), "head": (2, "inter", 1),
        "abdomen": (2, "inter", 1), "chest": (2, "inter", 1), "brain": (2, "inter", 1),
    }  # fmt: skip
    assert chosen.data.schedule == "weighted"
    assert chosen.objective.similarity == "box_ncc"
    assert dict(chosen.objective.similarity_options) == {"window": 9}
    assert chosen.objective.dice_weight == 0
    assert (chosen.loading.ct_window, chosen.loading.resize) == ((-150, 250), "aligned")


def test_finetuning_has_the_original_tools_defaults():
    chosen = load("finetune")
    assert [stage.epochs for stage in chosen.stages] == [100]
    assert chosen.optimizer.learning_rate == 5e-5
    assert chosen.train.batch == 4
    assert chosen.train.start == "unigradicon"
    assert chosen.objective.inverse_consistency_weight == 1.5
    assert chosen.objective.dice_weight == 0
    assert chosen.augment.aligned
    assert chosen.loop.validate_every == 10
    # Weight 1 each, whatever modalities a dataset has.
    assert chosen.data.schedule == "per_dataset"
    assert chosen.data.holdout == 5


def test_what_a_stage_of_a_recipe_has_of_its_own_is_changed_by_its_name():
    chosen = load("unigradicon")
    with pytest.raises(
        UserError, match=r"`stages\.stage_2\.model\.fullres_steps` VALUE"
    ):
        overrides.override(chosen, [("model.fullres_steps", "0")])
    changed = overrides.override(chosen, [("stages.stage_2.model.fullres_steps", "0")])
    assert [during.model.fullres_steps for _, during in config.stages(changed)] == [
        0,
        0,
    ]
    own = [("data.manifests", "a.csv"), ("stages.further.data.manifests", "b.csv")]
    with pytest.raises(UserError, match="has no effect in stages .*further"):
        overrides.override(load("multigradicon"), own[:1])
    changed = overrides.override(load("multigradicon"), own)
    assert [during.data.manifests for _, during in config.stages(changed)] == [
        ("a.csv",),
        ("a.csv",),
        ("b.csv",),
    ]


def test_the_large_recipes_share_the_released_network():
    configs = {config.stages(load(name))[-1][1].model for name in FULL_SIZE}
    assert len(configs) == 1
    model = GradIcon(configs.pop())
    shapes = jax.eval_shape(model.init, jax.random.key(0))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PARAMETERS
    # By hand: per level a 3^3 convolution down, a 4^3 up and batch norm, then the last.
    down, up = (2, 16, 32, 64, 256, 512), (16, 32, 64, 128, 256)
    into = [down[5], *(down[level] + up[level] for level in (4, 3, 2, 1))]
    one = sum(27 * a * b + b for a, b in zip(down[:-1], down[1:], strict=True))
    one += sum(64 * a * b + 3 * b for a, b in zip(into, up[::-1], strict=True))
    one += 27 * (up[0] + down[0]) * 3 + 3
    assert 4 * one == PARAMETERS


class Uncompiled:
    """What `Lowered.compile` would return: three gigabytes, one of them used again."""

    def memory_analysis(self):
        sizes = {"argument": 1, "output": 1, "alias": 1, "temp": 2, "generated_code": 0}
        sizes = {f"{name}_size_in_bytes": n * 10**9 for name, n in sizes.items()}
        return types.SimpleNamespace(**sizes)


def dry_run(name, capsys, *options):
    status = main.main(
        ["train", "--config", str(CONFIGS / f"{name}.py"), "--dry-run", *options]
    )
    said = capsys.readouterr()
    assert status == 0, said.err
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in said.out.splitlines())


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working folder that a dry run must leave as it found it."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


def number(text):
    return float(text.split()[0].replace(",", ""))


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    "name",
    [
        # tests/experiments/test_dry_run.py compiles a small step each time.
        pytest.param("demo", marks=pytest.mark.slow),
        pytest.param("hippocampus_gradicon", marks=pytest.mark.slow),
    ],
)
def test_a_small_recipe_dry_runs(name, capsys):
    rows = dry_run(name, capsys)
    check_small(rows, load(name))


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("promptreg", marks=pytest.mark.slow),  # as hippocampus_promptreg
        pytest.param("rdp", marks=pytest.mark.slow),  # a part of the first
        "hippocampus_promptreg",
        "unireg",
        "unireg_rpn",
    ],
)
def test_a_pyramid_dry_runs(name, capsys, monkeypatch):
    # XLA's part takes minutes; training compiles it in test_trainer.py.
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: Uncompiled())
    check_small(dry_run(name, capsys), load(name))


def check_small(rows, expected):
    build = functools.partial(expected.model.build().init, jax.random.key(0))
    variables = jax.eval_shape(lambda: build(expected.loading.shape))
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert number(rows["parameters"]) == count
    assert number(rows["arithmetic of a step"]) > 0
    for name in memory_rows(rows, expected):
        assert 0 < number(rows[name]) <= 3
    assert number(rows["seconds to compile"]) > 0
    assert rows["compiled for"] == f"{grid(expected)} on cpu"


def grid(expected):
    return " x ".join(map(str, expected.loading.shape))


def memory_rows(rows, expected):
    """Names of the two rows about memory of each stage, the last stage's last."""
    stages = [stage.name for stage in expected.stages]
    ends = [f", {name}" for name in stages] if len(stages) > 1 else [""]
    names = [f"memory of a step per {n}{e}" for e in ends for n in ("device", "pair")]
    assert [name for name in rows if name.startswith("memory")] == names
    return names


def check_full_size(rows, expected):
    assert rows["parameters"] == "70,680,916"
    # Parameters, gradient and Adam's two moments: four times 4 bytes each.
    names = [name for name in rows if name.startswith("parameters, gradient")]
    assert len(names) == len(expected.stages)
    held = number(rows[names[-1]])
    assert held == pytest.approx(16 * PARAMETERS / 1e9, abs=0.02)
    assert number(rows["arithmetic of a step"]) > 1
    assert rows["compiled for"] == "175 x 175 x 175 on cpu"
    assert "is not there yet" in rows["data 1"]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    "name",
    [
        "finetune",
        pytest.param("unigradicon", marks=pytest.mark.slow),  # of two stages
        # Of three, with other images for the similarity.
        pytest.param("multigradicon", marks=pytest.mark.slow),
    ],
)
def test_a_large_recipe_dry_runs(name, capsys, monkeypatch):
    # Built, traced and lowered, at 175^3. XLA's part takes more than a minute for each
    # stage; the slow test below does it.
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: Uncompiled())
    rows, expected = dry_run(name, capsys), load(name)
    check_full_size(rows, expected)
    pairs = expected.train.batch
    assert f"1 of this machine (cpu), {pairs} pairs at once on each" in rows["devices"]
    if name != "finetune":  # made for four devices
        assert "the recipe asks for 4, with 4 pairs each" in rows["devices"]
    *_, device, pair = memory_rows(rows, expected)
    assert rows[device] == f"3 GB for {pairs} pairs at once"
    assert rows[pair] == "3 GB for 1 pair alone"


@pytest.fixture
def traced(monkeypatch):
    """Keeps the steps of a dry run from being traced: what stages they are of."""
    found = []
    step = types.SimpleNamespace(
        start=types.SimpleNamespace(variables={"params": {}}),
        lowered=types.SimpleNamespace(as_text=lambda: "program"),
    )

    def traced_steps(chosen, known):
        for stage, during in config.stages(chosen):
            found.append(stage.name)
            yield types.SimpleNamespace(
                **vars(step), stage=stage, experiment=during, at_once=1, of_pairs=None
            )

    monkeypatch.setattr(dry_run_lib, "traced_steps", traced_steps)
    monkeypatch.setattr(dry_run_lib, "_flops", lambda _: 1e12)
    monkeypatch.setattr(dry_run_lib, "_devices", lambda *_: "")
    known = dry_run_lib.StepMemory(total=3, pairs=1, fewest=1, least=3, lasting=0)
    monkeypatch.setattr(dry_run_lib, "memory_of", lambda *_: known)
    return found


@pytest.mark.usefixtures("elsewhere")
def test_a_dry_run_looks_at_the_manifests_of_every_stage(capsys, traced):
    rows = dry_run("multigradicon", capsys)
    said = [text for name, text in rows.items() if name.startswith("data ")]
    names = [text.split(" ")[0] for text in said]
    stages = [during for _, during in config.stages(load("multigradicon"))]
    assert sorted(names) == sorted({p for s in stages for p in s.data.manifests})
    assert "thorax_cbct.csv" in names and "ukb.csv" in names
    assert traced == ["stage_1", "stage_2", "further"]


def test_a_cache_that_cannot_be_made_is_said_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    path = str(CONFIGS / "finetune.py")
    cache = ["--loading.cache_dir", str(tmp_path / "file" / "cache")]
    assert main.main(["train", "--config", path, "--dry-run", *cache]) == 2
    assert "loading.cache_dir" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_large_recipe_compiles(name, capsys):
    rows, expected = dry_run(name, capsys), load(name)
    check_full_size(rows, expected)
    # The first level's features alone, of both directions of the last step.
    least = 2 * 16 * 4 * 175**3 / 1e9
    *_, pair = memory_rows(rows, expected)
    assert least < number(rows[pair]) < 40
