#!/usr/bin/env bash
# The check on the machine with the card, in at most seven minutes; arguments go to check.py. Results go to the
# folder $OUT, by default benchmarks/results/device.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH="$site:$PWD/src"
if compgen -G ".wheels/*.whl" >/dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$site" .wheels/*.whl || echo "the wheels cannot be installed: going on with what is there"
fi
"$PYTHON" benchmarks/device/check.py --out "${OUT:-benchmarks/results/device}" "$@"
