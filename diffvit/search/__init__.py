"""Search for a better recipe: a space, trials that are real training runs, and an answer that `pretrain` takes."""
