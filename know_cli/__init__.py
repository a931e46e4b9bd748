"""Predict the weights a model would have had with more data, from how it forgets.

``know-predict ckpt0 … ckpt4 -o out.safetensors`` on the command line; see the README.

The packages, from the top of the data flow down; each imports only from those below it:

====================  =====================================================================
``cli``               arguments in, text out
``plots``             pictures of trajectories, landscapes and results
``demo``              all of it on real images, in a minute
``benchmark``         how fast the engine is, against named baselines
``evaluation``        downstream tasks, and what a predicted start is worth on them
``meta``              collecting trajectories, and KNOWN's meta-training
``lab``               the floor of the two: data sets, networks, fitting, processes
``choosing``          candidates, a search among them by a user's measure, its confirmation
``callbacks``         recording from Hugging Face's Trainer and Lightning
``forgetting``        nested subsets, and the recorders for training loops
``prediction``        the main flow: from paths and options to a written checkpoint, and back
``methods``           predictors behind one signature: windows in, predicted values out
``known``             KNOWN: the readable module, its kernels, bundles on disk
``settle``            a hyper-model that is an average: its module, bundles on disk
``engine``            plan, read, compute, write; knows predictors, and no hyper-model
``ranks``             the processes that work on one output together
``kinds``             which tensor is conv, fc, bias or copied (and ``normalisation``)
``checkpoints``       safetensors files and folders, the aligned trajectory, atomic output
``passes``            compiled passes over many numbers, and the same in torch
``files``             the one door to the file system, and its contract
====================  =====================================================================
"""

__version__ = "0.1.0"
