#!/usr/bin/env bash
# Writes base.txt (what the package needs), dev.txt (the same and the tools), bench.txt (the same and lmms-eval),
# torchcodec.txt and torchao.txt from pyproject.toml: pinned, hashed, for every Python from 3.10 on. Needs uv; installing from the
# files needs only pip.
set -euo pipefail
cd "$(dirname "$0")/.."
compile=(uv pip compile --quiet --universal --python-version 3.10 --generate-hashes
         --no-emit-index-url --no-annotate --no-header "$@" pyproject.toml requirements/build.in requirements/newest.in)
"${compile[@]}" --output-file requirements/base.txt
"${compile[@]}" --extra dev --constraints requirements/base.txt --output-file requirements/dev.txt
# lmms-eval by itself, and of what it asks for only what the suite imports (bench.in says why).
"${compile[@]}" requirements/bench.in --constraints requirements/dev.txt --output-file requirements/bench.txt
grep --only-matching 'lmms-eval==[0-9.]*' pyproject.toml |
    uv pip compile --quiet --no-deps --universal --python-version 3.10 --generate-hashes \
        --no-emit-index-url --no-annotate --no-header - >> requirements/bench.txt
# The other video backend, and weights in 8 bits, each alone: they need torch, which base.txt holds.
for name in torchcodec torchao; do
    grep --only-matching "$name>=[0-9.]*" pyproject.toml |
        uv pip compile --quiet --no-deps --universal --python-version 3.10 --generate-hashes \
            --no-emit-index-url --no-annotate --no-header - --output-file "requirements/$name.txt"
done
if grep -nE '://|^--(index|extra-index|find-links)' requirements/*.txt; then
    echo "a requirement file names a host" >&2
    exit 1
fi
