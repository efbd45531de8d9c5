#!/usr/bin/env bash
# Fetches the wheels that the machine with the card lacks into .wheels/, for Python 3.12 on x86-64 Linux, in the
# versions that requirements/base.txt pins. Other packages can be named as arguments, with a version if base.txt
# has none: bash benchmarks/device/prepare.sh torchao==0.14.1
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
PACKAGES=(av transformers pydantic pydantic-core annotated-types typing-inspection)
TARGET=(--no-deps --only-binary=:all: --implementation cp --python-version 3.12 --abi cp312 --abi abi3 --abi none)
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do
    TARGET+=(--platform "${tag}_x86_64")
done

mkdir -p .wheels
rm -f .wheels/*.whl
pinned=$(mktemp)
trap 'rm -f "$pinned"' EXIT
"$PYTHON" benchmarks/device/pins.py "${PACKAGES[@]}" >"$pinned"
"$PYTHON" -m pip download --quiet --require-hashes "${TARGET[@]}" --dest .wheels -r "$pinned"
if [ $# -gt 0 ]; then
    "$PYTHON" -m pip download --quiet "${TARGET[@]}" --dest .wheels "$@"
fi
du -h .wheels/*.whl
files=$(git ls-files -z --cached --others --exclude-standard | xargs -0 du -cb 2>/dev/null | awk '$2 == "total" {sum += $1} END {print sum}')
wheels=$(du -cb .wheels/*.whl | tail -1 | cut -f1)
awk -v w="$wheels" -v f="$files" 'BEGIN {
    printf "wheels %.1f MiB + working tree %.1f MiB = %.1f MiB\n", w / 2^20, f / 2^20, (w + f) / 2^20 }'
