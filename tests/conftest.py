import datetime
import os
import platform
import shlex
import sys
from pathlib import Path

import pytest

# On the CPU wherever it runs: two processes do not fit one GPU, and a GPU does not give the same bits twice unasked.
# TEST_GPUS=0 shows the tests a GPU, for those that are for one.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("TEST_GPUS", "")
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Tests as well: the server that launch.py forks from finds in it what to load beforehand.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Two to four tests at a time, as most use one thread; -n 0: one at a time, in this process. Never in a worker."""
    worker = hasattr(config, "workerinput") or "PYTEST_XDIST_WORKER" in os.environ
    if not worker and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses = min(4, len(os.sched_getaffinity(0)))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: soaks that take minutes; run with -m slow")


def pytest_collection_modifyitems(config, items):
    if "slow" not in (config.option.markexpr or ""):
        keep = [i for i in items if "slow" not in i.keywords]
        config.hook.pytest_deselected(items=[i for i in items if "slow" in i.keywords])
        items[:] = keep


def pytest_addoption(parser):
    parser.addoption("--report", help="write test_reliability.py's table of faults, with counts, to this file")


def pytest_terminal_summary(terminalreporter, config):
    if not config.option.report:
        return
    rows = {}  # of the table: one a test function
    for outcome, reports in terminalreporter.stats.items():
        for report in reports if outcome in ("passed", "failed", "error", "skipped") else ():
            if "test_reliability.py::" in report.nodeid and "[" in report.nodeid:
                name, case = report.nodeid.split("::")[1].rstrip("]").split("[", 1)
                rows.setdefault(name, []).append((*case.split(": ", 1), outcome, report.duration))
    how = (f"`python -m pytest {shlex.join(config.invocation_params.args)}`: {platform.machine()}, {os.cpu_count()} cores, "
           f"Python {platform.python_version()}, torch {torch.__version__}, {datetime.date.today()}.")
    lines = [how, "", "| fault | scripts | cases | passed | failed | skipped | seconds, all cases |", "|" + "---|" * 7]
    for name, cases in sorted(rows.items()):
        title = os.path.commonprefix([case[1] for case in cases]).rstrip("-")
        count = [sum(case[2] in kind for case in cases) for kind in (("passed",), ("failed", "error"), ("skipped",))]
        lines.append(f"| {title} (`{name}`) | {len({case[0] for case in cases})} | {len(cases)} | "
                     f"{' | '.join(map(str, count))} | {sum(case[3] for case in cases):.0f} |")
    total = [sum(case[2] in kind for cases in rows.values() for case in cases)
             for kind in (("passed",), ("failed", "error"), ("skipped",))]
    lines.append(f"| **all** | | {sum(total)} | {' | '.join(map(str, total))} | |")
    Path(config.option.report).write_text("\n".join(lines) + "\n")
