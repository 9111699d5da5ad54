"""The same fine-tune as the pipeline's `train` stage, the way most scripts do it: PyTorch + PEFT, padded batches.

    python finetune_pytorch.py FOLDER FILE.gguf SPLIT [--precision f32|bf16] [--epochs 2] [--batch 4] [--lr 2e-3]

SPLIT is the folder of a `split` stage. Rows, supervision (the assistant's tokens and the end of its turn), rank,
optimizer and schedule are those of the stage. Prints one JSON object: the seconds of training and of its evaluations,
imports and loading left out, and the validation loss after each epoch. See end_to_end.py.
"""

import argparse
import json
import math
import pathlib
import random
import resource
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("file")
parser.add_argument("split", type=pathlib.Path)
parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--warmup", type=float, default=0.05)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--seed", type=int, default=7)
options = parser.parse_args()

torch.set_num_threads(options.threads)
torch.manual_seed(options.seed)
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[options.precision]
tokenizer = AutoTokenizer.from_pretrained(options.folder, gguf_file=options.file)
model = AutoModelForCausalLM.from_pretrained(options.folder, gguf_file=options.file, dtype=dtype)
config = LoraConfig(
    r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM"
)
model = get_peft_model(model, config)
trained = [value for value in model.parameters() if value.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0)
BEFORE, END = "<|im_start|>assistant\n", "<|im_end|>"


def read(name):
    """Rows of token ids and labels: of what the assistant says and the end of its turn."""
    rows = []
    for line in (options.split / name).read_text().splitlines():
        text = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        ids, labels, start = [], [], 0
        while (at := text.find(BEFORE, start)) >= 0:
            answer, end = at + len(BEFORE), text.index(END, at) + len(END)
            for part, supervised in ((text[start:answer], False), (text[answer:end], True)):
                tokens = tokenizer(part, add_special_tokens=False)["input_ids"]
                ids += tokens
                labels += tokens if supervised else [-100] * len(tokens)
            start = end
        rows.append((ids, labels))
    return rows


def batch(rows):
    """Padded to the longest."""
    longest = max(len(ids) for ids, _ in rows)
    pad = lambda values, filler: values + [filler] * (longest - len(values))
    return {
        "input_ids": torch.tensor([pad(ids, 0) for ids, _ in rows]),
        "labels": torch.tensor([pad(labels, -100) for _, labels in rows]),
        "attention_mask": torch.tensor([pad([1] * len(ids), 0) for ids, _ in rows]),
    }


@torch.no_grad()
def evaluate(rows):
    """Mean loss of a supervised token."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), options.batch):
        part = batch(rows[start : start + options.batch])
        tokens = int((part["labels"][:, 1:] != -100).sum())
        total += model(**part).loss.item() * tokens
        count += tokens
    model.train()
    return total / count


train, validation = read("train.jsonl"), read("validation.jsonl")
steps = options.epochs * math.ceil(len(train) / options.batch)
warmup = max(1, round(options.warmup * steps))
cosine = lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: (n + 1) / warmup if n < warmup else cosine(n))
generator = random.Random(options.seed)

model.train()
start, tokens, padded, losses = time.perf_counter(), 0, 0, []
for _ in range(options.epochs):
    order = generator.sample(train, len(train))
    for first in range(0, len(order), options.batch):
        part = batch(order[first : first + options.batch])
        model(**part).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int(part["attention_mask"].sum())
        padded += part["input_ids"].numel()
    losses.append(evaluate(validation))
print(
    json.dumps(
        {
            "seconds": time.perf_counter() - start,
            "steps": steps,
            "tokens": tokens,
            "padded_tokens": padded,
            "eval_losses": losses,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    )
)
