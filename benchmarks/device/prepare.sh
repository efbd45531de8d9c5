#!/usr/bin/env bash
# Packs what the machine with the card lacks into .wheels/packages.tar.xz, for Python 3.12 on x86-64 Linux, in the
# versions that requirements/base.txt and requirements/torchao.txt pin. Other packages can be named as arguments, with
# a version: bash benchmarks/device/prepare.sh torchcodec==0.16.0
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
PACKAGES=(av transformers pydantic pydantic-core annotated-types typing-inspection)
TARGET=(--no-deps --only-binary=:all: --implementation cp --python-version 3.12 --abi cp312 --abi abi3 --abi none)
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do
    TARGET+=(--platform "${tag}_x86_64")
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/packed"
"$PYTHON" benchmarks/device/pins.py "${PACKAGES[@]}" >"$work/pinned"
# pip would compare what a package requires with its own Python.
install() { "$PYTHON" -m pip install --quiet --no-compile --ignore-requires-python "${TARGET[@]}" --target "$work/packed/$1" "${@:2}"; }
install site --require-hashes -r "$work/pinned"
# Beside the others: transformers would import it in every process, which takes seconds.
install torchao --require-hashes -r requirements/torchao.txt
if [ $# -gt 0 ]; then
    install site "$@"
fi
du -sh "$work"/packed/*/*/ | sort -h | tail -8
rm -rf .wheels
mkdir .wheels
# Smaller than the wheels, and unpacked without pip.
tar -C "$work/packed" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -cf - . | xz -T0 -6 >.wheels/packages.tar.xz
files=$(git ls-files -z --cached --others --exclude-standard | xargs -0 du -cb 2>/dev/null | awk '$2 == "total" {sum += $1} END {print sum}')
packed=$(du -b .wheels/packages.tar.xz | cut -f1)
awk -v w="$packed" -v f="$files" 'BEGIN {
    printf "packages %.1f MiB + working tree %.1f MiB = %.1f MiB\n", w / 2^20, f / 2^20, (w + f) / 2^20 }'
