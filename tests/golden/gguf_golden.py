"""Block formats of GGUF: random bytes and the f32 values the `gguf` package (0.19.0) decodes them to.

    python gguf_golden.py        writes gguf_blocks.safetensors beside this file

Per type, `<type>.bytes` (u8) holds a few blocks of random bytes whose f16 scales are finite and of ordinary size,
and `<type>.values` (f32) what `gguf.quants.dequantize` makes of them. Where the package can quantise the type,
half of the blocks are made by it from normal values.
"""

import pathlib

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from safetensors.numpy import save_file

# Type -> where its f16 scales are.
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    "IQ4_NL": [0], "IQ4_XS": [0],
}
BLOCKS = 6


def main():
    random = np.random.default_rng(20240726)
    tensors = {}
    for name, places in SCALES.items():
        kind = GGMLQuantizationType[name]
        values, size = GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (BLOCKS, size), dtype=np.uint8)
        for at in places:
            scales = random.normal(0, 0.05, BLOCKS).astype(np.float16)
            blocks[:, at : at + 2] = scales.view(np.uint8).reshape(BLOCKS, 2)
        try:
            real = quants.quantize(random.normal(0, 0.02, (BLOCKS, values)).astype(np.float32), kind)
            blocks = np.concatenate([blocks, real.reshape(BLOCKS, size)])
        except NotImplementedError:
            pass
        decoded = quants.dequantize(blocks, kind).astype(np.float32)
        assert np.isfinite(decoded).all(), name
        tensors[f"{name}.bytes"] = blocks.reshape(-1)
        tensors[f"{name}.values"] = decoded.reshape(-1)
    save_file(tensors, pathlib.Path(__file__).parent / "gguf_blocks.safetensors")


main()
