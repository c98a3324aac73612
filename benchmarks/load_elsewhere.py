"""Load an exported folder with nothing but torch and transformers, and compare its logits with a file.

    python benchmarks/load_elsewhere.py FOLDER [LOGITS.npy [TEXT]]

Runs under any transformers from 4.57 on, without epochal. Prints one line of JSON and exits with 1 if a check fails: the
logits of the file (written if it does not exist) to 1e-5, a batch padded on either side against single texts, generation of a
batch, `pipeline(batch_size=2)` against single texts, and the outputs of Llama's forward pass.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

TEXTS = ["And the king saw the river, and the people of the city.", "In the beginning"]
TOLERANCE = 1e-5


def logits_of(model: Any, rows: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=rows, **options).logits.double()


def padded_deviation(model: Any, tokenizer: Any, side: str) -> float:
    """Largest difference between the logits of a padded batch and those of its texts alone."""
    tokenizer.padding_side = side
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**batch).logits.double()
    alone = [logits_of(model, tokenizer(text, return_tensors="pt").input_ids)[0] for text in TEXTS]
    kept = [row[mask.bool()] for row, mask in zip(logits, batch.attention_mask, strict=True)]
    return max(float((one - other).abs().max()) for one, other in zip(kept, alone, strict=True))


def generated(model: Any, tokenizer: Any) -> bool:
    """Whether greedy continuations are the same in a batch, in a pipeline of two and alone."""
    tokenizer.padding_side = "left"
    options = {"max_new_tokens": 8, "do_sample": False}
    alone = []
    for text in TEXTS:
        row = tokenizer(text, return_tensors="pt")
        alone.append(tokenizer.decode(model.generate(**row, **options)[0], skip_special_tokens=True))
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    together = tokenizer.batch_decode(model.generate(**batch, **options), skip_special_tokens=True)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    piped = [out[0]["generated_text"] for out in pipe(TEXTS, **options)]
    return alone == together == piped


def outputs_as_llama(model: Any, rows: torch.Tensor) -> bool:
    """Whether tuples, caches, positions to keep and hidden states are those of Llama."""
    whole = model(rows, labels=rows, output_hidden_states=True)
    loss, logits, cache, layers = model(rows, labels=rows, output_hidden_states=True, return_dict=False)
    some = model(rows, logits_to_keep=torch.tensor([1, 3])).logits
    first = model(rows[:, :-2])
    rest = model(rows[:, -2:], past_key_values=first.past_key_values).logits
    return (
        bool(torch.isfinite(loss))
        and torch.equal(logits, whole.logits)
        and torch.allclose(some, logits[:, [1, 3]], atol=TOLERANCE)
        and torch.allclose(rest, logits[:, -2:], atol=TOLERANCE)
        and cache.get_seq_length() == rows.shape[1]
        and len(layers) == model.config.num_hidden_layers + 1
        and layers[-1].shape[:2] == rows.shape
        and model(rows, use_cache=False).past_key_values is None
    )


def main(folder: str, expected: Path | None = None, text: str = TEXTS[0]) -> int:
    has_code = "auto_map" in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=has_code).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=has_code)
    rows = tokenizer(text, return_tensors="pt").input_ids
    logits = logits_of(model, rows).numpy()
    if expected is not None and not expected.exists():
        np.save(expected, logits)
    checks = {
        "logits": float(np.abs(logits - np.load(expected)).max()) if expected is not None else 0.0,
        "padding left": padded_deviation(model, tokenizer, "left"),
        "padding right": padded_deviation(model, tokenizer, "right"),
        "generation in a batch": generated(model, tokenizer),
        "outputs as Llama's": outputs_as_llama(model, rows),
        "settings": 0 < tokenizer.model_max_length < 10**6 and tokenizer.pad_token_id is not None
        and model.generation_config.pad_token_id == tokenizer.pad_token_id,
    }  # fmt: skip
    right = all(value is True if isinstance(value, bool) else value <= TOLERANCE for value in checks.values())
    print(
        json.dumps({"transformers": transformers.__version__, "class": type(model).__name__, "right": right, **checks})
    )
    return int(not right)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    sys.exit(main(sys.argv[1], *map(Path, sys.argv[2:3]), *sys.argv[3:4]))
