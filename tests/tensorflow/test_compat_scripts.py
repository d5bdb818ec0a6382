"""Whole scripts of TensorFlow 1 that were migrated, run as a user would."""

import re
import sys
from pathlib import Path

import numpy as np

from hvd_agn.tools import launch

ROOT = Path(__file__).parents[2]
AS_FOR_A_USER = {"HVD_AGN_BLOCK_BYTES": ""}


def run(script, *arguments):
    done = launch.run_ranks(2, [sys.executable, str(script), *arguments], timeout=120, env=AS_FOR_A_USER)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_learns():
    out = run(ROOT / "examples/tf_v1_migrated.py", "--pushes", "120")
    exchanges = [int(n) for n in re.findall(r"^rank \d: (\d+) exchanges$", out, re.M)]
    pushes, accuracy = re.search(r"^center: (\d+) pushes, accuracy ([\d.]+)$", out, re.M).groups()
    assert len(exchanges) == 2
    assert int(pushes) == sum(exchanges)
    assert 120 <= int(pushes) < 130
    assert float(accuracy) > 0.8


def test_the_script_of_the_document(tmp_path):
    text = (ROOT / "docs/migrate-from-tf-contrib.md").read_text()
    (after,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    (tmp_path / "script.py").write_text(after)
    (printed,) = re.findall(r"^center: \[ *([\d.-]+) +([\d.-]+)\]$", run(tmp_path / "script.py"), re.M)
    np.testing.assert_allclose(np.array(printed, float), [2, -3], atol=0.21)
