"""The commands, the example and the documents, run as a user would."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from hvd_agn import _core, config
from hvd_agn.tools import bench, launch

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def run(*command, cwd=ROOT, timeout=120, **env):
    # Blocks of the usual size: conftest makes them small.
    settings = {k: v for k, v in os.environ.items() if not k.startswith("HVD_AGN_")}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**settings, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )
    return done


def hvd_agn(*arguments, **env):
    return run(sys.executable, "-m", "hvd_agn", *arguments, **env)


def test_check():
    done = hvd_agn("check")
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert all(line.startswith(("OK", "note", " ")) for line in lines)
    subjects = ["Python", "MPI", "mpi4py", "thread level", "launcher", "shared windows", "shared memory", "torch"]
    for subject in [*subjects, "TensorFlow", "TensorFlow ops"]:
        assert any(re.match(rf"\w+ +{subject} ", line) for line in lines), subject
    assert _core.compiler() in done.stdout
    assert len(lines) <= 24


def test_check_names_the_problem_and_the_fix():
    done = hvd_agn("check", HVD_AGN_BLOCK="1")
    assert done.returncode == 1
    assert re.search(
        r"PROBLEM +environment +HVD_AGN_BLOCK is not a variable.*There are: HVD_AGN_BLOCK_BYTES", done.stdout
    )


def test_check_on_several_ranks_prints_once():
    done = launch.run_ranks(
        2, [sys.executable, "-m", "hvd_agn", "check"], timeout=60, env={"HVD_AGN_BLOCK_BYTES": "64"}
    )
    assert done.stdout.count("thread level") == 1
    assert "ranks on this node: 2" in done.stdout
    assert "not tried: all ranks are on one node" in done.stdout


def test_bench_exchange():
    done = hvd_agn("bench", "exchange", "--params", "100000", "--ranks", "1,2", "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["ranks"] for row in rows] == [1, 2]
    for row in rows:
        assert row["params"] == 100_000
        for key in ("limit_ms", "exchange_ms", "per_exchange_ms", "allreduce_ms", "naive_ms"):
            assert row[key] > 0
    assert "per exchange" in done.stderr


def test_bench_exchange_of_a_framework():
    arguments = ["--framework", "tensorflow", "--params", "2000000", "--variables", "3"]
    done = hvd_agn("bench", "exchange", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, done.stdout.splitlines())
    assert (row["framework"], row["ranks"], row["params"], row["variables"]) == ("tensorflow", 1, 1999998, 3)
    for key in ("exchange_ms", "torch_exchange_ms", "limit_ms", "ratio"):
        assert row[key] > 0
    assert "leave --ranks and --transport out" in hvd_agn("bench", "exchange", *arguments, "--ranks", "2").stderr


def test_bench_step():
    done = hvd_agn("bench", "step", "--params", "10000")
    assert done.returncode == 0, done.stderr
    for row in ("torch +SGD", "torch +Adam", "torch +accumulate", "tensorflow +SGD"):
        assert re.search(rf"{row} +[\d.]+ +[\d.]+ +[\d.]+", done.stdout), row


def test_bench_rules():
    done = hvd_agn("bench", "rules", "--params", "10000", "--ranks", "2", "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    names = [type(rule).__name__ for rule in bench.BENCHED_RULES]
    assert [(row["name"], row["ranks"]) for row in rows] == [(name, 2) for name in names]
    for row in rows:
        assert row["params"] == 10_000
        for key in ("limit_ms", "exchange_ms", "per_exchange_ms"):
            assert row[key] > 0
        assert re.search(rf"{row['name']} +{row['slots']} +{row['ranks']}( +[\d.]+){{5}}$", done.stderr, re.M)


def test_bench_says_why_it_cannot_run():
    done = hvd_agn("bench", "exchange", "--params", "1000", "--ranks", "2", HVD_AGN_BLOCK_BYTES="1")
    assert done.returncode == 1
    assert "the run on 2 ranks failed" in done.stderr
    assert "HVD_AGN_BLOCK_BYTES='1'" in done.stderr
    assert hvd_agn("bench", "exchange", "--ranks", "0").returncode == 2


EXAMPLE = ROOT / "examples/torch_mnist.py"


def test_the_example_learns_and_reports(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--epochs", "8", "--report", str(tmp_path)]
    done = launch.run_ranks(2, command, timeout=120, env={"HVD_AGN_BLOCK_BYTES": ""})
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"accuracy", "seconds", "ranks", "period", "exchanges", "staleness_mean"}
    assert report["accuracy"] > 0.9
    assert report["ranks"] == 2
    assert report["exchanges"] == 2 * 8 * 125 / 10
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    progress = r"epoch \d/8, \d+ step/s, loss \d\.\d+, center version \d+, staleness \d+\.\d\n"
    assert re.fullmatch(f"({progress})+", done.stderr)
    assert "\nepoch 8/8" in f"\n{done.stderr}"
    assert "rank 1: 100 exchanges, 0 refused" in done.stdout


def test_the_example_shows_a_bar_on_a_terminal():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 160, 0, 0))
    command = [sys.executable, EXAMPLE, "--epochs", "1", "--batch", "200"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=120)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0, shown
    assert re.search(r"\repoch 1/1: 100%\|.* 20/20 .*, loss \d\.\d+, center version 2, staleness 0\.0\]", shown)
    assert "rank 0: 2 exchanges" in done.stdout


def test_the_example_says_how_to_get_the_data():
    if Path("/usr/share/datasets/fashion-mnist").exists():
        pytest.skip("Fashion-MNIST is installed here")
    done = run(sys.executable, EXAMPLE, "--data", "fashion")
    assert done.stderr.strip() == (
        "Fashion-MNIST is not in /usr/share/datasets/fashion-mnist: apt-get install dataset-fashion-mnist"
    )


# ---- documents


def blocks(language):
    found = []
    for path in DOCUMENTS:
        for number, text in enumerate(re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)):
            found.append(pytest.param(text, id=f"{path.name}-{number}"))
    return found


@pytest.mark.parametrize("script", blocks("python"))
def test_python_in_the_documents(script, tmp_path):
    (tmp_path / "script.py").write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{script}")
    env = {"HVD_AGN_BLOCK_BYTES": ""}
    done = launch.run_ranks(2, [sys.executable, str(tmp_path / "script.py")], timeout=90, env=env)
    assert done.returncode == 0, done.stderr


def commands():
    """Every line of the documents' shell blocks, once. What make and pip do is in .ci/run and test_install.py."""
    lines = {line.strip() for block in blocks("bash") for line in block.values[0].splitlines()}
    return sorted(line for line in lines if line and not line.startswith(("#", "make", "pip install")))


@pytest.mark.parametrize("command", commands())
def test_commands_in_the_documents(command):
    done = run("bash", "-euc", command)
    assert done.returncode == 0, done.stdout + done.stderr


def test_targets_in_the_documents():
    text = "\n".join(block.values[0] for block in blocks("bash"))
    rules = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make ([\w-]+)", text, re.M)):
        assert re.search(rf"^{target}:", rules, re.M), target


def test_every_variable_is_documented():
    text = (ROOT / "docs/environment.md").read_text()
    for variable in config.VARIABLES:
        assert re.search(rf"`{variable.name}` *\|.*{re.escape(str(variable.default).removesuffix('.0'))}", text), (
            variable.name
        )
    assert set(re.findall(r"\bHVD_AGN_[A-Z_]+\b", text)) == {variable.name for variable in config.VARIABLES}


def test_links_in_the_documents():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
