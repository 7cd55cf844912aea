"""What GaLore works with: the low-rank subspaces of gradients, under ZeRO."""
