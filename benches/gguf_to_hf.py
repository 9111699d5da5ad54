"""Writes a GGUF model as a Hugging Face folder in bfloat16, which is what PyTorch programs load.

    python gguf_to_hf.py FOLDER FILE.gguf TARGET

Apart from the measured runs, so that decoding the file counts in nobody's peak memory.
"""

import sys

import torch
from transformers import AutoModelForCausalLM

folder, file, target = sys.argv[1:]
decoded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
# A model read from GGUF refuses to be saved; one of the same weights does not.
config = decoded.config
if hasattr(config, "quantization_config"):
    del config.quantization_config
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.load_state_dict(decoded.state_dict())
model.save_pretrained(target)
