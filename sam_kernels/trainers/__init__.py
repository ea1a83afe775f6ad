"""SAM from the trainers people use: one module for each, and importing it imports no trainer.

    lightning     SAMCallback for Lightning's Trainer
    transformers  SAMTrainerMixin for the Trainer of Hugging Face
    accelerate    closures() for loops written with accelerate
    deepspeed     Driver around a DeepSpeed engine with ZeRO-1 or ZeRO-2

`sam_kernels.compat.composer` is for MosaicML's Composer.

A trainer that accumulates gradients hands its optimizer a closure for the last micro-batch only, or none. All
gradients of a SAM step are of the whole batch, so what is here keeps the micro-batches of a step and
evaluates all of them again at the perturbed weights.
"""
