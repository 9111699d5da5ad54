"""Golden values of the tokenizers, all below tokenizer/.

    python tokenizer_golden.py

cuts.json         pieces of texts under each `tokenizer.ggml.pre`, by Python's `regex`; the patterns are those of
                  transformers' integrations/gguf (Apache-2.0), digits cut off first where `smollm` and its like do
spm_llama.gguf    a tiny SentencePiece BPE vocabulary as Llama 2 has it: a space before the text, byte fallback
spm_gemma.gguf    the same as Gemma has it: no space, runs of spaces and line breaks as tokens of their own
spm_*.json        texts, the ids and the text back, by the sentencepiece library (0.2.3), special tokens cut out first
"""

import json
import pathlib
import tempfile

import gguf
import regex
import sentencepiece

HERE = pathlib.Path(__file__).parent / "tokenizer"

TEXTS = [
    "Hello, world!", "the quick brown fox jumps over the lazy dog", " leading", "trailing ", "  two  spaces  ",
    "a\n\nb\n c\t d\r\n", "\n", " ", "   ", "1234567 3.14 2024-07-26 ½ Ⅷ ٣٤", "naïve café Ångström", "日本語のテキスト。",
    "中文字符，测试", "한국어 문장", "Привет, мир", "שלום עולם", "مرحبا بالعالم", "हिन्दी में", "🦀🙂👩‍👩‍👧 emoji", "don't you'll IT'S we'Ve",
    "def f(x):\n    return x**2  # comment\n", "camelCase HTTPServer XMLHttp", "https://example.org/a?b=c&d=%20", "a▁b",
    "\u00a0\u2028\u3000wide", "x\u0301 combining", "$100 €5 <tag/> [x] {y} ~`^|", "\x00\x01\x7f", "aaaaaaaaaaaaaaaaaaaaaaaa",
    "ABCdef123ghi!!!???", "....    ....", "unbelievably internationalisation",
]

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = [CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + REST]
QWEN2 = [CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + REST]
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def words(ending):
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{UPPER}*{LOWER}+{ending}|{start}{UPPER}+{LOWER}*{ending}|"


CUTS = {
    **dict.fromkeys(["gpt-2", "phi-2", "olmo", "mpt"], [GPT2]),
    **dict.fromkeys(["smollm", "refact", "starcoder", "codeshell"], [r"\p{N}", GPT2]),
    **dict.fromkeys(["llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "dbrx", "smaug-bpe"], LLAMA3),
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen", "stablelm2"], QWEN2),
    "tekken": [words("") + r"\p{N}|" + REST_SLASH],
    **dict.fromkeys(["gpt-4o", "llama4"], [words(CONTRACTIONS + "?") + r"\p{N}{1,3}|" + REST_SLASH]),
}


def cut(text, patterns):
    """Each pattern cuts the pieces the one before has left; what it does not match stays a piece."""
    pieces = [text]
    for pattern in patterns:
        pattern = regex.compile(pattern)
        finer = []
        for piece in pieces:
            at = 0
            for match in pattern.finditer(piece):
                finer += [piece[at : match.start()], match.group()]
                at = match.end()
            finer.append(piece[at:])
        pieces = [piece for piece in finer if piece]
    return pieces


PARAGRAPH = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.", "Every note is kept where it was written.",
    "Hello, world! Hello, friends: how are you today?", "She said that 12 of the 345 files were lost in 2024.",
    "def f(x): return x + 1", "naïve café in Ångström", "日本語のテキストを読む", "Привет, мир", "international organisation",
    "the other one and the one after that", "unbelievable, unbelievably, believe", "a b c d e f g h i j k l m n o p",
]


def spm(name, prefix, symbols):
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(PARAGRAPH * 4), model_prefix=f"{folder}/m", model_type="bpe", vocab_size=560,
            byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=prefix,
            remove_extra_whitespaces=False, character_coverage=0.99, user_defined_symbols=symbols,
            control_symbols=["<end_of_turn>"], split_digits=True, num_threads=1, minloglevel=2,
        )
        model = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/m.model")
    types = gguf.TokenType
    tokens, scores, kinds = [], [], []
    for id in range(model.vocab_size()):
        token = model.id_to_piece(id)
        kind = types.NORMAL
        if model.is_unknown(id):
            kind = types.UNKNOWN
        elif model.is_control(id):
            kind = types.CONTROL
        elif model.is_byte(id):
            kind = types.BYTE
        elif token in symbols:
            # As convert_hf_to_gguf writes them.
            kind, token = types.USER_DEFINED, token.replace("▁", " ")
        tokens.append(token)
        scores.append(model.get_score(id))
        kinds.append(kind)
    writer = gguf.GGUFWriter(HERE / f"{name}.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())
    writer.add_add_space_prefix(prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    cases = []
    specials = {"<s>": model.bos_id(), "</s>": model.eos_id(), "<end_of_turn>": model.piece_to_id("<end_of_turn>")}
    for text in TEXTS + ["<s>user</s> and<end_of_turn>\nthe end", "the<end_of_turn>", "<end_of_turn><end_of_turn> the"]:
        if "▁" in text:
            continue  # the library cannot tell it from a space either
        ids, decoded = [], ""
        for piece in regex.split("(<s>|</s>|<end_of_turn>)", text):
            if piece in specials:
                ids.append(specials[piece])
                decoded += piece
            elif piece:
                ids += model.encode(piece)
                # Every piece of text gets the prefix, but only the first loses it again.
                decoded += (" " if prefix and decoded else "") + piece
        cases.append({"text": text, "ids": ids, "decoded": decoded})
    (HERE / f"{name}.json").write_text(json.dumps(cases, ensure_ascii=False, indent=0) + "\n")


def main():
    HERE.mkdir(exist_ok=True)
    cuts = {pre: {text: cut(text, patterns) for text in TEXTS} for pre, patterns in sorted(CUTS.items())}
    (HERE / "cuts.json").write_text(json.dumps(cuts, ensure_ascii=False, indent=0) + "\n")
    spm("spm_llama", True, [])
    spm("spm_gemma", False, ["<start_of_turn>", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁"])


main()
