"""Renders every template of a folder as transformers (5.23.0) does and writes expected.json into it.

    python templates_golden.py [FOLDER]        default: templates/ beside this file

`strftime_now` answers with the day the engine answers with, 2024-07-26.
"""

import json
import pathlib
import sys
from datetime import datetime

from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template


class FixedDay(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime(2024, 7, 26, tzinfo=tz)


chat_template_utils.datetime = FixedDay

TOOLS = [{
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a <city> & its \"surroundings\", e.g. München.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}]
CALL = [{"id": "call12345", "type": "function",
         "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2, "wind": True, "at": None}}}]


def turn(role, content):
    return {"role": role, "content": content}


ASK, ANSWER = turn("user", "What is 6 times 7?"), turn("assistant", "It is 42.")
SYSTEM = turn("system", "You are a careful assistant.\nAnswer briefly.")
CONVERSATIONS = {
    "question": [ASK],
    "answered": [ASK, ANSWER],
    "system": [SYSTEM, ASK, ANSWER],
    "turns": [ASK, ANSWER, turn("user", "And 7 times 8?"), turn("assistant", "56, naturally."), turn("user", "Thanks!")],
    "system_turns": [SYSTEM, ASK, ANSWER, turn("user", "And 7 times 8?"), turn("assistant", "56, naturally.")],
    "spaces": [turn("user", "  \n two  spaces \t"), turn("assistant", "\n\n indented\n  code\n\n"), turn("user", "ok ")],
    "unicode": [turn("user", "naïve café 日本語 🦀 <b>&amp;</b> {{ x }} 'q' \"d\""), turn("assistant", "— ‘é’ \\n \u00a0")],
    "thinking": [ASK, turn("assistant", "<think>\nSix sevens.\n</think>\n\nIt is 42."), turn("user", "Sure?"),
                 turn("assistant", "<think>\nYes.\n</think>\n\nSure.")],
    "empty": [turn("user", ""), turn("assistant", "")],
    "two_users": [ASK, turn("user", "Please.")],
    "tools": [turn("user", "Weather in Zürich?")],
    "tool_call": [SYSTEM, turn("user", "Weather in Zürich?"), {"role": "assistant", "content": "", "tool_calls": CALL},
                  {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": "{\"sky\": \"klar\"}"},
                  turn("assistant", "Clear.")],
}
WITH_TOOLS = {"tools", "tool_call"}

# Template name begins with -> beginning of text, end of text. The longest beginning counts.
TOKENS = {
    "": ("<s>", "</s>"), "llama3": ("<|begin_of_text|>", "<|eot_id|>"), "qwen": (None, "<|im_end|>"),
    "smollm": ("<|im_start|>", "<|im_end|>"), "chatml": (None, "<|im_end|>"), "gemma": ("<bos>", "<eos>"),
    "phi3": ("<s>", "<|endoftext|>"), "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>"), "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "glm4": (None, "<|endoftext|>"), "gptoss": ("<|startoftext|>", "<|return|>"),
}


def render(source, conversation, prompt, bos, eos):
    tokens = {"bos_token": bos, "eos_token": eos}
    try:
        rendered, _ = render_jinja_template(
            [CONVERSATIONS[conversation]], tools=TOOLS if conversation in WITH_TOOLS else None, chat_template=source,
            add_generation_prompt=prompt,
            **{name: token for name, token in tokens.items() if token is not None},
        )
        return {"text": rendered[0]}
    except Exception as error:
        return {"error": str(error)}


def main():
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "templates"
    templates = {}
    for path in sorted(folder.glob("*.jinja")):
        source = path.read_text()
        bos, eos = TOKENS[max((start for start in TOKENS if path.stem.startswith(start)), key=len)]
        rendered = {
            name: {key: render(source, name, prompt, bos, eos) for key, prompt in [("plain", False), ("prompt", True)]}
            for name in CONVERSATIONS
        }
        templates[path.stem] = {"bos_token": bos, "eos_token": eos, "rendered": rendered}
    conversations = {
        name: {"messages": messages, "tools": TOOLS if name in WITH_TOOLS else None}
        for name, messages in CONVERSATIONS.items()
    }
    out = {"conversations": conversations, "templates": templates}
    (folder / "expected.json").write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n")


main()
