#!/usr/bin/env python3
"""Four steps of bitsandbytes' 8-bit block-wise AdamW on one tensor of 4500 values (a ragged last block), float32 CPU
-> adamw8bit.safetensors. bitsandbytes 0.50.2 has no CPU kernel for it, so its own PyTorch form of the update is called
(backends/triton/kernels_optim.py), with its torch.compile taken off. usage: adamw8bit_golden.py [OUTDIR]"""
import os, sys, torch
torch.compile = lambda f=None, **k: f if f else (lambda g: g)
torch.set_num_threads(1)
import bitsandbytes.functional as F
from bitsandbytes.backends.triton.kernels_optim import optimizer_update_8bit_blockwise_pytorch as update
from safetensors.torch import save_file
out = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
g = torch.Generator().manual_seed(11)
n, T = 4500, {}
p = 0.1 * torch.randn(n, generator=g); T["init"] = p.clone()
q1, q2 = F.create_dynamic_map(signed=True), F.create_dynamic_map(signed=False)
s1, s2 = torch.zeros(n, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
a1, a2 = torch.zeros((n + 255) // 256), torch.zeros((n + 255) // 256)
for step in range(4):
    grad = torch.randn(n, generator=g) * torch.logspace(-4, 0, n)
    grad[1024:1280] = 0                                                       # a block without gradient
    T[f"gradient.{step}"] = grad.clone()
    update(p, grad, s1, s2, 0.9, 0.999, 0.0, 0.0, 1e-8, step + 1, 1e-2, q1, q2, a1, a2, 0.05, 1.0, False, optimizer_name="adam")
    T |= {f"parameters.{step}": p.clone(), f"first.{step}": s1.clone(), f"second.{step}": s2.clone(), f"first_absmax.{step}": a1.clone(), f"second_absmax.{step}": a2.clone()}
save_file(T, f"{out}/adamw8bit.safetensors")
