"""From encoded files to uint8 batches on the device: sources, decoding, crops, order, workers, prefetching."""
