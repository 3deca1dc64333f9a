"""Are the edges of a paste a shortcut for CVSA? A square of another image's ground, pasted beside the object of views
that have seen no swap, should draw no look: the object is elsewhere.

  python tests/edges.py runs/cvsa-demo/checkpoint.pt    the look (4) in the square's cells, with it and without
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import cvsa


def paste_ground(view, shown, side):
    """Into each of the views (N 3 H W) a square of the view before it, where neither has its object (shown: N 1 H W of
    0 and 1), two pixels from the frame at least. -> views, the squares (N 1 H W of 0 and 1), the rows with room for it"""
    view, square, rows, n = view.clone(), torch.zeros_like(shown), [], shown.shape[3] - side + 1
    free = F.unfold(shown.float(), side).amax(1).view(-1, shown.shape[2] - side + 1, n) == 0  # by their upper left corners
    ground = view.clone()
    for i in range(len(view)):
        here, there = free[i, 2:-2, 2:-2].nonzero() + 2, free[i - 1].nonzero()
        if len(here) and len(there):
            (y, x), (v, u) = (places[len(places) // 2].tolist() for places in (here, there))
            view[i, :, y:y + side, x:x + side] = ground[i - 1, :, v:v + side, u:u + side]
            square[i, :, y:y + side, x:x + side] = 1
            rows.append(i)
    return view, square, rows


@torch.no_grad()
def main(path, size=64, side=24):
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = cvsa.Model(**state["shape"]).eval()
    model.load_state_dict(state["model"])
    teacher = model.make_teacher().eval()
    teacher.load_state_dict(state["teacher"])
    view, mask, maps = common.center_views(common.open_images("scenes-fine", 96, "val"), range(1000), size, teacher,
                                           lambda out: out[2])
    cells = F.adaptive_avg_pool2d((mask > 0).to(maps), maps.shape[2:])
    keys = F.normalize(cvsa.object_mean(maps, cells), dim=1)
    pasted, square, rows = paste_ground(view, (mask > 0).to(view), side)
    touched = F.adaptive_avg_pool2d(square, maps.shape[2:])[rows].flatten(1) > 0
    print(f"{len(rows)} images; the square touches {100 * touched.float().mean():.1f} % of the cells, objects have "
          f"{100 * cells[rows].mean():.1f} %")
    for name, x in (("without", view), ("with", pasted)):
        asked = model.dense_predictor(model.student(common.normalize(x[rows]))[2])
        p, _, mass = cvsa.attend(asked, keys[rows], cells[rows], model.tau)
        peaks = touched.gather(1, p.argmax(1)[:, None]).float().mean()
        print(f"{name:8} {100 * (p * touched).sum(1).mean():.1f} % of the look in the square's cells, {100 * peaks:.1f} % of "
              f"its peaks; {100 * mass.mean():.1f} % on the object")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint")
    main(p.parse_args().checkpoint)
