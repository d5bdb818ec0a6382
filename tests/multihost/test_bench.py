"""`bench multihost`, small: that it runs and says what the documents say it does."""

import json
import subprocess
import sys

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
