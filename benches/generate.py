"""Generation: tunesmith beside llama.cpp and PyTorch on one machine, interleaved, and the ratios.

    python generate.py TUNESMITH FOLDER/FILE.gguf [--rounds 3] [--threads 2] [--prompt 512] [--tokens 64]

Each round runs every program once; a ratio is taken between medians over the rounds. Then tunesmith's 16 sequences
together beside one. Run it with the Python that has torch, transformers, gguf and xllamacpp. llama.cpp's threads wait
for each other by spinning, so that with two threads on a busy machine its figures collapse: take one there.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

parser = argparse.ArgumentParser()
parser.add_argument("tunesmith")
parser.add_argument("file")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--prompt", type=int, default=512)
parser.add_argument("--tokens", type=int, default=64)
options = parser.parse_args()

ours = [options.tunesmith, "bench", "generate", "--model", options.file, "--rounds", "1", "--json", "-"]
ours += ["--threads", str(options.threads), "--tokens", str(options.tokens)]
alone = ["--prompt", str(options.prompt)]
peers = [sys.executable, str(pathlib.Path(__file__).parent / "generate_peers.py")]
shape = [options.file, *(str(part) for part in (options.prompt, options.tokens, 1, options.threads))]
programs = {
    "tunesmith nf4": ours + alone,
    "tunesmith bf16": [*ours, *alone, "--base", "bf16"],
    "tunesmith nf4, 16": [*ours, "--prompt", "32", "--batch", "16"],
    "llama.cpp": [*peers, "llamacpp", *shape],
    "torch bf16": [*peers, "torch-bf16", *shape],
    "torch f32": [*peers, "torch-f32", *shape],
}
results = {name: [] for name in programs}
for _ in range(options.rounds):
    for name, command in programs.items():
        out = subprocess.run(command, capture_output=True, text=True)
        if out.returncode != 0:
            sys.exit(f"{name} failed:\n{out.stderr[-2000:]}")
        results[name].append(json.loads(out.stdout.strip().splitlines()[-1]))


def median(name, figure):
    return statistics.median(run[figure] for run in results[name])


for name in programs:
    parts = []
    for figure in ("prefill_tok_s", "decode_tok_s"):
        value = median(name, figure)
        parts.append(f"{figure} {value:8.1f} (tunesmith nf4 is {median('tunesmith nf4', figure) / value:.2f}x)")
    print(f"{name:18} {'   '.join(parts)}")
