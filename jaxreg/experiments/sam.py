"""Self-supervised training of SAM from two crops of each scan.

OUT/experiment.json   the settings
OUT/scans.txt         what manifests listed when the run was started
OUT/log.csv           and TensorBoard events
OUT/checkpoints/      from which a stopped run goes on
OUT/weights/          the best weights by the held-out scans' loss, for `jaxreg match`

References:
  Yan et al., SAM: Self-supervised learning of pixel-wise anatomical embeddings in
  radiological images, IEEE TMI 2022.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg.data import batches as batches_lib
from jaxreg.data import cache as cache_lib
from jaxreg.data import modality
from jaxreg.data.manifest.records import Record
from jaxreg.data.sam_source import ViewSource
from jaxreg.errors import UserError
from jaxreg.experiments import dry_run as dry_run_lib
from jaxreg.experiments import folder, sam_config
from jaxreg.experiments import run as run_lib
from jaxreg.experiments.run import Outcome, RunPlan
from jaxreg.experiments.sam_config import SamExperiment
from jaxreg.experiments.warm_start import merge_variables
from jaxreg.losses import contrastive
from jaxreg.matching import points
from jaxreg.models import sam
from jaxreg.training import loop, optimizer, parallel, state, step, utilisation
from jaxreg.training.parallel import Layout
from jaxreg.training.stage import Report, StagePlan
from jaxreg.typing import Batching, Variables
from jaxreg.weights import bundle, load, zoo
from jaxreg.xla import compilation_cache

_VALIDATION_SEED = 0


def run(
    experiment: SamExperiment,
    out: pathlib.Path,
    *,
    resume: bool = False,
    report: Report = print,
    profile: int | None = None,
) -> Outcome:
    """Trains SAM as an experiment says; see `run.train`."""
    return run_lib.train(
        experiment, out, _plan, resume=resume, report=report, profile=profile
    )


def _plan(
    experiment: SamExperiment, out: pathlib.Path, report: Report, *, begun: bool
) -> RunPlan:
    """Returns the one stage of an experiment; its folder is that of the run."""
    del report, begun
    settings = experiment.train
    layout = layout_of(experiment)
    train, held = sam_config.records_of(experiment)
    scans = [folder.line_of(split, r) for split, records in (("train", train),
             ("val", held)) for r in records]  # fmt: skip

    def fresh() -> Variables:
        variables = sam.init(experiment.model, _key(experiment, 0))
        return jax.tree.map(np.asarray, variables)

    def initial(_: Variables | None) -> tuple[Variables, list[str]]:
        if settings.start is None:
            return fresh(), []
        return _started(experiment, fresh())

    job = loop.Job(
        step=parallel.compile_step(make_train_step(experiment, layout.axis), layout),
        layout=layout,
        batch_size=settings.batch,
        steps=settings.steps,
        steps_per_epoch=settings.steps_per_epoch,
        learning_rate=optimizer.make_schedule(
            experiment.optimizer, settings.steps, settings.steps_per_epoch
        ),
        validate=make_validation(experiment, held),
        find_bad_pairs=_find_bad_scans,
        record={},
        flops=lambda: _model_flops(experiment),
        metric="loss" if held and experiment.loop.metric != "last" else None,
    )
    stage = StagePlan(
        title="",
        folder=out,
        source=_source(experiment, train, held=False),
        loading=experiment.loading.of_views(experiment.views.shape),
        job=job,
        optimizer=_optimizer(experiment),
        key=_key(experiment, 1),
        ema=settings.ema > 0,
        config=experiment.loop,
        fresh=fresh,
        initial=initial,
    )
    return RunPlan(
        {folder.SCANS: scans},
        (lambda: stage,),
        lambda variables: bundle_of(experiment, variables, train),
    )


def bundle_of(
    experiment: SamExperiment, variables: Variables, records: Sequence[Record]
) -> bundle.Bundle:
    """Returns trained weights as they are stored.

    Args:
      experiment: of the training.
      variables: of the network.
      records: the scans that trained; the weights serve MR if some of them are MR.
    """
    loading = experiment.loading
    mri = any(modality.kind(record.modality) == "mri" for record in records)
    trained = sam.TrainedSam(
        experiment.model,
        variables,
        experiment.views.spacing_mm,
        loading.ct_window,
        (loading.quantile_range or (0.0, 0.99)) if mri else None,
    )
    return bundle.Bundle(
        variables=jax.tree.map(np.asarray, variables),
        model=zoo.SAM,
        config=dataclasses.asdict(experiment.model),
        preprocessing=zoo.sam_rule(trained),
        source=f"trained by jaxreg, experiment {experiment.name}",
        licence=experiment.licence,
    )


def layout_of(experiment: SamExperiment) -> Layout:
    """Returns the devices of a run.

    Raises:
      UserError: they cannot share the batch with at least two volumes for each.
    """
    layout = parallel.make_layout(experiment.train.parallel)
    batch = experiment.train.batch
    if batch % layout.data or batch < 2 * layout.data:
        raise UserError(
            f"train.batch is {batch}, which {layout.data} devices cannot share evenly "
            f"with two volumes for each; take a multiple of {layout.data}, at least "
            f"{2 * layout.data}, or `train.parallel` single"
        )
    return layout


def make_loss(experiment: SamExperiment) -> Callable:
    """Returns ``loss(variables, batch, key, train, axis) -> (loss, parts, after)``."""

    def loss(variables, batch, key, *, train: bool, axis: str | None = None):
        images, places, valid = (
            _interleaved(batch, suffix) for suffix in ("", "_places", "_valid")
        )
        if train:
            # Statistics of a device's own views, as on each GPU of the original.
            batching = Batching(replicas=1, axis=axis)
            found, variables = sam.train_features(
                experiment.model, variables, images, batching=batching
            )
        else:
            found = sam.features(experiment.model, variables, images)
        value, parts = contrastive.contrastive(
            found.fine, found.coarse, places, valid, key, experiment.contrast
        )
        return value, {"loss": value, **parts}, variables

    return loss


def make_train_step(experiment: SamExperiment, axis: str | None = None) -> Callable:
    """Returns ``step(state, batch) -> (state, parts)`` for one device's share."""
    loss = make_loss(experiment)

    def parts_of(variables, batch, key):
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))

        def of(params):
            value, parts, after = loss(
                {**variables, "params": params}, batch, key, train=True, axis=axis
            )
            return value, (parts, after)

        gradient, (parts, after) = jax.grad(of, has_aux=True)(variables["params"])
        if axis is not None:
            gradient, parts = jax.lax.pmean((gradient, parts), axis)
        return gradient, parts, after

    return step.TrainStep(parts_of, _optimizer(experiment), experiment.train.ema)


@compilation_cache.kept()
def dry_run(
    experiment: SamExperiment, *, report: Report = lambda _: None
) -> dict[str, str]:
    """Checks settings, compiles the training step, and returns what it needs.

    The data need not be there, and nothing is allocated.

    Args:
      experiment: what to try.
      report: takes a sentence before the compilation.

    Returns:
      What to print, name to value.

    Raises:
      UserError: settings, devices or data do not fit together.
    """
    data = experiment.data
    sentences = list(dry_run_lib.manifest_sentences(data.manifests, data.holdout))
    if data.manifests and all(pathlib.Path(path).exists() for path in data.manifests):
        sam_config.records_of(experiment)
    layout = layout_of(experiment)
    share = experiment.train.batch // layout.data
    start, lower = _traced(experiment, layout)
    size = experiment.views.shape
    where = dry_run_lib.grid_and_device(size)
    volumes = dry_run_lib.counted(share, "volume")
    report(f"compiling the training step for {where}, 2 views of each of {volumes}")
    began = time.perf_counter()
    # Its negatives come from other volumes.
    memory = dry_run_lib.memory_of(lower, start, share, fewest=2)
    seconds = time.perf_counter() - began
    params = jax.tree.leaves(start.variables["params"])
    d, h, w = size
    return {
        "parameters": f"{sum(leaf.size for leaf in params):,}",
        "views": f"2 of {d} x {h} x {w} of each of {share} volumes per device",
        **memory.rows(what="volume"),
        "compiled for": where,
        "seconds to compile": f"{seconds:.1f}",
        **{f"data {i}": text for i, text in enumerate(sentences, start=1)},
    }


def _traced(
    experiment: SamExperiment, layout: Layout
) -> tuple[state.TrainState, Callable[[int], jax.stages.Lowered]]:
    """Returns the shapes of a state, and volumes on a device to the lowered step."""
    start = jax.eval_shape(
        lambda key: state.start(
            sam.init(experiment.model, key),
            _optimizer(experiment),
            key,
            ema=experiment.train.ema > 0,
        ),
        _key(experiment, 0),
    )
    step_of = parallel.compile_step(make_train_step(experiment, layout.axis), layout)

    def lower(volumes):
        batch = {
            f"{side}{suffix}": jax.ShapeDtypeStruct(
                (volumes * layout.data, *experiment.views.shape, channels), jnp.float32
            )
            for side in ("moving", "fixed")
            for suffix, channels in (("", 1), ("_places", 3), ("_valid", 1))
        }
        return step_of.lower(*parallel.placed_shapes(start, batch, layout))

    return start, lower


def _model_flops(experiment: SamExperiment) -> float | None:
    """Returns the arithmetic of a step, see `utilisation.counted_flops`.

    That of two volumes, the fewest that a step can have, for each two of the batch.
    """
    plain = utilisation.plain(experiment.model)
    _, lower = _traced(dataclasses.replace(experiment, model=plain), Layout("single"))
    found = utilisation.counted_flops(lambda: lower(2))
    return None if found is None else found * experiment.train.batch / 2


def _interleaved(batch: Mapping[str, jax.Array], suffix: str) -> jax.Array:
    """The two views of each volume after each other, 2N D H W C."""
    sides = [batch[f"{side}{suffix}"] for side in ("moving", "fixed")]
    stacked = jnp.stack(sides, 1).astype(jnp.float32)
    return stacked.reshape(-1, *stacked.shape[2:])


def _key(experiment: SamExperiment, purpose: int) -> jax.Array:
    return jax.random.split(jax.random.key(experiment.train.seed))[purpose]


def _optimizer(experiment: SamExperiment) -> optax.GradientTransformation:
    train = experiment.train
    return optimizer.make_optimizer(
        experiment.optimizer, train.steps, train.steps_per_epoch
    )


def _started(
    experiment: SamExperiment, fresh: Variables
) -> tuple[Variables, list[str]]:
    """Returns the weights of `train.start`, which must fit to the last array."""
    start = experiment.train.start
    assert start is not None
    merged = merge_variables(fresh, load.load_sam(start).variables)
    wrong = (*merged.misshapen, *merged.missing, *merged.unexpected)
    if wrong:
        raise UserError(
            f"train.start {start} does not fit the network ({', '.join(wrong[:3])}); "
            "give `model.channels` and `model.embedding` the sizes of the weights"
        )
    text = f"started from {start}: {len(merged.loaded)} arrays loaded"
    return merged.variables, [text]


def _source(experiment: SamExperiment, records: Sequence[Record], *, held: bool):
    loading, cache = experiment.loading, None
    if loading.cache_dir is not None:
        limit = loading.cache_limit_gb
        cache = cache_lib.Cache(
            pathlib.Path(loading.cache_dir),
            limit_bytes=None if limit is None else int(limit * 1e9),
        )
    return ViewSource(
        records,
        experiment.train.batch,
        loading.rule,
        points.in_sam_range,
        experiment.views,
        seed=_VALIDATION_SEED if held else experiment.train.seed,
        shuffled=not held,
        cache=cache,
    )


def make_validation(
    experiment: SamExperiment, records: Sequence[Record]
) -> Callable[[Variables], loop.Validation] | None:
    """Returns ``validate(variables)``: the loss on held-out scans; None without any.

    The views and the loss' choices are the same every time, the network is the one in
    use: running statistics. Each process scores its share of the batches.
    """
    if not records:
        return None
    loss, batch_size = make_loss(experiment), experiment.train.batch
    source = _source(experiment, records, held=True)
    one = Layout("single")

    def score(variables, batch):
        return loss(variables, batch, jax.random.key(0), train=False)[1]

    compiled = parallel.compile_step(score, one, donate=False)
    loading = dataclasses.replace(
        experiment.loading.of_views(experiment.views.shape), workers=0
    )
    count = len(records) // batch_size
    mine = range(jax.process_index(), count, jax.process_count())

    def validate(variables):
        sums: dict[str, float] = dict.fromkeys(("loss", "fine", "coarse"), 0.0)
        images = {}
        placed = parallel.place_state(variables, one)
        for index in mine:
            with batches_lib.Batches(
                source, loading, batch_size=batch_size, start=index, stop=index + 1
            ) as batches:
                batch = next(batches)
            parts = jax.device_get(compiled(placed, parallel.place_batch(batch, one)))
            for name in sums:
                value = float(parts[name])
                # Infinite, since not a number might pass for the best.
                sums[name] += value if np.isfinite(value) else np.inf
            if index == 0:
                sides = ("moving", "fixed")
                images = {f"view_{i}": batch[s][0, ..., 0] for i, s in enumerate(sides)}
        totals = loop.sum_over_processes(np.array(list(sums.values())))
        scores = {n: float(t) / count for n, t in zip(sums, totals, strict=True)}
        return loop.Validation(scores, images)

    return validate


def _find_bad_scans(_: Variables, batch: Mapping[str, np.ndarray]) -> list[int]:
    """Returns the volumes with a non-finite view; no loss is of one volume alone."""
    return [
        i
        for i in range(len(batch["index"]))
        if not all(np.isfinite(array[i]).all() for array in batch.values())
    ]
