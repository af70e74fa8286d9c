"""What pruning each layer, head or block alone would cost, predicted or tried."""
