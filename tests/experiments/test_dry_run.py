"""What a dry run says a training step needs: that of the program that training runs."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from jaxreg.data.loading import Loading
from jaxreg.experiments import dry_run, overrides, run
from jaxreg.experiments.config import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.training import loop, parallel

REPOSITORY = pathlib.Path(__file__).parents[2]
TINY = Experiment(
    name="tiny",
    model=GradIconConfig((2, 4), (4,), downsampled_steps=0, fullres_steps=0),
    data=DataConfig(synthetic=("inter_mono",), pairs_per_epoch=8, validation_pairs=0),
    loading=Loading(shape=(16, 16, 16), prefetch=0),
    objective=Objective(similarity="mse", dice_weight=1.0),
    train=TrainConfig(batch=1),
    stages=(Stage("one", 1),),
)


def changed(**changes):
    several = [(name.replace("__", "."), value) for name, value in changes.items()]
    return overrides.override(TINY, several)


def memory(chosen):
    (found,) = dry_run.dry_run(chosen).memory.values()
    assert found.total is not None, found.reason
    return found


def test_memory_is_of_the_program_that_training_runs(tmp_path, monkeypatch):
    class Found(Exception):
        pass

    def planned(state, job, config, batches, *_):
        batch = parallel.place_batch(next(batches), job.layout)
        raise Found(job.step.lower(state, batch).compile().memory_analysis())

    monkeypatch.setattr(loop, "run", planned)
    with pytest.raises(Found) as raised:
        run.run(TINY, tmp_path / "run", report=lambda _: None)
    (plan,) = raised.value.args
    needed = plan.argument_size_in_bytes + plan.temp_size_in_bytes
    needed += plan.output_size_in_bytes - plan.alias_size_in_bytes
    # Temporary memory is most of it, at a grid as small as this too.
    assert plan.temp_size_in_bytes > plan.argument_size_in_bytes > 0
    assert memory(TINY).total == needed


def test_memory_grows_with_voxels():
    small, large = memory(TINY), memory(changed(loading__shape="32,32,32"))
    assert small.pairs == large.pairs == 1
    assert large.lasting == small.lasting > 0
    grown = ((large.total or 0) - large.lasting) / ((small.total or 0) - small.lasting)
    # Of eight times the voxels; small arrays are fused otherwise than large ones.
    assert 4 < grown < 9


@pytest.mark.slow
def test_memory_is_for_the_pairs_that_a_device_works_off_at_once():
    alone, four = memory(TINY), memory(changed(train__batch="4"))
    assert (alone.pairs, alone.least) == (1, alone.total)
    assert (four.pairs, four.least) == (4, alone.total)
    parts = memory(changed(train__batch="4", train__accumulate="4"))
    assert parts.pairs == 1
    # The batch is there as a whole, its features are not.
    assert (parts.total or 0) < (four.total or 0)


def test_what_cannot_be_compiled_is_said_and_not_guessed(monkeypatch):
    said = []

    def failing(lowered):
        assert said  # before what takes minutes
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    monkeypatch.setattr(jax.stages.Lowered, "compile", failing)
    found = dry_run.dry_run(TINY, report=said.append)
    rows = found.rows()
    for name in ("device", "pair"):
        assert rows[f"memory of a step per {name}"] == (
            "not known: it cannot be compiled here (RESOURCE_EXHAUSTED: out of memory)"
        )
    assert found.memory["one"].total is None
    assert said == [
        "one: compiling the training step for 16 x 16 x 16 on cpu, 1 pair at once"
    ]


def test_each_stage_has_its_own_memory():
    stages = (
        Stage("small", 1),
        Stage("same", 1),
        Stage("large", 1, (("loading.shape", (32, 32, 32)),)),
    )
    said = []
    found = dry_run.dry_run(
        dataclasses.replace(TINY, stages=stages), report=said.append
    )
    small, same, large = (found.memory[stage.name] for stage in stages)
    assert small is same and (large.total or 0) > 4 * (small.total or 0)
    assert [text.split(":")[0] for text in said] == ["small", "large"]
    assert (
        found.rows()["memory of a step per device, same"]
        == (found.rows()["memory of a step per device, small"])
    )


DEVICES = """
import json, sys
from jaxreg.experiments import dry_run
from tests.experiments import test_dry_run as t
for kind in ("mesh", "pmap"):
    found = dry_run.dry_run(t.changed(train__batch="2", train__parallel=kind))
    print(json.dumps([found.memory["one"].total, found.memory["one"].pairs]))
"""


@pytest.mark.slow
def test_memory_is_that_of_one_device_among_several():
    flags = re.sub(
        r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"]
    )
    flags += " --xla_force_host_platform_device_count=2"
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", DEVICES],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    alone = memory(TINY)
    for line in done.stdout.splitlines()[-2:]:
        total, pairs = map(int, re.findall(r"\d+", line))
        assert pairs == alone.pairs == 1
        assert total == pytest.approx(alone.total, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for resident memory")
@pytest.mark.parametrize("recipe", ["demo", "hippocampus_promptreg"])
def test_the_figure_is_what_a_process_grows_by(recipe):
    done = subprocess.run(
        [sys.executable, REPOSITORY / "benchmarks" / "step_memory.py",
         "--recipes", recipe, "--sizes", "32", "64"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip
    ratios = [float(row.split()[-1]) for row in done.stdout.splitlines()[1:]]
    assert len(ratios) == 2
    for ratio in ratios:
        assert 1 / 1.3 < ratio < 1.3
