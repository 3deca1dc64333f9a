"""The four methods beside their controls: a command a row, the same network, data, images seen and evaluation.

  python tests/evidence.py                                  trains and evaluates what is missing, then writes the results
  python tests/evidence.py --seeds 0 --rows SlotCon random  a part of it first; what is done is kept
  python tests/evidence.py --jobs 0                         the table and the figure of what there is, nothing trained

Runs go to runs/evidence (--out), results to tests/results/evidence.jsonl, .md and .png; what is there of other rows, seeds
and columns stays (--results FOLDER: a table of your own). Every row keeps its method's demo recipe and changes its own
flags alone: recipes were sought for the methods, and their controls take them as they are. The random network is each
seed's, with the framework's usual initialisation (SlotCon and CVSA start from zeroed residual branches: their curves begin
elsewhere); the supervised one is trained on all labels for as many images as the others see.
"""
import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torchvision

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "results"
ROWS = {  # data, script, its flags; in the order of the table
    "random": ("scenes", None, ""),
    "supervised": ("scenes", "eval_linear.py", ""),
    "SlotCon": ("scenes", "slotcon.py", ""),
    "SlotCon, grouping only": ("scenes", "slotcon.py", "--group-weight 1"),
    "SlotCon, slots only": ("scenes", "slotcon.py", "--group-weight 0"),
    "SCFS": ("scenes", "scfs.py", ""),
    "SCFS, uniform gate": ("scenes", "scfs.py", "--search uniform"),
    "SCFS, stage-global terms only": ("scenes", "scfs.py", "--search off"),
    "DINO": ("scenes", "scfs.py", "--stages ''"),
    "saliency (A3)": ("scenes", "saliency_cl.py", ""),
    "saliency, B1: random crops, no weights": ("scenes", "saliency_cl.py", "--saliency none"),
    "saliency, A1: salient crops, no weights": ("scenes", "saliency_cl.py", "--no-weight-saliency"),
    "saliency, A2: random crops, weights": ("scenes", "saliency_cl.py", "--no-crop-saliency"),
    "saliency, C1: another image's map": ("scenes", "saliency_cl.py", "--saliency shuffled"),
    "saliency, C2: inverted": ("scenes", "saliency_cl.py", "--saliency inverted"),
    "saliency, C3: true masks": ("scenes", "saliency_cl.py", "--saliency truth"),
    "saliency, BYOL loss": ("scenes", "saliency_cl.py", "--loss byol"),
    "saliency, BYOL loss, B1": ("scenes", "saliency_cl.py", "--loss byol --saliency none"),
    "random, fine": ("scenes-fine", None, ""),
    "supervised, fine": ("scenes-fine", "eval_linear.py", ""),
    "CVSA": ("scenes-fine", "cvsa.py", ""),
    "BYOL": ("scenes-fine", "cvsa.py", "--swap-prob 0 --align-weight 0"),
    "BYOL + mask-aware crops": ("scenes-fine", "cvsa.py", "--swap-prob 0 --align-weight 0 --mask-crop on"),
    # swaps and alignment bring mask-aware crops with them: the row above is what they are added to
    "BYOL + swap": ("scenes-fine", "cvsa.py", "--align-weight 0"),
    "BYOL + alignment": ("scenes-fine", "cvsa.py", "--swap-prob 0"),
    "CVSA, true masks": ("scenes-fine", "cvsa.py", "--masks truth"),
}
EPOCHS = {"scenes": 3.0, "scenes-fine": 4.0}  # of 10,000 images, as the demos that are made for them
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)  # few labels: of the backbone; the best on the test images counts, for every row alike
PROTOCOLS = {  # the column: flags, the measure, the data it is for; few labels: more epochs, 180 and 140 steps
    "kNN": ("--protocol knn", "top1_k20", ""),
    "linear": ("--protocol linear", "top1", ""),
    "1 % labels": ("--protocol finetune --label-fraction 0.01 --batch-size 32 --epochs 60", "top1", ""),
    "10 % labels": ("--protocol finetune --label-fraction 0.1 --epochs 20", "top1", ""),
    "segment": ("--protocol segment", "miou", ""),
    "clusters": ("--protocol segment --unsupervised", "miou", ""),
    "CorLoc": ("--protocol localize", "corloc", ""),
    "mAP": ("--protocol retrieval", "map", "scenes-fine"),
}


def commands(row, seed, out, epochs, protocols):
    """-> the row's training command (None: there is none), and a function to its evaluations: a column's commands."""
    data, script, flags = ROWS[row]
    own = out / f"{row.replace(' ', '-').replace(',', '').replace(':', '')}-{seed}"
    train = script and ["python", script, "--data", data, *shlex.split(flags), "--epochs", str(epochs), "--seed", str(seed),
                        "--out", str(own)]
    if script == "eval_linear.py":
        train += ["--protocol", "finetune", "--weights", "random", "--preset", "demo"]
    elif script:
        train += ["--preset", "demo", "--knn-every", "0.5"]

    def evaluations():
        weights = "random" if not script else str(next(iter(own.glob("finetune-*-backbone.pth")), own / "backbone.pth"))
        return {name: [["python", "eval_linear.py", *shlex.split(flags), *rate, "--weights", weights, "--data", data,
                        "--preset", "demo", "--seed", str(seed), "--out", str(own / "eval")]
                       for rate in ([["--lr", str(lr)] for lr in RATES] if "--label-fraction" in flags else [[]])]
                for name, (flags, _, only) in PROTOCOLS.items() if name in protocols and only in ("", data)}
    return own, train, evaluations


def call(command, threads):
    """Runs a command of a row. -> what it printed; the last line of an evaluation is its JSON"""
    done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                          capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stderr}")
    return done.stdout


def work(row, seed, args, threads):
    """Trains and evaluates one row with one seed, as far as that was not done. -> lines for evidence.jsonl"""
    epochs = args.epochs or EPOCHS[ROWS[row][0]]
    own, train, evaluations = commands(row, seed, args.out, epochs, args.protocols)
    own.mkdir(parents=True, exist_ok=True)
    done = own / "evidence.json"
    lines = {line["column"]: line for line in (json.loads(done.read_text()) if done.exists() else [])}
    if train and not lines:
        call(train, threads)
    log = (own / "log.jsonl").read_text().splitlines() if (own / "log.jsonl").exists() else []
    curve = [(line["epoch"], line["knn"]) for line in map(json.loads, log) if "knn" in line]
    for column, sweep in evaluations().items():
        if column not in lines:
            measure = PROTOCOLS[column][1]
            tried = [json.loads(call(command, threads).splitlines()[-1]) for command in sweep]
            command, found = max(zip(sweep, tried), key=lambda pair: pair[1][measure])
            lines[column] = {"row": row, "data": ROWS[row][0], "column": column, "value": found[measure],
                             "seed": seed, "epochs": epochs, "train": train and shlex.join(train), "knn_curve": curve,
                             "eval": shlex.join(command), "tried": [one[measure] for one in tried], "found": found}
            done.write_text(json.dumps(list(lines.values())))
            print(f"{row}, seed {seed}, {column}: {lines[column]['value']:.1f}", flush=True)
    return list(lines.values())


def with_earlier(lines, path):
    """Adds to the lines what an earlier table has besides, but of the same row and seed only what is of the same network."""
    earlier = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    new = {(line["row"], line["seed"]): line["found"]["weights_sha256"] for line in lines}
    have = {(line["row"], line["seed"], line["column"]) for line in lines}
    return lines + [line for line in earlier if line["row"] in ROWS and line["column"] in PROTOCOLS
                    and (line["row"], line["seed"], line["column"]) not in have
                    and new.get((line["row"], line["seed"])) in (None, line["found"]["weights_sha256"])]


def spread(found):
    """{seed: figure} -> mean and sample deviation as text; of less than three the figures and their seeds."""
    if len(found) > 2:
        return f"{statistics.mean(found.values()):.1f} ± {statistics.stdev(found.values()):.1f}"
    return ", ".join(f"{found[seed]:.1f} (seed {seed})" for seed in sorted(found))


def write_table(lines, path):
    seeds = sorted({line["seed"] for line in lines})
    machine = f"{platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}, torchvision {torchvision.__version__}"
    how = (f"`python tests/evidence.py`; seeds {', '.join(map(str, seeds))}; every trained row has seen 10,000 images as many "
           f"times as the table says; mean ± sample deviation, without ± the figures of single seeds; BYOL + swap and "
           f"BYOL + alignment have mask-aware crops, too; {machine}.")
    text = [how]
    for data in ("scenes", "scenes-fine"):
        here = [line for line in lines if line["data"] == data]
        columns = [c for c in PROTOCOLS if any(line["column"] == c for line in here)]
        epochs = ", ".join(sorted({f"{line['epochs']:g} epochs" for line in here if line["train"]}))
        text += ["", f"| `{data}`, {epochs} | number of seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
        for row in ROWS:
            mine = [line for line in here if line["row"] == row]
            if mine:
                cells = [{line["seed"]: line["value"] for line in mine if line["column"] == c} for c in columns]
                text.append(f"| {row} | {len({line['seed'] for line in mine})} | "
                            + " | ".join(map(spread, cells)) + " |")
    path.write_text("\n".join(text) + "\n")


def together(curves):
    """Lists of (epoch, figure) -> the epochs that all of them have, and each one's figures."""
    known = [{round(epoch, 3): figure for epoch, figure in curve} for curve in curves]
    x = sorted(set.intersection(*map(set, known)))
    return x, [[curve[epoch] for curve in known] for epoch in x]


def draw_curves(lines, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    scripts = {"slotcon.py": "SlotCon", "scfs.py": "SCFS", "saliency_cl.py": "saliency", "cvsa.py": "CVSA"}
    figure, axes = plt.subplots(1, 4, figsize=(16, 5), sharey=True)
    for axis, (script, title) in zip(axes, scripts.items()):
        for row, (data, own, _) in ROWS.items():
            curves = {line["seed"]: line["knn_curve"] for line in lines if line["row"] == row and line["knn_curve"]}
            if own == script and curves:
                x, values = together(curves.values())
                mean = [statistics.mean(v) for v in values]
                line, = axis.plot(x, mean, label=f"{row}, seed{'s' * (len(curves) > 1)} {', '.join(map(str, sorted(curves)))}")
                if len(curves) > 1:
                    half = [statistics.stdev(v) for v in values]
                    low, high = ([m + sign * h for m, h in zip(mean, half)] for sign in (-1, 1))
                    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            if data == ("scenes-fine" if script == "cvsa.py" else "scenes") and own is None:
                start = {line["seed"]: line["value"] for line in lines if line["row"] == row and line["column"] == "kNN"}
                for i, value in enumerate(start.values()):
                    axis.axhline(value, color="grey", linestyle=":", label="_" * (i > 0) + f"{row}: a line a seed")
        axis.set(title=title, xlabel="epochs")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))  # below: no curve is hidden
    axes[0].set_ylabel("kNN top-1, %")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    p.add_argument("--epochs", type=float, default=0.0, help=f"0: {EPOCHS}")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows at a time; 0: only write what there is")
    p.add_argument("--out", type=Path, default=Path("runs/evidence"), help="in the clone, unless absolute")
    p.add_argument("--results", type=Path, default=RESULTS)
    args = p.parse_args()
    os.chdir(ROOT)  # paths in the results are those of a clone
    if args.jobs:  # seed by seed, so that an early end leaves whole tables
        with ThreadPoolExecutor(args.jobs) as pool:
            for _ in pool.map(lambda job: work(*job, args, max(1, os.cpu_count() // args.jobs)),
                              [(row, seed) for seed in args.seeds for row in args.rows]):
                pass
    lines = [line for path in sorted(args.out.glob("*/evidence.json")) for line in json.loads(path.read_text())]
    lines = with_earlier(lines, args.results / "evidence.jsonl")
    lines.sort(key=lambda line: (list(ROWS).index(line["row"]), line["seed"], list(PROTOCOLS).index(line["column"])))
    (args.results / "evidence.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_table(lines, args.results / "evidence.md")
    draw_curves(lines, args.results / "evidence.png")
    print((args.results / "evidence.md").read_text())


if __name__ == "__main__":
    main()
