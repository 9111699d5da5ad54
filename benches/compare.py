"""tunesmith beside PyTorch + PEFT on one machine: interleaved runs, and the ratios.

    python compare.py TUNESMITH FOLDER FILE.gguf [--rounds 3] [--batch 4] [--seq 256] [--targets all] [--only NAME]...

Each round runs every program once, so that a neighbour's load falls on all of them; all train on the same tokens. A
ratio is taken between medians over the rounds. On a shared machine look at the time on cores: it counts all threads
and no waiting. Run it with the Python that has torch, transformers, peft, gguf and bitsandbytes; a program that
fails is reported and left out.
"""

import argparse
import array
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile

parser = argparse.ArgumentParser()
parser.add_argument("tunesmith")
parser.add_argument("folder")
parser.add_argument("file")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--seq", type=int, default=256)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--targets", choices=["attn", "all"], default="all")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--warmup", type=int, default=2)
parser.add_argument("--jemalloc", default="/usr/lib/x86_64-linux-gnu/libjemalloc.so.2")
parser.add_argument("--checkpointing", action="store_true", help="PyTorch computes every layer twice")
parser.add_argument("--only", action="append", metavar="NAME", help="run only this program")
options = parser.parse_args()

# What PyTorch's own tuning guide and a search of ours give it on a CPU.
MALLOC = (
    "oversize_threshold:1,background_thread:true,metadata_thp:auto,dirty_decay_ms:-1,muzzy_decay_ms:-1"
)
here = pathlib.Path(__file__).parent
work = tempfile.TemporaryDirectory()
hf, tokens = os.path.join(work.name, "hf"), os.path.join(work.name, "tokens.i32")

drawn, count = random.Random(1), (options.warmup + options.steps) * options.batch * options.seq
with open(tokens, "wb") as file:
    # Small ids are the likelier, as in a text; 49152 is the least vocabulary anyone compares on.
    array.array("i", (int(49152 ** drawn.random()) - 1 for _ in range(count))).tofile(file)
names = ["batch", "seq", "rank", "targets", "threads", "steps", "warmup"]
shape = [part for name in names for part in (f"--{name}", str(getattr(options, name)))] + ["--tokens", tokens]

model = str(pathlib.Path(options.folder) / options.file)
ours = [options.tunesmith, "bench", "train", "--model", model, "--json", "-"]
theirs = [sys.executable, str(here / "train_pytorch.py"), hf]
theirs += ["--checkpointing"] if options.checkpointing else []
programs = {
    "tunesmith nf4": (ours, False),
    "tunesmith bf16": ([*ours, "--base", "bf16"], False),
    "torch f32": ([*theirs, "--precision", "f32"], True),
    "torch f32 compiled": ([*theirs, "--precision", "f32", "--compile"], True),
    "torch bf16": ([*theirs, "--precision", "bf16"], True),
    "torch bf16 compiled": ([*theirs, "--precision", "bf16", "--compile"], True),
    "torch mixed": ([*theirs, "--precision", "mixed"], True),
    "bitsandbytes nf4": ([*theirs, "--precision", "mixed", "--nf4"], True),
}
if options.only:
    unknown = sorted(set(options.only) - set(programs))
    if unknown:
        parser.error(f"no program {unknown}; there are {list(programs)}")
    programs = {name: program for name, program in programs.items() if name in options.only}
if any(preload for _, preload in programs.values()):
    subprocess.run([sys.executable, str(here / "gguf_to_hf.py"), options.folder, options.file, hf], check=True)

jemalloc = os.path.exists(options.jemalloc)
results = {name: [] for name in programs}
for _ in range(options.rounds):
    for name, (command, preload) in list(programs.items()):
        environment = dict(os.environ, OMP_NUM_THREADS=str(options.threads))
        if preload and jemalloc:
            environment |= {"LD_PRELOAD": options.jemalloc, "MALLOC_CONF": MALLOC}
        out = subprocess.run(command + shape, env=environment, capture_output=True, text=True)
        if out.returncode != 0:
            print(f"{name} failed:\n{out.stderr[-2000:]}", file=sys.stderr)
            del programs[name]
            continue
        results[name].append(json.loads(out.stdout.strip().splitlines()[-1]))

preloaded = "with" if jemalloc else "without"
print(f"{options.batch} x {options.seq}, {options.targets}, {options.threads} threads, PyTorch {preloaded} jemalloc")
medians = {
    name: {field: statistics.median(run[field] for run in runs) for field in ("tok_s", "cpu_ms")}
    for name, runs in results.items()
    if runs
}
first = medians.get("tunesmith nf4")
for name, median in medians.items():
    runs = results[name]
    peak = max(run["peak_rss_bytes"] for run in runs) / 2**20
    line = f"{name:20} {median['tok_s']:7.0f} tokens/s  {median['cpu_ms']:7.0f} ms on cores  peak {peak:6.0f} MiB"
    line += f"  first loss {runs[0]['losses'][0]:.3f}"
    if first:
        line += f"  tunesmith nf4 is {first['tok_s'] / median['tok_s']:.2f}x"
        line += f" ({median['cpu_ms'] / first['cpu_ms']:.2f}x by cores)"
    print(line)
