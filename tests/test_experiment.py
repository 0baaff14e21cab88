"""Settings from files and from the command line, and what a resumed run may change."""

import dataclasses

import pytest

from jaxreg import experiment as lib
from jaxreg.data.augment import Augmentation
from jaxreg.data.pairs import Task
from jaxreg.errors import UserError
from jaxreg.experiment import DataConfig, Experiment, Stage
from jaxreg.losses.objective import Objective

PLAIN = Experiment(name="plain", stages=(Stage("one", 3),))


@pytest.mark.parametrize(
    ("name", "text", "section", "value"),
    [
        ("optimizer.learning_rate", "1e-4", "optimizer", 1e-4),
        ("optimizer.learning-rate", "2", "optimizer", 2.0),
        ("train.batch", "8", "train", 8),
        ("train.start", "unigradicon", "train", "unigradicon"),
        ("train.start", "None", "train", None),
        ("augment.flip", "false", "augment", False),
        ("loading.shape", "16,20,24", "loading", (16, 20, 24)),
        ("data.manifests", "a.csv, b.csv", "data", ("a.csv", "b.csv")),
        ("data.manifests", "a.csv", "data", ("a.csv",)),
        ("data.classes", "1,2", "data", (1, 2)),
        ("model.channels_down", "(2, 4, 8)", "model", (2, 4, 8)),
        ("loading.quantile_range", "0.01,0.9", "loading", (0.01, 0.9)),
        ("loop.metric", "loss", "loop", "loss"),
        ("train.parallel", "pmap", "train", "pmap"),
    ],
)
def test_text_becomes_the_fields_type(name, text, section, value):
    changed = lib.override(PLAIN, [(name, text)])
    field = name.split(".")[1].replace("-", "_")
    got = getattr(getattr(changed, section), field)
    assert got == value and type(got) is type(value)
    # Nothing else has moved.
    assert lib.override(changed, [(name, getattr(getattr(PLAIN, section), field))]) == (
        PLAIN
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("optimiser.learning_rate", "1", "did you mean optimizer"),
        ("optimizer.lerning_rate", "1", "did you mean learning_rate"),
        ("optimizer.learning_rate", "fast", "expected a number"),
        ("optimizer.learning_rate", "-1", "expected a positive number"),
        ("train.batch", "2.5", "expected a whole number"),
        ("train.batch", "0", "at least 1"),
        ("augment.flip", "maybe", "expected true or false"),
        ("loading.shape", "16,20", "expected three numbers"),
        ("loading.shape", "16,20,x", "expected a whole number"),
        ("train.parallel", "ddp", "expected one of auto, single, mesh, pmap"),
        ("objective", "lncc", "set its fields"),
        ("objective.similarity", "ssim", "unknown similarity"),
        ("name.first", "x", "has no fields"),
        ("data.synthetic", "inter_mno", "did you mean inter_mono"),
    ],
)
def test_wrong_settings_are_answered(name, text, message):
    with pytest.raises(UserError, match=message):
        lib.override(PLAIN, [(name, text)])


def test_a_section_that_is_off_has_no_fields():
    quiet = dataclasses.replace(PLAIN, augment=None)
    with pytest.raises(UserError, match="augment is None"):
        lib.override(quiet, [("augment.noise", "0.1")])


def test_stages_change_only_themselves():
    two = dataclasses.replace(
        PLAIN,
        stages=(
            Stage("a", 1, (("model.refinements", 0),)),
            Stage("b", 2, (("optimizer.learning_rate", 0.5),)),
        ),
    )
    first, second = (changed for _, changed in lib.stages(two))
    assert (first.model.refinements, second.model.refinements) == (0, 1)
    assert second.optimizer.learning_rate == 0.5
    assert first.optimizer == PLAIN.optimizer


def test_stages_and_objectives_are_changed_by_name():
    named = dataclasses.replace(
        PLAIN,
        stages=(Stage("a", 1), Stage("b", 2)),
        objectives=(("x", Objective()), ("y", Objective())),
    )
    changed = lib.override(
        named, [("stages.b.epochs", "9"), ("objectives.x.dice_weight", "0.5")]
    )
    assert [stage.epochs for stage in changed.stages] == [1, 9]
    assert [o.dice_weight for _, o in changed.objectives] == [0.5, 0.0]
    with pytest.raises(UserError, match="stages has a, b"):
        lib.override(named, [("stages.c.epochs", "9")])
    with pytest.raises(UserError, match=r"no setting --stages\.a\.epoch;"):
        lib.override(named, [("stages.a.epoch", "9")])


def test_inconsistent_experiments_are_refused():
    with pytest.raises(UserError, match="stages none"):
        Experiment(name="x", stages=())
    with pytest.raises(UserError, match="name of its own"):
        Experiment(name="x", stages=(Stage("a", 1), Stage("a", 1)))
    with pytest.raises(UserError, match="leave one out"):
        dataclasses.replace(
            PLAIN, data=DataConfig(manifests=("a",), synthetic=("inter_mono",))
        )
    with pytest.raises(UserError, match="objective of task lung"):
        dataclasses.replace(
            PLAIN, data=DataConfig(tasks=(Task("lung", objective="x"),))
        )
    named = dataclasses.replace(
        PLAIN,
        objectives=(("x", Objective(similarity="mind")),),
        data=DataConfig(tasks=(Task("lung", objective="x"),)),
    )
    assert named.objectives[0][0] == "x"


def test_a_configuration_file_is_run(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from jaxreg.experiment import Experiment, Stage\n"
        "def get_config():\n"
        "    return Experiment(name='mine', stages=(Stage('a', 1),))\n"
    )
    assert lib.load(path).name == "mine"
    with pytest.raises(UserError, match=r"min\.py does not exist; did you mean mine"):
        lib.load(tmp_path / "min.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="get_config"):
        lib.load(tmp_path / "empty.py")


def test_a_resumed_run_keeps_what_decides_the_numbers(tmp_path):
    path = tmp_path / "experiment.json"
    lib.write(path, PLAIN)
    lib.check_same(path, PLAIN)
    elsewhere = lib.override(
        PLAIN,
        [
            ("train.parallel", "pmap"),
            ("loading.workers", "3"),
            ("loop.log_every", "1"),
        ],  # fmt: skip
    )
    lib.check_same(path, elsewhere)
    for change in ("optimizer.learning_rate", "train.batch", "augment.noise"):
        with pytest.raises(UserError, match=change):
            lib.check_same(path, lib.override(PLAIN, [(change, "3")]))
    with pytest.raises(UserError, match="augment"):
        lib.check_same(path, dataclasses.replace(PLAIN, augment=None))
    longer = dataclasses.replace(PLAIN, stages=(Stage("one", 4),))
    with pytest.raises(UserError, match="stages"):
        lib.check_same(path, longer)


def test_the_tree_is_written_as_json(tmp_path):
    wide = dataclasses.replace(PLAIN, augment=Augmentation(noise=0.1))
    tree = lib.to_dict(wide)
    assert tree["augment"]["noise"] == 0.1
    assert tree["loading"]["shape"] == [175, 175, 175]
