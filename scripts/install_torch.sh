#!/bin/sh
# Installs torch into the environment of the given python: the CPU build where there is no NVIDIA GPU, since the
# default Linux build brings several GB of CUDA with it. Does nothing where torch is already there.
set -eu
python=$1
version=2.13.0

if "$python" -c "import torch" 2>/dev/null; then
    exit 0
fi
if [ "$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null 2>&1; then
    exec "$python" -m pip install -q "torch==$version"
fi
# Where pip is set up with a CPU build, take it; else uv knows where PyTorch keeps its CPU builds; else the default build.
"$python" -m pip install -q "torch==$version+cpu" 2>/dev/null && exit 0
"$python" -m pip install -q uv 2>/dev/null &&
    "$python" -m uv pip install -q --python "$python" --torch-backend cpu "torch==$version" && exit 0
exec "$python" -m pip install -q "torch==$version"
