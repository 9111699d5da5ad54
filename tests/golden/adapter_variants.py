#!/usr/bin/env python3
"""What LoRA's relatives compute, through PEFT on the tiny llama, float32 CPU:
DoRA, rank and alpha patterns, dropout on the input of each pair (with and without DoRA), NEFTune, LoRA+ steps, merging
-> llama/adapter_variants.safetensors, llama/adapter_variants.json, llama/adapter_dora/ (as PEFT saves it)
The random numbers are this project's own, written down again here: PEFT's dropout module and the embedding are replaced by
ones that use them. usage: adapter_variants.py [OUTDIR]   (beside tiny_models.py; torch 2.15.0, transformers 5.23.0, peft 0.21.2)"""
import copy, json, os, sys, warnings; warnings.filterwarnings("ignore")
import torch, peft, transformers as tf
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import save_file
import tiny_models as tm
tf.utils.logging.set_verbosity_error()
out = (sys.argv[1] if len(sys.argv) > 1 else tm.HERE) + "/llama"
torch.set_num_threads(1)
MASK, GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]        # their order in a layer
NOISE, STREAMS, LENGTHS = 0x004E4F495345, [101, 202], [24, 17]

def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)
def first(parts):                                                                                # Random::new(parts).next_u64()
    state = mix(len(parts) ^ GOLDEN)
    for p in parts: state = mix(((state + GOLDEN) & MASK) ^ mix((p + GOLDEN) & MASK))
    return mix((state + GOLDEN) & MASK)
def bits(stream, i): return mix((stream + (i + 1) * GOLDEN) & MASK)
ROWS = [[first([NOISE, s, t]) for t in range(24)] for s in STREAMS]

class Drop(torch.nn.Module):
    def __init__(self, p, linear): super().__init__(); self.p, self.linear = p, linear
    def forward(self, x):
        threshold = round(self.p * 65536); keep = 65536 / (65536 - threshold); m = torch.empty(2, 24, x.shape[-1])
        for b in range(2):
            for t in range(24):
                s = mix(ROWS[b][t] ^ mix(self.linear + 1))
                words = [bits(s, i) for i in range((x.shape[-1] + 3) // 4)]
                m[b, t] = torch.tensor([0.0 if (words[c // 4] >> (16 * (c % 4))) & 0xFFFF < threshold else keep for c in range(x.shape[-1])])
        return x * m
def neftune(alpha, c=64):
    n = torch.zeros(2, 24, c)
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            u = torch.tensor([(bits(ROWS[b][t], i) >> 40) / (1 << 24) for i in range(c)])
            n[b, t] = alpha / (length * c) ** 0.5 * (2 * u - 1)
    return n
def lora(dropout=0.0, targets=ALL, **kw):
    torch.manual_seed(3)
    m = get_peft_model(tm.build("llama"), LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, bias="none", task_type="CAUSAL_LM", target_modules=targets, **kw))
    g = torch.Generator().manual_seed(5)
    for n, p in sorted(m.named_parameters()):
        if "lora_B" in n: p.data.copy_(0.05 * torch.randn(p.shape, generator=g))
        if "magnitude" in n: p.data.mul_(1 + 0.1 * torch.randn(p.shape, generator=g))            # away from the norms
    for n, mod in m.named_modules():
        if dropout and hasattr(mod, "lora_dropout"):
            layer = int(n.split("layers.")[1].split(".")[0]); mod.lora_dropout["default"] = Drop(dropout, layer * 7 + LINEARS.index(n.split(".")[-1]))
    return m.train()
key = lambda n: n.replace(".default.weight", ".weight").replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
def named(m): return {key(n): p for n, p in m.named_parameters() if p.requires_grad}
b, T, R = tm.batch(), {}, {"peft": peft.__version__}
def once(name, m, init=True):
    o = m(**b); o.loss.backward(); R[name] = dict(loss=o.loss.item())
    for k, p in named(m).items():
        if init: T[f"{name}.init.{k}"] = p.detach().clone()
        T[f"{name}.grad.{k}"] = p.grad.clone(); p.grad = None
    return m

dora = once("dora", lora(use_dora=True))
d = f"{out}/adapter_dora"; dora.save_pretrained(d)
os.path.exists(f"{d}/README.md") and os.remove(f"{d}/README.md")
merged = copy.deepcopy(dora).merge_and_unload()
T["dora.merged.model.layers.1.mlp.down_proj.weight"] = merged.model.layers[1].mlp.down_proj.weight.detach().clone()
with torch.no_grad(): R["dora"]["merged_loss"] = merged(**b).loss.item()
once("dropout", lora(dropout=0.25), init=False)                                                  # starts from lora.safetensors' init
once("dora_dropout", lora(dropout=0.25, use_dora=True), init=False)                              # starts from dora.init
m = lora(); noise = neftune(5.0); m.get_input_embeddings().register_forward_hook(lambda mod, i, o: o + noise); once("neftune", m, init=False)
once("patterns", lora(rank_pattern={"down_proj": 2, r"layers\.0\.self_attn\.q_proj": 6}, alpha_pattern={"v_proj": 3.5, r".*1\.mlp.*": 16}))
# Steps as PEFT's LoRA+ groups them: B and the magnitudes at 4 times the rate, weight decay on all.
for name, kw in dict(loraplus={}, loraplus_dora=dict(use_dora=True)).items():
    m = lora(**kw); opt = create_loraplus_optimizer(m, torch.optim.AdamW, lr=5e-3, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)
    log = []
    for s in range(3):
        loss = m(**b).loss; loss.backward()
        log.append(dict(loss=loss.item(), grad_norm=torch.nn.utils.clip_grad_norm_([p for p in m.parameters() if p.requires_grad], 1.0).item())); opt.step(); opt.zero_grad()
    for k, p in named(m).items():
        if "layers.1.mlp" in k: T[f"{name}.after.{k}"] = p.detach().clone()
    R[name] = log
save_file(T, f"{out}/adapter_variants.safetensors"); json.dump(R, open(f"{out}/adapter_variants.json", "w"), indent=1); print(json.dumps(R, indent=1))
