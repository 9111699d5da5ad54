#!/usr/bin/env python3
"""How far PyTorch itself is off in bfloat16, on the tiny models with their adapters: what a device that computes in
bfloat16 is held against. Writes bf16_errors.json.

usage: bf16_errors.py          (tiny_models.py and lora_golden.py first; everything is read from beside this file)"""
import json, os, warnings

warnings.filterwarnings("ignore")
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import tiny_models

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
HYBRID = ATTENTION + ["in_proj", "out_proj", "input_linear", "output_linear"]


def adapted(family, lora):
    """The model with the adapter of lora_golden.py before its first step."""
    targets = HYBRID if family == "granitemoehybrid" else ATTENTION + MLP
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", target_modules=targets)
    model = get_peft_model(tiny_models.build(family), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(lora[f"init.{name.replace('.default', '')}"])
    return model


def errors(family):
    """Of logits and of the last hidden states the worst, of all gradients together the distance."""
    golden, lora = load_file(f"{family}/golden.safetensors"), load_file(f"{family}/lora.safetensors")
    batch = tiny_models.batch()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        out = tiny_models.build(family).to(torch.bfloat16)(**batch, output_hidden_states=True)
    last = max(int(name.split(".")[1]) for name in golden if name.startswith("hidden."))
    model = adapted(family, lora).to(torch.bfloat16).train()
    model(**batch).loss.backward()
    squares = 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            want = lora[f"grad0.{name.replace('.default', '')}"]
            squares += (parameter.grad.double() - want.double()).square().sum().item()

    def worst(got, want):
        return (got.float() - want)[real].abs().max().item()

    return {
        "logits": worst(out.logits, golden["logits"]),
        "hidden states": worst(out.hidden_states[-1], golden[f"hidden.{last}"]),
        "gradients": squares**0.5,
    }


if __name__ == "__main__":
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    found = {"torch": torch.__version__} | {family: errors(family) for family in tiny_models.FAM}
    json.dump(found, open("bf16_errors.json", "w"), indent=1)
    print(json.dumps(found, indent=1))
