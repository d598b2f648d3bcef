"""Coroutines that ask one model at the same time: their requests are computed together.

python examples/async_batch.py [CHECKPOINT]
"""

import asyncio
import sys
import time

from llama2 import AsyncLLM

COUNTRIES = ["France", "Italy", "Spain", "Peru"]


async def ask(llm: AsyncLLM, country: str) -> None:
    begin, tokens = time.perf_counter(), 0
    async for piece in llm.stream(f"The capital of {country} is", temperature=0, max_new_tokens=16):
        tokens += len(piece.token_ids)
        if "." in piece.text:
            break  # which ends the request
    print(f"{country}: {tokens} tokens in {time.perf_counter() - begin:.2f} s")


async def main(checkpoint: str) -> None:
    async with AsyncLLM(checkpoint) as llm:
        await asyncio.gather(*(ask(llm, country) for country in COUNTRIES))
        (completion,) = await llm.chat([{"role": "user", "content": "Say hello!"}], temperature=0, max_new_tokens=16)
        print(completion.text)


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "build/converted_checkpoints"))
