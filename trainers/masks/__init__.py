"""Parts of SparsePO and MaPO: options, forward pass, optimiser groups and files of the weights of tokens."""
