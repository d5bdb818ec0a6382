"""The examples for TensorFlow, run as a user would."""

import json
import re
import sys
from pathlib import Path

import pytest

from hvd_agn.tools import launch

EXAMPLES = Path(__file__).parents[2] / "examples"
EPOCHS, STEPS = 2, 125  # of each rank


@pytest.mark.parametrize(("name", "options"), [("keras_mnist.py", ()), ("tf_custom_loop.py", ("--overlap",))])
def test_it_learns_and_reports(name, options, tmp_path, monkeypatch):
    for variable in ("HVD_AGN_BLOCK_BYTES", "TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS"):  # as for a user
        monkeypatch.delenv(variable)
    command = [sys.executable, str(EXAMPLES / name), "--epochs", str(EPOCHS), "--report", str(tmp_path), *options]
    done = launch.run_ranks(2, command, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["accuracy"] > 0.7
    assert report["ranks"] == 2
    assert report["exchanges"] == 2 * EPOCHS * STEPS / 10
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert f"rank 1: {EPOCHS * STEPS // 10} exchanges, 0 refused" in done.stdout
    assert re.search(rf"^center: accuracy {report['accuracy']:.4f} on 1000 held-out images", done.stdout, re.M)
    line = rf"epoch \d/{EPOCHS}, \d+ step/s, loss \d\.\d+, center version \d+, staleness \d+\.\d"
    *lines, end = done.stderr.split("\n")
    assert end == ""
    assert all(re.fullmatch(line, each) for each in lines), done.stderr  # and nothing else, of TensorFlow
    assert lines[-1].startswith(f"epoch {EPOCHS}/{EPOCHS}, ")
