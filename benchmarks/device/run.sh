#!/usr/bin/env bash
# The check on the machine with the card, a half in at most seven minutes; arguments go to check.py. Results go to the
# folder $OUT, by default benchmarks/results/device.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
carried=$(mktemp -d)
trap 'rm -rf "$carried"' EXIT
if [ -f .wheels/packages.tar.xz ]; then
    "$PYTHON" -m tarfile -e .wheels/packages.tar.xz "$carried" ||
        echo "the packages cannot be unpacked: going on with what is there"
fi
export PYTHONPATH="$carried/site:$PWD/src" TORCHAO="$carried/torchao"
"$PYTHON" benchmarks/device/check.py --out "${OUT:-benchmarks/results/device}" "$@"
