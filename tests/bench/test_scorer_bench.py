"""Operations of the scorer, as the benchmark counts them."""

from holdfast.bench.scorer import scorer_flops
from holdfast.mixers.scorers import ConvScorer


def test_operations_of_one_score() -> None:
    scorer = ConvScorer(2, 8, kernel_sizes=(3, 1), dilations=(1, 1))
    per_head = 3 * 8 * 4 + 4 * 2 + 2  # two convolutions that halve the channels, and the last map
    assert scorer_flops(scorer, 5) == 2 * 5 * 2 * per_head
