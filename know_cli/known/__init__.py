"""KNOWN, a hyper-model: the readable module, its kernels, its bundles, the Keras importer."""
