import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
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
