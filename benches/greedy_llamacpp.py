"""Greedy text of tunesmith and of llama.cpp on the same GGUF file, token for token.

    python greedy_llamacpp.py TUNESMITH FILE.gguf [--exact] [--tokens 64] [--threads 1]

tunesmith computes with exactly the file's values, in f32 (`--base source`). llama.cpp rounds activations to 8 bits
before each product with quantised weights. Where the texts part, the line shows by how much tunesmith's choice led
there, and whether llama.cpp took tunesmith's runner-up: a small lead is a tie within that rounding. `--exact` gives
llama.cpp the same values as f32 and an f32 cache, so that it rounds no more than tunesmith does: then all should be
equal, and what differs without it is llama.cpp's rounding. Needs xllamacpp, and gguf for `--exact`.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

import xllamacpp

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was a little dragon who",
    "To make a good cup of tea, first",
    "The three most important rules of writing are",
    "def fibonacci(n):",
    "In the year 1969, astronauts",
    "Photosynthesis is the process by which",
    "Dear Sir or Madam, I am writing to",
    "A list of fruits: apple, banana,",
]

parser = argparse.ArgumentParser()
parser.add_argument("tunesmith")
parser.add_argument("file")
parser.add_argument("--tokens", type=int, default=64)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--exact", action="store_true", help="let llama.cpp compute in f32")
options = parser.parse_args()


def as_f32(source, target):
    """Writes a copy of a llama GGUF file whose tensors are all f32."""
    import gguf
    import numpy

    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    written = ("general.architecture", "general.file_type", "general.quantization_version")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in written:
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)
        writer.add_tensor(tensor.name, numpy.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


with tempfile.NamedTemporaryFile("w", suffix=".txt") as prompts:
    prompts.write("\n".join(PROMPTS) + "\n")
    prompts.flush()
    command = [options.tunesmith, "bench", "generate", "--model", options.file, "--base", "source", "--text", prompts.name]
    command += ["--tokens", str(options.tokens), "--threads", str(options.threads), "--json", "-"]
    ours = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

folder = tempfile.TemporaryDirectory()
parameters = xllamacpp.CommonParams()
parameters.model.path = options.file
if options.exact:
    parameters.model.path = str(pathlib.Path(folder.name) / "f32.gguf")
    as_f32(options.file, parameters.model.path)
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
parameters.n_ctx = 1024
parameters.n_parallel = 1
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = options.threads
server = xllamacpp.Server(parameters)

equal = 0
for mine in ours:
    request = {"prompt": mine["prompt"], "n_predict": options.tokens, "top_k": 1, "temperature": 0, "ignore_eos": False}
    answer = server.handle_completions({**request, "cache_prompt": False})
    answer = json.loads(answer) if isinstance(answer, str) else answer
    theirs = answer["choices"][0]["text"]
    # Special tokens are text here and nothing there; an answer that ended there is compared as far as it goes.
    ended = answer["choices"][0]["finish_reason"] == "stop"
    if mine["text"] == theirs or (ended and mine["text"].startswith(theirs)):
        equal += 1
        print(f"equal    {mine['prompt']!r}")
        continue
    so_far = ""
    for index, step in enumerate(mine["steps"]):
        if not theirs.startswith(so_far + step["token"]):
            break
        so_far += step["token"]
    took_second = theirs.startswith(so_far + step["runner_up"])
    gaps = sorted(one["gap"] for one in mine["steps"])
    print(
        f"differs  {mine['prompt']!r} at token {index}: {step['token']!r} leads {step['runner_up']!r} by {step['gap']:.3f}"
        f" (rank {gaps.index(step['gap']) + 1} of {len(gaps)} leads, median {gaps[len(gaps) // 2]:.2f});"
        f" llama.cpp took {'the runner-up' if took_second else repr(theirs[len(so_far):len(so_far) + 12])}"
    )
print(f"{equal} of {len(ours)} equal over {options.tokens} tokens")
