"""Tables, files and the significance test, against numbers worked out by hand."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxreg.errors import UserError
from jaxreg.evaluation import statistics
from jaxreg.evaluation import table as table_lib
from jaxreg.evaluation.table import EvalRecord, Result

NAN = math.nan


def row(method="net", task="head", pair="b to a", dice=None, **fields) -> EvalRecord:
    dice = {1: 0.5, 2: 0.7} if dice is None else dice
    return EvalRecord(method, task, pair, dice=dice, **fields)


def by_pair(method, scores, **fields) -> list[EvalRecord]:
    return [
        row(method, pair=f"p{i}", dice={1: score}, **fields)
        for i, score in enumerate(scores)
    ]


def cells(table: str, method: str) -> list[str]:
    line = next(t for t in table.splitlines() if t.startswith(f"| {method} |"))
    return [cell.strip() for cell in line.replace(r"\|", "/").strip("|").split("|")]


def test_means_leave_out_absent_labels():
    one = row(dice={1: 0.5, 2: 0.9, 3: NAN}, hd95_mm={1: 2.0, 2: NAN, 3: NAN})
    assert one.mean_dice == pytest.approx(0.7)
    assert one.mean_hd95_mm == 2.0
    assert math.isnan(row(dice={}).mean_dice)


def test_labels_of_one_map_alone_are_counted_below_the_table():
    lost = row(dice={1: 0.5, 2: 0.0, 3: NAN}, hd95_mm={1: 2.0, 2: NAN, 3: NAN})
    whole = row(pair="c to a", dice={1: 0.5}, hd95_mm={1: 2.0})
    said = "Labels of one map alone (Dice 0, not in HD95): net 1."
    assert said in table_lib.markdown(Result((lost, whole)))
    assert "one map alone" not in table_lib.markdown(Result((whole,)))


def test_result_knows_methods_tasks_and_labels_in_order():
    result = Result(
        (row("initial"), row("net"), row("net", "chest", dice={7: 1.0, 3: NAN}))
    )
    assert result.methods == ("initial", "net")
    assert result.tasks == ("head", "chest")
    assert result.labels == (1, 2, 3, 7)
    assert [r.method for r in result.select(task="head")] == ["initial", "net"]
    assert len(result.select(method="net", task="chest")) == 1


# --- files ---------------------------------------------------------------------------

NUMBER = st.floats(allow_nan=False, allow_infinity=False) | st.just(NAN)
NAME = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)
ROWS = st.builds(
    EvalRecord,
    method=NAME,
    task=NAME,
    pair=NAME,
    dice=st.dictionaries(st.integers(1, 9), NUMBER, max_size=3),
    tre_mm=NUMBER,
    folding_percent=NUMBER,
    sdlogj=NUMBER,
    seconds=NUMBER,
    first=st.booleans(),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=4))
def test_csv_round_trip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "result.csv"
    rows = tuple(dataclasses.replace(r, hd95_mm=dict(r.dice)) for r in rows)
    table_lib.write_csv(path, Result(rows))
    # repr: NaN equals NaN, and -0.0 differs from 0.0
    assert repr(table_lib.read_csv(path)) == repr(
        Result(
            tuple(
                dataclasses.replace(
                    r,
                    dice=dict(sorted(r.dice.items())),
                    hd95_mm=dict(sorted(r.hd95_mm.items())),
                )
                for r in rows
            )
        )
    )


def test_csv_says_what_is_in_it(tmp_path):
    path = tmp_path / "result.csv"
    result = Result(
        (
            row(dice={1: 0.5, 2: NAN}, hd95_mm={1: 3.0, 2: NAN}, seconds=1.5),
            row(task="chest", dice={}, tre_mm=2.25, first=True),
        )
    )
    table_lib.write_csv(path, result)
    assert path.read_text().splitlines() == [
        "method,task,pair,dice,hd95_mm,tre_mm,folding_percent,sdlogj,seconds,first,"
        "dice_1,dice_2,hd95_mm_1,hd95_mm_2",
        "net,head,b to a,0.5,3.0,,,,1.5,0,0.5,nan,3.0,nan",
        "net,chest,b to a,,,2.25,,,,1,,,,",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method,task\nnet,head\n", "lacks the columns pair, tre_mm"),
        ("method,task,pair,tre_mm,folding_percent,sdlogj,seconds\n", "no rows"),
        ("method,task,pair,tre_mm,folding_percent,sdlogj,seconds\nnet,a,b,1,2,3\n",
         "row 2 has 6 cells, the header 7"),
        ("method,task,pair,tre_mm,folding_percent,sdlogj,seconds\n"
         "net,a,b,1,2,3,4\nnet,a,c,1,2,x,4\n", "row 3 is damaged"),
    ],
)  # fmt: skip
def test_read_csv_refuses(tmp_path, text, message):
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        table_lib.read_csv(path)


def test_read_csv_refuses_what_is_no_text(tmp_path):
    path = tmp_path / "other.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no CSV text"):
        table_lib.read_csv(path)


# --- tables --------------------------------------------------------------------------


def test_markdown_of_one_task():
    result = Result(
        (
            row("initial", pair="p", dice={1: 0.2, 2: 0.4}, hd95_mm={1: 4.0, 2: NAN}),
            row("initial", pair="q", dice={1: 0.4, 2: NAN}, hd95_mm={1: 6.0, 2: NAN}),
            row(pair="p", folding_percent=0.5, sdlogj=0.1, seconds=60.0, first=True),
            row(pair="q", folding_percent=1.5, sdlogj=0.3, seconds=2.0),
        )
    )
    text = table_lib.markdown(result, label_names={"head": {1: "a|b"}})
    assert text.splitlines()[:4] == [
        "### head (2 pairs)",
        "",
        r"| method | Dice % | a\|b % | label 2 % | HD95 mm | %\|J\|<0 | SDlogJ | "
        "seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    # Means per pair 0.3 and 0.4; deviation sqrt(2 * 0.05^2 / 1) = 0.0707.
    assert cells(text, "initial") == [
        "initial", "35.0 ± 7.1", "30.0", "40.0", "5.00 ± 1.41", "-", "-", "-",
    ]  # fmt: skip
    # The first pair's time holds compilation and is left out.
    assert cells(text, "net") == [
        "net", "60.0 ± 0.0", "50.0", "70.0", "-", "1.000", "0.200", "2.00",
    ]  # fmt: skip
    assert "+ net 58.0 s" in text
    assert "TRE" not in text
    assert "overall" not in text


def test_markdown_of_several_tasks_counts_all_pairs_alike():
    result = Result(
        (
            row("net", "head", "p", dice={1: 0.9}),
            row("net", "head", "q", dice={1: 0.6}),
            row("net", "chest", "p", dice={1: 0.3, 5: NAN}, tre_mm=2.0),
        )
    )
    parts = table_lib.markdown(result).split("### ")[1:]
    assert [part.splitlines()[0] for part in parts] == [
        "head (2 pairs)", "chest (1 pair)", "overall (3 pairs)",
    ]  # fmt: skip
    head, chest, overall = parts
    assert cells(head, "net") == ["net", "75.0 ± 21.2", "75.0"]
    assert "label 5" not in chest
    assert cells(chest, "net") == ["net", "30.0", "30.0", "2.00"]
    assert cells(overall, "net") == ["net", "60.0 ± 30.0", "2.00"]


def test_many_labels_make_a_table_of_their_own():
    result = Result((row("net", dice={n: n / 100 for n in range(1, 10)}),))
    text = table_lib.markdown(result)
    assert cells(text, "net") == ["net", "5.0"]
    assert "| Dice | net |" in text
    assert "| label 9 % | 9.0 |" in text


def test_distances_of_each_label_are_a_table_below():
    result = Result(
        (
            row("initial", pair="p", hd95_mm={1: 4.0, 2: NAN}),
            row("initial", pair="q", hd95_mm={1: 6.0, 2: 3.0}),
            row("net", pair="p", hd95_mm={1: 1.0, 2: 2.5}),
        )
    )
    text = table_lib.markdown(result, label_names={"head": {2: "a|b"}})
    lines = text.splitlines()
    start = lines.index("| HD95 mm | initial | net |")
    assert lines[start + 2 : start + 4] == [
        "| label 1 | 5.00 | 1.00 |", r"| a\|b | 3.00 | 2.50 |",
    ]  # fmt: skip
    one = Result((row("net", dice={1: 0.5}, hd95_mm={1: 4.0}),))
    assert table_lib.markdown(one).count("HD95 mm") == 1  # the mean says it


def test_a_single_first_pair_keeps_its_time():
    result = Result((row(seconds=60.0, first=True),))
    assert cells(table_lib.markdown(result), "net")[-1] == "60.00"
    assert table_lib.first_pair_extra(result) == {}


def test_summary_has_a_line_per_method():
    result = Result(
        (*by_pair("initial", [0.25]), *by_pair("net", [0.5, 0.7], tre_mm=1.0))
    )
    assert table_lib.summary(result) == {
        "initial": "Dice % 25.0",
        "net": "Dice % 60.0 ± 14.1, TRE mm 1.00 ± 0.00",
    }


# --- significance --------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    def write(name, *rows):
        table_lib.write_csv(tmp_path / name, Result(rows))
        return tmp_path / name

    return write


def test_compare_six_differences_of_one_sign(files):
    a = [0.50, 0.55, 0.60, 0.65, 0.70, 0.75]
    gains = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]
    first = files("a.csv", *by_pair("initial", a), *by_pair("old", a))
    # In another order: pairs are matched by name.
    second = files(
        "b.csv", *by_pair("new", [x + g for x, g in zip(a, gains, strict=True)])[::-1]
    )
    found = statistics.compare(first, second)
    assert (found.method_a, found.method_b) == ("old", "new")
    assert (found.n, found.left_out) == (6, 0)
    assert found.mean_a == pytest.approx(0.625)
    assert found.mean_b == pytest.approx(0.66)
    assert found.mean_difference == pytest.approx(0.035)
    # All signs agree: only 2 of the 2^6 assignments of signs are as extreme.
    assert found.p == pytest.approx(2 / 64)
    assert 0.01 < found.interval[0] < 0.035 < found.interval[1] < 0.06


def test_compare_mixed_signs(files):
    first = files("a.csv", *by_pair("old", [0.5] * 4))
    second = files("b.csv", *by_pair("new", [0.51, 0.48, 0.53, 0.54]))
    # Rank 2 is negative. Of the 16 sets of negative ranks {}, {1} and {2} have a sum
    # of at most 2, and as many are as extreme at the other end.
    assert statistics.compare(first, second).p == pytest.approx(2 * 3 / 16)


def test_bootstrap_interval_is_binomial_for_zeros_and_ones(files):
    count, ones = 20, 7
    first = files("a.csv", *by_pair("old", [0.0] * count))
    second = files("b.csv", *by_pair("new", [1.0] * ones + [0.0] * (count - ones)))
    found = statistics.compare(first, second)
    expected = stats.binom.ppf((0.025, 0.975), count, ones / count) / count
    np.testing.assert_allclose(found.interval, expected, atol=1e-9)
    assert found.interval == statistics.compare(first, second).interval


def test_compare_without_any_difference(files):
    first = files("a.csv", *by_pair("old", [0.5, 0.6]))
    found = statistics.compare(first, first)
    assert found.p == 1.0
    assert found.mean_difference == 0.0
    assert found.interval == (0.0, 0.0)
    assert found.differing == 0
    assert "; no pair differs" in statistics.comparison_text(found)
    assert "p =" not in statistics.comparison_text(found)


def test_compare_a_constant_difference_and_one_pair(files):
    first = files("a.csv", *by_pair("old", [0.5]))
    second = files("b.csv", *by_pair("new", [0.75]))
    found = statistics.compare(first, second)
    assert found.interval == (0.25, 0.25)
    assert found.p == 1.0  # both signs are as extreme
    assert statistics.compare_files(first, second) == (
        "dice: new 75 %, old 50 %; difference +25 over 1 pair; no p: fewer than 6 "
        "pairs differ (1 of 1), with which Wilcoxon's signed-rank test cannot reach "
        "p < 0.05"
    )


@pytest.mark.parametrize("count", [2, 3, 5])
def test_compare_few_pairs_gives_no_p(files, count):
    first = files("a.csv", *by_pair("old", [0.5] * count))
    gains = [0.51 + 0.02 * n for n in range(count)]
    second = files("b.csv", *by_pair("new", gains))
    found = statistics.compare(first, second)
    assert found.p == pytest.approx(2 / 2**count)  # the least that there is
    text = statistics.comparison_text(found)
    assert f"(from +1 to {100 * (gains[-1] - 0.5):+.4g}) over {count} pairs" in text
    assert f"fewer than 6 pairs differ ({count} of {count}), with which" in text
    assert "p =" not in text and "interval" not in text


def test_compare_equal_differences_are_counted_exactly(files):
    """Five equal gains, but for the last digits of their subtraction."""
    old = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    new = [0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.7]
    first = files("a.csv", *by_pair("old", old))
    second = files("b.csv", *by_pair("new", new))
    found = statistics.compare(first, second)
    assert (found.n, found.differing) == (7, 5)
    assert found.p == pytest.approx(2 / 2**5)
    assert "fewer than 6 pairs differ (5 of 7)" in statistics.comparison_text(found)


def test_signed_rank_p_is_scipys_where_that_is_exact():
    rng = np.random.default_rng(0)
    for count in (1, 2, 6, 11, 50):
        differences = rng.normal(0.4, 1.0, count)
        expected = stats.wilcoxon(differences, method="exact").pvalue
        assert statistics._signed_rank_p(differences) == pytest.approx(expected)
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    sizes = np.array([1, 1, 1, 2, 2, 3, 4, 4])
    ranks = stats.rankdata(sizes)
    sums = (signs > 0) @ ranks
    for row in (3, 77, 130, 255):
        least = min(sums[row], ranks.sum() - sums[row])
        expected = min(1.0, 2 * (sums <= least).mean())
        got = statistics._signed_rank_p(signs[row] * sizes)
        assert got == pytest.approx(expected)


def test_compare_other_metrics_and_leave_out_what_one_lacks(files):
    first = files(
        "a.csv",
        row("old", pair="p", tre_mm=3.0, hd95_mm={2: 5.0}),
        row("old", pair="q", tre_mm=NAN),
    )
    second = files(
        "b.csv",
        row("new", pair="p", tre_mm=2.0, hd95_mm={2: 4.5}, dice={2: 0.9}),
        row("new", pair="q", tre_mm=1.0, dice={2: 0.8}),
    )
    tre = statistics.compare(first, second, metric="tre_mm")
    assert (tre.n, tre.left_out, tre.mean_difference) == (1, 1, -1.0)
    assert "(1 without it left out)" in statistics.comparison_text(tre)
    label = statistics.compare(first, second, metric="dice_2")
    assert label.mean_difference == pytest.approx(0.15)
    assert statistics.compare(first, second, metric="hd95_mm_2").mean_difference == -0.5
    with pytest.raises(UserError, match="no pair of .* has sdlogj in both"):
        statistics.compare(first, second, metric="sdlogj")


def test_compare_two_methods_of_one_file(files):
    path = files("a.csv", *by_pair("old", [0.5, 0.6]), *by_pair("new", [0.7, 0.9]))
    found = statistics.compare(path, path, method_a="old", method_b="new")
    assert found.mean_difference == pytest.approx(0.25)


def test_compare_tells_tasks_with_equal_pair_names_apart(files):
    rows = [row(task="x", dice={1: 0.1}), row(task="y", dice={1: 0.9})]
    found = statistics.compare(files("a.csv", *rows), files("b.csv", *rows[::-1]))
    assert (found.n, found.mean_difference) == (2, 0.0)


def test_compare_refuses(files):
    one = files("a.csv", *by_pair("old", [0.5, 0.6]))
    two = files("b.csv", *by_pair("old", [0.5, 0.6]), *by_pair("new", [0.5, 0.6]))
    more = files("c.csv", *by_pair("old", [0.5, 0.6, 0.7]))
    twice = files("d.csv", *by_pair("old", [0.5]), *by_pair("old", [0.5]))
    for message, paths, options in (
        ('different pairs: .*c.csv alone has "p2" of head', (one, more), {}),
        ("say which one", (one, two), {}),
        ('no method "olt" .did you mean old', (one, two), {"method_b": "olt"}),
        ("metric dise is unknown .did you mean dice", (one, one), {"metric": "dise"}),
        ("lists a pair of \"old\" twice", (one, twice), {}),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            statistics.compare(*paths, **options)
