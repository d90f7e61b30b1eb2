"""What a language model is trained to make small."""

import torch
import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits: Tensor, labels: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Mean cross-entropy of labels[:, t + 1] given logits[:, t], fp32.

    Args:
        logits: [B, T, V]. labels: [B, T], −100 where nothing is to be predicted.
        mask: [B, T] or longer, of which the last T columns count; a token beside a pad is not predicted.
        cu_seqlens: [N + 1] offsets of documents in one row, whose first tokens are not predicted.

    Raises:
        ValueError: logits are of fewer columns than labels.
    """
    if logits.shape[1] != labels.shape[1]:
        raise ValueError("labels need the logits of every column: leave logits_to_keep at 0")
    labels = labels.to(logits.device)
    targets = labels[:, 1:]
    if mask is not None:
        real = mask[:, -labels.shape[1] :].to(logits.device).bool()
        targets = targets.masked_fill(~(real[:, 1:] & real[:, :-1]), -100)
    if cu_seqlens is not None:
        begins = torch.zeros(labels.shape[1] + 1, dtype=torch.bool, device=labels.device)
        begins[cu_seqlens.to(labels.device).long()] = True
        targets = targets.masked_fill(begins[1 : labels.shape[1]], -100)
    targets = F.pad(targets, (0, 1), value=-100)  # all logits stay in their place: leaving out the last would copy them
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)
