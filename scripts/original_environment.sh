#!/usr/bin/env bash
# Make an environment of its own for the original package, memorizing-transformers-pytorch 0.4.1 (both packages share one
# import name), in the folder given, unless it is there.
set -euo pipefail
environment=$1
if [ -f "$environment/ready" ]; then exit; fi
python3 -m venv "$environment"
"$environment/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
"$environment/bin/pip" install --quiet --no-deps memorizing-transformers-pytorch==0.4.1  # it asks for faiss-gpu
"$environment/bin/pip" install --quiet faiss-cpu==1.15.1 einops==0.8.2 einops-exts==0.0.4 joblib filelock
touch "$environment/ready"
