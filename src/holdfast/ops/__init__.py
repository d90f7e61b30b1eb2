"""Functions of tensors that layers are made of, each in a module of its name: docs/ops.md."""
