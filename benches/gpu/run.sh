#!/bin/sh
# On a machine with an NVIDIA GPU, from the repository's root: whether every kernel is right there, then training beside
# PEFT + bitsandbytes.
#
#     sh benches/gpu/run.sh target/release/tunesmith 1b|8b [FOLDER]
#
# Results land in FOLDER (default: gpu-results); the table is printed last and written to FOLDER/table.txt.
set -eu
tunesmith=$1 size=$2 out=${3:-gpu-results}
script=$(dirname "$0")/side_by_side.py
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/device.txt"
"$tunesmith" bench selftest --device cuda --json "$out/selftest.json"
model=$(mktemp -d)
trap 'rm -rf "$model"' EXIT
python3 "$script" make "$model" "$size"
case $size in
8b) shapes="8:1024" ;;
*) shapes="8:1024 8:2048 16:256" ;;
esac
for shape in $shapes; do
    batch=${shape%:*} seq=${shape#*:}
    name() { echo "$out/$1.${batch}x$seq.json"; }
    # A peer that fails, or finds no room, is left out of the table.
    python3 "$script" peft "$model" "$(name peft)" --batch "$batch" --seq "$seq" || true
    python3 "$script" peft "$model" "$(name peft-checkpointing)" --checkpointing --batch "$batch" --seq "$seq" || true
    python3 "$script" peft "$model" "$(name peft-liger)" --checkpointing --liger --batch "$batch" --seq "$seq" || true
    python3 "$script" ours "$model" "$(name tunesmith)" "$tunesmith" --batch "$batch" --seq "$seq"
    python3 "$script" ours "$model" "$(name tunesmith-recompute)" "$tunesmith" --recompute all --batch "$batch" --seq "$seq"
    python3 "$script" table "$(name peft)" "$(name peft-checkpointing)" "$(name peft-liger)" "$(name tunesmith)" \
        "$(name tunesmith-recompute)" | tee -a "$out/table.txt"
done
