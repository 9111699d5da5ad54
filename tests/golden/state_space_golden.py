#!/usr/bin/env python3
"""LoRA and the constants of Mamba's state space (A_log, D, dt_bias) trained together on the tiny granitemoehybrid, float32 CPU:
gradients, three AdamW steps (no weight decay on the constants, as Mamba's own code has it), and the adapter with both
-> granitemoehybrid/state_space.safetensors, granitemoehybrid/state_space.json, granitemoehybrid/adapter_state_space/
PEFT has no option for bare parameters, but loads every tensor that an adapter's file names as the wrapped model does: shown here.
usage: state_space_golden.py [OUTDIR]   (beside tiny_models.py; torch 2.15.0, transformers 5.23.0, peft 0.21.2)"""
import json, os, sys, warnings; warnings.filterwarnings("ignore")
import torch, peft, transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
import tiny_models as tm
tf.utils.logging.set_verbosity_error()
out = (sys.argv[1] if len(sys.argv) > 1 else tm.HERE) + "/granitemoehybrid"
torch.set_num_threads(1)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj", "input_linear", "output_linear"]
CONSTANTS = ("mamba.A_log", "mamba.D", "mamba.dt_bias")
b = tm.batch()
m = get_peft_model(tm.build("granitemoehybrid"), LoraConfig(r=4, lora_alpha=8, bias="none", task_type="CAUSAL_LM", target_modules=TARGETS))
lora = load_file(f"{out}/lora.safetensors")                                                      # starts where the plain adapter does
for n, p in m.named_parameters():
    if "lora_" in n: p.data.copy_(lora["init." + n.replace(".default", "")])
    if n.endswith(CONSTANTS): p.requires_grad_(True)
m.train(); named = {n.replace(".default", ""): p for n, p in m.named_parameters() if p.requires_grad}
assert sum(n.endswith(CONSTANTS) for n in named) == 6
groups = [dict(params=[p for n, p in named.items() if not n.endswith(CONSTANTS)], weight_decay=0.01),
          dict(params=[p for n, p in named.items() if n.endswith(CONSTANTS)], weight_decay=0.0)]
opt = torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.999), eps=1e-8)
T, log = {}, []
for s in range(3):
    loss = m(**b).loss; loss.backward()
    if s == 0: T.update({f"grad0.{n}": p.grad.clone() for n, p in named.items()})
    norm = torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0).item()
    log.append(dict(loss=loss.item(), grad_norm=norm)); opt.step(); opt.zero_grad()
T.update({f"after3.{n}": p.detach().clone() for n, p in named.items() if n.endswith(CONSTANTS)})
with torch.no_grad(): log.append(dict(loss=m(**b).loss.item()))
save_file(T, f"{out}/state_space.safetensors")
d = f"{out}/adapter_state_space"; m.save_pretrained(d); os.path.exists(f"{d}/README.md") and os.remove(f"{d}/README.md")
whole = {k: v.contiguous() for k, v in get_peft_model_state_dict(m).items()} | {n: p.detach().clone() for n, p in named.items() if n.endswith(CONSTANTS)}
save_file(whole, f"{d}/adapter_model.safetensors", metadata={"format": "pt"})
def loaded(folder):
    with torch.no_grad(): return PeftModel.from_pretrained(tm.build("granitemoehybrid"), folder)(**b).loss.item()
assert abs(loaded(d) - log[-1]["loss"]) < 1e-6 < abs(log[0]["loss"] - log[-1]["loss"]), (loaded(d), log)
if len(sys.argv) > 2: print("the adapter in", sys.argv[2], "gives", loaded(sys.argv[2]), "after PEFT has loaded it")
json.dump(dict(peft=peft.__version__, log=log), open(f"{out}/state_space.json", "w"), indent=1); print(log)
