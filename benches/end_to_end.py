"""The exec-assistant's training stage beside a padded-batch PyTorch + PEFT script on the same rows, interleaved.

    python end_to_end.py TUNESMITH FOLDER FILE.gguf [--rounds 2]

Ours counts the whole stage: reading, planning, training, evaluations, checkpoints, probes. Theirs counts the loop and
its evaluations only (see finetune_pytorch.py).
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

parser = argparse.ArgumentParser()
parser.add_argument("tunesmith")
parser.add_argument("folder")
parser.add_argument("file")
parser.add_argument("--rounds", type=int, default=2)
parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--jemalloc", default="/usr/lib/x86_64-linux-gnu/libjemalloc.so.2")
options = parser.parse_args()

source = str(pathlib.Path(options.folder).resolve() / options.file)
peer = [sys.executable, str(pathlib.Path(__file__).parent / "finetune_pytorch.py"), options.folder, options.file]
manifest = pathlib.Path(__file__).resolve().parent.parent / "pipelines" / "exec-assistant.yaml"
ours, theirs = [], []
for _ in range(options.rounds):
    with tempfile.TemporaryDirectory() as cache:
        run = [options.tunesmith, "--cache", cache, "run", str(manifest), "adapter", "--json"]
        run += ["--set", f"base={source}", "--threads", str(options.threads)]
        done = subprocess.run(run, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"tunesmith failed:\n{done.stderr[-2000:]}{done.stdout[-2000:]}")
        stages = {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}
        ours.append((stages["adapter"]["seconds"], stages["adapter"]["metrics"]))
        environment = dict(os.environ)
        if os.path.exists(options.jemalloc):
            environment["LD_PRELOAD"] = options.jemalloc
        shape = ["--precision", options.precision, "--threads", str(options.threads)]
        done = subprocess.run(
            [*peer, stages["split"]["folder"], *shape], env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            sys.exit(f"PyTorch failed:\n{done.stderr[-2000:]}")
        theirs.append(json.loads(done.stdout.strip().splitlines()[-1]))

metrics = ours[-1][1]
seconds = statistics.median(seconds for seconds, _ in ours)
peers = statistics.median(run["seconds"] for run in theirs)
print(f"tunesmith: {seconds:.1f} s, validation loss {metrics['eval_loss']:.3f}, "
      f"peak {metrics['peak_rss_bytes'] / 2**20:.0f} MiB")
print(f"PyTorch + PEFT {options.precision}: {peers:.1f} s, validation loss {theirs[-1]['eval_losses'][-1]:.3f}, "
      f"peak {theirs[-1]['peak_rss_bytes'] / 2**20:.0f} MiB, "
      f"{theirs[-1]['padded_tokens']} tokens with padding, {theirs[-1]['tokens']} without")
print(f"tunesmith is {peers / seconds:.2f}x as fast")
