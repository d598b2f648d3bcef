"""A chat in the terminal: the replies stream in, and the model sees the whole dialog. An empty line ends it.

python examples/chat_stream.py [CHECKPOINT]
"""

import sys

from llama2 import LLM

with LLM(sys.argv[1] if len(sys.argv) > 1 else "build/converted_checkpoints") as llm:
    dialog: list[dict[str, str]] = []
    while question := (input("> ") if sys.stdin.isatty() else sys.stdin.readline().strip()):
        dialog.append({"role": "user", "content": question})
        reply = ""
        for piece in llm.stream(dialog, temperature=0.6, max_new_tokens=200):
            print(piece.text, end="", flush=True)
            reply += piece.text
        print()
        dialog.append({"role": "assistant", "content": reply})
