from __future__ import annotations

import json
import shutil
import tracemalloc
import unicodedata
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from fbclip.data.dataset import Dataset, Item, Sample, Samples, parallel_map
from fbclip.data.inspect import inspect
from fbclip.data.layouts import LAYOUTS, NAMES, open_dataset
from fbclip.errors import ImageError, UsageError
from fbclip.images import read_mask

BOX = np.zeros((40, 60), np.uint8)  # a mask
BOX[10:20, 30:50] = 255
drawn = iter(range(1, 1_000_000))  # no two images are the same


def put(root: Path, *names: str) -> None:
    """Write an image of 40 by 60 pixels under each name; a mask where the name says so."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        masks = ("mask", "ground", "/label/", "_label.")
        seed = next(drawn)
        pixels = BOX if any(m in f"/{name.lower()}" for m in masks) else np.random.default_rng(seed).integers(
            0, 255, (40, 60, 3), np.uint8
        )  # fmt: skip
        Image.fromarray(pixels).save(path)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def mvtec(root: Path, name: str = "bottle", good: str = "good", bad: str = "crack", mask: str = "001_mask.png") -> None:
    put(root, f"{name}/train/{good}/000.png", f"{name}/test/{good}/000.png", f"{name}/test/{bad}/001.png")
    put(root, f"{name}/ground_truth/{bad}/{mask}")


def visa(root: Path) -> None:
    put(root, *(f"candle/Data/Images/Normal/{n}.JPG" for n in range(2)), "candle/Data/Images/Anomaly/000.JPG")
    put(root, "candle/Data/Masks/Anomaly/000.png")
    text(
        root / "split_csv/1cls.csv",
        "object,split,label,image,mask\n"
        "candle,train,normal,candle/Data/Images/Normal/0.JPG,\n"
        "candle,test,normal,candle/Data/Images/Normal/1.JPG,\n"
        "candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png\n",
    )


def real_iad(root: Path) -> None:
    put(root, "realiad_256/mint/OK/S1/a.jpg", *(f"realiad_1024/mint/OK/S1/{n}.jpg" for n in "abc"))
    put(root, "realiad_1024/mint/NG/AK/S2/d.jpg", "realiad_1024/mint/NG/AK/S2/d_mask.png")

    def entry(image: str, kind: str = "OK", mask: str | None = None) -> dict[str, str | None]:
        return {"category": "mint", "anomaly_class": kind, "image_path": image, "mask_path": mask}

    test = [
        entry("OK/S1/b.jpg"),
        entry("OK/S1/c.jpg", "AK"),  # the defect is not visible from this side
        entry("NG/AK/S2/d.jpg", "AK", "NG/AK/S2/d_mask.png"),
    ]
    meta = {"normal_class": "OK", "prefix": "mint/"}
    content = {"meta": meta, "train": [entry("OK/S1/a.jpg")], "test": test}
    text(root / "realiad_jsons/realiad_jsons/mint.json", json.dumps(content))
    text(root / "realiad_jsons/realiad_jsons_sv/mint.json", json.dumps({**content, "test": test[:1]}))


def dagm(root: Path) -> None:
    put(root, "Class1/Train/0001.PNG", "Class1/Test/0001.PNG", "Class1/Test/0002.PNG", "Class1/Train/0003.PNG")
    put(root, "Class1/Test/Label/0002_label.PNG", "Class1/Train/Label/0003_label.PNG")
    text(root / "Class1/Test/Label/Labels.txt", "1\n")


def kolektor(root: Path) -> None:
    put(root, "kos01/Part0.jpg", "kos01/Part1.jpg", "kos01/Part1_label.bmp")
    Image.fromarray(BOX * 0).save(root / "kos01/Part0_label.bmp")


def headct(root: Path) -> None:
    put(root, "head_ct/head_ct/000.png", "head_ct/head_ct/001.png")
    text(root / "labels.csv", "id, hemorrhage\n0,1\n1,0\n")


def meta(root: Path) -> None:
    mvtec(root, "part")
    crack = {"img_path": "part/test/crack/001.png", "mask_path": "part/ground_truth/crack/001_mask.png"}
    good = {"img_path": "part/test/good/000.png", "mask_path": "", "specie_name": "good", "anomaly": 0}
    records = [good, {**crack, "cls_name": "part", "specie_name": "crack", "anomaly": 1}]
    text(root / "meta.json", json.dumps({"Train": {"part": [good]}, "Test": {"part": records}}))


def table(root: Path) -> None:
    put(root, "x/a.png", "x/b.png", "masks/b.png")
    text(root / "parts.csv", "Image,Label,Mask,Class\nx/a.png,good,,nut\nx/b.png,1,masks/b.png,nut\n")


def images_masks(root: Path) -> None:
    put(root, "images/1.png", "images/2.png", "masks/1.png", "masks/2.png")


def isic(root: Path) -> None:
    put(root, "ISBI2016_ISIC_Part1_Test_Data/ISIC_0000003.jpg")
    put(root, "ISBI2016_ISIC_Part1_Test_GroundTruth/ISIC_0000003_Segmentation.png")


def brainmri(root: Path) -> None:
    put(root, *(f"{top}{name}" for top in ("", "brain_tumor_dataset/") for name in ("yes/Y1.jpg", "no/1 no.jpeg")))


# name of the folder, how it is made, the layout and title it must get, its classes,
# (split, label) to images and to masks
GOOD, BAD = ("test", 0), ("test", 1)
USUAL = {("train", 0): 1, GOOD: 1, BAD: 1}
TREES = [
    ("x", mvtec, "mvtec", "MVTec AD", "bottle", USUAL, 1),
    ("tiles", lambda r: mvtec(r, "."), "mvtec", "tiles", "tiles", USUAL, 1),
    ("x", lambda r: mvtec(r, "download/bottle"), "mvtec", "MVTec AD", "bottle", USUAL, 1),
    ("x", lambda r: mvtec(r, "tubes"), "mpdd", "MPDD", "tubes", USUAL, 1),
    ("x", lambda r: mvtec(r, "Woven_001"), "dtd-synthetic", "DTD-Synthetic", "Woven_001", USUAL, 1),
    ("x", lambda r: mvtec(r, "01", "ok", "ko", "001.bmp"), "btad", "BTAD", "01", USUAL, 1),
    ("VisA_pytorch", lambda r: mvtec(r, "1cls/pcb1", bad="bad", mask="001.png"), "visa", "VisA", "pcb1", USUAL, 1),
    ("x", visa, "visa", "VisA", "candle", USUAL, 1),
    ("x", real_iad, "real-iad", "Real-IAD", "mint", {("train", 0): 1, GOOD: 2, BAD: 1}, 1),
    ("x", dagm, "dagm", "DAGM 2007", "Class1", {**USUAL, ("train", 1): 1}, 2),
    ("x", lambda r: dagm(r / "Class1"), "dagm", "DAGM 2007", "Class1", {**USUAL, ("train", 1): 1}, 2),
    ("x", kolektor, "kolektorsdd", "KolektorSDD", "commutator", {GOOD: 1, BAD: 1}, 1),
    ("x", headct, "headct", "HeadCT", "brain", {GOOD: 1, BAD: 1}, 0),
    ("HeadCT", lambda r: put(r, "h/test/good/1.png", "h/test/bad/2.png"), "headct", "HeadCT", "h", {GOOD: 1, BAD: 1}, 0),
    ("x", brainmri, "brainmri", "BrainMRI", "brain", {GOOD: 1, BAD: 1}, 0),
    ("x", lambda r: put(r, "yes/y1.jpg", "no/no1.jpg", "pred/p.jpg"), "br35h", "Br35H", "brain", {GOOD: 1, BAD: 1}, 0),
    ("x", isic, "isic", "ISIC 2016", "skin", {BAD: 1}, 1),
    ("x", lambda r: put(r, "test-image/0.jpg", "test-mask/0.jpg"), "tn3k", "TN3K", "thyroid", {BAD: 1}, 1),
    ("x", lambda r: put(r, "Original/1.tif", "Ground Truth/1.tif"), "clinicdb", "CVC-ClinicDB", "colon", {BAD: 1}, 1),
    ("CVC-ClinicDB", images_masks, "clinicdb", "CVC-ClinicDB", "colon", {BAD: 2}, 2),
    ("CVC-ColonDB", images_masks, "colondb", "CVC-ColonDB", "colon", {BAD: 2}, 2),
    ("Kvasir-SEG", images_masks, "kvasir", "Kvasir", "colon", {BAD: 2}, 2),
    ("EndoTect_2020", images_masks, "endo", "Endo", "colon", {BAD: 2}, 2),
    ("scans", images_masks, "images-masks", "scans", "scans", {BAD: 2}, 2),
    ("x", meta, "meta", "x", "part", USUAL, 1),
    ("parts", lambda r: put(r, "good/1.png", "defective/2.png"), "folder", "parts", "parts", {GOOD: 1, BAD: 1}, 0),
    ("x", lambda r: put(r, "nut/good/1.png", "nut/defective/dent/2.png", "nut/masks/dent/2_mask.png"),
     "folder", "x", "nut", {GOOD: 1, BAD: 1}, 1),
    ("x", table, "csv", "x", "nut", {GOOD: 1, BAD: 1}, 1),
]  # fmt: skip


@pytest.mark.parametrize(("folder", "make", "layout", "title", "class_name", "counts", "masks"), TREES)
def test_layouts_are_recognised(tmp_path, folder, make, layout, title, class_name, counts, masks) -> None:  # type: ignore[no-untyped-def]
    root = tmp_path / folder
    make(root)
    for dataset in (open_dataset(root), open_dataset(root, layout)):
        assert (dataset.layout, dataset.name, dataset.classes) == (layout, title, (class_name,))
        assert Counter((item.split, item.label) for item in dataset.items) == counts
        assert all(item.image.is_file() for item in dataset.items)
        assert all((item.defect == "good") != bool(item.label) for item in dataset.items)
        marked = [item for item in dataset.items if item.mask is not None]
        assert len(marked) == masks
        for item in marked:
            assert item.label == 1
            assert item.mask is not None
            assert read_mask(item.mask).any()


def test_every_layout_is_tried() -> None:
    assert {tree[2] for tree in TREES} == set(NAMES)
    assert len(LAYOUTS) > len(NAMES)


def test_an_index_is_more_specific_than_the_tree_around_it(tmp_path: Path) -> None:
    meta(tmp_path)
    assert open_dataset(tmp_path).layout == "meta"
    assert open_dataset(tmp_path / "meta.json").items == open_dataset(tmp_path).items
    assert open_dataset(tmp_path, "mvtec").layout == "mvtec"


def test_another_split_of_real_iad(tmp_path: Path) -> None:
    real_iad(tmp_path)
    assert len(open_dataset(tmp_path).items) == 4
    single_view = open_dataset(tmp_path / "realiad_jsons/realiad_jsons_sv")
    assert len(single_view.items) == 2
    assert all(item.image.is_file() for item in single_view.items)


def test_masks_go_with_their_images(tmp_path: Path) -> None:
    put(
        tmp_path,
        "good/1.png",
        "defective/a.b_1.jpg",
        "defective/a.b_10.jpg",
        "masks/a.b_10_mask.png",
        "masks/A.B_1.PNG",
    )
    put(tmp_path, "masks/._a.b_1.png", "defective/._x.jpg")  # left by macOS
    masks = {item.image.name: item.mask and item.mask.name for item in open_dataset(tmp_path).items}
    assert masks == {"1.png": None, "a.b_1.jpg": "A.B_1.PNG", "a.b_10.jpg": "a.b_10_mask.png"}


@pytest.mark.parametrize(
    ("make", "layout", "message"),
    [
        (lambda r: put(r, "a/b/1.png", "c.png"), None, "name one of them"),
        (mvtec, "tn3k", "expected test-image/"),
        (mvtec, "imagenet", "a layout is one of meta, visa"),
        (lambda r: put(r, "train/images/1.png", "test/images/1.png", "test/masks/1.png"), None, "like none of"),
        (lambda r: text(r / "t.csv", "image,label\n1.png,perhaps\n"), None, "line 2 of"),
        (lambda r: text(r / "t.csv", "image,label,split\n1.png,0,val\n"), None, "a split is train or test; line 2 of"),
        (lambda r: text(r / "meta.json", '{"val": {"a": []}}'), None, "a split is train or test"),
        (lambda r: text(r / "meta.json", "{"), None, "is no JSON"),
        (lambda r: text(r / "meta.json", '{"test": {"a": [{"img": 1}]}}'), None, "has img_path and anomaly"),
        (lambda r: None, None, "there is none at"),
    ],
)
def test_what_is_not_understood_is_said(tmp_path, make, layout, message) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "x")
    with pytest.raises(UsageError, match=message):
        open_dataset(tmp_path / "x", layout)


# --- names, files and masks as people have them ---


def mask_names(root: Path) -> dict[str, list[str]]:
    """Each defective image and its masks, by their last two parts."""
    return {
        "/".join(item.image.parts[-2:]): ["/".join(mask.parts[-2:]) for mask in item.masks]
        for item in open_dataset(root).items
        if item.label
    }


def strays(root: Path) -> list[str]:
    dataset = open_dataset(root)
    return sorted(dataset.relative(mask) for mask in dataset.strays)


@pytest.mark.parametrize(
    "form",
    ["{}.png", "{}_mask.png", "{}-mask.png", "mask_{}.png", "{}_seg.png", "{}_gt.gif", "{}_label.pgm", "{}.png.png"],
)
def test_names_of_masks(tmp_path: Path, form: str) -> None:
    put(tmp_path, *(f"part/test/{kind}/{n}.png" for kind in ("good", "bad") for n in (0, 1, "seg_1", "a.b")))
    put(tmp_path, *(f"part/ground_truth/bad/{form.format(n)}" for n in (0, 1, "seg_1", "a.b")))
    wanted = {f"bad/{n}.png": [f"bad/{form.format(n)}"] for n in (0, 1, "seg_1", "a.b")}
    assert mask_names(tmp_path) == wanted
    assert strays(tmp_path) == []
    put(tmp_path, "part/ground_truth/bad/2_mask.png", "part/ground_truth/other/0_mask.png")
    assert mask_names(tmp_path) == wanted
    assert strays(tmp_path) == ["part/ground_truth/bad/2_mask.png", "part/ground_truth/other/0_mask.png"]


def test_several_masks_of_an_image(tmp_path: Path) -> None:
    """Numbered, or in a folder of the image's name, as MVTec LOCO has them: what any of them marks counts."""
    put(tmp_path, "bag/test/good/0.png", "bag/test/logical/0.png", "bag/test/logical/1.png")
    for name, left in (("0_mask_1.png", 0), ("0_mask_2.png", 40), ("1/000.png", 0), ("1/001.png", 40)):
        mask = np.zeros((40, 60), np.uint8)
        mask[:, left : left + 20] = 255
        file = tmp_path / "bag/ground_truth/logical" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        save(file, mask)
    assert mask_names(tmp_path) == {
        "logical/0.png": ["logical/0_mask_1.png", "logical/0_mask_2.png"],
        "logical/1.png": ["1/000.png", "1/001.png"],
    }
    dataset = open_dataset(tmp_path)
    marked = [sample.mask for sample in Samples(tuple(item for item in dataset.items if item.label), 60)]  # type: ignore[attr-defined]
    for mask in marked:
        assert mask is not None and mask[:, :19].all() and not mask[:, 21:39].any() and mask[:, 41:].all()
    report = inspect(dataset)
    assert (report.findings, report.masks, report.trainable) == ({}, 2, "yes")
    before = report.fingerprint
    (tmp_path / "bag/ground_truth/logical/1/001.png").unlink()
    assert open_dataset(tmp_path).fingerprint() != before


def test_masks_without_folders_go_with_the_one_image_of_their_name(tmp_path: Path) -> None:
    put(tmp_path, "good/0.png", "good/5.png", "defective/scratch/1.png", "defective/dent/2.png", "defective/dent/3.png")
    put(tmp_path, "defective/scratch/3.png", "masks/1.png", "masks/2_mask.png", "masks/3.png", "masks/5.png")
    assert mask_names(tmp_path) == {
        "dent/2.png": ["masks/2_mask.png"],
        "dent/3.png": [],
        "scratch/1.png": ["masks/1.png"],
        "scratch/3.png": [],
    }
    assert strays(tmp_path) == ["masks/3.png"]  # of two images; 5 belongs to a good one


@pytest.mark.parametrize(
    ("kind", "truth"),
    [("Bad", "bad"), ("bad", "bad "), ("Stück", unicodedata.normalize("NFD", "stück"))],
)
def test_kinds_are_compared_as_people_do(tmp_path: Path, kind: str, truth: str) -> None:
    put(tmp_path, "part/test/normal/0.png", f"part/test/{kind}/1.png", f"part/ground_truth/{truth}/1_mask.png")
    (item,) = (item for item in open_dataset(tmp_path).items if item.label)
    assert (item.defect, len(item.masks)) == (kind, 1)  # and test/normal is good


def test_letters_of_a_mac(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Stück") for form in ("NFC", "NFD"))
    put(tmp_path, "part/test/good/0.png", f"part/test/bad/{composed}.png")
    put(tmp_path, f"part/ground_truth/bad/{decomposed}_mask.png")
    assert mask_names(tmp_path) == {f"bad/{composed}.png": [f"bad/{decomposed}_mask.png"]}
    text(tmp_path / "t.csv", f"image,label\npart/test/bad/{decomposed}.png,1\n")
    assert open_dataset(tmp_path / "t.csv").items[0].image.is_file()


def test_letters_of_either_case_are_told_apart_where_both_are_there(tmp_path: Path) -> None:
    put(tmp_path, "part/test/good/0.png", *(f"part/test/bad/{n}.png" for n in "Aa"))
    put(tmp_path, *(f"part/ground_truth/bad/{n}_mask.png" for n in "Aa"))
    assert mask_names(tmp_path) == {f"bad/{n}.png": [f"bad/{n}_mask.png"] for n in "Aa"}


def test_names_that_are_no_utf_8(fbclip: Run, tmp_path: Path) -> None:
    mvtec(tmp_path / "set")
    folder = tmp_path / "set/bottle/test/good"
    (folder / "000.png").rename(folder / "Ri\udcdf.png")  # Latin-1's ß, as old cameras write
    shutil.copy(folder / "Ri\udcdf.png", tmp_path / "set/bottle/test/crack/same\udcdf.png")
    done = fbclip("data", "set", code=2)
    assert r"bottle/test/good/Ri\xdf.png is bottle/test/crack/same\xdf.png" in done.stdout
    assert len(open_dataset(tmp_path / "set").fingerprint()) == 64


def test_names_are_shown_as_they_are(fbclip: Run, tmp_path: Path) -> None:
    mvtec(tmp_path / "set", "teil[links]")
    mvtec(tmp_path / "set", "teil[rechts]")
    put(tmp_path / "set", "teil[links]/test/crack/a:smile:b[x].png")
    lines = fbclip("data", "set", code=2).stdout.splitlines()
    assert {line.split()[0] for line in lines[2:4]} == {"teil[links]", "teil[rechts]"}
    assert "  teil[links]/test/crack/a:smile:b[x].png" in lines


def test_what_is_hidden_or_linked_or_of_another_suffix(fbclip: Run, tmp_path: Path) -> None:
    mvtec(tmp_path / "nas")
    root = tmp_path / "set/bottle"
    put(root, "test/good/0.png", "test/good/.ipynb_checkpoints/0-checkpoint.png", "ground_truth/crack/.thumbs/x.png")
    put(
        root,
        "test/crack/.ipynb_checkpoints/1-checkpoint.png",
        "ground_truth/crack/001_mask.png",
        "__MACOSX/test/x/1.png",
    )
    (root / "test/crack/linked").symlink_to(tmp_path / "nas/bottle/test/crack")
    (root / "ground_truth/crack/linked").symlink_to(tmp_path / "nas/bottle/ground_truth/crack")
    (root / "test/crack/2.jp2").write_bytes(b"x")
    (root / "test/crack/readme.txt").write_bytes(b"x")
    done = fbclip("data", "set", code=2)
    assert done.stdout.splitlines()[2].split() == ["bottle", "0", "0", "1", "1"]
    assert "1 file with another suffix than images have was left out: .jp2" in done.stdout
    assert "masks belong to no image by their names: 1" in done.stdout  # 001 without a folder
    (root / "ground_truth/crack/001_mask.png").unlink()
    fbclip("data", "set")
    (root / "test/good/gone.png").symlink_to("/nowhere/gone.png")
    assert "gone.png is a link to /nowhere/gone.png" in fbclip("data", "set", code=2).stdout


def test_a_class_of_one_kind_keeps_nobody_from_being_recognised(fbclip: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        mvtec(tmp_path / "set", name)
    put(tmp_path / "set", "c/test/scratch/0.png", "d/test/good/0.png")
    assert open_dataset(tmp_path / "set").classes == ("a", "b", "c", "d")
    lines = fbclip("data", "set", "--layout", "mvtec", code=2).stdout.splitlines()
    assert "defective images have no mask: 1" in lines
    unfit = "c (no good images in the test split); d (no defective images in the test split)"
    assert f"image-level evaluation: yes, but not for {unfit}" in lines
    put(tmp_path / "set", "c/ground_truth/scratch/0_mask.png")
    lines = fbclip("data", "set").stdout.splitlines()
    assert "pixel-level evaluation: yes, but not for d (no defective image has a mask)" in lines


def test_classes_that_are_of_one_kind_each(tmp_path: Path) -> None:
    put(tmp_path, "a/test/good/0.png", "b/test/crack/1.png", "b/ground_truth/crack/1.png")
    report = inspect(open_dataset(tmp_path))
    assert report.image_level == ("no: a (no defective images in the test split); b (no good images in the test split)")


def test_deep_pictures_and_pages_are_reported(tmp_path: Path) -> None:
    mvtec(tmp_path)
    good = tmp_path / "bottle/test/good"
    save(good / "mono12.png", np.full((40, 60), 3000, np.uint16))
    pages = [Image.new("L", (60, 40), level) for level in (50, 60, 70)]
    pages[0].save(good / "pages.tif", save_all=True, append_images=pages[1:])
    report = inspect(open_dataset(tmp_path))
    assert "nowhere above 4095" in report.findings["unreadable"][0]
    assert report.findings["more_pages"] == ["bottle/test/good/pages.tif: 2 more"]
    (good / "mono12.png").unlink()
    assert not inspect(open_dataset(tmp_path)).wrong


# --- tables as people have them ---


@pytest.mark.parametrize(
    "content",
    [
        "image;label\r\nx/a.png;good\r\nx/b.png;1\r\n".encode("utf-8-sig"),
        "image\tlabel\nx/a.png\tOK\nx/b.png\tNOK\n".encode("utf-16"),
        b"sep=;\r\nImage ; LABEL\r\nx/a.png;0.0\r\nx/b.png;1.0\r\n",
        b"image,label\rx\\a.png,pass\rx\\b.png,fail\r",
        b"image,label,note\n\nx/a.png,io,gr\xfcn\n,,\nx/b.png,nio,\n,,\n",
        b'label,image\nnormal,"x/a.png"\nTrue,x/B.PNG\n\n',
    ],
)
def test_tables_of_other_programs(tmp_path: Path, content: bytes) -> None:
    put(tmp_path, "x/a.png", "x/b.png")
    (tmp_path / "t.csv").write_bytes(content)
    for path in (tmp_path, tmp_path / "t.csv"):
        dataset = open_dataset(path)
        assert [(item.image.name, item.label) for item in dataset.items] == [("a.png", 0), ("b.png", 1)]
        assert all(item.image.is_file() for item in dataset.items)
        assumed = "t.csv is not in UTF-8: it was read as Windows-1252"
        assert dataset.notes == ((assumed,) if b"gr\xfcn" in content else ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image,label\n\nx.png,0\n\ny.png,perhaps\n", r"a label is one of .*; line 5 of .*t.csv has 'perhaps'"),
        (b"image,label\n,0\n", "an image is a file's path; line 2 of"),
        (b"bild;klasse\r\nx.png;gut\r\n", "the columns of t.csv are bild, klasse"),
        (b"", "the columns of t.csv are none"),
        (b"image,label\0\n", "it holds zero bytes"),
        (b"image,label\n" + b"x" * 200_000 + b",0\n", "is no CSV: field larger"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    for layout in (None, "csv"):
        with pytest.raises(UsageError, match=message) as caught:
            open_dataset(tmp_path / "t.csv", layout)
        assert "\n" not in str(caught.value)


def test_an_image_that_is_listed_twice(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    text(tmp_path / "t.csv", "image,label\na.png,0\nb.png,1\n./a.png,0\n")
    report = inspect(open_dataset(tmp_path))
    assert report.findings == {"listed_twice": ["a.png"]}
    assert report.wrong


def test_files_of_other_programs_beside_a_tree(fbclip: Run, tmp_path: Path) -> None:
    mvtec(tmp_path / "set")
    (tmp_path / "set/labels.csv").write_bytes("Bemerkung;grün\n".encode("cp1252"))
    (tmp_path / "set/zero.csv").write_bytes(b"\0\1")
    text(tmp_path / "set/meta.json", '{"cameras": {"left": [1, 2]}}')
    dataset = open_dataset(tmp_path / "set")
    assert (dataset.layout, len(dataset.items)) == ("mvtec", 3)
    text(tmp_path / "set/meta.json", '{"cut": ')
    assert "left aside: " in fbclip("data", "set").stdout  # and names it
    text(tmp_path / "set/meta.json", '{"test": {"bottle": [{"img_path": "x.png"}]}}')  # ours, with a mistake
    with pytest.raises(UsageError, match="has img_path and anomaly"):
        open_dataset(tmp_path / "set")


def record(**values: object) -> str:
    return json.dumps({"img_path": "x.png", "anomaly": 0, **values})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (record(img_path=None), "has a text as img_path"),
        (record(img_path=float("nan")), "has a text as img_path"),
        (record(img_path=["x.png"]), r"img_path is a text; an entry of test/a of .*meta.json has '\['x.png'\]'"),
        (record(img_path="x\0.png"), "a name is text that a file can have"),
        (record(img_path="\ud800.png"), "a name is text that a file can have"),
        (record(mask_path=5), "mask_path is a text"),
        (record(anomaly=float("nan")), "a label is one of"),
        (record(anomaly=[]), "a label is one of"),
        ("[]", "has img_path and anomaly"),
        ("[" * 100_000, "nested too deep|is no JSON"),
        ("9" * 5000, "has img_path and anomaly|is no JSON"),
    ],
)
def test_what_is_wrong_with_an_index_is_said(tmp_path: Path, record: str, message: str) -> None:
    text(tmp_path / "meta.json", f'{{"test": {{"a": [{record}]}}}}')
    with pytest.raises(UsageError, match=message) as caught:
        open_dataset(tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_an_index_as_pandas_writes_it(tmp_path: Path) -> None:
    put(tmp_path, "x.png", "y.png", "masks/y.png")
    nothing = record(mask_path=float("nan"), specie_name=None, anomaly=0.0)
    defect = record(img_path="y.png", mask_path=r"masks\y.png", specie_name=float("nan"), anomaly=True)
    text(tmp_path / "meta.json", f'\ufeff{{"test": {{"a": [{nothing}, {defect}]}}}}')
    good, bad = open_dataset(tmp_path).items
    assert (good.label, good.mask, good.defect) == (0, None, "good")
    assert (bad.label, bad.mask, bad.defect) == (1, tmp_path / "masks/y.png", "defect")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"meta": {}, "train": [], "test": []}, "has a text as prefix"),
        ({"meta": [], "train": [], "test": []}, "has meta, train and test"),
        ({"meta": {"prefix": "x", "normal_class": "OK"}, "train": {}, "test": []}, "is a list of images"),
        ({"meta": {"prefix": "x", "normal_class": "OK"}, "train": [5], "test": []}, "has image_path and anomaly_class"),
        ({"meta": {"prefix": "x", "normal_class": "OK"}, "train": [{}], "test": []}, "has a text as image_path"),
    ],
)
def test_what_is_wrong_with_real_iad_is_said(tmp_path: Path, content: object, message: str) -> None:
    text(tmp_path / "realiad_jsons/x.json", json.dumps(content))
    with pytest.raises(UsageError, match=message):
        open_dataset(tmp_path)


def test_an_index_may_leave_its_folder(tmp_path: Path) -> None:
    put(tmp_path, "images/a.png", "b.png")
    text(tmp_path / "set/t.csv", f"image,label\n../images/a.png,0\n{tmp_path}/b.png,1\n/dev/zero,1\n.,0\n")
    report = inspect(open_dataset(tmp_path / "set"))
    assert [line.split(":")[0] for line in report.findings["unreadable"]] == ["zero", "."]


# --- masks ---


def save(path: Path, pixels: NDArray[np.generic], mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def test_mask_files_of_every_kind(tmp_path: Path) -> None:
    truth = BOX > 0
    palette = Image.fromarray(truth.astype(np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    palette.save(tmp_path / "palette.png")
    transparent = np.dstack([np.full((*BOX.shape, 3), 200, np.uint8), BOX])
    files = [
        tmp_path / "palette.png",
        save(tmp_path / "grey.png", BOX),
        save(tmp_path / "class-numbers.png", truth.astype(np.uint8) * 7),
        save(tmp_path / "bits.png", BOX, "1"),
        save(tmp_path / "rgb.bmp", BOX, "RGB"),
        save(tmp_path / "dark-blue.png", np.dstack([BOX * 0, BOX * 0, truth.astype(np.uint8)])),
        save(tmp_path / "rgba.png", transparent),
        save(tmp_path / "deep.png", truth.astype(np.uint16)),
        save(tmp_path / "deep.tiff", truth.astype(np.uint16) * 65535),
        save(tmp_path / "lossy.jpg", BOX, quality=30),
    ]
    faint = Image.open(tmp_path / "lossy.jpg")
    assert len(faint.getcolors() or ()) > 2  # compression did leave specks
    for file in files:
        mask = read_mask(file)
        assert (mask.dtype, set(np.unique(mask))) == (np.uint8, {0, 1}), file.name
        wrong = (mask > 0) != truth
        assert wrong.mean() < (0.01 if file.suffix == ".jpg" else 1e-9), file.name


def test_flat_greys_are_classes_and_soft_edges_are_halved(tmp_path: Path) -> None:
    flat = np.repeat(np.array([[0, 60, 120, 180, 240]], np.uint8), 5, axis=0)
    assert read_mask(save(tmp_path / "flat.png", flat))[0].tolist() == [0, 1, 1, 1, 1]
    ramp = np.repeat(np.array([[0, 1, 9, 100, 140, 200, 240]], np.uint8), 5, axis=0)
    assert read_mask(save(tmp_path / "ramp.png", ramp))[0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    specks = np.random.default_rng(0).integers(0, 9, (40, 60), np.uint8)
    assert not read_mask(save(tmp_path / "specks.jpg", specks)).any()
    assert read_mask(save(tmp_path / "numbers.png", specks)).any()


@given(st.lists(st.integers(0, 127), min_size=1, max_size=300))
def test_class_numbers_are_all_defective(tmp_path_factory: pytest.TempPathFactory, numbers: list[int]) -> None:
    file = save(tmp_path_factory.getbasetemp() / "numbers.png", np.array([numbers], np.uint8))
    assert read_mask(file)[0].tolist() == [int(number > 0) for number in numbers]


# --- samples ---


def test_samples(tmp_path: Path) -> None:
    mvtec(tmp_path)
    samples = Samples(open_dataset(tmp_path).for_training(), 20)
    good, defective = samples[1], samples[0]
    assert (len(samples), good.label, defective.label) == (2, 0, 1)
    assert good.mask is not None
    assert not good.mask.any()
    assert defective.image.shape == (20, 20, 3)
    assert defective.mask is not None
    # rows 10 to 20 of 40 and columns 30 to 50 of 60, at 20 by 20; the ends fall between pixels
    expected = np.zeros((20, 20), bool)
    expected[5:10, 10:17] = True
    assert (defective.mask.astype(bool) != expected).sum() <= 5
    mask = tmp_path / "bottle/ground_truth/crack/001_mask.png"
    Image.open(mask).resize((180, 120)).save(mask)  # of another size
    larger = samples[0].mask
    assert larger is not None
    assert (larger != defective.mask).sum() <= 5
    mask.unlink()
    with pytest.raises(ImageError, match="no file"):
        samples[0]
    with pytest.raises(UsageError, match="mask for every defective image"):
        open_dataset(tmp_path).for_training()


def test_a_defect_that_nobody_marked_has_no_mask(tmp_path: Path) -> None:
    headct(tmp_path)
    marked, good = (Samples(open_dataset(tmp_path).items, 8)[i] for i in (0, 1))
    assert (marked.label, marked.mask) == (1, None)
    assert good.mask is not None


def test_memory_does_not_grow_with_the_data_set(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((300, 300, 3), np.uint8)).save(tmp_path / "image.png")
    item = Item(tmp_path / "image.png", 0, None, "part", "good", "test")

    def held(images: int) -> tuple[int, int]:
        """The most samples at once, and the memory that is kept in the end."""
        samples, made, most = Samples((item,) * images, 200), list[weakref.ref[NDArray[np.uint8]]](), 0

        def load(index: int) -> Sample:
            sample = samples[index]
            made.append(weakref.ref(sample.image))
            return sample

        tracemalloc.start()
        for sample in parallel_map(load, range(images), workers=2):
            assert sample.image.shape == (200, 200, 3)
            most = max(most, sum(one() is not None for one in made))
        del sample
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return most, kept

    held(4)  # imports
    most, kept = held(160)
    assert 1 <= most <= 2 * 2 + 2  # two for each thread, and one that it may still have in its hands
    assert kept < 200 * 200 * 4  # not even one of them


def test_threads_keep_the_order_and_pass_errors_on() -> None:
    assert list(parallel_map(lambda n: n * n, range(50), workers=4)) == [n * n for n in range(50)]
    results = parallel_map(lambda n: 1 // (3 - n), range(10), workers=2)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


# --- the fingerprint ---


def test_fingerprint_is_of_what_the_data_set_is(tmp_path: Path) -> None:
    mvtec(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = open_dataset(tmp_path / "a"), open_dataset(tmp_path / "b")
    prints = [first.fingerprint(), Dataset("", "", first.root, first.items[::-1]).fingerprint()]
    assert second.fingerprint() == prints[0] == prints[1]
    assert len(prints[0]) == 64
    seen = {prints[0], first.select("test").fingerprint()}
    image = tmp_path / "b/bottle/test/crack/001.png"
    pixels = np.asarray(Image.open(image)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(image)
    seen.add(second.fingerprint())
    (tmp_path / "b/bottle/ground_truth/crack/001_mask.png").unlink()
    seen.add(open_dataset(tmp_path / "b").fingerprint())
    image.rename(image.with_name("2.png"))
    seen.add(open_dataset(tmp_path / "b").fingerprint())
    assert len(seen) == 5


# --- the command ---


def test_data_says_what_it_recognised(fbclip: Run, tmp_path: Path) -> None:
    mvtec(tmp_path / "set")
    mvtec(tmp_path / "set", "carpet")
    done = fbclip("data", "set", "--json", "out/report.json")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("MVTec AD (layout mvtec)")
    assert lines[2].split() == ["bottle", "1", "0", "1", "1"]
    assert next(line for line in lines if line.startswith("2 classes")).split()[2:] == ["2", "0", "2", "2"]
    assert "images 60×40; 2 masks" in lines
    assert lines[-4:-1] == ["training: yes", "image-level evaluation: yes", "pixel-level evaluation: yes"]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["fingerprint"] == open_dataset(tmp_path / "set").fingerprint()
    assert (report["wrong"], report["findings"], report["layout"]) == (False, {}, "mvtec")
    assert json.loads(fbclip("data", "set", "--layout", "mpdd", "--json", "-").stdout)["layout"] == "mpdd"
    assert "--layout: a layout is one of" in fbclip("data", "set", "--layout", "x", code=2).stderr


def test_data_finds_what_is_wrong(fbclip: Run, tmp_path: Path) -> None:
    root = tmp_path / "bottle"
    mvtec(tmp_path)
    test, masks = root / "test", root / "ground_truth/crack"
    put(root, *(f"test/crack/{n}.png" for n in ("missing", "empty", "damaged", "tall", "large")))
    put(root, "ground_truth/crack/large_mask.png")
    save(masks / "empty_mask.png", BOX * 0)
    (masks / "damaged_mask.png").write_bytes(b"no image")
    save(masks / "tall_mask.png", BOX.T)
    save(masks / "large_mask.png", BOX.repeat(2, 0).repeat(2, 1))
    shutil.copy(root / "train/good/000.png", test / "good/copy.png")
    shutil.copy(test / "good/000.png", test / "crack/good_after_all.png")
    shutil.copy(masks / "001_mask.png", masks / "good_after_all_mask.png")
    (test / "good/broken.png").write_bytes((test / "good/000.png").read_bytes()[:3000])
    done = fbclip("data", "bottle", "--json", "-", code=2)
    report = json.loads(done.stdout)
    assert {name: [line.split(":")[0] for line in files] for name, files in report["findings"].items()} == {
        "unreadable": ["test/good/broken.png"],
        "contradictory": ["test/good/000.png is test/crack/good_after_all.png"],
        "train_in_test": ["test/good/copy.png is train/good/000.png"],
        "mask_missing": ["test/crack/missing.png"],
        "mask_unreadable": ["test/crack/damaged.png"],
        "mask_empty": ["test/crack/empty.png"],
        "mask_misshapen": ["test/crack/tall.png"],
        "mask_resized": ["test/crack/large.png"],
    }
    for use in ("trainable", "image_level", "pixel_level"):
        assert report[use].startswith("wrong: ")
    assert "test/crack/tall.png: mask 40×60, image 60×40" in done.stderr


def test_masks_of_good_images_must_be_black(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png", "masks/1.png")
    text(tmp_path / "t.csv", "image,label,mask\na.png,0,masks/1.png\nb.png,1,masks/1.png\n")
    report = inspect(open_dataset(tmp_path))
    assert report.findings == {"mask_of_good": ["a.png"]}
    assert report.wrong


@pytest.mark.parametrize(
    ("make", "code", "verdicts"),
    [
        (headct, 0, ["no: no defective image has a mask", "yes", "no: no defective image has a mask"]),
        (isic, 0, ["no: there are no good images in the test split"] * 2 + ["yes"]),
        (lambda r: put(r, "bottle/train/good/1.png", "bottle/test/good/1.png"), 2, ["no", "no", "no"]),
    ],
)
def test_what_a_data_set_is_good_for(fbclip, tmp_path, make, code, verdicts) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "set")
    lines = fbclip("data", "set", code=code).stdout.splitlines()[-4:-1]
    for line, verdict in zip(lines, verdicts, strict=True):
        assert line.split(": ", 1)[1].startswith(verdict)


def test_listed_files_that_are_not_there(fbclip: Run, tmp_path: Path) -> None:
    table(tmp_path / "set")
    (tmp_path / "set/masks/b.png").unlink()
    done = fbclip("data", "set", code=2)
    assert "defective images have no mask: 1" in done.stdout
    assert "image-level evaluation: yes" in done.stdout
    (tmp_path / "set/x/a.png").unlink()
    done = fbclip("data", "set", code=2)
    assert "images can't be read: 1" in done.stdout
    assert "training: wrong" in done.stdout


@pytest.mark.slow
@pytest.mark.realdata
def test_magnetic_tiles(real_images: Path) -> None:
    dataset = open_dataset(real_images)
    report = inspect(dataset)
    assert report.layout == "mvtec"
    assert sum(report.counts["magnetic_tile"].values()) == len(dataset.items)
    assert set(report.findings) <= {"mask_empty"}  # four masks of "uneven" are black as published


def test_a_mask_of_a_good_image_is_read(tmp_path: Path) -> None:
    """A black one is nothing, another says that a label or a mask is wrong."""
    for turns, name in enumerate(("good/0.png", "good/1.png", "defective/2.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.linear_gradient("L").resize((8, 8)).rotate(90 * turns).save(tmp_path / name)
    (tmp_path / "masks").mkdir()
    for name, grey in (("0", 255), ("1", 0), ("2", 255)):
        Image.new("L", (8, 8), grey).save(tmp_path / "masks" / f"{name}_mask.png")
    findings = inspect(open_dataset(tmp_path)).findings
    assert list(findings) == ["mask_of_good"] and len(findings["mask_of_good"]) == 1
