"""Training steps of PyTorch + PEFT on the same model, rows and optimizer as `tunesmith bench train`.

    python train_pytorch.py FOLDER [--batch 4] [--seq 256] [--precision f32|bf16|mixed] [--nf4] [--compile] [--steps 5]

Prints one JSON object with the fields of `tunesmith bench train --json -`. Needs torch, transformers, peft, and
bitsandbytes for `--nf4`. jemalloc matters to PyTorch on a CPU as much as its kernels: preload it to be fair (see
compare.py).

`bf16` is everything in bfloat16, adapters too: the fastest there is. `mixed` is a bfloat16 base, float32 adapters
and autocast: what people are told to use, and how QLoRA runs.
"""

import argparse
import json
import statistics
import time

import numpy
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--seq", type=int, default=256)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--targets", choices=["attn", "all"], default="all")
parser.add_argument("--precision", choices=["f32", "bf16", "mixed"], default="bf16")
parser.add_argument("--nf4", action="store_true", help="base weights in 4 bits, by bitsandbytes")
parser.add_argument("--compile", action="store_true")
parser.add_argument("--checkpointing", action="store_true", help="compute every layer twice")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--warmup", type=int, default=2)
parser.add_argument("--tokens", help="little-endian 32-bit token ids")
options = parser.parse_args()

torch.set_num_threads(options.threads)
torch.manual_seed(1)
dtype = torch.float32 if options.precision == "f32" else torch.bfloat16
extra = {}
if options.nf4:
    extra["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    extra["device_map"] = "cpu"
model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=dtype, **extra)
model.config.use_cache = False
if options.nf4:
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=options.checkpointing)
elif options.checkpointing:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
targets = "all-linear" if options.targets == "all" else ["q_proj", "k_proj", "v_proj", "o_proj"]
config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=targets, task_type="CAUSAL_LM")
model = get_peft_model(model, config, autocast_adapter_dtype=options.precision != "bf16")
model.train()
trained = [value for value in model.parameters() if value.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.01)
run = torch.compile(model) if options.compile else model

steps, count = options.warmup + options.steps, options.batch * options.seq
if options.tokens:
    ids = torch.from_numpy(numpy.fromfile(options.tokens, dtype="<i4")[: steps * count].astype("int64"))
else:
    ids = torch.randint(0, model.config.vocab_size, (steps * count,), generator=torch.Generator().manual_seed(1))


def peak_rss_bytes():
    # Not from getrusage, whose peak begins at that of the process that started this one.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024


seconds, busy, losses = [], [], []
for step in ids.view(steps, options.batch, options.seq):
    start, busy_before = time.perf_counter(), time.process_time()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.precision == "mixed"):
        loss = run(input_ids=step, labels=step).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())
    seconds.append(time.perf_counter() - start)
    busy.append(time.process_time() - busy_before)
measured = seconds[options.warmup :]
median = statistics.median(measured)
print(
    json.dumps(
        {
            "tok_s": count / median,
            "step_ms": median * 1e3,
            "spread": (max(measured) - min(measured)) / median,
            "cpu_ms": statistics.median(busy[options.warmup :]) * 1e3,
            "peak_rss_bytes": peak_rss_bytes(),
            "losses": losses,
        }
    )
)
