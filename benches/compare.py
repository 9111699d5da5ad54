"""tunesmith beside PyTorch + PEFT on one machine: interleaved runs, and the ratios.

    python compare.py TUNESMITH FOLDER FILE.gguf [--rounds 3] [--jemalloc /usr/lib/x86_64-linux-gnu/libjemalloc.so.2]

Each round runs every program once, so that a neighbour's load falls on all of them. A ratio is taken between medians
over the rounds. Run it with the Python that has torch, transformers, peft and gguf.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

parser = argparse.ArgumentParser()
parser.add_argument("tunesmith")
parser.add_argument("folder")
parser.add_argument("file")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--seq", type=int, default=256)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--jemalloc", default="/usr/lib/x86_64-linux-gnu/libjemalloc.so.2")
parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
options = parser.parse_args()

here = pathlib.Path(__file__).parent
shape = ["--batch", options.batch, "--seq", options.seq, "--threads", options.threads, "--steps", options.steps]
shape = [str(part) for part in shape]
model = str(pathlib.Path(options.folder) / options.file)
ours = [options.tunesmith, "bench", "train", "--model", model, "--json", "-"]
theirs = [sys.executable, str(here / "train_pytorch.py"), options.folder, options.file]
programs = {
    "tunesmith nf4": (ours, False),
    "tunesmith bf16": ([*ours, "--base", "bf16"], False),
    "torch f32": ([*theirs, "--precision", "f32"], True),
    "torch bf16": ([*theirs, "--precision", "bf16"], True),
}
if not options.no_compile:
    programs["torch f32 compiled"] = ([*theirs, "--precision", "f32", "--compile"], True)

jemalloc = os.path.exists(options.jemalloc)
results = {name: [] for name in programs}
for _ in range(options.rounds):
    for name, (command, preload) in programs.items():
        environment = dict(os.environ)
        if preload and jemalloc:
            environment["LD_PRELOAD"] = options.jemalloc
        out = subprocess.run(command + shape, env=environment, capture_output=True, text=True)
        if out.returncode != 0:
            sys.exit(f"{name} failed:\n{out.stderr[-2000:]}")
        results[name].append(json.loads(out.stdout.strip().splitlines()[-1]))

medians = {name: statistics.median(run["tok_s"] for run in runs) for name, runs in results.items()}
print(f"{options.batch} x {options.seq}, {options.threads} threads, {'with' if jemalloc else 'without'} jemalloc")
for name, runs in results.items():
    peak = max(run["peak_rss_bytes"] for run in runs) / 2**20
    ratio = medians["tunesmith nf4"] / medians[name]
    print(f"{name:20} {medians[name]:8.0f} tokens/s   peak {peak:6.0f} MiB   tunesmith nf4 is {ratio:.2f}x")
