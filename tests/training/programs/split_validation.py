"""Validation and blame of volumes over two devices and on one, as JSON.

Standard output: by number of devices, the scores, which pairs are to blame, and how
often each of the two programs exchanges planes between devices. Run in its own process,
see `same_gradient.py`.
"""

import json

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)

import numpy as np

from jaxreg.data.batches import Batches
from jaxreg.data.loading import Loading
from jaxreg.experiments import datasets, validation
from jaxreg.experiments.config import DataConfig, Experiment, Stage
from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIcon, GradIconConfig
from jaxreg.training import parallel

EXPERIMENT = Experiment(
    name="split_validation",
    model=GradIconConfig(
        (2, 4), (4,), downsampled_steps=0, fullres_steps=0, form="native"
    ),
    data=DataConfig(
        synthetic=("inter_mono",),
        synthetic_labels=2,
        pairs_per_epoch=2,
        validation_pairs=2,
    ),
    loading=Loading(shape=(11, 8, 8)),  # 2 does not divide the depth
    augment=None,
    objective=Objective(similarity="mse", dice_weight=0.1),
    stages=(Stage("one", 1),),
)


def main() -> None:
    """Prints one JSON object."""
    rng = np.random.default_rng(0)
    model, sources = GradIcon(EXPERIMENT.model), datasets.make_sources(EXPERIMENT)
    variables = jax.tree.map(
        lambda a: np.asarray(a + 0.05 * rng.normal(size=a.shape), a.dtype),
        model.init(jax.random.key(0)),
    )
    loading = datasets.loading_of(EXPERIMENT, validation=False)
    with Batches(sources.train, loading, batch_size=2) as batches:
        batch = next(batches)
    batch["fixed"][1, 2, 3, 4] = np.inf
    exchanges = []
    compile_step = parallel.compile_step

    def counted(step, layout, **options):
        compiled = compile_step(step, layout, **options)

        def run(*arguments):
            text = compiled.lower(*arguments).compile().as_text()
            exchanges.append(text.count(" collective-permute("))
            return compiled(*arguments)

        return run

    parallel.compile_step = counted
    found = {}
    for space in (1, 2):
        layout = parallel.make_layout(
            "mesh", space=space, devices=jax.devices()[:space]
        )
        settings = EXPERIMENT, sources, model, layout
        exchanges.clear()
        validate = validation.make_validation(*settings)
        assert validate is not None
        scores = dict(validate(variables).scores)
        blamed = validation.make_find_bad_pairs(*settings)(variables, batch)
        found[space] = {"scores": scores, "blamed": blamed, "exchanges": exchanges[:]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
