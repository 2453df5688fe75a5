"""A serving process with whichever transformers its environment has: it loads models and says what they compute.

Reads ``{"models": [[name or folder, {arguments}], …], "ids": […], "texts": […]}`` and writes, for each model, its
logits and the ids of the texts.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import client  # closes the network but for the endpoint
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(name: str, arguments: dict[str, Any], ids: list[int], texts: list[str]) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **arguments).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    found: dict[str, Any] = {"logits": logits.tolist(), "tokens": None}
    if texts:
        tokenizer = AutoTokenizer.from_pretrained(name, **arguments)
        found["tokens"] = [tokenizer(text)["input_ids"] for text in texts]
        found["special"] = sorted(tokenizer.all_special_tokens)
        found["chat"] = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    return found


if __name__ == "__main__":
    given = json.load(sys.stdin)
    found = [load(name, arguments, given["ids"], given["texts"]) for name, arguments in given["models"]]
    json.dump({"transformers": transformers.__version__, "hub": client.version(), "found": found}, sys.stdout)
