"""The smallest recipe, for runs of seconds on `text.txt` in the current folder."""

_RECIPE = """\
model:
  context_length: 16
  embed_dim: 16
  num_layers: 1
  position: {kind: rope}
  norm: {kind: rmsnorm}
  attention: {kind: softmax, num_heads: HEADS}
  feedforward: {kind: mlp, mlp_dim: 32}
  dropout: DROPOUT
tokenizer: {kind: char}
data: {path: text.txt, split: fraction}
training:
"""


def tiny_recipe(training, *, heads=2, dropout=0.0):
    """Its YAML; `training` has a line of YAML for each setting of the training."""
    settings = "".join(f"  {line}\n" for line in training.splitlines())
    return _RECIPE.replace("HEADS", str(heads)).replace("DROPOUT", str(dropout)) + settings
