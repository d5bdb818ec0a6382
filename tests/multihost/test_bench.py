"""`bench multihost` and `benchmarks/wires.py`, small: that they run and say what the documents say they do."""

import json
import subprocess
import sys
from pathlib import Path

WIRES = Path(__file__).parents[2] / "benchmarks/wires.py"
COMMAND = [sys.executable, "-m", "hvd_agn", "bench", "multihost", "--params", "50000", "--json"]


def test_bench_multihost(hosts, rma, monkeypatch):
    monkeypatch.delenv("HVD_AGN_BLOCK_BYTES")
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["wire"] for row in rows} == {"fp32", "bf16", "fp16", "int8"}
    assert {row["shards"] for row in rows} == {1, 2}
    assert all(row["exchange_ms"] > 0 for row in rows)
    assert all(row["blocked_ms"] > 0 for row in rows if row["what"] == "overlap")
    assert rows[0]["naive_ms"] > 0
    assert "Get_accumulate" in done.stderr


def test_accuracy_by_wire(hosts, rma, tmp_path):
    command = [sys.executable, str(WIRES), "--seeds", "0", "--epochs", "1", "--json", str(tmp_path / "wires.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "wires.json").read_text().splitlines()]
    assert [row["wire"] for row in rows] == ["fp32", "bf16", "fp16", "int8"]
    assert all(row["accuracy"] > 0.2 for row in rows)  # one in ten by chance; one epoch is not much
    assert "points from fp32" in done.stdout
