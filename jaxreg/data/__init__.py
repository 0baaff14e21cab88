"""Network inputs on the host: manifests, pairs, preprocessing, batches."""
