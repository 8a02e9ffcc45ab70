"""Training on several ranks: what the processes of torch.distributed tell each other."""
