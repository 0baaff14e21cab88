"""The counts of benchmarks/counting.py against XLA's, and against published ones."""

import dataclasses
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxreg.models.gradicon import GradIcon, GradIconConfig
from jaxreg.models.unireg.paper import UniRegConfig
from jaxreg.nn.conv import api
from jaxreg.space import fields, filters, sampling
from jaxreg.xla import platforms

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import counting
import counting_rules
import programs
import roofline
import unireg_full

NUMBERS = ("NDHWC", "DHWIO", "NDHWC")
INPUTS, OUTPUTS = 24, 16  # enough for biases not to matter
SIZES = (6, 8, 10)


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def by_xla(function, *args):
    return (jax.jit(function).lower(*args).cost_analysis() or {})["flops"]


X = abstract(2, *SIZES, INPUTS)


def valid(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), "VALID", dimension_numbers=NUMBERS
    )


@pytest.mark.parametrize(
    ("function", "taps", "spatial", "built"),
    [
        (api.conv1, 1, SIZES, (1, INPUTS, OUTPUTS)),
        (api.conv3, 3, [n + 2 for n in SIZES], (3, INPUTS, OUTPUTS)),
        # Of pairs of voxels, with another pair of zeros in front.
        (api.conv3_stride2, 3, [n // 2 + 1 for n in SIZES], (2, 8 * INPUTS, OUTPUTS)),
        # Between voxels, to pairs of them.
        (api.conv4_transpose2, 4, [n + 2 for n in SIZES], (2, INPUTS, 8 * OUTPUTS)),
    ],
)
def test_built_is_what_xla_counts_in_the_form_for_cpu(function, taps, spatial, built):
    size, i, o = built
    counted = counting_rules.convolution(function, X, (taps,) * 3 + (INPUTS, OUTPUTS))
    xla = by_xla(valid, abstract(2, *spatial, i), abstract(size, size, size, i, o))
    assert counted["built"] == pytest.approx(xla, rel=1e-3)
    assert counted["built"] >= counted["flops"]


@pytest.mark.parametrize(
    ("function", "stride"), [(api.conv3, 1), (api.conv3_stride2, 2)]
)
def test_needed_is_what_xla_counts_in_the_definition(function, stride):
    shape = (3, 3, 3, INPUTS, OUTPUTS)

    def definition(x, kernel):  # explicit zeros, since XLA leaves implicit ones out
        x = jnp.pad(x, ((0, 0), *((1, 1),) * 3, (0, 0)))
        return lax.conv_general_dilated(
            x, kernel, (stride,) * 3, "VALID", dimension_numbers=NUMBERS
        )

    counted = counting_rules.convolution(function, X, shape)
    xla = by_xla(definition, X, abstract(*shape))
    assert counted["flops"] == pytest.approx(xla, rel=1e-3)


def test_a_transposed_convolution_needs_64_products_per_voxel():
    shape = (4, 4, 4, INPUTS, OUTPUTS)

    def definition(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1, 1), ((2, 2),) * 3, (2, 2, 2), dimension_numbers=NUMBERS
        )

    counted = counting_rules.convolution(api.conv4_transpose2, X, shape)
    # XLA leaves out what the border cuts off, two of 4 n per axis.
    kept = math.prod((4 * n - 2) / (4 * n) for n in SIZES)
    xla = by_xla(definition, X, abstract(*shape))
    assert counted["flops"] * kept == pytest.approx(xla, rel=1e-3)


def test_a_filter_needs_its_band_and_is_built_whole():
    n, volumes = 16, abstract(1, 3, 16, 16, 16)
    matrices = [filters.window_matrix(n, 3)] * 3
    (layer,) = counting_rules.record(lambda v: filters.along_axes(v, matrices), volumes)
    lines = 3 * 3 * n**2
    assert layer.flops == lines * 2 * (3 * n - 2)
    assert layer.built == lines * 2 * n * n
    assert layer.bytes == 4 * (2 * 3 * n**3 + 3 * n * n)
    assert layer.built == by_xla(lambda v: filters.along_axes(v, matrices), volumes)


def test_loops_count_their_turns():
    field = abstract(1, *SIZES, 3)
    (layer,) = counting_rules.record(lambda v: fields.integrate(v, 5), field)
    assert layer.times == 5
    points = math.prod(SIZES)
    assert layer.taps == 8 * points
    assert layer.bytes == 3 * 3 * 4 * points  # field, points, result
    assert counting.total([layer], lambda x: x.taps) == 40 * points


def test_an_image_asks_for_no_gradient_and_a_field_does():
    image, points = abstract(1, *SIZES, 1), abstract(1, *SIZES, 3)
    (warp,) = counting_rules.record(lambda *a: fields.warp(*a), image, points)
    (read,) = counting_rules.record(sampling.sample, image, points)
    assert [len(counting.gradient(layer)) for layer in (warp, read)] == [1, 2]


def test_gradients_of_a_convolution_are_two_of_its_size():
    model = GradIcon(GradIconConfig((2, 4), (4,), downsampled_steps=0, fullres_steps=0))
    variables = jax.eval_shape(model.init, jax.random.key(0))
    image = abstract(1, *SIZES, 1)

    def run(variables, image):
        return model.apply(variables, image, image)[0].transform

    layers = counting_rules.record(run, variables, image)
    down, up, last = (x for x in layers if x.kind == "matrix" and x.name.count("/"))
    voxels = math.prod(SIZES)
    assert down.flops == 2 * 27 * 2 * 4 * voxels / 8
    assert up.flops == 2 * 64 * 4 * 4 * voxels / 8
    assert last.flops == 2 * 27 * 6 * 3 * voxels
    assert last.bytes == 4 * (voxels * (4 + 2 + 3) + 27 * 6 * 3)
    assert [g.flops for g in counting.gradient(last)] == [last.flops] * 2
    assert {g.bytes for g in counting.gradient(last)} == {last.bytes}


def test_a_small_network_adds_up_to_what_xla_counts():
    given = programs.build("rdp", size=32, task="forward", precision="default")
    layers = given.layers()
    with platforms.tracing_for("cuda"):
        traced = jax.jit(given.whole).trace(*given.whole_args)
    counted = traced.lower(lowering_platforms=("cuda",)).cost_analysis() or {}
    xla = counted["flops"]
    assert sum(layer.built for layer in layers) == pytest.approx(xla, rel=0.02)


def test_padding_to_tiles():
    array = counting.Array((1, 175, 175, 175, 3))
    # The best two axes: 175 of the volume to 176 and to 256; channels stay 3.
    assert array.padded_bytes() == 175 * 176 * 256 * 3 * 4
    assert counting.Array((16, 256), 2).padded_bytes() == 16 * 256 * 2


def test_the_bound_is_the_longer_time():
    device = roofline.Device(1e12, 2e12, 4e12, 1e9, array=128)
    array = counting.Array((1000, 1000))
    layer = counting.Layer(
        "",
        "",
        "matrix",
        4e9,
        8e9,
        (array,),
        (array,),
        product=counting.Product(16, 27, 3),
    )
    clock = roofline.Clock(device, "default")
    assert clock.compute(layer) == pytest.approx(2e-3)
    assert clock.bound(layer) == clock.memory(layer) == pytest.approx(8e-3)
    exact = dataclasses.replace(clock, precision="float32")
    assert exact.compute(layer) == pytest.approx(4e-3)
    taps = dataclasses.replace(clock, lanes="taps")
    # 432 of 512 rows and 3 of 128 columns; twice the arithmetic.
    assert taps.compute(layer) == pytest.approx(4e-3 * 512 / 432 * 128 / 3)


# --- UniReg's published size ----------------------------------------------------------

POOLED = UniRegConfig(downsample="maxpool")


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (UniRegConfig(), 475.2),
        (POOLED, 470.1),
        (dataclasses.replace(POOLED, head="flow"), 456.5),
    ],
)
def test_unireg_at_its_published_grid(config, billions):
    size = unireg_full.size_of(config)
    assert size.convolutions / 1e9 == pytest.approx(billions, abs=0.06)
    assert size.correlation / 1e9 == pytest.approx(7.64, abs=0.01)
    if config == POOLED:
        counted = size.convolutions + size.correlation
        assert counted == pytest.approx(unireg_full.PAPER[1], rel=0.002)
        assert size.parameters == pytest.approx(unireg_full.PAPER[0], rel=0.02)
