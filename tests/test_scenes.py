"""The embedded scenes: what an index decides, masks against boxes against labels, and what cheap classifiers see."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common

TEST = 2 ** 31
both = pytest.mark.parametrize("fine", [False, True])


@both
def test_an_index_alone_decides(fine):
    indices = [TEST + 5, 3, 70, 0, TEST, 9_999, 12, 3] + list(range(100, 140))
    together = common.scenes(indices, 48, fine)
    order = np.random.default_rng(0).permutation(len(indices)).tolist()
    shuffled = common.scenes([indices[i] for i in order], 48, fine)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [common.scenes([i], 48, fine) for i in indices]
    torch.set_num_threads(threads)
    for k, whole in enumerate(together):
        assert torch.equal(whole[order].nan_to_num(-1), shuffled[k].nan_to_num(-1))
        assert torch.equal(whole.nan_to_num(-1), torch.cat([one[k] for one in alone]).nan_to_num(-1))
        assert torch.equal(whole[1].nan_to_num(-1), whole[7].nan_to_num(-1))


@both
def test_types_and_ranges(fine):
    images, masks, labels, boxes = common.scenes(range(200), 64, fine)
    assert images.shape == (200, 3, 64, 64) and images.dtype == torch.uint8
    assert masks.shape == (200, 1, 64, 64) and masks.dtype == torch.uint8 and masks.max() <= common.SCENE_CLASSES
    assert labels.shape == (200,) and labels.dtype == torch.int64 and labels.min() >= 0
    assert boxes.dtype == torch.float32 and boxes.shape[::2] == (200, 4)
    seen = boxes[~boxes.isnan().any(2)]
    assert (seen >= 0).all() and (seen <= 1).all() and (seen[:, 2:] > seen[:, :2]).all()
    assert boxes.isnan().any(2).equal(boxes.isnan().all(2)), "a row is a whole box or all NaN"
    assert images.float().std((1, 2, 3)).min() > 10 and 80 < images.float().mean() < 180


@both
def test_the_same_scene_at_every_size(fine):
    small, large = (common.scenes(range(40), size, fine) for size in (96, 192))
    halved = F.avg_pool2d(large[0].float(), 2)
    assert (halved - small[0]).abs().mean() < 3
    assert (halved - small[0]).abs().mean((1, 2, 3)).max() < 6
    assert (halved - small[0].roll(1, 0)).abs().mean() > 20, "another scene is far off"
    assert torch.equal(small[2], large[2])
    assert (large[1][:, :, ::2, ::2] == small[1]).float().mean() > 0.97
    both_seen = ~(small[3] + large[3]).isnan()
    assert both_seen.float().mean() > 0.5 * (~large[3].isnan()).float().mean()
    assert ((small[3] - large[3])[both_seen].abs() < 3 / 96).float().mean() > 0.97


@both
def test_masks_boxes_and_labels_agree(fine):
    size = 96
    _images, masks, labels, boxes = common.scenes(range(TEST, TEST + 200), size, fine)
    for mask, label, rows in zip(masks[:, 0], labels.tolist(), boxes):
        rows = rows[~rows.isnan().any(1)]
        # the union of the boxes is the tight box of all that is not background
        y, x = mask.nonzero().unbind(1)
        tight = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1]) / size
        assert torch.allclose(torch.cat([rows[:, :2].amin(0), rows[:, 2:].amax(0)]), tight, atol=1e-6)
        # row 0 is the labelled object: its box holds its class, and each side of the box touches some object
        x0, y0, x1, y1 = (rows[0] * size).round().int().tolist()
        inside = mask[y0:y1, x0:x1]
        assert all((edge > 0).any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
        own = (inside == label + 1).sum().item()
        assert own > 0.035 * size ** 2, "most of the main object is visible"
    for mask, label in zip(masks, labels.tolist()):
        assert mask.unique().tolist() == [0, label + 1], "objects of one class, and some background"
    objects = (~boxes.isnan().any(2)).sum(1)
    if fine:
        assert boxes.shape[1] == 1 and objects.eq(1).all()
    else:                                   # the main one, and four that are there in 85 % of the images
        assert objects.min() >= 1 and objects.max() == 5 and 4.2 < objects.float().mean() < 4.6


def test_light_comes_from_every_side():
    """The backgrounds' brightness over the picture: uneven in each image, even in the mean over the images."""
    images, masks = common.scenes(range(400), 32)[:2]
    ground = torch.where(masks == 0, images.float(), torch.nan).mean(1)
    left, right = (ground[:, :, half].nanmean((1, 2)) for half in (slice(0, 16), slice(16, 32)))
    ratio = (left / right).log()
    assert ratio.std() > 0.2 and ratio.mean().abs() < 0.05
    assert ground.nanmean((1, 2)).std() / ground.nanmean() > 0.15, "some are dark, some are light"


def test_the_mask_is_where_the_objects_are():
    # Along the outline the picture changes more than elsewhere: an outline moved away by eight pixels shows it.
    images, masks = common.scenes(range(100), 96)[:2]
    step = images.float().diff(dim=3).abs().mean(1)
    edge = masks[:, 0].diff(dim=2) != 0
    assert step[edge].mean() > 1.5 * step[edge.roll(8, 1) & ~edge].mean()


@both
def test_classes_are_balanced_and_test_scenes_are_others(fine):
    labels, held_out = (common.scenes(range(start, start + 1200), 16, fine)[2] for start in (0, TEST))
    for some in (labels, held_out):         # 100 expected, standard deviation 9.6
        counts = some.bincount(minlength=common.SCENE_CLASSES)
        assert len(counts) == 12 and counts.min() > 62 and counts.max() < 140
    assert (labels == held_out).float().mean() < 0.15
    train, test, fine_or_not = (common.scenes(range(start, start + 64), 32, kind)[0].flatten(1).float()
                                for start, kind in ((0, fine), (TEST, fine), (0, not fine)))
    assert torch.cdist(train, test).min() > 300 and torch.cdist(train, fine_or_not).min() > 300
    own = torch.cdist(train, train) + 1e9 * torch.eye(64)
    assert own.min() > 300, "no scene twice"


def nearest_neighbours(bank, labels, queries, k=20):
    votes = F.one_hot(labels[torch.cdist(queries, bank).topk(k, largest=False).indices], common.SCENE_CLASSES)
    return votes.sum(1).argmax(1)


@both
def test_colours_and_pixels_say_little(fine):
    (bank, _, labels, _), (queries, _, truth, _) = (common.scenes(range(start, start + n), 64, fine)
                                                    for start, n in ((0, 2000), (TEST, 400)))

    def histogram(images):                  # 4 x 4 x 4 colours, square roots (Hellinger distance)
        cell = (images // 64).long()
        cell = (cell[:, 0] * 16 + cell[:, 1] * 4 + cell[:, 2]).flatten(1)
        return torch.zeros(len(cell), 64).scatter_add_(1, cell, torch.ones(cell.shape)).sqrt()

    def pixels(images):
        return F.avg_pool2d(images.float(), 4).flatten(1)

    for name, view in (("histogram", histogram), ("pixels", pixels)):
        accuracy = (nearest_neighbours(view(bank), labels, view(queries)) == truth).float().mean()
        assert accuracy < 0.4, f"{name}: {accuracy:.1%}"


@both
def test_twelve_classes_differ(fine):
    """In shape or marking, whatever their colour: tail and fins of the fish, shape and texture of the others."""
    distance, tone = common.object_bank(fine).unbind(1)
    inside = distance < 0
    for a in range(12):
        for b in range(a):
            both = inside[a] & inside[b]
            other_shape = (inside[a] ^ inside[b]).float().sum() / both.sum() > 0.02
            other_marks = (tone[a] - tone[b])[both].abs().mean() > 0.1
            assert other_shape if fine and a // 4 == b // 4 else other_shape or other_marks, (a, b)
            assert fine or a % 6 != b % 6 or other_marks, (a, b)


@pytest.mark.parametrize("fine, means, edges", [
    (False, [121.92, 113.5, 106.72], 8.86), (True, [153.02, 130.06, 110.59], 5.89)])
def test_scenes_are_those_of_the_results(fine, means, edges):
    """Other pictures are other data: the tables are to be made anew, and `digest` in open_images needs another version."""
    x = common.scenes(range(64), 64, fine)[0].double()
    assert x.mean((0, 2, 3)).tolist() == pytest.approx(means, abs=0.1)
    assert x.diff(dim=3).abs().mean().item() == pytest.approx(edges, abs=0.05)


def test_how_much_of_an_image_the_fish_is():
    """As the results say: 27.3 % of the pixels; a box around the whole image has IoU 0.5 with 49.4 % of the true ones."""
    shown = common.scenes(range(TEST, TEST + 1000), 96, True)[1][:, 0] > 0
    sides = [1 + i.amax() - i.amin() for mask in shown for i in mask.nonzero().T]
    areas = torch.stack(sides).view(-1, 2).prod(1) / 96 ** 2
    assert 100 * shown.float().mean().item() == pytest.approx(27.3, abs=0.05)
    assert 100 * (areas >= 0.5).float().mean().item() == pytest.approx(49.4, abs=0.05)
