"""Data: from a file, a folder, a data set or a cache to batches."""
import errno
import gc
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import PIL
import pytest
import torch
import torchvision
from PIL import Image

import common

SIDE = 32
RNG = np.random.default_rng(0)
BLOCKS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)      # red green / blue yellow


def blocks(height=64, width=96, colours=BLOCKS):
    """Four blocks of colour: any turn, flip or exchange of channels shows."""
    return Image.fromarray(colours.repeat(height // 2, 0).repeat(width // 2, 1))


def photo(height=48, width=64, seed=0):
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.BICUBIC)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def tree(root, classes=("ant", "bee"), each=4, splits=("train", "val")):
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            for k in range(each):
                save(photo(40 + 8 * k, 64, 100 * s + 10 * c + k), root / split / name / f"{k}.jpg")
    return root


def corners(canvas):
    """The colours in the middles of the four quarters, 2 2 3."""
    quarter = canvas.shape[-1] // 4
    return canvas[:, quarter::2 * quarter, quarter::2 * quarter].permute(1, 2, 0).int()


def read(path, side=SIDE):
    """The one image of a folder, with its size."""
    images = common.open_images(str(path), side)
    batch = images.__getitems__([0])
    assert not batch.unreadable, batch.unreadable
    return batch.canvas[0], batch.size[0].tolist()


def all_of(images, workers=0, batch_size=4):
    parts = list(common.sequential(images, range(len(images)), batch_size=batch_size, workers=workers, device="cpu"))
    merged = [torch.cat(values) for values in list(zip(*parts))[:5]]
    return common.Batch(*merged, sorted({u for part in parts for u in part.unreadable}))


def name_of(images, index, parts=1):
    return "/".join(os.fsdecode(images.files[index]).split("/")[-parts:])


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[:5], b[:5])) and a.unreadable == b.unreadable


# ---- one file ----------------------------------------------------------------------------------------------------
def grey16(path, **options):
    values = np.array([[0, 20000], [40000, 65535]], np.uint16).repeat(32, 0).repeat(48, 1)
    save(Image.fromarray(values), path, **options)


GREY = np.array([[0, 78], [156, 255]])[..., None].repeat(3, 2)             # 20000 / 256 = 78.1


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.jpeg", "a.webp", "a.bmp", "a.tif", "a.tiff", "a.GIF"])
def test_formats(tmp_path, name):
    save(blocks(), tmp_path / name)
    canvas, size = read(tmp_path)
    assert size == [64, 96] and (corners(canvas) - torch.tensor(BLOCKS).int()).abs().max() <= 4


def large(cells, dtype):
    """A 2 x 2 table as a picture of 64 x 96."""
    return Image.fromarray(np.array(cells, dtype).repeat(32, 0).repeat(48, 1))


def palette_with_hole(path):
    """Palette image whose yellow block is transparent."""
    image = blocks().convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    yellow = image.getpixel((90, 60))
    save(image, path, transparency=yellow)


def colour_key(path):
    save(blocks(), path, transparency=(255, 255, 0))


HOLE = BLOCKS.copy()
HOLE[1, 1] = 255                                                           # transparent is white
ALPHA = np.dstack([BLOCKS, [[255, 255], [255, 0]]]).astype(np.uint8)
HALF = np.array([[[60, 255], [60, 128]], [[200, 255], [9, 0]]], np.uint8)  # grey, alpha
MODES = {
    "grey": (lambda p: save(blocks().convert("L"), p / "a.png"), np.asarray(blocks().convert("L"))[::32, ::48]),
    "one bit": (lambda p: save(large([[0, 255], [255, 0]], np.uint8).convert("1"), p / "a.png"),
                np.array([[0, 255], [255, 0]])),
    "palette": (lambda p: save(blocks().convert("P", palette=Image.Palette.ADAPTIVE), p / "a.png"), BLOCKS),
    "palette with a hole": (lambda p: palette_with_hole(p / "a.png"), HOLE),
    "gif with a hole": (lambda p: palette_with_hole(p / "a.gif"), HOLE),
    "colour key": (lambda p: colour_key(p / "a.png"), HOLE),
    "alpha": (lambda p: save(blocks(colours=ALPHA), p / "a.png"), HOLE),
    "alpha webp": (lambda p: save(blocks(colours=ALPHA), p / "a.webp", lossless=True), HOLE),
    "grey alpha": (lambda p: save(Image.fromarray(HALF.repeat(32, 0).repeat(48, 1), "LA"), p / "a.png"),
                   np.array([[60, 157], [200, 255]])),                     # 60 at 128/255 on white is 157
    "cmyk jpeg": (lambda p: save(blocks().convert("CMYK"), p / "a.jpg", quality=95), BLOCKS),
    "cmyk tiff": (lambda p: save(blocks().convert("CMYK"), p / "a.tif"), BLOCKS),
    "ycbcr tiff": (lambda p: save(blocks().convert("YCbCr"), p / "a.tif"), BLOCKS),
    "16-bit png": (lambda p: grey16(p / "a.png"), GREY),
    "16-bit tiff": (lambda p: grey16(p / "a.tif"), GREY),
    "32-bit tiff": (lambda p: save(large([[0, 20000], [40000, 65535]], np.int32), p / "a.tif"), GREY),
    "float tiff": (lambda p: save(large([[0, .25], [.5, 1]], np.float32), p / "a.tif"),
                   np.array([[0, 64], [127, 255]])),
    "animated gif": (lambda p: save(blocks(), p / "a.gif", save_all=True, append_images=[photo(64, 96)]), BLOCKS),
    "animated webp": (lambda p: save(blocks(), p / "a.webp", save_all=True, append_images=[photo(64, 96)],
                                     lossless=True), BLOCKS),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_give_the_right_rgb(tmp_path, mode):
    write, expected = MODES[mode]
    write(tmp_path)
    if mode == "ycbcr tiff" and int(PIL.__version__.split(".")[0]) < 12:
        pytest.skip("Pillow before 12 cannot read what it wrote there")
    canvas, size = read(tmp_path)
    expected = expected if expected.ndim == 3 else expected[..., None].repeat(3, 2)
    assert size == [64, 96]
    assert (corners(canvas) - torch.tensor(np.array(expected)).int()).abs().max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_exif_orientation_and_scaled_decoding(tmp_path, orientation, name):
    """The file holds the picture turned; 512 pixels on a canvas of 32 are decoded at an eighth."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}                       # what the camera did to the upright picture
    upright = blocks(512, 768)
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(stored, tmp_path / name, exif=exif)
    canvas, size = read(tmp_path)
    assert size == [512, 768] and (corners(canvas) - torch.tensor(BLOCKS).int()).abs().max() <= 4


def test_scaled_decoding_keeps_the_picture_and_the_odd_size(tmp_path):
    save(photo(613, 835), tmp_path / "a.jpg", quality=95)
    canvas, size = read(tmp_path, 64)
    whole = torch.from_numpy(np.array(Image.open(tmp_path / "a.jpg").resize((64, 64), Image.BICUBIC))).permute(2, 0, 1)
    assert size == [613, 835]
    assert (canvas.float() - whole.float()).abs().mean() < 1


@pytest.mark.parametrize("height, width", [(128, 192), (129, 193), (128, 191), (191, 128), (513, 387), (613, 835)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_scaled_decoding_ends_at_the_true_edge(tmp_path, height, width, mode):
    """libjpeg's last pixel of 127 halved is half a pixel: the canvas ends inside it. Equal to Pillow's box but for
    rounding, on noise, also where one axis has that pixel and the other already has the canvas's side."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))
    save(noise.convert(mode), tmp_path / "a.jpg", quality=95)
    canvas, size = read(tmp_path, 64)
    scaled = Image.open(tmp_path / "a.jpg")
    _, box = scaled.draft(None, canvas.shape[1:])
    assert scaled.size[0] < width and size == [height, width]
    expected = scaled.convert("RGB").resize(canvas.shape[1:], Image.BICUBIC, box)
    off = (canvas.int() - torch.from_numpy(np.array(expected)).permute(2, 0, 1).int()).abs()
    assert off.max() <= 2
    if box[2:] != scaled.size:  # the test can tell
        assert (torch.from_numpy(np.array(scaled.convert("RGB").resize(canvas.shape[1:], Image.BICUBIC)))
                .permute(2, 0, 1).int() - canvas.int()).abs().max() > 5


@pytest.mark.parametrize("how", [{}, {"quality": 30}, {"quality": 100, "subsampling": 0}, {"subsampling": 1},
                                 {"progressive": True}, {"optimize": True}, {"keep_rgb": True, "subsampling": 0}], ids=str)
def test_jpegs_by_torchvision_have_pillows_bits(tmp_path, monkeypatch, how):
    """And whatever is cut off or damaged, one refuses what the other refuses."""
    save(photo(213, 335), tmp_path / "a.jpg", **how)
    whole, used = (tmp_path / "a.jpg").read_bytes(), []
    decode = torchvision.io.decode_jpeg
    monkeypatch.setattr(torchvision.io, "decode_jpeg", lambda x: used.append(decode(x)) or used[-1])

    def of(data):
        (tmp_path / "a.jpg").write_bytes(data)
        try:
            return common.squeeze(Image.open(tmp_path / "a.jpg"), 192)
        except OSError as error:
            return str(error)
    broken = np.random.default_rng(0)
    cases = [whole] + [whole[:int(len(whole) * share)] for share in (0.3, 0.6, 0.9, 0.99)] + [whole[:-2], whole + b"more"]
    for _ in range(20):
        noisy = np.frombuffer(whole, np.uint8).copy()
        noisy[broken.integers(len(noisy) // 2, len(noisy) - 2, 3)] = broken.integers(0, 256, 3)
        cases.append(noisy.tobytes())
    ours = [of(data) for data in cases]
    assert len(used) > 15
    monkeypatch.setattr(torchvision.io, "decode_jpeg", lambda x: (_ for _ in ()).throw(RuntimeError("built without it")))
    for mine, data in zip(ours, cases):
        theirs = of(data)
        assert (mine[1] == theirs[1] and torch.equal(mine[0], theirs[0])) if isinstance(mine, tuple) else mine == theirs
    (tmp_path / "a.jpg").write_bytes(whole)
    held = Image.open(tmp_path / "a.jpg")
    held.load()  # a data set's that has it open already
    assert torch.equal(common.squeeze(held, 192)[0], ours[0][0])
    assert isinstance(ours[0], tuple) and sum(isinstance(x, str) for x in ours) >= 3


def test_damaged_metadata_is_no_damaged_image(tmp_path):
    save(blocks(), tmp_path / "a.jpg", exif=b"Exif\0\0no TIFF header here at all")
    canvas, size = read(tmp_path)
    assert size == [64, 96] and (corners(canvas) - torch.tensor(BLOCKS).int()).abs().max() <= 4


def test_resize_is_antialiased_bicubic(tmp_path):
    """Equal to Pillow's own but for rounding, on noise, where aliasing would show."""
    image = Image.fromarray(RNG.integers(0, 255, (90, 130, 3), np.uint8))
    save(image, tmp_path / "a.png")
    expected = torch.from_numpy(np.array(image.resize((SIDE, SIDE), Image.BICUBIC))).permute(2, 0, 1).int()
    assert (read(tmp_path)[0].int() - expected).abs().max() <= 2


# ---- what cannot be read -----------------------------------------------------------------------------------------
def broken_tree(root):
    """12 files, of which 3, 4 and 11 (by sorted name) cannot be read."""
    for k in (0, 1, 2, 5, 6, 7, 8, 9, 10):
        save(photo(seed=k), root / f"{k:02}.jpg")
    (root / "03.jpg").write_bytes((root / "02.jpg").read_bytes()[:400])
    (root / "04.jpg").write_text("not an image")
    (root / "11.jpg").write_bytes(b"")
    save(photo(1, 1), root / "09.jpg")
    save(photo(10, 30_000), root / "10.jpg")
    return root


def test_unreadable_images_are_replaced_and_reported(tmp_path):
    images = common.open_images(str(broken_tree(tmp_path)), SIDE)
    got = all_of(images)
    assert [i for i, _ in got.unreadable] == [3, 4, 11] and got.index.tolist() == list(range(12))
    assert all(re.search(rf"/{i:02}\.jpg: \w+", why) for i, why in got.unreadable)
    for asked, stands_in in ((3, 5), (4, 5), (11, 0)):
        assert torch.equal(got.canvas[asked], got.canvas[stands_in])
        assert torch.equal(got.size[asked], got.size[stands_in])
    assert got.size[9].tolist() == [1, 1] and got.size[10].tolist() == [10, 30_000]
    assert same(got, all_of(images)) and same(got, all_of(images, workers=2, batch_size=5))


def test_the_stand_in_brings_its_label_and_mask(tmp_path):
    for k, name in enumerate(("a", "b")):
        save(photo(seed=k), tmp_path / "images" / name / "0.jpg")
        save(Image.fromarray(np.full((48, 64), 7 + k, np.uint8)), tmp_path / "masks" / name / "0.png")
    (tmp_path / "images/a/0.jpg").write_text("")
    got = all_of(common.open_images(str(tmp_path), SIDE))
    assert got.label.tolist() == [1, 1] and (got.mask == 8).all()
    (tmp_path / "masks/b/0.png").write_text("")                            # nothing is left: an empty canvas, reported
    images = common.open_images(str(tmp_path), SIDE)
    got = images.__getitems__([0])
    assert got.label.tolist() == [-1] and not got.canvas.any() and len(got.unreadable) == 2
    with pytest.raises(common.UserError, match="1 of 1 images cannot be read"):        # it is not scored
        list(common.sequential(images, [1], batch_size=2, workers=0, device="cpu"))
    with pytest.raises(common.UserError, match="cannot be read"):
        common.open_images(str(tmp_path), SIDE, cache=str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_a_long_row_of_unreadable_images_has_a_stand_in_all_the_same(tmp_path):
    """A disk that was full while files were copied; their neighbours are as empty."""
    images = common.open_images(str(tree(tmp_path, each=60, splits=("",))), SIDE)
    images.broken = dict.fromkeys(range(4, 100), "empty")
    got = images.__getitems__([5, 40])
    assert got.label.tolist() != [-1, -1] and min(got.label) >= 0 and got.canvas.flatten(1).any(1).all()


def test_batches_in_a_thread(tmp_path):
    """As an application's server asks for features; signals are the main thread's alone."""
    images, got = common.open_images(str(tree(tmp_path)), SIDE), []
    thread = threading.Thread(target=lambda: got.append(all_of(images, workers=1)))
    thread.start()
    thread.join(60)
    assert same(got[0], all_of(images))


def test_the_limit_of_unreadable_images_is_of_those_asked_for(tmp_path):
    """Each of several processes has its share: none may lose more of it than of the whole. What is tried in the stead of
    an unreadable image, and is unreadable as well, does not count."""
    save(photo(16, 16), tmp_path / "0.png")
    for k in range(1, 1200):
        os.link(tmp_path / "0.png", tmp_path / f"{k}.png")
    images = common.open_images(str(tmp_path), 8)
    images.broken = dict.fromkeys(range(1100, 1112), "empty")
    assert sum(len(b.index) for b in common.sequential(images, range(1200), batch_size=64, workers=0, device="cpu")) == 1200
    for some in ([0, 1100, 1101], range(600, 1200)):       # a sample may have all of them by chance
        assert list(common.sequential(images, some, batch_size=64, workers=0, device="cpu"))
    with pytest.raises(common.UserError, match="12 of 120 images"):
        list(common.sequential(images, range(1050, 1170), batch_size=64, workers=0, device="cpu"))


def test_bombs_are_unreadable_and_leave_the_warning_filters_alone(tmp_path, monkeypatch):
    save(photo(40, 50), tmp_path / "a.png")
    save(photo(30, 30), tmp_path / "b.png")
    before = list(warnings.filters)
    for limit in (1500, 950):                    # Pillow warns above the limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        batch = common.open_images(str(tmp_path), SIDE).__getitems__([0, 1])
        assert [i for i, _ in batch.unreadable] == [0] and "decompression bomb" in batch.unreadable[0][1]
        assert batch.size.tolist() == [[30, 30], [30, 30]]
    assert warnings.filters == before


# ---- folders -----------------------------------------------------------------------------------------------------
def test_folder_with_and_without_splits(tmp_path):
    tree(tmp_path / "a")
    (tmp_path / "a/train/.hidden").mkdir()
    save(photo(), tmp_path / "a/train/.hidden/x.jpg")
    save(photo(), tmp_path / "a/train/ant/.x.jpg")
    (tmp_path / "a/train/ant/notes.txt").write_text("")
    train, val = (common.open_images(str(tmp_path / "a"), SIDE, split) for split in ("train", "val"))
    assert train.classes == val.classes == ["ant", "bee"] and len(train) == len(val) == 8 and not train.has_masks
    assert train.labels.tolist() == all_of(train).label.tolist() == [0] * 4 + [1] * 4
    below = common.open_images(str(tmp_path / "a/train"), SIDE)
    assert same(all_of(below), all_of(train)) and below.fingerprint == train.fingerprint
    assert common.open_images(str(tmp_path / "a/train"), SIDE, "val") is None
    assert all_of(train).mask.shape == (8, 0, SIDE, SIDE)


def test_a_class_called_train_and_splits_in_capitals(tmp_path):
    """CIFAR-100 and DomainNet have trains."""
    names = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "train"]
    images = common.open_images(str(tree(tmp_path / "a", names, 1, ("",))), SIDE)
    assert images.classes == names and len(images) == 8
    assert common.open_images(str(tmp_path / "a"), SIDE, "val") is None
    tree(tmp_path / "a", ("ant", "bee"), 2, ("val",))                      # with a val/ beside it, it is the split
    shutil.rmtree(tmp_path / "a/train")
    tree(tmp_path / "a", ("ant", "bee"), 2, ("train",))
    assert common.open_images(str(tmp_path / "a"), SIDE).classes == ["ant", "bee"]
    vehicles = ["Bus", "Car", "Ship", "Train"]
    assert common.open_images(str(tree(tmp_path / "c", vehicles, 1, ("",))), SIDE).classes == vehicles
    for name in ("test2017", "a", "b", "c", "d", "e", "f", "g", "Train2017"):
        save(photo(), tmp_path / f"d/{name}/0.jpg")
    save(photo(), tmp_path / "d/train2017/1.jpg")
    assert name_of(common.open_images(str(tmp_path / "d"), SIDE), 0, 2) == "train2017/1.jpg"
    tree(tmp_path / "b", splits=("Train", "Val"))
    train, val = (common.open_images(str(tmp_path / "b"), SIDE, split) for split in ("train", "val"))
    assert train.classes == val.classes == ["ant", "bee"] and len(train) == len(val) == 8


def test_classes_missing_in_val_keep_their_numbers(tmp_path):
    shutil.rmtree(tree(tmp_path) / "val/ant")
    assert common.open_images(str(tmp_path), SIDE, "val").labels.tolist() == [1] * 4


def test_flat_folders(tmp_path):
    for year in ("train2017", "val2017"):                                  # COCO
        for k in range(3):
            save(photo(seed=k), tmp_path / year / f"{k:012}.jpg")
    (tmp_path / "annotations").mkdir()
    train, val = (common.open_images(str(tmp_path), SIDE, split) for split in ("train", "val"))
    assert len(train) == len(val) == 3 and train.classes == [] and train.labels.tolist() == [-1] * 3
    save(photo(), tmp_path / "train2017/more/0.jpg")                       # beside images a sub-folder is no class
    assert common.open_images(str(tmp_path / "train2017"), SIDE).labels.tolist() == [-1] * 4


def test_pairs_of_images_and_masks(tmp_path):
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 15:45] = 3
    mask[20:30, 15:30] = 255
    for root in (tmp_path / "a", tmp_path / "b/train", tmp_path / "b/val"):
        save(photo(40, 60), root / "images/x/0.jpg")
        save(Image.fromarray(mask), root / "masks/x/0.png")
    binary = Image.fromarray(np.where(mask == 3, 255, 0).astype(np.uint8))
    for folder, options, values in ((tmp_path / "a", {}, [0, 3, 255]), (tmp_path / "b", {"split": "val"}, [0, 3, 255])):
        images = common.open_images(str(folder), 20, **options)
        batch = images.__getitems__([0])
        assert images.has_masks and batch.mask[0, 0].unique().tolist() == values
        assert torch.allclose(images.boxes(0), torch.tensor([[0.25, 0.25, 0.75, 0.5]]))
        assert (batch.mask[0, 0, 5:10, 5:15] == 3).all() and (batch.mask[0, 0] == 3).sum() == 50
    save(binary, tmp_path / "elsewhere/val/x/0.png")
    images = common.open_images(str(tmp_path / "b"), 20, "val", masks=str(tmp_path / "elsewhere"))
    assert images.__getitems__([0]).mask.unique().tolist() == [0, 1]       # 0 and 255 alone: 255 is the foreground
    save(photo(40, 60), tmp_path / "b/val/images/x/1.jpg")
    save(binary, tmp_path / "b/val/masks/x/1.png")                         # beside a mask with a 3 its 255 is void
    assert common.open_images(str(tmp_path / "b"), 20, "val").__getitems__([1]).mask.unique().tolist() == [0, 255]
    save(photo(40, 60), tmp_path / "a/images/x/1.jpg")
    with pytest.raises(common.UserError, match=r"1 of 2 masks.*1\.png"):
        common.open_images(str(tmp_path / "a"), SIDE)


def test_fingerprint_follows_names_and_sizes_not_the_root(tmp_path):
    first = common.open_images(str(tree(tmp_path / "a")), SIDE).fingerprint
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert common.open_images(str(tmp_path / "b"), SIDE).fingerprint == first
    (tmp_path / "b/train/ant/0.jpg").rename(tmp_path / "b/train/ant/00.jpg")
    second = common.open_images(str(tmp_path / "b"), SIDE).fingerprint
    with open(tmp_path / "b/train/ant/1.jpg", "ab") as file:
        file.write(b"\0")
    assert len({first, second, common.open_images(str(tmp_path / "b"), SIDE).fingerprint}) == 3


def test_sources_joined_by_a_comma(tmp_path):
    a, b, c = tree(tmp_path / "a"), tree(tmp_path / "b", each=2), tree(tmp_path / "c", ("ant", "cat"), each=1)
    both = common.open_images(f"{a},{b}", SIDE)
    one, two = (all_of(common.open_images(str(x), SIDE)) for x in (a, b))
    assert torch.equal(all_of(both).canvas, torch.cat([one.canvas, two.canvas]))
    assert both.labels.tolist() == [0] * 4 + [1] * 4 + [0, 0, 1, 1] and both.classes == ["ant", "bee"]
    other = common.open_images(f"{a},{c}", SIDE)
    assert other.labels.tolist() == [-1] * 10 and other.classes == []
    assert (all_of(other).label == -1).all() and other.fingerprint != both.fingerprint
    tree(tmp_path / "a, b")  # no list: a folder of this name
    assert len(common.open_images(str(tmp_path / "a, b"), SIDE)) == 8


def test_cub_layout(tmp_path):
    """NABirds' class numbers have gaps and its image ids are words."""
    files = ["005.Crow/x.jpg", "002.Auk/b.jpg", "002.Auk/a.jpg", "005.Crow/y.jpg"]
    for k, file in enumerate(files):
        save(photo(50, 100, k), tmp_path / "images" / file)
    rows = {"images": files, "image_class_labels": ["5", "2", "2", "5"], "train_test_split": ["1", "1", "0", "0"],
            "bounding_boxes": ["10.0 5.0 20.0 25.0"] * 4}
    for table, values in rows.items():
        (tmp_path / f"{table}.txt").write_text("".join(f"id-{k} {v}\n" for k, v in enumerate(values)))
    (tmp_path / "classes.txt").write_text("2 Auk, little\n5 Crow\n")
    train, val = (common.open_images(str(tmp_path), SIDE, split) for split in ("train", "val"))
    assert [name_of(images, k, 2) for images in (train, val) for k in (0, 1)] == [files[k] for k in (1, 0, 2, 3)]
    assert train.labels.tolist() == val.labels.tolist() == [0, 1] and train.classes == ["Auk, little", "Crow"]
    assert torch.allclose(train.boxes(1), torch.tensor([[0.1, 0.1, 0.3, 0.6]]))
    twice = common.open_images(f"{tmp_path},{tmp_path}", SIDE)
    assert all(torch.equal(twice.boxes(k), train.boxes(k % 2)) for k in range(4))
    save(photo(50, 100), tmp_path / "else" / "a.jpg")  # has none: one around an object would not be the same thing
    assert all(len(common.open_images(f"{tmp_path},{tmp_path}/else", SIDE).boxes(k)) == 0 for k in range(3))
    whole = (tmp_path / "images" / files[0]).read_bytes()
    (tmp_path / "images" / files[0]).write_bytes(b"x")  # a stand-in has another size: no box in its pixels
    assert len(common.open_images(str(tmp_path), SIDE).boxes(1)) == 0
    (tmp_path / "images" / files[0]).write_bytes(whole)
    (tmp_path / "train_test_split.txt").write_text("".join(f"id-{k} 1\n" for k in range(4)))
    assert common.open_images(str(tmp_path), SIDE, "val") is None and len(common.open_images(str(tmp_path), SIDE)) == 4
    (tmp_path / "train_test_split.txt").write_text("".join(f"id-{k} 0\n" for k in range(4)))
    with pytest.raises(common.UserError, match="no image"):
        common.open_images(str(tmp_path), SIDE)
    (tmp_path / "train_test_split.txt").write_text("id-0 1\nid-1 1\nid-2 0\nid-3 0\n")
    (tmp_path / "images" / files[0]).unlink()
    with pytest.raises(common.UserError, match="1 of 2 images are missing"):
        common.open_images(str(tmp_path), SIDE)


def test_an_image_that_is_not_there(tmp_path):
    tree(tmp_path, each=1)
    for spec in (str(tmp_path), "scenes:4", "scenes:100000"):
        images = common.open_images(spec, 256 if "000" in spec else SIDE)
        for k in (len(images), -len(images) - 1):
            with pytest.raises(IndexError):
                images.__getitems__([0, k])
        last = images.__getitems__([-1])
        assert last.index.tolist() == [len(images) - 1] and torch.equal(last.canvas, images.__getitems__([len(images) - 1]).canvas)


# ---- torchvision's data sets, as their archives unpack -----------------------------------------------------------
@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Data sets are never downloaded; the loader's workers talk through sockets of the machine's own."""
    def connect(self, address):
        assert self.family == socket.AF_UNIX, f"the network was asked for {address}"
        return original(self, address)
    original = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", connect)


def test_cifar(tmp_path, monkeypatch):
    for name, n in [(f"data_batch_{k}", 2) for k in range(1, 6)] + [("test_batch", 3)]:
        entry = {"data": RNG.integers(0, 255, (n, 3072), np.uint8), "labels": list(range(n))}
        (tmp_path / "cifar-10-batches-py").mkdir(exist_ok=True)
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(entry))
    names = {"label_names": [f"c{k}" for k in range(10)]}
    (tmp_path / "cifar-10-batches-py/batches.meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    train, val = (common.open_images(f"CIFAR10:{tmp_path}", SIDE, split) for split in ("train", "val"))
    assert len(train) == 10 and len(val) == 3 and val.labels.tolist() == [0, 1, 2] and len(val.classes) == 10
    assert torch.equal(val.__getitems__([1]).canvas[0], torch.from_numpy(entry["data"][1]).view(3, 32, 32))


def test_stl10(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    data = RNG.integers(0, 255, (4, 3, 96, 96), np.uint8)
    for split in ("train", "test"):
        data.tofile(folder / f"{split}_X.bin")
        np.array([3, 1, 2, 10], np.uint8).tofile(folder / f"{split}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"c{k}" for k in range(10)))
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    for split in ("train", "val"):
        images = common.open_images(f"STL10:{tmp_path}", 96, split)
        assert images.labels[torch.tensor([0, 3])].tolist() == [2, 9] and len(images.classes) == 10
        assert torch.equal(images.__getitems__([0]).canvas[0], torch.from_numpy(data[0]).transpose(1, 2))


def test_voc(tmp_path):
    base = tmp_path / "VOCdevkit/VOC2012"
    mask = np.zeros((48, 64), np.uint8)
    mask[12:24, 16:32], mask[24:36, 16:32] = 15, 255
    drawn = Image.fromarray(mask)
    drawn.putpalette([k // 3 for k in range(768)])
    for k, name in enumerate(("2007_b", "2007_a", "2007_c")):
        save(photo(seed=k), base / f"JPEGImages/{name}.jpg")
        save(drawn, base / f"SegmentationClass/{name}.png")
    (base / "ImageSets/Segmentation").mkdir(parents=True)
    (base / "ImageSets/Segmentation/train.txt").write_text("2007_b\n2007_a\n")
    (base / "ImageSets/Segmentation/val.txt").write_text("2007_c\n")
    train, val = (common.open_images(f"VOCSegmentation:{tmp_path}", SIDE, split) for split in ("train", "val"))
    assert len(train) == 2 and len(val) == 1 and train.has_masks and train.labels.tolist() == [-1, -1]
    assert name_of(train, 0).endswith("2007_a.jpg")                            # sorted
    assert train.__getitems__([0]).mask.unique().tolist() == [0, 15, 255]
    assert torch.allclose(train.boxes(0), torch.tensor([[0.25, 0.25, 0.5, 0.5]]))


def test_pets_and_aircraft_use_trainval_and_test(tmp_path, capsys):
    trimap = np.full((48, 64), 2, np.uint8)
    trimap[10:30, 10:30], trimap[12:28, 12:28] = 3, 1
    root = tmp_path / "oxford-iiit-pet"
    for name in ("Abyssinian_1", "beagle_1"):
        save(photo(), root / f"images/{name}.jpg")
        save(Image.fromarray(trimap), root / f"annotations/trimaps/{name}.png")
    (root / "annotations/trainval.txt").write_text("Abyssinian_1 1 1 1\nbeagle_1 2 2 1\n")
    (root / "annotations/test.txt").write_text("beagle_1 2 2 1\n")
    pets, val = (common.open_images(f"OxfordIIITPet:{tmp_path}", 48, split) for split in ("train", "val"))
    assert pets.labels.tolist() == [0, 1] and len(val) == 1 and pets.classes == ["Abyssinian", "Beagle"]
    assert pets.__getitems__([0]).mask.unique().tolist() == [0, 1, 255]    # ground, pet, its edge
    root = tmp_path / "fgvc-aircraft-2013b/data"
    for name in ("1", "2"):
        save(photo(), root / f"images/{name}.jpg")
    (root / "variants.txt").write_text("A\nB\n")
    for split, lines in (("train", "2 B"), ("val", "1 A"), ("trainval", "2 B\n1 A"), ("test", "1 A")):
        (root / f"images_variant_{split}.txt").write_text(lines + "\n")
    planes, val = (common.open_images(f"FGVCAircraft:{tmp_path}", SIDE, split) for split in ("train", "val"))
    assert planes.labels.tolist() == [0, 1] and val.labels.tolist() == [0] and planes.classes == ["A", "B"]
    (root / "images_variant_test.txt").unlink()
    assert common.open_images(f"FGVCAircraft:{tmp_path}", SIDE, "val") is None
    assert "FGVCAircraft: no test images" in capsys.readouterr().err
    (root / "images_variant_trainval.txt").unlink()  # there is a train, but published figures learn from more
    with pytest.raises(common.UserError, match="images_variant_trainval"):
        common.open_images(f"FGVCAircraft:{tmp_path}", SIDE)


@pytest.mark.parametrize("name", ["Flowers102", "DTD"])
def test_flowers_and_textures_are_tested_on_test(tmp_path, monkeypatch, name):
    asked = []

    class Known:
        def __init__(self, root, split="train", download=False):
            asked.append(split)
            if split not in ("train", "val", "test"):
                raise ValueError(f"Unknown value '{split}' for argument split.")
            self._image_files, self._labels = [str(tmp_path / f"{split}{k}.png") for k in range(2)], [0, 1]

        def __len__(self):
            return 2
    for split in ("train", "val", "test"):
        for k in range(2):
            save(photo(seed=k), tmp_path / f"{split}{k}.png")
    monkeypatch.setattr(common.torchvision.datasets, name, Known)
    train, test = (common.open_images(f"{name}:{tmp_path}", SIDE, split) for split in ("train", "val"))
    assert asked == ["train", "test"]
    assert name_of(train, 0) == "train0.png" and name_of(test, 0) == "test0.png"


def test_inaturalist_is_sorted(tmp_path):
    for version, names in (("2021_train", "cab"), ("2021_valid", "x")):
        for name in names:
            save(photo(), tmp_path / version / "00000_Animalia_a_b_c_d_e_f" / f"{name}.jpg")
    train, val = (common.open_images(f"INaturalist:{tmp_path}", SIDE, split) for split in ("train", "val"))
    assert [name_of(train, k) for k in range(3)] == ["a.jpg", "b.jpg", "c.jpg"]
    assert len(val) == 1 and train.labels.tolist() == [0, 0, 0]


# ---- scenes ------------------------------------------------------------------------------------------------------
def test_scenes_are_drawn_once_and_shared_with_workers(monkeypatch):
    images = common.open_images("scenes:24", SIDE)
    expected = common.scenes(list(range(24)), SIDE)
    got = all_of(images, workers=2)
    assert torch.equal(got.canvas, expected[0]) and torch.equal(got.mask, expected[1])
    assert torch.equal(got.label, expected[2]) and (got.size == SIDE).all() and images.has_masks
    monkeypatch.setattr("data.scenes" if "data" in common.Images.__module__ else "common.scenes",
                        lambda *a: pytest.fail("drawn again"))
    assert same(all_of(images), got) and torch.equal(images.labels, expected[2])     # what workers drew is here
    boxes = expected[3][5]
    monkeypatch.undo()
    assert torch.equal(images.boxes(5), boxes[~boxes.isnan().any(1)])


def test_kinds_of_scenes():
    val = common.open_images("", SIDE, "val")
    assert len(common.open_images("", SIDE)) == 10_000 and len(val) == 1000
    assert torch.equal(val.__getitems__([3]).canvas, common.scenes([2 ** 31 + 3], SIDE)[0])
    fine = common.open_images("scenes-fine:6", SIDE)
    assert torch.equal(all_of(fine).canvas, common.scenes(list(range(6)), SIDE, True)[0])
    prints = [common.open_images(s, SIDE).fingerprint for s in ("scenes:6", "scenes:7", "scenes-fine:6")]
    assert len(set(prints)) == 3
    huge = common.open_images("scenes:100000", 256)                        # would take 26 GB: drawn anew each time
    assert torch.equal(huge.__getitems__([77]).canvas, common.scenes([77], 256)[0])


# ---- order -------------------------------------------------------------------------------------------------------
def steps(images, **options):
    defaults = {"batch_size": 8, "seed": 3, "start": 0, "stop": 7}
    return list(common.batches(images, **defaults | options))


def test_order_depends_on_seed_and_global_batch_alone(tmp_path):
    images = common.open_images(str(tree(tmp_path, each=10)), SIDE)        # 20 images: 2 steps an epoch, 4 left over
    whole = steps(images)
    for workers in (0, 2):
        ranks = [steps(images, rank=r, world=2, workers=workers) for r in (0, 1)]
        for one, *parts in zip(whole, *ranks):
            assert all(torch.equal(getattr(one, f), torch.cat([getattr(p, f) for p in parts]))
                       for f in ("canvas", "size", "label", "mask", "index"))
    assert all(same(a, b) for a, b in zip(whole[3:], steps(images, start=3, workers=1)))
    epochs = [torch.cat([b.index for b in whole[k:k + 2]]).tolist() for k in (0, 2, 4)]
    assert all(len(set(e)) == 16 for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert steps(images, seed=4)[0].index.tolist() != whole[0].index.tolist()
    assert all(b.label.tolist() == images.labels[b.index].tolist() for b in whole)


def test_processes_with_different_data_are_told_so(tmp_path, monkeypatch):
    """A copy of the data that was cut short on one of the nodes: they would train on, each on its own permutation."""
    images = common.open_images(str(tree(tmp_path)), SIDE)

    def gathered(found, mine):
        found[:] = [mine, (mine[0], other)]
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 0)):
        monkeypatch.setattr(common.dist, name, lambda value=value: value)
    monkeypatch.setattr(common.dist, "all_gather_object", gathered)
    other = images.fingerprint
    assert len(steps(images, batch_size=4, stop=1, world=2)[0].index) == 2
    other = "another"
    with pytest.raises(common.UserError, match="different images"):
        steps(images, batch_size=4, stop=1, world=2)


def test_the_global_generator_is_left_alone(tmp_path):
    images = common.open_images(str(tree(tmp_path)), SIDE)
    state = torch.get_rng_state()
    for workers in (0, 1):
        steps(images, workers=workers, stop=2)
    assert torch.equal(state, torch.get_rng_state())


def test_knn_split(tmp_path):
    root = tree(tmp_path, each=10)
    train, val = (common.open_images(str(root), SIDE, split) for split in ("train", "val"))
    bank, held, queries = common.knn_split(train, val, bank=15, queries=6)
    assert held is val and len(set(bank)) == 15 and len(set(queries)) == 6
    assert (bank, queries) == common.knn_split(train, val, bank=15, queries=6)[::2]
    assert bank != common.knn_split(train, val, seed=1, bank=15, queries=6)[0]
    bank, held, queries = common.knn_split(train, None)
    assert held is train and len(bank) == 18 and len(queries) == 2 and not set(bank) & set(queries)


def test_knn_where_a_layout_misleads(tmp_path):
    """Tiny-ImageNet's val/ holds one folder of all images: no query of it could ever be right. And folders that are no
    classes: 100 % whatever the network."""
    net = common.backbone("small").double()
    for c in range(2):
        for k in range(10):
            save(photo(seed=100 * c), tmp_path / f"tiny/train/n0{c}/{k}.png")
            save(photo(seed=k), tmp_path / f"coco/images/train2017/{c}{k}.png")
    save(photo(seed=99), tmp_path / "tiny/val/images/0.png")
    train, val = (common.open_images(str(tmp_path / "tiny"), SIDE, split) for split in ("train", "val"))
    split = common.knn_split(train, val)
    assert split[1] is train and not set(split[0]) & set(split[2])
    assert common.knn_probe(net, train, split, 32, "cpu", None, 1)["knn"] == 100  # one picture a class
    (tmp_path / "coco/annotations").mkdir()
    train = common.open_images(str(tmp_path / "coco"), SIDE)
    assert common.knn_probe(net, train, common.knn_split(train, None), 32, "cpu", None) == {}


def test_a_killed_worker_ends_in_a_clear_error(tmp_path):
    images = common.open_images(str(tree(tmp_path)), SIDE)
    stream = common.batches(images, batch_size=2, seed=0, start=0, stop=10 ** 6, workers=1)
    next(stream)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(common.UserError, match="a data worker died.*--workers"):
        for _ in stream:
            pass


def test_no_open_files_are_left(tmp_path):
    images = common.open_images(str(tree(tmp_path)), SIDE)
    counts = []
    for _ in range(4):
        for batch in common.batches(images, batch_size=2, seed=0, start=0, stop=60, workers=2):
            counts.append(len(os.listdir("/proc/self/fd")))
    del batch
    assert max(counts) < min(counts) + 60
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= min(counts)


# ---- the cache ---------------------------------------------------------------------------------------------------
def test_cache_equals_files_bit_for_bit(tmp_path):
    root = broken_tree(tmp_path / "data")
    files = all_of(common.open_images(str(root), SIDE))
    for _ in range(2):                                                     # packed, then found
        cached = common.open_images(str(root), SIDE, cache=str(tmp_path / "c.bin"))
        assert same(all_of(cached), files) and same(all_of(cached, workers=2), files)
    assert sorted(os.listdir(tmp_path)) == ["c.bin", "data"]


def test_cache_of_scenes_and_of_masks(tmp_path, monkeypatch):
    for split in ("train", "val"):
        images = common.open_images("scenes:20", SIDE, split, cache=str(tmp_path / "c.bin"))
        expected = common.scenes([2 ** 31 * (split == "val") + k for k in range(20)], SIDE)
        got = images.__getitems__(list(range(20)))
        assert all(torch.equal(a, b) for a, b in zip((got.canvas, got.mask, got.label), expected))
        assert torch.equal(images.labels[:20], expected[2])
    assert sorted(os.listdir(tmp_path)) == ["c.bin", "c.val.bin"]


def test_cache_of_other_data_is_refused(tmp_path):
    root, cache = tree(tmp_path / "data"), str(tmp_path / "c")
    common.open_images(str(root), SIDE, cache=cache)
    with pytest.raises(common.UserError, match="canvas 32.*canvas 48.*delete"):
        common.open_images(str(root), 48, cache=cache)
    save(photo(seed=99), root / "train/ant/0.jpg")
    with pytest.raises(common.UserError, match="fingerprint.*delete"):
        common.open_images(str(root), SIDE, cache=cache)
    (root / "train/ant/0.jpg").unlink()
    with pytest.raises(common.UserError, match="images 8.*images 7"):
        common.open_images(str(root), SIDE, cache=cache)
    for other in ("something else", '{"a": 1}\n{"b": 2}', '{"a": 1}'):
        (tmp_path / "c").write_text(other)
        with pytest.raises(common.UserError, match="version None.*delete this one if it is a cache"):
            common.open_images(str(root), SIDE, cache=cache)
    for damaged in (b'{"version": [}', b'{"version": "\xff"}'):
        (tmp_path / "c").write_bytes(damaged)
        with pytest.raises(common.UserError, match=f"{tmp_path / 'c'}: .*check"):
            common.open_images(str(root), SIDE, cache=cache)
    with pytest.raises(common.UserError, match="nowhere"):
        common.open_images(str(root), SIDE, cache=str(tmp_path / "nowhere/c"))


def test_cache_cut_short_or_left_half_written(tmp_path):
    root, cache = tree(tmp_path / "data"), tmp_path / "c"
    (tmp_path / "c.tmp").write_bytes(b"left by a process that was killed" * 2 ** 20)  # longer than what is packed now
    expected = all_of(common.open_images(str(root), SIDE))
    assert same(all_of(common.open_images(str(root), SIDE, cache=str(cache))), expected)
    cache.write_bytes(cache.read_bytes()[:-100])
    with pytest.raises(common.UserError, match="bytes.*delete"):
        common.open_images(str(root), SIDE, cache=str(cache))


def test_labels_without_names_of_classes(tmp_path):
    """torchvision's GTSRB, SVHN and others have no attribute `classes`: the numbers are the names."""
    for c in (0, 2):
        save(photo(24, 24), tmp_path / f"gtsrb/GTSRB/Training/{c:05d}/0.ppm")
    images = common.open_images(f"GTSRB:{tmp_path}", 16)
    assert images.classes == ["0", "1"] and images.labels.tolist() == [0, 1]


def test_too_many_unreadable_images_stop_the_packing(tmp_path):
    for k in range(20):
        save(photo(seed=k), tmp_path / f"data/{k}.jpg") if k > 6 else None
    for k in range(7):
        (tmp_path / f"data/{k}.jpg").write_text("x")
    with pytest.raises(common.UserError, match="cannot be read"):
        common.open_images(str(tmp_path / "data"), SIDE, cache=str(tmp_path / "c"))
    assert not (tmp_path / "c").exists() and (tmp_path / "c.tmp").stat().st_size == 0


def test_what_is_unreadable_fits_the_head_of_a_cache(tmp_path, monkeypatch):
    """Thousands of long reasons would lie over the first images: they are cut."""
    monkeypatch.setattr(common, "HEADER", 1024)
    root = tree(tmp_path / ("data" + 100 * "x"), each=40, splits=("",))
    broken = sorted(root.rglob("*.jpg"))[1:9:2]
    for path in broken:
        path.write_text("")
    images = common.open_images(str(root), SIDE, cache=str(tmp_path / "c"))
    plain = common.open_images(str(root), SIDE)
    assert list(images.broken) == [1, 3, 5, 7] and max(map(len, images.broken.values())) < 30
    again = common.open_images(str(root), SIDE, cache=str(tmp_path / "c"))
    assert again.broken == images.broken
    for cached in (images, again):
        assert same(all_of(cached)._replace(unreadable=0), all_of(plain)._replace(unreadable=0))


def test_full_disk_while_packing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(common.UserError, match="No space left"):
        common.open_images(str(tree(tmp_path / "data")), SIDE, cache=str(tmp_path / "c"))
    assert not (tmp_path / "c").exists() and (tmp_path / "c.tmp").stat().st_size == 0


def pack_and_report(arguments):
    root, cache = arguments
    images = common.open_images(root, SIDE, cache=cache)
    return int(images.__getitems__(list(range(len(images)))).canvas.sum())


def test_processes_that_pack_at_once(tmp_path):
    root, cache = str(tree(tmp_path / "data", each=8)), str(tmp_path / "c")
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork"), torch.set_num_threads, (1,)) as pool:
        sums = list(pool.map(pack_and_report, [(root, cache)] * 2))
    assert len(set(sums)) == 1 and sums[0] > 0 and sorted(os.listdir(tmp_path)) == ["c", "data"]


# ---- a user's mistakes -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spec, words", [
    ("nowhere", "no folder 'nowhere'.*--data takes"), ("STL11:.", "STL10"), ("STL10:.", "STL10 cannot be opened"),
    ("VOCSegmentation:.", "VOCSegmentation cannot be opened"), ("FakeData:.", "Name:root"),
    ("VisionDataset:.", "Name:root"), ("EMNIST:.", "no such split"),
    ("CocoDetection:.", "annFile"), ("scenes:0", "no image"), ("scenes:many", "torchvision has no data set 'scenes'"),
    (",", "no folder ''"), ("empty", "no images.*notes.txt"), ("notes", "notes"), ("damaged", "do not fit together")])
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, spec, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("")
    (tmp_path / "notes").write_text("")
    (tmp_path / "damaged").mkdir()
    for table in ("images", "image_class_labels", "train_test_split"):
        (tmp_path / f"damaged/{table}.txt").write_text(f"{table} 1\n")
    with pytest.raises(common.UserError, match=words) as caught:
        common.open_images(spec, SIDE)
    assert "\n" not in str(caught.value)


def test_batches_larger_than_the_data_or_not_divisible(tmp_path):
    images = common.open_images(str(tree(tmp_path)), SIDE)
    for options in ({"batch_size": 9}, {"batch_size": 6, "world": 4}):
        with pytest.raises(common.UserError, match="--batch-size"):
            steps(images, **options)


def test_a_masks_cell_has_the_value_at_its_centre():
    i = np.arange(12, dtype=np.uint8)
    found = common.squeeze_mask(Image.fromarray(12 * i[:, None] + i), 4)  # cells of three pixels
    assert found[0].tolist() == [[12 * y + x for x in (1, 4, 7, 10)] for y in (1, 4, 7, 10)]


def test_a_process_that_has_waited_takes_what_the_other_packed(tmp_path, monkeypatch):
    root, done, cache = str(tree(tmp_path / "data")), tmp_path / "done", tmp_path / "c"
    common.open_images(root, SIDE, cache=str(done))
    monkeypatch.setattr(common.fcntl, "flock", lambda file, how: shutil.copy(done, cache))  # while this one waits
    monkeypatch.setattr(common.Images, "_fill", lambda *a: pytest.fail("packed again"))
    common.open_images(root, SIDE, cache=str(cache))
    assert cache.read_bytes() == done.read_bytes()


def test_workers_leave_signals_to_the_loop(tmp_path):
    """A terminal and a cluster send them to the whole group; the loop saves first."""
    images = common.open_images(str(tree(tmp_path)), SIDE)
    stream = common.batches(images, batch_size=2, seed=0, start=0, stop=60, workers=1)
    next(stream)
    worker, = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker.pid, number)
    assert len(list(stream)) == 59


def test_knn_asks_labelled_images_alone(tmp_path):
    images = common.open_images(str(tree(tmp_path, each=10, splits=("",))), SIDE)
    images.labels[::2] = -1
    bank, _, queries = common.knn_split(images, None)
    assert sorted(bank + queries) == list(range(1, 20, 2))


def test_fingerprint_follows_labels(tmp_path):
    names = [str(tree(tmp_path) / f"train/ant/{k}.jpg") for k in range(2)]
    first, second = (common.listed("", names, labels, ["a", "b"]).digest for labels in ([0, 1], [1, 0]))
    assert first != second


@pytest.mark.parametrize("cells, shades", [
    ([[0, 78], [156, 255]], [[0, 78], [156, 255]]), ([[0, 20000], [40000, 65535]], [[0, 78], [156, 255]]),
    ([[0, .25], [float("nan"), 1]], [[0, 64], [0, 255]])])
def test_float_grey(tmp_path, cells, shades):
    save(large(cells, np.float32), tmp_path / "a.tif")
    assert (corners(read(tmp_path)[0]) - torch.tensor(shades)[..., None]).abs().max() <= 4
