#!/bin/sh
# Puts NVRTC, NVIDIA's compiler of kernels, where the tests look for it: `nvrtc` in the folder Cargo builds into. It
# comes from PyPI (90 MB), and needs neither a GPU nor a toolkit. Where it is already there, nothing is done.
set -eu
cd "$(dirname "$0")/../.."
folder="${CARGO_TARGET_DIR:-target}/nvrtc"
if [ -n "${TUNESMITH_NVRTC:-}" ] || [ -n "$(find "$folder" -name 'libnvrtc.so.*' 2>/dev/null)" ]; then
    exit 0
fi
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --dest "$wheels" 'nvidia-cuda-nvrtc==13.0.*'
# Unpacked beside and renamed, so that a half-unpacked folder is never taken for a whole one.
mkdir -p "$folder.part"
python3 -m zipfile -e "$wheels"/*.whl "$folder.part"
rm -rf "$folder"
mv "$folder.part" "$folder"
