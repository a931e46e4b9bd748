"""Predict the weights a model would have had with more data, from how it forgets.

``know-predict ckpt0 … ckpt4 -o out.safetensors`` on the command line; see the README.

The packages, from the top of the data flow down; each imports only from those below it:

====================  =====================================================================
``cli``               arguments in, text out
``evaluation``        downstream tasks and the transfer protocol
``meta``              windows from recorded trajectories, and KNOWN's meta-training
``forgetting``        nested subsets, and the recorder for training loops
``methods``           predictors behind one signature: windows in, predicted values out
``engine``            plan, read, compute, write
``hypermodel``        KNOWN: the readable module, bundles on disk, the Keras importer
``checkpoints``       safetensors files and folders, the aligned trajectory, atomic output
``kinds``             which tensor is conv, fc, bias or copied (and ``normalisation``)
====================  =====================================================================
"""

__version__ = "0.1.0"
