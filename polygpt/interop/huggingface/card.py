"""The model card of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polygpt.model import ModelConfig, model_of

_LABELS = {
    "steps": "training steps",
    "train_loss": "training loss (nats per token)",
    "val_loss": "validation loss (nats per token)",
    "val_bits_per_byte": "validation bits per byte",
    "source": "imported from",
}


def model_card(
    name: str, architecture: str, config: ModelConfig, facts: Mapping[str, Any], with_tokenizer: bool
) -> str:
    """Markdown with the front matter that the hub reads. `facts` are the run's name and figures."""
    layer = config.layers[0] if config.layers else None
    rows = {
        "architecture": architecture,
        "parameters": f"{model_of(config).num_parameters:,}",
        "layers": config.num_layers,
        "width": config.width,
        "context": config.context_length,
        "vocabulary": config.vocab_size - config.vocab_padding,
        "attention": f"{layer.attention.kind}, {layer.attention.num_heads} heads, {layer.attention.kv_heads} kv heads",
        "feed-forward": f"{layer.feedforward.kind}, hidden {layer.feedforward.mlp_dim}",
        "position": config.position.kind,
        "norm": config.norm.kind,
    }
    rows |= {_LABELS[key]: _format(facts[key]) for key in _LABELS if facts.get(key) is not None}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    tokens = f'AutoTokenizer.from_pretrained("{name}")("Hello", return_tensors="pt").input_ids'
    tokens = tokens if with_tokenizer else "torch.tensor([[0]])"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [polygpt]
---

# {facts.get("name") or name}

Trained or converted with polygpt.

| | |
|---|---|
{table}

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
print(model({tokens}).logits)
```
"""


def _format(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
