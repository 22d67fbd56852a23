#!/usr/bin/env bash
# Run the original package in an environment of its own, and keep what it computes in tests/golden.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
scripts/original_environment.sh "$environment"
here=$PWD
cd "$environment"  # it writes into the working directory
"$environment/bin/python" "$here/scripts/make_golden.py" "$here/tests/golden/original.safetensors"
