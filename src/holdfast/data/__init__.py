"""Data to train and evaluate on: the generated needle task (`needle`) and real text (`text`)."""
