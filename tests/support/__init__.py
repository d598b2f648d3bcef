"""What several tests share: random weights, process groups, and a small SentencePiece model."""
