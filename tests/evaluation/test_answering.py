"""A conversation through `generate` and its cache, against plain forward passes over what has been said."""

import pytest
import torch

from holdfast import HybridConfig, HybridForCausalLM
from holdfast.data.needle import NeedleTask
from holdfast.evaluation.answering import answer_questions

TASK = NeedleTask(length=60, num_pairs=5, num_keys=8, num_values=8, num_noise=6, window=9)


def model_for(vocab_size: int) -> HybridForCausalLM:
    torch.manual_seed(1)
    eviction = {"num_heads": 2, "head_dim": 8, "window": 9, "budget": 4, "sinks": 1}
    config = HybridConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        mixers=["gated_deltanet", "learned_eviction"],
        mixer_options={"gated_deltanet": {"num_heads": 2, "head_dim": 8}, "learned_eviction": eviction},
        initializer_range=0.5,
        eos_token_id=None,
    )
    return HybridForCausalLM(config).train()


@pytest.mark.parametrize("seed", [0, 7])
def test_answers_are_those_of_one_pass(seed: int) -> None:
    model = model_for(TASK.vocab_size)
    dialogue = answer_questions(model, TASK, seed=seed)
    assert model.training
    model.eval()
    sample = TASK.sample(seed, 1)
    ids = sample["input_ids"][0].tolist()
    spoken = ids[: TASK.context_length + 2]
    assert dialogue.prompt == TASK.describe(spoken)
    for number, answer in enumerate(dialogue.answers):
        column = TASK.context_length + 3 + 2 * number
        spoken = [*spoken, ids[column - 1]]
        with torch.no_grad():
            spoken.append(int(model(input_ids=torch.tensor([spoken]), use_cache=False).logits[0, -1].argmax()))
        assert answer.question == TASK.describe([ids[column - 1]])
        assert answer.expected == TASK.describe([ids[column]])
        assert answer.given == TASK.describe([spoken[-1]])
        assert answer.correct == (spoken[-1] == ids[column])
        assert answer.distance == sample["distance"][0, column]
    assert len(dialogue.answers) == 5
    assert len({answer.given for answer in dialogue.answers}) > 1
    assert dialogue.cache_bytes > 0
    assert dialogue.tokens_per_second > 0


def test_a_small_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has 20 token ids, the task 25"):
        answer_questions(model_for(20), TASK)
