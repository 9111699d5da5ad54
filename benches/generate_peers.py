"""One run of a peer of `tunesmith bench generate`: prints `prefill_tok_s` and `decode_tok_s` as JSON.

    python generate_peers.py llamacpp FILE.gguf      PROMPT TOKENS BATCH THREADS     needs xllamacpp
    python generate_peers.py torch-bf16 FOLDER/FILE  PROMPT TOKENS BATCH THREADS     needs torch, transformers, gguf

`seconds_cpu` is what the process and its threads spent, for machines that are never quiet.
"""

import json
import pathlib
import random
import sys
import threading
import time

kind, file = sys.argv[1:3]
prompt, tokens, batch, threads = map(int, sys.argv[3:])
draw = random.Random(1)
prompts = [[draw.randrange(100, 40000) for _ in range(prompt)] for _ in range(batch)]


def llamacpp():
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx = (prompt + tokens + 8) * batch
    parameters.n_parallel = batch
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(parameters)
    timings = []

    def answer(ids):
        request = {"prompt": ids, "n_predict": tokens, "temperature": 0, "top_k": 1, "ignore_eos": True}
        result = server.handle_completions({**request, "cache_prompt": False})
        timings.append((json.loads(result) if isinstance(result, str) else result)["timings"])

    workers = [threading.Thread(target=answer, args=(ids,)) for ids in prompts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    prefill = mean([timing["prompt_per_second"] for timing in timings])
    # Each counts only its own tokens, over the time that all took together.
    return prefill, sum(timing["predicted_per_second"] for timing in timings)


def torch(precision):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    folder, name = pathlib.Path(file).parent, pathlib.Path(file).name
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[precision]
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype).eval()
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        model(ids[:, :8])
        start = time.perf_counter()
        step = model(ids, use_cache=True, logits_to_keep=1)
        read = time.perf_counter()
        for _ in range(tokens):
            step = model(step.logits[:, -1:].argmax(-1), past_key_values=step.past_key_values, use_cache=True)
        end = time.perf_counter()
    return prompt * batch / (read - start), tokens * batch / (end - read)


def mean(values):
    return sum(values) / len(values)


prefill, decode = llamacpp() if kind == "llamacpp" else torch(kind.removeprefix("torch-"))
print(json.dumps({"prefill_tok_s": prefill, "decode_tok_s": decode, "seconds_cpu": time.process_time()}))
