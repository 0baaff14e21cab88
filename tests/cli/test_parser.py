"""Options made of dataclasses: spellings, kinds, defaults, help."""

import dataclasses
import pathlib
import warnings
from typing import Annotated, Literal, get_args

import pytest
import typer

from jaxreg import settings
from jaxreg.cli import main, parser, progress
from jaxreg.cli import options as cli_options
from jaxreg.errors import UserError
from jaxreg.losses import similarity
from jaxreg.nn import heads
from jaxreg.registration import options as options_lib
from jaxreg.registration.options import Options

PYTHON_ONLY = {"foreground", "inverse", "placement"}
NAMES = [f.name for f in dataclasses.fields(Options) if f.name not in PYTHON_ONLY]


def options_of(argv: list[str], **defaults) -> Options:
    """Returns the options that a verb of them makes of a command line."""
    app, seen = typer.Typer(), []

    def body(options: Options) -> None:
        seen.append(options)

    parser.verb(app, "verb", only=cli_options.PANELS, defaults=defaults)(body)
    typer.main.get_command(app).main(args=argv, standalone_mode=False)
    return seen[0]


def test_without_options_there_are_the_defaults_of_the_dataclass():
    assert options_of([]) == Options()
    assert options_of([], io_iterations=None).io_iterations is None
    given = options_of(["--io-iterations", "50"], io_iterations=None)
    assert given == Options(io_iterations=50)


def test_every_option_arrives():
    given = Options(
        fixed_modality="t1", moving_modality="ct", shape=(8, 9, 10),
        quality="best", precision="bfloat16", stored_orientation=True, task="a,b",
        pairing="intra", smoothness=0.5, level_iterations=3, prealign="sam-affine",
        io_iterations=None, io_target="map", io_sim="box_ncc", io_lr=1e-3, seed=7,
        input_masking=True, loss_function_masking=True, dice_loss_weight=2.0,
        intensity_conservation_loss=True, ct_window=(-1000, 400),
        quantile_range=(0.01, 0.98),
    )  # fmt: skip
    argv = []
    for name in NAMES:
        value = getattr(given, name)
        assert value != getattr(Options(), name), f"{name} is not tested"
        argv.append(parser.option_name(name))
        if name == "shape":
            argv.append("8,9,10")
        elif isinstance(value, tuple):
            argv += map(str, value)
        elif value is not True:
            argv.append(str(value).upper() if name == "io_target" else str(value))
    assert options_of(argv) == given


def test_register_and_evaluate_take_all_options(capsys):
    for verb in ("register", "evaluate"):
        main.main([verb, "--help"])
        said = capsys.readouterr().out
        missing = [n for n in NAMES if parser.option_name(n)[:22] not in said]
        assert missing == [], verb


def test_every_field_has_its_line_of_help():
    said = settings.described(Options)
    assert set(said) == {field.name for field in dataclasses.fields(Options)}
    assert said["seed"] == "Seed of the optimisation's noise."
    assert set(settings.described(cli_options.Weights)) == {
        "model", "network_weights", "sam_weights",
    }  # fmt: skip


def test_names_that_modules_without_jax_repeat():
    """What the options offer is what there is."""
    assert set(options_lib.SIMILARITIES) == {"auto", *similarity.SIMILARITIES}
    assert get_args(options_lib.Pairing) == get_args(heads.Pairing)


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("7", int, 7),
        ("007", int | None, 7),
        ("none", int | None, None),
        ("None", str | None, None),
        ("none", str | None, "none"),
        ("none", Annotated[str | None, str], "none"),
        ("1e-3", float, 1e-3),
        ("TRUE", bool, True),
        ("B", Literal["a", "b"], "b"),
        ("None", Literal["a", "b"] | None, None),
        ("T1", Annotated[str, ("t1", "t2")], "t1"),
        ("1,2", tuple[float, ...], (1.0, 2.0)),
        (["1", "2"], tuple[float, float] | None, (1.0, 2.0)),
        ("a/b", pathlib.Path, pathlib.Path("a/b")),
    ],
)
def test_text_is_read_by_the_annotation(text, annotation, value):
    assert settings.read(text, annotation, "x") == value


@pytest.mark.parametrize(
    ("value", "annotation", "words"),
    [
        ("2.5", int, "`x` is '2.5', expected a whole number"),
        ("fast", float | None, "`x` is 'fast', expected a number or None"),
        ("None", int, "`x` is 'None', expected a whole number"),
        ("lnc", Literal["lncc", "mse"], "expected one of lncc, mse .did you mean lncc"),
        ("1,2", tuple[int, int, int], "`x` is '1,2', expected 3 numbers, with commas"),
        ("maybe", bool, "expected true or false"),
    ],
)
def test_text_that_says_nothing_is_refused(value, annotation, words):
    with pytest.raises(UserError, match=words):
        settings.read(value, annotation, "x")


def test_errors_of_the_package_name_options_on_the_command_line():
    text = "`io_iterations` None and `sam_weights`; `model.channels_up` 1; `f(x)`"
    assert parser.spelled(text) == (
        "--io-iterations None and --sam-weights; --model.channels_up 1; `f(x)`"
    )


def test_warnings_name_options_on_the_command_line(capsys):
    with main._plain_warnings():
        warnings.warn("pass `io_lr`", stacklevel=1)
    assert capsys.readouterr().err == "jaxreg: warning: pass --io-lr\n"
    with progress.Bar("fit") as bar:
        bar.report("give `train.batch` 1")
    assert capsys.readouterr().err == "fit: give --train.batch 1\n"
