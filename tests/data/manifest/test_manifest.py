"""Manifests of every kind, and what `check` finds in them."""

import csv
import dataclasses
import gzip
import json
import pathlib
import re

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.data import preprocess
from jaxreg.data.loading import Loading
from jaxreg.data.manifest import neighbours as neighbours_lib
from jaxreg.data.manifest import read as read_lib
from jaxreg.data.manifest import records as records_lib
from jaxreg.data.manifest.check import check
from jaxreg.data.manifest.read import read_manifest
from jaxreg.data.manifest.records import Manifest, Record
from jaxreg.errors import UserError
from jaxreg.io import tables, volumes


def save(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def image(path, shape=(5, 6, 7), *, seed=0, affine=None):
    rng = np.random.default_rng([seed, *path.name.encode()])
    return save(path, rng.uniform(0, 100, shape).astype(np.float32), affine)


def label(path, shape=(5, 6, 7), *, values=(0, 1, 2), affine=None):
    array = np.resize(np.array(values, np.int16), shape)
    return save(path, array, affine)


def touch(*paths):
    """Files that are named and not read."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def csv_file(folder, text, name="study.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def json_file(folder, content, name="study.json"):
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def only(records, **fields):
    (found,) = [
        r for r in records if all(getattr(r, k) == v for k, v in fields.items())
    ]
    return found


# --- CSV ------------------------------------------------------------------------------


def test_csv_needs_only_images(tmp_path):
    records = read_manifest(csv_file(tmp_path, "image\na.nii.gz\nb/c.mha\n")).records
    assert records == (
        Record(tmp_path / "a.nii.gz", "a", "study"),
        Record(tmp_path / "b" / "c.mha", "c", "study"),
    )


def test_csv_reads_every_column(tmp_path):
    path = csv_file(
        tmp_path,
        "image,subject,dataset,modality,region,label,mask,landmarks,pairing,split,"
        "session\n"
        'a.nii,p1,"knee, left",CT,knee,l.nii,m.nii,p.csv,Intra,VAL,2\n',
    )
    manifest = read_manifest(path)
    assert manifest == Manifest(
        (
            Record(
                image=tmp_path / "a.nii",
                subject="p1",
                dataset="knee, left",
                modality="CT",
                region="knee",
                label=tmp_path / "l.nii",
                mask=tmp_path / "m.nii",
                landmarks=tmp_path / "p.csv",
                pairing="intra",
                split="val",
                session="2",
            ),
        ),
        str(path),
        {},
    )


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfimage,subject\r\na.nii,p\r\n\r\n",
        b"image;subject\r\na.nii;p\r\n",
        b"image\tsubject\na.nii\tp",
        b' Image , SUBJECT \n "a.nii" , p \n,\n'.replace(b' "a.nii" ', b" a.nii "),
        b'"image","subject_id"\n"a.nii","p"\n',
    ],
    ids=["bom-crlf", "semicolon", "tab", "spaces", "quotes-alias"],
)
def test_csv_dialects(tmp_path, text):
    records = read_manifest(csv_file(tmp_path, text)).records
    assert records == (Record(tmp_path / "a.nii", "p", "study"),)


def test_paths_are_relative_to_the_manifest(tmp_path, monkeypatch):
    folder = tmp_path / "lists"
    folder.mkdir()
    csv_file(folder, f"image,label\n../a.nii,{tmp_path}/l.nii\n")
    monkeypatch.chdir(tmp_path)
    (record,) = read_manifest("lists/study.csv").records
    assert (record.image, record.label) == (tmp_path / "a.nii", tmp_path / "l.nii")


def test_images_of_one_name_are_different_subjects(tmp_path):
    path = csv_file(tmp_path, "image\nsub-1/t1.nii\nsub-2/t1.nii\nflair.nii\n")
    subjects = [record.subject for record in read_manifest(path).records]
    assert subjects == ["sub-1/t1", "sub-2/t1", "flair"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "empty"),
        (b"\n  \n", "no rows"),
        (b"image,subject\n", "lists no image"),
        (b"image,subjekt\na,b\n", "column 'subjekt'.*did you mean subject"),
        (b"image,colour\na,b\n", "column 'colour'.*remove or rename"),
        (b"subject,label\na,b\n", "no column image, got subject, label"),
        (b"image,label,segmentation\na,b,c\n", "column 'label' twice"),
        (
            b"image,split\na.nii,training\n",
            "line 2: split is 'training'.* mean train",
        ),
        (b"image,pairing\na.nii,both\n", "line 2: pairing is 'both'.*inter, intra"),
        (b'image,subject\na.nii,p\n\nb.nii,"q",r\n', "line 4 has 3 cells, expected 2"),
        (b"image,subject\na.nii\n", "line 2 has 1 cells"),
        (b"image,subject\n,p\n", "line 2 names no image"),
        (b'image,subject\n"a.nii"x,p\n', "expected CSV"),
        (b"image\n\xff\xfe\n", "no UTF-8 text"),
    ],
)
def test_wrong_csv_is_explained(tmp_path, text, message):
    path = csv_file(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        read_manifest(path)
    assert str(path) in str(error.value)


def test_missing_manifest(tmp_path):
    for name in ("none.csv", "a" * 300 + ".csv"):
        with pytest.raises(UserError, match=f"manifest .*{name} does not exist"):
            read_manifest(tmp_path / name)


def test_an_image_is_no_manifest(tmp_path):
    with pytest.raises(UserError, match="no UTF-8 text"):
        read_manifest(image(tmp_path / "a.nii.gz"))


# --- round trip -----------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1)
PLACE = st.lists(
    st.from_regex(r"\w[\w,;' \"-]{0,8}\w", fullmatch=True), min_size=1, max_size=3
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("round")


@settings(max_examples=30, deadline=None)
@given(data=st.data(), count=st.integers(1, 4), suffix=st.sampled_from(["csv", "json"]))
def test_written_manifest_reads_back(folder, data, count, suffix):

    def place():
        parts = data.draw(PLACE)
        base = data.draw(st.sampled_from([folder, pathlib.Path("/elsewhere")]))
        return base.joinpath(*parts).with_suffix(".nii")

    records = tuple(
        Record(
            image=place(),
            subject=data.draw(TEXT),
            dataset=data.draw(TEXT),
            modality=data.draw(TEXT),
            region=data.draw(st.one_of(st.just(""), TEXT)),
            label=data.draw(st.booleans()) and place() or None,
            mask=data.draw(st.booleans()) and place() or None,
            pairing=data.draw(st.sampled_from(["inter", "intra"])),
            split=data.draw(st.sampled_from(["train", "val", "test"])),
            session=data.draw(st.one_of(st.just(""), TEXT)),
        )
        for _ in range(count)
    )
    names = {records[0].dataset: {1: "liver", 5: "spleen"}} if suffix == "json" else {}
    path = folder / f"out.{suffix}"
    written = Manifest(records, str(path), names)
    rows = [
        {k: "" if v is None else str(v) for k, v in dataclasses.asdict(r).items()}
        for r in records
    ]
    with open(path, "w", newline="", encoding="utf-8") as file:
        if suffix == "csv":
            writer = csv.DictWriter(file, records_lib.FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        else:
            json.dump({"labels": names, "data": rows}, file)
    assert read_manifest(path) == written


# --- JSON -----------------------------------------------------------------------------


def test_own_json(tmp_path):
    path = json_file(
        tmp_path,
        {
            "labels": {"hip": {"1": "anterior", "2": "posterior"}},
            "data": [
                {"image": "a.nii", "dataset": "hip", "label": "l.nii", "subject": 7},
                {"image": "b.nii", "dataset": "hip", "mask": None},
            ],
        },
    )
    manifest = read_manifest(path)
    assert manifest.labels == {"hip": {1: "anterior", 2: "posterior"}}
    assert manifest.records == (
        Record(tmp_path / "a.nii", "7", "hip", label=tmp_path / "l.nii"),
        Record(tmp_path / "b.nii", "b", "hip"),
    )


def test_labels_for_all_datasets(tmp_path):
    data = [{"image": "a.nii", "dataset": "x"}, {"image": "b.nii", "dataset": "y"}]
    path = json_file(tmp_path, {"labels": {"1": "liver"}, "data": data})
    assert read_manifest(path).labels == {"x": {1: "liver"}, "y": {1: "liver"}}


def test_finetune_json(tmp_path):
    entry = {
        "image": "a.nii.gz",
        "segmentation": "s.nii.gz",
        "mask": "m.nii.gz",
        "subject_id": "p1",
        "modality": "ct",
    }
    manifest = read_manifest(json_file(tmp_path, {"data": [entry]}, "knees.json"))
    assert manifest.records == (
        Record(
            tmp_path / "a.nii.gz",
            "p1",
            "knees",
            "ct",
            label=tmp_path / "s.nii.gz",
            mask=tmp_path / "m.nii.gz",
        ),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no valid JSON"),
        ([{"image": "a.nii"}], "holds a list, expected data"),
        ({}, "holds nothing"),
        ({"experiment": {"name": "x"}}, "holds experiment, expected data"),
        ({"data": {}}, "data is dict"),
        ({"data": []}, "lists no image"),
        ({"data": ["a.nii"]}, "entry 1 is str"),
        ({"data": [{"image": "a"}, {"label": "b"}]}, "no key image, got label"),
        ({"data": [{"image": ""}]}, "entry 1 names no image"),
        ({"data": [{"image": ["a", "b"]}]}, r"entry 1: image is \['a', 'b'\]"),
        (
            {"data": [{"image": "a", "sement": "b"}]},
            "key 'sement'.* mean segmentation",
        ),
        ({"data": [{"image": "a"}], "label": {}}, "key 'label'.*did you mean labels"),
        ({"data": [{"image": "a"}], "labels": {"x": {"y": 1.5}}}, "labels is"),
        ({"data": [{"image": "a"}], "labels": ["liver"]}, "labels is"),
        ({"data": [{"image": "a", "split": "dev"}]}, "entry 1: split is 'dev'"),
        ({"training": "imagesTr"}, "training is str"),
        ({"training": [{"label": "b"}]}, "training has the entry"),
        ({"training": [], "numTraining": 0}, "lists no image"),
    ],
)
def test_wrong_json_is_explained(tmp_path, content, message):
    path = tmp_path / "study.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        read_manifest(path)
    assert str(path) in str(error.value) or str(tmp_path) in str(error.value)


# --- Learn2Reg ------------------------------------------------------------------------


def test_learn2reg_paired(tmp_path):
    """As ThoraxCBCT and NLST: visits of one subject, validation among the training."""
    path = json_file(
        tmp_path,
        {
            "name": "ThoraxCBCT",
            "pairings": "paired",
            "modality": {"0": "FBCT", "1": "CBCT"},
            "labels": {},
            "numTraining": 4,
            "training": [
                {
                    "image": "./imagesTr/ThoraxCBCT_0000_0000.nii.gz",
                    "mask": "./masksTr/ThoraxCBCT_0000_0000.nii.gz",
                    "keypoint": "./keypointsTr/ThoraxCBCT_0000_0000.nii.gz",
                },
                {
                    "image": "./imagesTr/ThoraxCBCT_0000_0001.nii.gz",
                    "keypoints01": "./keypoints01Tr/ThoraxCBCT_0000_0001.nii.gz",
                },
                {"image": "./imagesTr/ThoraxCBCT_0011_0000.nii.gz"},
                {"image": "./imagesTr/ThoraxCBCT_0011_0001.nii.gz"},
            ],
            "training_paired_images": [
                {
                    "fixed": "./imagesTr/ThoraxCBCT_0000_0001.nii.gz",
                    "moving": "./imagesTr/ThoraxCBCT_0000_0000.nii.gz",
                }
            ],
            "registration_val": [
                {
                    "fixed": "./imagesTr/ThoraxCBCT_0011_0001.nii.gz",
                    "moving": "./imagesTr/ThoraxCBCT_0011_0000.nii.gz",
                }
            ],
            "registration_test": [
                {
                    "fixed": "./imagesTs/ThoraxCBCT_0014_0001.nii.gz",
                    "moving": "./imagesTs/ThoraxCBCT_0014_0000.nii.gz",
                }
            ],
        },
        "ThoraxCBCT_dataset.json",
    )
    manifest = read_manifest(path)
    assert manifest.labels == {}
    assert len(manifest.records) == 6
    assert {r.pairing for r in manifest.records} == {"intra"}
    assert {r.modality for r in manifest.records} == {"ct"}
    first = only(manifest.records, subject="ThoraxCBCT_0000", session="0000")
    assert first == Record(
        tmp_path / "imagesTr" / "ThoraxCBCT_0000_0000.nii.gz",
        "ThoraxCBCT_0000",
        "ThoraxCBCT",
        "ct",
        mask=tmp_path / "masksTr" / "ThoraxCBCT_0000_0000.nii.gz",
        landmarks=tmp_path / "keypointsTr" / "ThoraxCBCT_0000_0000.csv",
        pairing="intra",
        session="0000",
    )
    assert (
        only(manifest.records, subject="ThoraxCBCT_0000", session="0001").landmarks
        is None
    )
    splits = {(r.subject[-4:], r.split) for r in manifest.records}
    assert splits == {("0000", "train"), ("0011", "val"), ("0014", "test")}


def test_learn2reg_by_modality(tmp_path):
    """As AbdomenMRCT: lists and labels for each modality, hybrid pairings."""

    def entry(case, channel):
        name = f"AbdomenMRCT_{case:04}_{channel:04}.nii.gz"
        return {"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"}

    organs = {"0": "background", "1": "liver"}
    json_file(
        tmp_path,
        {
            "name": "AbdomenMRCT",
            "pairings": "hybrid",
            "modality": {"0": "MR", "1": "CT"},
            "labels": {"0": organs, "1": {**organs, "2": "spleen"}},
            "training": {
                "0": [entry(1, 0), entry(2, 0)],
                "1": [entry(1, 1), entry(9, 1)],
            },
            "test": {"0": [], "1": []},
        },
        "AbdomenMRCT_dataset.json",
    )
    manifest = read_manifest(tmp_path)
    assert manifest.labels == {
        "AbdomenMRCT": {0: "background", 1: "liver", 2: "spleen"}
    }
    found = [(r.subject[-4:], r.modality, r.session) for r in manifest.records]
    assert found == [
        ("0001", "mr", "0000"),
        ("0002", "mr", "0000"),
        ("0001", "ct", "0001"),
        ("0009", "ct", "0001"),
    ]
    assert {r.pairing for r in manifest.records} == {"inter"}
    assert all(r.label and r.label.name == r.image.name for r in manifest.records)


# --- Medical Segmentation Decathlon, nnU-Net, folders ---------------------------------


def test_decathlon_json(tmp_path):
    content = {
        "name": "Hippocampus",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "numTraining": 2,
        "training": [
            {
                "image": f"./imagesTr/hippocampus_{n}.nii.gz",
                "label": f"./labelsTr/hippocampus_{n}.nii.gz",
            }
            for n in (367, 304)
        ],
        "test": ["./imagesTs/hippocampus_267.nii.gz"],
    }
    json_file(tmp_path, content, "dataset.json")
    manifest = read_manifest(tmp_path)
    assert manifest.source == str(tmp_path / "dataset.json")
    assert manifest.labels["Hippocampus"][2] == "Posterior"
    assert manifest.records[0] == Record(
        tmp_path / "imagesTr" / "hippocampus_367.nii.gz",
        "hippocampus_367",
        "Hippocampus",
        "mri",
        label=tmp_path / "labelsTr" / "hippocampus_367.nii.gz",
    )
    assert manifest.records[2].split == "test" and manifest.records[2].label is None


@pytest.mark.parametrize(("end", "test"), [("", None), ("Tr", "imagesTs")])
def test_folder_of_images_and_labels(tmp_path, end, test):
    touch(*(tmp_path / f"images{end}" / f"hip_{n:03}.nii.gz" for n in (3, 1, 2)))
    touch(*(tmp_path / f"labels{end}" / f"hip_{n:03}.nii.gz" for n in (1, 3)))
    touch(tmp_path / f"images{end}" / "._hip_001.nii.gz")
    touch(tmp_path / f"images{end}" / "notes.txt")
    touch(tmp_path / f"masks{end}" / "hip_002.mha")
    touch(tmp_path / f"landmarks{end}" / "hip_002.csv")
    if test:
        touch(tmp_path / test / "hip_004.nii.gz")
    records = read_manifest(tmp_path).records
    assert [r.subject for r in records if r.split == "train"] == [
        "hip_001",
        "hip_002",
        "hip_003",
    ]
    assert [r.label is None for r in records[:3]] == [False, True, False]
    assert records[0].label == tmp_path / f"labels{end}" / "hip_001.nii.gz"
    assert records[1].mask == tmp_path / f"masks{end}" / "hip_002.mha"
    assert records[1].landmarks == tmp_path / f"landmarks{end}" / "hip_002.csv"
    assert {r.dataset for r in records} == {tmp_path.name}
    assert [r.subject for r in records if r.split == "test"] == (
        ["hip_004"] if test else []
    )


def test_folder_of_images_alone(tmp_path):
    touch(tmp_path / "b_2020_0102.nii.gz", tmp_path / "a_2020_0101.nii.gz")
    records = read_manifest(tmp_path).records
    assert [r.subject for r in records] == ["a_2020_0101", "b_2020_0102"]
    assert {r.session for r in records} == {""}


def test_folder_of_nnunet(tmp_path):
    json_file(
        tmp_path,
        {
            "channel_names": {"0": "T1", "1": "T2"},
            "labels": {"background": 0, "whole": [1, 2], "core": 2},
            "file_ending": ".nii.gz",
        },
        "dataset.json",
    )
    touch(*(tmp_path / "imagesTr" / f"case_07_000{c}.nii.gz" for c in (0, 1)))
    touch(tmp_path / "labelsTr" / "case_07.nii.gz")
    manifest = read_manifest(tmp_path)
    shared = tmp_path / "labelsTr" / "case_07.nii.gz"
    assert [(r.subject, r.modality, r.label) for r in manifest.records] == [
        ("case_07", "t1", shared),
        ("case_07", "t2", shared),
    ]
    assert set(next(iter(manifest.labels.values()))) == {0, 1, 2}


def test_folder_of_learn2reg_without_its_list(tmp_path):
    for case in (1, 2):
        name = f"Lung_{case:04}_0001.nii.gz"
        touch(tmp_path / "imagesTr" / name, tmp_path / "labelsTr" / name)
    records = read_manifest(tmp_path).records
    assert [(r.subject, r.session) for r in records] == [
        ("Lung_0001", "0001"),
        ("Lung_0002", "0001"),
    ]
    assert all(r.label for r in records)


def test_wrong_folders_are_explained(tmp_path):
    with pytest.raises(UserError, match="lists no image"):
        read_manifest(tmp_path)
    touch(tmp_path / "images" / "a.nii", tmp_path / "labels" / "a_seg.nii")
    with pytest.raises(UserError, match="share no file name"):
        read_manifest(tmp_path)
    touch(tmp_path / "images" / "a.mha")
    with pytest.raises(UserError, match="a.mha and a.nii have one name"):
        read_manifest(tmp_path)
    for name in ("A", "B"):
        json_file(tmp_path, {"training": []}, f"{name}_dataset.json")
    with pytest.raises(UserError, match="A_dataset.json and B_dataset.json"):
        read_manifest(tmp_path)


# --- splits and evaluation pairs ------------------------------------------------------


def plain(dataset, subjects, **options):
    return [
        Record(pathlib.Path(f"/{dataset}/{s}.nii"), s, dataset, **options)
        for s in subjects
    ]


def held(manifest):
    return {(r.dataset, r.subject) for r in manifest.of_split("val")}


def test_every_fifth_subject_is_held_out():
    names = [f"p{n:02}" for n in range(12)]
    records = plain("a", names[::-1]) + plain("b", names[:5])
    divided = records_lib.hold_out(Manifest(tuple(records), "x"), 5)
    assert held(divided) == {("a", "p04"), ("a", "p09"), ("b", "p04")}
    assert [r.image for r in divided.records] == [r.image for r in records]


def test_a_subject_is_held_out_whole():
    records = plain("a", ["s1", "s2"], modality="t1") + plain("a", ["s1", "s2"])
    divided = records_lib.hold_out(Manifest(tuple(records), "x"), every=2)
    assert [r.split for r in divided.records] == ["train", "val"] * 2


def test_stated_splits_are_kept():
    names = [f"p{n}" for n in range(6)]
    records = [
        *plain("decided", names[:5]),
        *plain("decided", names[5:], split="val"),
        *plain("other", names[:2]),
        *plain("other", names[2:], split="test"),
    ]
    divided = records_lib.hold_out(Manifest(tuple(records), "x"), 2)
    assert held(divided) == {("decided", "p5"), ("other", "p1")}
    assert len(divided.of_split("test")) == 4


def test_holdout_while_reading(tmp_path):
    path = csv_file(tmp_path, "image\n" + "".join(f"{n}.nii\n" for n in "abcd"))
    assert held(read_manifest(path, holdout=2)) == {("study", "b"), ("study", "d")}
    assert held(read_manifest(path)) == set()
    with pytest.raises(UserError, match="holdout is 1"):
        read_manifest(path, holdout=1)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 12), neighbours=st.integers(1, 5))
def test_neighbour_pairs_take_all_images_equally(count, neighbours):
    records = plain("d", [f"p{n:02}" for n in range(count)])
    pairs = neighbours_lib.neighbour_pairs(records[::-1], neighbours)
    each = min(neighbours, count - 1)
    assert len(pairs) == len(set(pairs)) == count * each
    for n, record in enumerate(records):
        following = [records[(n + k) % count] for k in range(1, each + 1)]
        assert [moving for fixed, moving in pairs if fixed == record] == following
        assert sum(moving == record for _, moving in pairs) == each


def test_neighbour_pairs_stay_within_their_kind():
    records = [
        *plain("a", ["p", "q"], modality="t1"),
        *plain("a", ["p", "q"], modality="t2"),
        *plain("b", ["p", "q"], region="knee"),
        *plain("b", ["r"], region="hip"),
        Record(pathlib.Path("/again.nii"), "p", "a", "t1"),
    ]
    pairs = neighbours_lib.neighbour_pairs(records)
    assert len(pairs) == 6
    for fixed, moving in pairs:
        assert fixed.subject != moving.subject
        assert (fixed.dataset, fixed.modality) == (moving.dataset, moving.modality)
    intra = [
        Record(pathlib.Path(f"/{s}{v}.nii"), s, "inter", pairing="intra", session=v)
        for s in ("p", "q")
        for v in ("1", "2")
    ]
    found = [
        (f.image.stem, m.image.stem) for f, m in neighbours_lib.neighbour_pairs(intra)
    ]
    assert found == [("p1", "p2"), ("p2", "p1"), ("q1", "q2"), ("q2", "q1")]


def test_neighbour_pairs_of_one_subject_are_of_two_sessions():
    """The modalities of one session are aligned: their true map is the identity."""

    def stems(*images):
        records = [
            Record(
                pathlib.Path(f"/{v}{m}.nii"), "p", "d", m, pairing="intra", session=v
            )
            for v, m in images
        ]
        return [
            (f.image.stem, m.image.stem)
            for f, m in neighbours_lib.neighbour_pairs(records)
        ]

    visits = [(v, m) for v in ("1", "2") for m in ("t1", "t2")]
    assert stems(*visits) == [
        ("1t1", "2t1"), ("1t1", "2t2"), ("1t2", "2t1"), ("1t2", "2t2"),
        ("2t1", "1t1"), ("2t1", "1t2"), ("2t2", "1t1"), ("2t2", "1t2"),
    ]  # fmt: skip
    # As the sampler has it: with one session, every image is a scan by itself.
    assert stems(("", "a"), ("", "b")) == [("a", "b"), ("b", "a")]


def test_neighbour_pairs_across_modalities():
    records = [
        *plain("d", ["p", "q", "r"], modality="CT"),
        *plain("d", ["p", "q"], modality="mr"),
    ]
    records = [
        dataclasses.replace(r, image=pathlib.Path(f"/{r.subject}{r.modality}.nii"))
        for r in records
    ]
    pairs = neighbours_lib.neighbour_pairs(records, 2, across_modalities=True)
    assert [(f.image.stem, m.image.stem) for f, m in pairs] == [
        ("pCT", "qmr"), ("pCT", "rCT"), ("pmr", "qCT"), ("pmr", "rCT"),
        ("qCT", "rCT"), ("qCT", "pCT"), ("qmr", "rCT"), ("qmr", "pmr"),
        ("rCT", "pmr"), ("rCT", "qCT"),
    ]  # fmt: skip
    neighbours = neighbours_lib.neighbour_pairs(records)
    assert {(f.modality, m.modality) for f, m in neighbours} == {
        ("CT", "CT"), ("mr", "mr"),
    }  # fmt: skip


# --- check ----------------------------------------------------------------------------


def healthy(folder, count=3):
    """Labelled images of different shapes, as they may be."""
    records = []
    for n in range(count):
        shape = (5 + n, 6, 7)
        name = f"p{n}.nii.gz"
        records.append(
            Record(
                image(folder / "images" / name, shape),
                f"p{n}",
                "d",
                label=label(folder / "labels" / name, shape),
            )
        )
    return Manifest(tuple(records), "m.csv", {"d": {1: "left", 2: "right"}})


def change(manifest, index=0, **fields):
    records = list(manifest.records)
    records[index] = dataclasses.replace(records[index], **fields)
    return dataclasses.replace(manifest, records=tuple(records))


def kinds(problems):
    return [(problem.kind, problem.level) for problem in problems]


def test_nothing_is_wrong_with_mixed_shapes(tmp_path):
    calls = []
    found = check(healthy(tmp_path), progress=lambda *done: calls.append(done))
    assert found == []
    assert calls == [(1, 3), (2, 3), (3, 3)]


def damaged(path):
    image(path)
    path.write_bytes(path.read_bytes()[:-200])
    return path


def nan(path):
    array = np.random.default_rng(0).uniform(size=(5, 6, 7)).astype(np.float32)
    array[1, 2, 3] = np.nan
    return save(path, array)


def empty(path):
    touch(path)
    return path


def text(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(b"no volume"))
    return path


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda path: path, "missing", "does not exist"),
        (lambda path: path.with_name("a" * 300), "missing", "does not exist"),
        (empty, "unreadable", "empty"),
        (damaged, "unreadable", "truncated"),
        (text, "unreadable", "cannot be read"),
        (lambda path: image(path, (5, 6, 7, 2)), "shape", "4D image"),
        (lambda path: image(path, (5, 6)), "shape", "2D image"),
        (nan, "values", "1 voxels that are NaN"),
        (lambda path: save(path, np.ones((5, 6, 7))), "values", "constant"),
    ],
    ids="missing long empty truncated text 4d 2d nan constant".split(),
)
def test_bad_images_are_found(tmp_path, make, kind, message):
    bad = make(tmp_path / "bad" / "x.nii.gz")
    manifest = change(healthy(tmp_path), 1, image=bad)
    (problem,) = check(manifest)
    assert (problem.kind, problem.level, problem.file) == (kind, "error", str(bad))
    assert message in problem.sentence and str(bad) in problem.sentence


def almost_empty(path, modality):
    """One voxel in 200 is not background: 0 is the 0.99 quantile and the minimum."""
    array = np.zeros((5, 6, 7), np.float32)
    array[2, 3, 4] = 900
    return Record(save(path, array), "p1", "d", modality)


def test_images_that_training_cannot_scale_are_found(tmp_path):
    for modality, expected in (("t1", [("values", "error")]), ("CT", [])):
        bad = almost_empty(tmp_path / modality / "x.nii.gz", modality)
        manifest = change(healthy(tmp_path), 1, image=bad.image, modality=modality)
        rule = Loading().rule(modality)
        found = [p for p in check(manifest) if p.file == str(bad.image)]
        found = [p for p in found if p.kind == "values"]
        assert kinds(found) == expected
        volume = volumes.read_volume(bad.image)
        if expected:
            assert "0 to 0.99" in found[0].sentence
            with pytest.raises(UserError, match="constant within its intensity range"):
                preprocess.normalise(volume.array, rule)
        else:
            preprocess.normalise(volume.array, rule)


def test_unknown_extension_is_found(tmp_path):
    manifest = change(healthy(tmp_path), image=csv_file(tmp_path, "x", "a.dcm"))
    (problem,) = check(manifest)
    assert problem.kind == "shape" and ".dcm" in problem.sentence


FLIPPED = np.diag([-1.0, 1.0, 1.0, 1.0])
NUDGED = np.eye(4) + np.eye(4, k=3) * 0.2


@pytest.mark.parametrize(
    ("options", "kind", "level", "message"),
    [
        ({"shape": (6, 6, 7)}, "grid", "error", "has 6 x 6 x 7 voxels.*5 x 6 x 7"),
        ({"affine": FLIPPED}, "grid", "error", "lies up to 8 mm from"),
        ({"affine": NUDGED}, "grid", "warning", "lies up to 0.2 mm from"),
        ({"values": (0, 1, -3)}, "values", "error", r"negative labels \(down to -3"),
        ({"values": (0, 7, 1)}, "labels", "error", r"values 7, .*\(1, 2\) leave out"),
        ({"values": (0,)}, "labels", "warning", "background only"),
    ],
    ids=["shape", "flipped", "nudged", "negative", "unlisted", "background"],
)
def test_bad_labels_are_found(tmp_path, options, kind, level, message):
    manifest = healthy(tmp_path)
    label(manifest.records[0].label, **options)
    (problem,) = check(manifest)
    assert (problem.kind, problem.level) == (kind, level)
    assert problem.file == str(manifest.records[0].label)
    assert re.search(message, problem.sentence), problem.sentence


def test_labels_without_a_list_may_be_any(tmp_path):
    manifest = dataclasses.replace(healthy(tmp_path), labels={})
    label(manifest.records[0].label, values=(0, 7, 300))
    assert check(manifest) == []


def test_fractional_labels_and_empty_masks_are_found(tmp_path):
    manifest = healthy(tmp_path)
    mask = label(tmp_path / "mask.nii", values=(0,))
    save(manifest.records[0].label, np.full((5, 6, 7), 0.5, np.float32))
    manifest = change(manifest, mask=mask)
    found = check(manifest)
    assert kinds(found) == [
        ("values", "error"),
        ("values", "error"),
        ("partial", "warning"),
    ]
    assert "fractional" in found[0].sentence and "empty" in found[1].sentence


def test_a_mask_off_its_image_is_found(tmp_path):
    mask = label(tmp_path / "mask.nii", (4, 6, 7))
    found = check(change(healthy(tmp_path), mask=mask))
    assert kinds(found) == [("grid", "error"), ("partial", "warning")]


def test_everything_is_reported_at_once(tmp_path):
    manifest = healthy(tmp_path, 4)
    damaged(manifest.records[0].image)
    nan(manifest.records[1].image)
    label(manifest.records[1].label, (9, 9, 9))
    manifest.records[2].label.unlink()
    found = check(manifest)
    assert [problem.kind for problem in found] == [
        "unreadable",
        "values",
        "missing",
    ]


def test_missing_files_are_found_without_reading(tmp_path):
    manifest = healthy(tmp_path)
    nan(manifest.records[0].image)
    manifest.records[1].label.unlink()
    (problem,) = check(manifest, voxels=False)
    assert problem.kind == "missing" and problem.file == str(manifest.records[1].label)


def test_a_shared_file_is_read_once_and_reported_once(tmp_path, monkeypatch):
    shape = (5, 6, 7)
    shared = label(tmp_path / "l.nii", values=(0, -1))
    records = tuple(
        Record(image(tmp_path / f"{s}{m}.nii", shape), s, "d", m, label=shared)
        for s in "ab"
        for m in ("t1", "t2")
    )
    read = []
    original = read_lib.volumes.read_volume
    monkeypatch.setattr(
        read_lib.volumes,
        "read_volume",
        lambda path, **options: read.append(path) or original(path, **options),
    )
    assert kinds(check(Manifest(records, "m"))) == [("values", "error")]
    assert read.count(shared) == 1


def test_duplicates_are_found(tmp_path):
    manifest = healthy(tmp_path)
    doubled = dataclasses.replace(
        manifest, records=(*manifest.records, manifest.records[0])
    )
    assert kinds(check(doubled)) == [("duplicate", "error")]
    copy = tmp_path / "copy.nii.gz"
    copy.write_bytes(manifest.records[0].image.read_bytes())
    record = dataclasses.replace(manifest.records[0], image=copy, subject="copy")
    copied = dataclasses.replace(manifest, records=(*manifest.records, record))
    (problem,) = check(copied)
    assert (problem.kind, problem.level) == ("duplicate", "warning")
    assert "same voxels" in problem.sentence


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (plain("d", ["a"]), ("pairs", "error", "only regions with one subject")),
        (plain("d", ["a"], split="val"), ("pairs", "warning", "split val")),
        (
            plain("d", ["a", "b"], region="knee") + plain("d", ["c"], region="hip"),
            ("pairs", "warning", r"regions with one subject only \(hip\)"),
        ),
        (
            plain("d", ["a", "b"], pairing="intra"),
            ("pairs", "error", r"only subjects with one scan only \(a, b\)"),
        ),
        (
            plain("d", list("abcdefg")) + plain("d", list("aghijk"), split="val"),
            ("leak", "warning", r"more than one split \(a, g\)"),
        ),
        (
            plain("d", ["a", "b"], modality="t1", pairing="intra")
            + plain("d", ["a", "b"], modality="t2", pairing="intra"),
            ("alignment", "warning", "several modalities have no session"),
        ),
        (
            plain("d", ["a", "b"]) + plain("d", ["c"], label=pathlib.Path("/l.nii")),
            ("partial", "warning", "2 of 3 records have no label"),
        ),
    ],
    ids=["one", "val", "region", "intra", "leak", "session", "partial"],
)
def test_sets_that_cannot_be_paired_or_compared(records, expected):
    unique = [
        dataclasses.replace(r, image=pathlib.Path(f"/{n}.nii"))
        for n, r in enumerate(records)
    ]
    manifest = Manifest(tuple(unique), "m.csv")
    found = [p for p in check(manifest, voxels=False) if p.kind != "missing"]
    kind, level, message = expected
    assert kind in [p.kind for p in found]
    problem = next(p for p in found if p.kind == kind)
    assert problem.level == level and problem.file == "m.csv"
    assert re.search(message, problem.sentence), problem.sentence


def test_modalities_of_one_session_share_a_grid(tmp_path):
    def record(subject, modality, shape):
        path = tmp_path / f"{subject}-{modality}.nii"
        return Record(image(path, shape), subject, "d", modality)

    records = [record(s, m, (5, 6, 7)) for s in "ab" for m in ("t1", "t2")]
    assert check(Manifest(tuple(records), "m")) == []
    records[1] = record("a", "t2", (8, 6, 7))
    (problem,) = check(Manifest(tuple(records), "m"))
    assert (problem.kind, problem.level) == ("alignment", "warning")
    records[1] = dataclasses.replace(records[1], session="later")
    assert check(Manifest(tuple(records), "m")) == []


def test_unclear_orientation_is_passed_on(tmp_path):
    manifest = healthy(tmp_path)
    path = manifest.records[0].image
    loaded = nib.load(path)
    other = np.diag([-1.0, 1, 1, 1])
    loaded.set_sform(loaded.affine, 1)
    loaded.set_qform(other, 1)
    nib.save(loaded, tmp_path / "turned.nii.gz")
    found = check(change(manifest, image=tmp_path / "turned.nii.gz"))
    assert kinds(found) == [("orientation", "warning")]
    assert "qform and sform differ" in found[0].sentence


# --- landmarks ------------------------------------------------------------------------


def with_points(folder, tables):
    """One subject with a table of landmarks per visit, image of 20 x 30 x 40 mm."""
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = (100, 200, 300)
    records = []
    for n, table in enumerate(tables):
        points = csv_file(folder, table, f"points{n}.csv")
        path = image(folder / f"v{n}.nii", (11, 11, 11), affine=affine)
        records.append(
            Record(path, "p", "d", landmarks=points, pairing="intra", session=str(n))
        )
    return Manifest(tuple(records), "m")


@pytest.mark.parametrize(
    "table",
    [
        "x,y,z\n100,200,300\n119,229,339\n",  # RAS mm
        "\ufeffz,name,y,x\r\n300,a,-200,-100\r\n339,b,-229,-119\r\n",  # LPS mm
        "0,0,0\n10,10.5,9\n",  # voxels, as Learn2Reg
    ],
    ids=["ras", "lps", "voxels"],
)
def test_landmarks_in_any_frame(tmp_path, table):
    assert check(with_points(tmp_path, [table, table])) == []


def test_landmarks_of_slicer(tmp_path):
    """As evaluate reads them: a check refused what it takes."""
    manifest = with_points(tmp_path, ["100,200,300\n119,229,339\n"] * 2)
    places = tables.read(manifest.records[0].landmarks, "landmarks")
    for name in ("p.fcsv", "p.mrk.json"):
        tables.write(tmp_path / name, places, places.places, frame="lps")
        assert check(change(manifest, landmarks=tmp_path / name)) == []
    (tmp_path / "bad.fcsv").write_text("# CoordinateSystem = 7\n1,2,3,4\n")
    (problem,) = check(change(manifest, landmarks=tmp_path / "bad.fcsv"))
    assert problem.level == "error" and "expected LPS or RAS" in problem.sentence


@pytest.mark.parametrize(
    ("table", "level", "message"),
    [
        ("x,y,z\n100,200,300\n150,200,300\n", "warning", "1 of 2 points lie outside"),
        ("x,y,z\n", "error", "holds no points"),
        ("a,b,c\n1,2,3\n", "error", "has the columns a, b, c, expected x, y and z"),
        ("1,2\n", "error", "row 1: 1, 2,  are not three finite numbers"),
        ("1,2,nan\n", "error", "row 1: 1, 2, nan are not three finite numbers"),
        ("", "error", "empty"),
    ],
)
def test_wrong_landmarks_are_found(tmp_path, table, level, message):
    good = "1,2,3\n" if level == "error" else "1,2,3\n4,5,6\n"
    (problem,) = check(with_points(tmp_path, [table, good]))
    assert (problem.kind, problem.level) == ("landmarks", level)
    assert message in problem.sentence and "points0.csv" in problem.sentence


def test_landmarks_of_a_subject_correspond(tmp_path):
    found = check(with_points(tmp_path, ["1,2,3\n4,5,6\n", "1,2,3\n"]))
    assert kinds(found) == [("landmarks", "error")]
    assert "1 and 2 points" in found[0].sentence


@pytest.mark.parametrize(
    ("name", "text", "unpaired"),
    [
        ("m.csv", "image,dataset\na.nii,x\nb.nii,y\n", {"x", "y"}),
        ("m.csv", "image,dataset,pairing\na.nii,x,\nb.nii,y,inter\n", {"x"}),
        ("m.json", '{"data": [{"image": "a.nii"}]}', {"m"}),
        ("m.json", '{"data": [{"image": "a.nii", "pairing": "intra"}]}', set()),
        ("m.json", '{"name": "L", "training": ["a.nii"]}', {"L"}),
        ("m.json", '{"name": "L", "training": ["a.nii"], "pairings": "paired"}', set()),
    ],
)
def test_a_manifest_knows_where_it_says_no_pairing(tmp_path, name, text, unpaired):
    path = tmp_path / name
    path.write_text(text)
    found = read_manifest(path)
    assert found.unpaired == unpaired
