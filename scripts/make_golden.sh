#!/usr/bin/env bash
# Run the original package, memorizing-transformers-pytorch 0.4.1, in an environment of its own (both packages share one
# import name), and keep what it computes in tests/golden.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
"$environment/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
"$environment/bin/pip" install --quiet --no-deps memorizing-transformers-pytorch==0.4.1  # it asks for faiss-gpu
"$environment/bin/pip" install --quiet faiss-cpu==1.15.1 einops==0.8.2 einops-exts==0.0.4 joblib filelock
here=$PWD
cd "$environment"  # it writes into the working directory
"$environment/bin/python" "$here/scripts/make_golden.py" "$here/tests/golden/original.safetensors"
