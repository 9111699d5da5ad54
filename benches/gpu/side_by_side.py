"""One QLoRA job on a GPU, several engines: the same random weights, adapter, tokens and optimizer.

    python side_by_side.py make FOLDER 1b|8b|tiny          a model with random weights, an adapter, tokens
    python side_by_side.py peft FOLDER OUT.json [--checkpointing] [--liger]
    python side_by_side.py ours FOLDER OUT.json TUNESMITH [--recompute all] [--device cpu]
    python side_by_side.py table OUT.json...               exit code 1 where losses part by more than 0.02

`peft` is transformers + PEFT + bitsandbytes (NF4, double quantisation, bfloat16, scaled-dot-product attention). Memory is
what NVML says the whole device uses more than before: the same yardstick for all. Nothing is fetched.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import threading
import time

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4, "vocab_size": 32000},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, LEARNING_RATE, CLIP, DECAY = 16, 32, 2e-4, 1.0, 0.01
LOSS_TOLERANCE = 0.02


class DeviceMemory(threading.Thread):
    """The most that the whole device uses beyond what it did at the start."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.watching = 0, True
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            self.used = lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used
        except Exception:
            self.used = lambda: 0
        self.before = self.used()

    def run(self):
        while self.watching:
            self.peak = max(self.peak, self.used())
            time.sleep(0.01)

    def gigabytes(self):
        self.watching = False
        return max(0, self.peak - self.before) / 1e9


def make(options):
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        **SIZES[options.size], max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=False
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(options.folder, max_shard_size="4GB")
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(options.folder / "adapter")
    # A word a token: nobody reads them, but a model's folder has them.
    words = {f"<{token}>": token for token in range(config.vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="<0>")).save(str(options.folder / "tokenizer.json"))
    (options.folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<2>", "bos_token": "<1>"}))
    # Small ids are the likelier, as in a text, so that there is something to learn.
    weights = 1.0 / torch.arange(1, config.vocab_size + 1).float()
    drawn = torch.multinomial(weights, 64 * 8192, True, generator=torch.Generator().manual_seed(7))
    drawn.to(torch.int32).numpy().tofile(options.folder / "tokens.i32")


def peft(options):
    import numpy
    import torch
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if options.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    memory = DeviceMemory()
    memory.start()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.folder,
        quantization_config=quantized,
        dtype=torch.bfloat16,
        device_map={"": device},
        attn_implementation="sdpa",
    )
    model.config.use_cache = False
    if options.checkpointing:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model = PeftModel.from_pretrained(model, options.folder / "adapter", is_trainable=True).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=DECAY, fused=device == "cuda")
    tokens = torch.from_numpy(numpy.fromfile(options.folder / "tokens.i32", dtype=numpy.int32)).long()
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    step_tokens, losses, seconds = options.batch * options.seq, [], []
    for step in range(options.warmup + options.steps):
        rows = tokens[step * step_tokens : (step + 1) * step_tokens].view(options.batch, -1).to(device)
        wait()
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        wait()
        seconds.append(time.perf_counter() - start)
    name = "peft" + " checkpointing" * options.checkpointing + " liger" * options.liger
    write(options, name, losses, seconds[options.warmup :], memory.gigabytes())


def ours(options):
    memory = DeviceMemory()
    memory.start()
    figures = options.out.with_suffix(".ours.json")
    command = [options.tunesmith, "bench", "train", "--device", options.device, "--model", options.folder]
    command += ["--adapter-init", options.folder / "adapter", "--tokens", options.folder / "tokens.i32"]
    command += ["--recompute", options.recompute, "--lr", LEARNING_RATE, "--clip", CLIP, "--json", figures]
    for name in ["batch", "seq", "steps", "warmup"]:
        command += [f"--{name}", getattr(options, name)]
    subprocess.run([str(part) for part in command], check=True)
    found = json.loads(figures.read_text())
    name = "tunesmith" + " recompute all" * (options.recompute == "all")
    write(options, name, found["losses"], [found["step_ms"] / 1e3], memory.gigabytes(), found["spread"])


def write(options, name, losses, seconds, gigabytes, spread=None):
    median = statistics.median(seconds)
    spread = (max(seconds) - min(seconds)) / median if spread is None else spread
    figures = {"name": name, "batch": options.batch, "seq": options.seq, "losses": losses, "spread": spread}
    figures |= {"tok_s": options.batch * options.seq / median, "step_ms": 1e3 * median, "gigabytes": gigabytes}
    options.out.write_text(json.dumps(figures))


def table(options):
    runs = [json.loads(path.read_text()) for path in options.outs if path.is_file()]
    peer = next((run for run in runs if run["name"].startswith("peft")), None)
    part = False
    print(f"{'':28} {'tokens/s':>9} {'ratio':>6} {'ms a step':>10} {'spread':>7} {'GB':>6}  loss")
    for run in runs:
        same = peer and (run["batch"], run["seq"]) == (peer["batch"], peer["seq"])
        off = max(abs(ours - theirs) for ours, theirs in zip(run["losses"], peer["losses"])) if same else 0.0
        wrong = off > LOSS_TOLERANCE or not all(map(math.isfinite, run["losses"]))
        part |= wrong
        ratio = f"{run['tok_s'] / peer['tok_s']:6.2f}" if same else " " * 6
        losses = f"{run['losses'][0]:.4f} to {run['losses'][-1]:.4f}, off by {off:.4f}" + " TOO FAR" * wrong
        name = f"{run['name']} {run['batch']}x{run['seq']}"
        print(f"{name:28} {run['tok_s']:9.0f} {ratio} {run['step_ms']:10.1f} {run['spread']:7.1%}", end=" ")
        print(f"{run['gigabytes']:6.1f}  {losses}")
    sys.exit(int(part))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
commands = parser.add_subparsers(dest="command", required=True)
command = commands.add_parser("make")
command.add_argument("folder", type=pathlib.Path)
command.add_argument("size", choices=SIZES)
for name in ["peft", "ours"]:
    command = commands.add_parser(name)
    command.add_argument("folder", type=pathlib.Path)
    command.add_argument("out", type=pathlib.Path)
    if name == "ours":
        command.add_argument("tunesmith")
        command.add_argument("--recompute", choices=["auto", "all", "none"], default="auto")
        command.add_argument("--device", default="cuda")
    else:
        command.add_argument("--checkpointing", action="store_true")
        command.add_argument("--liger", action="store_true")
    command.add_argument("--batch", type=int, default=8)
    command.add_argument("--seq", type=int, default=1024)
    command.add_argument("--steps", type=int, default=9)
    command.add_argument("--warmup", type=int, default=3)
command = commands.add_parser("table")
command.add_argument("outs", type=pathlib.Path, nargs="+")
options = parser.parse_args()
os.environ["HF_HUB_OFFLINE"] = "1"
globals()[options.command](options)
