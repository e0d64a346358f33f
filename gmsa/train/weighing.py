"""What tokens weigh where groups of like weight are merged (gmsa/model/balanced.py), counted in a run's own data."""

import torch
from transformers import PreTrainedTokenizerBase

from gmsa.model.balanced import BalancedMerging, token_weights
from gmsa.train.batches import TrainingBatches

COUNTED = 1_000_000  # tokens that are counted, if there are so many


def weigh_tokens(merging: BalancedMerging, batches: TrainingBatches, tokenizer: PreTrainedTokenizerBase) -> None:
    """Count the tokens of a run's first contexts, and weigh all by that.

    Args:
        merging: gets the weights.
        batches: of the run; without any all tokens weigh the same.
        tokenizer: of the encoder.
    """
    counts = torch.zeros(len(merging.token_weights))
    for number in range(len(batches)):
        for example in batches.examples(number):
            for context in example.contexts:
                counts += torch.bincount(torch.tensor(context, dtype=torch.long), minlength=len(counts))
        if counts.sum() >= COUNTED:
            break
    if counts.any():
        spellings = tokenizer.batch_decode([[number] for number in range(len(counts))])
        merging.token_weights.data.copy_(token_weights(counts, spellings))
