"""The table of evidence: its commands are ones that the scripts take, its figures the mean and spread of its lines."""
import argparse
import importlib
import json
import sys

import evidence
import pytest


def test_every_command_is_one_that_its_script_takes(tmp_path):
    seen = set()
    for row, (data, script, _) in evidence.ROWS.items():
        own, train, evaluations = evidence.commands(row, 1, tmp_path, 2.0, list(evidence.PROTOCOLS))
        own.mkdir()
        assert own not in seen  # no two rows share a folder
        seen.add(own)
        for name in ("backbone.pth", "finetune-0-backbone.pth")[script == "eval_linear.py":]:
            (own / name).touch()
            weights = str(own / name)
        if train:
            args = importlib.import_module(train[1][:-3]).parse_args(train[2:])
            assert (args.data, args.seed, args.epochs, args.arch, args.preset) == (data, 1, 2.0, "small", "demo")
        found = evaluations()
        assert ("mAP" in found) == (data == "scenes-fine") and len(found) == len(evidence.PROTOCOLS) - (data == "scenes")
        assert [len(sweep) for sweep in found.values()] == [len(evidence.RATES) if "labels" in name else 1 for name in found]
        for command in (command for sweep in found.values() for command in sweep):
            args = importlib.import_module("eval_linear").parse_args(command[2:])
            assert (args.data, args.seed, args.preset) == (data, 1, "demo")
            assert args.weights == (weights if script else "random")


def test_control_rows_switch_off_one_thing():
    """A control has its method's command and its own flags, nothing else."""
    plain = {script: row for row, (_, script, flags) in reversed(evidence.ROWS.items()) if script and not flags}
    for row, (_, script, flags) in evidence.ROWS.items():
        if script and flags:
            def words(r):
                own, train, _ = evidence.commands(r, 0, evidence.Path("x"), 2.0, [])
                return [word for word in train if word != str(own)]
            assert words(row) == words(plain[script])[:4] + evidence.shlex.split(flags) + words(plain[script])[4:]


def test_table_and_curves(tmp_path):
    lines = [{"row": row, "data": "scenes", "column": column, "value": value + seed, "seed": seed, "epochs": 2.0, "train": row,
              "knn_curve": [[1.0, value], [2.0, value + seed]]}
             for row, value in (("random", 40.0), ("SlotCon", 50.0)) for column in ("kNN", "linear") for seed in (0, 1, 2)]
    lines += [line | {"row": "CVSA", "data": "scenes-fine"} for line in lines[-1:]]
    evidence.write_table(json.loads(json.dumps(lines)), tmp_path / "t.md")
    text = (tmp_path / "t.md").read_text()
    assert "| `scenes`, 2 epochs | number of seeds | kNN | linear |" in text and "| SlotCon | 3 | 51.0 ± 1.0 | 51.0 ± 1.0 |" in text
    assert evidence.spread({2: 3.0, 0: 1.0}) == "1.0 (seed 0), 3.0 (seed 2)" and "| CVSA | 1 | 52.0 (seed 2) |" in text and "supervised" not in text
    assert evidence.together([[(0.5, 1), (1.0, 2), (2.0, 3)], [(1.0, 4), (2.0, 5)]]) == ([1.0, 2.0], [[2, 4], [3, 5]])
    evidence.draw_curves(lines, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 10_000


def test_an_earlier_table_stays_but_of_one_row_and_seed_only_with_the_same_network(tmp_path):
    def line(row, seed, column, weights):
        return {"row": row, "seed": seed, "column": column, "found": {"weights_sha256": weights}}
    earlier = [line("SlotCon", 0, "kNN", "a"), line("SlotCon", 0, "linear", "a"), line("SlotCon", 1, "kNN", "b"),
               line("SCFS", 0, "kNN", "c"), line("a row of before", 0, "kNN", "d")]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(one) + "\n" for one in earlier))
    again = line("SlotCon", 0, "kNN", "a") | {"value": 1.0}
    assert evidence.with_earlier([again], tmp_path / "e.jsonl") == [again, *earlier[1:4]]
    other = line("SlotCon", 0, "kNN", "e")
    assert evidence.with_earlier([other], tmp_path / "e.jsonl") == [other, *earlier[2:4]]
    assert evidence.with_earlier([other], tmp_path / "none") == [other]


def test_a_small_table_from_end_to_end_and_no_work_done_twice(tmp_path, monkeypatch, capsys):
    tiny = "--steps 1 --batch-size 8 --image-size 32 --canvas 32 --workers 0"
    monkeypatch.setattr(evidence, "ROWS", {"random": ("scenes:40", None, ""), "SlotCon": ("scenes:40", "slotcon.py", tiny)})
    monkeypatch.chdir(evidence.ROOT)  # as main does; undone after the test
    monkeypatch.setattr(evidence, "PROTOCOLS", {"kNN": (f"--protocol knn {tiny}", "top1_k20", "")})
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--seeds", "0", "--rows", "random", "SlotCon", "--protocols", "kNN", "--jobs", "1",
                                      "--epochs", "1", "--out", str(tmp_path / "runs"), "--results", str(tmp_path)])
    evidence.main()
    assert capsys.readouterr().out.count("seed 0, kNN") == 2
    lines = [json.loads(line) for line in (tmp_path / "evidence.jsonl").read_text().splitlines()]
    assert [(line["row"], line["found"]["weights"] == "random") for line in lines] == [("random", True), ("SlotCon", False)]
    assert lines[1]["knn_curve"] and 0 <= lines[1]["value"] == lines[1]["found"]["top1_k20"] <= 100
    evidence.main()
    assert "seed 0, kNN" not in capsys.readouterr().out


def test_the_best_rate_counts_and_no_failure(tmp_path, monkeypatch):
    worth = dict(zip(map(str, evidence.RATES), (20.0, 40.0, 30.0, 10.0, 5.0)))
    monkeypatch.setattr(evidence, "call", lambda command, threads: "a table\n" + json.dumps(
        {"top1": worth[command[command.index("--lr") + 1]], "top5": 99.0}))
    args = argparse.Namespace(epochs=0.0, out=tmp_path, protocols=["1 % labels"])
    line, = evidence.work("random", 0, args, 1)
    assert line["value"] == 40 and "--lr 0.1 " in line["eval"] and line["tried"] == list(worth.values())
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="nowhere.py"):
        evidence.call(["python", "nowhere.py"], 1)


def test_columns_show_these_measures():
    assert {name: measure for name, (_, measure, _) in evidence.PROTOCOLS.items()} == {
        "kNN": "top1_k20", "linear": "top1", "1 % labels": "top1", "10 % labels": "top1", "segment": "miou", "clusters": "miou",
        "CorLoc": "corloc", "mAP": "map"}
