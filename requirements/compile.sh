#!/usr/bin/env bash
# Writes base.txt (what the package needs) and dev.txt (the same and the tools) from pyproject.toml: pinned,
# hashed, for every Python from 3.10 on. Needs uv; installing from the files needs only pip.
set -euo pipefail
cd "$(dirname "$0")/.."
compile=(uv pip compile --quiet --universal --python-version 3.10 --generate-hashes
         --no-emit-index-url --no-annotate --no-header "$@" pyproject.toml requirements/build.in)
"${compile[@]}" --output-file requirements/base.txt
"${compile[@]}" --extra dev --constraints requirements/base.txt --output-file requirements/dev.txt
if grep -nE '://|^--(index|extra-index|find-links)' requirements/*.txt; then
    echo "a requirement file names a host" >&2
    exit 1
fi
