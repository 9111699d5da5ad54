"""Training steps of PyTorch + PEFT on the same model, rows and optimizer as `tunesmith bench train`.

    python train_pytorch.py FOLDER FILE.gguf [--batch 4] [--seq 256] [--precision f32|bf16] [--compile] [--steps 5]

Prints one JSON object with the fields of `tunesmith bench train --json -`. Needs torch, transformers, peft, gguf.
jemalloc matters to PyTorch on a CPU as much as its kernels: preload it to be fair (see compare.py).
"""

import argparse
import json
import resource
import statistics
import time

import numpy
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("file")
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--seq", type=int, default=256)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--targets", choices=["attn", "all"], default="all")
parser.add_argument("--precision", choices=["f32", "bf16"], default="bf16")
parser.add_argument("--compile", action="store_true")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--warmup", type=int, default=2)
parser.add_argument("--tokens", help="little-endian 32-bit token ids")
options = parser.parse_args()

torch.set_num_threads(options.threads)
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[options.precision]
model = AutoModelForCausalLM.from_pretrained(options.folder, gguf_file=options.file, dtype=dtype)
targets = "all-linear" if options.targets == "all" else ["q_proj", "k_proj", "v_proj", "o_proj"]
config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=targets, task_type="CAUSAL_LM")
model = get_peft_model(model, config, autocast_adapter_dtype=False)
model.train()
trained = [value for value in model.parameters() if value.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
run = torch.compile(model) if options.compile else model

steps, count = options.warmup + options.steps, options.batch * options.seq
if options.tokens:
    ids = torch.from_numpy(numpy.fromfile(options.tokens, dtype="<i4")[: steps * count].astype("int64"))
else:
    ids = torch.randint(0, model.config.vocab_size, (steps * count,), generator=torch.Generator().manual_seed(1))

seconds, losses = [], []
for step in ids.view(steps, options.batch, options.seq):
    start = time.perf_counter()
    loss = run(input_ids=step, labels=step).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())
    seconds.append(time.perf_counter() - start)
measured = seconds[options.warmup :]
median = statistics.median(measured)
print(
    json.dumps(
        {
            "tok_s": count / median,
            "step_ms": median * 1e3,
            "spread": (max(measured) - min(measured)) / median,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "losses": losses,
        }
    )
)
