"""A fit over several processes of `torch.distributed`: each runs the model on its share of the draws.

A script started by ``torchrun`` needs a call of `torch.distributed.init_process_group` and no other change.
Every process draws all draws of the guide, from the same random numbers, and runs the model on its share of
them. Log densities and their gradients in the draws are then put together, so that every process has those of
all draws and goes on as one process would: losses, weights, schedules and checkpoints know nothing of it. The
scores and the Gram matrix of a natural step are divided likewise, where they are more work than to send.
"""
