"""Settings from files and from the command line, and what a resumed run may change."""

import dataclasses
import importlib
import json
import pathlib

import pytest

from jaxreg.data import pairs
from jaxreg.data.augment import Augmentation
from jaxreg.data.loading import Loading
from jaxreg.data.pairs import Task
from jaxreg.errors import UserError
from jaxreg.experiments import config, files, overrides
from jaxreg.experiments.config import DataConfig, Experiment, Stage
from jaxreg.losses.objective import Objective

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
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
        ("data.holdout", "None", "data", None),
        ("data.holdout", "3", "data", 3),
        ("objective.similarity_options", "sigma=2", "objective", (("sigma", 2),)),
    ],
)
def test_text_becomes_the_fields_type(name, text, section, value):
    changed = overrides.override(PLAIN, [(name, text)])
    field = name.split(".")[1].replace("-", "_")
    got = getattr(getattr(changed, section), field)
    assert got == value and type(got) is type(value)
    # Nothing else has moved.
    assert overrides.override(
        changed, [(name, getattr(getattr(PLAIN, section), field))]
    ) == (PLAIN)


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
        ("data.holdout", "1", "data.holdout is 1, expected 2 or more"),
        ("data.holdout", "0", "or None to train on all"),
        ("data.validation_pairs", "-1", "data.validation_pairs is -1, expected at"),
        ("data.pairs_per_epoch", "0", "data.pairs_per_epoch is 0"),
        ("data.neighbours", "0", "data.neighbours is 0, expected at least 1"),
        ("data.synthetic_labels", "0", "data.synthetic_labels is 0"),
        ("train.seed", "-1", "train.seed is -1, expected at least 0"),
        ("loading.orientation", "RAX", 'orientation is "RAX", expected a letter of'),
        ("loading.orientation", "RLS", 'orientation is "RLS", expected a letter of'),
        ("objective.similarity_options", "radius=1", "takes no option radius, only s"),
        ("objective.similarity_options", "sigma=0", "sigma of similarity lncc is 0"),
        ("stages.one.model.refinments", "1", r"`stages\.one\.model\.refinments` .did"),
        ("stages.one.train.batch", "0", "train.batch is 0"),
        ("stages.one.train.batch", "x", "`stages.one.train.batch` is 'x'"),
        ("stages.on.train.batch", "2", 'is "on", expected one of one'),
    ],
)
def test_wrong_settings_are_answered(name, text, message):
    with pytest.raises(UserError, match=message):
        overrides.override(PLAIN, [(name, text)])


@pytest.mark.parametrize(
    "text",
    ["sigma,2", "sigma", "sigma=", "=2", "**{}", "sigma=2)(x=1", "sigma=2,sigma=3",
     "sigma=open", "similarity.sigma=2"],
)  # fmt: skip
def test_what_is_no_list_of_options_is_answered(text):
    with pytest.raises(UserError, match=r"expected NAME=VALUE, with commas, or None"):
        overrides.override(PLAIN, [("objective.similarity_options", text)])


@pytest.mark.parametrize("text", ["None", "none", "()", ""])
def test_options_are_cleared(text):
    blurred = dataclasses.replace(
        PLAIN, objective=Objective(similarity_options=(("sigma", 2),))
    )
    changed = overrides.override(blurred, [("objective.similarity_options", text)])
    assert changed.objective == Objective()


def test_several_options_and_values_are_read():
    text = "bins=16, intensity_range=(0.1, 0.9)"
    changes = [("objective.similarity", "nmi"), ("objective.similarity_options", text)]
    for ordered in (changes, changes[::-1]):
        options = overrides.override(PLAIN, ordered).objective.similarity_options
        assert options == (("bins", 16), ("intensity_range", (0.1, 0.9)))


def test_another_similarity_asks_for_options_of_its_own():
    mind = dataclasses.replace(
        PLAIN, objective=Objective("mind", (("radius", 1), ("dilation", 1)))
    )
    with pytest.raises(UserError) as caught:
        overrides.override(mind, [("objective.similarity", "lncc")])
    assert str(caught.value) == (
        "similarity lncc takes no option radius, only sigma; give "
        "`objective.similarity_options` sigma=5 or None"
    )
    changes = [("objective.similarity", "lncc"), ("objective.similarity_options",
               "sigma=3")]  # fmt: skip
    for ordered in (changes, changes[::-1]):
        changed = overrides.override(mind, ordered).objective
        assert (changed.similarity, changed.similarity_options) == (
            "lncc",
            (("sigma", 3),),
        )


def test_changes_that_only_fit_together_come_in_any_order():
    changes = [("data.manifests", "a.csv"), ("data.synthetic", "()")]
    made = dataclasses.replace(PLAIN, data=DataConfig(synthetic=("inter_mono",)))
    for ordered in (changes, changes[::-1]):
        assert overrides.override(made, ordered).data.manifests == ("a.csv",)


def test_a_section_that_is_off_has_no_fields():
    quiet = dataclasses.replace(PLAIN, augment=None)
    with pytest.raises(UserError, match="augment is None"):
        overrides.override(quiet, [("augment.noise", "0.1")])


def test_stages_change_only_themselves():
    two = dataclasses.replace(
        PLAIN,
        stages=(
            Stage("a", 1, (("model.fullres_steps", 0),)),
            Stage("b", 2, (("optimizer.learning_rate", 0.5),)),
        ),
    )
    first, second = (changed for _, changed in config.stages(two))
    assert (first.model.fullres_steps, second.model.fullres_steps) == (0, 1)
    assert second.optimizer.learning_rate == 0.5
    assert first.optimizer == PLAIN.optimizer


STAGED = dataclasses.replace(
    PLAIN,
    stages=(
        Stage("a", 1, (("model.fullres_steps", 0), ("train.batch", 3))),
        Stage("b", 2, (("model.fullres_steps", 1),)),
        Stage("c", 2),
    ),
)


def test_a_change_that_stages_would_undo_is_refused():
    with pytest.raises(UserError) as caught:
        overrides.override(STAGED, [("model.fullres_steps", "2")])
    assert str(caught.value) == (
        "`model.fullres_steps` has no effect in stages that have a value of their own "
        "(a, b); give `stages.a.model.fullres_steps` VALUE "
        "`stages.b.model.fullres_steps` VALUE"
    )
    # A value of all of a section counts, and one within a section that is replaced.
    quiet = dataclasses.replace(STAGED, stages=(Stage("a", 1, (("augment", None),)),))
    with pytest.raises(UserError, match=r"`stages\.a\.augment\.noise` VALUE"):
        overrides.override(quiet, [("augment.noise", "0.1")])
    # Neighbours in the section are free.
    assert (
        overrides.override(
            STAGED, [("model.downsampled_steps", "1")]
        ).model.downsampled_steps
        == 1
    )


def test_a_stage_is_given_values_of_its_own():
    changed = overrides.override(
        STAGED,
        [("stages.a.model.fullres_steps", "2"), ("stages.c.augment.noise", "1")],
    )
    a, b, c = (during for _, during in config.stages(changed))
    assert [during.model.fullres_steps for during in (a, b, c)] == [2, 1, 1]
    assert [during.augment.noise for during in (a, b, c)] == [
        PLAIN.augment.noise,
        PLAIN.augment.noise,
        1.0,
    ]
    # Read as the field's type, so that a resumed run finds the same settings.
    assert changed.stages[0].changes == (("train.batch", 3), ("model.fullres_steps", 2))
    assert type(changed.stages[2].changes[0][1]) is float
    # Given for the stages that have their own, it may be given for the others too.
    everywhere = overrides.override(
        STAGED,
        [("train.batch", "8"), ("stages.a.train.batch", "4")],
    )
    batches = [during.train.batch for _, during in config.stages(everywhere)]
    assert batches == [4, 8, 8]


def test_values_of_a_stage_may_need_each_other():
    changes = [("stages.c.objective.similarity", "mind"),
               ("stages.c.objective.similarity_options", "radius=1")]  # fmt: skip
    blurred = dataclasses.replace(
        STAGED, objective=Objective(similarity_options=(("sigma", 2),))
    )
    for ordered in (changes, changes[::-1]):
        last = config.stages(overrides.override(blurred, ordered))[-1][1]
        assert last.objective == Objective("mind", (("radius", 1),))
    named = dataclasses.replace(STAGED, objectives=(("x", Objective()),))
    named = overrides.override(named, [("stages.c.objectives.x.dice_weight", "0.5")])
    assert named.stages[2].changes == (("objectives.x.dice_weight", 0.5),)


def test_stages_and_objectives_are_changed_by_name():
    named = dataclasses.replace(
        PLAIN,
        stages=(Stage("a", 1), Stage("b", 2)),
        objectives=(("x", Objective()), ("y", Objective())),
    )
    changed = overrides.override(
        named, [("stages.b.epochs", "9"), ("objectives.x.dice_weight", "0.5")]
    )
    assert [stage.epochs for stage in changed.stages] == [1, 9]
    assert [o.dice_weight for _, o in changed.objectives] == [0.5, 0.0]
    with pytest.raises(UserError, match="stages has a, b"):
        overrides.override(named, [("stages.c.epochs", "9")])
    with pytest.raises(UserError, match=r"no setting `stages\.a\.epoch` .did you mean"):
        overrides.override(named, [("stages.a.epoch", "9")])


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"tasks": (Task("inter_mono"),)}}, "no notice of data.tasks"),
        ({"data": {"schedule": "weighted"}}, "no notice of data.schedule weighted"),
        ({"objectives": (("x", Objective()),)}, "no notice of objectives"),
        ({"loading": Loading(mask_inputs=True)}, "no notice of loading.mask_inputs"),
    ],
)
def test_what_synthetic_pairs_would_ignore_is_refused(changes, message):
    data = DataConfig(synthetic=("inter_mono",), **changes.get("data", {}))
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PLAIN, **{**changes, "data": data})


def test_a_configuration_file_is_run(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from jaxreg.experiments.config import Experiment, Stage\n"
        "def get_config():\n"
        "    return Experiment(name='mine', stages=(Stage('a', 1),))\n"
    )
    assert files.load(path).name == "mine"
    with pytest.raises(UserError, match=r"min\.py does not exist .did you mean mine"):
        files.load(tmp_path / "min.py")
    with pytest.raises(UserError, match=r"aaa\.py does not exist"):
        files.load(tmp_path / ("a" * 300 + ".py"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="get_config"):
        files.load(tmp_path / "empty.py")


def test_a_resumed_run_keeps_what_decides_the_numbers(tmp_path):
    path = tmp_path / "experiment.json"
    files.write(path, PLAIN)
    files.check_same(path, PLAIN)
    # A run that was started before a setting came had its default.
    before = json.loads(path.read_text())
    del before["data"]["synthetic_deformation"], before["train"]["ema"]
    del before["stages"][0]["changes"], before["optimizer"]["betas"]
    path.write_text(json.dumps(before))
    files.check_same(path, PLAIN)
    with pytest.raises(UserError, match=r"train\.ema 0\.0 -> 0\.5"):
        files.check_same(path, overrides.override(PLAIN, [("train.ema", "0.5")]))
    elsewhere = overrides.override(
        PLAIN,
        [
            ("train.parallel", "pmap"),
            ("loading.workers", "3"),
            ("loop.log_every", "1"),
        ],  # fmt: skip
    )
    files.check_same(path, elsewhere)
    for change in ("optimizer.learning_rate", "train.batch", "augment.noise"):
        with pytest.raises(UserError, match=change):
            files.check_same(path, overrides.override(PLAIN, [(change, "3")]))
    with pytest.raises(UserError, match="augment"):
        files.check_same(path, dataclasses.replace(PLAIN, augment=None))
    longer = dataclasses.replace(PLAIN, stages=(Stage("one", 4),))
    with pytest.raises(UserError, match="stages"):
        files.check_same(path, longer)


def test_the_tree_is_written_as_json(tmp_path):
    wide = dataclasses.replace(PLAIN, augment=Augmentation(noise=0.1))
    tree = files.to_dict(wide)
    assert tree["augment"]["noise"] == 0.1
    assert tree["loading"]["shape"] == [175, 175, 175]


# --- former names of fields -----------------------------------------------------------


def test_settings_go_by_their_former_names_too():
    assert overrides.override(PLAIN, [("model.halvings", "1")]) == overrides.override(
        PLAIN, [("model.downsampled_steps", "1")]
    )
    stages = tuple(
        Stage(s.name, s.epochs, tuple((n.replace("fullres_steps", "refinements"), v)
                                      for n, v in s.changes))
        for s in STAGED.stages
    )  # fmt: skip
    assert dataclasses.replace(PLAIN, stages=stages) == STAGED
    changed = overrides.override(STAGED, [("stages.a.model.refinements", "2")])
    assert dict(changed.stages[0].changes)["model.fullres_steps"] == 2
    with pytest.raises(UserError, match=r"stages\.a\.model\.fullres_steps` VALUE"):
        overrides.override(STAGED, [("model.refinements", "2")])


def test_a_run_of_an_older_jaxreg_goes_on(tmp_path):
    """Its settings go by the names that fields had."""
    path = tmp_path / "experiment.json"
    files.write(path, STAGED)
    text = path.read_text()
    assert "halvings" not in text and "refinements" not in text
    text = text.replace("fullres_steps", "refinements")
    path.write_text(text.replace("downsampled_steps", "halvings"))
    files.check_same(path, STAGED)
    other = overrides.override(STAGED, [("model.halvings", "1")])
    with pytest.raises(UserError, match="model.downsampled_steps 2 -> 1"):
        files.check_same(path, other)


FORMER = """
from jaxreg import experiment
from jaxreg.data.augment import Augmentation
from jaxreg.data.pairs import Task, region_weights
from jaxreg.data.pipeline import Loading
from jaxreg.data.views import ViewConfig
from jaxreg.experiment import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.losses.contrastive import ContrastiveConfig
from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.models.promptreg import AS_PAPER
from jaxreg.models.rdp import RdpConfig
from jaxreg.models.sam import SamConfig
from jaxreg.models.unireg import UniRegConfig
from jaxreg.models.unireg_rpn import UniRegRpnConfig
from jaxreg.sam_experiment import RELEASED_RULE, SamData, SamExperiment, SamTrain
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig


def get_config():
    return experiment.load(DEMO)
"""


def test_configurations_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / "former.py"
    path.write_text(FORMER.replace("DEMO", repr(str(CONFIGS / "demo.py"))))
    with pytest.warns(UserWarning, match="jaxreg.data.loading now") as caught:
        found = files.load(path)
    assert found == files.load(CONFIGS / "demo.py")
    assert len(caught) == 7  # once for each module
    with pytest.raises(ImportError):
        importlib.import_module("jaxreg.data.pipeline")
    with pytest.raises(AttributeError):
        _ = pairs.region_weights


def test_an_import_that_fails_is_named(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text("from jaxreg.data.pairs import NoSuchTask\n")
    with pytest.raises(UserError, match="wrong.py cannot be run.*NoSuchTask"):
        files.load(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("x,y,z\n1,2,3 4\n")
    with pytest.raises(UserError, match="points.csv cannot be run: invalid syntax"):
        files.load(path)
