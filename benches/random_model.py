"""A model of real layer sizes with random weights, to train on where the real one is not at hand: what the memory plan
says against what a run takes does not depend on the values.

    python random_model.py llama-1b|granite-h-micro FOLDER --tokenizer FOLDER [--layers N]

`--tokenizer` names a folder with tokenizer.json and tokenizer_config.json whose ids all fit (SmolLM2's base, as a `model`
stage writes it). Writes a Hugging Face folder of bf16 safetensors. Needs torch and transformers.
"""

import argparse
import pathlib
import shutil

import torch
from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig, LlamaConfig

LLAMA_3_2_1B = dict(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
    head_dim=64, max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=True,
    rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0,
                         high_freq_factor=4.0, original_max_position_embeddings=8192),
)
GRANITE_4_0_H_MICRO = dict(
    vocab_size=100352, hidden_size=2048, intermediate_size=8192, shared_intermediate_size=8192,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5,
    position_embedding_type="nope", embedding_multiplier=12.0, residual_multiplier=0.22,
    attention_multiplier=0.015625, logits_scaling=8.0, num_local_experts=0, num_experts_per_tok=0,
    mamba_n_heads=64, mamba_d_head=64, mamba_n_groups=1, mamba_d_state=128, mamba_d_conv=4, mamba_expand=2,
    mamba_chunk_size=256, mamba_conv_bias=True, mamba_proj_bias=False, tie_word_embeddings=True,
)

parser = argparse.ArgumentParser()
parser.add_argument("shape", choices=["llama-1b", "granite-h-micro"])
parser.add_argument("folder", type=pathlib.Path)
parser.add_argument("--tokenizer", type=pathlib.Path, required=True)
parser.add_argument("--layers", type=int)
options = parser.parse_args()

# The ids of SmolLM2's tokenizer, whose files go with the model.
ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=2)
if options.shape == "llama-1b":
    layers = options.layers or 16
    config = LlamaConfig(**LLAMA_3_2_1B, **ids, num_hidden_layers=layers)
else:
    layers = options.layers or 40
    types = ["attention" if index % 10 == 5 else "mamba" for index in range(layers)]
    config = GraniteMoeHybridConfig(**GRANITE_4_0_H_MICRO, **ids, num_hidden_layers=layers, layer_types=types)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.save_pretrained(options.folder)
for name in ["tokenizer.json", "tokenizer_config.json"]:
    shutil.copy(options.tokenizer / name, options.folder / name)
print(f"{options.folder}: {sum(p.numel() for p in model.parameters()):,} parameters in {layers} layers")
